"""The checks of the coefficient stage for maps can fail: each small fault in its sources is seen, and none without."""

import importlib

import numpy as np

from sim_tests.hw.basis_reference import (
    TINY_MAPS,
    intermediates,
    pack,
    random_activations,
    random_coefficients,
    rows,
    segment_table,
    to_beats,
    to_words,
    variant,
    word_cycles,
)
from sim_tests.hw.planted import FAULT, Fault, planted
from sim_tests.lib.pysim import simulate

STAGE, DECODER, LANES = "hw.basis.maps", "hw.basis.map_decoder", "hw.basis.concentrator"

#: For faults of the lanes: two rounds, and columns with more matches than the rounds reach.
TWO_ROUNDS = variant(look_aside=2, stream_groups=4, coefficient_rows=2, blocks=2)

#: What sees them: "ir", "cycles", "saturated", "error" (the good load is refused), "accepts" (a bad one is not).
FAULTS = (
    Fault(LANES, "activation_bit ^ minus", "activation_bit", "ir"),
    Fault(LANES, "Cat(carry, b)", "Cat(Const(0, 1), b)", "ir"),
    Fault(LANES, "rotate(of_lanes, d)", "rotate(of_lanes, 0)", "ir"),
    Fault(LANES, "rotate(free, -d)", "rotate(free, d)", "ir"),
    Fault(LANES, "~rotate(any_of(offer.values()), d)", "~rotate(any_of(offer.values()), d + 1)", "cycles"),
    Fault(LANES, "reaches & ~seen[k]", "reaches", "ir"),
    Fault(LANES, "columns & ~asked", "columns", "ir"),
    Fault(LANES, "columns & seen[k + 1]", "columns & 0", "cycles"),
    Fault(LANES, "columns & asked", "columns", "ir"),
    Fault(LANES, "self.first.replicate(b.group)", "(self.first | self.pick).replicate(b.group)", "cycles"),
    Fault(LANES, "Mux(self.fresh, 0, total)", "total", "ir"),
    Fault(LANES, "high.any() & ~high.all()", "high.any()", "ir"),
    Fault(DECODER, "Cat(level2, signs)", "Cat(level2 & (level2 - 1), signs)", "ir"),
    Fault(DECODER, "Mux(has_word, word, 0) << left", "Mux(has_word, word, 0)", "ir"),
    Fault(DECODER, "queue >> count", "queue", "ir"),
    Fault(DECODER, "complete & new_row", "0", "ir"),
    Fault(DECODER, "Mux(clearing, -1, write << write_slice)", "write << write_slice", "ir"),
    Fault(DECODER, "word[g] & (remaining <= g)", "0", "accepts"),
    Fault(DECODER, "finishes != is_last", "0", "accepts"),
    Fault(DECODER, "finishes != is_last", "is_last & ~finishes", "accepts"),
    Fault(DECODER, "finishes != is_last", "finishes & ~is_last", "accepts"),
    Fault(DECODER, "at == end", "at == words - 1", "error"),
    Fault(DECODER, "self.beat.payload.begin", "0", "error"),
    Fault(STAGE, "words - 1", "words", "error"),
    Fault(STAGE, "words[:low] + lengths[16:32]", "lengths[16:32]", "error"),
    Fault(STAGE, "room.bit_select(block, 1) & ~shared", "room.bit_select(block, 1)", "error"),
    Fault(STAGE, "self.load.valid | (beats != 0)", "self.load.valid", "accepts"),
    Fault(STAGE, "beats == 0", "0", "accepts"),
    Fault(STAGE, "Cat(decoder.row, half)", "Cat(decoder.row, ~half)", "ir"),
    Fault(STAGE, "~at_lanes | (pick & done)", "~at_lanes | pick", "ir"),
    Fault(STAGE, "tree_sum([s.saturated for s in slices])", "tree_sum([s.saturated for s in slices[1:]])", "saturated"),
)


def scenario(config, rng):
    """Loads of both halves: (coefficients, pixels); the last pixels and coefficients saturate."""
    b = config.basis
    for groups in (5, 8, 3):
        shape = b.blocks, b.slices, groups, b.group
        ends = [np.full(shape[2:], v) for v in (255, -255)]
        pixels = [random_activations(rng, shape[2:], 0.8) for _ in range(4)]
        coefficients = random_coefficients(rng, shape, 0.5)
        coefficients[:, 1, groups - 1] = 0      # the word of the half's load before had something here
        coefficients[0, 0] = 1
        if groups == 8:
            coefficients[..., 1:3] = 0          # two lanes for what crowded columns have left
        yield coefficients, [*pixels, *ends]


