"""Instructions of one layer of the basis engine: what is loaded when, in which passes, stored where.

Order of work: in the first tile that of its `lowering.basis_schedule.Schedule`; then tile, strip and output group (or
output group and strip), pass. Input rows are loaded before the first pass that needs them, in pieces spread over the
passes before; taps and coefficients one output group ahead.
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

    short_bursts = True

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
            if number == 0:
                self.items += [BasisItem(tile=0, image=step.image, bundle=step.place, group=step.group,
                                         strip=step.strip) for step in plan.schedule.steps]
                continue
            places = [(image, strip) for image in range(1 if plan.merged else tile.images)
                      for strip in plan.strips(tile.rows, tile.cols)]
            groups = [(place, group) for place, bundle in enumerate(tile.bundles) for group in self.bundles[bundle][1]]
            pairs = [(p, g) for p in places for g in groups] if plan.strips_first else \
                [(p, g) for g in groups for p in places]
            self.items += [BasisItem(tile=number, image=image, bundle=bundle, group=group, strip=strip)
                           for (image, strip), (bundle, group) in pairs]

    def _build_pieces(self):
        """Pieces of input in the order they are needed, and behind which item each is loaded at the latest.

        The first tile's are part of its schedule. Those of the next tile are spread over all items of this tile, or of
        the first over those behind its own transfers.
        """
        plan, reached = self.plan, {}
        self.pieces, self.ahead = [], [[] for _ in self.items]
        first_of = {}
        for at, item in enumerate(self.items):
            tile, (rows, cols) = self.tiles[item.tile], self.windows[item.tile]
            first_of.setdefault(item.tile, at)
            if item.tile == 0:
                continue
            need = self.tiler.rows_needed(rows, tile.first_row + item.strip[0], item.strip[1])
            places = range(item.bundle * tile.images, (item.bundle + 1) * tile.images) if plan.merged else \
                (item.bundle * tile.images + item.image,)
            for place in places:
                begin = reached.get((item.tile, place), 0)
                grain = max(1, ceil_div(PIECE_UNITS, max(1, cols.data * self.job.span)))
                for y in range(begin, need, grain):
                    self.pieces.append(InputPiece(item.tile, place, y, min(y + grain, need), at))
                reached[item.tile, place] = max(need, begin)
        of_tile = [[] for _ in self.tiles]
        for piece in self.pieces:
            of_tile[piece.tile].append(piece)
        for number in range(1, len(self.tiles)):
            begin, end, mine = first_of[number - 1], first_of[number], of_tile[number]
            if number == 1:
                begin = min(plan.schedule.quiet, end - 1)
            for k, piece in enumerate(mine):
                self.ahead[begin + k * (end - begin) // len(mine)].append(piece)
        #: Output groups of the first tile in the order in which they begin.
        self.group_order = list(dict.fromkeys(step.group for step in plan.schedule.steps))
        self._deadlines = [p.deadline for p in self.pieces]

    # -- emission --------------------------------------------------------------------------------------------------
    def preload(self):
        """What the layer needs first and the layer before does not make; placed before the barrier between them."""
        item = self.items[0]
        weights = self._allocation(self.job.passes[item.group][0])
        self.weight.load(weights, min(weights.length, PRELOAD_BEATS))
        super()._load_parameters(item.group)

    def emit(self):
        """All instructions of the layer, without the barrier behind it."""
        sizes, plan = self.sizes, self.plan
        self.residual_head, self.bank, self.done = 0, 0, 0
        self.regions = {}
        self.region_words = sizes.activation_blocks // plan.regions // sizes.banks * sizes.banks
        #: What the engine holds: taps; coefficients, groups and terms.
        self.taps, self.coefficients = b"", None
        following = self._following()
        before = plan.schedule.before
        for at, item in enumerate(self.items):
            for transfer in before[at] if at < len(before) else ():
                self._transfer(transfer, item.group)
            end = bisect_right(self._deadlines, at)
            for piece in self.pieces[self.done:end]:
                self._load_input(piece)
            self.done = max(self.done, end)
            for number, run in enumerate(self.job.passes[item.group]):
                self._execute(item, run, number)
            self._store(item)
            self.bank ^= 1
            if following[at] is not None and (at >= len(before) or self._spare(at)):
                self._prefetch(self.job.passes[item.group], self.job.passes[following[at]])
            for piece in self.ahead[at]:
                self._load_input(piece)

    def _spare(self, at):
        """Whether weights that do not all fit may be loaded ahead behind an item of the first tile: not before input
        that the same output group still waits for."""
        if self.tiler.resident or at + 1 >= len(self.items) or self.items[at + 1].group != self.items[at].group:
            return not self.tiler.resident
        return not any(t.end for transfers in self.plan.schedule.before[at + 1:] for t in transfers)

    def _transfer(self, transfer, current):
        """One transfer of the first tile's schedule, before an item of output group ``current``."""
        if transfer.parameters:
            self._parameters_upto(transfer.parameters)
        elif transfer.group is None:
            tile = self.tiles[0]
            self._open(0)
            place = transfer.place * tile.images + transfer.image
            if transfer.cols:
                self._load_columns(self.regions[0], place, transfer)
            else:
                self._load_piece(self.regions[0], place, transfer.begin, transfer.end)
        elif self.tiler.resident or transfer.group == current:
            for run in self.job.passes[transfer.group]:
                if self.blobs[run].beats and (self.tiler.resident or not self.weight.live):
                    self.weight.load(self._allocation(run))
        else:
            order = self.group_order
            between = order[order.index(current):order.index(transfer.group)]
            earlier = [run for group in between for run in self.job.passes[group]]
            # no weights before those that are used before them
            if all(run in self.weight.live for run in earlier):
                self._prefetch(earlier, self.job.passes[transfer.group])

    def _parameters_upto(self, groups):
        """Load the parameters of the first output groups; all are on chip together or in chunks."""
        beats = self.sizes.parameter_beats
        allocation = self.parameter.get(0, self.parameter_chunk * beats, self.parameter_source)
        self.parameter.load(allocation, groups * beats)

    def _load_parameters(self, group):
        if self.parameter_chunk < self.job.output.planes:
            return super()._load_parameters(group)
        self._parameters_upto(group + 1)
        return self.parameter.live[0].base + group * self.sizes.parameter_beats

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
        """Load the weights of the next output group as far as they push out none of these, nor of its own."""
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
        width = (cols.size - 1) * col_step + run.groups * gb
        # row by row, as columns beside these may still be on their way
        spans = [(base + k * row_step, width) for k in range(in_rows)] if width < row_step else \
            [(base, (in_rows - 1) * row_step + width)]
        if run.mode is Mode.DECOMPOSED and run.terms:
            count = [v.bit_length() - 1 for v in run.terms]
            fields |= {"terms": len(count), "n_log2": count + [0] * (4 - len(count))}
        self.program.emit(
            Opcode.EXECUTE_BASIS, reads=[("activation", *span) for span in spans] + reads,
            writes=[("bank", self.bank, 1)],
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
    def _open(self, number):
        """The region of a tile's input."""
        if number not in self.regions:
            kh, kw = self.job.kernel
            self.regions[number] = Region(
                self.region_words * (number % self.plan.regions), Chunk((0, self.job.span), (0, kh), (0, kw)),
                self.tiles[number], *self.windows[number], [], 0)

    def _load_input(self, piece):
        if piece.loaded:
            return
        piece.loaded = True
        self._open(piece.tile)
        self._load_piece(self.regions[piece.tile], piece.place, piece.begin, piece.end)

    def _load_columns(self, region, place, transfer):
        """Some columns of rows without padding."""
        plan, job, gb = self.plan, self.job, self.sizes.group_blocks
        start_group = self.bundles[region.tile.bundles[place // region.tile.images]][0]
        row, col = region.rows.start + transfer.begin, region.cols.start + transfer.first_col
        rows, cols = transfer.end - transfer.begin, transfer.cols
        base = region.base + place * plan.area + (transfer.begin * plan.pitch + transfer.first_col) * plan.cb
        address = job.input.offset + job.input.relative(region.tile.image + transfer.image, start_group, row, col)
        step = plan.pitch * plan.cb
        written = [("activation", base + k * step, cols * plan.cb) for k in range(rows)]
        self._load_tile(TileTarget.ACTIVATION, written, address, base,
                        [(job.span, job.input.height * job.input.width, gb), (rows, job.input.width, step),
                         (cols, 1, plan.cb)])
