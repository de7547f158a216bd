"""Takes EXECUTE_BASIS instructions, checks them, and brings their taps and coefficients on chip."""
from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from hw.basis.job import job_layout
from hw.layouts import error_layout, instruction_layout
from spec.derive import Sizes, ceil_div
from spec.isa import Mode, Opcode
from spec.registers import Error


class BasisLoader(wiring.Component):
    """For each EXECUTE_BASIS: check, load taps, load coefficients, offer the job.

    Taps and coefficients have two halves each. A job that loads some fills the half that the job before did not use,
    while that one still works, as soon as nobody reads it any more: ``tap_use`` and ``coefficient_use`` say for each
    half whether a job that has been offered still needs it. A job that loads none uses the half of the job before.

    Latency: the offer comes 2 cycles after acceptance, n + 3 later for n beats of taps, and again of coefficients.
    Throughput: one beat per cycle.
    Errors: ILLEGAL_FIELD, SCRATCHPAD_RANGE (weight buffer); nothing is offered after one.
    Parameters: config (spec.config.Config).
    """

    def __init__(self, *, config):
        b, sizes = config.basis, Sizes(config)
        self._config = config
        super().__init__({
            "i": In(stream.Signature(instruction_layout(Opcode.EXECUTE_BASIS))),
            "o": Out(stream.Signature(job_layout(config))),
            "weight_en": Out(1), "weight_address": Out(range(sizes.weight_beats)),
            "weight_data": In(config.bus.data_bits),
            "tap_en": Out(1), "tap_row": Out(range(2 * b.tap_rows)),
            "tap_beat": Out(range(max(sizes.tap_row_beats, 2))),
            "load_start": Out(1), "load_half": Out(1), "load_groups": Out(8), "load_beats": Out(16),
            "load": Out(stream.Signature(config.bus.data_bits)), "loaded": In(1),
            "tap_use": In(2), "coefficient_use": In(2), "stop": In(1),
            "busy": Out(1), "error": Out(error_layout())})

    def elaborate(self, platform):
        m = Module()
        b, sizes = self._config.basis, Sizes(self._config)
        job = Signal(job_layout(self._config))
        x = job.execute
        error = Signal(error_layout())
        m.d.comb += [self.error.eq(error), self.o.payload.eq(job)]

        # -- geometry, spread over two cycles -----------------------------------------------------------------------
        span, chunks = Signal(7), Signal(4)
        rows, words = Signal(9), Signal(12)
        pushes = Signal(17)
        pointwise, decomposed = Signal(), Signal()
        m.d.comb += [
            pointwise.eq(x.mode == Mode.POINTWISE), decomposed.eq(x.mode == Mode.DECOMPOSED),
            span.eq((x.kernel_cols - 1) * x.dilation_cols + 1)]
        with m.Switch(x.kernel_cols):
            for n in range(16):
                with m.Case(n):
                    m.d.comb += chunks.eq(ceil_div(n, b.multipliers))
        m.d.comb += [rows.eq(Mux(pointwise, x.groups, x.kernel_rows * chunks)),
                     pushes.eq(((x.out_cols - 1) << x.stride_cols_log2) + span - x.pad_left)]
        legal = Signal()
        bad = [span > b.window, rows > b.tap_rows, x.taps > b.tap_rows, x.pad_left >= span,
               x.pad_top > (x.kernel_rows - 1) * x.dilation_rows]
        group_log2 = b.group.bit_length() - 1
        if b.coefficients == "series":
            counts = []
            for t in range(len(x.n_log2)):
                count = Signal(9, name=f"words{t}")
                with m.Switch(x.n_log2[t]):
                    for log2 in range(group_log2 + 1):
                        with m.Case(log2):
                            shift = sizes.series_fetch(1 << log2).bit_length() - 1
                            m.d.comb += count.eq((x.groups + (1 << shift) - 1) >> shift)
                counts.append(Mux(t < x.terms, count, 0))
                bad.append(decomposed & (t < x.terms) & (x.n_log2[t] > group_log2))
            m.d.comb += words.eq(sum(counts))
            bad.append((x.coefficients != 0) & (x.coefficients != words * sizes.series_tile_beats))
        else:
            shift = b.stream_groups.bit_length() - 1
            m.d.comb += words.eq((x.groups + (1 << shift) - 1) >> shift)
        bad.append(decomposed & (words > b.coefficient_rows))
        if sizes.coefficient_groups < 255:
            bad.append(decomposed & (x.groups > sizes.coefficient_groups))
        bad.append(pointwise & ((x.kernel_rows != 1) | (x.kernel_cols != 1) | (x.pad_top != 0) | (x.pad_left != 0)
                                | (x.stride_rows_log2 != 0) | (x.stride_cols_log2 != 0) | (x.out_rows != x.in_rows)
                                | (x.out_cols != x.in_cols)))
        m.d.comb += legal.eq(~_any(bad))
        end = Signal(20)
        m.d.comb += end.eq(x.weight + x.taps * sizes.tap_row_beats + x.coefficients)

        # -- beats: the buffer's output register holds a beat until it is taken ---------------------------------------
        weight = Signal(17)
        left = Signal(17)           # beats still to be read
        pending = Signal()          # a beat stands at the buffer's output
        taken = Signal()
        taps = Signal()             # what is being loaded
        row, beat = Signal(range(b.tap_rows)), Signal(range(max(sizes.tap_row_beats, 2)))
        m.d.comb += [
            self.weight_address.eq(weight), self.weight_en.eq((left != 0) & (~pending | taken)),
            taken.eq(pending & (taps | self.load.ready)), self.load.valid.eq(pending & ~taps),
            self.load.payload.eq(self.weight_data), self.tap_en.eq(pending & taps), self.tap_beat.eq(beat)]
        m.d.comb += self.tap_row.eq(row | job.tap_half << b.tap_rows.bit_length() - 1)
        with m.If(self.weight_en):
            m.d.sync += [weight.eq(weight + 1), left.eq(left - 1)]
        m.d.sync += pending.eq(self.weight_en | pending & ~taken)
        with m.If(self.tap_en):
            m.d.sync += beat.eq(beat + 1)
            with m.If(beat == sizes.tap_row_beats - 1):
                m.d.sync += [beat.eq(0), row.eq(row + 1)]

        m.d.comb += [self.load_half.eq(job.coefficient_half), self.load_groups.eq(x.groups),
                     self.load_beats.eq(x.coefficients)]
        with m.FSM() as fsm:
            with m.State("IDLE"):
                m.d.comb += self.i.ready.eq(~error.valid & ~self.stop)
                with m.If(self.i.valid & self.i.ready):
                    m.d.sync += x.eq(self.i.payload)
                    m.next = "CHECK"
            with m.State("CHECK"):
                m.d.sync += [
                    job.chunks.eq(chunks), job.span.eq(span), job.reach.eq(span - x.pad_left),
                    weight.eq(x.weight), taps.eq(0),
                    job.streamed.eq(Mux(pointwise | (x.in_cols < pushes), x.in_cols, pushes)),
                    job.tap_half.eq(job.tap_half ^ (x.taps != 0)),
                    job.coefficient_half.eq(job.coefficient_half ^ (x.coefficients != 0))]
                with m.If(~legal):
                    m.d.sync += [error.valid.eq(1), error.code.eq(Error.ILLEGAL_FIELD)]
                    m.next = "STOP"
                with m.Elif(((x.taps != 0) | (x.coefficients != 0)) & (end > sizes.weight_beats)):
                    m.d.sync += [error.valid.eq(1), error.code.eq(Error.SCRATCHPAD_RANGE)]
                    m.next = "STOP"
                with m.Elif(x.taps != 0):
                    m.next = "TAPS"
                with m.Elif(x.coefficients != 0):
                    m.next = "COEFFICIENTS"
                with m.Else():
                    m.next = "OFFER"
            with m.State("TAPS"):
                with m.If(~self.tap_use.bit_select(job.tap_half, 1)):
                    m.d.sync += [left.eq(x.taps * sizes.tap_row_beats), taps.eq(1), row.eq(0), beat.eq(0)]
                    m.next = "TAP_BEATS"
            with m.State("TAP_BEATS"):
                with m.If((left == 0) & ~pending):
                    m.d.sync += taps.eq(0)
                    m.next = "OFFER"
                    with m.If(x.coefficients != 0):
                        m.next = "COEFFICIENTS"
            with m.State("COEFFICIENTS"):
                with m.If(~self.coefficient_use.bit_select(job.coefficient_half, 1)):
                    m.d.comb += self.load_start.eq(1)
                    m.d.sync += left.eq(x.coefficients)
                    m.next = "COEFFICIENT_BEATS"
            with m.State("COEFFICIENT_BEATS"):
                with m.If((left == 0) & ~pending & self.loaded):
                    m.next = "OFFER"
            with m.State("OFFER"):
                m.d.comb += self.o.valid.eq(~self.stop)
                with m.If(self.o.ready & ~self.stop):
                    m.next = "IDLE"
            with m.State("STOP"):
                pass
        m.d.comb += self.busy.eq(~fsm.ongoing("IDLE"))
        return m


def _any(conditions):
    out = conditions[0]
    for c in conditions[1:]:
        out = out | c
    return out
