"""Coefficients of one block: from two-level maps as they lie in memory to rows as the concentrators read them."""
from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.memory.ram import Ram


def _log2(power):
    return power.bit_length() - 1


class MapDecoder(wiring.Component):
    """Expands one block's segment (docs/basis.md, "Map coefficients") to rows of coefficients.

    For stream word ``row`` of slice m, ``map`` and ``sign`` have a bit for each of its ``stream_groups`` x ``group``
    channel positions; ``write`` bit m says that they are to be written. A row is written again with each of its present
    groups, the last time complete; before a segment every row of its pixels is written once with zeros, in all slices
    at once, so that absent groups cost nothing.

    Flow control: ``start`` for one cycle, while ``done``, samples ``groups`` (1 .. coefficient_groups); then the beats
    that hold words of the segment come on ``beat``, the last one with ``last``. Words of other segments may lie before
    the place ``begin`` of the segment's first word in the first beat and behind the place ``end`` of its last word in
    the last one; in other beats these two mean nothing. `fifo_beats` of them wait inside, so that the beats of other
    blocks can be delivered meanwhile; ``beat.ready`` comes from a register.
    Latency: R = ceil(groups / stream_groups) cycles for the zeros, from the cycle behind ``start`` on; then one
    ``group``-bit word per cycle, the first at the earliest in the second cycle behind the transfer of its beat;
    ``done`` in the cycle behind the last word, which is that of the last write.
    Throughput: one ``group``-bit word per cycle, across beats, slices and rows.
    Errors: ``error`` (held until reset; nothing more is written) for a level-1 bit at or beyond ``groups``, an empty
    level-2 map, and maps that end before or go on behind the segment's last word. Signs left over are not looked at.
    No row beyond those of ``groups`` is ever written.
    Parameters: config (spec.config.Config) with coefficients "maps".
    """

    #: Beats that wait inside.
    fifo_beats = 32

    @staticmethod
    def members(config):
        """Signature members."""
        b = config.basis
        row = data.ArrayLayout(b.group, b.stream_groups)
        place = range(config.bus.data_bits // b.group)
        return {
            "start": In(1), "groups": In(8),
            "beat": In(stream.Signature(data.StructLayout({
                "data": config.bus.data_bits, "begin": place, "end": place, "last": 1}))),
            "write": Out(b.slices), "row": Out(range(b.coefficient_rows)), "map": Out(row), "sign": Out(row),
            "done": Out(1), "error": Out(1)}

    def __init__(self, *, config):
        self._config = config
        super().__init__(self.members(config))

    def _build_fifo(self, m, *, take):
        """Beats in a RAM whose output register is the beat at hand; ``take`` frees it. Returns (beat, its valid, put):
        ``put`` says that a beat enters.
        """
        beat = data.StructLayout({"data": self._config.bus.data_bits, "last": 1})
        width, depth = beat.size, self.fifo_beats
        m.submodules.fifo = ram = Ram(width=width, depth=depth)
        head, tail, level = Signal(range(depth)), Signal(range(depth)), Signal(range(depth + 1))
        valid = Signal()
        put, get = Signal(), Signal()
        m.d.comb += [
            self.beat.ready.eq(level != depth), put.eq(self.beat.valid & self.beat.ready),
            get.eq((level != 0) & (~valid | take)),
            ram.write_en.eq(put), ram.write_address.eq(tail),
            ram.write_data.eq(Cat(self.beat.payload.data, self.beat.payload.last)),
            ram.read_en.eq(get), ram.read_address.eq(head)]
        m.d.sync += [head.eq(head + get), tail.eq(tail + put), level.eq(level + put - get),
                     valid.eq(get | (valid & ~take))]
        return data.View(beat, ram.read_data), valid, put

    def _build_signs(self, m, *, level2, word, has_word, count, use):
        """Signs of the non-zeros of ``level2``, each at its position; ``left`` is the number that wait beforehand.

        ``use``: they are used up in this cycle; ``has_word``: ``word`` brings new ones behind those that wait.
        """
        group = self._config.basis.group
        left, waiting = Signal(range(group)), Signal(group - 1)
        queue, rest = Signal(2 * group - 1), Signal(2 * group - 1)
        signs = Signal(group)
        m.d.comb += [queue.eq(waiting | (Mux(has_word, word, 0) << left)), rest.eq(queue >> count)]
        ahead = 0                       # non-zeros at lower positions
        for c in range(group):
            m.d.comb += signs[c].eq(level2[c] & (queue[:c + 1].bit_select(ahead, 1) if c else queue[0]))
            further = Signal(range(c + 2), name=f"ahead{c + 1}")
            m.d.comb += further.eq(ahead + level2[c])
            ahead = further
        m.d.comb += count.eq(ahead)
        with m.If(use):
            m.d.sync += [waiting.eq(rest), left.eq(left - count + Mux(has_word, group, 0))]
        with m.If(self.start):
            m.d.sync += [waiting.eq(0), left.eq(0)]
        return signs, left

    def elaborate(self, platform):
        m = Module()
        config, b = self._config, self._config.basis
        group, words = b.group, config.bus.data_bits // b.group

        # the word at hand; places of the first and the last one are kept when their beats enter the FIFO
        wants, taken, drop = Signal(), Signal(), Signal()
        at, end, entered = Signal(range(words)), Signal(range(words)), Signal()
        beat, valid, put = self._build_fifo(m, take=drop)
        word, is_last = Signal(group), Signal()
        m.d.comb += [word.eq(beat.data.word_select(at, group)), taken.eq(wants & valid),
                     is_last.eq(beat.last & (at == end)), drop.eq(taken & (is_last | (at == words - 1)))]
        with m.If(taken):
            m.d.sync += at.eq(at + 1)               # 0 again with the next beat: ``words`` is a power of two
        with m.If(put):
            m.d.sync += [entered.eq(1), end.eq(self.beat.payload.end)]
            with m.If(~entered):
                m.d.sync += at.eq(self.beat.payload.begin)
        with m.If(self.start):
            m.d.sync += entered.eq(0)

        # where we are: slice, run of ``group`` channel groups, its present groups that are still to come
        groups, remaining = Signal(8), Signal(8)                # channel groups of the pixel; from this run on
        slice_, run = Signal(range(max(b.slices, 2))), Signal(8 - _log2(group))
        present, lowest = Signal(group), Signal(_log2(group))
        for g in reversed(range(group)):
            with m.If(present[g]):
                m.d.comb += lowest.eq(g)
        others = Signal(group)
        m.d.comb += others.eq(present & (present - 1))
        number = Cat(lowest, run)                               # of the channel group
        row, place = number[_log2(b.stream_groups):][:len(self.row)], number[:_log2(b.stream_groups)]

        # one channel group: its map, and its signs if enough of them wait or when they come
        is_sign, complete = Signal(), Signal()
        kept, level2 = Signal(group), Signal(group)
        count = Signal(range(group + 1))
        m.d.comb += level2.eq(Mux(is_sign, kept, word))
        signs, left = self._build_signs(m, level2=level2, word=word, has_word=is_sign, count=count, use=complete)

        # its row, written in the next cycle; a row that begins forgets what the one before had
        new_row, write, write_slice = Signal(), Signal(), Signal.like(slice_)
        row_now = Signal.like(self.row)
        clearing = Signal()
        m.d.comb += [new_row.eq((row_now != row) | (write_slice != slice_)), self.row.eq(row_now),
                     self.write.eq(Mux(clearing, -1, write << write_slice))]
        m.d.sync += write.eq(complete)
        for p in range(b.stream_groups):
            held = Signal(2 * group, name=f"coefficients{p}")
            m.d.comb += [self.map[p].eq(held[:group]), self.sign[p].eq(held[group:])]
            with m.If(self.start | (complete & new_row)):
                m.d.sync += held.eq(0)
            with m.If(complete & (place == p)):
                m.d.sync += held.eq(Cat(level2, signs))
        with m.If(complete):
            m.d.sync += [row_now.eq(row), write_slice.eq(slice_)]

        run_ends, last_run, finishes, wrong = Signal(), Signal(), Signal(), Signal()
        at_level1 = Signal()
        m.d.comb += [run_ends.eq((at_level1 & taken & (word == 0)) | (complete & (others == 0))),
                     last_run.eq(remaining <= group),
                     finishes.eq(run_ends & last_run & (slice_ == b.slices - 1))]
        with m.If(complete):
            m.d.sync += present.eq(others)
        with m.If(run_ends):
            with m.If(last_run):
                m.d.sync += [slice_.eq(slice_ + 1), run.eq(0), remaining.eq(groups)]
            with m.Else():
                m.d.sync += [run.eq(run + 1), remaining.eq(remaining - group)]

        def go(state):
            """The state behind a word, unless the segment ends with it, rightly or wrongly."""
            m.next = state
            with m.If(run_ends):
                m.next = "LEVEL1"
            with m.If(finishes):
                m.next = "DONE"
            with m.If(wrong | (finishes != is_last)):
                m.next = "STOP"

        with m.FSM():
            with m.State("DONE"):
                m.d.comb += self.done.eq(1)
                with m.If(self.start):
                    m.d.sync += [groups.eq(self.groups), remaining.eq(self.groups), slice_.eq(0), run.eq(0),
                                 row_now.eq(0)]
                    m.next = "CLEAR"
            with m.State("CLEAR"):
                m.d.comb += clearing.eq(1)
                m.d.sync += row_now.eq(row_now + 1)
                with m.If((row_now + 1) * b.stream_groups >= groups):
                    m.next = "LEVEL1"
            with m.State("LEVEL1"):
                m.d.comb += [wants.eq(1), at_level1.eq(1),
                             wrong.eq(Cat(word[g] & (remaining <= g) for g in range(group)).any())]
                with m.If(taken):
                    m.d.sync += present.eq(word)
                    go("LEVEL2")
            with m.State("LEVEL2"):
                m.d.comb += [wants.eq(1), complete.eq(taken & (count <= left)), wrong.eq(word == 0)]
                with m.If(taken):
                    m.d.sync += kept.eq(word)
                    with m.If(complete):
                        go("LEVEL2")
                    with m.Else():
                        go("SIGNS")
            with m.State("SIGNS"):
                m.d.comb += [wants.eq(1), is_sign.eq(1), complete.eq(taken)]
                with m.If(taken):
                    go("LEVEL2")
            with m.State("STOP"):
                m.d.comb += self.error.eq(1)
        return m
