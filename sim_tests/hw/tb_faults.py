"""The whole accelerator on a bus that errs: right code and address, interrupt, no stray write, and a good run after."""

import logging
import os

import cocotb
from cocotb.triggers import ClockCycles, FallingEdge
import numpy as np

from sim_tests.lib.lying_host import GUARD, LyingHost
from sim_tests.lib.simulate import config_of_run
from sim_tests.lib.streams import start
from spec.derive import Sizes
from spec.registers import Error

WATCHDOG = 400
ANY_ERROR = set(Error) - {Error.NONE}
LITE_INPUTS = dict.fromkeys(
    ("s_axil__awvalid", "s_axil__wvalid", "s_axil__bready", "s_axil__arvalid", "s_axil__rready"), 0
)


class Setting:
    """Device, host, the program and what a good run gives."""

    def __init__(self, dut):
        job = np.load(os.environ["SUMMAND_JOBS"])
        self.before, self.after = job["before"], job["after"]
        self.program, self.count = (int(v) for v in job["program"])
        self.dut, self.config = dut, config_of_run()
        self.rng = np.random.default_rng(cocotb.RANDOM_SEED)
        self.host = LyingHost(dut, self.before, Sizes(self.config).beat_bytes, self.rng)

    async def begin(self):
        for name in ("s_axil", "AxiLite"):
            logging.getLogger(f"cocotb.{self.dut._name}.{name}").setLevel(logging.WARNING)
        self.host.connect()
        await start(self.dut, **LITE_INPUTS)

    async def start_program(self):
        await self.host.write("WATCHDOG_CYCLES", WATCHDOG)
        await self.host.begin(self.program, self.count)

    async def good_run(self, label, **memory):
        """Fresh memory, the program, and every byte."""
        self.host.connect(**memory)
        await self.start_program()
        assert await self.host.outcome(20_000) == (Error.NONE, 0), label
        wrong = np.flatnonzero(self.host.window != self.after)
        assert not len(wrong), f"{label}: {len(wrong)} bytes wrong, first at {wrong[0]:#x}"
        assert self.host.bus_at_rest, f"{label}: done, but the bus is not at rest"

    def changed_only_outputs(self, label):
        """Whatever was written lies where a good run writes."""
        touched = np.flatnonzero(self.host.window != self.before)
        allowed = self.before != self.after
        allowed |= np.convolve(allowed, np.ones(9), "same") > 0  # bytes that a good run happens not to change
        assert allowed[touched].all(), f"{label}: stray write at {touched[~allowed[touched]][0]:#x}"

    async def bad_run(self, label, codes, *, address=None, limit=4 * WATCHDOG, **memory):
        """A run that must end with one of ``codes``; then soft reset and a good run."""
        self.host.connect(**memory)
        await self.start_program()
        got = await self.host.outcome(20_000 + limit)
        assert got[0] in codes, f"{label}: {got[0].name} at {got[1]:#x}, expected {[c.name for c in codes]}"
        if address is not None:
            assert got[1] == address, f"{label}: address {got[1]:#x}, expected {address:#x}"
        self.changed_only_outputs(label)
        # sticky, and no start in this state
        await self.host.write("CONTROL", 1)
        await ClockCycles(self.dut.clk, 20)
        assert await self.host.read("STATUS") == 4 and Error(await self.host.read("ERROR_CODE")) is got[0], label
        await self.host.write("IRQ_STATUS", 3)
        assert not self.dut.irq.value, label
        await self.host.soft_reset()
        assert await self.host.read("STATUS") == 0 and await self.host.read("ERROR_CODE") == 0, label
        return got


def bursts(setting):
    """Read and write bursts (id, offset, beats) of the good run just done."""
    return (
        [(i, a - GUARD, n) for i, a, n in setting.host.read_slave.bursts],
        [(a - GUARD, n) for a, n in setting.host.write_slave.bursts],
    )


