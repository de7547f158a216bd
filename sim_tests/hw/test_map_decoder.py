"""The decoder of one block: rows as the reference has them, exact cycles, and every malformed segment refused."""
import numpy as np
import pytest

from hw.basis.map_decoder import MapDecoder
from sim_tests.hw.basis_reference import CONFIGS, random_coefficients, rows, to_beats, to_words
from sim_tests.lib.pysim import simulate
from spec.derive import Sizes


def lay(config, words, at, rng):
    """(beats, place of the first word, place of the last one) of a segment that begins at place ``at`` of its first
    beat, with words of others around it.
    """
    per_beat = config.bus.data_bits // config.basis.group
    behind = -(at + len(words)) % per_beat
    before, after = (rng.integers(1 << config.basis.group, size=size).tolist() for size in (at, behind))
    return to_beats(config, [*before, *words, *after]), at, per_beat - 1 - behind


async def decode(ctx, unit, memory, segment, groups, rng, *, idle=0.0, cycles=3000):
    """Start, offer the beats of ``segment`` (`lay`), keep what is written in ``memory`` [slices][row] -> (map, sign).

    Returns the cycle behind ``start`` in which ``done`` or ``error`` came, or None; and the beats that were taken.
    """
    ctx.set(unit.start, 1)
    ctx.set(unit.groups, groups)
    assert ctx.get(unit.done)
    await ctx.tick()
    ctx.set(unit.start, 0)
    ctx.set(unit.groups, int(rng.integers(256)))
    beats, first, final = segment
    at, offering, end = 0, False, None
    for cycle in range(1, cycles):
        for m, of_slice in enumerate(memory):
            if ctx.get(unit.write) >> m & 1:
                of_slice[ctx.get(unit.row)] = ctx.get(unit.map.as_value()), ctx.get(unit.sign.as_value())
        if end is None and (ctx.get(unit.done) or ctx.get(unit.error)):
            end = cycle
        if end is not None and cycle >= end + 3:
            break
        offering = at < len(beats) and (offering or rng.random() >= idle)
        ctx.set(unit.beat.valid, offering)
        ctx.set(unit.beat.payload.data, beats[at] if offering else int(rng.integers(1 << 30)))
        ctx.set(unit.beat.payload.last, at == len(beats) - 1 if offering else int(rng.integers(2)))
        # places matter in the first and the last beat only
        anywhere = rng.integers(len(unit.beat.payload.data) // len(unit.map[0]), size=2).tolist()
        ctx.set(unit.beat.payload.begin, first if offering and at == 0 else anywhere[0])
        ctx.set(unit.beat.payload.end, final if offering and at == len(beats) - 1 else anywhere[1])
        took = offering and ctx.get(unit.beat.ready)
        await ctx.tick()
        if took:
            at, offering = at + 1, False
    ctx.set(unit.beat.valid, 0)
    return end, at


def expected(config, coefficients):
    """[slices][row] -> (map, sign) bits."""
    def bits(values):
        return sum(int(v) << k for k, v in enumerate(np.ravel(values)))
    by_word = rows(config, coefficients)
    return [[(bits(by_word[w][m] != 0), bits(by_word[w][m] < 0)) for w in range(len(by_word))]
            for m in range(config.basis.slices)]


def cases(config, rng):
    """Coefficients [slices, groups, group] of one block: ends, single ones, whole and part rows and runs, densities."""
    b, most = config.basis, Sizes(config).coefficient_groups
    counts = sorted({1, 2, min(b.stream_groups, most), min(b.group + 1, most), most - 1, most})
    for groups in counts:
        shape = b.slices, groups, b.group
        yield np.zeros(shape, int)
        yield -np.ones(shape, int)
        single = np.zeros(shape, int)
        single.flat[rng.integers(single.size)] = -1
        yield single
        corner = np.zeros(shape, int)
        corner[-1, -1, -1] = 1
        yield corner
        for density in (0.05, 0.3, 0.6, 0.95):
            yield random_coefficients(rng, shape, density)


@pytest.mark.parametrize("idle", [0, 0.5])
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_and_cycles(name, idle, rng):
    config = CONFIGS[name]
    unit, b = MapDecoder(config=config), config.basis
    per_beat = config.bus.data_bits // b.group

    async def bench(ctx):
        garbage = [[(1, 1)] * b.coefficient_rows for _ in range(b.slices)]
        stalled = 0
        for number, coefficients in enumerate(cases(config, rng)):
            words, groups, memory = to_words(config, coefficients), coefficients.shape[1], [g.copy() for g in garbage]
            segment = lay(config, words, int(rng.integers(per_beat)), rng)
            beats, want = segment[0], expected(config, coefficients)
            end, taken = await decode(ctx, unit, memory, segment, groups, rng, idle=idle)
            where = f"case {number}, {groups} groups"
            assert end is not None and not ctx.get(unit.error) and taken == len(beats), where
            count = len(want[0])
            assert [m[:count] for m in memory] == want, where
            assert [m[count:] for m in memory] == [g[count:] for g in garbage], f"{where}: beyond the rows"
            if not idle:
                assert end == max(count + 1, 3) + len(words), f"{where}: cycles"
            stalled += len(beats) > MapDecoder.fifo_beats
        if name == "long":
            assert stalled, "the FIFO was never full"

    simulate(unit, bench)


def malformed(config, rng):
    """(name, words, groups): segments that break one rule each."""
    b, groups, many = config.basis, 3, 7
    coefficients = random_coefficients(rng, (b.slices, groups, b.group), 0.6)
    coefficients[:, :, 0] = 1
    words = to_words(config, coefficients)
    full = to_words(config, np.ones((b.slices, many, b.group), int))
    per_beat = config.bus.data_bits // b.group

    def changed(at, word):
        return [*words[:at], word, *words[at + 1:]]

    yield "a word too many", [*words, 0], groups
    yield "many beats too many", [*words, *[0] * 20 * per_beat], groups
    yield "a word too few", full[:-1], many
    yield "one word", full[:1], many
    yield "level-1 bit beyond the groups", changed(0, words[0] | 1 << groups), groups
    yield "level-1 bit far beyond", changed(0, words[0] | 1 << b.group - 1), groups
    yield "fewer groups than in the maps", words, groups - 1
    yield "empty level-2 map", changed(1, 0), groups
    yield "only zeros", [0] * (b.slices + 1), groups
    yield "all ones", [(1 << b.group) - 1] * 12 * per_beat, groups
    yield "a beat too many", [*words, *[0] * per_beat], groups
    yield "a beat too few", full[:-per_beat], many


@pytest.mark.parametrize("kind", range(12))
@pytest.mark.parametrize("name", ["tiny", "aside3", "group8"])
def test_malformed(name, kind, rng):
    config = CONFIGS[name]
    title, words, groups = list(malformed(config, rng))[kind]
    b = config.basis
    used = -(-groups // b.stream_groups)
    for at in range(config.bus.data_bits // b.group):
        unit = MapDecoder(config=config)

        async def bench(ctx, unit=unit, at=at):
            memory = [[None] * b.coefficient_rows for _ in range(b.slices)]
            end, _ = await decode(ctx, unit, memory, lay(config, words, at, rng), groups, rng, idle=0.2)
            where = f"{title} from place {at} on"
            assert end is not None and ctx.get(unit.error) and not ctx.get(unit.done), where
            assert all(row is None for m in memory for row in m[used:]), f"{where}: beyond the rows"
            for _ in range(20):
                assert ctx.get(unit.error) and not ctx.get(unit.write), where
                await ctx.tick()

        simulate(unit, bench)
