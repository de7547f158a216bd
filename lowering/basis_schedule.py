"""Order of work in the first tile of a layer: which strips of which output groups run while its input is still coming.

Work on a strip can begin when its input rows and its output group's weights are on chip, and the load unit brings one
unit of input or one beat of weights per cycle. So the first strips are small, and each next one is about as large as
what arrives while those before are at work. A **level** is a part of the tile that has been loaded: its first rows, or of
the very first row the first columns. While the next level is loaded, further output groups begin with what is there;
a group that begins late does all levels so far in one strip. How large the first level is, how fast levels grow and how
many groups begin early is found by playing several choices through, load unit against engine (`Timeline`).
"""
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

from lowering.tiling import _spans
from spec.derive import ceil_div

#: First level as a part of a full strip's rows, and growth from one level to the next, that are tried.
FIRST_PARTS = (8, 4, 3, 2, 1)
GROWTHS = (1.5, 2, 3)
#: Where the columns of the first row are cut, in eighths of it.
COLUMN_CUTS = ((4,), (2,), (1,), (2, 4), (1, 4), (1, 2, 4), (1, 3), (2, 5))
#: Best choices with which the next question is asked.
KEPT = 5
#: Units of a plane in one transfer. Instructions come over the same bus behind the bursts that are under way, which take
#: a cycle per unit.
BURST_UNITS = 32
#: A transfer's instruction lies before the first item that wants its own so many cycles before the transfer's turn.
LEAD = 0
#: Transfers are requested at most so many items ahead of their use: each may be an outstanding token.
MOST_ITEMS_AHEAD = 64
#: Cycles: from the start to the first word on chip; beyond its words, of a transfer; from a transfer's last word to the
#: loader; of the loader beyond its beats; of a pass beyond its micro-steps; of a STORE beyond its pixels; from the last
#: STORE's last pixel to the end.
START, TRANSFER, TOKEN, LOADER, PASS, STORE, END = 44, 1, 4, 6, 3, 11, 32


