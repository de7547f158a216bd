# amaranth: UnusedElaboratable=no
"""The memory wrapper: both ports at once, old word on a collision, output held."""
import pytest

from hw.memory.ram import Ram
from sim_tests.lib.pysim import simulate


@pytest.mark.parametrize("width, depth", [(1, 1), (7, 5), (32, 16)])
def test_against_a_list(width, depth, rng):
    ram = Ram(width=width, depth=depth)

    async def bench(ctx):
        model, out, collisions = [0] * depth, 0, 0
        for _ in range(500):
            write, read = rng.integers(2, size=2).tolist()
            at, word, where = int(rng.integers(depth)), int(rng.integers(1 << width)), int(rng.integers(depth))
            ctx.set(ram.write_en, write)
            ctx.set(ram.write_address, at)
            ctx.set(ram.write_data, word)
            ctx.set(ram.read_en, read)
            ctx.set(ram.read_address, where)
            out = model[where] if read else out
            collisions += write and read and at == where and model[at] != word
            model[at] = word if write else model[at]
            await ctx.tick()
            assert ctx.get(ram.read_data) == out
        assert collisions

    simulate(ram, bench)


@pytest.mark.parametrize("width, depth", [(0, 4), (4, 0)])
def test_refuses_empty_memories(width, depth):
    with pytest.raises(ValueError, match=f"Memory must have at least one bit and one word, not {width} x {depth}"):
        Ram(width=width, depth=depth)
