"""cocotb tests of RegisterFile: cocotbext-axi's AXI4-Lite master, and single channels by hand for order and stalls."""
import cocotb
from cocotb.triggers import FallingEdge, ReadOnly
from cocotbext.axi import AxiLiteBus
from cocotbext.axi.axil_channels import (
    AxiLiteARSource, AxiLiteARTransaction, AxiLiteAWSource, AxiLiteAWTransaction, AxiLiteBSink, AxiLiteRSink,
    AxiLiteWSource, AxiLiteWTransaction)
import numpy as np

from hw.bus.axi import REGISTER_ADDRESS_BITS
from hw.bus.registers import LOCKED_WHILE_BUSY, member_of
from sim_tests.hw.bus.common import pauses
from sim_tests.lib.simulate import config_of_run
from sim_tests.lib.streams import Tap, exchange, start
from spec.registers import BY_NAME, INTERFACE_VERSION, MAGIC, REGISTERS, WINDOW_BYTES, Access

OKAY, SLVERR = 0, 2
WRITABLE = [r for r in REGISTERS if r.access is Access.READ_WRITE]
CONSTANTS = ("ID", "VERSION", "DIGEST_LOW", "DIGEST_HIGH")
INPUTS = [r for r in REGISTERS if r.access is Access.READ_ONLY and r.name not in CONSTANTS]


async def begin(dut, **inputs):
    values = {member_of(r.name): 0 for r in INPUTS}
    await start(dut, **{"busy": 0, "event_done": 0, "event_error": 0, **values, **inputs})


class Port:
    """AXI4-Lite accesses through cocotbext-axi's channels: any address, any byte enables, the response."""

    def __init__(self, dut, rng=None, pause=0.0):
        bus = AxiLiteBus.from_prefix(dut, "s_axil", bus_separator="__")
        self.aw, self.w, self.ar = (kind(channel, dut.clk, dut.rst) for kind, channel in (
            (AxiLiteAWSource, bus.write.aw), (AxiLiteWSource, bus.write.w), (AxiLiteARSource, bus.read.ar)))
        self.b, self.r = AxiLiteBSink(bus.write.b, dut.clk, dut.rst), AxiLiteRSink(bus.read.r, dut.clk, dut.rst)
        if pause:
            for channel in (self.aw, self.w, self.b, self.ar, self.r):
                channel.set_pause_generator(pauses(pause, int(rng.integers(1 << 30))))

    async def read(self, address):
        await self.ar.send(AxiLiteARTransaction(araddr=address, arprot=0))
        answer = await self.r.recv()
        return int(answer.rdata), int(answer.rresp)

    async def write(self, address, value, strobes=15):
        await self.aw.send(AxiLiteAWTransaction(awaddr=address, awprot=0))
        await self.w.send(AxiLiteWTransaction(wdata=value, wstrb=strobes))
        return int((await self.b.recv()).bresp)


