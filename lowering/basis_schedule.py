"""Order of work in the first tile of a layer: which strips of which output groups run while its input is still coming.

Work on a strip can begin when its input rows and its output group's weights are on chip, and the load unit brings one
unit of input or one beat of weights per cycle. So the first strips are small, and each next one is about as large as
what arrives while those before are at work. A **level** is a part of the tile that has been loaded: its first rows, or
of the rows of the first level the first columns; then further images. While the next level is loaded, further output
groups begin with what is there; a group that begins late does all levels so far at once. How large the first level is,
how fast levels grow and how many groups begin early is found by playing several choices through, load unit against
engine (`Timeline`).
"""
from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

from lowering.tiling import _spans
from spec.derive import ceil_div

#: First level as a part of a full strip's rows, and growth from one level to the next, that are tried.
FIRST_PARTS = (8, 4, 3, 2, 1)
GROWTHS = (1.5, 2, 3)
#: Parts of the first level's columns between which it may be cut.
COLUMN_PARTS = 16
#: Levels whose rows the search moves.
MOST_MOVED = 6
#: Cuts of the first level's columns, in sixteenths of them, with which the search begins.
COLUMN_CUTS = ((), (2,), (4,), (8,), (10,), (2, 8), (4, 8), (2, 4, 8))
#: Regular choices to which cuts are added, and how many of all these the search goes on from.
KEPT, CLIMBED = 6, 4
#: Items that the search from one choice to better neighbours may play.
SEARCH_ITEMS = 4000
#: Units of a plane in one transfer, at most, but at least so many units of all planes. Instructions come over the same
#: bus behind the bursts that are under way, which take a cycle per unit.
BURST_UNITS, PIECE_UNITS = 32, 64
#: Output groups whose parameters are loaded together.
PARAMETER_GROUPS = 8
#: Transfers are requested at most so many items ahead of their use: each may be an outstanding token.
MOST_ITEMS_AHEAD = 64
#: Cycles: from the start to the first word on chip; beyond its words, of a transfer; from a transfer's last word to the
#: loader; of the loader without beats, and beyond its beats; of a pass beyond its micro-steps; of a STORE beyond its
#: pixels; from the last STORE's last pixel to the end.
START, TRANSFER, TOKEN, LOADER, LOADER_BEATS, PASS, STORE, END = 44, 1, 4, 3, 6, 3, 11, 32


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
    (all if 0); or, if not None, the weights of output group ``group``; or the first ``parameters`` output groups'
    parameters as far as they are not there."""

    image: int = 0
    place: int = 0
    begin: int = 0
    end: int = 0
    first_col: int = 0
    cols: int = 0
    group: int | None = None
    parameters: int = 0


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
        #: Per item, when its instruction must be there.
        self.begins = []

    def transfer(self, words):
        """A transfer of so many cycles. Returns when what it brings may be used."""
        self.load += words + TRANSFER
        return self.load + TOKEN

    def item(self, need, passes, pixels):
        """One strip of one output group. need: when its operands are there; passes: (cycles, cycles to load its weights
        from the buffer) of each."""
        bank = len(self.begins) % 2
        self.begins.append(max(self.begin, need))
        for number, (cycles, load) in enumerate(passes):
            ready = max(self.begin, need) + (load + LOADER_BEATS if load else LOADER)
            self.begin = max(self.end, ready, 0 if number else self.banks[bank])
            self.end = self.begin + cycles + PASS
        self.stored = self.banks[bank] = max(self.stored, self.end) + pixels + STORE


class _Level(NamedTuple):
    """Rows done of an image, of these so many columns (0: all); input rows and columns that must be there."""

    image: int
    rows: int
    cols: int
    need_rows: int
    need_cols: int


class Scheduler:
    """Finds the `Schedule` of a plan's first tile.

    Args: tiler: `lowering.basis_tiling.BasisTiler`; plan: `BasisPlan` without schedule; rows, cols: `Window` of the
        first tile.
    """

    def __init__(self, tiler, plan, rows, cols):
        self.tiler, self.plan, self.rows, self.cols = tiler, plan, rows, cols
        self.job = tiler.job
        self.places = [(place, groups) for place, (_, groups) in enumerate(tiler.bundles[:plan.bundles])]
        self.images = 1 if plan.merged else plan.images
        #: Pixels of an item for each of its strip: merged, each image is one.
        self.pixels = plan.images if plan.merged else 1
        #: Rows of the tile's strips where nothing has to wait.
        self.full = tuple(n for _, n in _spans(rows.count, plan.strip_rows))
        self._known, self._strips = {}, {}

    # -- choices ------------------------------------------------------------------------------------------------------
    def best(self, thorough=True):
        """The `Schedule` that ends first of those tried: the best of some regular choices and, if ``thorough``, from
        there on the best neighbour, as long as that is better.

        A choice is (rows of the levels, cuts of the first level's columns, groups that begin early, whether the very
        last strip is cut so that its STORE is short).
        """
        known = {}

        def play(choice):
            if choice not in known:
                heights, cuts, early, tail = choice
                known[choice] = _Play(self, self.levels(heights, cuts), early, tail)
            return known[choice].cycles

        cuts = COLUMN_CUTS if self._cuttable() else ((),)
        regular = [(heights, (), early, True) for heights in self._heights() for early in self._early()]
        seeds = [(heights, cut, *others) for heights, _, *others in sorted(regular, key=play)[:KEPT] for cut in cuts]
        seeds.sort(key=play)
        if thorough:
            seeds = [self._climb(choice, play, known) for choice in seeds[:CLIMBED]]
        return known[min(seeds, key=play)].schedule()

    def _climb(self, best, play, known):
        """The best choice on the way from one choice to better neighbours."""
        items = 0
        while items < SEARCH_ITEMS:
            found = best
            for choice in self._neighbours(best):
                items += 0 if choice in known else len(known[best].steps)
                if play(choice) < play(found):
                    found = choice
            if found == best:
                break
            best = found
        return best

    def _neighbours(self, choice):
        """Choices that differ little: a row moved, a level split or joined, a cut moved, put in or left out, more or
        fewer groups early, another end."""
        heights, cuts, early, tail = choice
        yield heights, cuts, early, not tail
        count = len(self.places[0][1])
        if self.plan.strips_first:
            for change in (-count // 8, -1, 1, ceil_div(count, 8)):
                if 1 <= early + change <= count:
                    yield heights, cuts, early + change, tail
        if self._cuttable():
            for k in range(len(cuts)):
                yield heights, cuts[:k] + cuts[k + 1:], early, tail
                for cut in (cuts[k] - 1, cuts[k] + 1):
                    if 0 < cut < COLUMN_PARTS and cut not in cuts:
                        yield heights, (*cuts[:k], cut, *cuts[k + 1:]), early, tail
            for low, high in zip((0, *cuts), (*cuts, COLUMN_PARTS)):
                if high - low > 1:
                    yield heights, tuple(sorted((*cuts, (low + high) // 2))), early, tail
        most = self.plan.strip_rows
        for k, height in enumerate(heights[:MOST_MOVED]):
            for part in {1, height // 2} - {0, height}:
                yield (*heights[:k], part, height - part, *heights[k + 1:]), cuts, early, tail
            for other in range(max(0, k - 2), min(k + 3, len(heights))):
                if other != k and height + heights[other] <= most:
                    yield tuple(h + height * (n == other) for n, h in enumerate(heights) if n != k), cuts, early, tail
                if other != k and height > 1 and heights[other] < most:
                    yield tuple(h + (n == other) - (n == k) for n, h in enumerate(heights)), cuts, early, tail

    def simple(self):
        """The `Schedule` with full strips only, from which plans are compared."""
        return _Play(self, self.levels(self.full), len(self.places[0][1]), False).schedule()

    def _early(self):
        """Most output groups that begin before all input is there."""
        count = len(self.places[0][1])
        if not self.plan.strips_first:
            return [1]
        return sorted({count, *(max(1, count * k // 8) for k in (1, 2, 3, 4, 6))}, reverse=True)

    def _heights(self):
        """Rows of the levels of the first image."""
        total, most = self.rows.count, self.plan.strip_rows
        lists = set()
        for part in FIRST_PARTS:
            for growth in GROWTHS:
                heights, size = [], ceil_div(most, part)
                while sum(heights) < total:
                    heights.append(min(size, most, total - sum(heights)))
                    size = max(size + 1, int(size * growth))
                # what is left over at the end may as well lie further ahead
                lists |= {tuple(heights), tuple(sorted(heights))}
        return sorted(lists)

    def _cuttable(self):
        """Whether columns of the first rows may be loaded by themselves."""
        return not self.job.border and not self.plan.merged and self.plan.strip_cols >= self.cols.count

    # -- geometry -----------------------------------------------------------------------------------------------------
    def levels(self, heights, cuts=()):
        """List of `_Level` of all images: the first with rows ``heights``, the others with full strips."""
        out, width = [], self.cols.count
        for image in range(self.images):
            done = 0
            for height in self.full if image else heights:
                before, done = done, done + height
                need = self.tiler.rows_needed(self.rows, self.rows.first, done)
                if not before and not image:
                    for x in sorted({ceil_div(width * cut, COLUMN_PARTS) for cut in cuts} - {width}):
                        columns = self.tiler.columns_needed(self.cols, self.cols.first, x)
                        out.append(_Level(0, done, x, need, columns))
                out.append(_Level(image, done, 0, need, self.cols.data))
        return out

    def between(self, before, level):
        """[(image, strip)] from one level (None: nothing) to another."""
        if (before, level) not in self._strips:
            self._strips[before, level] = self._between(before, level)
        return self._strips[before, level]

    def _between(self, before, level):
        out = []
        for image in range(before.image if before else 0, level.image + 1):
            rows, cols = (before.rows, before.cols) if before and before.image == image else (0, 0)
            end, width = level.rows if image == level.image else self.rows.count, self.cols.count
            if image == level.image and level.cols:
                out.append((image, (0, end, cols, level.cols - cols)))
                continue
            if cols:
                out.append((image, (0, rows, cols, width - cols)))
            out += [(image, (rows + y, n, x, m)) for y, n in _spans(end - rows, self.plan.strip_rows)
                    for x, m in _spans(width, self.plan.strip_cols)]
        return out

    def transfers(self, place, before, level):
        """[(Transfer, units)] that bring what a level has beyond the one before it."""
        span, data = self.job.span, self.cols.data
        begin, left = (before.need_rows, before.need_cols) if before and before.image == level.image else (0, 0)
        common = {"image": level.image, "place": place}
        if begin == level.need_rows and left < level.need_cols or level.need_cols < data:
            cols = level.need_cols - left
            return [(Transfer(**common, end=level.need_rows, first_col=left, cols=cols), cols * level.need_rows * span)]
        grain = max(1, BURST_UNITS // max(1, data), ceil_div(PIECE_UNITS, max(1, data * span)))
        return [(Transfer(**common, begin=y, end=min(y + grain, level.need_rows)),
                 (min(y + grain, level.need_rows) - y) * data * span) for y in range(begin, level.need_rows, grain)]

    def passes(self, group, strip, held):
        """[(cycles, cycles to load its weights)] of an output group's passes on a strip; held: those before."""
        runs = self.job.passes[group]
        reload = held is not runs or len(runs) > 1
        key = runs, strip, reload, held is None
        if key not in self._known:
            at = self.rows.first + strip[0], strip[1], self.cols.first + strip[2], strip[3]
            self._known[key] = [(self.tiler.cycles(run, self.rows, self.cols, at) * self.pixels,
                                 self.tiler.load_cycles(run, held is None) if reload else 0) for run in runs]
        return self._known[key]


