"""Streams the input pixels of a pass: to the coefficient stage, or past it to the multipliers."""
from amaranth.hdl import Array, Cat, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.basis.block import direct_width
from hw.basis.job import job_layout, kernel_rows_of
from hw.basis.stage import word_layout
from hw.layouts import error_layout
from spec.derive import Sizes
from spec.isa import Mode
from spec.registers import Error


class BasisStreamer(wiring.Component):
    """For each input row that a kernel row needs, for each of its ``streamed`` pixels: its stream words.

    A word is ``stream_groups`` channel groups from any group on. Words of DECOMPOSED passes go to ``words``, in the
    order of the series' terms; DENSE passes send ``slices`` channels of one group to ``direct``, POINTWISE passes one
    group after the other. The zero point is subtracted on the way.

    Flow control: three registers that move together while the last one is empty or taken.
    Latency: `latency` cycles from the issue of a word to the word; 1 cycle for each row that is not needed, none
    between passes. Throughput: one word per cycle (POINTWISE: one group).
    Errors: STREAM_ADDRESS (beyond the scratchpad, or not at a unit); the streamer then stops.
    Parameters: config (spec.config.Config).
    """

    latency = 2

    def __init__(self, *, config):
        sizes = Sizes(config)
        self._config = config
        rows = sizes.activation_blocks // sizes.banks
        super().__init__({
            "i": In(stream.Signature(job_layout(config))),
            "read_en": Out(1), "read_row": Out(data.ArrayLayout(range(rows), sizes.banks)),
            "read_data": In(data.ArrayLayout(8 * sizes.block, sizes.banks)),
            "words": Out(stream.Signature(word_layout(config))),
            "direct": Out(stream.Signature(data.ArrayLayout(signed(sizes.operand.bits), direct_width(config)))),
            "coefficient_use": Out(2), "busy": Out(1), "error": Out(error_layout())})

    def elaborate(self, platform):
        m = Module()
        config, b, sizes = self._config, self._config.basis, Sizes(self._config)
        job = Signal(job_layout(config))
        x = job.execute
        error = Signal(error_layout())
        m.d.comb += self.error.eq(error)
        advance = Signal()

        # -- counters: row, column, term, word ----------------------------------------------------------------------
        active = Signal()
        row, col = Signal(12), Signal(12)
        term = Signal(2)
        group = Signal(9)               # first channel group of the word
        number = Signal(range(b.coefficient_rows))
        row_address, address = Signal(28), Signal(29)
        mask, _ = kernel_rows_of(m, job, row, name="row")
        issue = Signal()
        m.d.comb += issue.eq(active & (mask != 0) & ~error.valid)

        decomposed, dense = x.mode == Mode.DECOMPOSED, x.mode == Mode.DENSE
        fetch = Signal(range(b.stream_groups + 1))
        n_log2 = Signal(3)
        m.d.comb += [n_log2.eq(Array(x.n_log2)[term]), fetch.eq(b.stream_groups)]
        last_term = Signal()
        if b.coefficients == "series":
            with m.If(decomposed):
                m.d.comb += last_term.eq(term + 1 == x.terms)
                with m.Switch(n_log2):
                    for log2 in range(b.group.bit_length()):
                        with m.Case(log2):
                            m.d.comb += fetch.eq(sizes.series_fetch(1 << log2))
            with m.Else():
                m.d.comb += last_term.eq(1)
        else:
            m.d.comb += last_term.eq(1)
        last_word, last_col, last_row = Signal(), Signal(), Signal()
        m.d.comb += [last_word.eq((group + fetch >= x.groups) | dense), last_col.eq(col + 1 == job.streamed),
                     last_row.eq(row + 1 == x.in_rows)]
        next_row = Signal()
        m.d.comb += [next_row.eq(active & advance & ~error.valid
                                 & ((mask == 0) | issue & last_word & last_term & last_col)),
                     self.i.ready.eq(~error.valid & (~active | next_row & last_row))]
        with m.If(advance & issue):
            m.d.sync += [group.eq(group + fetch), number.eq(number + 1)]
            with m.If(last_word):
                m.d.sync += [group.eq(0), term.eq(term + 1)]
                with m.If(last_term):
                    m.d.sync += [term.eq(0), number.eq(0), col.eq(col + 1), address.eq(address + x.col_step)]
        with m.If(next_row):
            m.d.sync += [row.eq(row + 1), col.eq(0), row_address.eq(row_address + x.row_step),
                         address.eq(row_address + x.row_step)]
            with m.If(last_row):
                m.d.sync += active.eq(0)
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += [job.eq(self.i.payload), active.eq(1), row.eq(0), col.eq(0), term.eq(0), group.eq(0),
                         number.eq(0), row_address.eq(self.i.payload.execute.base),
                         address.eq(self.i.payload.execute.base)]

        # -- address: which bank reads which row --------------------------------------------------------------------
        per_group = sizes.group_blocks.bit_length() - 1
        bank_groups = sizes.banks // sizes.group_blocks
        bank_log2 = bank_groups.bit_length() - 1
        place = Signal(30)              # channel group in the scratchpad
        bad = Signal()
        m.d.comb += place.eq((address >> per_group) + group)
        used = Mux(dense, 1, x.groups)
        m.d.comb += bad.eq(((address >> per_group) + used > sizes.activation_blocks // sizes.group_blocks)
                           | (address[:per_group].any() if per_group else 0))
        with m.If(advance & issue & bad):
            m.d.sync += [error.valid.eq(1), error.code.eq(Error.STREAM_ADDRESS)]
        m.d.comb += self.read_en.eq(advance & issue)
        start = place[:bank_log2]
        for bank in range(sizes.banks):
            within = bank // sizes.group_blocks
            # banks before the word's first group hold groups of the next row
            before = within < start if within + 1 < bank_groups else 0
            m.d.comb += self.read_row[bank].eq((place >> bank_log2) + before)

        # -- the word's description travels with it -----------------------------------------------------------------
        about = data.StructLayout({
            "start": max(bank_log2, 1), "row": range(b.coefficient_rows), "half": 1, "n_log2": 3, "last": 1,
            "zero_point": signed(8), "mode": 2, "channel": 4, "groups": range(b.stream_groups + 1)})
        valid1, about1 = Signal(), Signal(about)
        valid2, about2 = Signal(), Signal(about)
        left = x.groups - group
        with m.If(advance):
            m.d.sync += [
                valid1.eq(issue & ~bad), about1.start.eq(start if bank_log2 else 0), about1.row.eq(number),
                about1.half.eq(job.coefficient_half), about1.n_log2.eq(n_log2),
                about1.last.eq(last_word & last_term), about1.zero_point.eq(x.zero_point), about1.mode.eq(x.mode),
                about1.channel.eq(x.channel), about1.groups.eq(Mux(left < b.stream_groups, left, b.stream_groups)),
                valid2.eq(valid1), about2.eq(about1)]

        # -- rotate to the word's first group, subtract the zero point ------------------------------------------------
        unit_bits = 8 * sizes.columns
        current = [Cat(*(self.read_data[g * sizes.group_blocks + k] for k in range(sizes.group_blocks)))
                   for g in range(bank_groups)]
        for k in range(bank_log2):
            shifted = []
            for g in range(bank_groups):
                level = Signal(unit_bits, name=f"rotate{k}_{g}")
                m.d.comb += level.eq(Mux(about1.start[k], current[(g + (1 << k)) % bank_groups], current[g]))
                shifted.append(level)
            current = shifted
        word = Signal(word_layout(config)["word"].shape, reset_less=True)
        with m.If(advance):
            for g in range(b.stream_groups):
                for c in range(b.group):
                    m.d.sync += word[g * b.group + c].eq(
                        current[g][8 * c:8 * c + 8].as_signed() - about1.zero_point)

        # -- where it goes -------------------------------------------------------------------------------------------
        part = Signal(range(max(b.stream_groups, 2)))   # POINTWISE: group of the word at hand
        to_stage = about2.mode == Mode.DECOMPOSED
        pointwise = about2.mode == Mode.POINTWISE
        last_part = Signal()
        m.d.comb += [
            last_part.eq(~pointwise | (part + 1 == about2.groups)),
            self.words.valid.eq(valid2 & to_stage), self.words.payload.word.eq(word),
            self.words.payload.row.eq(about2.row), self.words.payload.half.eq(about2.half),
            self.words.payload.n_log2.eq(about2.n_log2), self.words.payload.last.eq(about2.last),
            self.direct.valid.eq(valid2 & ~to_stage),
            advance.eq(~valid2 | Mux(to_stage, self.words.ready, self.direct.ready & last_part))]
        with m.If(valid2 & pointwise & self.direct.ready):
            m.d.sync += part.eq(Mux(last_part, 0, part + 1))
        flat = word.as_value()
        bits = sizes.operand.bits
        unit = Signal(bits * b.group)
        m.d.comb += unit.eq(flat.word_select(part, bits * b.group))
        with m.If(pointwise):
            m.d.comb += self.direct.payload.as_value().eq(unit)
        with m.Else():
            with m.Switch(about2.channel):
                for c in range(b.group):
                    with m.Case(c):
                        m.d.comb += self.direct.payload.as_value().eq(flat[bits * c:bits * b.group])

        for half in range(2):
            m.d.comb += self.coefficient_use[half].eq(
                active & decomposed & (job.coefficient_half == half)
                | valid1 & (about1.mode == Mode.DECOMPOSED) & (about1.half == half)
                | valid2 & to_stage & (about2.half == half))
        m.d.comb += self.busy.eq(active | valid1 | valid2)
        return m
