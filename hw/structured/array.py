"""The array: columns that share one stream, with the row-to-block map and the weight load path."""
from amaranth.hdl import Cat, Module, Signal, Shape, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from hw.share import place
from hw.structured.column import Column
from spec.derive import Sizes


class RowMap(wiring.Component):
    """Row-to-block map: slot s of pattern N:M works on stream position ``s // N``. The only logic that knows N.

    Combinational. Positions that the stream port does not have are zeros.
    Parameters: config (spec.config.Config).
    """

    def __init__(self, *, config):
        s, sizes = config.structured, Sizes(config)
        block = data.ArrayLayout(signed(s.activation_bits), s.block)
        self._config = config
        super().__init__({
            "stream": In(data.ArrayLayout(8 * s.block, sizes.stream_blocks)),
            "n_log2": In(3),
            "blocks": Out(data.ArrayLayout(block, s.slots))})

    def elaborate(self, platform):
        m = Module()
        s, sizes = self._config.structured, Sizes(self._config)
        for slot in range(s.slots):
            chosen = Signal(8 * s.block, name=f"slot{slot}")
            with m.Switch(self.n_log2):
                for p in s.patterns:
                    position = slot // p.n
                    with m.Case(p.n.bit_length() - 1):
                        if position < sizes.stream_blocks:
                            m.d.comb += chosen.eq(self.stream[position])
            # operands are stored in bytes whatever their width
            m.d.comb += self.blocks[slot].as_value().eq(
                Cat(*(chosen[8 * k:8 * k + s.activation_bits] for k in range(s.block))))
        return m


class StructuredArray(wiring.Component):
    """``sums[t+3, col] = sum over slots of value[slot, col] * stream[t][slot // N][index[slot, col]]``

    Stationary structured-sparse weights, streaming dense activations. ``stream`` is registered on entry; ``swap``
    together with a stream word makes the shadow weights active for that word and those after it.

    Weight load: ``load_data`` is one bus beat of a packed tile (docs/numerics.md); ``load_value`` or ``load_index``
    says which part, ``load_word`` which beat of it. The shadow is free again in the cycle after ``swap``.
    Range: exact. Latency: `latency` cycles from ``stream`` to ``sums``. Throughput: one stream word per cycle.
    Parameters: config (spec.config.Config).
    """

    latency = 1 + Column.latency

    def __init__(self, *, config):
        s, sizes = config.structured, Sizes(config)
        self._config = config
        super().__init__({
            "stream": In(data.ArrayLayout(8 * s.block, sizes.stream_blocks)),
            "n_log2": In(3), "swap": In(1), "en": In(1),
            "load_data": In(config.bus.data_bits), "load_value": In(1), "load_index": In(1),
            "load_word": In(range(max(sizes.value_beats, sizes.index_beats, 2))),
            "sums": Out(data.ArrayLayout(Shape(sizes.column_sum.bits, True), s.columns))})

    def elaborate(self, platform):
        m = Module()
        config, s, sizes = self._config, self._config.structured, Sizes(self._config)
        bus = config.bus.data_bits
        m.submodules.row_map = rows = RowMap(config=config)
        stream = Signal.like(self.stream.as_value(), reset_less=True)
        n_log2 = Signal.like(self.n_log2, reset_less=True)
        with m.If(self.en):
            m.d.sync += [stream.eq(self.stream), n_log2.eq(self.n_log2)]
        m.d.comb += [rows.stream.eq(stream), rows.n_log2.eq(n_log2)]

        value_word = Signal(sizes.value_beats)
        index_word = Signal(sizes.index_beats)
        m.d.comb += [value_word.eq(self.load_value << self.load_word), index_word.eq(self.load_index << self.load_word)]
        dense = Signal()
        m.d.comb += dense.eq(self.n_log2 == sizes.index_bits)
        for col in range(s.columns):
            column = place(m, f"column{col}", module="summand_column", factory=lambda: Column(config=config),
                           members=Column.members(config), platform=platform)
            m.d.comb += [column.blocks.eq(rows.blocks), column.swap.eq(self.swap & self.en), column.dense.eq(dense)]
            for slot in range(s.slots):
                element = slot * s.columns + col
                at = 8 * element % bus
                m.d.comb += [column.value[slot].eq(self.load_data[at:at + s.weight_bits]),
                             column.value_en[slot].eq(value_word[8 * element // bus])]
                for k in range(sizes.index_bits):
                    bit = sizes.index_bits * element + k
                    m.d.comb += [column.index[slot][k].eq(self.load_data[bit % bus]),
                                 column.index_en[slot * sizes.index_bits + k].eq(index_word[bit // bus])]
            m.d.comb += self.sums[col].eq(column.sum)
        return m
