"""Accumulators: set, add, maximum, both banks at once, and overflow exactly beyond the limits."""
from dataclasses import replace

import numpy as np
import pytest

from hw.accumulators import Accumulators
from sim_tests.hw.configs import CONFIGS
from sim_tests.lib.pysim import simulate
from spec.derive import Sizes
from spec.isa import Operation

TINY = CONFIGS["tiny"]


def with_bits(bits):
    return replace(TINY, structured=replace(TINY.structured, accumulator_bits=bits))


class Driver:
    """Announces an update in one cycle and brings its sums in the next."""

    def __init__(self, ctx, dut, columns):
        self.ctx, self.dut, self.columns, self.sums = ctx, dut, columns, None

    async def cycle(self, *, fetch=None, sums=None, init=0, operation=Operation.ADD, read=None):
        """``sums`` belong to the fetch of the cycle before. Returns the word read in the cycle before."""
        ctx, dut = self.ctx, self.dut
        ctx.set(dut.update.fetch, fetch is not None)
        ctx.set(dut.read_en, read is not None)
        for bank, address, where in ((dut.update.bank, dut.update.address, fetch),
                                     (dut.read_bank, dut.read_address, read)):
            ctx.set(bank, where[0] if where else 1)
            ctx.set(address, where[1] if where else 3)
        ctx.set(dut.update.init, init)
        ctx.set(dut.update.operation, operation)
        for c in range(self.columns):
            ctx.set(dut.update.sums[c], int(sums[c]) if sums is not None else -1)
        await ctx.tick()
        return [ctx.get(dut.read_data[c]) for c in range(self.columns)]


@pytest.mark.parametrize("name", ["tiny", "block8"])
def test_random_updates_and_reads(name, rng):
    """Updates at full rate into one bank while the other one is read; banks change now and then."""
    config = CONFIGS[name]
    s, sizes = config.structured, Sizes(config)
    dut = Accumulators(config=config)
    small = min(sizes.accumulator.hi // 64, sizes.column_sum.hi)     # no overflow within 64 updates

    async def bench(ctx):
        driver, model = Driver(ctx, dut, s.columns), np.zeros((2, s.accumulator_depth, s.columns), np.int64)
        pending, shown, last, reads = None, None, (None, None), 0
        for t in range(600):
            write = t // 50 % 2
            fetch = read = None
            if rng.random() < 0.8:
                choice = [a for a in range(s.accumulator_depth) if (write, a) != last[0]]
                fetch = write, int(rng.choice(choice))
            if rng.random() < 0.6 and t % 50 > 2:
                read = 1 - write, int(rng.integers(s.accumulator_depth))
            sums, init, operation = rng.integers(-small, small, s.columns), rng.random() < 0.2, int(rng.integers(2))
            if read:
                shown = model[read].copy()
                reads += 1
            got = await driver.cycle(fetch=fetch, sums=sums, init=init, operation=operation, read=read)
            if pending:
                old = model[pending]
                model[pending] = sums if init else np.maximum(old, sums) if operation else old + sums
            if shown is not None and t % 50 > 2:
                assert got == shown.tolist(), f"cycle {t}"
            elif t % 50 <= 2:
                shown = None
            assert not ctx.get(dut.overflow)
            last, pending = (fetch, pending), fetch
        assert reads > 200

    simulate(dut, bench)


@pytest.mark.parametrize("bits", [16, 17, 18, 19, 20, 32])
@pytest.mark.parametrize("column", [0, 3])
def test_overflow_exactly_beyond_the_limits(bits, column):
    """Set, add and maximum at the limit, and one beyond; every column; sums may be wider than the accumulator."""
    config = with_bits(bits)
    sizes = Sizes(config)
    dut = Accumulators(config=config)
    lo, hi = sizes.accumulator.lo, sizes.accumulator.hi
    wide_lo, wide_hi = sizes.column_sum.lo, sizes.column_sum.hi

    async def bench(ctx):
        driver = Driver(ctx, dut, 4)

        async def update(value, **how):
            """One update; (overflowed, stored value)."""
            sums = [0] * 4
            sums[column] = value
            await driver.cycle(fetch=(1, 2))
            await driver.cycle(sums=sums, **how)
            overflow = ctx.get(dut.overflow)
            got = await driver.cycle(read=(1, 2))
            assert not ctx.get(dut.overflow), "a pulse"
            return overflow, got[column]

        async def set_to(value):
            """Reach any accumulator value through sums that fit."""
            first = max(wide_lo, min(wide_hi, value))
            overflow, _ = await update(first, init=1)
            assert not overflow
            value -= first
            while value:
                part = max(wide_lo, min(wide_hi, value))
                overflow, _ = await update(part)
                assert not overflow
                value -= part

        cheap = abs(lo) // abs(wide_lo) < 200
        for value in {v for v in (lo - 1, lo, -1, 0, hi, hi + 1, wide_lo, wide_hi) if wide_lo <= v <= wide_hi}:
            inside = lo <= value <= hi
            overflow, stored = await update(value, init=1)
            assert overflow == (not inside) and (not inside or stored == value), f"set to {value}"
            await update(0, init=1)
            overflow, stored = await update(value)
            assert overflow == (not inside) and (not inside or stored == value), f"0 + {value}"
            await update(-7, init=1)
            overflow, stored = await update(value, operation=Operation.MAX)
            want = max(-7, value)
            assert overflow == (want > hi) and (overflow or stored == want), f"max(-7, {value})"
        if cheap:
            for start, step in ((hi, 1), (lo, -1), (hi - 5, 6), (lo + 5, -6)):
                await set_to(start)
                overflow, stored = await update(0)
                assert not overflow and stored == start
                overflow, _ = await update(step)
                assert overflow, f"{start} + {step}"
                await set_to(start)
                overflow, stored = await update(-step)
                assert not overflow and stored == start - step
                overflow, stored = await update(step)
                assert not overflow and stored == start

    simulate(dut, bench)
