"""Cycles of the basis engine: EXECUTE_BASIS for `golden.cycles`.

As there, every part does one thing after another, so the time of each event is the largest of a few earlier times plus
constants. The parts are coroutines, each of which runs until it needs a time that is not known yet:

* **Loader**: 2 cycles from its acceptance a pass may load taps, when the half it fills is not used any more, then
  coefficients, then it is offered; it goes when the streamer has issued the pass before and fewer than 2 passes wait.
* **Issue** (streamer): a word per cycle, as long as the last of its two registers is free or taken; a cycle for each
  row that no kernel row needs. A pass that goes as the last word of the one before is issued leaves no gap.
* **Entry**: words leave the streamer into the coefficient stage or the queue of direct values. Series: three registers
  that move together, so that a pixel leaves three moves behind its last word; they stand while a pixel meets a full
  queue. Maps: a word stays for its cycles; adders, sum and output register behind it hold one pixel each.
* **Multiply**: values are pushed into the window ahead of their use; an output takes its micro-steps one after the
  other as soon as what it needs has been pushed, and each output that ends makes room for ``stride`` pushes.

The grain is the pixel; POINTWISE passes are closed forms. Times are cycles from the start of the program.
"""
from collections import deque
from functools import cached_property

import numpy as np

from spec.derive import Sizes, ceil_div
from spec.isa import SERIES_TERMS, Mode

#: From the acceptance of a pass to its first load or offer; a load's cycles beside its beats.
LOADER_CHECK, LOADER_LOAD = 2, 3
#: From the issue of a word to the last register of the streamer.
STREAM = 2
#: Series: from a pixel's last word in the stage to its sum on offer.
SERIES_STAGE = 3
#: Maps: from a word to the first cycle of its lanes, from there to the adders, to the sum, to the output register.
MAP_LANES, MAP_ADD, MAP_SUM, MAP_OUTPUT = 1, 1, 1, 1
#: Passes between the loader and the multipliers.
PASSES = 2
#: From a micro-step to its sum in the accumulators; the tokens are there a cycle later.
MULTIPLY_LATENCY = 4
#: Loading of maps: beats that wait in a decoder.
DECODER_BEATS = 32

#: An empty slot of the pipelines; far enough in the past not to matter.
_PAST = -(1 << 60)


class Geometry:
    """What the engine does for an EXECUTE_BASIS, from its fields alone; equal for all passes of a shape.

    ``runs``: [(rows before that nobody needs, micro-steps of an output in each of the rows that follow one another)];
    ``behind``: rows behind the last that nobody needs. ``words``: stream words of a pixel; ``parts``: values that each
    word of a pixel gives without the coefficient stage, None for DECOMPOSED. ``steps``: micro-steps.
    """

    def __init__(self, config, f):
        b, z = config.basis, Sizes(config)
        self.mode = Mode(f["mode"])
        pointwise = self.mode is Mode.POINTWISE
        span = (f["kernel_cols"] - 1) * f["dilation_cols"] + 1
        self.reach, self.stride, self.cols = span - f["pad_left"], 1 << f["stride_cols_log2"], f["out_cols"]
        self.row_pushes = (self.cols - 1) * self.stride + self.reach
        self.spare = b.window - span
        self.streamed = f["in_cols"] if pointwise else min(f["in_cols"], self.row_pushes)
        self.groups = f["groups"]
        chunks = self.groups if pointwise else ceil_div(f["kernel_cols"], b.multipliers)
        source = (np.arange(f["out_rows"])[:, None] << f["stride_rows_log2"]) - f["pad_top"] \
            + np.arange(f["kernel_rows"]) * f["dilation_rows"]
        uses = np.bincount(source[(source >= 0) & (source < f["in_rows"])], minlength=f["in_rows"]) * chunks
        self.runs, skipped = [], 0
        for n in uses.tolist():
            if not n:
                skipped += 1
            elif skipped or not self.runs:
                self.runs.append((skipped, [n]))
                skipped = 0
            else:
                self.runs[-1][1].append(n)
        self.behind, self.in_rows = skipped, f["in_rows"]
        self.steps = int(uses.sum()) * self.cols
        self.parts = None
        if self.mode is Mode.DENSE:
            self.parts = [1]
        elif pointwise:
            whole, rest = divmod(self.groups, b.stream_groups)
            self.parts = [b.stream_groups] * whole + [rest] * (rest > 0)
        if self.parts is not None:
            self.words = len(self.parts)
        elif b.coefficients == "series":
            terms = [f["n_log2"] >> 3 * t & 7 for t in range(min(f["terms"], SERIES_TERMS))]
            self.words = sum(ceil_div(self.groups, z.series_fetch(1 << n)) for n in terms)
        else:
            self.words = ceil_div(self.groups, b.stream_groups)

    @property
    def decomposed(self):
        """Whether the coefficient stage works."""
        return self.parts is None

    @cached_property
    def part_ends(self):
        """Values of a pixel up to each of its words."""
        return np.cumsum(self.parts).tolist()


