"""Row map and array: every pattern, packed tiles that straddle beats, double buffering, swap timing, latency."""
import numpy as np
import pytest

from golden.tiles import pack_tile
from hw.structured.array import RowMap, StructuredArray
from sim_tests.hw.configs import CONFIGS
from sim_tests.lib.pysim import simulate
from spec.derive import Sizes

NAMES = ["tiny", "bus32", "bus256", "dense", "block8", "narrow"]


def blocks_to_word(blocks):
    """[blocks, block] int8 -> bits, block 0 lowest."""
    return int.from_bytes(np.asarray(blocks, np.int8).tobytes(), "little")


@pytest.mark.parametrize("name", NAMES)
def test_row_map(name, rng):
    config = CONFIGS[name]
    s, sizes = config.structured, Sizes(config)
    rows = RowMap(config=config)

    async def bench(ctx):
        for _ in range(20):
            lo, hi = sizes.activation.lo, sizes.activation.hi
            blocks = rng.integers(lo, hi + 1, (sizes.stream_blocks, s.block))
            ctx.set(rows.stream.as_value(), blocks_to_word(blocks))
            for p in s.patterns:
                ctx.set(rows.n_log2, p.n.bit_length() - 1)
                for slot in range(s.slots):
                    position = slot // p.n
                    want = blocks[position] if position < sizes.stream_blocks else np.zeros(s.block, int)
                    got = [ctx.get(rows.blocks[slot][k]) for k in range(s.block)]
                    assert got == want.tolist(), f"{p}, slot {slot}"

    simulate(rows, bench, clocked=False)


def random_tile(config, rng, n, *, extreme=False):
    """(values, indices) [slots, columns]; any index order, zeros beyond the fetch."""
    s, sizes = config.structured, Sizes(config)
    lo, hi = sizes.weight.lo, sizes.weight.hi
    values = rng.choice([lo, hi], (s.slots, s.columns)) if extreme else rng.integers(lo, hi + 1, (s.slots, s.columns))
    values[n * sizes.fetch_blocks(n):] = 0
    indices = rng.integers(0, s.block, values.shape)
    if n == s.block:
        indices = np.broadcast_to((np.arange(s.slots) % s.block)[:, None], values.shape)
    return values, indices


def product(values, indices, blocks, n):
    """Column sums, slot by slot, in Python integers."""
    return [sum(int(values[slot, c]) * int(blocks[slot // n, indices[slot, c]])
                for slot in range(len(values)) if slot // n < len(blocks)) for c in range(values.shape[1])]


@pytest.mark.parametrize("name", NAMES)
def test_array(name, rng):
    """Tiles load while the one before multiplies; a swap takes the word it comes with; gaps disturb nothing."""
    config = CONFIGS[name]
    s, sizes = config.structured, Sizes(config)
    array = StructuredArray(config=config)
    lo, hi = sizes.activation.lo, sizes.activation.hi
    patterns = [p.n for p in s.patterns]

    def loads(tile, n):
        data = pack_tile(tile[0], None if n == s.block else tile[1], config, n)
        words = [int.from_bytes(data[k:k + sizes.beat_bytes], "little") for k in range(0, len(data), sizes.beat_bytes)]
        assert len(words) == sizes.tile_beats(n)
        return [(word, k < sizes.value_beats, k if k < sizes.value_beats else k - sizes.value_beats)
                for k, word in enumerate(words)]

    async def bench(ctx):
        active, expected, compared = None, [], 0
        cycle = 0

        async def step():
            nonlocal cycle, compared
            await ctx.tick()
            cycle += 1
            while expected and expected[0][0] == cycle:
                got = [ctx.get(array.sums[c]) for c in range(s.columns)]
                assert got == expected[0][1], f"cycle {cycle}"
                expected.pop(0)
                compared += 1

        async def word(swap, load=None):
            """One cycle: perhaps a stream word, perhaps a beat of the next tile."""
            nonlocal active
            en = swap is not None or (active is not None and rng.random() < 0.8)
            blocks = rng.choice([lo, hi], (sizes.stream_blocks, s.block)) if rng.random() < 0.3 else \
                rng.integers(lo, hi + 1, (sizes.stream_blocks, s.block))
            if swap is not None:
                active = swap
            n = active[2] if active else 1
            ctx.set(array.en, en)
            ctx.set(array.swap, swap is not None if en else int(rng.integers(2)))
            ctx.set(array.n_log2, n.bit_length() - 1)
            ctx.set(array.stream.as_value(), blocks_to_word(blocks))
            beat, value, at = load or (int(rng.integers(1 << 30)), None, 0)
            ctx.set(array.load_data, beat)
            ctx.set(array.load_value, value is True)
            ctx.set(array.load_index, value is False)
            ctx.set(array.load_word, at)
            if en:
                expected.append((cycle + StructuredArray.latency, product(active[0], active[1], blocks, n)))
            await step()

        tiles = [(n, extreme) for n in patterns for extreme in (True, False)]
        tiles += [(patterns[k], False) for k in rng.integers(len(patterns), size=12)]
        for n, extreme in tiles:
            tile = random_tile(config, rng, n, extreme=extreme)
            for load in loads(tile, n):
                await word(None, load)
                if rng.random() < 0.3:
                    await word(None)
            await word((*tile, n))                 # swap and stream in one cycle, right behind the last beat
            for _ in range(int(rng.integers(3))):
                await word(None)
        ctx.set(array.en, 0)
        for _ in range(StructuredArray.latency):
            await step()
        assert not expected and compared > 3 * len(tiles) / 2

    simulate(array, bench)
