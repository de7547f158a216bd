"""The supervisor: each transition from each state, first error, watchdog, soft reset."""
import pytest

from hw.control.supervisor import Supervisor
from sim_tests.lib.pysim import simulate
from spec.registers import Error

SOURCES = ("first", "second", "third")
WATCHDOG = 20


def bench_of(script):
    """Run ``script(ctx, dut)`` on a fresh supervisor whose bus is at rest."""
    dut = Supervisor(sources=SOURCES)

    async def bench(ctx):
        ctx.set(dut.watchdog_cycles, WATCHDOG)
        ctx.set(dut.bus_idle, 1)
        await ctx.tick().repeat(3 * WATCHDOG)       # idleness is no lack of progress
        await script(ctx, dut)

    simulate(dut, bench)


def status(ctx, dut):
    """(busy, done, error, resetting) as register STATUS shows it."""
    return tuple(ctx.get(s) for s in (dut.busy, dut.status_done, dut.status_error, dut.resetting))


def report(ctx, dut, name, code, address):
    error = getattr(dut, f"error_{name}")
    ctx.set(error.valid, 1)
    ctx.set(error.code, code)
    ctx.set(error.address, address)


def withdraw(ctx, dut):
    for name in SOURCES:
        ctx.set(getattr(dut, f"error_{name}").valid, 0)


async def pulse(ctx, signal):
    ctx.set(signal, 1)
    await ctx.tick()
    ctx.set(signal, 0)


async def run(ctx, dut):
    """Idle to running; ``begin`` pulses with the start."""
    ctx.set(dut.start, 1)
    assert ctx.get(dut.begin)
    await ctx.tick()
    ctx.set(dut.start, 0)
    assert not ctx.get(dut.begin) and status(ctx, dut) == (1, 0, 0, 0)


async def fail(ctx, dut):
    """Running to error, over a bus that needs some cycles."""
    ctx.set(dut.bus_idle, 0)
    report(ctx, dut, "second", Error.BUS_READ, 0x123456789A)
    await ctx.tick()
    for _ in range(5):
        assert ctx.get(dut.stop) and status(ctx, dut) == (1, 0, 0, 0) and not ctx.get(dut.event_error)
        await ctx.tick()
    ctx.set(dut.bus_idle, 1)
    assert ctx.get(dut.event_error)
    await ctx.tick()
    assert not ctx.get(dut.event_error) and ctx.get(dut.stop) and status(ctx, dut) == (0, 0, 1, 0)
    assert (ctx.get(dut.code), ctx.get(dut.address)) == (Error.BUS_READ, 0x123456789A)


async def reset(ctx, dut, *, busy_bus=4):
    """Soft reset from any state: bus to rest, one cycle of core reset, all status gone."""
    ctx.set(dut.bus_idle, not busy_bus)
    await pulse(ctx, dut.soft_reset)
    for _ in range(busy_bus):
        assert ctx.get(dut.stop) and ctx.get(dut.resetting) and not ctx.get(dut.core_reset) and not ctx.get(dut.busy)
        await ctx.tick()
    ctx.set(dut.bus_idle, 1)
    assert not ctx.get(dut.core_reset)
    await ctx.tick()
    assert ctx.get(dut.core_reset) and ctx.get(dut.resetting)
    withdraw(ctx, dut)                              # the reset clears the sources
    await ctx.tick()
    assert not ctx.get(dut.core_reset) and not ctx.get(dut.stop) and status(ctx, dut) == (0, 0, 0, 0)
    assert ctx.get(dut.code) == ctx.get(dut.address) == 0


async def finish(ctx, dut):
    """Running to idle; ``event_done`` pulses."""
    ctx.set(dut.done, 1)
    assert ctx.get(dut.event_done)
    await ctx.tick()
    ctx.set(dut.done, 0)
    assert not ctx.get(dut.event_done) and status(ctx, dut) == (0, 1, 0, 0)


def test_two_good_runs():
    async def script(ctx, dut):
        for _ in range(2):
            await run(ctx, dut)
            ctx.set(dut.progress, 1)
            await ctx.tick().repeat(2 * WATCHDOG)
            ctx.set(dut.progress, 0)
            assert status(ctx, dut) == (1, 0, 0, 0) and not ctx.get(dut.stop)
            await finish(ctx, dut)
            await ctx.tick().repeat(3 * WATCHDOG)
            assert status(ctx, dut) == (0, 1, 0, 0)
    bench_of(script)


def test_start_is_ignored_while_running_and_in_error():
    async def script(ctx, dut):
        await run(ctx, dut)
        ctx.set(dut.start, 1)
        assert not ctx.get(dut.begin)
        await ctx.tick()
        ctx.set(dut.start, 0)
        await fail(ctx, dut)
        ctx.set(dut.start, 1)
        assert not ctx.get(dut.begin)
        await ctx.tick()
        assert not ctx.get(dut.begin) and status(ctx, dut) == (0, 0, 1, 0)
    bench_of(script)


