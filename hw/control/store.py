"""The store unit: accumulators through the requantiser to memory."""
from amaranth.hdl import Cat, Const, Module, Mux, Shape, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from hw.layouts import error_layout, from_record, instruction_layout
from hw.requantize import Requantizer
from spec.config import Config
from spec.derive import Sizes
from spec.formats import column_parameters
from spec.isa import Opcode
from spec.registers import Error

#: Bits of a byte offset and of a beat count in a request to the write master.
OFFSET_BITS = 40
BEATS_BITS = 20


class StoreUnit(wiring.Component):
    """Executes STORE: reads a bank of accumulators, requantises it, writes it to memory.

    Three stages, each on its own instruction: *prepare* (load token, check, parameters into shadow registers), *run*
    (execute token, one pixel per cycle through the requantiser, units packed into beats), *acknowledge* (a queue of
    instructions whose writes memory has not yet confirmed).

    Pixel (row, col) lies in the bank at ``row * cols + col``, in the residual buffer at ``residual_base`` plus that,
    and in memory at ``address + (row * row_stride + col) * columns`` bytes. Each row is one write request; rows that
    follow one another in memory (row_stride == cols) are one request together. A request begins and ends on beats,
    strobes leave out the bytes beside the row.

    Flow control: one pixel per cycle while ``data`` is taken; a stall reaches the accumulator read in the same cycle.
    Latency: ``latency`` cycles from an execute token to the first beat on ``data`` (one unit per beat; with more, the
    cycles until its last unit), if the instruction was prepared, which it is ``parameter_beats + 2`` cycles after its
    transfer on ``i`` if its load token is there.
    Between two prepared instructions ``turnaround`` cycles are lost.

    Errors, held until reset; no instruction is begun after one, what was requested is completed. SCRATCHPAD_RANGE if
    residuals, parameters or accumulators would be read out of range, with the instruction's ``address``; MEMORY_RANGE
    if ``address`` is not a multiple of the unit, or if a row begins at or above 2**40, with the row's (modulo 2**40).

    Args:
        config: `spec.config.Config`.

    Members:
        i: In, stream of `hw.layouts.instruction_layout` (STORE).
        available_load, available_execute: In, a token of that unit is there.
        take_load, take_execute: Out, consumes it.
        push_load, push_execute: Out, gives a token: all writes acknowledged; bank read.
        acc_en, acc_bank, acc_address, acc_data: Out, Out, Out, In: accumulator read; data in the next cycle, held.
        parameter_en, parameter_address, parameter_data: the same for the parameter memory, in beats.
        residual_en, residual_address, residual_data: the same for the residual buffer, in units.
        request: Out, stream of {offset, beats}, offset a multiple of the beat.
        data: Out, stream of {data, strb}, the beats of all requests in order.
        done: In, one pulse per completed request, in order.
        busy: Out, not idle. idle: Out, no instruction inside and no request unacknowledged.
        reading: Out, a pixel of accumulators is read. waiting: Out, nothing to do but wait for a token.
        error: Out, {valid, code, address}.
    """

    #: Cycles from ``take_execute`` to the first ``data.valid`` with one unit per beat. A test measures it.
    latency = 3 + Requantizer.latency
    #: Cycles without accumulator read between two prepared instructions. A test measures it.
    turnaround = Requantizer.latency

    def __init__(self, *, config):
        if not isinstance(config, Config):
            raise TypeError(f"StoreUnit configuration must be a Config, not {config!r}")
        self._config, self._sizes = config, Sizes(config)
        sizes = self._sizes
        super().__init__({
            "i": In(stream.Signature(instruction_layout(Opcode.STORE))),
            "available_load": In(1), "take_load": Out(1), "push_load": Out(1),
            "available_execute": In(1), "take_execute": Out(1), "push_execute": Out(1),
            "acc_en": Out(1), "acc_bank": Out(1), "acc_address": Out(range(sizes.accumulator_depth)),
            "acc_data": In(data.ArrayLayout(signed(sizes.accumulator.bits), sizes.columns)),
            "parameter_en": Out(1), "parameter_address": Out(range(sizes.parameter_words)),
            "parameter_data": In(config.bus.data_bits),
            "residual_en": Out(1), "residual_address": Out(range(sizes.residual_units)),
            "residual_data": In(8 * sizes.columns),
            "request": Out(stream.Signature(data.StructLayout({"offset": OFFSET_BITS, "beats": BEATS_BITS}))),
            "data": Out(stream.Signature(data.StructLayout({"data": config.bus.data_bits, "strb": sizes.beat_bytes}))),
            "done": In(1),
            "busy": Out(1), "idle": Out(1), "reading": Out(1), "waiting": Out(1),
            "error": Out(error_layout()),
        })

    def elaborate(self, platform):
        m = Module()
        sizes = self._sizes
        m.submodules.requantizer = self._requantizer = Requantizer(config=self._config)
        #: Instructions that may wait for their last response while further ones run.
        pending = 1 << (self._config.bus.outstanding_writes - 1).bit_length() + 1
        m.submodules.pending = self._pending = SyncFIFO(width=13, depth=pending)
        self._depth = Shape.cast(range(sizes.accumulator_depth + 1))
        self._lane_bits = (sizes.units_per_beat - 1).bit_length()
        self._lane = Shape(max(self._lane_bits, 1))  # Verilog has no signal without bits

        # Between the stages. `prepared` is one instruction whose checks passed and whose parameters are in shadow.
        self._cmd = Signal(instruction_layout(Opcode.STORE), name="cmd")
        self._prepared = Signal(name="prepared")
        self._rows, self._cols = Signal(12, name="rows"), Signal(self._depth, name="cols")
        self._shadow = Signal(sizes.parameter_beats * self._config.bus.data_bits, name="shadow")
        self._start, self._halted = Signal(name="start"), Signal(name="halted")
        self._running, self._preparing = Signal(name="running"), Signal(name="preparing")

        self._build_prepare(m)
        self._build_requests(m)
        self._build_run(m)
        self._build_pack(m)
        self._build_acknowledge(m)

        with m.If(~self._halted & (self._refused | self._overflow)):
            m.d.sync += [
                self._halted.eq(1),
                self.error.code.eq(Mux(self._overflow, Error.MEMORY_RANGE, self._refusal)),
                self.error.address.eq(Mux(self._overflow, self._row_address, self._cmd.address)),
            ]
        m.d.comb += [
            self.error.valid.eq(self._halted),
            self.busy.eq(~self.idle),
            self.waiting.eq(~self._running & (self._needs_load | self._needs_execute)),
        ]
        return m

    def _place(self, units):
        """Place in its beat of the unit with address ``units``."""
        return units[:self._lane_bits] if self._lane_bits else Const(0, 1)

    def _build_prepare(self, m):
        """Take an instruction and its load token, check it, read its parameters; hold it until the run begins."""
        sizes, cmd = self._sizes, self._cmd
        beats, word_bits = sizes.parameter_beats, self._config.bus.data_bits
        count = Signal(24, name="count")
        beat, beat_read = Signal(range(beats + 1)), Signal(range(beats + 1))
        read = Signal()
        self._refused, self._refusal = Signal(name="refused"), Signal(8, name="refusal")
        self._needs_load = Signal(name="needs_load")
        misaligned = cmd.address[:sizes.unit_bytes.bit_length() - 1].any()
        residual_over = cmd.residual & (cmd.residual_base + count > sizes.residual_units)
        parameter_over = cmd.parameter > sizes.parameter_words - beats
        contiguous = cmd.row_stride == cmd.cols

        m.d.sync += read.eq(self.parameter_en)
        with m.If(self.parameter_en):
            m.d.sync += beat_read.eq(beat)
        with m.If(read):
            m.d.sync += self._shadow.word_select(beat_read, word_bits).eq(self.parameter_data)
        m.d.comb += self.parameter_address.eq(cmd.parameter + beat)
        with m.FSM(name="prepare") as fsm:
            with m.State("IDLE"):
                m.d.comb += self.i.ready.eq(~self._halted)
                with m.If(self.i.valid & self.i.ready):
                    m.d.sync += [cmd.eq(self.i.p), count.eq(self.i.p.rows * self.i.p.cols), beat.eq(0)]
                    m.next = "CHECK"
            with m.State("CHECK"):
                m.d.sync += [self._rows.eq(Mux(contiguous, 1, cmd.rows)),
                             self._cols.eq(Mux(contiguous, count, cmd.cols))]
                with m.If(misaligned | residual_over | parameter_over | (count == 0)
                          | (count > self._sizes.accumulator_depth)):
                    m.d.comb += [self._refused.eq(1),
                                 self._refusal.eq(Mux(misaligned, Error.MEMORY_RANGE, Error.SCRATCHPAD_RANGE))]
                    m.next = "IDLE"
                with m.Elif(cmd.wait_load & ~self.available_load):
                    m.d.comb += self._needs_load.eq(1)
                with m.Else():
                    m.d.comb += [self.take_load.eq(cmd.wait_load), self.parameter_en.eq(1)]
                    m.d.sync += beat.eq(1)
                    m.next = "PARAMETERS"
            with m.State("PARAMETERS"):
                m.d.comb += self.parameter_en.eq(beat != beats)
                with m.If(self.parameter_en):
                    m.d.sync += beat.eq(beat + 1)
                with m.Else():
                    m.next = "PREPARED"
            with m.State("PREPARED"):
                m.d.comb += self._prepared.eq(1)
                with m.If(self._start):
                    m.next = "IDLE"
            m.d.comb += self._preparing.eq(~fsm.ongoing("IDLE"))

    def _build_requests(self, m):
        """One write request per row of the running instruction, ahead of its beats."""
        sizes, cmd = self._sizes, self._cmd
        unit_log2, beat_log2 = sizes.unit_bytes.bit_length() - 1, sizes.beat_bytes.bit_length() - 1
        address = Signal(OFFSET_BITS + 1, name="row_address")
        stride, rows = Signal(20 + unit_log2, name="row_bytes"), Signal(12, name="rows_to_request")
        cols = Signal(self._depth, name="request_cols")
        self._requesting, self._overflow = Signal(name="requesting"), Signal(name="overflow")
        self._row_address = address
        lane = self._place(address[unit_log2:])
        m.d.comb += [
            # Beyond the offset's 40 bits a row would come back inside memory, unseen by whoever checks the request.
            self._overflow.eq(self._requesting & address[OFFSET_BITS]),
            self.request.valid.eq(self._requesting & ~address[OFFSET_BITS]),
            self.request.p.offset.eq(address[beat_log2:OFFSET_BITS] << beat_log2),
            self.request.p.beats.eq((lane + cols + sizes.units_per_beat - 1) >> beat_log2 - unit_log2),
        ]
        with m.If(self.request.valid & self.request.ready):
            m.d.sync += [address.eq(address + stride), rows.eq(rows - 1), self._requesting.eq(rows != 1)]
        with m.If(self._start):
            m.d.sync += [address.eq(cmd.address), stride.eq(cmd.row_stride << unit_log2), rows.eq(self._rows),
                         cols.eq(self._cols), self._requesting.eq(1)]

    def _build_run(self, m):
        """Begin a prepared instruction once its token is there, then read a pixel in each cycle."""
        sizes, cmd, requantizer = self._sizes, self._cmd, self._requantizer
        unit_log2 = sizes.unit_bytes.bit_length() - 1
        columns, record = self._sizes.columns, column_parameters()
        run = Signal(instruction_layout(Opcode.STORE), name="run")
        rows = Signal(12, name="rows_to_read")
        col, cols = Signal(self._depth, name="col"), Signal(self._depth, name="run_cols")
        lane, row_lane = Signal(self._lane, name="lane"), Signal(self._lane, name="row_lane")
        ready = Signal()
        self._needs_execute = Signal(name="needs_execute")
        parameters = Signal(data.ArrayLayout(from_record(record), columns), name="parameters")
        m.d.comb += [
            ready.eq(self._prepared & ~self._running & ~self._requesting & ~self._halted & requantizer.settled
                     & self._pending.w_rdy),
            self._needs_execute.eq(self._prepared & cmd.wait_execute & ~self.available_execute),
            self._start.eq(ready & ~self._needs_execute),
            self.take_execute.eq(self._start & cmd.wait_execute),
        ]
        # A pixel: read (here), in the memory's output register (`held`), in the requantiser.
        held, held_last, held_end, held_lane = Signal(), Signal(), Signal(), Signal(self._lane)
        row_end, end, next_row_lane = Signal(), Signal(), Signal(self._lane)
        m.d.comb += [
            self.acc_en.eq(self._running & (~held | requantizer.i.ready)),
            self.reading.eq(self.acc_en),
            self.acc_bank.eq(run.bank),
            self.residual_en.eq(self.acc_en & run.residual),
            self.residual_address.eq(run.residual_base),
            row_end.eq(col == cols),
            end.eq(row_end & (rows == 1)),
            next_row_lane.eq(self._place(row_lane + run.row_stride)),
        ]
        with m.If(requantizer.i.ready):
            m.d.sync += held.eq(0)
        with m.If(self.acc_en):
            m.d.sync += [
                held.eq(1), held_last.eq(row_end), held_end.eq(end), held_lane.eq(lane),
                self.acc_address.eq(self.acc_address + 1), run.residual_base.eq(run.residual_base + 1),
                col.eq(col + 1), lane.eq(self._place(lane + 1)),
            ]
            with m.If(row_end):
                m.d.sync += [col.eq(1), rows.eq(rows - 1), lane.eq(next_row_lane), row_lane.eq(next_row_lane)]
            with m.If(end):
                m.d.sync += self._running.eq(0)
        with m.If(self._start):
            first_lane = self._place(cmd.address[unit_log2:])
            m.d.sync += [run.eq(cmd), parameters.eq(self._shadow[:record.bits * columns]), self._running.eq(1),
                         self.acc_address.eq(0), rows.eq(self._rows), col.eq(1), cols.eq(self._cols),
                         lane.eq(first_lane), row_lane.eq(first_lane)]
        # The bank is free once the requantiser has its last pixel: before, the memory's output register still holds it.
        m.d.comb += [
            self.push_execute.eq(held & held_end & requantizer.i.ready & run.push_execute),
            requantizer.i.valid.eq(held),
            requantizer.i.p.acc.eq(self.acc_data),
            requantizer.i.p.residual.eq(self.residual_data),
            requantizer.i.p.last.eq(held_last),
            requantizer.zero_point.eq(run.zero_point),
            requantizer.low.eq(run.low),
            requantizer.high.eq(run.high),
            requantizer.residual_enable.eq(run.residual),
            requantizer.residual_zero_point.eq(run.residual_zero_point),
            requantizer.residual_multiplier.eq(run.residual_multiplier),
        ]
        for given, used in zip(parameters, requantizer.parameters):
            m.d.comb += [used[name].eq(given[name]) for name in ("bias", "multiplier", "shift")]
        # Each pixel's place in its beat goes beside it through the requantiser, whose stages move together.
        lanes = [held_lane, *(Signal(self._lane, name=f"lane{n}") for n in range(1, Requantizer.latency + 1))]
        with m.If(requantizer.i.ready):
            m.d.sync += [late.eq(early) for early, late in zip(lanes, lanes[1:])]
        self._unit_lane, self._held = lanes[-1], held

    def _build_pack(self, m):
        """Collect units into beats; a beat leaves when it is full or its row ends."""
        sizes, unit = self._sizes, self._requantizer.o
        units, unit_bits, unit_bytes = sizes.units_per_beat, 8 * sizes.unit_bytes, sizes.unit_bytes
        taken = Signal(units, name="units_in_beat")
        m.d.comb += [
            unit.ready.eq(~self.data.valid | self.data.ready),
            self.data.p.strb.eq(Cat(bit.replicate(unit_bytes) for bit in taken)),
        ]
        with m.If(unit.ready):
            with m.If(unit.valid):
                place = 1 << self._unit_lane
                m.d.sync += [
                    taken.eq(Mux(self.data.valid, 0, taken) | place),
                    self.data.p.data.word_select(self._unit_lane, unit_bits).eq(unit.p.data.as_value()),
                    self.data.valid.eq(unit.p.last | (self._unit_lane == units - 1)),
                ]
            with m.Elif(self.data.valid):
                m.d.sync += [taken.eq(0), self.data.valid.eq(0)]

    def _build_acknowledge(self, m):
        """Count responses against each instruction's requests; say when nothing is left."""
        queue = self._pending
        rows, push_load = queue.r_data[:12], queue.r_data[12]
        done, acknowledged = Signal(12), Signal()
        unanswered = Signal(range(1 + (queue.depth << 12)))
        m.d.comb += [
            queue.w_en.eq(self._start),
            queue.w_data.eq(Cat(self._rows, self._cmd.push_load)),
            acknowledged.eq(self.done & queue.r_rdy & (done + 1 == rows)),
            queue.r_en.eq(acknowledged),
            self.push_load.eq(acknowledged & push_load),
            # After an error only what was requested counts: the rest is not going to happen.
            self.idle.eq((unanswered == 0) & ~self.request.valid & (
                self._halted | ~(self.i.valid | self._preparing | self._running | self._held | queue.r_rdy))),
        ]
        with m.If(self.done & queue.r_rdy):
            m.d.sync += done.eq(Mux(acknowledged, 0, done + 1))
        m.d.sync += unanswered.eq(unanswered + (self.request.valid & self.request.ready) - self.done)