def bad_loads(config, few, many):
    """(groups, beats, beats told) that must be refused: maps beyond the groups; segments that end before their words
    and behind them; fewer and more beats than segments.
    """
    blocks, per_beat = config.basis.blocks, config.bus.data_bits // config.basis.group
    table, (beat, *_), good = segment_table(config, [per_beat] * blocks), to_beats(config, to_words(config, many[0])), \
        pack(config, few)
    yield few.shape[2] - 1, good, len(good)
    yield many.shape[2], table + [beat] * blocks, len(table) + blocks
    yield many.shape[2], table + [0] * blocks, len(table) + blocks
    yield few.shape[2], good[:-1], len(good) - 1
    yield few.shape[2], good, len(good) + 1


async def drive(ctx, stage, config, jobs, bad):
    """The first check that sees that something is wrong, or None."""
    b = config.basis
    ctx.set(stage.o.ready, 1)

    async def load(half, groups, beats, told):
        ctx.set(stage.load_start, 1)
        ctx.set(stage.load_half, half)
        ctx.set(stage.load_groups, groups)
        ctx.set(stage.load_beats, told)
        await ctx.tick()
        ctx.set(stage.load_start, 0)
        at = 0
        for _ in range(300):
            if ctx.get(stage.error) or ctx.get(stage.loaded):
                break
            ctx.set(stage.load.valid, at < len(beats))
            ctx.set(stage.load.payload, beats[min(at, len(beats) - 1)])
            taken = at < len(beats) and ctx.get(stage.load.ready)
            await ctx.tick()
            at += taken
        ctx.set(stage.load.valid, 0)
        return not ctx.get(stage.error) and ctx.get(stage.loaded)

    async def pixel(half, coefficients, activations):
        words = rows(config, activations[None])[:, 0]
        want = sum(word_cycles(config, np.concatenate([rows(config, c)[n] for c in coefficients]), w)
                   for n, w in enumerate(words))
        got, cycles, at = None, 0, 0
        while got is None and cycles < 100:
            ctx.set(stage.i.valid, at < len(words))
            if at < len(words):
                for k, value in enumerate(words[at].ravel()):
                    ctx.set(stage.i.payload.word[k], int(value))
                for field, value in (("row", at), ("half", half), ("last", at == len(words) - 1)):
                    ctx.set(getattr(stage.i.payload, field), value)
            taken = at < len(words) and ctx.get(stage.i.ready)
            if ctx.get(stage.o.valid):
                got = [ctx.get(stage.o.payload.ir[n]) for n in range(b.blocks * b.slices)]
                saturated = ctx.get(stage.o.payload.saturated)
            await ctx.tick()
            at, cycles = at + taken, cycles + 1
        ir, count = intermediates(config, np.concatenate(coefficients), activations)
        if got is None or got != ir:
            return "ir" if got else "cycles"
        if saturated != count:
            return "saturated"
        return None if cycles == want + stage.latency else "cycles"

    for number, (coefficients, pixels) in enumerate(jobs):
        beats = pack(config, coefficients)
        if not await load(number % 2, coefficients.shape[2], beats, len(beats)):
            return "error"
        for activations in pixels:
            if seen := await pixel(number % 2, coefficients, activations):
                return seen
    await load(0, *bad)
    return None if ctx.get(stage.error) else "accepts"


def run(stages, config, fault, seed):
    """The check that sees ``fault`` in the planted design, or None."""
    jobs = list(scenario(config, np.random.default_rng(seed)))
    # an error stays until reset: one simulation for each; the good jobs need but one
    for number, bad in enumerate(bad_loads(config, jobs[2][0], jobs[1][0])):
        stage, seen = stages.MapStage(config=config), []

        async def bench(ctx, stage=stage, seen=seen, good=jobs if number == 0 else [], bad=bad):
            ctx.set(FAULT, fault)
            seen.append(await drive(ctx, stage, config, good, bad))

        simulate(stage, bench)
        if seen[0]:
            return seen[0]
    return None


def test_each_planted_fault_is_seen(seed):
    with planted(FAULTS):
        stages = importlib.import_module(STAGE)
        good = [run(stages, config, 0, seed) for config in (TINY_MAPS, TWO_ROUNDS)]
        seen = [run(stages, TWO_ROUNDS if fault.module == LANES else TINY_MAPS, n, seed)
                for n, fault in enumerate(FAULTS, 1)]
    assert good == [None, None], f"the good design fails: {good}"
    wrong = [f"{f.good} -> {f.bad}: seen by {by}, not {f.check}" for f, by in zip(FAULTS, seen) if by != f.check]
    assert not wrong, "\n".join(wrong)
