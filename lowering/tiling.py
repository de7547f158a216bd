"""Search of tiles: which part of a layer lies in the activation scratchpad at a time, and in which form.

A **tile** is a block of output rows x columns of one image with the input it needs; a **strip** is the part of a tile
that fits an accumulator bank; a **chunk** is the part of the reduction whose input lies in the scratchpad together.
"""
from dataclasses import dataclass

from lowering.layout import align
from lowering.steps import Chunk, Pass, Reduction
from spec.derive import ceil_div
from spec.errors import InputError

#: Rows and columns that EXECUTE and STORE can hold (12-bit fields).
MAX_COUNT = 4095
#: Pitches tried beyond the smallest: enough to move kernel rows to other banks.
EXTRA_PITCHES = 4
#: Cycles of a step beyond its tile's beats when it has too few pixels to hide the tile (docs/architecture.md).
STEP_OVERHEAD_CYCLES = 5


@dataclass(frozen=True, kw_only=True)
class Window:
    """One dimension of a tile: outputs ``first .. first + count - 1``, and the input they read."""

    first: int
    count: int
    #: Padded input positions, of which ``data`` begin at ``before`` and are image positions ``start`` on.
    extent: int
    before: int
    data: int
    start: int

    @property
    def after(self):
        """Padded positions behind the data."""
        return self.extent - self.before - self.data


