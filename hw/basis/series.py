"""The coefficient stage for N:M series: regular, one stream word per cycle, nothing to search."""
from amaranth.hdl import Cat, Module, Mux, Shape, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from hw.basis.stage import stage_members
from hw.basis.tiles import TileMemory
from hw.share import place
from hw.structured.column import tree_sum
from spec.derive import Sizes


def saturate(m, value, bits, *, name):
    """(value clamped to ``bits`` signed bits, 1 if it had to be)."""
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    fits = Signal(name=f"{name}_fits")
    clamped = Signal(signed(bits), name=f"{name}_clamped")
    # it fits if all bits from the sign bit of the result on are equal
    upper = value[bits - 1:] if len(value) > bits else value[-1:]
    m.d.comb += [fits.eq(upper.all() | ~upper.any()),
                 clamped.eq(Mux(fits, value[:bits].as_signed() if len(value) > bits else value,
                                Mux(value[-1], low, high)))]
    return clamped, ~fits


class SeriesSlice(wiring.Component):
    """IR of one basis kernel of one output: ``sum over words, lanes of (+x, -x or 0)``, clamped once at the end.

    ``groups[l]`` is the channel group that lane l works on; ``code`` holds for each lane the place in the group,
    whether there is a coefficient, and its sign. No multiplier: a negative coefficient inverts the activation and
    carries in 1.
    All registers move only while ``advance`` is 1. One cycle after ``groups``, ``add`` says that they were a word, and
    ``first`` and ``last`` that it was the pixel's first or last.

    Latency: 2 cycles from ``groups`` to ``ir``. Throughput: one word per cycle.
    Parameters: config (spec.config.Config).
    """

    @staticmethod
    def members(config):
        """Signature members."""
        b, sizes = config.basis, Sizes(config)
        operand = Shape(sizes.operand.bits, True)
        return {
            "groups": In(data.ArrayLayout(data.ArrayLayout(operand, b.group), b.lanes)),
            "code": In(b.lanes * sizes.lane_code_bits), "advance": In(1), "add": In(1), "first": In(1),
            "last": In(1),
            "ir": Out(Shape(sizes.intermediate.bits, True)), "saturated": Out(1)}

    def __init__(self, *, config):
        self._config = config
        super().__init__(self.members(config))

    def elaborate(self, platform):
        m = Module()
        b, sizes = self._config.basis, Sizes(self._config)
        width, index_bits = sizes.lane_code_bits, sizes.lane_code_bits - 2
        values, carries = [], []
        for lane in range(b.lanes):
            code = self.code[lane * width:(lane + 1) * width]
            index, nonzero, negative = code[:index_bits], code[index_bits], code[index_bits + 1]
            value = Signal(signed(sizes.operand.bits), name=f"value{lane}")
            # -x = ~x + 1; the ones are added together
            m.d.comb += value.eq((self.groups[lane][index].as_unsigned() ^ negative.replicate(sizes.operand.bits))
                                 & nonzero.replicate(sizes.operand.bits))
            values.append(value)
            carries.append(nonzero & negative)
        partial = Signal(signed(sizes.operand.bits + (b.lanes - 1).bit_length() + 1), reset_less=True)
        total = Signal(signed(sizes.exact_intermediate.bits), reset_less=True)
        exact = Signal.like(total)
        m.d.comb += exact.eq(Mux(self.first, 0, total) + partial)
        clamped, over = saturate(m, exact, sizes.intermediate.bits, name="ir")
        with m.If(self.advance):
            m.d.sync += partial.eq(tree_sum(values) + tree_sum(carries))
            with m.If(self.add):
                m.d.sync += total.eq(exact)
                with m.If(self.last):
                    m.d.sync += [self.ir.eq(clamped), self.saturated.eq(over)]
        return m


