"""Steps of EXECUTE instructions: reads the step table, brings each weight tile into the array's shadow registers."""
from amaranth.hdl import Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.layouts import error_layout, from_record, instruction_layout
from spec.derive import STEP_BITS, Sizes
from spec.formats import step_entry
from spec.isa import Opcode
from spec.registers import Error


def step_layout(config):
    """What the loader tells the streamer about one step whose weights are ready."""
    return data.StructLayout({
        "entry": from_record(step_entry(config.structured.taps)),
        "execute": instruction_layout(Opcode.EXECUTE),
        "first": 1,             # the first step of its EXECUTE
        "last": 1})             # the last step of its EXECUTE


class WeightLoader(wiring.Component):
    """For each EXECUTE, for each of its steps: offer the step once its weight tile is in the shadow registers.

    Flow control: ``o`` is offered only when the shadow holds the tile (or the step holds the old one); the loader
    writes the shadow again only after ``shadow_free`` (the swap). While a step streams, the next tile, also of the
    next EXECUTE, loads.
    Latency: a tile of n beats takes n + `overhead` cycles from the acceptance of the step before; one less behind a
    step that held its weights, because nothing swaps.
    Parameters: config (spec.config.Config).
    Members: i, In(stream of EXECUTE); o, Out(stream of `step_layout`); read ports of step table and weight buffer;
    the load port of the array; error; busy.
    """

    #: Cycles of a step beyond its tile's beats: table read, entry check, last beat, and the pipeline to the swap.
    overhead = 5

    def __init__(self, *, config):
        sizes = Sizes(config)
        self._config = config
        super().__init__({
            "i": In(stream.Signature(instruction_layout(Opcode.EXECUTE))),
            "o": Out(stream.Signature(step_layout(config))),
            "step_en": Out(1), "step_address": Out(range(config.memory.step_entries)), "step_data": In(STEP_BITS),
            "weight_en": Out(1), "weight_address": Out(range(sizes.weight_beats)),
            "weight_data": In(config.bus.data_bits),
            "load_data": Out(config.bus.data_bits), "load_value": Out(1), "load_index": Out(1),
            "load_word": Out(range(max(sizes.value_beats, sizes.index_beats, 2))),
            "shadow_free": In(1), "busy": Out(1), "error": Out(error_layout())})

    def elaborate(self, platform):
        m = Module()
        s, sizes = self._config.structured, Sizes(self._config)
        record = step_entry(s.taps)
        execute = Signal.like(self.i.payload)
        steps_left = Signal(12)
        first = Signal()
        table = Signal(12)
        weight = Signal(17)
        raw = data.View(from_record(record), self.step_data[:record.bits])
        entry = Signal(from_record(record))
        beat = Signal(range(sizes.value_beats + sizes.index_beats + 1))
        beats = Signal.like(beat)
        free = Signal(init=1)       # the shadow may be written
        error = Signal(error_layout())
        m.d.comb += [self.error.eq(error), self.step_address.eq(table), self.weight_address.eq(weight),
                     self.load_data.eq(self.weight_data)]
        with m.If(self.shadow_free):
            m.d.sync += free.eq(1)

        # which beats a tile of this entry has, and whether the entry is legal at all
        tile_beats = Signal.like(beat)
        legal = Signal()
        with m.Switch(raw.n_log2):
            for p in s.patterns:
                with m.Case(p.n.bit_length() - 1):
                    blocks_log2 = sizes.fetch_blocks(p.n).bit_length() - 1
                    most = min(blocks_log2, s.taps.bit_length() - 1)
                    m.d.comb += [tile_beats.eq(sizes.tile_beats(p.n)), legal.eq(raw.segments_log2 <= most)]
        # weight beats are written to the shadow in the cycle after their read
        arriving = Signal()
        arriving_beat = Signal.like(beat)
        m.d.sync += [arriving.eq(self.weight_en), arriving_beat.eq(beat)]
        with m.If(arriving):
            with m.If(arriving_beat < sizes.value_beats):
                m.d.comb += [self.load_value.eq(1), self.load_word.eq(arriving_beat)]
            with m.Else():
                m.d.comb += [self.load_index.eq(1), self.load_word.eq(arriving_beat - sizes.value_beats)]

        m.d.comb += [
            self.o.payload.entry.eq(entry), self.o.payload.execute.eq(execute),
            self.o.payload.first.eq(first), self.o.payload.last.eq(steps_left == 1)]
        with m.FSM() as fsm:
            with m.State("IDLE"):
                m.d.comb += self.i.ready.eq(~error.valid)
                with m.If(self.i.valid & self.i.ready):
                    m.d.sync += [execute.eq(self.i.payload), steps_left.eq(self.i.payload.steps), first.eq(1),
                                 table.eq(self.i.payload.step), weight.eq(self.i.payload.weight)]
                    m.next = "TABLE"
            with m.State("TABLE"):
                m.d.comb += self.step_en.eq(1)
                m.next = "ENTRY"
            with m.State("ENTRY"):
                m.d.sync += [entry.eq(raw), beat.eq(0), beats.eq(tile_beats), table.eq(table + 1)]
                m.next = "BEATS"
                with m.If(~legal):
                    m.d.sync += [error.valid.eq(1), error.code.eq(Error.ILLEGAL_FIELD)]
                    m.next = "STOP"
                with m.Elif(raw.hold):
                    m.next = "OFFER"
                with m.Elif(weight + tile_beats > sizes.weight_beats):
                    m.d.sync += [error.valid.eq(1), error.code.eq(Error.SCRATCHPAD_RANGE)]
                    m.next = "STOP"
            with m.State("BEATS"):
                with m.If(free):
                    m.d.comb += self.weight_en.eq(1)
                    m.d.sync += [beat.eq(beat + 1), weight.eq(weight + 1)]
                    with m.If(beat + 1 == beats):
                        m.d.sync += free.eq(0)
                        m.next = "LAST"
            with m.State("LAST"):
                m.next = "OFFER"
            with m.State("OFFER"):
                m.d.comb += self.o.valid.eq(1)
                with m.If(self.o.ready):
                    m.d.sync += [steps_left.eq(steps_left - 1), first.eq(0)]
                    with m.If(steps_left == 1):
                        m.next = "IDLE"
                    with m.Else():
                        m.next = "TABLE"
            with m.State("STOP"):
                pass
        m.d.comb += self.busy.eq(~fsm.ongoing("IDLE"))
        return m
