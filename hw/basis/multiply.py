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

    Values are pushed into the blocks' windows until the first output of the row has all it needs, then, during the last
    micro-step of each output, the next one; further pushes of a stride cost a cycle each. Zeros follow the row's last
    value. A pass waits for a token of the store unit, if it wants one, before its first micro-step, and gives its tokens
    as its last sum is in the accumulators.

    Latency: `latency` cycles from a micro-step to its sum in the accumulators; 2 cycles between passes. Throughput: one
    micro-step per cycle, slices x q products of each block.
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

        # -- rows: the next one is judged while this one is at work -----------------------------------------------------
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
        missing = Signal(8)                     # pushes until the window fits the output
        pushed = Signal(12)                     # values of the row taken
        now = Signal(MAX_KERNEL_ROWS)
        r = Signal(range(MAX_KERNEL_ROWS))
        m.d.comb += [now.eq(lowest(left)), r.eq(to_log2(now, 3))]
        in_row = Signal()                       # a row is at work
        step = Signal()                         # a micro-step in this cycle
        last_chunk, last_kernel_row, output_done, row_done = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            step.eq(active & in_row & (missing == 0) & ~self.stop),
            last_chunk.eq(chunk + 1 == Mux(pointwise, x.groups, job.chunks)),
            last_kernel_row.eq(left == now),
            output_done.eq(step & last_chunk & last_kernel_row),
            row_done.eq(output_done & (col + 1 == x.out_cols))]
        pass_done = Signal()
        m.d.comb += pass_done.eq(active & ~self.stop & ~fresh & (following == x.in_rows) & (row_done | ~in_row))
        # a row of a single output: its sum must be in the accumulators before the next row may add to it
        advance_row = Signal()
        m.d.comb += advance_row.eq(active & ~self.stop & (fresh | row_done | ~in_row) & ~pass_done)
        new_row = Signal()
        m.d.comb += new_row.eq(advance_row & (next_mask != 0))

        # -- pushes ---------------------------------------------------------------------------------------------------
        begin = Signal()                        # the push is the first of a row
        wanted = Signal()
        zero = Signal()
        offered = Signal()
        push = Signal()
        m.d.comb += [
            begin.eq(new_row & ~(row_done & (x.out_cols == 1))),
            wanted.eq(begin | active & in_row & ~self.stop
                      & ((missing != 0) | Mux(pointwise, step, output_done & ~row_done) & ~row_done)),
            zero.eq(~begin & ~pointwise & (pushed == job.streamed)),
            offered.eq(Mux(x.mode == Mode.DECOMPOSED, self.intermediate.valid, self.direct.valid)),
            push.eq(wanted & (zero | offered)),
            self.intermediate.ready.eq(push & ~zero & (x.mode == Mode.DECOMPOSED)),
            self.direct.ready.eq(push & ~zero & (x.mode != Mode.DECOMPOSED))]
        with m.If(self.intermediate.valid & self.intermediate.ready):
            m.d.comb += self.saturated.eq(self.intermediate.payload.saturated)
        with m.If(push):
            m.d.sync += [missing.eq(missing - 1), pushed.eq(pushed + ~zero)]
        with m.If(step):
            m.d.sync += chunk.eq(chunk + 1)
            with m.If(pointwise):
                m.d.sync += missing.eq(~push)
            with m.If(last_chunk):
                m.d.sync += [chunk.eq(0), left.eq(left & ~now)]
            with m.If(output_done):
                m.d.sync += [left.eq(mask), col.eq(col + 1)]
                with m.If(~pointwise):
                    m.d.sync += missing.eq((1 << x.stride_cols_log2)[:4] - push)
        with m.If(advance_row):
            m.d.sync += [row.eq(following), fresh.eq(0), in_row.eq(next_mask != 0), mask.eq(next_mask),
                         left.eq(next_mask), col.eq(0), chunk.eq(0), missing.eq(job.reach - push), pushed.eq(push)]
            m.d.sync += [outputs[k].eq(next_outputs[k]) for k in range(MAX_KERNEL_ROWS)]

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

        # -- what a micro-step does: taps and positions now, accumulator address with the sum -----------------------------
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
            position = Signal(range(b.window), name=f"position{i}")
            m.d.comb += back.eq(x.kernel_cols - 1 - i - chunk[:4] * b.multipliers)
            with m.If(pointwise):
                m.d.comb += position.eq(i)
            with m.Elif(back >= 0):
                m.d.comb += position.eq(back[:4] * x.dilation_cols)
            positions.append(position)

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
                block.push.eq(push), block.clear.eq(begin | (pushed == 0)), block.dense.eq(dense),
                block.pointwise.eq(pointwise),
                block.taps.as_value().eq(taps.read_data[8 * each * n:8 * each * (n + 1)]),
                block.keep.eq(stage3.keep), block.add.eq(stage3.valid), self.update.sums[n].eq(block.sum)]
            m.d.comb += [block.position[i].eq(p) for i, p in enumerate(positions)]
        m.d.comb += [
            self.issue.eq(step), self.wait_store.eq(~active & waiting), self.working.eq(active),
            self.busy.eq(self.i.valid | active | stage1.valid | stage2.valid | stage3.valid | ends.any())]
        return m