@dataclass(frozen=True, kw_only=True)
class Step:
    """One item of the tile: image and bundle (places in the tile), output group, strip (row, rows, column, columns)."""

    image: int
    place: int
    group: int
    strip: tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What is loaded: rows ``begin .. end - 1`` of an image and bundle, of these ``cols`` columns from ``first_col`` on
    (all if 0); or, where ``group`` is not None, an output group's weights."""

    image: int = 0
    place: int = 0
    begin: int = 0
    end: int = 0
    first_col: int = 0
    cols: int = 0
    group: int | None = None


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The items of the first tile in order, and what is loaded before each of them."""

    steps: tuple[Step, ...]
    before: tuple[tuple[Transfer, ...], ...]
    #: Estimated cycles from the start until the last result is in memory, the engine is free, the load unit is free.
    cycles: int
    engine_cycles: int
    load_cycles: int
    #: The item from which on the load unit has nothing more to do for this tile.
    quiet: int


class Timeline:
    """Load unit, engine and store unit side by side, each doing one thing after the other.

    A pass begins when its operands are on chip, the pass before has ended, and the STORE of the second last item has
    left its bank. Its weights are loaded from the buffer while the pass before is at work.
    """

    def __init__(self):
        self.load = START
        self.begin = self.end = START
        self.stored = 0
        self.banks = [0, 0]
        self.number = 0
        #: Per item the time before which its instruction must be there; per transfer its begin.
        self.begins = []

    def transfer(self, words):
        """A transfer of so many cycles; returns when what it brings may be used."""
        self.load += words + TRANSFER
        return self.load + TOKEN

    def item(self, need, passes, pixels):
        """One strip of one output group; passes: (cycles, beats loaded from the buffer) each; need: when all is there."""
        self.begins.append(max(self.begin, need))
        for number, (cycles, beats) in enumerate(passes):
            ready = max(self.begin, need) + (beats + LOADER if beats else 3)
            begin = max(self.end, ready)
            if number == 0:
                begin = max(begin, self.banks[self.number % 2])
            self.begin, self.end = begin, begin + cycles + PASS
        self.stored = max(self.stored, self.end) + pixels + STORE
        self.banks[self.number % 2] = self.stored
        self.number += 1


@dataclass(frozen=True)
class _Level:
    """Rows done, and where that is 0 columns done of the first row; input rows and columns that must be there."""

    rows: int
    cols: int
    need_rows: int
    need_cols: int


class Scheduler:
    """Finds the `Schedule` of a plan's first tile.

    Args: tiler: `lowering.basis_tiling.BasisTiler`; plan: `BasisPlan` without schedule; rows, cols: `Window` of the first
        tile.
    """

    def __init__(self, tiler, plan, rows, cols):
        self.tiler, self.plan, self.rows, self.cols = tiler, plan, rows, cols
        self.job = tiler.job
        self.places = [(place, groups) for place, (_, groups) in enumerate(tiler.bundles[:plan.bundles])]
        self.images = 1 if plan.merged else plan.images
        #: Pixels of an item beyond those of its strip: merged, each image is one.
        self.merged_images = plan.images if plan.merged else 1
        self._known = {}

    # -- choices ------------------------------------------------------------------------------------------------------
    def best(self, count=1):
        """The ``count`` schedules that end first, the best one first.

        Heights of levels and groups that begin early are chosen together, then with the best of these the cuts of the
        first row, and with the best of those whether the very last strip is cut, so that its STORE is short.
        """
        choices = {}

        def add(heights, cuts, early, tail):
            key = heights, cuts, early, tail
            if key not in choices:
                choices[key] = self._play(self._levels(heights, cuts), early, tail)

        def kept():
            return sorted(choices, key=lambda key: choices[key].cycles)[:KEPT]

        for heights in self._heights():
            for early in self._early():
                add(heights, (), early, False)
        if self._cuttable():
            for heights, _, early, _ in kept():
                for cuts in COLUMN_CUTS if heights[0] == 1 else ():
                    add(heights, cuts, early, False)
        for heights, cuts, early, _ in kept():
            add(heights, cuts, early, True)
        return sorted(choices.values(), key=lambda schedule: schedule.cycles)[:count]

    def simple(self):
        """The `Schedule` without small strips: a bound from which plans are compared."""
        rows = self.rows.count
        return self._play(self._levels([n for _, n in _spans(rows, self.plan.strip_rows)]), len(self.places[0][1]))

    def _early(self):
        """Most output groups that begin before all input is there."""
        count = len(self.places[0][1])
        if not self.plan.strips_first:
            return [1]
        return sorted({count, *(max(1, count * k // 8) for k in (1, 2, 3, 4, 6))}, reverse=True)

    def _heights(self):
        """Rows of the levels."""
        total, most = self.rows.count, self.plan.strip_rows
        lists = set()
        for part in FIRST_PARTS:
            for growth in GROWTHS:
                heights, size = [], ceil_div(most, part)
                while sum(heights) < total:
                    heights.append(min(size, most, total - sum(heights)))
                    size = max(size + 1, int(size * growth))
                lists.add(tuple(heights))
        # what is left over at the end may as well lie further ahead
        lists |= {tuple(sorted(heights)) for heights in lists}
        return sorted(lists)

    def _cuttable(self):
        """Whether columns of the first row may be loaded by themselves."""
        return not self.job.border and not self.plan.merged and self.plan.strip_cols >= self.cols.count

    def _levels(self, heights, cuts=()):
        first, out, done = self.rows.first, [], 0
        need = self.tiler.rows_needed(self.rows, first, heights[0])
        width = self.cols.count
        for x in sorted({ceil_div(width * cut, 8) for cut in cuts} - {width}):
            out.append(_Level(0, x, need, self.tiler.columns_needed(self.cols, self.cols.first, x)))
        for height in heights:
            done += height
            out.append(_Level(done, 0, self.tiler.rows_needed(self.rows, first, done), self.cols.data))
        return out

    # -- play -----------------------------------------------------------------------------------------------------------
    def _play(self, levels, early, tail=False):
        time, steps, marks = Timeline(), [], []
        state = {"held": None, "last": None}
        weights_there = {}

        def load(transfer, words):
            flush()
            marks.append((time.load, len(steps), transfer))
            return time.transfer(words)

        def load_weights(group):
            passes = self.job.passes[group]
            if passes not in weights_there:
                words = self.tiler.fresh_beats(group, not weights_there)
                weights_there[passes] = load(Transfer(group=group), words) if words else 0
                if len(weights_there) == 1:
                    time.transfer(self.tiler.parameter_beats)
            return weights_there[passes]

        def run(image, place, group, strips, need):
            need = max(need, load_weights(group))
            for strip in strips:
                flush()
                state["last"] = image, place, group, strip, need

        def flush(cut=False):
            """Play the item that came last; ``cut``: in two parts."""
            if state["last"] is None:
                return
            image, place, group, (y, n, x, m), need = state["last"]
            state["last"] = None
            part = ceil_div(n, 4) if cut and n > 1 else 0
            for strip in ((y, n - part, x, m), (y + n - part, part, x, m))[:1 + bool(part)]:
                steps.append(Step(image=image, place=place, group=group, strip=strip))
                pixels = strip[1] * strip[3] * self.merged_images
                time.item(need, self._passes(group, strip, state["held"]), pixels)
                state["held"] = self.job.passes[group]
                if self.job.residual is not None:
                    time.transfer(pixels)

        def load_level(image, place, level, before):
            """Bring what a level has beyond the one before it."""
            grain = max(1, BURST_UNITS // max(1, self.cols.data))
            begin, left = (before.need_rows, before.need_cols) if before else (0, 0)
            data = self.cols.data * self.job.span
            if level.need_cols and begin == level.need_rows and left < self.cols.data and level.need_cols > left:
                cols = level.need_cols - left
                return load(Transfer(image=image, place=place, begin=0, end=begin, first_col=left, cols=cols),
                            cols * begin * self.job.span)
            if level.need_cols < self.cols.data:
                return load(Transfer(image=image, place=place, begin=begin, end=level.need_rows, cols=level.need_cols),
                            level.need_cols * level.need_rows * self.job.span)
            if level.need_rows > begin:
                for y in range(begin, level.need_rows, grain):
                    end = min(y + grain, level.need_rows)
                    there = load(Transfer(image=image, place=place, begin=y, end=end), (end - y) * data)
                return there
            return time.load + TOKEN

        if not self.plan.strips_first or self.plan.merged:
            self._groups_first(levels, run, load_level)
        else:
            for image in range(self.images):
                for place, groups in self.places:
                    first = image == place == 0
                    chosen = levels if first else self._full
                    self._waves(image, place, groups, chosen, early if first else len(groups), time, run, flush, load_level)
        flush(tail)
        return self._finish(time, steps, marks)

    @cached_property
    def _full(self):
        return self._levels([n for _, n in _spans(self.rows.count, self.plan.strip_rows)])

    def _waves(self, image, place, groups, levels, early, time, run, flush, load_level):
        fresh, started = list(groups), []
        there = load_level(image, place, levels[0], None)
        for number, level in enumerate(levels):
            following = levels[number + 1] if number + 1 < len(levels) else None
            for group in started:
                run(image, place, group, self._between(levels[number - 1], level), there)
            words = 0
            if following is not None:
                words = max(following.need_rows - level.need_rows, 0) * self.cols.data * self.job.span or \
                    max(following.need_cols - level.need_cols, 0) * level.need_rows * self.job.span
            while fresh:
                flush()
                if following is not None and started and not (
                        len(started) < early and time.end < time.load + words and self._worth(fresh[0], level)):
                    break
                group = fresh.pop(0)
                run(image, place, group, self._between(None, level), there)
                started.append(group)
            if following is not None:
                there = load_level(image, place, following, level)

    def _worth(self, group, level):
        """Whether a level is so large that a group should begin with it rather than wait for the next."""
        passes = self.job.passes[group]
        work = sum(cycles for strip in self._between(None, level) for cycles, _ in self._passes(group, strip, passes))
        return work >= self.tiler.group_beats[group]

    def _groups_first(self, levels, run, load_level):
        there = {}
        for place, groups in self.places:
            for group in groups:
                for image in range(self.images):
                    mine = levels if (place, group, image) == (0, groups[0], 0) else self._full
                    if self.plan.merged:
                        for other in range(self.plan.images):
                            if (place, other) not in there:
                                there[place, other] = load_level(other, place, levels[-1], None)
                        run(0, place, group, self._between(None, levels[-1]), there[place, self.plan.images - 1])
                        continue
                    if (place, image) in there:
                        for before, level in zip([None, *self._full], self._full):
                            run(image, place, group, self._between(before, level), there[place, image])
                        continue
                    for before, level in zip([None, *mine], mine):
                        there[place, image] = load_level(image, place, level, before)
                        run(image, place, group, self._between(before, level), there[place, image])

    def _between(self, before, level):
        """Strips from one level (None: nothing) to another."""
        rows, cols = (before.rows, before.cols) if before else (0, 0)
        width, out = self.cols.count, []
        if level.rows == 0:
            return [(0, 1, cols, level.cols - cols)]
        if cols:
            out.append((0, 1, cols, width - cols))
            rows = 1
        out += [(rows + y, n, x, m) for y, n in _spans(level.rows - rows, self.plan.strip_rows)
                for x, m in _spans(width, self.plan.strip_cols)]
        return out

    def _passes(self, group, strip, held):
        passes = self.job.passes[group]
        reload = held is not passes or len(passes) > 1
        key = passes, strip, reload, held is None
        if key not in self._known:
            at = self.rows.first + strip[0], strip[1], self.cols.first + strip[2], strip[3]
            self._known[key] = [(self.tiler.cycles(run, self.rows, self.cols, at) * self.merged_images,
                                 self.tiler.beats(run, held is None) if reload else 0) for run in passes]
        return self._known[key]

    # -- result ---------------------------------------------------------------------------------------------------------
    def _finish(self, time, steps, marks):
        """Place each transfer before the first item whose operands must be there after the transfer began."""
        before = [[] for _ in steps]
        latest = 0
        for begin, deadline, transfer in marks:
            at = min(bisect_left(time.begins, begin - LEAD), deadline)
            latest = max(latest, at, deadline - MOST_ITEMS_AHEAD)
            before[latest].append(transfer)
        return Schedule(steps=tuple(steps), before=tuple(tuple(b) for b in before), cycles=int(time.stored) + END,
                        engine_cycles=int(time.end), load_cycles=int(time.load), quiet=latest)
