"""The command processor: fetches instructions, checks them, hands them to the units, ends the program."""
from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.control.tokens import UNITS
from hw.bus.burst import request_layout
from hw.layouts import error_layout, instruction_layout
from hw.memory.queue import Queue
from spec.derive import INSTRUCTION_BITS, Sizes
from spec.isa import (INSTRUCTIONS, MAX_KERNEL_ROWS, SERIES_TERMS, UNIT_OF, VERSION, LinearTarget, Mode, Opcode,
                      Operation, TileTarget, Unit)
from spec.registers import Error


class InstructionCheck(wiring.Component):
    """Whether an instruction keeps the rules of `spec.isa`; combinational.

    Members: word, In; legal, Out (fields keep their rules); known, Out (the operation code exists).
    Parameters: config (spec.config.Config).
    """

    def __init__(self, *, config):
        self._config = config
        super().__init__({"word": In(INSTRUCTION_BITS), "legal": Out(1), "known": Out(1)})

    def elaborate(self, platform):
        m = Module()
        config, sizes = self._config, Sizes(self._config)
        depth = sizes.accumulator_depth
        unit_log2, beat_log2 = sizes.unit_bytes.bit_length() - 1, sizes.beat_bytes.bit_length() - 1
        with m.Switch(self.word[:4]):
            for op in Opcode:
                if op == Opcode.EXECUTE and config.structured is None or \
                        op == Opcode.EXECUTE_BASIS and config.basis is None:
                    continue
                record = INSTRUCTIONS[op]
                layout = instruction_layout(op)
                f = data.View(layout, self.word[4:4 + layout.size])
                broken = [self.word[record.offset("reserved"):] != 0]
                unit = UNIT_OF[op]
                own = UNITS if unit == Unit.CONTROL else UNITS[unit:unit + 1]
                for u in own:
                    broken += [f[f"wait_{u}"], f[f"push_{u}"]]
                if op == Opcode.HEADER:
                    broken += [f.version != VERSION]
                elif op == Opcode.LOAD_TILE:
                    broken += [f.target > max(TileTarget), f.planes == 0, f.rows == 0, f.cols == 0,
                               f.address[:unit_log2] != 0]
                elif op == Opcode.LOAD_LINEAR:
                    broken += [f.target > max(LinearTarget), f.beats == 0, f.address[:beat_log2] != 0]
                    if config.structured is None:       # there is no step table
                        broken += [f.target == LinearTarget.STEP]
                    elif sizes.step_beats > 1:
                        broken += [(f.target == LinearTarget.STEP) & f.beats[:sizes.step_beats.bit_length() - 1].any()]
                elif op == Opcode.FILL:
                    broken += [f.rows == 0, f.blocks == 0]
                elif op == Opcode.EXECUTE:
                    broken += [f.rows == 0, f.cols == 0, f.rows * f.cols > depth, f.steps == 0,
                               f.step + f.steps > config.memory.step_entries, f.operation > max(Operation)]
                elif op == Opcode.EXECUTE_BASIS:
                    broken += [f.mode > max(Mode), f.in_rows == 0, f.in_cols == 0, f.out_rows == 0, f.out_cols == 0,
                               f.out_rows * f.out_cols > depth, f.kernel_rows == 0, f.kernel_rows > MAX_KERNEL_ROWS,
                               f.kernel_cols == 0, f.dilation_rows == 0, f.dilation_cols == 0, f.groups == 0,
                               f.operation > max(Operation)]
                    if config.basis.coefficients == "series":
                        broken += [(f.mode == Mode.DECOMPOSED) & ((f.terms == 0) | (f.terms > SERIES_TERMS))]
                elif op == Opcode.STORE:
                    broken += [f.rows == 0, f.cols == 0, f.rows * f.cols > depth, f.low > f.high,
                               f.address[:unit_log2] != 0,
                               f.parameter + sizes.parameter_beats > sizes.parameter_words]
                with m.Case(op):
                    m.d.comb += [self.known.eq(1), self.legal.eq(~Cat(*broken).any())]
        return m


