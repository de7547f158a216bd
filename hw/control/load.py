"""The load unit: memory to scratchpads, and constant fill."""
from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.bus.burst import request_layout
from hw.layouts import error_layout, instruction_layout
from hw.memory.queue import Queue
from spec.derive import INSTRUCTION_BITS, STEP_BITS, Sizes
from spec.isa import LinearTarget, Opcode, TileTarget
from spec.registers import Error


class LoadUnit(wiring.Component):
    """Runs LOAD_TILE, LOAD_LINEAR and FILL.

    Two halves: the address half takes tokens and sends read requests, several instructions ahead; the write half
    takes the data in order and writes them. So the latency of memory is paid once, not per instruction.

    A tile request covers whole beats; units before or after the wanted ones in a beat are skipped. Rows that follow
    one another in memory (row_stride == cols) are one request per plane.
    Flow control: the write half accepts a beat when it has used its last unit.
    Throughput: one unit (tile), one beat (linear) or one scratchpad row (fill) per cycle.
    Parameters: config (spec.config.Config).
    """

    def __init__(self, *, config):
        sizes = Sizes(config)
        self._config = config
        super().__init__({
            "i": In(stream.Signature(INSTRUCTION_BITS)),
            "available_execute": In(1), "take_execute": Out(1), "push_execute": Out(1),
            "available_store": In(1), "take_store": Out(1), "push_store": Out(1),
            "request": Out(stream.Signature(request_layout())),
            "data": In(stream.Signature(config.bus.data_bits)),
            "tile_en": Out(1), "tile_row": Out(range(sizes.activation_blocks // sizes.banks)),
            "tile_mask": Out(sizes.banks), "tile_data": Out(data.ArrayLayout(8 * sizes.block, sizes.banks)),
            "weight_en": Out(1), "weight_address": Out(range(sizes.weight_beats)),
            "step_en": Out(1), "step_address": Out(range(config.memory.step_entries)), "step_data": Out(STEP_BITS),
            "parameter_en": Out(1), "parameter_address": Out(range(sizes.parameter_words)),
            "linear_data": Out(config.bus.data_bits),
            "residual_en": Out(1), "residual_address": Out(range(sizes.residual_units)),
            "residual_data": Out(8 * sizes.columns),
            "writing": Out(1), "waiting": Out(1), "busy": Out(1), "error": Out(error_layout())})

    def elaborate(self, platform):
        m = Module()
        m.submodules.pending = pending = Queue(shape=INSTRUCTION_BITS + 1, depth=4)
        self._build_address_half(m, pending.i)
        self._build_write_half(m, pending.o)
        return m

    @staticmethod
    def _views(word):
        """The three instructions that a word may be."""
        views = {}
        for op in (Opcode.LOAD_TILE, Opcode.LOAD_LINEAR, Opcode.FILL):
            layout = instruction_layout(op)
            views[op] = data.View(layout, word[4:4 + layout.size])
        return views

    def _build_address_half(self, m, pending):
        sizes = Sizes(self._config)
        unit_log2 = sizes.unit_bytes.bit_length() - 1
        beat_log2 = sizes.beat_bytes.bit_length() - 1
        word = self.i.payload
        head = self._views(word)[Opcode.LOAD_LINEAR]
        need_execute = head.wait_execute & ~self.available_execute
        need_store = head.wait_store & ~self.available_store
        m.d.comb += self.waiting.eq(self.i.valid & (need_execute | need_store))

        current = Signal(INSTRUCTION_BITS)
        tile = self._views(current)[Opcode.LOAD_TILE]
        linear = self._views(current)[Opcode.LOAD_LINEAR]
        merged = Signal()
        plane_offset, row_offset = Signal(40), Signal(40)
        plane, row = Signal(10), Signal(12)
        units = Signal(26)              # units in one request
        first_byte, last_byte = Signal(41), Signal(41)
        sending = Signal()
        # what the write half must know besides the instruction: whether rows come without gaps
        m.d.comb += pending.payload.eq(Cat(word, self._merged(word)))
        m.d.comb += [
            first_byte.eq(row_offset), last_byte.eq(row_offset + (units << unit_log2) - 1),
            self.request.payload.offset.eq(Cat(Const(0, beat_log2), first_byte[beat_log2:40])),
            self.request.payload.beats.eq((last_byte >> beat_log2) - (first_byte >> beat_log2) + 1)]
        with m.If(current[:4] == Opcode.LOAD_LINEAR):
            m.d.comb += [self.request.payload.offset.eq(linear.address), self.request.payload.beats.eq(linear.beats)]

        with m.FSM() as fsm:
            with m.State("TAKE"):
                go = self.i.valid & ~need_execute & ~need_store & pending.ready
                m.d.comb += [pending.valid.eq(self.i.valid & ~need_execute & ~need_store), self.i.ready.eq(go)]
                with m.If(go):
                    m.d.comb += [self.take_execute.eq(head.wait_execute), self.take_store.eq(head.wait_store)]
                    m.d.sync += current.eq(word)
                    with m.If(word[:4] != Opcode.FILL):
                        m.next = "SIZE"
            with m.State("SIZE"):
                m.d.sync += [merged.eq(self._merged(current)), plane.eq(tile.planes), row.eq(tile.rows),
                             plane_offset.eq(tile.address), row_offset.eq(tile.address), units.eq(tile.cols)]
                with m.If(self._merged(current)):
                    m.d.sync += units.eq(tile.cols * tile.rows)
                m.next = "SEND"
            with m.State("SEND"):
                m.d.comb += [self.request.valid.eq(1), sending.eq(self.request.ready)]
                with m.If(sending):
                    with m.If(current[:4] == Opcode.LOAD_LINEAR):
                        m.next = "TAKE"
                    with m.Elif((row == 1) | merged):
                        m.d.sync += [
                            row.eq(tile.rows), plane.eq(plane - 1),
                            plane_offset.eq(plane_offset + (tile.plane_stride << unit_log2)),
                            row_offset.eq(plane_offset + (tile.plane_stride << unit_log2))]
                        with m.If(plane == 1):
                            m.next = "TAKE"
                    with m.Else():
                        m.d.sync += [row.eq(row - 1), row_offset.eq(row_offset + (tile.row_stride << unit_log2))]
        self._address_busy = ~fsm.ongoing("TAKE")

    def _merged(self, word):
        """Whether the rows of a tile follow one another in memory, and are few enough for the beats of one request."""
        tile = self._views(word)[Opcode.LOAD_TILE]
        few = ~(tile.rows[6:].any() & tile.cols[8:].any())      # 63 * 16383 and 4095 * 255 are below 2**20
        return (word[:4] == Opcode.LOAD_TILE) & (tile.row_stride == tile.cols) & few

    def _build_write_half(self, m, pending):
        config, sizes = self._config, Sizes(self._config)
        banks, per_beat = sizes.banks, sizes.units_per_beat
        banks_log2 = banks.bit_length() - 1
        current = Signal(INSTRUCTION_BITS)
        merged = Signal()
        views = self._views(current)
        tile, linear, fill = views[Opcode.LOAD_TILE], views[Opcode.LOAD_LINEAR], views[Opcode.FILL]
        error = Signal(error_layout())
        m.d.comb += self.error.eq(error)
        beat = self.data.payload
        m.d.comb += self.linear_data.eq(beat)

        # loop state, shared by the three kinds
        plane, row, col = Signal(10), Signal(12), Signal(16)
        plane_base, row_base, address = Signal(17), Signal(17), Signal(17)
        phase = Signal(range(max(per_beat, 2)))             # unit within the beat
        row_phase, plane_phase = Signal.like(phase), Signal.like(phase)
        step_part = Signal(range(max(sizes.step_beats, 2)))
        step_low = Signal(STEP_BITS)
        ended = Signal()
        active = Signal()

        units = Array(beat.word_select(k, 8 * sizes.columns) for k in range(per_beat))
        unit = Signal(8 * sizes.columns)
        m.d.comb += unit.eq(units[phase] if per_beat > 1 else units[0])

        def out_of_range(condition):
            with m.If(condition):
                m.d.sync += [error.valid.eq(1), error.code.eq(Error.SCRATCHPAD_RANGE)]

        with m.FSM() as fsm:
            with m.State("TAKE"):
                m.d.comb += pending.ready.eq(~error.valid)
                with m.If(pending.valid & pending.ready):
                    word = pending.payload[:INSTRUCTION_BITS]
                    new = self._views(word)
                    t, li, fi = new[Opcode.LOAD_TILE], new[Opcode.LOAD_LINEAR], new[Opcode.FILL]
                    start = t.address[sizes.unit_bytes.bit_length() - 1:][:len(phase)] if per_beat > 1 else 0
                    m.d.sync += [
                        current.eq(word), merged.eq(pending.payload[INSTRUCTION_BITS]), step_part.eq(0),
                        plane.eq(t.planes), row.eq(t.rows), col.eq(t.cols), address.eq(t.base), row_base.eq(t.base),
                        plane_base.eq(t.base), phase.eq(start), row_phase.eq(start), plane_phase.eq(start)]
                    with m.Switch(word[:4]):
                        with m.Case(Opcode.LOAD_TILE):
                            m.next = "TILE"
                        with m.Case(Opcode.LOAD_LINEAR):
                            m.d.sync += [col.eq(li.beats), address.eq(li.base)]
                            m.next = "LINEAR"
                        with m.Default():
                            m.d.sync += [row.eq(fi.rows), col.eq(fi.blocks), address.eq(fi.base), row_base.eq(fi.base)]
                            m.next = "FILL"

            with m.State("TILE"):
                to_residual = tile.target == TileTarget.RESIDUAL
                mask = Signal(banks)
                # a unit fills group_blocks neighbouring banks, the same data offered to each such neighbourhood
                group_log2 = sizes.group_blocks.bit_length() - 1
                m.d.comb += mask.eq(((1 << sizes.group_blocks) - 1) << Cat(Const(0, group_log2),
                                                                           address[group_log2:banks_log2]))
                for b in range(banks):
                    m.d.comb += self.tile_data[b].eq(unit.word_select(b % sizes.group_blocks, 8 * sizes.block))
                last_col, last_row = col == 1, row == 1
                last_unit = last_col & last_row & (plane == 1)
                # the beat is used up: its last unit, or the request it belongs to ends
                beat_done = (phase == per_beat - 1) | last_col & (last_row | ~merged)
                m.d.comb += [
                    self.tile_row.eq(address[banks_log2:]), self.tile_mask.eq(mask),
                    self.residual_address.eq(address), self.residual_data.eq(unit)]
                with m.If(self.data.valid):
                    m.d.comb += [
                        self.writing.eq(1), self.data.ready.eq(beat_done),
                        self.tile_en.eq(~to_residual), self.residual_en.eq(to_residual)]
                    misaligned = address[:group_log2].any() if group_log2 else Const(0)
                    out_of_range(Mux(to_residual, address >= sizes.residual_units,
                                     (address >= sizes.activation_blocks) | misaligned))
                    m.d.sync += [col.eq(col - 1), address.eq(address + tile.col_step)]
                    if per_beat > 1:
                        m.d.sync += phase.eq(phase + 1)
                    with m.If(last_col):
                        m.d.sync += [row.eq(row - 1), col.eq(tile.cols), row_base.eq(row_base + tile.row_step),
                                     address.eq(row_base + tile.row_step)]
                        if per_beat > 1:
                            next_row = (row_phase + tile.row_stride)[:len(phase)]
                            m.d.sync += row_phase.eq(next_row)
                            with m.If(~merged):
                                m.d.sync += phase.eq(next_row)
                        with m.If(last_row):
                            m.d.sync += [plane.eq(plane - 1), row.eq(tile.rows),
                                         plane_base.eq(plane_base + tile.plane_step),
                                         row_base.eq(plane_base + tile.plane_step),
                                         address.eq(plane_base + tile.plane_step)]
                            if per_beat > 1:
                                next_plane = (plane_phase + tile.plane_stride)[:len(phase)]
                                m.d.sync += [plane_phase.eq(next_plane), row_phase.eq(next_plane), phase.eq(next_plane)]
                    with m.If(last_unit):
                        m.d.comb += ended.eq(1)
                        m.next = "TAKE"

            with m.State("LINEAR"):
                m.d.comb += [self.weight_address.eq(address), self.parameter_address.eq(address),
                             self.step_address.eq(address), self.data.ready.eq(1)]
                bus = config.bus.data_bits
                if sizes.step_beats == 1:
                    m.d.comb += self.step_data.eq(beat[:STEP_BITS])
                    step_whole = Const(1)
                else:
                    m.d.comb += self.step_data.eq(Cat(step_low[bus:], beat))
                    step_whole = step_part == sizes.step_beats - 1
                with m.If(self.data.valid):
                    m.d.comb += self.writing.eq(1)
                    m.d.sync += col.eq(col - 1)
                    with m.Switch(linear.target):
                        with m.Case(LinearTarget.WEIGHT):
                            m.d.comb += self.weight_en.eq(1)
                            m.d.sync += address.eq(address + 1)
                            out_of_range(address >= sizes.weight_beats)
                        with m.Case(LinearTarget.STEP):
                            m.d.comb += self.step_en.eq(step_whole)
                            m.d.sync += address.eq(address + step_whole)
                            if sizes.step_beats > 1:
                                m.d.sync += [step_low.eq(Cat(step_low[bus:], beat)),
                                             step_part.eq(Mux(step_whole, 0, step_part + 1))]
                            out_of_range(address >= config.memory.step_entries)
                        with m.Default():
                            m.d.comb += self.parameter_en.eq(1)
                            m.d.sync += address.eq(address + 1)
                            out_of_range(address >= sizes.parameter_words)
                    with m.If(col == 1):
                        m.d.comb += ended.eq(1)
                        m.next = "TAKE"

            with m.State("FILL"):
                # up to the end of this scratchpad row in one cycle
                lane = Signal(range(banks)) if banks > 1 else Const(0)
                if banks > 1:
                    m.d.comb += lane.eq(address[:banks_log2])
                room = Signal(range(banks + 1))
                take = Signal(range(banks + 1))
                m.d.comb += [
                    room.eq(banks - lane), take.eq(Mux(col < room, col, room)),
                    self.writing.eq(1), self.tile_en.eq(1), self.tile_row.eq(address[banks_log2:]),
                    self.tile_mask.eq((((Const(1) << take) - 1) << lane)[:banks])]
                for b in range(banks):
                    m.d.comb += self.tile_data[b].eq(Cat(fill.value.as_unsigned() for _ in range(sizes.block)))
                out_of_range(address >= sizes.activation_blocks)
                m.d.sync += [col.eq(col - take), address.eq(address + take)]
                with m.If(col == take):
                    m.d.sync += [row.eq(row - 1), col.eq(fill.blocks), row_base.eq(row_base + fill.row_step),
                                 address.eq(row_base + fill.row_step)]
                    with m.If(row == 1):
                        m.d.comb += ended.eq(1)
                        m.next = "TAKE"
        m.d.comb += [active.eq(~fsm.ongoing("TAKE")),
                     self.busy.eq(self.i.valid | self._address_busy | pending.valid | active)]
        # the tokens follow the last write by one cycle, so that the memory has taken it
        m.d.sync += [self.push_execute.eq(ended & tile.push_execute), self.push_store.eq(ended & tile.push_store)]
