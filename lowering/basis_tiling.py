"""Search of tiles for the basis engine: what lies in the activation scratchpad, in which strips, in which order.

A **tile** is a block of output rows x columns of one or several images with the input it needs, all channels; a
**strip** is the part of one image's tile that fits an accumulator bank. Two orders within a tile:

* *strips first*: strip outermost, output groups inner. The layer's weights stay in the weight buffer, every pass loads
  its own again from there. Only the first strip's input must be there before work begins.
* *groups first*: output group outermost, strips inner. Weights are loaded once per output group and tile.

The first tile of a layer has an order of its own, in which work begins early: `lowering.basis_schedule`.
"""
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from heapq import nsmallest

from lowering.basis import PASS_OVERHEAD_CYCLES
from lowering.basis_schedule import Schedule, Scheduler
from lowering.tiling import MAX_COUNT, Window, _halvings, _spans, make_window
from spec.derive import ceil_div
from spec.errors import InputError
from spec.isa import Mode

#: Tiles that the estimate simulates; the others are taken to be like these.
SIMULATED_TILES = 6
#: Transfers ahead of their use, each of which may be an outstanding token.
MOST_AHEAD = 96
#: Plans whose first tile is scheduled in regular ways, and of these those with a thorough search.
FINALISTS, CLIMBERS = 6, 2
#: Layers of more cycles are not searched thoroughly: their beginning hardly matters.
LONG_CYCLES = 100_000
#: Ways tried to cut the columns of a tile into strips.
MOST_COLUMN_STRIPS = 8


@dataclass(frozen=True)
class Extent:
    """Rows (or columns) of a pass: first tile row, input rows, rows of zeros before them, outputs, tile rows per step,
    stride of outputs within the input."""

    begin: int
    size: int
    pad: int
    outputs: int
    step: int
    stride: int


@dataclass(frozen=True, kw_only=True)
class BasisPlan:
    """How a layer is cut, and the geometry of its tiles in the scratchpad."""

    #: Images in a tile; ``merged``: outputs of one pixel, whose images are the pixels of a strip.
    images: int
    merged: bool
    #: Output rows and columns of a tile, bundles in it; output rows and columns of a strip.
    rows: int
    cols: int
    bundles: int
    strip_rows: int
    strip_cols: int
    #: Order of work in a tile, see the module.
    strips_first: bool
    #: Pixels from one row to the next, blocks per pixel, blocks per bundle and image.
    pitch: int
    cb: int
    area: int
    #: 1: all lies in the scratchpad once; 2: the next tile is loaded while this one is used.
    regions: int
    #: Estimate used by the search.
    cost_cycles: int
    #: Order of work in the first tile.
    schedule: Schedule | None = field(default=None, repr=False)

    def strips(self, rows, cols):
        """(first row, rows, first column, columns) of each strip of a tile, the first tile excepted."""
        return [(y, n, x, m) for y, n in _spans(rows, self.strip_rows) for x, m in _spans(cols, self.strip_cols)]


@lru_cache(maxsize=65536)
def _pass_cycles(work, kernel, rows, cols):
    mode, _, stage_cycles, micro_steps = work
    if mode is Mode.POINTWISE:
        count = rows.outputs * cols.outputs * micro_steps
        return count, count
    hits = Counter(y * rows.stride + r * kernel[2] - rows.pad for y in range(rows.outputs) for r in range(kernel[0]))
    each = micro_steps * cols.outputs
    needed = [n for y, n in hits.items() if 0 <= y < rows.size]
    return sum(max(stage_cycles * cols.size, n * each) for n in needed), sum(needed) * each


