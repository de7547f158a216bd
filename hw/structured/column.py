"""One column: a PE per slot and the adder tree."""
from amaranth.hdl import Module, Signal, Shape
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from hw.share import place
from hw.structured.pe import Pe
from spec.derive import Sizes


def tree_sum(values):
    """Balanced adder tree: shorter than a chain, and equal, since every addition is exact."""
    values = list(values)
    while len(values) > 1:
        pairs = [a + b for a, b in zip(values[0::2], values[1::2])]
        values = pairs + values[2 * len(pairs):]
    return values[0]


class Column(wiring.Component):
    """``sum[t+2] = sum over slots of value[slot] * blocks[t][slot][index[slot]]``

    ``blocks`` has one block per slot (the row-to-block map is shared by all columns and lies outside).
    Range: exact; ``sum`` has `spec.derive.Sizes.column_sum`.
    Latency: 2 cycles (product, sum). Throughput: one sum per cycle.
    Parameters: config (spec.config.Config).
    """

    latency = Pe.latency + 1

    @staticmethod
    def members(config):
        """Signature members."""
        s, sizes = config.structured, Sizes(config)
        return {
            "blocks": In(data.ArrayLayout(data.ArrayLayout(Shape(s.activation_bits, True), s.block), s.slots)),
            "value": In(data.ArrayLayout(Shape(s.weight_bits, True), s.slots)), "value_en": In(s.slots),
            "index": In(data.ArrayLayout(sizes.index_bits, s.slots)), "index_en": In(s.slots * sizes.index_bits),
            "swap": In(1), "dense": In(1),
            "sum": Out(Shape(sizes.column_sum.bits, True))}

    def __init__(self, *, config):
        self._config = config
        super().__init__(self.members(config))

    def elaborate(self, platform):
        m = Module()
        s, sizes = self._config.structured, Sizes(self._config)
        size = dict(block=s.block, activation_bits=s.activation_bits, weight_bits=s.weight_bits)
        products = []
        for slot in range(s.slots):
            pe = place(m, f"pe{slot}", module="summand_pe", factory=lambda: Pe(**size), members=Pe.members(**size),
                       platform=platform)
            m.d.comb += [
                pe.block.eq(self.blocks[slot]), pe.value.eq(self.value[slot]), pe.value_en.eq(self.value_en[slot]),
                pe.index.eq(self.index[slot]), pe.swap.eq(self.swap), pe.dense.eq(self.dense),
                pe.index_en.eq(self.index_en[slot * sizes.index_bits:(slot + 1) * sizes.index_bits]),
                pe.dense_index.eq(slot % s.block)]
            products.append(pe.product)
        total = Signal.like(self.sum, reset_less=True)
        m.d.sync += total.eq(tree_sum(products))
        m.d.comb += self.sum.eq(total)
        return m