def picks(count):
    """Some of ``count`` bursts: first, second, middle, last."""
    return sorted({0, 1, count // 2, count - 1} & set(range(count)))


def on_burst(number, damage):
    return {"fault": lambda n, beats: damage(beats) if n == number else beats}


def change(index, **fields):
    def damage(beats):
        beats[index].update(fields)
        return beats

    return damage


@cocotb.test(timeout_time=50, timeout_unit="ms")
async def read_faults(dut):
    setting = Setting(dut)
    await setting.begin()
    await setting.good_run("before")
    reads, _ = bursts(setting)
    longest = max(range(len(reads)), key=lambda n: reads[n][2])
    for number in sorted({*picks(len(reads)), longest}):
        identity, offset, beats = reads[number]
        cases = {}
        for resp, name in ((1, "EXOKAY"), (2, "SLVERR"), (3, "DECERR")):
            for at in sorted({0, beats // 2, beats - 1}):
                cases[f"{name} on beat {at}"] = change(at, resp=resp), {Error.BUS_READ}, offset
        cases["RLAST missing"] = change(-1, last=0), {Error.BUS_PROTOCOL}, offset
        cases["RLAST late"] = (lambda b: [*b[:-1], b[-1] | {"last": 0}, dict(b[-1])]), {Error.BUS_PROTOCOL}, offset
        cases["a beat after RLAST"] = (lambda b: [*b, dict(b[-1])]), {Error.BUS_PROTOCOL}, None
        if beats > 1:
            cases["RLAST early"] = (lambda b: [b[0] | {"last": 1}]), {Error.BUS_PROTOCOL}, offset
            cases["RLAST too early, beats go on"] = change(0, last=1), {Error.BUS_PROTOCOL}, offset
            # (the beats of the next burst of this ID pass for the missing ones at first)
            cases["beats missing"] = (lambda b: b[:1]), ANY_ERROR, None
        cases["one burst not answered"] = (lambda b: []), ANY_ERROR, None
        silence = {f"nothing any more, after {left} beats": left for left in sorted({0, beats // 2})}
        cases["wrong RID on the last beat"] = change(-1, id=1 - identity), ANY_ERROR, None
        for name, (damage, codes, address) in cases.items():
            label = f"read burst {number} {reads[number]}: {name}"
            await setting.bad_run(label, codes, address=address, read=on_burst(number, damage))
            # what the memory still owes would be taken for an answer of the next program: a fresh memory knows nothing
            await setting.good_run(f"after {label}")
        for name, left in silence.items():
            label = f"read burst {number} {reads[number]}: {name}"
            await setting.bad_run(
                label,
                {Error.WATCHDOG},
                address=0,
                read={"fault": lambda n, b, left=left: b if n < number else b[: left * (n == number)]},
            )
            await setting.good_run(f"after {label}")


@cocotb.test(timeout_time=50, timeout_unit="ms")
async def write_faults(dut):
    setting = Setting(dut)
    await setting.begin()
    await setting.good_run("before")
    _, writes = bursts(setting)
    for number in picks(len(writes)):
        offset, _ = writes[number]
        cases = {
            name: ({"fault": lambda n, r=resp: [(0, r if n == number else 0)]}, {Error.BUS_WRITE}, offset)
            for resp, name in ((1, "EXOKAY"), (2, "SLVERR"), (3, "DECERR"))
        }
        cases["wrong BID"] = {"fault": lambda n: [(int(n == number), 0)]}, {Error.BUS_PROTOCOL}, offset
        cases["second B"] = {"fault": lambda n: [(0, 0)] * (1 + (n == number))}, {Error.BUS_PROTOCOL}, None
        cases["B never"] = {"fault": lambda n: [(0, 0)] * (n != number)}, {Error.WATCHDOG}, 0
        cases["B before its data"] = {"early": number}, {Error.BUS_PROTOCOL, Error.NONE}, None
        for name, (fault, codes, address) in cases.items():
            label = f"write burst {number} {writes[number]}: {name}"
            if name in ("B before its data", "second B"):  # may come when it is due again
                setting.host.connect(write=fault)
                await setting.start_program()
                code, _ = await setting.host.outcome(20_000)
                assert code in (Error.BUS_PROTOCOL, Error.NONE), f"{label}: {code.name}"
                setting.changed_only_outputs(label)
                await setting.host.soft_reset()
            else:
                await setting.bad_run(label, codes, address=address, write=fault)
            await setting.good_run(f"after {label}")


@cocotb.test(timeout_time=50, timeout_unit="ms")
async def channels_that_stop(dut):
    """AR, AW, W never ready, from the start or from some cycle on; beats that nobody asked for."""
    setting = Setting(dut)
    await setting.begin()
    await setting.good_run("before")

    async def close(slave_name, channel, cycles):
        await ClockCycles(dut.clk, cycles)
        setattr(getattr(setting.host, slave_name), channel, False)

    for slave, channel in (
        ("read_slave", "accept_addresses"),
        ("write_slave", "accept_addresses"),
        ("write_slave", "accept_data"),
    ):
        for cycles in (0, 150, 240, 300):
            label = f"{slave}.{channel} gone {cycles} cycles after the registers"
            setting.host.connect()
            await setting.start_program()
            task = cocotb.start_soon(close(slave, channel, cycles))
            got = await setting.host.outcome(20_000)
            task.cancel()
            assert got in ((Error.WATCHDOG, 0), (Error.NONE, 0)), f"{label}: {got}"
            assert cycles or got[0], f"{label}: ends well"
            setting.changed_only_outputs(label)
            setting.host.taps = []  # a bus that never answers sees its offers withdrawn by the reset
            await setting.host.soft_reset()
            await setting.good_run(f"after {label}")
    for name, extra in (
        ("read", {"unsolicited": {60: [{"id": 0, "data": 1, "resp": 0, "last": 1}]}}),
        ("read", {"unsolicited": {60: [{"id": 1, "data": 1, "resp": 0, "last": 0}]}}),
        ("write", {"unsolicited": {60: [(0, 0)]}}),
        ("write", {"unsolicited": {60: [(1, 0)]}}),
    ):
        label = f"unsolicited on {name}: {extra}"
        # (a beat of an ID that has a burst open passes for its own until the count is wrong)
        await setting.bad_run(label, ANY_ERROR if name == "read" else {Error.BUS_PROTOCOL}, **{name: extra})
        await setting.good_run(f"after {label}")


@cocotb.test(timeout_time=50, timeout_unit="ms")
@cocotb.parametrize(pause=[0.0, 0.5, 0.9])
async def slow_and_reordered_is_legal(dut, pause):
    """Beats of both IDs mixed, long latency, gaps just below the watchdog."""
    setting = Setting(dut)
    await setting.begin()
    for latency in (1, 7, WATCHDOG // 2):
        for interleave in (False, True):
            await setting.good_run(
                f"latency {latency}, interleave {interleave}",
                pause=pause,
                read={"latency": latency, "interleave": interleave},
            )


@cocotb.test(timeout_time=50, timeout_unit="ms")
@cocotb.parametrize(kind=["soft", "hard"], pause=[0.0, 0.6])
async def reset_at_any_cycle(dut, kind, pause):
    """After a reset in any phase the same program runs bit-exactly; a soft reset leaves no burst behind."""
    setting = Setting(dut)
    await setting.begin()
    for _ in range(25):
        cycles = int(setting.rng.integers(0, 400 if pause == 0.0 else 900))
        label = f"{kind} reset {cycles} cycles after the start"
        setting.host.connect(pause=pause, check_stable=kind == "soft")
        await setting.start_program()
        await ClockCycles(dut.clk, cycles)
        if kind == "soft":
            await setting.host.soft_reset()
            assert setting.host.bus_at_rest, f"{label}: the bus is not at rest"
            assert await setting.host.read("STATUS") == 0 and await setting.host.read("ERROR_CODE") == 0
            assert await setting.host.read("WATCHDOG_CYCLES") == WATCHDOG, "registers survive"
        else:
            await setting.host.hard_reset()
            assert await setting.host.read("WATCHDOG_CYCLES") == setting.config.control.watchdog_cycles
        setting.changed_only_outputs(label)
        await setting.good_run(f"after {label}")


@cocotb.test(timeout_time=20, timeout_unit="ms")
async def start_and_registers_while_busy(dut):
    setting = Setting(dut)
    await setting.begin()
    setting.host.connect(read={"latency": 30})
    await setting.start_program()
    for name in (
        "MEMORY_BASE_LOW",
        "MEMORY_BASE_HIGH",
        "MEMORY_BYTES_LOW",
        "MEMORY_BYTES_HIGH",
        "PROGRAM_LOW",
        "PROGRAM_HIGH",
        "PROGRAM_COUNT",
        "WATCHDOG_CYCLES",
    ):
        value = await setting.host.read(name)
        assert await setting.host.read("STATUS") == 1, "the run is over too soon"
        assert not await setting.host.try_write(name, value ^ 0x10), f"{name} is not locked"
        assert await setting.host.read(name) == value, name
        assert await setting.host.try_write("CONTROL", 1), "a start is taken, and ignored"
    assert await setting.host.try_write("IRQ_ENABLE", 3)
    assert await setting.host.outcome(20_000) == (Error.NONE, 0)
    assert np.array_equal(setting.host.window, setting.after)
    assert await setting.host.read("INSTRUCTIONS") == setting.count, "a start while busy began anew"
    assert await setting.host.try_write("PROGRAM_COUNT", setting.count), "free again"
    await FallingEdge(dut.clk)
