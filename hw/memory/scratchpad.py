"""The banked activation scratchpad."""
from amaranth.hdl import Module
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from hw.memory.ram import Ram
from spec.derive import Sizes


class Scratchpad(wiring.Component):
    """``banks`` memories, each one block (M bytes) wide; block address a lies in bank a mod banks, row a div banks.

    Write: ``write_row`` is common, ``write_mask`` selects the banks, ``write_data`` holds one block per bank.
    Read: every bank has its own row; the data follow one cycle later.
    Latency: 1 cycle. Throughput: all banks read and written in each cycle.
    Parameters: config (spec.config.Config).
    """

    latency = 1

    def __init__(self, *, config):
        sizes = Sizes(config)
        self.banks, self.rows = sizes.banks, sizes.activation_blocks // sizes.banks
        block = 8 * sizes.block
        super().__init__({
            "write_en": In(1), "write_row": In(range(self.rows)), "write_mask": In(self.banks),
            "write_data": In(data.ArrayLayout(block, self.banks)),
            "read_en": In(1), "read_row": In(data.ArrayLayout(range(self.rows), self.banks)),
            "read_data": Out(data.ArrayLayout(block, self.banks))})
        self._block = block

    def elaborate(self, platform):
        m = Module()
        for n in range(self.banks):
            m.submodules[f"bank{n}"] = bank = Ram(width=self._block, depth=self.rows)
            m.d.comb += [
                bank.write_en.eq(self.write_en & self.write_mask[n]), bank.write_address.eq(self.write_row),
                bank.write_data.eq(self.write_data[n]),
                bank.read_en.eq(self.read_en), bank.read_address.eq(self.read_row[n]),
                self.read_data[n].eq(bank.read_data)]
        return m
