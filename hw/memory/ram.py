"""The one memory wrapper: every on-chip memory is a `Ram`, so that a target may replace it by an SRAM macro."""
from amaranth.hdl import ClockSignal, Const, Instance, Module
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out

from hw.share import SharedModules

#: The memory as Verilog, written once however many there are. Amaranth's own memories come with a line of text per
#: word (their initial contents), a third of the whole text; these have no initial contents, as silicon has none.
RAM_VERILOG = """\
module summand_ram #(parameter WIDTH = 8, parameter DEPTH = 16, parameter ADDRESS_BITS = 4) (
  input wire clk,
  input wire write_en, input wire [ADDRESS_BITS-1:0] write_address, input wire [WIDTH-1:0] write_data,
  input wire read_en, input wire [ADDRESS_BITS-1:0] read_address, output reg [WIDTH-1:0] read_data);
  reg [WIDTH-1:0] words [0:DEPTH-1];
  always @(posedge clk) begin
    if (write_en) words[write_address] <= write_data;
    if (read_en) read_data <= words[read_address];
  end
endmodule
"""


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
        if isinstance(platform, SharedModules):
            platform.request("summand_ram", lambda: RAM_VERILOG)
            # an address of no bits (a single word) is no port in Verilog
            write_address, read_address = (
                a if len(a) else Const(0, 1) for a in (self.write_address, self.read_address))
            m.submodules.words = Instance(
                "summand_ram", p_WIDTH=self.width, p_DEPTH=self.depth, p_ADDRESS_BITS=len(write_address),
                i_clk=ClockSignal(), i_write_en=self.write_en, i_write_address=write_address,
                i_write_data=self.write_data, i_read_en=self.read_en, i_read_address=read_address,
                o_read_data=self.read_data)
            return m
        m.submodules.memory = ram = memory.Memory(shape=self.width, depth=self.depth, init=[])
        write, read = ram.write_port(), ram.read_port()
        m.d.comb += [
            write.en.eq(self.write_en), write.addr.eq(self.write_address), write.data.eq(self.write_data),
            read.en.eq(self.read_en), read.addr.eq(self.read_address), self.read_data.eq(read.data)]
        return m
