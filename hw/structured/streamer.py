"""Address generation: streams every pixel of an output tile past the array, once per step."""
from amaranth.hdl import Array, Cat, Const, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.layouts import error_layout
from hw.structured.weight_loader import step_layout
from spec.derive import Sizes
from spec.registers import Error


def pixel_layout(config):
    """What travels with a pixel through the array to the accumulators."""
    return data.StructLayout({
        "bank": 1, "address": range(config.structured.accumulator_depth), "init": 1, "operation": 2,
        "last": 1, "push_load": 1, "push_store": 1})


class Streamer(wiring.Component):
    """For each step, for each output row and column: fetch ``base + row*row_step + col*col_step + offset[segment]``.

    A fetch has up to ``taps`` segments of L consecutive blocks, each at its own address; bank b of the scratchpad
    serves the segment whose address agrees with b above the lowest log2(L) bits. Misaligned, out-of-range or
    conflicting segments are an error (STREAM_ADDRESS).

    Flow control: ``i`` is taken in the cycle in which the step's first pixel is issued or, back to back, in which the
    last pixel of the step before is; nothing downstream can stall. Steps follow one another without a lost cycle
    (a step of a single pixel takes two, so that its accumulator is never read before it is written).
    Latency: `latency` cycles from issue to the stream word. Throughput: one pixel per cycle.
    Parameters: config (spec.config.Config).
    """

    #: Cycles from issue to the word on ``stream`` (address, scratchpad).
    latency = 2

    def __init__(self, *, config):
        s, sizes = config.structured, Sizes(config)
        self._config = config
        rows = sizes.activation_blocks // sizes.banks
        super().__init__({
            "i": In(stream.Signature(step_layout(config))),
            "read_en": Out(1), "read_row": Out(data.ArrayLayout(range(rows), sizes.banks)),
            "read_data": In(data.ArrayLayout(8 * s.block, sizes.banks)),
            "stream": Out(data.ArrayLayout(8 * s.block, sizes.stream_blocks)),
            "valid": Out(1), "swap": Out(1), "n_log2": Out(3), "pixel": Out(pixel_layout(config)),
            "issue": Out(1), "busy": Out(1), "error": Out(error_layout())})

    def elaborate(self, platform):
        m = Module()
        config, s, sizes = self._config, self._config.structured, Sizes(self._config)
        taps, banks = s.taps, sizes.banks
        banks_log2 = banks.bit_length() - 1

        # -- stage 0: pixel counters ------------------------------------------------------------------------------
        active, bubble = Signal(), Signal()
        step = Signal(step_layout(config))
        address, row_address = Signal(17), Signal(17)
        row, col = Signal(12), Signal(12)
        index = Signal(range(s.accumulator_depth))
        fresh = Signal()                    # the step's first pixel
        x = step.execute
        last_col, last_row = Signal(), Signal()
        m.d.comb += [last_col.eq(col == x.cols - 1), last_row.eq(row == x.rows - 1), self.issue.eq(active & ~bubble)]
        ending = Signal()
        single = Signal()
        m.d.comb += [single.eq((x.cols == 1) & (x.rows == 1)),
                     ending.eq(active & last_col & last_row & (bubble | ~single)),
                     self.i.ready.eq(~self.error.valid & (~active | ending))]
        with m.If(active):
            m.d.sync += fresh.eq(0)
            m.d.sync += bubble.eq(single & ~bubble)
            with m.If(~single):
                m.d.sync += [index.eq(index + 1), col.eq(col + 1), address.eq(address + x.col_step)]
                with m.If(last_col):
                    m.d.sync += [col.eq(0), row.eq(row + 1), row_address.eq(row_address + x.row_step),
                                 address.eq(row_address + x.row_step)]
            with m.If(ending):
                m.d.sync += active.eq(0)
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += [step.eq(self.i.payload), active.eq(1), bubble.eq(0), fresh.eq(1), row.eq(0), col.eq(0),
                         index.eq(0), address.eq(self.i.payload.execute.base),
                         row_address.eq(self.i.payload.execute.base)]

        # -- stage 1: segment addresses ---------------------------------------------------------------------------
        valid1, swap1 = Signal(), Signal()
        pixel1 = Signal(pixel_layout(config))
        n1, segments1 = Signal(3), Signal(2)
        segment = [Signal(18, name=f"segment{j}", reset_less=True) for j in range(taps)]
        enable = Signal(taps)
        end = last_col & last_row
        m.d.sync += [
            valid1.eq(self.issue), swap1.eq(fresh & ~step.entry.hold & self.issue),
            n1.eq(step.entry.n_log2), segments1.eq(step.entry.segments_log2),
            pixel1.bank.eq(x.bank), pixel1.address.eq(index), pixel1.operation.eq(x.operation),
            pixel1.init.eq(step.first & ~x.accumulate),
            pixel1.last.eq(step.last & end),
            pixel1.push_load.eq(x.push_load), pixel1.push_store.eq(x.push_store)]
        for j in range(taps):
            m.d.sync += [segment[j].eq(address + step.entry.offset[j]),
                         enable[j].eq(step.entry.enable[j] & (j < (Const(1) << step.entry.segments_log2)))]

        # L, the blocks per segment, as a mask of the address bits inside a segment
        inside = Signal(max(banks_log2, 1))     # Verilog has no signal without bits
        with m.Switch(Cat(n1, segments1)):
            for p in s.patterns:
                blocks = sizes.fetch_blocks(p.n)
                for log2 in range(min(blocks, taps).bit_length()):
                    with m.Case(p.n.bit_length() - 1 | log2 << 3):
                        m.d.comb += inside.eq((blocks >> log2) - 1)
        bad = Signal()
        for j in range(taps):
            with m.If(enable[j] & ((segment[j] >= sizes.activation_blocks) | (segment[j] & inside).any())):
                m.d.comb += bad.eq(1)
            for k in range(j):
                with m.If(enable[j] & enable[k] & (((segment[j] ^ segment[k])[:banks_log2] & ~inside) == 0)):
                    m.d.comb += bad.eq(1)
        error = Signal(error_layout())
        m.d.comb += self.error.eq(error)
        with m.If(valid1 & bad & ~error.valid):
            m.d.sync += [error.valid.eq(1), error.code.eq(Error.STREAM_ADDRESS)]
        m.d.comb += self.read_en.eq(valid1)
        for b in range(banks):
            # the lowest segment is the default owner; a bank nobody owns reads a row that nobody looks at
            m.d.comb += self.read_row[b].eq(segment[0][banks_log2:])
            for j in range(1, taps):
                with m.If(enable[j] & (((segment[j][:banks_log2] ^ b) & ~inside) == 0)):
                    m.d.comb += self.read_row[b].eq(segment[j][banks_log2:])

        # -- stage 2: banks to positions ----------------------------------------------------------------------------
        start = [Signal(max(banks_log2, 1), name=f"start{j}", reset_less=True) for j in range(taps)]
        n2, segments2 = Signal(3), Signal(2)
        m.d.sync += [
            self.valid.eq(valid1), self.swap.eq(swap1), self.pixel.eq(pixel1), n2.eq(n1), segments2.eq(segments1),
            *(start[j].eq(segment[j]) for j in range(taps))]
        m.d.comb += self.n_log2.eq(n2)
        for position in range(sizes.stream_blocks):
            with m.Switch(Cat(n2, segments2)):
                for p in s.patterns:
                    blocks = sizes.fetch_blocks(p.n)
                    for log2 in range(min(blocks, taps).bit_length()):
                        length = blocks >> log2
                        if position >= blocks:
                            continue
                        with m.Case(p.n.bit_length() - 1 | log2 << 3):
                            # aligned segments: only the address bits above L choose among the banks that agree below
                            fixed = position % length
                            candidates = Array(self.read_data[b] for b in range(fixed, banks, length))
                            upper = start[position // length][length.bit_length() - 1:]
                            chosen = candidates[upper] if len(candidates) > 1 else candidates[0]
                            m.d.comb += self.stream[position].eq(chosen)
        m.d.comb += self.busy.eq(active | valid1 | self.valid)
        return m