def segment_words(data, config):
    """Words of each block's segment of map coefficients. Args: data: uint8 [beats, beat bytes], as in memory."""
    return tuple(data[:Sizes(config).segment_table_beats].reshape(-1).view("<u2")[:config.basis.blocks].tolist())


class _Word:
    """A stream word: issued at ``a``, on offer from ``c`` on, gone at ``e`` (None: not known yet)."""

    __slots__ = ("a", "c", "e", "geometry", "number", "cost")

    def __init__(self, a, geometry, number, cost):
        self.a, self.c, self.e, self.geometry, self.number, self.cost = a, None, None, geometry, number, cost


class _Bulk:
    """Words ``first .. last - 1`` of a run, each right behind the one before; ``e``: when the last is gone."""

    __slots__ = ("e", "geometry", "first", "last", "cost")

    def __init__(self, geometry, first, last, cost):
        self.e, self.geometry, self.first, self.last, self.cost = None, geometry, first, last, cost


class _Pass:
    """An EXECUTE_BASIS on its way through the engine."""

    __slots__ = ("i", "g", "shown", "begin", "tap_half", "half", "last_word", "cost")

    def __init__(self, i, shown, begin, cost):
        self.i, self.g, self.shown, self.begin, self.cost = i, i.geometry, shown, begin, cost
        self.tap_half = self.half = 0
        self.last_word = None


