"""One block of multipliers, and the memory of taps and coefficients: every sum, every row."""

import numpy as np
import pytest

from hw.basis.block import BasisBlock, direct_width
from hw.basis.tiles import TileMemory
from sim_tests.hw.test_basis_programs import CONFIGS
from sim_tests.lib.pysim import simulate
from spec.derive import Sizes


class Windows:
    """What the windows of a block hold, newest first; None: never pushed."""

    def __init__(self, config):
        self.b = config.basis
        self.held = [[None] * self.b.window for _ in range(self.b.slices)]

    def push(self, ir, direct, dense, pointwise):
        b = self.b
        for s, window in enumerate(self.held):
            if pointwise:
                for i in range(b.multipliers):
                    at = s * b.multipliers + i
                    window[i] = int(direct[at]) if at < b.group else 0
            else:
                window[:] = [int(direct[s]) if dense else int(ir[s]), *window[:-1]]


@pytest.mark.parametrize("name", ["tiny_basis", "tiny_maps", "halves", "wide"])
def test_block(name, rng):
    """Random micro-steps and pushes in every cycle, values and taps at their ends among them; exact latency."""
    config, block = CONFIGS[name], BasisBlock(config=CONFIGS[name])
    b, z = config.basis, Sizes(config)
    each, ir_spec = b.slices * b.multipliers, z.intermediate

    def draw(lo, hi, size, ends):
        return rng.choice([lo, hi], size) if ends else rng.integers(lo, hi + 1, size)

    async def bench(ctx):
        windows, steps, kept, seen_ends = Windows(config), [], 0, 0
        for cycle in range(600):
            ends = cycle // 50 % 3 == 2         # stretches of ends: the largest sums
            dense, pointwise, push = (int(rng.random() < p) for p in (0.3, 0.2, 0.7))
            ir, direct = draw(ir_spec.lo, ir_spec.hi, b.slices, ends), draw(-255, 255, direct_width(config), ends)
            if ends and cycle % 2:
                ir[:] = ir_spec.lo
            position = rng.integers(0, b.window, b.multipliers)
            enable = rng.random(b.multipliers) < 0.8
            if cycle < b.window + 3:            # windows begin with anything
                enable[:] = False
                push, pointwise = 1, 0
            ctx.set(block.push, push)
            ctx.set(block.dense, dense)
            ctx.set(block.pointwise, pointwise)
            for s in range(b.slices):
                ctx.set(block.ir[s], int(ir[s]))
            for c in range(direct_width(config)):
                ctx.set(block.direct[c], int(direct[c]))
            for i in range(b.multipliers):
                ctx.set(block.position[i], int(position[i]))
            ctx.set(block.enable, sum(int(e) << i for i, e in enumerate(enable)))
            # the windows as they are now, before this cycle's push
            values = [[windows.held[s][position[i]] if enable[i] else 0 for i in range(b.multipliers)]
                      for s in range(b.slices)]
            steps.append(values)
            # taps come a cycle after their position
            taps = draw(-128, 127, each, ends)
            if ends and cycle % 2:
                taps[:] = -128
            for k in range(each):
                ctx.set(block.taps[k], int(taps[k]))
            if len(steps) > 1:
                steps[-2] = int(sum(int(v) * int(t) for v, t in zip(sum(steps[-2], []), taps)))
            keep, add = (int(rng.random() < 0.5) for _ in range(2))
            keep = int(keep and cycle > 4 and abs(kept) < z.basis_sum.hi // 2)
            ctx.set(block.keep, keep)
            ctx.set(block.add, add)
            if cycle >= BasisBlock.latency:
                want = steps[cycle - BasisBlock.latency] + (kept if keep else 0)
                assert ctx.get(block.sum) == want, f"cycle {cycle}"
                kept = want if add else kept
                seen_ends = max(seen_ends, abs(want))
            elif add:
                ctx.set(block.add, 0)
            if push:
                windows.push(ir, direct, dense, pointwise)
            await ctx.tick()
        assert seen_ends >= each * -ir_spec.lo * 128 // 4

    simulate(block, bench)


@pytest.mark.parametrize("name", ["tiny_basis", "wide"])
def test_largest_sum(name):
    """All micro-steps that a row may have, all values and taps at an end: exactly the format's end is reached."""
    config, block = CONFIGS[name], BasisBlock(config=CONFIGS[name])
    b, z = config.basis, Sizes(config)
    value = z.intermediate.lo

    async def bench(ctx):
        for s in range(b.slices):
            ctx.set(block.ir[s], value)
        ctx.set(block.push, 1)
        for _ in range(b.window):
            await ctx.tick()
        ctx.set(block.push, 0)
        ctx.set(block.enable, (1 << b.multipliers) - 1)
        for k in range(b.slices * b.multipliers):
            ctx.set(block.taps[k], -128)
        for _ in range(BasisBlock.latency):
            await ctx.tick()
        ctx.set(block.add, 1)
        for n in range(b.tap_rows):
            ctx.set(block.keep, int(n > 0))
            assert ctx.get(block.sum) == (n + 1) * b.slices * b.multipliers * value * -128
            await ctx.tick()

    assert b.tap_rows * b.slices * b.multipliers * value * -128 <= z.basis_sum.hi
    simulate(block, bench)


@pytest.mark.parametrize("rows, beats, bits", [(4, 1, 8), (8, 3, 32), (2, 5, 64)])
def test_tile_memory(rows, beats, bits, rng):
    """Beats written in any order, whole rows read a cycle later; a row holds while nothing is read."""
    memory = TileMemory(rows=rows, beats=beats, bits=bits)

    async def bench(ctx):
        held, shown = np.zeros((rows, beats), object), None
        for cycle in range(400):
            write, read = rng.random() < 0.6 or cycle < 20, rng.random() < 0.5
            row, beat = divmod(cycle % (rows * beats), beats) if cycle < 2 * rows * beats else \
                (int(rng.integers(rows)), int(rng.integers(beats)))
            value, at = int.from_bytes(rng.bytes(bits // 8), "little"), int(rng.integers(rows))
            read = read and not (write and at == row)       # both at once of one row: not promised
            ctx.set(memory.write_en, int(write))
            ctx.set(memory.write_row, row)
            ctx.set(memory.write_beat, beat)
            ctx.set(memory.write_data, value)
            ctx.set(memory.read_en, int(read))
            ctx.set(memory.read_row, at)
            await ctx.tick()
            if read:
                shown = sum(int(v) << bits * k for k, v in enumerate(held[at]))
            if write:
                held[row, beat] = value
            if shown is not None:
                assert ctx.get(memory.read_data) == shown, f"cycle {cycle}"

    simulate(memory, bench)