class CommandProcessor(wiring.Component):
    """Runs a program: HEADER first, then instructions in order, until END.

    Instructions are requested `control.fetch_depth` ahead, in half-queue requests, checked one cycle after they
    arrive, and queued before their unit (`control.queue_depth` each). BARRIER and END wait until every unit is idle
    and memory has acknowledged every write; END also until the instructions requested beyond it have come and are
    thrown away.

    ``mark_valid`` pulses with ``mark_number`` as a BARRIER passes; ``mark`` keeps the last one.
    ``start`` begins at ``program`` (byte offset) with ``count`` instructions; ``done`` pulses at END.
    Throughput: one instruction per two cycles. Errors: ILLEGAL_OPCODE, ILLEGAL_FIELD, DIGEST_MISMATCH, PROGRAM_END,
    with the instruction's offset.
    Parameters: config (spec.config.Config).
    """

    def __init__(self, *, config):
        self._config = config
        super().__init__({
            "start": In(1), "program": In(40), "count": In(32), "done": Out(1), "running": Out(1),
            "request": Out(stream.Signature(request_layout())),
            "data": In(stream.Signature(config.bus.data_bits)),
            "load": Out(stream.Signature(INSTRUCTION_BITS)), "execute": Out(stream.Signature(INSTRUCTION_BITS)),
            "store": Out(stream.Signature(INSTRUCTION_BITS)),
            "quiet": In(1),                                     # all units idle, all writes acknowledged
            "mark": Out(16), "mark_valid": Out(1), "mark_number": Out(16),
            "issued": Out(1), "error": Out(error_layout())})

    def elaborate(self, platform):
        m = Module()
        config, sizes = self._config, Sizes(self._config)
        error = Signal(error_layout())
        m.d.comb += self.error.eq(error)

        # -- fetch: requests of half a queue, as room allows ---------------------------------------------------------
        depth, chunk = config.control.fetch_depth, config.control.fetch_depth // 2
        instruction_bytes = sizes.instruction_beats * sizes.beat_bytes
        m.submodules.fetched = fetched = Queue(shape=INSTRUCTION_BITS, depth=depth)
        to_request = Signal(32)
        offset = Signal(40)
        reserved = Signal(range(depth + 1))     # places promised to instructions not yet taken out
        amount = Signal(range(chunk + 1))
        taken = Signal()
        granted = Signal()
        m.d.comb += [
            amount.eq(Mux(to_request < chunk, to_request, chunk)),
            self.request.valid.eq((to_request != 0) & (reserved + amount <= depth) & ~error.valid),
            granted.eq(self.request.valid & self.request.ready),
            self.request.payload.offset.eq(offset), self.request.payload.beats.eq(amount * sizes.instruction_beats)]
        m.d.sync += reserved.eq(reserved + Mux(granted, amount, 0) - taken)
        with m.If(granted):
            m.d.sync += [to_request.eq(to_request - amount), offset.eq(offset + amount * instruction_bytes)]

        # -- beats to instructions -------------------------------------------------------------------------------------
        beat, bus = self.data.payload, config.bus.data_bits
        if sizes.instruction_beats == 1:
            m.d.comb += [fetched.i.payload.eq(beat[:INSTRUCTION_BITS]), fetched.i.valid.eq(self.data.valid),
                         self.data.ready.eq(fetched.i.ready)]
        else:
            part = Signal(range(sizes.instruction_beats))
            low = Signal(INSTRUCTION_BITS)
            whole = part == sizes.instruction_beats - 1
            m.d.comb += [fetched.i.payload.eq(Cat(low[bus:], beat)), fetched.i.valid.eq(self.data.valid & whole),
                         self.data.ready.eq(fetched.i.ready | ~whole)]
            with m.If(self.data.valid & self.data.ready):
                m.d.sync += [low.eq(Cat(low[bus:], beat)), part.eq(Mux(whole, 0, part + 1))]

        # -- check: one instruction waits here with its verdict --------------------------------------------------------
        m.submodules.check = check = InstructionCheck(config=config)
        word = Signal(INSTRUCTION_BITS)
        held, known, legal = Signal(), Signal(), Signal()
        at = Signal(40)                         # offset of the instruction in `word`
        left = Signal(32)                       # instructions from it on
        leave = Signal()
        ending = Signal()                       # END waits until what was fetched beyond it is thrown away
        m.d.comb += [check.word.eq(fetched.o.payload),
                     fetched.o.ready.eq((~held | ending) & self.running & ~error.valid),
                     taken.eq(fetched.o.valid & fetched.o.ready)]
        with m.If(taken & ~ending):
            m.d.sync += [word.eq(fetched.o.payload), held.eq(1), known.eq(check.known), legal.eq(check.legal)]
        with m.Elif(leave):
            m.d.sync += [held.eq(0), at.eq(at + instruction_bytes), left.eq(left - 1)]

        # -- dispatch -------------------------------------------------------------------------------------------------
        def refuse(code):
            m.d.sync += [error.valid.eq(1), error.code.eq(code), error.address.eq(at)]

        header_seen = Signal()
        queues = {}
        for u in UNITS:
            m.submodules[f"{u}_queue"] = queues[u] = Queue(shape=INSTRUCTION_BITS, depth=config.control.queue_depth)
            m.d.comb += queues[u].i.payload.eq(word)
            wiring.connect(m, queues[u].o, wiring.flipped(getattr(self, u)))
        header = instruction_layout(Opcode.HEADER)
        digest = data.View(header, word[4:4 + header.size]).digest
        barrier = instruction_layout(Opcode.BARRIER)
        mark = data.View(barrier, word[4:4 + barrier.size]).mark
        empty = Signal()
        m.d.comb += empty.eq(self.quiet & ~Cat(q.level != 0 for q in queues.values()).any())
        # a unit takes an instruction out of its queue in one cycle and shows it as busy in the next
        settled = Signal()
        m.d.sync += settled.eq(empty)

        with m.If(self.running & ~error.valid):
            with m.If(left == 0):
                refuse(Error.PROGRAM_END)
            with m.Elif(held):
                with m.If(~known):
                    refuse(Error.ILLEGAL_OPCODE)
                with m.Elif(~legal):
                    refuse(Error.ILLEGAL_FIELD)
                with m.Elif(~header_seen):
                    with m.If((word[:4] == Opcode.HEADER) & (digest == sizes.digest_value)):
                        m.d.comb += leave.eq(1)
                        m.d.sync += header_seen.eq(1)
                    with m.Else():
                        refuse(Error.DIGEST_MISMATCH)
                with m.Else():
                    with m.Switch(word[:4]):
                        for op, unit in UNIT_OF.items():
                            if unit == Unit.CONTROL:
                                continue
                            with m.Case(op):
                                queue = queues[UNITS[unit]]
                                m.d.comb += [queue.i.valid.eq(1), leave.eq(queue.i.ready)]
                        with m.Case(Opcode.BARRIER):
                            with m.If(empty & settled):
                                m.d.comb += [leave.eq(1), self.mark_valid.eq(1)]
                                m.d.sync += self.mark.eq(mark)
                        with m.Case(Opcode.END):
                            with m.If(empty & settled):
                                with m.If((to_request == 0) & (reserved == 0)):
                                    m.d.comb += [leave.eq(1), self.done.eq(1)]
                                    m.d.sync += [self.running.eq(0), ending.eq(0)]
                                with m.Else():
                                    m.d.sync += ending.eq(1)
                        with m.Default():               # a second HEADER says the same again
                            with m.If(digest == sizes.digest_value):
                                m.d.comb += leave.eq(1)
                            with m.Else():
                                refuse(Error.DIGEST_MISMATCH)
        with m.If(ending & (granted | ~self.request.valid)):
            m.d.sync += to_request.eq(0)
        m.d.comb += [self.issued.eq(leave), self.mark_number.eq(mark)]
        with m.If(self.start & ~self.running):
            m.d.sync += [self.running.eq(1), header_seen.eq(0), to_request.eq(self.count), offset.eq(self.program),
                         at.eq(self.program), left.eq(self.count)]
        return m
