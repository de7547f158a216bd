"""The one memory wrapper: every on-chip memory is a `Ram`, so that a target may replace it by an SRAM macro."""
from amaranth.hdl import Module
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out


class Ram(wiring.Component):
    """One write port, one synchronous read port.

    ``read_data`` is the word at ``read_address`` in the cycle after ``read_en`` and holds while ``read_en`` is 0.
    Reading and writing one address in the same cycle returns the old word. Contents start as zeros in simulation and
    are undefined in silicon: no reader may depend on them.

    Parameters: width (bits), depth (words).
    Latency: 1 cycle. Throughput: one read and one write per cycle.
    """

    latency = 1

    def __init__(self, *, width, depth):
        if width < 1 or depth < 1:
            raise ValueError(f"Memory must have at least one bit and one word, not {width} x {depth}")
        self.width, self.depth = width, depth
        super().__init__({
            "write_en": In(1), "write_address": In(range(depth)), "write_data": In(width),
            "read_en": In(1), "read_address": In(range(depth)), "read_data": Out(width)})

    def elaborate(self, platform):
        m = Module()
        m.submodules.memory = ram = memory.Memory(shape=self.width, depth=self.depth, init=[])
        write, read = ram.write_port(), ram.read_port()
        m.d.comb += [
            write.en.eq(self.write_en), write.addr.eq(self.write_address), write.data.eq(self.write_data),
            read.en.eq(self.read_en), read.addr.eq(self.read_address), self.read_data.eq(read.data)]
        return m
