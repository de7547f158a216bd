"""The second stage: blocks of multipliers with stationary taps, and who tells them what to do."""
from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.accumulators import update_layout
from hw.basis.block import BasisBlock, direct_width
from hw.basis.job import job_layout, kernel_rows_of, lowest, to_log2
from hw.basis.stage import intermediate_layout
from hw.basis.tiles import TileMemory
from hw.share import place
from spec.derive import Sizes
from spec.isa import MAX_KERNEL_ROWS, Mode


class BasisMultiply(wiring.Component):
    """Runs the micro-steps of a pass: for each input row, output column, kernel row and chunk of taps one cycle.

    Values are pushed into the blocks' windows ahead of their use, up to the window's size, also those of the next row;
    zeros follow a row's last value. So a row costs no cycle beyond its micro-steps as long as the values come in time
    and the window has room for those of the next row's first output: ``window - span + 1 >= reach``. Only rows of one
    output cost a cycle more, so that no two sums of one address follow each other at once. A pass waits for a token of
    the store unit, if it wants one, before its first micro-step, and gives its tokens as its last sum is in the
    accumulators.

    Latency: `latency` cycles from a micro-step to its sum in the accumulators; between passes `reach` cycles (the
    pushes of the first output) pass without a micro-step, 1 for POINTWISE. Throughput: one micro-step per cycle,
    slices x q products of each block.
    Parameters: config (spec.config.Config).
    """

    #: The block's, and one to write the accumulator.
    latency = BasisBlock.latency + 1

    def __init__(self, *, config):
        b, sizes = config.basis, Sizes(config)
        self._config = config
        super().__init__({
            "i": In(stream.Signature(job_layout(config))),
            "intermediate": In(stream.Signature(intermediate_layout(config))),
            "direct": In(stream.Signature(data.ArrayLayout(signed(sizes.operand.bits), direct_width(config)))),
            "available_store": In(1), "take_store": Out(1), "push_load": Out(1), "push_store": Out(1),
            "tap_en": In(1), "tap_row": In(range(2 * b.tap_rows)), "tap_beat": In(range(max(sizes.tap_row_beats, 2))),
            "tap_data": In(config.bus.data_bits),
            "update": Out(update_layout(config)),
            "issue": Out(1), "wait_store": Out(1), "working": Out(1), "done": Out(1), "done_half": Out(1),
            "saturated": Out(range(sizes.basis_slices + 1)), "busy": Out(1), "stop": In(1)})

    def elaborate(self, platform):
        m = Module()
        config, b, sizes = self._config, self._config.basis, Sizes(self._config)
        job = Signal(job_layout(config))
        x = job.execute
        active = Signal()
        dense, pointwise = x.mode == Mode.DENSE, x.mode == Mode.POINTWISE

        # -- rows: the next one is judged while this one is at work ---------------------------------------------------
        row = Signal(signed(14))
        fresh = Signal()                        # no row has begun yet
        following = Signal(signed(14))
        m.d.comb += following.eq(row + 1)
        next_mask, next_outputs = kernel_rows_of(m, job, following, name="next")
        mask = Signal(MAX_KERNEL_ROWS)
        outputs = Signal(data.ArrayLayout(12, MAX_KERNEL_ROWS))
        left = Signal(MAX_KERNEL_ROWS)          # kernel rows of this output still to come, this one included

        # -- within a row -------------------------------------------------------------------------------------------
        col = Signal(12)                        # output column
        chunk = Signal(8)
        #: Pushes beyond what the output at hand needs; below 0 some are missing.
        ahead = Signal(range(-(1 << 7), b.window + 1))
        now = Signal(MAX_KERNEL_ROWS)
        r = Signal(range(MAX_KERNEL_ROWS))
        m.d.comb += [now.eq(lowest(left)), r.eq(to_log2(now, 3))]
        in_row = Signal()                       # a row is at work
        hold = Signal()                         # a row of one output has just ended: its sum is not yet written
        step = Signal()                         # a micro-step in this cycle
        last_chunk, last_kernel_row, output_done, row_done = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            step.eq(active & in_row & (ahead >= 0) & ~hold & ~self.stop),
            last_chunk.eq(chunk + 1 == Mux(pointwise, x.groups, job.chunks)),
            last_kernel_row.eq(left == now),
            output_done.eq(step & last_chunk & last_kernel_row),
            row_done.eq(output_done & (col + 1 == x.out_cols))]
        pass_done = Signal()
        m.d.comb += pass_done.eq(active & ~self.stop & ~fresh & (following == x.in_rows) & (row_done | ~in_row))
        advance_row = Signal()
        m.d.comb += advance_row.eq(active & ~self.stop & (fresh | row_done | ~in_row) & ~pass_done)
        m.d.sync += hold.eq(row_done & (x.out_cols == 1))

        # -- pushes: those of the next row may come while this one is at work, as far as the window reaches -----------
        spare = Signal(range(b.window + 1))     # pushes that may run ahead
        row_pushes = Signal(14)                 # pushes of a row, zeros behind its last value included
        pushed = Signal(14)                     # those of the row that is being pushed
        early = Signal()                        # that row is the next one
        live = Signal(range(b.window + 1))      # window positions that do not lie in rows before this one
        begins = Signal()                       # a push would be the first of a row
        wanted, zero, offered, push = Signal(), Signal(), Signal(), Signal()
        decomposed = x.mode == Mode.DECOMPOSED
        m.d.comb += [
            spare.eq(Mux(pointwise, 0, b.window - job.span)),
            row_pushes.eq(((x.out_cols - 1) << x.stride_cols_log2) + job.reach),
            begins.eq(~in_row | Mux(pointwise, row_done, pushed == row_pushes)),
            wanted.eq((in_row & active & ~self.stop | advance_row)
                      & (~begins | (next_mask != 0) & (following != x.in_rows) & ~early)
                      & (~in_row | (ahead < spare) | Mux(pointwise, step, output_done))),
            zero.eq(~begins & ~pointwise & (pushed >= job.streamed)),
            offered.eq(Mux(decomposed, self.intermediate.valid, self.direct.valid)),
            push.eq(wanted & (zero | offered)),
            self.intermediate.ready.eq(push & ~zero & decomposed),
            self.direct.ready.eq(push & ~zero & ~decomposed)]
        with m.If(self.intermediate.valid & self.intermediate.ready):
            m.d.comb += self.saturated.eq(self.intermediate.payload.saturated)

        consumed = Signal(8)                    # pushes that the next output needs beyond those of this one
        with m.If(row_done | ~in_row):
            m.d.comb += consumed.eq(job.reach)
        with m.Elif(Mux(pointwise, step, output_done)):
            m.d.comb += consumed.eq(Mux(pointwise, 1, 1 << x.stride_cols_log2))
        with m.If(in_row | advance_row):
            m.d.sync += ahead.eq(Mux(in_row, ahead, 0) + push - consumed)
        with m.If(push):
            m.d.sync += [pushed.eq(Mux(begins, 1, pushed + 1)), live.eq(Mux(live == b.window, live, live + 1)),
                         early.eq(early | begins)]
        with m.If(step):
            m.d.sync += chunk.eq(chunk + 1)
            with m.If(last_chunk):
                m.d.sync += [chunk.eq(0), left.eq(left & ~now)]
            with m.If(output_done):
                m.d.sync += [left.eq(mask), col.eq(col + 1)]
        with m.If(advance_row):
            m.d.sync += [row.eq(following), fresh.eq(0), in_row.eq(next_mask != 0), mask.eq(next_mask),
                         left.eq(next_mask), col.eq(0), chunk.eq(0), early.eq(0)]
            m.d.sync += [outputs[k].eq(next_outputs[k]) for k in range(MAX_KERNEL_ROWS)]
            with m.If(~early):
                m.d.sync += [pushed.eq(push), live.eq(push)]
            with m.Else():
                m.d.sync += live.eq(Mux(pushed + push > b.window, b.window, pushed + push))

        # -- passes ---------------------------------------------------------------------------------------------------
        waiting = Signal()                      # a pass that wants a token of the store unit
        m.d.comb += [waiting.eq(self.i.valid & self.i.payload.execute.wait_store & ~self.available_store),
                     self.i.ready.eq((~active | pass_done) & ~waiting & ~self.stop),
                     self.take_store.eq(self.i.valid & self.i.ready & self.i.payload.execute.wait_store)]
        with m.If(pass_done):
            m.d.sync += [active.eq(0), in_row.eq(0)]
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += [job.eq(self.i.payload), active.eq(1), fresh.eq(1), row.eq(-1), in_row.eq(0)]
        m.d.comb += [self.done.eq(pass_done), self.done_half.eq(job.tap_half)]

        # -- what a micro-step does: taps and positions now, accumulator address with the sum -------------------------
        m.submodules.taps = taps = TileMemory(rows=2 * b.tap_rows, beats=sizes.tap_row_beats,
                                              bits=config.bus.data_bits)
        tap_row = Signal(8)
        m.d.comb += [
            tap_row.eq(Mux(pointwise, chunk, r * job.chunks + chunk)),
            taps.read_en.eq(step), taps.read_row.eq(tap_row[:b.tap_rows.bit_length() - 1]
                                                    | job.tap_half << b.tap_rows.bit_length() - 1),
            taps.write_en.eq(self.tap_en), taps.write_row.eq(self.tap_row), taps.write_beat.eq(self.tap_beat),
            taps.write_data.eq(self.tap_data)]
        positions = []
        for i in range(b.multipliers):
            # tap s = chunk * q + i multiplies the value (kernel_cols - 1 - s) * dilation pushes ago; beyond: tap 0
            back = Signal(signed(9), name=f"back{i}")
            position = Signal(7, name=f"position{i}")
            inside = Signal(name=f"inside{i}")
            m.d.comb += back.eq(x.kernel_cols - 1 - i - chunk[:4] * b.multipliers)
            with m.If(pointwise):
                m.d.comb += [position.eq(i), inside.eq(1)]
            with m.Elif(back >= 0):
                m.d.comb += [position.eq(back[:4] * x.dilation_cols + ahead), inside.eq(position < live)]
            positions.append((position, inside))

        about = data.StructLayout({
            "valid": 1, "keep": 1, "add": 1, "out_row": 12, "col": 12, "cols": 12, "init": 1, "bank": 1,
            "operation": 2})
        at = Signal(about)
        output = Signal(12)
        with m.Switch(r):
            for k in range(MAX_KERNEL_ROWS):
                with m.Case(k):
                    m.d.comb += output.eq(outputs[k])
        m.d.comb += [
            at.valid.eq(step), at.keep.eq(chunk != 0), at.add.eq(last_chunk), at.out_row.eq(output), at.col.eq(col),
            at.cols.eq(x.out_cols), at.bank.eq(x.bank), at.operation.eq(x.operation),
            at.init.eq(~x.accumulate & ((r == 0) | (row < x.dilation_rows)))]
        stage1, stage2, stage3 = Signal(about), Signal(about), Signal(about)
        address = Signal(range(sizes.accumulator_depth))
        m.d.sync += [stage1.eq(at), stage2.eq(stage1), stage3.eq(stage2),
                     address.eq(stage1.out_row * stage1.cols + stage1.col)]
        m.d.comb += [
            self.update.fetch.eq(stage2.valid & stage2.add), self.update.bank.eq(stage2.bank),
            self.update.address.eq(address), self.update.init.eq(stage3.init),
            self.update.operation.eq(stage3.operation)]

        # the tokens follow the last sum through the pipeline; a pass ends with its last micro-step or a row without any
        ends = Signal(BasisMultiply.latency)
        loads, stores = Signal(BasisMultiply.latency), Signal(BasisMultiply.latency)
        m.d.sync += [ends.eq(Cat(pass_done, ends)), loads.eq(Cat(pass_done & x.push_load, loads)),
                     stores.eq(Cat(pass_done & x.push_store, stores))]
        m.d.comb += [self.push_load.eq(loads[-1]), self.push_store.eq(stores[-1])]

        # -- blocks ---------------------------------------------------------------------------------------------------
        each = b.slices * b.multipliers
        for n in range(b.blocks):
            block = place(m, f"block{n}", module="summand_basis_block", factory=lambda: BasisBlock(config=config),
                          members=BasisBlock.members(config), platform=platform)
            for s in range(b.slices):
                m.d.comb += block.ir[s].eq(Mux(zero, 0, self.intermediate.payload.ir[n * b.slices + s]))
            for c in range(direct_width(config)):
                m.d.comb += block.direct[c].eq(Mux(zero, 0, self.direct.payload[c]))
            m.d.comb += [
                block.push.eq(push), block.dense.eq(dense),
                block.pointwise.eq(pointwise),
                block.taps.as_value().eq(taps.read_data[8 * each * n:8 * each * (n + 1)]),
                block.keep.eq(stage3.keep), block.add.eq(stage3.valid), self.update.sums[n].eq(block.sum)]
            for i, (position, inside) in enumerate(positions):
                m.d.comb += [block.position[i].eq(position), block.enable[i].eq(inside)]
        m.d.comb += [
            self.issue.eq(step), self.wait_store.eq(~active & waiting), self.working.eq(active),
            self.busy.eq(self.i.valid | active | stage1.valid | stage2.valid | stage3.valid | ends.any())]
        return m
