"""Instructions of one layer: what is loaded when, executed in which pieces, stored where.

Order of work: tile, bundle, column group, strip, chunk, piece. Before each EXECUTE, whatever it needs and is not yet on
chip is loaded; behind it, the loads of later work are placed as early as the buffers allow.
"""
from dataclasses import dataclass

import numpy as np

from lowering.job import pack_parameters
from lowering.steps import Chunk
from lowering.tiling import MAX_COUNT, Plan, Tiler, Window
from spec.derive import ceil_div
from spec.isa import LinearTarget, Opcode, TileTarget

#: A ring is cut into at most so many allocations: each may be one outstanding token.
RING_PARTS = 64
#: Limits of instruction fields.
MAX_TILE_COLS, MAX_TILE_ROWS, MAX_TILE_PLANES = 16383, 4095, 1023
MAX_BEATS = MAX_FILL = MAX_ADDRESS = 65535
#: Steps of the first EXECUTE of a layer; each further one takes twice as many, until all weights are on chip.
FIRST_STEPS = 1
#: Weights that are streamed are cut so finely that so many pieces fit in the buffer.
STREAM_PARTS = 4
#: Units of a burst that is short and yet hides the latency of memory behind those before it.
SHORT_BURST_UNITS = 16
#: Beats of weights loaded while the layer before still runs.
PRELOAD_BEATS = 256


@dataclass
class Allocation:
    """A constant blob in a ring: ``loaded`` of ``length`` words are already requested."""

    base: int
    length: int
    source: int
    loaded: int = 0


class Ring:
    """First-in first-out buffer of constant blobs; a blob that is still there is not loaded again."""

    def __init__(self, name, target, words, word_beats, program, sizes, *, streaming, head=0):
        self.name, self.target, self.words, self.word_beats = name, target, words, word_beats
        self.program, self.sizes = program, sizes
        self.grain = ceil_div(words, RING_PARTS) if streaming else 1
        self.live, self.head = {}, head

    def get(self, key, length, source, pinned=()):
        """The allocation of a blob; None if it is not there and would push out a pinned one."""
        if key in self.live:
            return self.live[key]
        room = min(max(length, self.grain), self.words)
        base = self.head if self.head + room <= self.words else 0
        out = [k for k, a in self.live.items() if a.base < base + room and base < a.base + max(a.length, self.grain)]
        if any(k in pinned for k in out):
            return None
        for k in out:
            del self.live[k]
        self.live[key] = Allocation(base, length, source)
        self.head = base + room
        return self.live[key]

    def load(self, allocation, upto=None):
        """Request a blob's words below ``upto``."""
        upto = allocation.length if upto is None else upto
        step = MAX_BEATS // self.word_beats
        while allocation.loaded < upto:
            count = min(upto - allocation.loaded, step)
            first = allocation.base + allocation.loaded
            address = allocation.source + allocation.loaded * self.word_beats * self.sizes.beat_bytes
            self.program.emit(Opcode.LOAD_LINEAR, writes=[(self.name, first, count)], target=self.target,
                              address=address, beats=count * self.word_beats, base=first)
            allocation.loaded += count


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive steps of a chunk whose table and weights lie on chip together."""

    chunk: int
    number: int
    #: Word offsets of its table and, in a column group's weights, of its tiles; and their lengths.
    table_source: int
    weight_offset: int
    weight_beats: int
    #: Per step: its tile begins at this beat of the piece; -1 where the step before is held.
    tile_beat: tuple[int, ...]
    tile_beats: tuple[int, ...]
    #: Per step: smallest and largest block offset, last kernel row it touches (in the chunk), last block read + 1.
    low: tuple[int, ...]
    high: tuple[int, ...]
    row: tuple[int, ...]

    @property
    def steps(self):
        """Entries."""
        return len(self.low)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One tile: first image and images (more than 1 only for outputs of one pixel), bundles, outputs."""

    image: int
    images: int
    bundles: tuple[int, ...]
    first_row: int
    rows: int
    first_col: int
    cols: int


