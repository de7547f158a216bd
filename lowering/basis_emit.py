"""Instructions of one layer of the basis engine: what is loaded when, in which passes, stored where.

Order of work: tile, then strip and output group (or output group and strip), then pass. Input rows are loaded before
the first pass that needs them, in pieces spread over the passes before; taps and coefficients one output group ahead.
"""
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from lowering.basis_tiling import MOST_AHEAD, pass_cycles
from lowering.emit import PRELOAD_BEATS, RING_PARTS, Emitter, Region, Tile
from lowering.job import pack_parameters
from lowering.steps import Chunk
from spec.derive import ceil_div
from spec.isa import Mode, Opcode, TileTarget

#: Units of a piece of input that is loaded ahead.
PIECE_UNITS = 64


@dataclass(frozen=True)
class Blob:
    """Taps and coefficients of a pass in memory: byte offset, beats of taps (0: they came with another blob), beats."""

    source: int
    tap_beats: int
    beats: int


@dataclass(frozen=True, kw_only=True)
class BasisItem:
    """One strip of one output group: its passes and its STORE."""

    tile: int
    #: Number of the image in the tile.
    image: int
    bundle: int
    group: int
    #: First row, rows, first column, columns, all in the tile.
    strip: tuple[int, int, int, int]


@dataclass
class InputPiece:
    """Rows ``begin .. end - 1`` of one bundle and image of a tile, needed by item ``deadline``."""

    tile: int
    place: int
    begin: int
    end: int
    deadline: int
    loaded: bool = False


