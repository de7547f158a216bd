"""The coefficient stage for irregular coefficients: decoders, coefficient rows, and all slices in lock-step."""
from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In

from hw.basis.concentrator import Concentrator
from hw.basis.map_decoder import MapDecoder
from hw.basis.stage import stage_members
from hw.memory.ram import Ram
from hw.share import place
from hw.structured.column import tree_sum
from spec.derive import Sizes


class MapSlice(wiring.Component):
    """A concentrator with its rows of coefficients, both halves of them.

    ``read`` fetches the row ``read_address`` (half, row), which the concentrator sees from the next cycle on until the
    next ``read``; a row is written with ``write``. The other ports are the concentrator's.
    Parameters: config (spec.config.Config) with coefficients "maps".
    """

    @staticmethod
    def members(config):
        """Signature members."""
        b, ports = config.basis, Concentrator.members(config)
        row = data.ArrayLayout(b.group, b.stream_groups)
        for name in ("map", "sign"):
            del ports[name]
        return ports | {
            "write": In(1), "write_address": In(range(2 * b.coefficient_rows)), "write_map": In(row),
            "write_sign": In(row), "read": In(1), "read_address": In(range(2 * b.coefficient_rows))}

    def __init__(self, *, config):
        self._config = config
        super().__init__(self.members(config))

    def elaborate(self, platform):
        m = Module()
        config, b = self._config, self._config.basis
        places = b.stream_groups * b.group
        m.submodules.rows = rows = Ram(width=2 * places, depth=2 * b.coefficient_rows)
        inner = place(m, "concentrator", module="summand_concentrator", factory=lambda: Concentrator(config=config),
                      members=Concentrator.members(config), platform=platform)
        m.d.comb += [
            rows.write_en.eq(self.write), rows.write_address.eq(self.write_address),
            rows.write_data.eq(Cat(self.write_map, self.write_sign)),
            rows.read_en.eq(self.read), rows.read_address.eq(self.read_address),
            inner.map.eq(rows.read_data[:places]), inner.sign.eq(rows.read_data[places:])]
        for name in ("word", "nonzero", "first", "pick", "add", "fresh"):
            m.d.comb += getattr(inner, name).eq(getattr(self, name))
        for name in ("done", "ir", "saturated"):
            m.d.comb += getattr(self, name).eq(getattr(inner, name))
        return m