@cocotb.test(timeout_time=5, timeout_unit="ms")
@cocotb.parametrize(pause=[0.0, 0.5])
async def every_register_reads_and_writes(dut, pause):
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    digest = int(config.digest, 16)
    values = {r.name: int(rng.integers(1 << r.bits)) for r in INPUTS} | {"STATUS": 2}
    await begin(dut, **{member_of(name): value for name, value in values.items()})
    port = Port(dut, rng, pause)
    values |= {"ID": MAGIC, "VERSION": INTERFACE_VERSION,
               "DIGEST_LOW": digest & 0xFFFFFFFF, "DIGEST_HIGH": digest >> 32, "CONTROL": 0,
               "IRQ_STATUS": 0, **{r.name: 0 for r in WRITABLE},
               "WATCHDOG_CYCLES": config.control.watchdog_cycles}

    async def check():
        for r in REGISTERS:
            assert await port.read(r.offset) == (values[r.name], OKAY), r.name
        for r in WRITABLE:
            assert int(getattr(dut, member_of(r.name)).value) == values[r.name], r.name

    await check()
    for r in rng.permutation(len(WRITABLE)):
        r, value = WRITABLE[r], int(rng.integers(1 << 32))
        assert await port.write(r.offset, value) == OKAY
        values[r.name] = value & (1 << r.bits) - 1
    await check()
    for r in REGISTERS:
        if r.access is Access.READ_ONLY:
            assert await port.write(r.offset, 0xFFFFFFFF) == SLVERR, r.name
    await check()
    for strobes in [*range(16), *rng.integers(0, 16, 40).tolist()]:
        r, word = WRITABLE[rng.integers(len(WRITABLE))], int(rng.integers(1 << 32))
        assert await port.write(r.offset, word, strobes) == OKAY
        mask = sum(255 << 8 * lane for lane in range(4) if strobes >> lane & 1) & (1 << r.bits) - 1
        values[r.name] = values[r.name] & ~mask | word & mask
    await check()


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def holes_and_what_lies_beyond_are_refused(dut):
    await begin(dut)
    port = Port(dut)
    offsets = {r.offset for r in REGISTERS}
    beyond = [WINDOW_BYTES, WINDOW_BYTES + BY_NAME["MEMORY_BASE_LOW"].offset, (1 << REGISTER_ADDRESS_BITS) - 4]
    for address in [a for a in range(0, WINDOW_BYTES, 4) if a not in offsets] + beyond:
        assert await port.read(address) == (0, SLVERR), hex(address)
        assert await port.write(address, 0xFFFFFFFF) == SLVERR, hex(address)
    for r in WRITABLE:
        want = config_of_run().control.watchdog_cycles if r.name == "WATCHDOG_CYCLES" else 0
        assert int(getattr(dut, member_of(r.name)).value) == want, r.name


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def program_registers_are_locked_while_busy(dut):
    await begin(dut)
    port = Port(dut)
    for r in WRITABLE:
        assert await port.write(r.offset, 1) == OKAY
    dut.busy.value = 1
    for r in WRITABLE:
        locked = r.name in LOCKED_WHILE_BUSY
        assert locked == (r.name != "IRQ_ENABLE")
        assert await port.write(r.offset, 2) == (SLVERR if locked else OKAY), r.name
        assert await port.read(r.offset) == (1 if locked else 2, OKAY), r.name
    dut.busy.value = 0
    for r in WRITABLE:
        assert await port.write(r.offset, 3) == OKAY
        assert int(getattr(dut, member_of(r.name)).value) == 3


async def pulses_of(dut, seen):
    """Records, per cycle, which of start and soft_reset are high."""
    while True:
        await FallingEdge(dut.clk)
        await ReadOnly()
        if dut.start.value or dut.soft_reset.value:
            seen.append((int(dut.start.value), int(dut.soft_reset.value)))


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def control_pulses_once(dut):
    await begin(dut)
    port, seen = Port(dut), []
    watcher = cocotb.start_soon(pulses_of(dut, seen))
    offset = BY_NAME["CONTROL"].offset
    for word, busy, status, want in [
            (1, 0, 0, [(1, 0)]), (2, 0, 0, [(0, 1)]), (3, 0, 0, [(0, 1)]), (0, 0, 0, []), (0xFFFFFFFC, 0, 0, []),
            (1, 1, 1, []), (2, 1, 1, [(0, 1)]), (1, 0, 0b0100, []), (2, 0, 0b0100, [(0, 1)]), (1, 0, 0b1000, []),
            (1, 0, 0b0010, [(1, 0)])]:
        dut.busy.value, dut.value_status.value = busy, status
        seen.clear()
        assert await port.write(offset, word) == OKAY
        assert seen == want, (word, busy, status)
        assert await port.read(offset) == (0, OKAY)
    seen.clear()
    dut.busy.value = dut.value_status.value = 0
    assert await port.write(offset, 0xFFFFFFFF, 0b1110) == OKAY  # byte 0 not enabled
    assert seen == []
    watcher.cancel()


async def pulse(signal, dut):
    await FallingEdge(dut.clk)
    signal.value = 1
    await FallingEdge(dut.clk)
    signal.value = 0


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def interrupt_sets_enables_and_clears(dut):
    await begin(dut)
    port = Port(dut)
    status, enable = BY_NAME["IRQ_STATUS"].offset, BY_NAME["IRQ_ENABLE"].offset
    for bit, event in enumerate((dut.event_done, dut.event_error)):
        assert dut.irq.value == 0
        await pulse(event, dut)
        assert await port.read(status) == (1 << bit, OKAY) and dut.irq.value == 0
        await port.write(enable, 3 ^ 1 << bit)
        assert dut.irq.value == 0
        await port.write(enable, 1 << bit)
        assert dut.irq.value == 1
        await port.write(status, 3 ^ 1 << bit)  # another bit clears nothing
        assert dut.irq.value == 1
        assert await port.write(status, 0xFFFFFFFF, 0b1110) == OKAY
        assert dut.irq.value == 1
        await port.write(status, 1 << bit)
        assert dut.irq.value == 0 and await port.read(status) == (0, OKAY)
        await port.write(enable, 0)


