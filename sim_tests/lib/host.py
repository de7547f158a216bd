"""The host of a simulated accelerator: memory and register traffic through cocotbext-axi, which nobody here wrote."""
import itertools

from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, RisingEdge
from cocotbext.axi import AxiBus, AxiLiteBus, AxiLiteMaster, AxiRam

from spec.registers import BY_NAME, COUNTERS, Error


class Host:
    """Registers through AxiLiteMaster, memory as AxiRam; ``stall``: chance per cycle of a pause on every channel."""

    def __init__(self, dut, *, memory_bytes, stall=0.0, rng=None, base=0x1000):
        self.dut, self.base, self.memory_bytes = dut, base, memory_bytes
        self.lite = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "s_axil", bus_separator="__"), dut.clk, dut.rst)
        self.ram = AxiRam(AxiBus.from_prefix(dut, "m_axi", bus_separator="__"), dut.clk, dut.rst,
                          size=(-(-(base + memory_bytes) // 4096) + 1) * 4096)
        if stall:
            interfaces = (self.ram.write_if.aw_channel, self.ram.write_if.w_channel, self.ram.write_if.b_channel,
                          self.ram.read_if.ar_channel, self.ram.read_if.r_channel)
            for channel in interfaces:
                channel.set_pause_generator(self._pauses(rng.spawn(1)[0], stall))

    @staticmethod
    def _pauses(rng, stall):
        while True:
            yield from (rng.random(256) < stall).tolist()

    async def start_clock(self):
        """Clock and reset."""
        self.dut.rst.value = 1
        Clock(self.dut.clk, 10, unit="ns").start()
        await ClockCycles(self.dut.clk, 4)
        self.dut.rst.value = 0
        await ClockCycles(self.dut.clk, 2)

    async def read(self, name):
        """Value of a register."""
        return await self.lite.read_dword(BY_NAME[name].offset)

    async def write(self, name, value):
        """Write a register."""
        await self.lite.write_dword(BY_NAME[name].offset, value)

    async def begin(self, program, count):
        """Program the window and the program, enable interrupts, start."""
        await self.write("MEMORY_BASE_LOW", self.base)
        await self.write("MEMORY_BYTES_LOW", self.memory_bytes)
        await self.write("PROGRAM_LOW", program)
        await self.write("PROGRAM_COUNT", count)
        await self.write("IRQ_ENABLE", 3)
        await self.write("IRQ_STATUS", 3)
        await self.write("CONTROL", 1)

    async def wait(self, limit=1_000_000):
        """Wait for the interrupt; returns (Error, counters)."""
        for cycle in itertools.count():
            await RisingEdge(self.dut.clk)
            if self.dut.irq.value:
                break
            assert cycle < limit, f"no interrupt within {limit} cycles"
        code = Error(await self.read("ERROR_CODE"))
        counters = {name: await self.read(name) for name, _ in COUNTERS}
        status = await self.read("STATUS")
        assert status == (0b0100 if code else 0b0010), f"STATUS {status:#x} with {code.name}"
        return code, counters

    async def soft_reset(self):
        """Soft reset, and wait until it is over."""
        await self.write("CONTROL", 2)
        while await self.read("STATUS") & 8:
            pass


