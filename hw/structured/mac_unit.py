"""The N:M sparse MAC unit as a component of its own: one column with its row map and one accumulator."""
from amaranth.hdl import Module, Mux, Signal, Shape
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from hw.layouts import from_record
from hw.memory.queue import Queue
from hw.structured.array import RowMap
from hw.structured.column import Column
from spec import formats
from spec.derive import Sizes


class MacUnit(wiring.Component):
    """``sum = sum over beats, slots of value[slot] * stream[slot // N][index[slot]]``, until a beat with ``last``.

    Each beat brings its own weights and pattern, so the terms of a TASD series are simply further beats of one sum.
    Range: exact inside ``accumulator_bits``; ``overflow`` tells of a sum (also of an intermediate one) outside.
    Flow control: stallable on both sides; ``i.ready`` does not depend on ``o.ready`` in the same cycle.
    Latency: `latency` cycles from the last beat to ``o.valid``. Throughput: one beat per cycle; when ``o`` stalls, up
    to `depth` sums are kept before ``i`` stalls.
    Parameters: config (spec.config.Config), its structured section only.
    Members: i, In(stream of `formats.mac_operand`); o, Out(stream of `formats.mac_sum`).
    """

    #: Cycles: weights to the shadow, to the active registers, product, sum, and two of the queue.
    latency = 2 + Column.latency + 2
    #: Sums that fit in the output queue; the pipeline counts against it.
    depth = 8

    def __init__(self, *, config):
        self._config = config
        super().__init__({"i": In(stream.Signature(from_record(formats.mac_operand(config)))),
                          "o": Out(stream.Signature(from_record(formats.mac_sum(config))))})

    def elaborate(self, platform):
        m = Module()
        config, s, sizes = self._config, self._config.structured, Sizes(self._config)
        bits = sizes.accumulator.bits
        m.submodules.rows = rows = RowMap(config=config)
        m.submodules.column = column = Column(config=config)
        m.submodules.sums = sums = Queue(shape=self.o.payload.shape(), depth=self.depth)
        wiring.connect(m, sums.o, wiring.flipped(self.o))

        # a sum in the pipeline has its place in the queue, so the pipeline itself never stops
        promised = Signal(range(self.depth + 1))
        beat, beat_last = Signal(), Signal()
        m.d.comb += [self.i.ready.eq(promised != self.depth), beat.eq(self.i.valid & self.i.ready),
                     beat_last.eq(beat & self.i.payload.last)]
        m.d.sync += promised.eq(promised + beat_last - (self.o.valid & self.o.ready))

        # t: weights to the shadow; t+1: swap; t+2: the stream word meets the active weights
        dense = self.i.payload.n_log2 == sizes.index_bits
        for slot in range(s.slots):
            m.d.comb += [column.value[slot].eq(self.i.payload.value[slot]),
                         column.index[slot].eq(Mux(dense, slot % s.block, self.i.payload.index[slot]))]
        m.d.comb += [column.value_en.eq(Mux(beat, -1, 0)), column.index_en.eq(Mux(beat, -1, 0))]
        word = self.i.payload.stream.as_value()
        words = [Signal(len(word), name=f"word{k}", reset_less=True) for k in range(2)]
        patterns = [Signal(3, name=f"n_log2_{k}", reset_less=True) for k in range(2)]
        m.d.sync += [words[0].eq(word), words[1].eq(words[0]),
                     patterns[0].eq(self.i.payload.n_log2), patterns[1].eq(patterns[0])]
        m.d.comb += [rows.stream.eq(words[1]), rows.n_log2.eq(patterns[1]), column.blocks.eq(rows.blocks)]

        stages = 2 + Column.latency
        valid, last = Signal(stages), Signal(stages)
        m.d.sync += [valid.eq(valid << 1 | beat), last.eq(last << 1 | beat_last)]
        m.d.comb += column.swap.eq(valid[0])

        acc, outside = Signal(Shape(bits, True)), Signal()
        total = Signal(Shape(max(bits, sizes.column_sum.bits) + 1, True))
        wrong = Signal()
        m.d.comb += [total.eq(acc + column.sum), wrong.eq(outside | (total != total[:bits].as_signed()))]
        m.d.comb += [sums.i.payload.sum.eq(total[:bits].as_signed()), sums.i.payload.overflow.eq(wrong),
                     sums.i.valid.eq(valid[-1] & last[-1])]
        with m.If(valid[-1]):
            m.d.sync += [acc.eq(Mux(last[-1], 0, total[:bits].as_signed())), outside.eq(wrong & ~last[-1])]
        return m