@dataclass(frozen=True, kw_only=True)
class Item:
    """One strip x chunk x piece: an EXECUTE (or a few, at the start of a layer)."""

    tile: int
    bundle: int
    group: int
    strip: tuple[int, int, int, int]     # first row, rows, first column, columns, all in the tile
    piece: int
    first: bool
    last: bool

    def region_key(self, pieces):
        """What must lie in the activation scratchpad."""
        return self.tile, pieces[self.piece].chunk


@dataclass
class Region:
    """A tile's input in the scratchpad, loaded row piece after row piece, bundle after bundle."""

    base: int
    chunk: Chunk
    tile: Tile
    rows: Window
    cols: Window
    #: (place, first padded row, end); place = bundle place in tile * images + image.
    todo: list
    #: How many pieces there were.
    pieces: int
    #: The piece whose padding is already written, if one is.
    filled: tuple | None = None


class Emitter:
    """What the emitters of both engines share: rings, parameters, and what brings activations on chip."""

    #: Whether long transfers are cut into bursts, so that instructions, which come over the same bus, wait less.
    short_bursts = False

    def __init__(self, job, plan, sizes, program, constants, batch):
        self.job, self.plan, self.sizes = job, plan, sizes
        self.program, self.constants, self.batch = program, constants, batch
        self.bundles = job.bundles()
        self.macs_executed = 0
        self.max_weight_beats = min(sizes.weight_beats, 1 << 16)
        self.step_entries = min(sizes.config.memory.step_entries, MAX_COUNT)
        #: Beats of weights and entries of the step table; set by the subclass.
        self.weight_words = self.steps_total = 0

    def begin(self, before=None):
        """Open the buffers; they go on where those of the layer ``before`` end, so that both can be in use."""
        sizes, memory = self.sizes, self.sizes.config.memory
        planes = self.job.output.planes
        self.parameter_chunk = planes if planes <= memory.parameter_groups else memory.parameter_groups // 2
        parameter_words = min(sizes.parameter_words, 1 << 16)

        def ring(name, target, words, word_beats, total):
            head = getattr(before, name).head if before else 0
            return Ring(name, target, words, word_beats, self.program, sizes, streaming=total > words,
                        head=head if head + total <= words else 0)

        self.weight = ring("weight", LinearTarget.WEIGHT, self.max_weight_beats, 1, self.weight_words)
        self.step = ring("step", LinearTarget.STEP, self.step_entries, sizes.step_beats, self.steps_total)
        self.parameter = ring("parameter", LinearTarget.PARAMETER, parameter_words, 1, planes * sizes.parameter_beats)

    def _load_parameters(self, group):
        """First beat of a column group's parameters; loads their chunk if it is not there."""
        chunk, beats = self.parameter_chunk, self.sizes.parameter_beats
        key = group // chunk
        count = min(chunk, self.job.output.planes - key * chunk) * beats
        source = self.parameter_source + key * chunk * beats * self.sizes.beat_bytes
        allocation = self.parameter.get(key, count, source)
        self.parameter.load(allocation)
        return allocation.base + (group - key * chunk) * beats

    def _fill_piece(self, region, place, begin, end):
        """Padding of padded rows begin..end of one bundle.

        The pixels behind a row's data (its right padding, which is also the next row's left padding) belong to the
        row; those before the first row's data to the first piece; those behind the last row to the last row. Blocks
        of a pixel that no channel group fills (``cb`` is rounded up) meet only weights of 0 and stay as they are.
        """
        plan, rows, cols = self.plan, region.rows, region.cols
        cb, pitch = plan.cb, plan.pitch
        base = region.base + place * plan.area
        pixels = (rows.extent - 1) * pitch + max(cols.extent, cols.before + cols.data)
        if not rows.data or not cols.data:
            if begin == 0:
                self._fill([(base, pixels * cb)], 1, 0)
            return
        if begin == 0:
            self._fill([(base, (rows.before * pitch + cols.before) * cb)], 1, 0)
        first, last = max(begin, rows.before), min(end, rows.before + rows.data)
        if first >= last:
            return
        gap = (pitch - cols.data) * cb
        final = last == rows.before + rows.data
        gaps = last - first - int(final)
        if gap and gaps > 0:
            self._fill([(base + (first * pitch + cols.before + cols.data) * cb, gap)], gaps, pitch * cb)
        if final:
            start = (last - 1) * pitch + cols.before + cols.data
            self._fill([(base + start * cb, (pixels - start) * cb)], 1, 0)

    def _load_piece(self, region, place, begin, end):
        """Padding, unless it is there, and data of padded rows begin..end of one bundle."""
        if region.filled != (place, begin, end):
            self._fill_piece(region, place, begin, end)
        rows, cols = region.rows, region.cols
        first, last = max(begin, rows.before), min(end, rows.before + rows.data)
        if first >= last or not cols.data:
            return
        plan, sizes, job = self.plan, self.sizes, self.job
        cb, pitch = plan.cb, plan.pitch
        base = region.base + place * plan.area
        start_group = self.bundles[region.tile.bundles[place // region.tile.images]][0] + region.chunk.groups[0]
        planes = region.chunk.groups[1] - region.chunk.groups[0]
        gb, source = sizes.group_blocks, job.input
        image = region.tile.image + place % region.tile.images
        origin = base + (first * pitch + cols.before) * cb
        row = rows.start + first - rows.before
        hi = origin + ((last - 1 - first) * pitch + cols.data - 1) * cb + cb
        for plane in range(0, planes, MAX_TILE_PLANES):
            count = min(MAX_TILE_PLANES, planes - plane)
            address = source.offset + source.relative(image, start_group + plane, row, cols.start)
            self._load_tile(TileTarget.ACTIVATION, ("activation", origin, hi - origin), address, origin + plane * gb,
                            [(count, source.height * source.width, gb), (last - first, source.width, pitch * cb),
                             (cols.data, 1, cb)])

    def _fill(self, spans, rows, row_step):
        """FILL of ``rows`` rows; each span is (first block, blocks)."""
        for base, blocks in spans:
            while blocks > 0:
                count = min(blocks, MAX_FILL)
                for r in range(0, rows, MAX_TILE_ROWS):
                    n = min(MAX_TILE_ROWS, rows - r)
                    first = base + r * row_step
                    self.program.emit(Opcode.FILL, value=self.job.fill, rows=n, blocks=count, base=first,
                                      row_step=row_step if n > 1 else 0,
                                      writes=[("activation", first, (n - 1) * row_step + count)])
                base, blocks = base + count, blocks - count

    def _load_tile(self, target, written, address, base, dims):
        """LOAD_TILE over ``dims`` (count, units apart in memory, words apart on chip), outermost first.

        written: (memory, first word, words), or a list of them. Neighbouring dimensions that are contiguous on both
        sides become one, so that bursts are as long as possible.
        """
        merged = []
        for count, memory, chip in reversed(dims):
            if count == 1:
                continue
            if merged and memory == merged[0][0] * merged[0][1] and chip == merged[0][0] * merged[0][2] and \
                    count * merged[0][0] <= MAX_TILE_COLS:
                merged[0] = (count * merged[0][0], *merged[0][1:])
            else:
                merged.insert(0, (count, memory, chip))
        if not merged or merged[-1][1] != 1 or merged[-1][0] > MAX_TILE_COLS:
            merged.append((1, 1, 0))
        if self.short_bursts and len(merged) == 2 and merged[0][1] == merged[1][0] >= SHORT_BURST_UNITS and \
                merged[0][0] <= MAX_TILE_PLANES:
            merged.insert(1, (1, 0, 0))         # as planes, which are requests of their own
        while len(merged) < 3:
            merged.insert(0, (1, 0, 0))
        (planes, plane_stride, plane_step), (rows, row_stride, row_step), (cols, _, col_step) = merged
        written = written if isinstance(written, list) else [written]
        self.program.emit(Opcode.LOAD_TILE, writes=written, target=target, address=address, planes=planes, rows=rows,
                          cols=cols, plane_stride=plane_stride, row_stride=row_stride, base=base, plane_step=plane_step,
                          row_step=row_step, col_step=col_step)

class LayerEmitter(Emitter):
    """Emits one job of the structured engine into a program."""

    def __init__(self, job, plan: Plan, tiler: Tiler, sizes, program, constants, batch):
        super().__init__(job, plan, sizes, program, constants, batch)
        self.tiler = tiler
        self._build_constants()
        self._build_items()

    # -- constants -------------------------------------------------------------------------------------------------
    def _build_constants(self):
        """Steps, tiles and tables of all chunks; cut into pieces; put into the image."""
        job, plan, sizes = self.job, self.plan, self.sizes
        reduction = self.tiler.reduction
        beat = sizes.beat_bytes
        self.pieces, blobs, tables, weight_at = [], [], [], 0
        drafts, total_steps = [], 0
        for number, chunk in enumerate(plan.chunks):
            steps = reduction.steps(chunk, plan.passes, plan.pitch, plan.cb)
            tiles = reduction.tiles(chunk, steps, plan.cb)
            hold = [k > 0 and steps[k].run == steps[k - 1].run and np.array_equal(tiles[k], tiles[k - 1])
                    for k in range(len(steps))]
            drafts.append((number, chunk, steps, tiles, hold))
            total_steps += len(steps)
        # A table that does not fit is streamed, and leaves room for its next piece.
        most_steps = self.step_entries if total_steps <= self.step_entries else self.step_entries // 2
        most_beats = self._most_beats(drafts)
        for number, chunk, steps, tiles, hold in drafts:
            offsets = reduction.tap_offsets(chunk, plan.pitch, plan.cb)
            begin = 0
            while begin < len(steps):
                hold[begin] = False
                end, beats = begin, 0
                while end < len(steps) and end - begin < most_steps:
                    own = 0 if hold[end] else tiles[end].shape[1] // beat
                    if end > begin and beats + own > most_beats:
                        break
                    beats, end = beats + own, end + 1
                self._add_piece(number, chunk, steps[begin:end], tiles[begin:end], hold[begin:end], offsets, weight_at,
                                blobs, tables)
                weight_at += self.pieces[-1].weight_beats
                begin = end
        self.group_beats = weight_at
        weights = np.concatenate(blobs, axis=1)
        # Column groups whose weights are the same (pooling) share one copy.
        self.weight_shared = weights.shape[0] == 1
        self.weight_source = self.constants.add(np.ascontiguousarray(weights).reshape(-1))
        self.weight_bytes = weights.size
        table = np.concatenate(tables, axis=0)
        source = self.constants.add(table.reshape(-1))
        self.table_base = source
        self.parameter_source = self.constants.add(pack_parameters(job, sizes))
        self.steps_total = table.shape[0]
        self.weight_words = self.group_beats * (1 if self.weight_shared else job.output.planes)

    def _most_beats(self, drafts):
        """Beats of weights that one piece may have.

        Weights that do not stay on chip are streamed: equal pieces, at least `STREAM_PARTS` of which fit in the buffer,
        so that the next ones load while one is at work (a long and a short piece by turns would wait for each other).
        """
        group = sum(0 if kept else tile.shape[1] // self.sizes.beat_bytes
                    for _, _, _, tiles, hold in drafts for tile, kept in zip(tiles, hold))
        groups = 1 if drafts[0][3][0].shape[0] == 1 else self.job.output.planes
        if group * groups <= self.max_weight_beats:
            return self.max_weight_beats
        most = max(self.max_weight_beats // STREAM_PARTS, 1)
        # the last tile of a piece may pass the even share, but not the limit
        widest = max(tile.shape[1] // self.sizes.beat_bytes for _, _, _, tiles, _ in drafts for tile in tiles)
        return min(ceil_div(group, ceil_div(group, most)) + widest - 1, most)

    def _add_piece(self, number, chunk, steps, tiles, hold, offsets, weight_at, blobs, tables):
        beat, plan = self.sizes.beat_bytes, self.plan
        tile_beat, tile_beats, low, high, row, at = [], [], [], [], [], 0
        width = chunk.cols[1] - chunk.cols[0]
        for step, tile, kept in zip(steps, tiles, hold):
            places = [int(offsets[t]) + b for t, b in step.segments]
            low.append(min(places))
            high.append(max(places) + step.run.segment_blocks)
            row.append(max(t for t, _ in step.segments) // width)
            tile_beat.append(-1 if kept else at)
            tile_beats.append(0 if kept else tile.shape[1] // beat)
            if not kept:
                blobs.append(tile)
                at += tile.shape[1] // beat
        entry_bytes = self.sizes.step_beats * beat
        source = sum(t.shape[0] for t in tables) * entry_bytes
        tables.append(self.tiler.reduction.table(steps, hold, plan.pitch, plan.cb, chunk))
        self.pieces.append(Piece(chunk=number, number=len(self.pieces), table_source=source, weight_offset=weight_at,
                                 weight_beats=at, tile_beat=tuple(tile_beat), tile_beats=tuple(tile_beats),
                                 low=tuple(low), high=tuple(high), row=tuple(row)))

    @property
    def patterns(self):
        """Hardware patterns that run, in order."""
        return tuple(f"{p.n}:{self.sizes.config.structured.block}" for p in self.plan.passes)

    # -- order of work ---------------------------------------------------------------------------------------------
    def _build_items(self):
        plan, out = self.plan, self.job.output
        self.tiles, self.items = [], []
        count = len(self.bundles)
        for image in range(0, self.batch, plan.images):
            for y in range(0, out.height, plan.rows):
                for x in range(0, out.width, plan.cols):
                    for b in range(0, count, plan.bundles):
                        self.tiles.append(Tile(image=image, images=min(plan.images, self.batch - image),
                                               bundles=tuple(range(b, min(b + plan.bundles, count))),
                                               first_row=y, rows=min(plan.rows, out.height - y), first_col=x,
                                               cols=min(plan.cols, out.width - x)))
        for number, tile in enumerate(self.tiles):
            strips = [(y, min(plan.strip_rows, tile.rows - y), x, min(plan.strip_cols, tile.cols - x))
                      for y in range(0, tile.rows, plan.strip_rows) for x in range(0, tile.cols, plan.strip_cols)]
            for place, bundle in enumerate(tile.bundles):
                for group in self.bundles[bundle][1]:
                    for strip in strips:
                        for k in range(len(self.pieces)):
                            self.items.append(Item(tile=number, bundle=place, group=group, strip=strip, piece=k,
                                                   first=k == 0, last=k == len(self.pieces) - 1))

    # -- emission --------------------------------------------------------------------------------------------------
    def preload(self):
        """What the layer needs first and the layer before does not make; placed before the barrier between them."""
        item = self.items[0]
        piece = self.pieces[item.piece]
        self.step.load(self._table_allocation(item))
        ends = [b + n for b, n in zip(piece.tile_beat, piece.tile_beats) if b >= 0]
        self.weight.load(self._weight_allocation(item), max([e for e in ends if e <= PRELOAD_BEATS] or ends[:1]))
        self._load_parameters(item.group)

    def emit(self):
        """All instructions of the layer, without the barrier behind it."""
        sizes, plan = self.sizes, self.plan
        self.residual_head = 0
        self.regions = {}
        self.region_words = sizes.activation_blocks // plan.regions // sizes.banks * sizes.banks
        self.bank = 0
        keys = [i.region_key(self.pieces) for i in self.items]
        self._find_following()
        run_start, deferred = 0, None
        for at, item in enumerate(self.items):
            if at and keys[at] != keys[at - 1]:
                run_start = at
            self._execute(item, first=at == 0)
            if deferred:
                self._store(*deferred)
                deferred = None
            if item.last:
                # The first strip's parameters and STORE can wait until the second strip's input is on its way.
                if at < len(self.pieces) and at + 1 < len(self.items):
                    deferred = item, self.bank
                else:
                    self._store(item, self.bank)
                self.bank ^= 1
            self._prefetch(at, keys, run_start)

    def _find_following(self):
        """Per item, the first later one that needs other weights, or None."""
        self._following = [None] * len(self.items)
        for at in range(len(self.items) - 2, -1, -1):
            after = self.items[at + 1]
            same = self._weight_key(after) == self._weight_key(self.items[at])
            self._following[at] = self._following[at + 1] if same else after

    def _weight_key(self, item):
        return (0 if self.weight_shared else item.group), item.piece

    def _weight_allocation(self, item, pinned=()):
        piece = self.pieces[item.piece]
        key = self._weight_key(item)
        source = self.weight_source + (key[0] * self.group_beats + piece.weight_offset) * self.sizes.beat_bytes
        return self.weight.get(key, piece.weight_beats, source, pinned)

    def _table_allocation(self, item, pinned=()):
        piece = self.pieces[item.piece]
        return self.step.get(item.piece, piece.steps, self.table_base + piece.table_source, pinned)

    def _execute(self, item, first):
        """The item's EXECUTE; the layer's first one is cut so that it begins when its first weights are there."""
        piece, plan = self.pieces[item.piece], self.plan
        if first:       # padding needs no data: it is written while the first data are on their way
            region = self._region(item)
            region.filled = region.todo[0]
            self._fill_piece(region, *region.filled)
        table = self._table_allocation(item)
        self.step.load(table)
        weights = self._weight_allocation(item)
        cuts = [0, piece.steps]
        if first:
            ready = sum(b + n <= weights.loaded for b, n in zip(piece.tile_beat, piece.tile_beats) if b >= 0)
            cuts = self._first_cuts(piece, max(FIRST_STEPS, ready))
        y, rows, x, cols = item.strip
        images = self.tiles[item.tile].images
        for begin, end in zip(cuts, cuts[1:]):
            start = piece.tile_beat[begin]
            stop = max(b + n for b, n in zip(piece.tile_beat[begin:end], piece.tile_beats[begin:end]))
            self.weight.load(weights, stop)
            region = self._region(item)
            self._load_rows(region, item.bundle, self._need(item, max(piece.row[begin:end])))
            job = self.job
            base = region.base + item.bundle * images * plan.area
            base += (y * job.stride[0] * plan.pitch + x * job.stride[1]) * plan.cb
            row_step = job.stride[0] * plan.pitch * plan.cb if rows > 1 else 0
            col_step = job.stride[1] * plan.cb if cols > 1 else 0
            if images > 1:
                rows, row_step = images, plan.area
            low = base + min(piece.low[begin:end])
            high = base + (rows - 1) * row_step + (cols - 1) * col_step + max(piece.high[begin:end])
            self.program.emit(
                Opcode.EXECUTE, base=base, rows=rows, cols=cols, row_step=row_step, col_step=col_step,
                weight=weights.base + start, step=table.base + begin, steps=end - begin, bank=self.bank,
                accumulate=int(not (item.first and begin == 0)), operation=job.operation,
                reads=[("activation", low, high - low), ("weight", weights.base + start, stop - start),
                       ("step", table.base + begin, end - begin)],
                writes=[("bank", self.bank, 1)])
            self.macs_executed += (end - begin) * rows * cols * self.sizes.config.structured.multipliers

    @staticmethod
    def _first_cuts(piece, size):
        """Ends of the layer's first EXECUTEs: ``size`` steps, then more; each new kernel row begins anew."""
        cuts, row = [0], piece.row[0]
        while cuts[-1] < piece.steps:
            end = cuts[-1] + 1
            while end < piece.steps and (piece.tile_beat[end] < 0 or end - cuts[-1] < size and piece.row[end] <= row):
                end += 1
            cuts.append(end)
            fresh = end < piece.steps and piece.row[end] > row
            size, row = (max(FIRST_STEPS, size - end), piece.row[end]) if fresh else (2 * size, row)
        return cuts

    def _need(self, item, kernel_row):
        """Padded rows that must be there for a strip up to a kernel row."""
        y, rows, _, _ = item.strip
        return (y + rows - 1) * self.job.stride[0] + kernel_row * self.job.dilation[0] + 1

    def _store(self, item, bank):
        job, out, tile = self.job, self.job.output, self.tiles[item.tile]
        y, rows, x, cols = item.strip
        first_row, first_col = tile.first_row + y, tile.first_col + x
        rows = tile.images if tile.images > 1 else rows
        parameter = self._load_parameters(item.group)
        r = job.requantization
        fields = {"zero_point": r.zero_point, "low": r.low, "high": r.high}
        reads = [("parameter", parameter, self.sizes.parameter_beats), ("bank", bank, 1)]
        if job.residual is not None:
            base = self._load_residual(item, rows, cols, first_row, first_col)
            fields |= {"residual": 1, "residual_base": base, "residual_zero_point": r.residual_zero_point,
                       "residual_multiplier": r.residual_multiplier}
            reads.append(("residual", base, rows * cols))
        row_stride = out.width
        if tile.images > 1:
            row_stride = out.image_units
        elif cols == out.width:
            rows, cols = 1, rows * cols
        address = out.offset + out.relative(tile.image, item.group, first_row, first_col)
        self.program.emit(Opcode.STORE, reads=reads, address=address, rows=rows, cols=cols,
                          row_stride=row_stride if rows > 1 else 0, bank=bank, parameter=parameter, **fields)

    def _load_residual(self, item, rows, cols, first_row, first_col):
        sizes, source = self.sizes, self.job.residual
        units = min(sizes.residual_units, 1 << 16)
        room = max(rows * cols, ceil_div(units, RING_PARTS))
        base = self.residual_head if self.residual_head + room <= units else 0
        self.residual_head = base + room
        address = source.offset + source.relative(self.tiles[item.tile].image, item.group, first_row, first_col)
        row_stride = source.image_units if self.tiles[item.tile].images > 1 else source.width
        self._load_tile(TileTarget.RESIDUAL, ("residual", base, rows * cols), address, base,
                        [(rows, row_stride, cols), (cols, 1, 1)])
        return base

    # -- activations -----------------------------------------------------------------------------------------------
    def _region(self, item):
        key = item.region_key(self.pieces)
        if key not in self.regions:
            self._open_region(key)
        return self.regions[key]

    def _open_region(self, key, beside=None):
        """Take a region for a tile's chunk, another one than ``beside``; what lay there is forgotten."""
        plan = self.plan
        base = self.region_words if beside is not None and beside.base == 0 else 0
        if base and plan.regions == 1:
            raise RuntimeError("lowering prefetched into a region that is in use")
        self.regions = {k: r for k, r in self.regions.items() if r.base != base}
        tile, chunk = self.tiles[key[0]], plan.chunks[key[1]]
        rows = self.tiler.windows(0, tile.first_row, tile.rows, chunk)
        cols = self.tiler.windows(1, tile.first_col, tile.cols, chunk)
        first_ever = key == (0, 0)
        ends = set()
        kernel_rows = chunk.rows[1] - chunk.rows[0]
        for y in range(0, tile.rows, plan.strip_rows):
            last = min(y + plan.strip_rows, tile.rows) - 1
            rows_needed = range(kernel_rows) if tile.images == 1 and first_ever and y == 0 else (kernel_rows - 1,)
            ends |= {last * self.job.stride[0] + r * self.job.dilation[0] + 1 for r in rows_needed}
        ends = sorted(ends | {rows.extent})
        if tile.images > 1:
            ends = [rows.extent]
        todo = [(place, a, b) for place in range(len(tile.bundles) * tile.images) for a, b in zip([0, *ends], ends)]
        self.regions[key] = Region(base, chunk, tile, rows, cols, todo, len(todo))

    def _load_rows(self, region, bundle, need):
        """Load pieces until padded rows below ``need`` of a bundle are requested."""
        while region.todo:
            place, begin, _ = region.todo[0]
            if place // region.tile.images > bundle or place // region.tile.images == bundle and begin >= need:
                return
            self._load_piece(region, *region.todo.pop(0))

    # -- prefetch --------------------------------------------------------------------------------------------------
    def _prefetch(self, at, keys, run_start):
        """Loads for later items, placed behind item ``at``: the next weights and a share of the next tile."""
        item = self.items[at]
        region = self.regions[keys[at]]
        if region.todo and region.todo[0][0] // region.tile.images <= item.bundle:
            return          # what this column group still needs comes first
        current = self._weight_key(item)
        following = self._following[at]
        if following is not None and (self.weight.live[current].loaded == self.weight.live[current].length):
            allocation = self._weight_allocation(following, pinned=(current,))
            if allocation is not None:
                table = self._table_allocation(following, pinned=(item.piece,))
                if table is not None:
                    self.step.load(table)
                self.weight.load(allocation)
        # The rest of this tile, then the next one, spread evenly over the items that use this one.
        self._spread(at, keys, run_start)

    def _spread(self, at, keys, run_start):
        end = at + 1
        while end < len(keys) and keys[end] == keys[at]:
            end += 1
        done, total = at + 1 - run_start, end - run_start
        if end < len(keys):
            if keys[end] not in self.regions:
                self._open_region(keys[end], beside=self.regions[keys[at]])
            region = self.regions[keys[end]]
            while region.todo and (region.pieces - len(region.todo)) * total < region.pieces * done:
                self._load_piece(region, *region.todo.pop(0))