def test_first_source_wins_and_later_errors_change_nothing():
    async def script(ctx, dut):
        await run(ctx, dut)
        report(ctx, dut, "third", Error.BUS_WRITE, 3)
        report(ctx, dut, "second", Error.BUS_READ, 2)
        await ctx.tick()
        report(ctx, dut, "first", Error.ILLEGAL_FIELD, 1)
        await ctx.tick().repeat(3)
        assert (ctx.get(dut.code), ctx.get(dut.address)) == (Error.BUS_READ, 2)
        assert status(ctx, dut) == (0, 0, 1, 0)
    bench_of(script)


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_is_seen(name):
    async def script(ctx, dut):
        await run(ctx, dut)
        report(ctx, dut, name, Error.STREAM_ADDRESS, (1 << 40) - 1)
        await ctx.tick().repeat(2)
        assert (ctx.get(dut.code), ctx.get(dut.address)) == (Error.STREAM_ADDRESS, (1 << 40) - 1)
    bench_of(script)


def test_error_in_the_cycle_of_done_wins():
    async def script(ctx, dut):
        await run(ctx, dut)
        ctx.set(dut.done, 1)
        report(ctx, dut, "third", Error.BUS_WRITE, 8)
        assert not ctx.get(dut.event_done)
        await ctx.tick()
        ctx.set(dut.done, 0)
        await ctx.tick()
        assert status(ctx, dut) == (0, 0, 1, 0) and ctx.get(dut.code) == Error.BUS_WRITE
    bench_of(script)


@pytest.mark.parametrize("late", [0, 1, WATCHDOG - 1])
def test_watchdog_counts_from_the_last_progress(late):
    async def script(ctx, dut):
        await run(ctx, dut)
        for _ in range(late):
            await ctx.tick()
        if late:
            await pulse(ctx, dut.progress)
        for _ in range(WATCHDOG):
            assert not ctx.get(dut.stop)
            await ctx.tick()
        assert not ctx.get(dut.stop)
        await ctx.tick()
        assert ctx.get(dut.stop) and ctx.get(dut.code) == Error.WATCHDOG and ctx.get(dut.address) == 0
        await ctx.tick()
        assert status(ctx, dut) == (0, 0, 1, 0)
    bench_of(script)


def test_watchdog_zero_never_barks():
    async def script(ctx, dut):
        ctx.set(dut.watchdog_cycles, 0)
        await run(ctx, dut)
        await ctx.tick().repeat(20 * WATCHDOG)
        assert status(ctx, dut) == (1, 0, 0, 0) and not ctx.get(dut.stop)
        await finish(ctx, dut)
    bench_of(script)


def test_a_dead_bus_delays_the_error_by_one_watchdog_period():
    async def script(ctx, dut):
        await run(ctx, dut)
        ctx.set(dut.bus_idle, 0)
        report(ctx, dut, "first", Error.BUS_PROTOCOL, 0)
        await ctx.tick()
        for _ in range(WATCHDOG):
            assert not ctx.get(dut.event_error)
            await ctx.tick()
        assert ctx.get(dut.event_error)
        await ctx.tick()
        assert status(ctx, dut) == (0, 0, 1, 0) and ctx.get(dut.code) == Error.BUS_PROTOCOL
        # and so does soft reset
        await pulse(ctx, dut.soft_reset)
        for _ in range(WATCHDOG):
            assert not ctx.get(dut.core_reset) and ctx.get(dut.resetting)
            await ctx.tick()
        await ctx.tick()
        assert ctx.get(dut.core_reset)
        withdraw(ctx, dut)
        await ctx.tick()
        assert status(ctx, dut) == (0, 0, 0, 0)
        ctx.set(dut.bus_idle, 1)
        await run(ctx, dut)
    bench_of(script)


@pytest.mark.parametrize("state", ["idle", "idle_done", "running", "stopping", "error", "resetting"])
@pytest.mark.parametrize("busy_bus", [0, 4])
def test_soft_reset_in_each_state(state, busy_bus):
    async def script(ctx, dut):
        if state != "idle":
            await run(ctx, dut)
        if state == "idle_done":
            await finish(ctx, dut)
            await ctx.tick().repeat(3 * WATCHDOG)
        elif state == "stopping":
            ctx.set(dut.bus_idle, 0)
            report(ctx, dut, "first", Error.BUS_READ, 1)
            await ctx.tick().repeat(WATCHDOG - 2)   # the drain after the reset gets a whole period of its own
        elif state == "error":
            await fail(ctx, dut)
        elif state == "resetting":
            ctx.set(dut.bus_idle, 0)
            await pulse(ctx, dut.soft_reset)
            await ctx.tick()
        if state != "resetting" or busy_bus:        # (with the bus at rest the reset under way would just end)
            await reset(ctx, dut, busy_bus=busy_bus)
        else:
            ctx.set(dut.bus_idle, 1)
            await ctx.tick().repeat(2)
        await run(ctx, dut)
        await finish(ctx, dut)
    bench_of(script)


def test_soft_reset_wins_over_done_error_and_start():
    async def script(ctx, dut):
        ctx.set(dut.start, 1)
        ctx.set(dut.soft_reset, 1)
        assert not ctx.get(dut.begin)
        ctx.set(dut.start, 0)
        ctx.set(dut.soft_reset, 0)
        await run(ctx, dut)
        ctx.set(dut.done, 1)
        report(ctx, dut, "first", Error.BUS_READ, 1)
        ctx.set(dut.soft_reset, 1)
        assert not ctx.get(dut.event_done)
        await ctx.tick()
        ctx.set(dut.done, 0)
        ctx.set(dut.soft_reset, 0)
        withdraw(ctx, dut)
        await ctx.tick().repeat(2)
        assert status(ctx, dut) == (0, 0, 0, 0) and ctx.get(dut.code) == 0
    bench_of(script)
