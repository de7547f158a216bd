"""Terms to steps: sub-passes of supported N, segments of the stream fetch, weight tiles and step tables.

A step reads ``Q = fetch_blocks(n)`` blocks per pixel as ``Q / L`` segments of L consecutive blocks. What a sub-pass
needs is cut into segments (kernel tap, L-block range); segments are packed into steps so that those of one step lie in
different banks: with ``banks`` banks of one block each, ``offset / L mod (banks / L)`` must differ. The fewest steps
for given L are ``max(ceil(segments / (Q / L)), largest class)``, and the packing below reaches that number.
"""
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from spec.derive import ceil_div
from spec.formats import step_entry
from spec.isa import Operation


@dataclass(frozen=True)
class Chunk:
    """Part of the reduction that one activation tile holds: channel groups and kernel positions, half-open ranges."""

    groups: tuple[int, int]
    rows: tuple[int, int]
    cols: tuple[int, int]


@dataclass(frozen=True)
class Pass:
    """Elements ``first .. first + take - 1`` of each block's non-zeros, run as hardware pattern ``n``:block."""

    part: int
    first: int
    take: int
    n: int
    #: Blocks per segment.
    segment_blocks: int


@dataclass(frozen=True)
class Step:
    """One step: its pass and its segments (tap index, first block), at most Q / L of them."""

    run: Pass
    segments: tuple[tuple[int, int], ...]


def split_candidates(part, sizes):
    """Ways to run a part: lists of (first, take, n). A dense part has one; others also try wider patterns."""
    block = sizes.config.structured.block
    supported = sorted((p.n for p in sizes.config.structured.patterns), reverse=True)
    if part.dense:
        return [[(0, block, block)]]
    greedy, first = [], 0
    while first < part.required:
        left = part.required - first
        n = next((n for n in supported if n <= left), supported[-1])
        greedy.append((first, min(n, left), n))
        first += n
    wide = min(n for n in supported if n >= part.required)
    out = [greedy]
    for single in (wide, block):
        if [(0, part.required, single)] not in out:
            out.append([(0, part.required, single)])
    return out


def segment_choices(n, cb, sizes):
    """Possible L of pattern ``n`` when a pixel has ``cb`` blocks: powers of two that divide cb and need few taps."""
    fetch, length, out = sizes.fetch_blocks(n), 1, []
    while length <= fetch:
        if cb % length == 0 and fetch // length <= sizes.config.structured.taps:
            out.append(length)
        length *= 2
    return out