@cocotb.test(timeout_time=1, timeout_unit="ms")
@cocotb.parametrize(bit=[0, 1])
async def an_event_beside_its_clearing_write_is_kept(dut, bit):
    """An event of one cycle, in each cycle around a clearing write: kept from the cycle in which the write acts."""
    event, offset = (dut.event_done, dut.event_error)[bit], BY_NAME["IRQ_STATUS"].offset
    rng, outcomes = np.random.default_rng(cocotb.RANDOM_SEED), []
    await begin(dut, s_axil__awvalid=0, s_axil__wvalid=0, s_axil__bready=1, s_axil__arvalid=0, s_axil__rready=1,
                s_axil__wstrb=15, s_axil__wdata=3, s_axil__awaddr=offset, s_axil__araddr=offset)
    for delay in range(6):
        taps = [Tap(dut, "s_axil__b", ("resp",)), Tap(dut, "s_axil__r", ("data",))]

        def drive(cycle, delay=delay):
            event.value = int(cycle in (0, 4 + delay))
            for name in ("aw", "w"):
                getattr(dut, f"s_axil__{name}valid").value = int(cycle in (4, 30))
            dut.s_axil__arvalid.value = int(cycle in (2, 20))

        seen = [event async for event in exchange(dut, taps, rng=rng, on_cycle=drive, drain=40)]
        answers = [cycle for cycle, name, _ in seen if name == "s_axil__b"]
        before, after = (word["data"] for _, name, word in seen if name == "s_axil__r")
        acts = answers[0] - 1
        assert before == 1 << bit and after == (1 << bit if 4 + delay >= acts else 0), (delay, acts)
        outcomes.append(after)
    assert outcomes[0] == 0 and outcomes[-1] == 1 << bit


@cocotb.test(timeout_time=5, timeout_unit="ms")
@cocotb.parametrize(gap=[-5, -1, 0, 1, 5], stall=[0, 7])
async def address_and_data_in_any_order(dut, gap, stall):
    """W ``gap`` cycles after AW (before it, if negative), the answer taken ``stall`` cycles late, and stable."""
    await begin(dut, s_axil__awvalid=0, s_axil__wvalid=0, s_axil__bready=0, s_axil__arvalid=0, s_axil__rready=0,
                s_axil__wstrb=15)
    rng = np.random.default_rng(cocotb.RANDOM_SEED)
    taps = [Tap(dut, f"s_axil__{c}", f) for c, f in (("aw", ("addr",)), ("w", ("data",)), ("b", ("resp",)))]
    offset, writes = BY_NAME["MEMORY_BASE_LOW"].offset, 4
    at, done = {"aw": max(0, -gap), "w": max(0, gap)}, {"aw": 0, "w": 0}
    taken = {"aw": 0, "w": 0, "b": 0}
    waited = 0

    def drive(cycle):
        nonlocal waited
        for c in ("aw", "w"):
            if taken[c] > done[c]:
                done[c] = taken[c]
            valid = taken[c] < writes and cycle >= at[c] and taken[c] - taken["b"] < 2
            getattr(dut, f"s_axil__{c}valid").value = int(valid)
        dut.s_axil__awaddr.value = offset
        dut.s_axil__wdata.value = 100 + taken["w"]
        waited = waited + 1 if dut.s_axil__bvalid.value else 0
        dut.s_axil__bready.value = int(waited > stall)

    async for _, name, word in exchange(dut, taps, rng=rng, on_cycle=drive, drain=20,
                                        until=lambda: taken["b"] == writes):
        channel = name.removeprefix("s_axil__")
        taken[channel] += 1
        if channel == "b":
            assert word["resp"] == OKAY
            assert taken["b"] <= min(taken["aw"], taken["w"])
            assert int(dut.value_memory_base_low.value) == 99 + taken["b"]
    assert taken == {"aw": writes, "w": writes, "b": writes}


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def misaligned_addresses_are_refused(dut):
    await begin(dut)
    port = Port(dut)
    for r in REGISTERS:
        for low in (1, 2, 3):
            assert await port.write(r.offset + low, 0xFFFFFFFF) == SLVERR, r.name
            assert await port.read(r.offset + low) == (0, SLVERR), r.name
    for r in WRITABLE:
        want = config_of_run().control.watchdog_cycles if r.name == "WATCHDOG_CYCLES" else 0
        assert int(getattr(dut, member_of(r.name)).value) == want, r.name