class BasisTiler:
    """Finds the `BasisPlan` of one job."""

    def __init__(self, job, sizes, batch):
        self.job, self.sizes, self.batch = job, sizes, batch
        self.bundles = job.bundles()
        pixels = min(sizes.accumulator_depth, MAX_COUNT)
        if job.residual is not None:
            pixels = min(pixels, max(1, min(sizes.residual_units, 1 << 16) // 2))
        self.max_pixels = pixels
        #: Beats that passes take from the weight buffer: of each output group, and of all together.
        self._shared = job.shared_taps
        self.group_beats = [sum(self._beats(run) for run in group) for group in job.passes]
        self.weight_beats = sum(dict(zip(job.passes, self.group_beats)).values())
        self.weight_beats += len(self._shared or b"") // sizes.beat_bytes
        biggest = max((len(run.taps) + len(run.coefficients)) // sizes.beat_bytes for g in job.passes for run in g)
        if biggest > min(sizes.weight_beats, 1 << 16):
            raise InputError(f"must have passes whose weights fit configuration {sizes.config.name} "
                             "(memory.weight_bytes)", field=f"layer {job.name}", value=biggest * sizes.beat_bytes)
        #: Whether all weights stay on chip.
        self.resident = self.weight_beats <= min(sizes.weight_beats, 1 << 16)
        planes = job.output.planes
        #: Output groups whose parameters are loaded first.
        self.parameter_groups = planes if planes <= sizes.config.memory.parameter_groups else \
            sizes.config.memory.parameter_groups // 2
        # Passes that cost the same are counted together: (pass, cycles to load it, how many of the layer).
        counts = Counter((run.work, self.load_cycles(run, False)) for group in job.passes for run in group)
        alike = {(run.work, self.load_cycles(run, False)): run for group in job.passes for run in group}
        self._kinds = [(alike[key], key[1], count) for key, count in counts.items()]
        self._known = {}

    def _beats(self, run):
        """Beats that a pass loads whenever the pass before was another one."""
        return (len(run.coefficients) + (0 if self._shared is not None else len(run.taps))) // self.sizes.beat_bytes

    def load_cycles(self, run, first):
        """Cycles in which a pass gets its weights whenever the pass before was another one; ``first``: there was
        none."""
        taps = len(run.taps) // self.sizes.beat_bytes if first or self._shared is None else 0
        return run.load_cycles + taps

    def fresh_beats(self, group, first):
        """Beats of an output group's weights in memory; ``first``: with the taps that all share."""
        shared = len(self._shared or b"") // self.sizes.beat_bytes if first else 0
        return self.group_beats[group] + shared

    def cycles(self, run, rows, cols, strip):
        """Estimated cycles of a pass on a strip (`pass_cycles`)."""
        return pass_cycles(self, run, rows, cols, strip)[0]

    # -- geometry ----------------------------------------------------------------------------------------------------
    def window(self, axis, first, count):
        """`Window` of the input in the scratchpad for some outputs; without padding unless the job has a border."""
        job = self.job
        w = make_window(first, count, stride=job.stride[axis], origin=job.origin[axis], dilation=job.dilation[axis],
                        taps=(0, job.kernel[axis]), size=job.input.height if axis == 0 else job.input.width)
        if job.border:
            return w
        return Window(first=first, count=count, extent=w.data, before=0, data=w.data, start=w.start)

    def extent(self, axis, run, window, first, count):
        """`Extent` of a pass for outputs ``first .. first + count - 1`` of a tile with this `Window`."""
        job = self.job
        stride, origin, d = job.stride[axis], job.origin[axis], job.dilation[axis]
        if run.mode is Mode.POINTWISE or job.folds(axis):
            begin = (first - window.first) * stride
            if not job.border:
                begin = first * stride - origin - window.start
            return Extent(begin + run.tap[axis] * d, count, 0, count, stride, 1)
        size = (count - 1) * stride + (job.kernel[axis] - 1) * d + 1
        if job.border:
            return Extent((first - window.first) * stride, size, 0, count, 1, stride)
        begin = first * stride - origin
        low, high = max(begin, 0), min(begin + size, job.input.height if axis == 0 else job.input.width)
        return Extent(low - window.start, high - low, low - begin, count, 1, stride)

    def rows_needed(self, window, first, count):
        """Tile rows that must lie in the scratchpad for some output rows: those before this one."""
        job = self.job
        end = (first + count - 1) * job.stride[0] - job.origin[0] + (job.kernel[0] - 1) * job.dilation[0] + 1
        if job.border:
            return end - (window.first * job.stride[0] - job.origin[0])
        return min(end, job.input.height) - window.start

    def columns_needed(self, window, first, count):
        """Tile columns that must lie in the scratchpad for some output columns: those before this one. No border."""
        job = self.job
        end = (first + count - 1) * job.stride[1] - job.origin[1] + (job.kernel[1] - 1) * job.dilation[1] + 1
        return min(end, job.input.width) - window.start

    # -- search ------------------------------------------------------------------------------------------------------
    def plan(self):
        """The cheapest plan. Raises InputError if even one output pixel cannot be computed."""
        finalists = self._candidates()
        for effort, count in ((1, FINALISTS), (2, CLIMBERS)):
            chosen = nsmallest(count, finalists, key=lambda plan: plan.cost_cycles)
            if effort == 1 or chosen and chosen[0].cost_cycles < LONG_CYCLES:
                chosen = [self._costed(plan, effort) for plan in chosen]
            finalists = chosen
        if not finalists:
            raise InputError(f"must fit configuration {self.sizes.config.name} (memory.activation_bytes)",
                             field=f"layer {self.job.name}")
        return min(finalists, key=lambda plan: plan.cost_cycles)

    def _candidates(self):
        job, out = self.job, self.job.output
        count = len(self.bundles)
        if out.height * out.width == 1 and job.pointwise and \
                max(p.image_units for p in (job.residual, out) if p) < 1 << 20:
            for images in _halvings(min(self.batch, self.max_pixels)):
                plans = list(self._make(1, 1, count, images=images, regions=1 if images == self.batch else 2,
                                        merged=True))
                if plans:
                    yield from plans
                    return
        whole = list(self._make(out.height, out.width, count, images=self.batch, regions=1))
        if whole:
            yield from whole
            return
        for images in _halvings(self.batch):
            plans = list(self._make(out.height, out.width, count, images=images, regions=2))
            if plans:
                yield from plans
                break
        for bundles in sorted({count, ceil_div(count, 2), ceil_div(count, 4), 1}, reverse=True):
            for cols in _halvings(out.width):
                for rows in _halvings(out.height, dense=True):
                    plans = list(self._make(rows, cols, bundles, images=1, regions=2))
                    if plans:
                        yield from plans
                        break

    def _make(self, rows, cols, bundles, *, images, regions, merged=False):
        sizes, job, out = self.sizes, self.job, self.job.output
        room = sizes.activation_blocks // regions // sizes.banks * sizes.banks
        x_windows = [self.window(1, x, n) for x, n in _spans(out.width, cols)]
        y_windows = [self.window(0, y, n) for y, n in _spans(out.height, rows)]
        pitch = max(max(w.extent, w.data) for w in x_windows)
        height = max(w.extent for w in y_windows)
        cb = job.span * sizes.group_blocks
        area = height * pitch * cb
        if area * bundles * images > room or max(height, pitch) * max(job.stride) > MAX_COUNT:
            return
        common = {"images": images, "merged": merged, "rows": rows, "cols": cols, "bundles": bundles, "pitch": pitch,
                  "cb": cb, "area": area, "regions": regions}
        orders = (True, False) if self.resident else (False,)
        for strip_rows, strip_cols in self._strips(rows, cols):
            strips = ceil_div(rows, strip_rows) * ceil_div(cols, strip_cols)
            if regions == 2 and strips * bundles * images > MOST_AHEAD and rows * cols * bundles * images != 1:
                continue
            for strips_first in orders:
                yield self._costed(BasisPlan(**common, strip_rows=strip_rows, strip_cols=strip_cols,
                                             strips_first=strips_first, cost_cycles=0))

    def _strips(self, rows, cols):
        """Choices of (strip rows, strip columns)."""
        out = set()
        for parts in range(1, min(cols, max(MOST_COLUMN_STRIPS, ceil_div(cols, self.max_pixels) + 1)) + 1):
            sc = ceil_div(cols, parts)
            if sc > self.max_pixels:
                continue
            least = ceil_div(rows, max(1, self.max_pixels // sc))
            out |= {(ceil_div(rows, count), sc) for count in (least, 2 * least)}
        return sorted(out, reverse=True)

    # -- estimate ----------------------------------------------------------------------------------------------------
    def _strip_cycles(self, rows, cols, strip, reload):
        """Cycles of all output groups' passes on one strip; ``reload``: each pass loads its weights from the buffer.

        rows, cols: windows of the tile; strip: as of `pass_cycles`.
        """
        run = self.job.passes[0][0]
        y, x = self.extent(0, run, rows, *strip[:2]), self.extent(1, run, cols, *strip[2:])
        key = y.size, y.pad, y.outputs, x.size, x.outputs, reload
        if key not in self._known:
            self._known[key] = sum(
                count * (max(pass_cycles(self, run, rows, cols, strip)[0], load if reload else 0) +
                         PASS_OVERHEAD_CYCLES) for run, load, count in self._kinds)
        return self._known[key]

    def _costed(self, plan, effort=0):
        """The plan with a schedule of its first tile and its estimated cycles: those of the schedule, then load unit
        and engine side by side. effort: 0 simple schedule, 1 the best of some regular ones, 2 thorough search."""
        job, out = self.job, self.job.output
        x_windows = [self.window(1, x, n) for x, n in _spans(out.width, plan.cols)]
        y_windows = [self.window(0, y, n) for y, n in _spans(out.height, plan.rows)]
        scheduler = Scheduler(self, plan, y_windows[0], x_windows[0])
        schedule = scheduler.best(thorough=effort > 1) if effort else scheduler.simple()
        share = plan.bundles / len(self.bundles)
        tiles = [(y, x) for y in y_windows for x in x_windows]
        copies = ceil_div(self.batch, plan.images) * ceil_div(len(self.bundles), plan.bundles)
        total = len(tiles) * copies
        tiles = (tiles * min(copies, SIMULATED_TILES))[:SIMULATED_TILES]
        groups = len(job.passes) * share
        several = len(job.passes) > 1 or len(job.passes[0]) > 1
        weights = self.weight_beats * share
        depth = job.span * plan.bundles
        images = 1 if plan.merged else plan.images
        load, comp = schedule.load_cycles, schedule.engine_cycles
        ends = [comp]
        for number, (rows, cols) in enumerate(tiles[1:], 1):
            if plan.regions == 2 and number >= 2:
                load = max(load, ends[number - 2])
            strips = plan.strips(rows.count, cols.count)
            spent, reached = 0, 0
            for image in range(images):
                for y, n, x, m in strips:
                    cycles = share * self._strip_cycles(rows, cols, (rows.first + y, n, cols.first + x, m),
                                                        several and plan.strips_first)
                    end = self.rows_needed(rows, rows.first + y, n)
                    if x == 0:
                        load += max(0, end - (reached if image * plan.rows + y else 0)) * cols.data * depth
                        reached = end
                    if plan.strips_first:
                        comp = max(comp, load) + cycles
                        continue
                    if image == 0 and y == 0 and x == 0 and not self.resident:
                        load += weights / groups
                    comp = max(comp, load) + cycles / groups
                    spent += cycles / groups
            if not plan.strips_first:
                load += 0 if self.resident else weights * (groups - 1) / groups
                each = max(spent, max(self.group_beats))
                comp = max(comp + (groups - 1) * each, load)
            ends.append(comp)
        last = ends[-1]
        if total > len(ends):
            step = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else ends[0]
            last += (total - len(ends)) * step
        # Transfers that nobody waits for are not for nothing either.
        cost = last + schedule.cycles - schedule.engine_cycles + (load - schedule.load_cycles) / 8 * total / len(ends)
        return replace(plan, schedule=schedule, cost_cycles=int(cost))


def pass_cycles(tiler, run, rows, cols, strip):
    """(estimated cycles, micro-steps) of a pass on a strip.

    rows, cols: windows of the tile; strip: (first row, rows, first column, columns) of the layer's output.
    """
    y, n, x, m = strip
    kernel = (*run.kernel, tiler.job.dilation[0])
    return _pass_cycles(run.work, kernel, tiler.extent(0, run, rows, y, n), tiler.extent(1, run, cols, x, m))