def needed(counts, first, cb, length):
    """(tap, range) mask: which L-block ranges hold an element at or beyond ``first``. counts: [taps, blocks]."""
    taps, blocks = counts.shape
    padded = np.zeros((taps, cb), bool)
    padded[:, :blocks] = counts > first
    return padded.reshape(taps, cb // length, length).any(axis=2)


def classes(mask, offsets, length, sizes):
    """Bank class of each segment of ``mask``: offset / L mod (banks / L). offsets: [taps] in blocks."""
    tap, rank = np.nonzero(mask)
    return tap, rank, (offsets[tap] // length + rank) % (sizes.banks // length)


def count_steps(mask, offsets, length, n, sizes, one_tap):
    """Fewest steps for the segments of ``mask``."""
    if one_tap:
        return max(1, int(mask.any(axis=1).sum()))
    tap, _, kind = classes(mask, offsets, length, sizes)
    if not tap.size:
        return 0
    return max(ceil_div(tap.size, sizes.fetch_blocks(n) // length), int(np.bincount(kind).max()))


def pack_segments(mask, offsets, length, n, sizes, one_tap):
    """Steps as lists of (tap, first block); the number is `count_steps`."""
    tap, rank, kind = classes(mask, offsets, length, sizes)
    segments = [(int(t), int(r) * length) for t, r in zip(tap, rank)]
    if one_tap:
        return [[s for s in segments if s[0] == t] for t in sorted({t for t, _ in segments})]
    room = sizes.fetch_blocks(n) // length
    best = count_steps(mask, offsets, length, n, sizes, False)
    steps = _earliest(segments, kind.tolist(), room)
    return steps if len(steps) == best else _balanced(segments, kind.tolist(), room)


def _earliest(segments, kinds, room):
    """Each step takes the first segments left that fit: early steps touch only early kernel rows."""
    left, steps = list(zip(segments, kinds)), []
    while left:
        used, step, rest = set(), [], []
        for at, (segment, kind) in enumerate(left):
            if len(step) == room:
                rest += left[at:]
                break
            if kind in used:
                rest.append((segment, kind))
            else:
                used.add(kind)
                step.append(segment)
        steps.append(step)
        left = rest
    return steps


def _balanced(segments, kinds, room):
    """Each step takes one segment of each of the fullest classes: the fewest steps."""
    queues = {}
    for segment, kind in zip(segments, kinds):
        queues.setdefault(kind, []).append(segment)
    steps = []
    while queues:
        fullest = sorted(queues, key=lambda k: (-len(queues[k]), queues[k][0]))[:room]
        steps.append(sorted(queues[k].pop(0) for k in fullest))
        queues = {k: q for k, q in queues.items() if q}
    return steps


class Reduction:
    """All terms of a job, sorted into sub-passes; tiles and tables for a geometry.

    Args: job: `lowering.job.Job`. sizes: `spec.derive.Sizes`.
    """

    def __init__(self, job, sizes):
        self.job, self.sizes = job, sizes
        self.one_tap = job.operation == Operation.MAX
        self.candidates = [split_candidates(p, sizes) for p in job.parts]

    @cached_property
    def _counts(self):
        """Per part, most non-zeros of any column's block: [taps, blocks]; a dense part needs what is not all zero."""
        out = []
        for part in self.job.parts:
            counts = np.count_nonzero(part.weights, axis=-1).max(axis=(0, 1))
            out.append(counts)
        return out

    @cached_property
    def _sorted(self):
        """Per part: values and places with each block's non-zeros first, in rising order of place."""
        out = []
        for part in self.job.parts:
            order = np.argsort(part.weights == 0, axis=-1, kind="stable").astype(np.uint8)
            out.append((np.take_along_axis(part.weights, order, axis=-1), order))
        return out

    def tap_offsets(self, chunk, pitch, cb):
        """Block offset of each kernel position of a chunk from the window's origin."""
        dy, dx = self.job.dilation
        rows, cols = np.arange(chunk.rows[1] - chunk.rows[0]), np.arange(chunk.cols[1] - chunk.cols[0])
        return ((rows[:, None] * dy * pitch + cols * dx) * cb).reshape(-1)

    def _select(self, array, chunk):
        """A chunk's kernel positions and blocks of an array [..., taps, blocks]."""
        kh, kw = self.job.kernel
        gb = self.sizes.group_blocks
        shaped = array.reshape(*array.shape[:-2], kh, kw, array.shape[-1])
        part = shaped[..., slice(*chunk.rows), slice(*chunk.cols), chunk.groups[0] * gb:chunk.groups[1] * gb]
        return part.reshape(*array.shape[:-2], -1, part.shape[-1])

    def choose(self, chunks, pitch, cb):
        """Passes with the fewest steps (then the fewest tile beats) and that number of steps over all chunks.

        Returns (steps, beats, passes), or None where this geometry cannot be streamed.
        """
        offsets = [self.tap_offsets(c, pitch, cb) for c in chunks]
        total_steps = total_beats = 0
        passes = []
        for at, splits in enumerate(self.candidates):
            counts = [self._select(self._counts[at], c) for c in chunks]
            best = None
            for split in splits:
                found = self._choose_split(at, split, counts, offsets, cb)
                if found and (best is None or found[:2] < best[:2]):
                    best = found
            if best is None:
                return None
            total_steps, total_beats = total_steps + best[0], total_beats + best[1]
            passes += best[2]
        if not passes:
            # All weights are 0: one step must still set the accumulators.
            dense = self.sizes.config.structured.block
            length = max(segment_choices(dense, cb, self.sizes))
            passes = [Pass(0, 0, 0, dense, length)]
            total_steps, total_beats = len(chunks), len(chunks) * self.sizes.tile_beats(dense)
        return total_steps, total_beats, passes

    def _choose_split(self, at, split, counts, offsets, cb):
        sizes = self.sizes
        gb, steps, beats, passes = sizes.group_blocks, 0, 0, []
        for first, take, n in split:
            best = None
            # A pass of few segments may take as few steps in a wider pattern; a dense tile cannot hold part of a block.
            wider = [p.n for p in sizes.config.structured.patterns if n <= p.n < p.m] if len(split) > 1 else [n]
            for hw in wider:
                for length in segment_choices(hw, cb, sizes):
                    if self.one_tap and sizes.fetch_blocks(hw) < gb:
                        continue
                    count = sum(count_steps(needed(c, first, cb, length), o, length, hw, sizes, self.one_tap)
                                for c, o in zip(counts, offsets))
                    key = (count, count * sizes.tile_beats(hw), -length)
                    if best is None or key < best[0]:
                        best = key, Pass(at, first, take, hw, length)
            if best is None:
                return None
            steps, beats = steps + best[0][0], beats + best[0][1]
            if best[0][0]:
                passes.append(best[1])
        return steps, beats, passes

    def steps(self, chunk, passes, pitch, cb):
        """The steps of a chunk, pass after pass."""
        offsets = self.tap_offsets(chunk, pitch, cb)
        out = []
        for run in passes:
            mask = needed(self._select(self._counts[run.part], chunk), run.first, cb, run.segment_blocks)
            if run.take:
                out += [Step(run, tuple(p)) for p in
                        pack_segments(mask, offsets, run.segment_blocks, run.n, self.sizes, self.one_tap)]
        if not out:
            # Nothing to add: one step with all weights 0 (the accumulators must be set by somebody).
            out = [Step(Pass(passes[0].part, 0, 0, passes[0].n, passes[0].segment_blocks), ((0, 0),))]
        return out

    def tiles(self, chunk, steps, cb):
        """Packed weight tiles of all column groups: a list, per step, of uint8 [column groups or 1, tile bytes]."""
        out = []
        begin = 0
        while begin < len(steps):
            end = begin
            while end < len(steps) and steps[end].run == steps[begin].run:
                end += 1
            out += self._tiles_of_pass(chunk, steps[begin:end], cb)
            begin = end
        return out

    def _tiles_of_pass(self, chunk, steps, cb):
        sizes, s = self.sizes, self.sizes.config.structured
        run = steps[0].run
        part = self.job.parts[run.part]
        groups = part.weights.shape[0]
        slots = np.arange(s.slots)
        position, element = slots // run.n, slots % run.n
        room = sizes.fetch_blocks(run.n) // run.segment_blocks
        segment, inside = position // run.segment_blocks, position % run.segment_blocks
        tap = np.zeros((len(steps), s.slots), np.int64)
        block = np.zeros((len(steps), s.slots), np.int64)
        valid = np.zeros((len(steps), s.slots), bool)
        limit = (chunk.groups[1] - chunk.groups[0]) * sizes.group_blocks
        dense = run.n == s.block
        # A dense tile has no indices: every element stands in its own place, also those of a sparser part.
        used = position < room * run.segment_blocks
        used &= (run.take > 0) if dense else element < run.take
        for at, step in enumerate(steps):
            for j, (t, b) in enumerate(step.segments):
                on = (segment == j) & used
                tap[at, on], block[at, on], valid[at, on] = t, b + inside[on], True
        valid &= block < limit
        # Absolute coordinates: taps of the whole kernel, blocks of the column group's whole range.
        width = chunk.cols[1] - chunk.cols[0]
        tap = (chunk.rows[0] + tap // width) * self.job.kernel[1] + chunk.cols[0] + tap % width
        block = np.where(valid, block, 0) + chunk.groups[0] * sizes.group_blocks
        if dense:
            values = part.weights[:, :, tap, block, element[None]]
        else:
            sorted_values, places = self._sorted[run.part]
            element = np.where(element < run.take, element + run.first, 0)
            values = sorted_values[:, :, tap, block, element[None]]
            index = places[:, :, tap, block, element[None]]
        values = np.where(valid, values, 0).transpose(0, 2, 3, 1)                # [groups, steps, slots, columns]
        data = _pad(np.ascontiguousarray(values).view(np.uint8).reshape(groups, len(steps), -1),
                    sizes.value_beats * sizes.beat_bytes)
        if not dense:
            index = np.where(values != 0, index.transpose(0, 2, 3, 1), 0).reshape(groups, len(steps), -1, 1)
            bits = (index >> np.arange(sizes.index_bits, dtype=np.uint8) & 1).astype(np.uint8)
            packed = np.packbits(bits.reshape(groups, len(steps), -1), axis=-1, bitorder="little")
            data = np.concatenate([data, _pad(packed, sizes.index_beats * sizes.beat_bytes)], axis=-1)
        return [data[:, k] for k in range(len(steps))]

    def table(self, steps, hold, pitch, cb, chunk):
        """Step-table entries, uint8 [steps, step beats * beat bytes]. hold: one flag per step."""
        sizes = self.sizes
        taps = sizes.config.structured.taps
        record = step_entry(taps)
        offsets = self.tap_offsets(chunk, pitch, cb)
        out = np.zeros((len(steps), sizes.step_beats * sizes.beat_bytes), np.uint8)
        for row, step, kept in zip(out, steps, hold):
            places = [int(offsets[t]) + b for t, b in step.segments]
            room = sizes.fetch_blocks(step.run.n) // step.run.segment_blocks
            word = record.pack(offset=places + [0] * (taps - len(places)),
                               enable=[int(j < len(places)) for j in range(taps)],
                               n_log2=step.run.n.bit_length() - 1, segments_log2=room.bit_length() - 1, hold=int(kept))
            row[:16] = np.frombuffer(word.to_bytes(16, "little"), np.uint8)
        return out


def _pad(array, size):
    """Zeros at the end of the last axis, up to ``size``."""
    return np.concatenate([array, np.zeros((*array.shape[:-1], size - array.shape[-1]), np.uint8)], axis=-1)