class BasisEngine:
    """All passes of a run.

    Args: config. waiting: gives for an instruction the time of its token of the store unit, 0 if it wants none, None if
        that is not known; asked in order, until it is known. finish: called with (instruction, first cycle in which the
        engine has nothing left to do with it), in order. count: dict of counters, added to.
    """

    def __init__(self, config, *, waiting, finish, count):
        b = config.basis
        self.config, self.sizes = config, Sizes(config)
        self.waiting, self.finish, self.count = waiting, finish, count
        self.depth = b.fifo_depth
        #: From the write into a queue to the value being on offer.
        self.shown = 1 if b.fifo_depth == 2 else 2
        self.maps = b.coefficients == "maps"
        self.passes = []
        #: Times of each pass: gone from the loader, last slot issued, taken by the multipliers, last micro-step.
        self.gone, self.issued, self.taken, self.done = [], [], [], []
        #: Words and bulks between issue and entry.
        self.chunks = deque()
        # the coefficient stage: entry of each pixel's last word, moves behind the one before; when it left
        self.entered, self.behind, self.left = [], [], []
        self.popped = []
        self.passed, self.stalled, self.last_move = 0, 0, _PAST
        # maps: words at the lanes (when, cycles, the pixel's last), last cycle of those that left, last addition, for
        # each pixel its last addition and when the sum was handed on
        self.lanes, self.pick, self.added, self.ended, self.given = deque(), _PAST, _PAST, [], []
        # values that do not pass the coefficient stage
        self.direct_left, self.direct_popped = [], []
        self.drain = self._drain_maps if self.maps else self._drain
        self.moved = False
        #: Cycles whose cause is known: multipliers at work, or waiting for a token.
        self.intervals = deque(maxlen=2 * (PASSES + 3))
        self.loads = {}
        self.parts = [self._load(), self._issue(), self._enter(), self._multiply()]

    # -- from outside --------------------------------------------------------------------------------------------------
    def loader_free(self):
        """When the loader can take the next pass; None if not known."""
        n = len(self.passes)
        return (self.gone[-1] + 1 if n else 0) if len(self.gone) == n else None

    def accept(self, i, *, shown, begin, word_cycles=None):
        """A pass enters the loader at ``begin``; without the token that it waits for it would have at ``shown``.

        ``i``: its instruction: fields ``f``, ``geometry``, with maps ``segments`` (`segment_words`). ``word_cycles``:
        cycles of its stream words [rows, columns, words]; None: one each.
        """
        g = i.geometry
        cost = None
        if self.maps and g.decomposed and word_cycles is not None:
            cost = np.asarray(word_cycles).reshape(-1)
        p = _Pass(i, shown, begin, cost)
        before = self.passes[-1] if self.passes else None
        if before is not None:
            p.tap_half, p.half = before.tap_half, before.half
        p.tap_half ^= i.f["taps"] != 0
        p.half ^= i.f["coefficients"] != 0
        self.passes.append(p)

    def busy(self):
        """Whether some pass has not ended."""
        return len(self.done) < len(self.passes)

    def advance(self):
        """Every part as far as times are known; True if there was something to do."""
        if not self.busy() and not self.chunks:
            return False
        any_moved = False
        while True:
            self.moved = False
            for part in self.parts:
                next(part)
            if not self.moved:
                return any_moved
            any_moved = True

    # -- loader --------------------------------------------------------------------------------------------------------
    def _load(self):
        last_tap, last_half = [None, None], [[], []]
        n = 0
        while True:
            while len(self.passes) == n:
                yield
            p, z = self.passes[n], self.sizes
            f, at = p.i.f, p.begin + LOADER_CHECK
            if f["taps"]:
                user = last_tap[p.tap_half]
                if user is not None:
                    while len(self.done) <= user:
                        yield
                    at = max(at, self.done[user] + 1)
                at += f["taps"] * z.tap_row_beats + LOADER_LOAD
            if f["coefficients"]:
                for user in last_half[p.half]:
                    other = self.passes[user]
                    while len(self.issued) <= user or other.last_word is not None and other.last_word.e is None:
                        yield
                    at = max(at, self.issued[user] + 1)
                    if other.last_word is not None:
                        at = max(at, other.last_word.e + 1)
                last_half[p.half] = []
                at = self._load_maps(p, at) if self.maps else at + f["coefficients"] + LOADER_LOAD
            last_tap[p.tap_half] = n
            if p.g.decomposed:
                last_half[p.half] = [n]
            if n:
                while len(self.issued) < n:
                    yield
                at = max(at, self.issued[n - 1])
            if n >= PASSES:
                while len(self.taken) <= n - PASSES:
                    yield
                at = max(at, self.taken[n - PASSES] + 1)
            self.gone.append(at)
            self.moved = True
            n += 1

    def _load_maps(self, p, start):
        """When the pass can be offered, from the cycle in which the load of its coefficients starts.

        After the segment table, a beat goes to a decoder in each cycle, one that holds words of several segments to one
        after the other. A decoder first clears the rows, then takes a word per cycle, a cycle behind its queue.
        """
        b, z = self.config.basis, self.sizes
        if (key := (p.g.groups, p.i.segments)) in self.loads:
            return start + self.loads[key]
        per, clear = self.config.bus.data_bits // b.group, ceil_div(p.g.groups, b.stream_groups)
        put, end, first = 1 + z.segment_table_beats, 0, 0
        for words in p.i.segments:
            got, dropped, last = [], clear, first + words   # got: beats that left the queue; dropped: last word taken
            while first < last:
                n = min(per - first % per, last - first)
                room = got[-DECODER_BEATS] + 1 if len(got) >= DECODER_BEATS else 0
                put = max(put + 1, room)
                got.append(max(put + 1, dropped) if got else put + 1)
                dropped = max(got[-1], dropped) + n
                first += n
            end = max(end, dropped + 1)
        self.loads[key] = max(end, put + 1) + 2
        return start + self.loads[key]

    # -- streamer: issue -----------------------------------------------------------------------------------------------
    def _slot(self, wish, w2, w1):
        """First cycle from ``wish`` on in which the streamer moves; ``w2``, ``w1``: the words issued last."""
        for w in (w2, w1):
            if w is None:
                continue
            while w.c is None and wish >= w.a + STREAM or w.c is not None and wish >= w.c and w.e is None:
                yield
            if w.c is not None and w.c <= wish < w.e:
                wish = w.e
        return wish

    def _issue(self):
        n, w2, w1 = 0, None, None
        chunks = self.chunks
        while True:
            while len(self.gone) == n:
                yield
            p = self.passes[n]
            g, cost, wish = p.g, p.cost, self.gone[n] + 1
            begin = 0                                       # number of the run's first word
            at = wish - 1
            for skipped, rows in g.runs:
                for _ in range(skipped):
                    at = yield from self._slot(at + 1, w2, w1)
                words = len(rows) * g.streamed * g.words
                at = yield from self._slot(at + 1, w2, w1)
                w2, w1 = w1, _Word(at, g, begin, cost)
                chunks.append(w1)
                self.moved = True
                if words == 2:
                    at = yield from self._slot(at + 1, w2, w1)
                    w2, w1 = w1, _Word(at, g, begin + 1, cost)
                    chunks.append(w1)
                elif words > 2:
                    before = w1
                    if words > 3:
                        before = _Bulk(g, begin + 1, begin + words - 2, cost)
                        chunks.append(before)
                    w2, w1 = _Word(_PAST, g, begin + words - 2, cost), _Word(_PAST, g, begin + words - 1, cost)
                    chunks.append(w2)
                    chunks.append(w1)
                    while before.e is None:
                        yield
                    at = before.e
                    w1.a = at
                self.moved = True
                begin += words
                p.last_word = w1
            for _ in range(g.behind):
                at = yield from self._slot(at + 1, w2, w1)
            self.issued.append(at)
            self.moved = True
            n += 1

    # -- streamer: words into the stage, or past it --------------------------------------------------------------------
    def _enter(self):
        chunks, before = self.chunks, _PAST                 # before: when the last word was gone
        while True:
            while not chunks:
                self.drain()
                yield
            chunk = chunks[0]
            g = chunk.geometry
            if type(chunk) is _Word:
                chunk.c = max(chunk.a + STREAM, before + 1)
                begin, first, last = chunk.c, chunk.number, chunk.number + 1
            else:
                begin, first, last = before + 1, chunk.first, chunk.last
            self.moved = True
            if not g.decomposed:
                before = yield from self._enter_direct(g, begin, first, last)
            elif self.maps:
                before = yield from self._enter_maps(g, begin, first, last, chunk.cost)
            else:
                before = yield from self._enter_series(g, begin, first, last)
            chunk.e = before
            chunks.popleft()
            self.moved = True

    def _enter_direct(self, g, at, first, last):
        """Values ``parts`` of each word, one per cycle, into the queue."""
        left, popped, depth = self.direct_left, self.direct_popped, self.depth
        ends = g.part_ends

        def number(word):
            """Values of the run before a word."""
            pixel, part = divmod(word, g.words)
            return pixel * ends[-1] + (ends[part - 1] if part else 0)
        todo = number(last) - number(first)
        at -= 1
        while todo:
            n = len(left)
            known = min(todo, len(popped) + depth - n)
            if known <= 0:
                yield
                continue
            if known < 16:
                for k in range(n, n + known):
                    at += 1
                    if k >= depth and popped[k - depth] >= at:
                        at = popped[k - depth] + 1
                    left.append(at)
            else:
                offset = np.arange(known)
                low = np.zeros(known, np.int64)
                skip = max(0, depth - n)
                room = np.array(popped[n + skip - depth:n + known - depth], np.int64) + 1
                low[skip:] = room
                times = np.maximum(np.maximum.accumulate(low - offset), at + 1) + offset
                left.extend(times.tolist())
                at = left[-1]
            todo -= known
            self.moved = True
        return at

    def _drain(self):
        """Pixels that leave the series stage, as far as the queue's room is known."""
        entered, left = self.entered, self.left
        popped, behind, depth = self.popped, self.behind, self.depth
        n, known, stop = len(left), len(popped) + depth, len(entered)
        before = left[-1] if n else _PAST
        while n < stop and n < known:
            at = max(entered[n] + SERIES_STAGE, before + behind[n])
            if n >= depth and popped[n - depth] >= at:
                at = popped[n - depth] + 1
            left.append(at)
            before = at
            n += 1
            self.moved = True

    def _base(self, r):
        """When pixel ``r`` is on offer at the end of the series stage; the one before has left."""
        return max(self.entered[r] + SERIES_STAGE, (self.left[r - 1] if r else _PAST) + self.behind[r])

    def _enter_series(self, g, at, first, last):
        """Words of a run into the three registers, which stand while a pixel cannot leave."""
        words, entered, behind, left = g.words, self.entered, self.behind, self.left
        number, moves = first, 1
        at -= 1
        gap = first + 1 == last                             # a single word may come while the stage stands
        while number < last:
            # up to the pixel's last word, or to the last of these
            step = min(words - number % words, last - number)
            at += step
            while self.passed < len(entered):
                r = self.passed
                base = self._base(r)
                if at < base:
                    break
                if len(left) <= r:
                    self._drain()
                    while len(left) <= r:
                        yield
                        self._drain()
                    self.moved = True
                stood = left[r] - base
                if stood:
                    at = max(at, left[r]) if gap else at + stood
                    self.stalled += stood
                self.passed += 1
            number += step
            if number % words == 0:
                moves = at - self.stalled
                entered.append(at)
                behind.append(min(moves - self.last_move, SERIES_STAGE))
                self.last_move = moves
                self.moved = True
        self._drain()
        return at

    def _enter_maps(self, g, at, first, last, cost):
        """Words of a run to the lanes, each as the one before has its last cycle there."""
        words, lanes = g.words, self.lanes
        at -= 1
        for number in range(first, last):
            while True:
                if not lanes:
                    free = self.pick
                    break
                if len(lanes) == 1 and lanes[0][1] == 1:
                    free = max(lanes[0][0] + MAP_LANES, self.added)
                    break
                self._drain_maps()
                if len(lanes) > 1 or lanes and lanes[0][1] > 1:
                    yield
            at = max(at + 1, free)
            lanes.append((at, 1 if cost is None else int(cost[number]), number % words == words - 1))
            self.moved = True
        self._drain_maps()
        return at

    def _drain_maps(self):
        """What is behind the lanes, as far as it is known: adders, sum, output register, queue."""
        lanes, ended, given, left = self.lanes, self.ended, self.given, self.left
        popped, depth = self.popped, self.depth
        known = len(popped) + depth
        while True:
            n, k, moved = len(given), len(left), False
            if n < len(ended) and k >= n:
                given.append(max(ended[n] + MAP_SUM, left[n - 1] if n else _PAST))
                n, moved = n + 1, True
            if k < n and k < known:
                left.append(max(given[k] + MAP_OUTPUT, popped[k - depth] + 1 if k >= depth else _PAST))
                moved = True
            if lanes and n == len(ended):
                at, picks, ends = lanes.popleft()
                pick = max(at + MAP_LANES, self.added)
                # nothing is added before the sum of the pixel before has been handed on
                added = max(pick + MAP_ADD, given[-1] if given else _PAST)
                self.pick = pick if picks == 1 else added + picks - 2
                self.added = added + picks - 1
                if ends:
                    ended.append(self.added)
                moved = True
            if not moved:
                return
            self.moved = True

    # -- multipliers ---------------------------------------------------------------------------------------------------
    def _multiply(self):
        n, before = 0, _PAST
        while True:
            while len(self.gone) == n:
                yield
            p = self.passes[n]
            token = self.waiting(p.i)
            while token is None:
                yield
                token = self.waiting(p.i)
            taken = max(self.gone[n] + 1, before, token)
            self.taken.append(taken)
            self.moved = True
            if p.g.mode is Mode.POINTWISE:
                done = yield from self._pointwise(p.g, taken + 1)
            else:
                done = yield from self._rows(p.g, taken + 1)
            self.done.append(done)
            self.moved = True
            self._account(n, before, token)
            self.finish(p.i, done + MULTIPLY_LATENCY + 1)
            before = done
            n += 1

    def _pointwise(self, g, at):
        """A value per micro-step, each pushed as the one before is used.

        Once the first is there, all are in time: a queue with room for two gives a value per cycle.
        """
        left, popped = self.direct_left, self.direct_popped
        n = len(popped)
        while len(left) <= n:
            yield
        push = max(at, left[n] + self.shown)
        if g.cols > 1:
            count = g.in_rows * g.cols * g.groups
            popped.extend(range(push, push + count))
            return push + count
        for row in range(g.in_rows):                        # a cycle without micro-step behind a row of one output
            popped.append(push)
            push += 1 + (row > 0)
            popped.extend(range(push, push + g.groups - 1))
            push += g.groups - 1
        return push

    def _rows(self, g, at):
        """Rows of outputs behind a window; returns the pass's last cycle."""
        popped, left = (self.popped, self.left) if g.decomposed else (self.direct_popped, self.direct_left)
        shown, spare, cols, stride, reach, streamed = self.shown, g.spare, g.cols, g.stride, g.reach, g.streamed
        hold = cols == 1
        popped_n, left_n = len(popped), len(left)
        for skipped, rows in g.runs:
            at += skipped                                   # the cycle in which the run's first row begins
            push, end = at - 1, at                          # of the last value pushed, of the last output
            ends, passed, needed = [], 0, reach             # the window: outputs that have ended, what the next needs
            pushed, begins = 0, at                          # when a row's first value may come
            for row, steps in enumerate(rows):
                if push + 1 < begins:
                    push = begins - 1
                begins, in_row = end + 1, 0                 # the next one's: while this row is at work
                for col in range(cols):
                    for _ in range(stride if col else reach):
                        push += 1
                        while needed <= pushed - spare:
                            if ends[passed] > push:
                                push = ends[passed]
                            passed += 1
                            needed += stride if passed % cols else reach
                        if in_row < streamed:
                            if left_n <= popped_n:
                                while len(left) <= popped_n:
                                    yield
                                left_n = len(left)
                                self.moved = True
                            ready = left[popped_n] + shown
                            if ready > push:
                                push = ready
                            popped.append(push)
                            popped_n += 1
                        pushed += 1
                        in_row += 1
                    end += 1 + (hold and row > 0)
                    if push >= end:
                        end = push + 1
                    end += steps - 1
                    ends.append(end)
            at = end
        return at + g.behind

    # -- counters ------------------------------------------------------------------------------------------------------
    def _account(self, n, before, token):
        """Give each cycle of pass ``n`` its cause: micro-step, missing values, token of the store unit, loader,
        token of the load unit, in this order. ``before``: last cycle of the pass before."""
        p, count, taken, done = self.passes[n], self.count, self.taken[n], self.done[n]
        self.intervals.append((taken + 1, done))
        count["EXECUTE_ISSUE"] += p.g.steps
        count["EXECUTE_WAIT_COEFFICIENTS"] += done - taken - p.g.steps
        first = max(before, self.gone[n]) + 1
        if token > first:
            self.intervals.append((first, token - 1))
            count["EXECUTE_WAIT_STORE"] += token - first
        for name, first, last in (("EXECUTE_WAIT_WEIGHTS", p.begin + 1, self.gone[n]),
                                  ("EXECUTE_WAIT_LOAD", p.shown, p.begin - 1)):
            count[name] += max(0, last - first + 1) - sum(
                max(0, min(last, b) - max(first, a) + 1) for a, b in self.intervals)