class _Play:
    """One choice played through.

    levels: of `Scheduler.levels`; early: most output groups that begin before all input is there; tail: cut the last
    strip in two.
    """

    def __init__(self, scheduler, levels, early, tail):
        self.scheduler, self.early, self.tail = scheduler, early, tail
        self.tiler, self.plan, self.job = scheduler.tiler, scheduler.plan, scheduler.job
        self.time, self.steps, self.marks = Timeline(), [], []
        self.last = self.held = None
        self.weights, self.parameters = {}, 0
        full = scheduler.levels(scheduler.full)
        for place, groups in scheduler.places:
            if self.plan.merged:
                self._merged(place, groups, full[0])
            else:
                self._waves(place, groups, full if place else levels)
        self._flush(tail)
        #: Cycles until the last result is in memory.
        self.cycles = int(self.time.stored) + END

    # -- what the units do --------------------------------------------------------------------------------------------
    def _load(self, transfer, words):
        self._flush()
        self.marks.append((self.time.load, len(self.steps), transfer))
        return self.time.transfer(words)

    def _load_level(self, place, before, level):
        there = self.time.load + TOKEN
        for transfer, units in self.scheduler.transfers(place, before, level):
            there = self._load(transfer, units)
        return there

    def _load_weights(self, group):
        """When an output group's weights are there, which are loaded if they are not yet."""
        runs = self.job.passes[group]
        if runs not in self.weights:
            words = self.tiler.fresh_beats(group, not self.weights)
            self.weights[runs] = self._load(Transfer(group=group), words) if words else 0
        self._load_parameters(group)
        return self.weights[runs]

    def _load_parameters(self, group):
        """Some with the first weights, the next ones well before they are wanted."""
        most = self.tiler.parameter_groups
        if self.parameters < min(group + 2, most):
            have, self.parameters = self.parameters, min(self.parameters + PARAMETER_GROUPS, most)
            beats = (self.parameters - have) * self.tiler.sizes.parameter_beats
            self._load(Transfer(parameters=self.parameters), beats)

    def _run(self, place, group, strips, there):
        need = max(there, self._load_weights(group))
        for image, strip in strips:
            self._flush()
            self.last = image, place, group, strip, need

    def _flush(self, cut=False):
        """Play the item that came last; ``cut``: in two parts."""
        if self.last is None:
            return
        (image, place, group, (y, n, x, m), need), self.last = self.last, None
        part = ceil_div(n, 4) if cut and n > 1 else 0
        for strip in ((y, n - part, x, m), (y + n - part, part, x, m)) if part else ((y, n, x, m),):
            self.steps.append((image, place, group, strip))
            pixels = strip[1] * m * self.scheduler.pixels
            self.time.item(need, self.scheduler.passes(group, strip, self.held), pixels)
            self.held = self.job.passes[group]
            if self.job.residual is not None:
                self.time.transfer(pixels)

    # -- order --------------------------------------------------------------------------------------------------------
    def _waves(self, place, groups, levels):
        """All output groups of a bundle, level after level: first those at work, then some that begin."""
        fresh, started = list(groups), []
        early = len(groups) if place and self.plan.strips_first else self.early
        there = self._load_level(place, None, levels[0])
        for before, level, following in zip([None, *levels], levels, [*levels[1:], None]):
            for group in started:
                self._run(place, group, self.scheduler.between(before, level), there)
            words = 0
            if following is not None:
                words = sum(units for _, units in self.scheduler.transfers(place, level, following))
            while fresh:
                self._flush()
                if started and following is not None and not (
                        len(started) < early and self.time.end < self.time.load + words
                        and self._worth(fresh[0], level)):
                    break
                started.append(fresh.pop(0))
                self._run(place, started[-1], self.scheduler.between(None, level), there)
            if following is not None:
                there = self._load_level(place, level, following)

    def _worth(self, group, level):
        """Whether a group should begin with a level rather than wait for the next: its work exceeds its weights."""
        runs = self.job.passes[group]
        work = sum(cycles for _, strip in self.scheduler.between(None, level)
                   for cycles, _ in self.scheduler.passes(group, strip, runs))
        return work >= self.tiler.group_beats[group]

    def _merged(self, place, groups, level):
        """Outputs of one pixel: all images together."""
        for image in range(self.plan.images):
            there = self._load_level(place, None, _Level(image, level.rows, 0, level.need_rows, level.need_cols))
        for group in groups:
            self._run(place, group, self.scheduler.between(None, level), there)

    # -- result -------------------------------------------------------------------------------------------------------
    def schedule(self):
        """The `Schedule`: each transfer lies before the first item that begins after it, or that needs it."""
        before, latest = [[] for _ in self.steps], 0
        for begin, deadline, transfer in self.marks:
            at = min(bisect_left(self.time.begins, begin), deadline)
            latest = max(latest, at, deadline - MOST_ITEMS_AHEAD)
            before[latest].append(transfer)
        steps = tuple(Step(image=image, place=place, group=group, strip=strip)
                      for image, place, group, strip in self.steps)
        return Schedule(steps=steps, before=tuple(tuple(b) for b in before), cycles=self.cycles,
                        engine_cycles=int(self.time.end), load_cycles=int(self.time.load), quiet=latest)