class SeriesStage(wiring.Component):
    """Coefficient stage for coefficients as N:M series (ports: `hw.basis.stage.stage_members`).

    Lane l works on group ``l // N`` of the word, as the slots of the structured array do; a lane whose group the word
    does not have works on group 0 and must hold no coefficient.

    Latency: `latency` cycles from the pixel's last word to ``o``. Throughput: one word per cycle while ``o`` is taken.
    Parameters: config (spec.config.Config).
    """

    latency = 3

    def __init__(self, *, config):
        self._config = config
        super().__init__(stage_members(config))

    def elaborate(self, platform):
        m = Module()
        config, b, sizes = self._config, self._config.basis, Sizes(self._config)
        rows, beats = b.coefficient_rows, sizes.series_tile_beats
        m.submodules.tiles = tiles = TileMemory(rows=2 * rows, beats=beats, bits=config.bus.data_bits)

        # -- loading: tile after tile -----------------------------------------------------------------------------
        half, row, beat = Signal(), Signal(range(rows)), Signal(range(max(beats, 2)))
        m.d.comb += [self.load.ready.eq(1), self.loaded.eq(1), tiles.write_en.eq(self.load.valid),
                     tiles.write_row.eq(Cat(row, half)), tiles.write_beat.eq(beat),
                     tiles.write_data.eq(self.load.payload)]
        with m.If(self.load.valid):
            m.d.sync += beat.eq(beat + 1)
            with m.If(beat == beats - 1):
                m.d.sync += [beat.eq(0), row.eq(row + 1)]
        with m.If(self.load_start):
            m.d.sync += [half.eq(self.load_half), row.eq(0), beat.eq(0)]

        # -- three stages that move together ------------------------------------------------------------------------
        advance = Signal()
        valid1, valid2 = Signal(), Signal()
        last1, last2, first2 = Signal(), Signal(), Signal(init=1)
        n_log2 = Signal(3)
        word = Signal.like(self.i.payload.word.as_value(), reset_less=True)
        m.d.comb += [advance.eq(~self.o.valid | self.o.ready), self.i.ready.eq(advance),
                     tiles.read_en.eq(self.i.valid & advance),
                     tiles.read_row.eq(Cat(self.i.payload.row, self.i.payload.half))]
        with m.If(advance):
            m.d.sync += [valid1.eq(self.i.valid), valid2.eq(valid1), last2.eq(last1),
                         self.o.valid.eq(valid2 & last2)]
            with m.If(self.i.valid):
                m.d.sync += [word.eq(self.i.payload.word), n_log2.eq(self.i.payload.n_log2),
                             last1.eq(self.i.payload.last)]
            with m.If(valid2):
                m.d.sync += first2.eq(last2)

        # -- lanes: the same groups for all slices ------------------------------------------------------------------
        operand = sizes.operand.bits * b.group
        lanes = []
        for lane in range(b.lanes):
            chosen = Signal(operand, name=f"lane{lane}")
            with m.Switch(n_log2):
                for log2 in range(b.group.bit_length()):
                    group = lane >> log2
                    if group < b.stream_groups:
                        with m.Case(log2):
                            m.d.comb += chosen.eq(word.word_select(group, operand))
                with m.Default():
                    m.d.comb += chosen.eq(word[:operand])
            lanes.append(chosen)
        bits = b.lanes * sizes.lane_code_bits
        saturated = []
        for n in range(sizes.basis_slices):
            part = place(m, f"slice{n}", module="summand_series_slice", factory=lambda: SeriesSlice(config=config),
                         members=SeriesSlice.members(config), platform=platform)
            m.d.comb += [
                part.groups.as_value().eq(Cat(*lanes)), part.code.eq(tiles.read_data[n * bits:(n + 1) * bits]),
                part.advance.eq(advance), part.add.eq(valid2), part.first.eq(first2), part.last.eq(last2),
                self.o.payload.ir[n].eq(part.ir)]
            saturated.append(part.saturated)
        m.d.comb += [self.o.payload.saturated.eq(tree_sum(saturated)),
                     self.busy.eq(valid1 | valid2 | self.o.valid | ~first2)]
        return m
