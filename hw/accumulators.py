"""Two accumulator banks: an engine adds into one while the store unit reads the other."""
from amaranth.hdl import Module, Mux, Signal, Shape
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from hw.memory.ram import Ram
from spec.derive import Sizes
from spec.isa import Operation


def update_layout(config):
    """What an engine tells the accumulators: ``fetch`` with bank and address, the rest with the sums a cycle later."""
    sizes = Sizes(config)
    return data.StructLayout({
        "fetch": 1, "bank": 1, "address": range(sizes.accumulator_depth), "init": 1, "operation": 2,
        "sums": data.ArrayLayout(Shape(sizes.accumulator_input.bits, True), sizes.columns)})


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
        sizes = Sizes(config)
        acc = Shape(sizes.accumulator.bits, True)
        self._config = config
        super().__init__({
            "update": In(update_layout(config)), "overflow": Out(1),
            "read_en": In(1), "read_bank": In(1), "read_address": In(range(sizes.accumulator_depth)),
            "read_data": Out(data.ArrayLayout(acc, sizes.columns))})

    def elaborate(self, platform):
        m = Module()
        sizes, given = Sizes(self._config), self.update
        bits = sizes.accumulator.bits
        layout = data.ArrayLayout(Shape(bits, True), sizes.columns)
        banks = [Ram(width=bits * sizes.columns, depth=sizes.accumulator_depth) for _ in range(2)]
        update = Signal()
        bank = Signal()
        address = Signal(range(sizes.accumulator_depth))
        m.d.sync += [update.eq(given.fetch), bank.eq(given.bank), address.eq(given.address)]
        old = data.View(layout, Mux(bank, banks[1].read_data, banks[0].read_data))
        new = Signal(layout)
        outside = Signal(sizes.columns)
        wide = max(bits, sizes.accumulator_input.bits) + 1     # a narrow accumulator may not even hold one sum
        for col in range(sizes.columns):
            total = Signal(Shape(wide, True), name=f"total{col}")
            with m.If(given.init):
                m.d.comb += total.eq(given.sums[col])
            with m.Elif(given.operation == Operation.MAX):
                m.d.comb += total.eq(Mux(given.sums[col] > old[col], given.sums[col], old[col]))
            with m.Else():
                m.d.comb += total.eq(old[col] + given.sums[col])
            cut = total[:bits].as_signed()
            m.d.comb += [new[col].eq(cut), outside[col].eq(total != cut)]
        m.d.sync += self.overflow.eq(update & outside.any())

        read_bank = Signal()
        with m.If(self.read_en):
            m.d.sync += read_bank.eq(self.read_bank)
        m.d.comb += self.read_data.eq(Mux(read_bank, banks[1].read_data, banks[0].read_data))
        for n, ram in enumerate(banks):
            m.submodules[f"bank{n}"] = ram
            fetching = given.fetch & (given.bank == n)
            m.d.comb += [
                ram.write_en.eq(update & (bank == n)), ram.write_address.eq(address), ram.write_data.eq(new),
                ram.read_en.eq(fetching | self.read_en & (self.read_bank == n)),
                ram.read_address.eq(Mux(fetching, given.address, self.read_address))]
        return m