def make_window(first, count, *, stride, origin, dilation, taps, size):
    """`Window` of some outputs for kernel positions ``taps`` (half-open range)."""
    begin = first * stride - origin + taps[0] * dilation
    extent = (count - 1) * stride + (taps[1] - taps[0] - 1) * dilation + 1
    start, end = max(begin, 0), min(begin + extent, size)
    if end <= start:
        return Window(first=first, count=count, extent=extent, before=extent, data=0, start=0)
    return Window(first=first, count=count, extent=extent, before=start - begin, data=end - start, start=start)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a layer is cut, and the geometry of its tiles in the scratchpad."""

    #: Images in a tile: more than 1 only where the output is one pixel, so that a batch shares each weight tile.
    images: int
    #: Output rows and columns of a tile, bundles in it, output rows and columns of a strip.
    rows: int
    cols: int
    bundles: int
    strip_rows: int
    strip_cols: int
    chunks: tuple[Chunk, ...]
    #: Pixels from one padded row to the next, blocks per pixel, blocks per bundle.
    pitch: int
    cb: int
    area: int
    #: 1: all lies in the scratchpad once; 2: the next tile is loaded while this one is used.
    regions: int
    passes: tuple[Pass, ...]
    #: Estimate used by the search.
    cost_cycles: int


def _spans(total, part):
    return [(a, min(part, total - a)) for a in range(0, total, part)]


class Tiler:
    """Finds the `Plan` of one job."""

    def __init__(self, job, sizes, batch, *, strip_split=True):
        self.job, self.sizes, self.batch = job, sizes, batch
        self.reduction = Reduction(job, sizes)
        self.bundles = job.bundles()
        pixels = min(sizes.config.structured.accumulator_depth, MAX_COUNT)
        if job.residual is not None:
            units = min(sizes.residual_units, 1 << 16)
            pixels = min(pixels, max(1, units // 2))
        self.max_pixels = pixels
        self.strip_split = strip_split
        self._passes = {}

    def windows(self, axis, first, count, chunk):
        """`Window` of rows (axis 0) or columns (axis 1)."""
        job = self.job
        return make_window(first, count, stride=job.stride[axis], origin=job.origin[axis], dilation=job.dilation[axis],
                           taps=chunk.rows if axis == 0 else chunk.cols,
                           size=job.input.height if axis == 0 else job.input.width)

    def strips(self, rows, cols):
        """(strip rows, strip columns) of a tile: nearly equal parts that fit an accumulator bank."""
        sc = ceil_div(cols, ceil_div(cols, self.max_pixels))
        most = max(1, self.max_pixels // sc)
        count = ceil_div(rows, most)
        enough = max(self.sizes.tile_beats(p.n) for p in self.sizes.config.structured.patterns) + 8
        if self.strip_split and count == 1 and sc == cols and ceil_div(rows, 2) * sc >= enough:
            count = 2
        return ceil_div(rows, count), sc

    def plan(self):
        """The cheapest plan. Raises InputError if even one output pixel cannot be computed."""
        whole = self._whole()
        if whole:
            return whole
        best = None
        for candidate in self._candidates():
            if best is None or candidate.cost_cycles < best.cost_cycles:
                best = candidate
        if best is None:
            raise InputError(f"must fit configuration {self.sizes.config.name} (memory.activation_bytes, "
                             "structured.taps, structured.slots)", field=f"layer {self.job.name}")
        return best

    def _full_chunk(self):
        kh, kw = self.job.kernel
        return (Chunk((0, self.job.span), (0, kh), (0, kw)),)

    def _whole(self):
        out, bundles, chunks = self.job.output, len(self.bundles), self._full_chunk()
        images = 1
        if out.height * out.width == 1 and max(p.image_units for p in (self.job.residual, out) if p) < 1 << 20:
            images = min(self.batch, self.max_pixels)
        for count in _halvings(images):
            plan = self._make(out.height, out.width, bundles, chunks, images=count,
                              regions=1 if count == self.batch else 2)
            if plan:
                return plan
        return None

    def _candidates(self):
        """Plans with two regions; finer cuts of the reduction only while nothing coarser gives good strips."""
        out, job = self.job.output, self.job
        good = min(self.max_pixels, out.height * out.width, 32)
        bundle_choices = sorted({len(self.bundles), ceil_div(len(self.bundles), 2), ceil_div(len(self.bundles), 4), 1},
                                reverse=True)
        found_good = False
        for bundles in bundle_choices:
            for cols in _halvings(out.width):
                plan = self._tallest(cols, bundles, self._full_chunk())
                if plan:
                    found_good |= plan.rows * plan.cols >= good
                    yield plan
        if found_good:
            return
        kh, kw = job.kernel
        for groups in _halvings(job.span):
            for rows, cols in [(kh, kw)] + [(r, kw) for r in _halvings(kh)[1:]] + [(1, c) for c in _halvings(kw)[1:]]:
                if (groups, rows, cols) == (job.span, kh, kw):
                    continue
                chunks = tuple(Chunk((g, g + ng), (r, r + nr), (c, c + nc)) for g, ng in _spans(job.span, groups)
                               for r, nr in _spans(kh, rows) for c, nc in _spans(kw, cols))
                done = False
                for width in _halvings(min(out.width, self.max_pixels)):
                    plan = self._tallest(width, 1, chunks)
                    if plan:
                        done |= plan.rows * plan.cols >= good
                        yield plan
                if done:
                    return

    def _tallest(self, cols, bundles, chunks):
        """The plan with the most rows that fit two regions."""
        height = self.job.output.height
        most = height if len(chunks) == 1 else min(height, max(1, self.max_pixels // cols))
        for rows in _halvings(most, dense=True):
            plan = self._make(rows, cols, bundles, chunks, regions=2)
            if plan:
                return plan
        return None

    def _make(self, rows, cols, bundles, chunks, *, regions, images=1):
        sizes, out = self.sizes, self.job.output
        room = sizes.activation_blocks // regions // sizes.banks * sizes.banks
        strip_rows, strip_cols = self.strips(rows, cols) if len(chunks) == 1 else (rows, cols)
        if strip_rows * strip_cols > self.max_pixels:
            return None
        x_windows = [self.windows(1, x, n, c) for x, n in _spans(out.width, cols) for c in chunks[:1] + chunks[-1:]]
        x_windows += [self.windows(1, x, n, c) for x, n in _spans(out.width, cols) for c in chunks[1:-1]]
        y_extent = max(self.windows(0, 0, min(rows, out.height), c).extent for c in chunks)
        x_extent = max(w.extent for w in x_windows)
        least = max([1] + [w.data + max(w.before, w.after) for w in x_windows if w.data])
        width = max(c.groups[1] - c.groups[0] for c in chunks) * sizes.group_blocks
        best = None
        cb = 0
        for grain in _powers(sizes.banks):
            if align(width, grain) == cb:
                continue
            cb = align(width, grain)
            for pitch in range(least, least + EXTRA_PITCHES):
                area = align(((y_extent - 1) * pitch + x_extent) * cb, sizes.banks)
                if area * bundles * images > room:
                    break
                chosen = self._choose(chunks, pitch, cb)
                if chosen and (best is None or (chosen[0], cb, pitch) < best[0]):
                    best = (chosen[0], cb, pitch), chosen, area
        if best is None:
            return None
        (_, cb, pitch), (steps, beats, passes), area = best
        cost = self._cost(rows, cols, strip_rows, strip_cols, chunks, steps, beats)
        return Plan(images=images, rows=rows, cols=cols, bundles=bundles, strip_rows=strip_rows,
                    strip_cols=strip_cols, chunks=chunks, pitch=pitch, cb=cb, area=area,
                    regions=regions, passes=tuple(passes), cost_cycles=cost)

    def _choose(self, chunks, pitch, cb):
        # Only the taps' places modulo the banks matter.
        key = (chunks, pitch % self.sizes.banks, cb)
        if key not in self._passes:
            self._passes[key] = self.reduction.choose(chunks, pitch, cb)
        return self._passes[key]

    def _cost(self, rows, cols, strip_rows, strip_cols, chunks, steps, beats):
        """Rough cycles: the larger of array time and bus time."""
        out, sizes = self.job.output, self.sizes
        groups = out.planes
        pixels = strip_rows * strip_cols
        strips = ceil_div(out.height, rows) * ceil_div(rows, strip_rows) * ceil_div(out.width, cols) * \
            ceil_div(cols, strip_cols)
        tiles = ceil_div(out.height, rows) * ceil_div(out.width, cols)
        step_cycles = max(pixels, ceil_div(beats, steps) + STEP_OVERHEAD_CYCLES)
        compute = strips * groups * (steps * step_cycles + 8 * len(chunks))
        weight_beats = beats * groups
        if weight_beats > sizes.weight_beats:
            weight_beats *= tiles if beats <= sizes.weight_beats // 2 else strips
        units = 0
        for c in chunks:
            for y, ny in _spans(out.height, rows):
                wy = self.windows(0, y, ny, c)
                units += wy.data * sum(self.windows(1, x, nx, c).data for x, nx in _spans(out.width, cols)) * \
                    (c.groups[1] - c.groups[0])
        units *= len(self.bundles) * (1 if len(chunks) == 1 else max(len(b) for _, b in self.bundles))
        load = units // sizes.units_per_beat + weight_beats
        return self.batch * (max(compute, load) + min(compute, load) // 8)


def _halvings(value, dense=False):
    """value, ceil(value / 2), ceil(value / 3 or 4) …, 1."""
    parts, out = 1, []
    while True:
        out.append(ceil_div(value, parts))
        if out[-1] <= 1:
            return sorted(set(out), reverse=True)
        parts = parts + 1 if dense else 2 * parts


def _powers(most):
    """1, 2, 4 … most."""
    return [1 << k for k in range(most.bit_length())]
