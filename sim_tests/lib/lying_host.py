"""A host whose memory may lie: registers through cocotbext-axi, memory through `sim_tests.lib.faulty_axi`."""
import cocotb
from cocotb.triggers import ClockCycles, FallingEdge, ReadOnly, RisingEdge
from cocotbext.axi import AxiLiteBus, AxiLiteMaster
import numpy as np

from sim_tests.lib.faulty_axi import ReadSlave, WriteSlave
from sim_tests.lib.host import Host
from sim_tests.lib.streams import Tap
from spec.registers import BY_NAME, Error

#: Bytes of memory before and behind the window: nothing may be written there.
GUARD = 4096


class LyingHost(Host):
    """`Host` with a memory of one window between two guards; faults are given per run to `connect`."""

    def __init__(self, dut, image, beat_bytes, rng):
        self.dut, self.base, self.image, self.rng = dut, GUARD, np.asarray(image, np.uint8), rng
        self.memory_bytes, self.beat_bytes, self.pump = self.image.size, beat_bytes, None
        self.lite = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "s_axil", bus_separator="__"), dut.clk, dut.rst)
        self.guard = bytes(rng.integers(0, 256, GUARD, np.uint8))

    def connect(self, *, read=None, write=None, pause=0.0, check_stable=True):
        """A fresh memory with the image, fresh slaves with these faults."""
        if self.pump is not None:
            self.pump.cancel()
        self.memory = bytearray(self.guard + self.image.tobytes() + self.guard)
        self.read_slave = ReadSlave(self.dut, self.memory, self.beat_bytes, **{"pause": pause} | (read or {}))
        self.write_slave = WriteSlave(self.dut, self.memory, self.beat_bytes, **{"pause": pause} | (write or {}))
        self.taps = [Tap(self.dut, "m_axi__ar", ("addr", "len", "id"), check_stable=check_stable),
                     Tap(self.dut, "m_axi__aw", ("addr", "len", "id"), check_stable=check_stable),
                     Tap(self.dut, "m_axi__w", ("data", "strb", "last"), check_stable=check_stable)]
        self.pump = cocotb.start_soon(self._pump())

    async def _pump(self):
        cycle = 0
        while True:
            await FallingEdge(self.dut.clk)
            for slave in (self.read_slave, self.write_slave):
                slave.drive(self.rng)
            await ReadOnly()
            for end in (*self.taps, self.read_slave, self.write_slave):
                end.sample(cycle)
            cycle += 1

    @property
    def bus_at_rest(self):
        """Nothing accepted is still owed by either side."""
        r, w = self.read_slave, self.write_slave
        return not (r.waiting or r.current or w.answers or w.current or w.beats or w.written < len(w.bursts))

    @property
    def window(self):
        """The accelerator's memory as an array; asserts that the guards are untouched."""
        assert self.memory[:GUARD] == self.guard and self.memory[GUARD + self.memory_bytes:] == self.guard, \
            "written outside the window"
        return np.frombuffer(bytes(self.memory[GUARD:GUARD + self.memory_bytes]), np.uint8)

    async def outcome(self, limit):
        """Wait for the interrupt, at most ``limit`` cycles; (Error, address)."""
        for _ in range(limit):
            await RisingEdge(self.dut.clk)
            if self.dut.irq.value:
                break
        else:
            raise AssertionError(f"no interrupt within {limit} cycles")
        code = Error(await self.read("ERROR_CODE"))
        status, irq = await self.read("STATUS"), await self.read("IRQ_STATUS")
        assert (status, irq) == ((0b0100, 0b10) if code else (0b0010, 0b01)), f"STATUS {status}, IRQ {irq}, {code.name}"
        return code, await self.read("ERROR_ADDRESS_LOW") | await self.read("ERROR_ADDRESS_HIGH") << 32

    async def hard_reset(self, cycles=3):
        """Pulse ``rst`` for everything on the bus; the memory keeps its contents."""
        self.pump.cancel()
        await FallingEdge(self.dut.clk)
        self.dut.rst.value = 1
        self.dut.m_axi__rvalid.value = self.dut.m_axi__bvalid.value = 0
        await ClockCycles(self.dut.clk, cycles)
        await FallingEdge(self.dut.clk)
        self.dut.rst.value = 0
        await ClockCycles(self.dut.clk, 2)

    async def try_write(self, name, value):
        """Write a register; returns whether it was accepted."""
        answer = await self.lite.write(BY_NAME[name].offset, value.to_bytes(4, "little"))
        return int(answer.resp) == 0
