"""A memory that is filled beat by beat and read a whole row at a time: taps, series coefficients."""
from amaranth.hdl import Cat, Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from hw.memory.ram import Ram


class TileMemory(wiring.Component):
    """``rows`` rows of ``beats`` bus words, beat k in the k-th of ``beats`` memories side by side.

    Written a beat at a time, read a row at a time: ``read_data`` is the row in the cycle after ``read_en`` and holds.
    Parameters: rows, beats, bits (of a beat).
    """

    def __init__(self, *, rows, beats, bits):
        self._rows, self._beats, self._bits = rows, beats, bits
        super().__init__({
            "write_en": In(1), "write_row": In(range(rows)), "write_beat": In(range(max(beats, 2))),
            "write_data": In(bits), "read_en": In(1), "read_row": In(range(rows)), "read_data": Out(bits * beats)})

    def elaborate(self, platform):
        m = Module()
        words = []
        for k in range(self._beats):
            m.submodules[f"beat{k}"] = ram = Ram(width=self._bits, depth=self._rows)
            m.d.comb += [
                ram.write_en.eq(self.write_en & (self.write_beat == k)), ram.write_address.eq(self.write_row),
                ram.write_data.eq(self.write_data), ram.read_en.eq(self.read_en), ram.read_address.eq(self.read_row)]
            words.append(ram.read_data)
        m.d.comb += self.read_data.eq(Cat(*words))
        return m
