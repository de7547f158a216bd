"""Two accumulator banks: the array adds into one while the store unit reads the other."""
from amaranth.hdl import Module, Mux, Signal, Shape
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from hw.memory.ram import Ram
from spec.derive import Sizes
from spec.isa import Operation


class Accumulators(wiring.Component):
    """``acc[bank, address] = sums`` (init), ``acc + sums`` or ``max(acc, sums)``, all columns at once.

    ``fetch`` announces an update one cycle ahead (bank, address); ``update`` with ``sums`` follows in the next cycle.
    Two updates of one address must be at least two cycles apart (the execute unit guarantees it).
    Store side: ``read_en`` with bank and address, data in the next cycle; they hold while ``read_en`` is 0. The two
    sides must use different banks, which the tokens of the program guarantee.

    Range: ``overflow`` is 1 in the cycle after an update that left the accumulator's format (the word stored is then
    cut and the program must be abandoned).
    Latency: 1 cycle. Throughput: one pixel of all columns per cycle on each side.
    Parameters: config (spec.config.Config).
    """

    def __init__(self, *, config):
        s, sizes = config.structured, Sizes(config)
        acc = Shape(sizes.accumulator.bits, True)
        self._config = config
        super().__init__({
            "fetch": In(1), "fetch_bank": In(1), "fetch_address": In(range(s.accumulator_depth)),
            "init": In(1), "operation": In(2),      # with the sums, one cycle after fetch
            "sums": In(data.ArrayLayout(Shape(sizes.column_sum.bits, True), s.columns)),
            "overflow": Out(1),
            "read_en": In(1), "read_bank": In(1), "read_address": In(range(s.accumulator_depth)),
            "read_data": Out(data.ArrayLayout(acc, s.columns))})

    def elaborate(self, platform):
        m = Module()
        s, sizes = self._config.structured, Sizes(self._config)
        bits = sizes.accumulator.bits
        layout = data.ArrayLayout(Shape(bits, True), s.columns)
        banks = [Ram(width=bits * s.columns, depth=s.accumulator_depth) for _ in range(2)]
        update = Signal()
        bank = Signal()
        address = Signal.like(self.fetch_address)
        m.d.sync += [update.eq(self.fetch), bank.eq(self.fetch_bank), address.eq(self.fetch_address)]
        old = data.View(layout, Mux(bank, banks[1].read_data, banks[0].read_data))
        new = Signal(layout)
        outside = Signal(s.columns)
        wide = max(bits, sizes.column_sum.bits) + 1     # a narrow accumulator may not even hold one column sum
        for col in range(s.columns):
            total = Signal(Shape(wide, True), name=f"total{col}")
            with m.If(self.init):
                m.d.comb += total.eq(self.sums[col])
            with m.Elif(self.operation == Operation.MAX):
                m.d.comb += total.eq(Mux(self.sums[col] > old[col], self.sums[col], old[col]))
            with m.Else():
                m.d.comb += total.eq(old[col] + self.sums[col])
            cut = total[:bits].as_signed()
            m.d.comb += [new[col].eq(cut), outside[col].eq(total != cut)]
        m.d.sync += self.overflow.eq(update & outside.any())

        read_bank = Signal()
        with m.If(self.read_en):
            m.d.sync += read_bank.eq(self.read_bank)
        m.d.comb += self.read_data.eq(Mux(read_bank, banks[1].read_data, banks[0].read_data))
        for n, ram in enumerate(banks):
            m.submodules[f"bank{n}"] = ram
            fetching = self.fetch & (self.fetch_bank == n)
            m.d.comb += [
                ram.write_en.eq(update & (bank == n)), ram.write_address.eq(address), ram.write_data.eq(new),
                ram.read_en.eq(fetching | self.read_en & (self.read_bank == n)),
                ram.read_address.eq(Mux(fetching, self.fetch_address, self.read_address))]
        return m