class MapStage(wiring.Component):
    """IR of all slices from a stream of words, with coefficients that may be anywhere (docs/basis.md).

    Ports: `hw.basis.stage.stage_members`; ``i.payload.n_log2`` is not looked at.
    Flow control: stallable; ``i.ready`` follows ``o.ready`` in the same cycle, and the coefficients of the word on
    ``i``; ``o`` comes from registers alone. While ``o`` stalls, two complete pixels wait inside and up to two words
    behind them.
    Latency: `latency` cycles from the transfer of a pixel's last word to ``o.valid``, plus the cycles that this word
    needs beyond the first. Throughput: a word takes ``max(1, most cycles of any slice)`` cycles, words and pixels
    follow one another without a gap, also while coefficients load.

    Loading: in each cycle one beat goes to one decoder, if that has room; a beat that holds words of several segments
    goes to their decoders one after the other, and leaves ``load`` with the last. With T beats of the segment table,
    w_b words in the segment of block b, v_b beats that hold any of these, and R = ceil(groups / stream_groups),
    ``loaded`` comes ``load_overhead + max over b of (w_b + max(R, T + v_0 + .. + v_(b-1) + 2))`` cycles after
    ``load_start``, if every beat is offered at once and no v_b exceeds `MapDecoder.fifo_beats`; a longer segment holds
    up those behind it until its decoder has taken the rest.
    Errors: ``error`` for what `MapDecoder` refuses, a segment of no words, segments that take more or fewer beats than
    ``load_beats``, ``load_groups`` of 0 or more than coefficient_groups, ``load_start`` before ``loaded`` of the load
    before, and a beat that is offered when no load is under way. From then on all beats are swallowed, ``loaded`` does
    not come, and words still pass, with coefficients of no meaning.
    Parameters: config (spec.config.Config) with coefficients "maps".
    """

    #: Cycles: row and word, operands, sum, output register.
    latency = 4
    #: Cycles of a load beyond its formula.
    load_overhead = 2

    def __init__(self, *, config):
        self._config = config
        super().__init__(stage_members(config))

    def _build_load(self, m, platform):
        """Segment table, routing, decoders. Returns these and the half they write to."""
        config, b, sizes = self._config, self._config.basis, Sizes(self._config)
        bus, per_beat = config.bus.data_bits, config.bus.data_bits // b.group
        low = per_beat.bit_length() - 1             # bits of a word's place in its beat
        decoders = [
            place(m, f"decoder{k}", module="summand_map_decoder", factory=lambda: MapDecoder(config=config),
                  members=MapDecoder.members(config), platform=platform) for k in range(b.blocks)]
        half, error, loaded = Signal(), Signal(), Signal()
        lengths = Signal(16 * b.blocks)             # of the current segment (lowest) and those to come, in words
        words = Signal(17)                          # from the beginning of the beat at hand to the segment's end
        begin_at = Signal(low)                      # place of the segment's first word, in its first beat
        beats = Signal(16)                          # still to come
        part = Signal(range(max(sizes.segment_table_beats, 2)))
        block = Signal(range(b.blocks))
        begin, last, shared, routed = Signal(), Signal(), Signal(), Signal()
        room = Signal(b.blocks)
        idle, legal = Signal(), Signal()
        m.d.comb += [last.eq(words <= per_beat), shared.eq((words < per_beat) & (block != b.blocks - 1)),
                     room.eq(Cat(d.beat.ready for d in decoders)),
                     legal.eq((self.load_groups != 0) & (self.load_groups <= sizes.coefficient_groups)),
                     begin.eq(self.load_start & legal & idle & ~error),
                     self.loaded.eq(loaded), self.error.eq(error)]
        for k, decoder in enumerate(decoders):
            m.d.comb += [decoder.start.eq(begin), decoder.groups.eq(self.load_groups),
                         decoder.beat.payload.data.eq(self.load.payload), decoder.beat.payload.last.eq(last),
                         decoder.beat.payload.begin.eq(begin_at), decoder.beat.payload.end.eq(words - 1),
                         decoder.beat.valid.eq(routed & self.load.valid & (block == k))]
        with m.FSM() as fsm:
            with m.State("IDLE"):
                m.d.comb += idle.eq(1)
                with m.If(begin):
                    m.d.sync += [half.eq(self.load_half), loaded.eq(0), part.eq(0), block.eq(0), begin_at.eq(0),
                                 beats.eq(self.load_beats)]
                    m.next = "TABLE"
                with m.Elif(self.load.valid):
                    m.d.sync += error.eq(1)
            with m.State("TABLE"):
                m.d.comb += self.load.ready.eq(1)
                with m.If(self.load.valid):
                    for k in range(sizes.segment_table_beats):
                        with m.If(part == k):
                            m.d.sync += lengths[bus * k:bus * (k + 1)].eq(self.load.payload)
                    with m.If(part == 0):
                        m.d.sync += words.eq(self.load.payload[:16])
                    m.d.sync += part.eq(part + 1)
                    with m.If(part == sizes.segment_table_beats - 1):
                        m.next = "SEGMENTS"
            with m.State("SEGMENTS"):
                with m.If(lengths[:16] == 0):
                    m.d.sync += error.eq(1)
                with m.Else():
                    m.d.comb += [routed.eq(~error), self.load.ready.eq(room.bit_select(block, 1) & ~shared)]
                with m.If(routed & self.load.valid & room.bit_select(block, 1)):
                    m.d.sync += words.eq(words - per_beat)
                    with m.If(last):
                        m.d.sync += [lengths.eq(lengths >> 16), block.eq(block + 1), begin_at.eq(words),
                                     words.eq(words[:low] + lengths[16:32])]
                        with m.If(block == b.blocks - 1):
                            m.next = "DECODE"
            with m.State("DECODE"):
                with m.If(self.load.valid | (beats != 0)):
                    m.d.sync += error.eq(1)
                with m.Elif(Cat(d.done for d in decoders).all() & ~error):
                    m.d.sync += loaded.eq(1)
                    m.next = "IDLE"
        with m.If(~idle & self.load.valid & self.load.ready):
            m.d.sync += beats.eq(beats - 1)
        missing = Signal()
        m.d.comb += missing.eq((fsm.ongoing("TABLE") | fsm.ongoing("SEGMENTS")) & (beats == 0))
        with m.If(Cat(d.error for d in decoders).any() | missing | (self.load_start & ~(legal & idle))):
            m.d.sync += error.eq(1)
        with m.If(error):
            m.d.comb += self.load.ready.eq(1)
        return decoders, half

    def elaborate(self, platform):
        m = Module()
        config, b, sizes = self._config, self._config.basis, Sizes(self._config)
        decoders, half = self._build_load(m, platform)
        slices = [
            place(m, f"slice{n}", module="summand_map_slice", factory=lambda: MapSlice(config=config),
                  members=MapSlice.members(config), platform=platform) for n in range(sizes.basis_slices)]

        # three stages: a word at the lanes, what they took at the adders, a pixel's sum before the output register
        at_lanes, at_adders, at_sum, o_valid = Signal(), Signal(), Signal(), Signal()
        pick, add, give = Signal(), Signal(), Signal()
        take, done = Signal(), Signal()
        m.d.comb += [
            give.eq(at_sum & (~o_valid | self.o.ready)),
            add.eq(at_adders & (~at_sum | give)),
            pick.eq(at_lanes & (~at_adders | add)),
            done.eq(Cat(s.done for s in slices).all()),
            self.i.ready.eq(~at_lanes | (pick & done)), take.eq(self.i.valid & self.i.ready)]
        first, last, ends, fresh = Signal(), Signal(), Signal(), Signal(init=1)
        m.d.sync += [at_lanes.eq(take | (at_lanes & ~(pick & done))), first.eq(take | (first & ~pick)),
                     at_adders.eq(pick | (at_adders & ~add)), at_sum.eq((add & ends) | (at_sum & ~give)),
                     o_valid.eq(give | (o_valid & ~self.o.ready))]
        with m.If(take):
            m.d.sync += last.eq(self.i.payload.last)
        with m.If(pick):
            m.d.sync += ends.eq(last & done)
        with m.If(add):
            m.d.sync += fresh.eq(ends)

        word = Signal(Concentrator.members(config)["word"].shape, reset_less=True)
        nonzero = Signal(Concentrator.members(config)["nonzero"].shape)
        incoming = self.i.payload.word
        with m.If(take):
            m.d.sync += [word[g][k].eq(Cat(incoming[g * b.group + c][k] for c in range(b.group)))
                         for g in range(b.stream_groups) for k in range(sizes.operand.bits)]
        for g in range(b.stream_groups):
            any_bit = 0
            for k in range(sizes.operand.bits):
                any_bit = any_bit | word[g][k]
            m.d.comb += nonzero[g].eq(any_bit)

        ir = Signal.like(self.o.payload.ir, reset_less=True)
        saturated = Signal.like(self.o.payload.saturated, reset_less=True)
        for n, s in enumerate(slices):
            block, m_ = divmod(n, b.slices)
            decoder = decoders[block]
            m.d.comb += [
                s.write.eq(decoder.write[m_]), s.write_address.eq(Cat(decoder.row, half)),
                s.write_map.eq(decoder.map), s.write_sign.eq(decoder.sign),
                s.read.eq(take), s.read_address.eq(Cat(self.i.payload.row, self.i.payload.half)),
                s.word.eq(word), s.nonzero.eq(nonzero), s.first.eq(first), s.pick.eq(pick), s.add.eq(add),
                s.fresh.eq(fresh)]
            with m.If(give):
                m.d.sync += ir[n].eq(s.ir)
        with m.If(give):
            m.d.sync += saturated.eq(tree_sum([s.saturated for s in slices]))
        m.d.comb += [self.o.valid.eq(o_valid), self.o.payload.ir.eq(ir), self.o.payload.saturated.eq(saturated),
                     self.busy.eq(at_lanes | at_adders | at_sum | o_valid | ~fresh)]
        return m