class BasisEmitter(Emitter):
    """Emits one job of the basis engine into a program."""

    def __init__(self, job, plan, tiler, sizes, program, constants, batch):
        super().__init__(job, plan, sizes, program, constants, batch)
        self.tiler = tiler
        self._build_constants()
        self._build_items()
        self._build_pieces()

    @property
    def patterns(self):
        """What the passes are, see `lowering.lower.LayerInfo`."""
        return self.job.patterns

    # -- constants -------------------------------------------------------------------------------------------------
    def _build_constants(self):
        """Taps and coefficients of each pass, in the order of use. Taps that all passes share come once, before the
        first coefficients."""
        job, beat = self.job, self.sizes.beat_bytes
        shared = job.shared_taps is not None
        self.blobs, parts, at = {}, [], 0
        order = [group for _, groups in self.bundles for group in groups]
        for group in order:
            for run in job.passes[group]:
                if run in self.blobs:
                    continue
                data = (b"" if shared and self.blobs else run.taps) + run.coefficients
                taps = 0 if shared and self.blobs else len(run.taps) // beat
                self.blobs[run] = Blob(at, taps, len(data) // beat)
                parts.append(np.frombuffer(data, np.uint8))
                at += len(data)
        self.weight_source = self.constants.add(np.concatenate(parts))
        self.weight_bytes, self.weight_words = at, at // beat
        self.parameter_source = self.constants.add(pack_parameters(job, self.sizes))
        self.steps_total = max(len(group) for group in job.passes)

    # -- order of work ---------------------------------------------------------------------------------------------
    def _build_items(self):
        plan, out = self.plan, self.job.output
        self.tiles, self.items, self.windows = [], [], []
        for image in range(0, self.batch, plan.images):
            for y in range(0, out.height, plan.rows):
                for x in range(0, out.width, plan.cols):
                    for b in range(0, len(self.bundles), plan.bundles):
                        bundles = tuple(range(b, min(b + plan.bundles, len(self.bundles))))
                        self.tiles.append(Tile(image=image, images=min(plan.images, self.batch - image),
                                               bundles=bundles, first_row=y, rows=min(plan.rows, out.height - y),
                                               first_col=x, cols=min(plan.cols, out.width - x)))
        for number, tile in enumerate(self.tiles):
            self.windows.append((self.tiler.window(0, tile.first_row, tile.rows),
                                 self.tiler.window(1, tile.first_col, tile.cols)))
            places = [(image, strip) for image in range(1 if plan.merged else tile.images)
                      for strip in plan.strips(tile.rows, tile.cols, number == 0)]
            groups = [(place, group) for place, bundle in enumerate(tile.bundles) for group in self.bundles[bundle][1]]
            pairs = [(p, g) for p in places for g in groups] if plan.strips_first else \
                [(p, g) for g in groups for p in places]
            self.items += [BasisItem(tile=number, image=image, bundle=bundle, group=group, strip=strip)
                           for (image, strip), (bundle, group) in pairs]

    def _build_pieces(self):
        """Pieces of input in the order they are needed, and behind which item each is loaded at the latest.

        A tile's own pieces are spread over the items since the piece before was needed, those of the next tile over all
        items of this tile.
        """
        plan, reached = self.plan, {}
        self.pieces, self.ahead = [], [[] for _ in self.items]
        first_of, ready = {}, 0
        for at, item in enumerate(self.items):
            tile, (rows, cols) = self.tiles[item.tile], self.windows[item.tile]
            start = first_of.setdefault(item.tile, at)
            need = self.tiler.rows_needed(rows, tile.first_row + item.strip[0], item.strip[1])
            places = range(item.bundle * tile.images, (item.bundle + 1) * tile.images) if plan.merged else \
                (item.bundle * tile.images + item.image,)
            fresh = []
            for place in places:
                begin = reached.get((item.tile, place), 0)
                grain = max(1, ceil_div(PIECE_UNITS, max(1, cols.data * self.job.span))) if at else need
                for y in range(begin, need, grain):
                    fresh.append(InputPiece(item.tile, place, y, min(y + grain, need), at))
                reached[item.tile, place] = max(need, begin)
            self.pieces += fresh
            if fresh and at > start:
                for k, piece in enumerate(fresh):
                    self.ahead[ready + k * (at - ready) // len(fresh)].append(piece)
            if fresh:
                ready = at
        of_tile = [[] for _ in self.tiles]
        for piece in self.pieces:
            of_tile[piece.tile].append(piece)
        for number in range(1, len(self.tiles)):
            begin, end, mine = first_of[number - 1], first_of[number], of_tile[number]
            for k, piece in enumerate(mine):
                self.ahead[begin + k * (end - begin) // len(mine)].append(piece)
        self._deadlines = [p.deadline for p in self.pieces]

    # -- emission --------------------------------------------------------------------------------------------------
    def preload(self):
        """What the layer needs first and the layer before does not make; placed before the barrier between them."""
        item = self.items[0]
        weights = self._allocation(self.job.passes[item.group][0])
        self.weight.load(weights, min(weights.length, PRELOAD_BEATS))
        self._load_parameters(item.group)

    def emit(self):
        """All instructions of the layer, without the barrier behind it."""
        sizes, plan = self.sizes, self.plan
        self.residual_head, self.bank, self.done = 0, 0, 0
        self.regions = {}
        self.region_words = sizes.activation_blocks // plan.regions // sizes.banks * sizes.banks
        #: What the engine holds: taps; coefficients, groups and terms.
        self.taps, self.coefficients = b"", None
        following = self._following()
        for at, item in enumerate(self.items):
            end = bisect_right(self._deadlines, at)
            for piece in self.pieces[self.done:end]:
                self._load_input(piece)
            self.done = max(self.done, end)
            for number, run in enumerate(self.job.passes[item.group]):
                self._execute(item, run, number)
            self._store(item)
            self.bank ^= 1
            if following[at] is not None:
                self._prefetch(self.job.passes[item.group], self.job.passes[following[at]])
            for piece in self.ahead[at]:
                self._load_input(piece)

    def _following(self):
        """Per item, the next output group with other passes, or None."""
        out, passes = [None] * len(self.items), self.job.passes
        for at in range(len(self.items) - 2, -1, -1):
            after = self.items[at + 1].group
            same = passes[after] is passes[self.items[at].group]
            out[at] = out[at + 1] if same else after
        return out

    def _allocation(self, run, pinned=()):
        blob = self.blobs[run]
        return self.weight.get(run, blob.beats, self.weight_source + blob.source, pinned)

    def _prefetch(self, current, following):
        """Load the weights of the next output group as far as they push out none of these, nor of this one."""
        pinned = set(current)
        for run in following[:MOST_AHEAD]:
            if self.blobs[run].beats:
                allocation = self._allocation(run, pinned)
                if allocation is None:
                    return
                self.weight.load(allocation)
            pinned.add(run)

    def _weights(self, run):
        """(fields, reads) of what a pass loads from the weight buffer."""
        sizes, blob = self.sizes, self.blobs[run]
        held = (run.coefficients, run.groups, run.terms)
        taps = b"" if self.taps.startswith(run.taps) else run.taps
        coefficients = run.coefficients if held != self.coefficients else b""
        if not taps and not coefficients:
            return {}, []
        allocation = self._allocation(run)
        self.weight.load(allocation)
        row, beat = sizes.tap_row_beats * sizes.beat_bytes, sizes.beat_bytes
        if len(taps) // beat > blob.tap_beats:
            raise RuntimeError("lowering lost the taps of a pass")
        first = allocation.base + (0 if taps else blob.tap_beats)
        count = (len(taps) + len(coefficients)) // beat
        if taps:
            self.taps = run.taps
        if coefficients:
            self.coefficients = held
        return {"weight": first, "taps": len(taps) // row, "coefficients": len(coefficients) // beat}, \
            [("weight", first, count)]

    def _execute(self, item, run, number):
        job, plan, tile = self.job, self.plan, self.tiles[item.tile]
        y, n, x, m = item.strip
        windows = self.windows[item.tile]
        rows = self.tiler.extent(0, run, windows[0], tile.first_row + y, n)
        cols = self.tiler.extent(1, run, windows[1], tile.first_col + x, m)
        fields, reads = self._weights(run)
        gb = self.sizes.group_blocks
        place = item.bundle * tile.images + item.image
        base = self.regions[item.tile].base + place * plan.area + (rows.begin * plan.pitch + cols.begin) * plan.cb
        base += run.first * gb
        row_step, col_step = rows.step * plan.pitch * plan.cb, cols.step * plan.cb
        in_rows, out_rows = rows.size, rows.outputs
        if plan.merged:
            in_rows, out_rows, row_step = tile.images, tile.images, plan.area
        high = base + (in_rows - 1) * row_step + (cols.size - 1) * col_step + run.groups * gb
        if run.mode is Mode.DECOMPOSED and run.terms:
            count = [v.bit_length() - 1 for v in run.terms]
            fields |= {"terms": len(count), "n_log2": count + [0] * (4 - len(count))}
        self.program.emit(
            Opcode.EXECUTE_BASIS, reads=[("activation", base, high - base), *reads], writes=[("bank", self.bank, 1)],
            mode=run.mode, base=base, row_step=row_step if in_rows > 1 else 0,
            col_step=col_step if cols.size > 1 else 0, in_rows=in_rows, in_cols=cols.size, out_rows=out_rows,
            out_cols=cols.outputs, pad_top=rows.pad, pad_left=cols.pad, kernel_rows=run.kernel[0],
            kernel_cols=run.kernel[1], stride_rows_log2=rows.stride.bit_length() - 1,
            stride_cols_log2=cols.stride.bit_length() - 1,
            dilation_rows=job.dilation[0] if run.kernel[0] > 1 else 1,
            dilation_cols=job.dilation[1] if run.kernel[1] > 1 else 1, groups=run.groups, channel=run.channel,
            zero_point=job.zero_point, bank=self.bank, accumulate=int(number > 0), operation=job.operation, **fields)
        strip = (tile.first_row + y, n, tile.first_col + x, m)
        micro_steps = pass_cycles(self.tiler, run, *windows, strip)[1] * (tile.images if plan.merged else 1)
        self.macs_executed += micro_steps * self.sizes.config.basis.multiplications

    def _store(self, item):
        job, out, tile = self.job, self.job.output, self.tiles[item.tile]
        y, rows, x, cols = item.strip
        first_row, first_col, image = tile.first_row + y, tile.first_col + x, tile.image + item.image
        merged = self.plan.merged
        rows = tile.images if merged else rows
        parameter = self._load_parameters(item.group)
        r = job.requantization
        fields = {"zero_point": r.zero_point, "low": r.low, "high": r.high}
        reads = [("parameter", parameter, self.sizes.parameter_beats), ("bank", self.bank, 1)]
        if job.residual is not None:
            base = self._load_residual(item.group, image, rows, cols, first_row, first_col)
            fields |= {"residual": 1, "residual_base": base, "residual_zero_point": r.residual_zero_point,
                       "residual_multiplier": r.residual_multiplier}
            reads.append(("residual", base, rows * cols))
        row_stride = out.image_units if merged else out.width
        if not merged and cols == out.width:
            rows, cols = 1, rows * cols
        address = out.offset + out.relative(image, item.group, first_row, first_col)
        self.program.emit(Opcode.STORE, reads=reads, address=address, rows=rows, cols=cols,
                          row_stride=row_stride if rows > 1 else 0, bank=self.bank, parameter=parameter, **fields)

    def _load_residual(self, group, image, rows, cols, first_row, first_col):
        sizes, source = self.sizes, self.job.residual
        units = min(sizes.residual_units, 1 << 16)
        room = max(rows * cols, ceil_div(units, RING_PARTS))
        base = self.residual_head if self.residual_head + room <= units else 0
        self.residual_head = base + room
        row_stride = source.image_units if self.plan.merged else source.width
        self._load_tile(TileTarget.RESIDUAL, ("residual", base, rows * cols),
                        source.offset + source.relative(image, group, first_row, first_col), base,
                        [(rows, row_stride, cols), (cols, 1, 1)])
        return base

    # -- activations -----------------------------------------------------------------------------------------------
    def _load_input(self, piece):
        if piece.loaded:
            return
        piece.loaded = True
        if piece.tile not in self.regions:
            kh, kw = self.job.kernel
            self.regions[piece.tile] = Region(
                self.region_words * (piece.tile % self.plan.regions), Chunk((0, self.job.span), (0, kh), (0, kw)),
                self.tiles[piece.tile], *self.windows[piece.tile], [], 0)
        self._load_piece(self.regions[piece.tile], piece.place, piece.begin, piece.end)
