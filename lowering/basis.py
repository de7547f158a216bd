"""Layers in the form that the basis engine runs: passes of EXECUTE_BASIS with their taps and coefficients.

Every output group (one output channel per block) has its own list of passes, which add up in one accumulator bank:

* DECOMPOSED: a basis convolution, ``slices`` basis kernels per pass.
* DENSE: ``slices`` channels of one channel group per pass, padding in the instruction.
* POINTWISE: a run of channel groups per pass that lie one after the other in the scratchpad. The groups of a pixel are
  followed by those of the next one, so that a run may cover a whole kernel row. Padding lies in the scratchpad.

Groups, blocks and channels are those of docs/basis.md: channel c has position ``c % group_channels`` of group
``c // group_channels``.
"""
from dataclasses import dataclass, field, replace

import numpy as np

from compress.network import Add, BasisConvolution, Convolution, Pool
from golden.coefficients import (cheapest_series, map_words, pack_maps, pack_series, pack_taps, series_words,
                                 taps_of_basis, taps_of_kernels, taps_of_pointwise)
from lowering.job import bundles_of, check_shape, common_fields
from lowering.layout import Placement
from spec.config import IntSpec
from spec.derive import BIAS, ceil_div
from spec.errors import InputError
from spec.isa import MAX_KERNEL_ROWS, Mode, Operation

#: Largest values of instruction fields.
MAX_STRIDE, MAX_DILATION, MAX_PAD, MAX_GROUPS = 8, 7, 15, 255
#: Estimated cycles of a pass beyond its micro-steps.
PASS_OVERHEAD_CYCLES = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class BasisPass:
    """One EXECUTE_BASIS of each strip of an output group."""

    mode: Mode
    #: Kernel of the pass; 1 x 1 in POINTWISE.
    kernel: tuple[int, int]
    #: Kernel position of the layer where the pass begins.
    tap: tuple[int, int] = (0, 0)
    #: First channel group, counted from the first that the output group reads, and how many.
    first: int = 0
    groups: int = 1
    #: DENSE: first channel position.
    channel: int = 0
    #: N of the terms of a series.
    terms: tuple[int, ...] = ()
    #: Packed taps and coefficients.
    taps: bytes = field(repr=False)
    coefficients: bytes = field(default=b"", repr=False)
    #: Estimated cycles that the coefficients take from the weight buffer until they can be used.
    load_cycles: int = 0
    #: Estimated cycles per streamed pixel before the multipliers.
    stage_cycles: float = 1
    #: Micro-steps of a kernel row per output; of a pixel in POINTWISE.
    micro_steps: int = 1

    @property
    def work(self):
        """All that the cycles of a pass depend on beside its pixels."""
        return self.mode, self.kernel, self.stage_cycles, self.micro_steps


@dataclass(frozen=True, kw_only=True, eq=False)
class BasisJob:
    """One layer of the basis engine, ready for tiling. Names as in `lowering.job.Job`."""

    name: str
    op: str
    format: str
    mark: int
    input: Placement
    output: Placement
    residual: Placement | None
    kernel: tuple[int, int]
    stride: tuple[int, int]
    origin: tuple[int, int]
    dilation: tuple[int, int]
    #: Value outside the image, where padding lies in the scratchpad.
    fill: int
    #: What the engine subtracts from every activation.
    zero_point: int = 0
    operation: Operation = Operation.ADD
    starts: tuple[int, ...] = ()
    span: int = 1
    requantization: object
    macs_dense: int = 0
    #: Passes of each output group.
    passes: tuple[tuple[BasisPass, ...], ...] = ()
    #: Whether padding lies in the scratchpad.
    border: bool = False
    patterns: tuple[str, ...] = ()

    def bundles(self):
        """Runs of output groups that read the same channel groups: (first channel group, [output groups])."""
        return bundles_of(self.starts)

    @property
    def pointwise(self):
        """Whether each output reads one pixel per pass, so that outputs may lie anywhere."""
        return self.passes[0][0].mode is Mode.POINTWISE or self.kernel == (1, 1)

    @property
    def shared_taps(self):
        """The taps that serve all passes, or None: those of the first pass, of which others may need fewer rows."""
        first = self.passes[self.bundles()[0][1][0]][0].taps
        return first if all(first.startswith(run.taps) for group in set(self.passes) for run in group) else None

    def folds(self, axis):
        """Whether the stride of rows (axis 0) or columns (1) is one of addresses: a kernel of 1 skips pixels."""
        return self.kernel[axis] == 1 and self.stride[axis] > 1


def uses_basis(layer, config):
    """Whether a layer runs on the basis engine. Raises InputError for a basis convolution without one."""
    if isinstance(layer, BasisConvolution) and config.basis is None:
        raise InputError(f"must run on a configuration with a basis engine, not {config.name}",
                         field=f"layer {layer.name}")
    return isinstance(layer, BasisConvolution) or config.structured is None


def make_basis_job(layer, *, sizes, mark, tensors, batch):
    """The `BasisJob` of a layer. ``tensors``: name -> Placement. Raises InputError for what the engine cannot run."""
    if not isinstance(layer, (BasisConvolution, Convolution, Pool, Add)):
        raise InputError("must be a BasisConvolution, Convolution, Pool or Add", field=f"layer {layer.name}",
                         value=type(layer).__name__)
    common = common_fields(layer, mark, tensors)
    if isinstance(layer, BasisConvolution):
        return _decomposed(layer, sizes, common, batch)
    if isinstance(layer, Convolution):
        return _convolution(layer, sizes, common, batch)
    return _channelwise(layer, sizes, common, batch)


# -- geometry ----------------------------------------------------------------------------------------------------------
def needs_border(job):
    """Whether padding must lie in the scratchpad: the instruction's implicit one is too narrow or cannot be strided, or
    an output has no kernel position at all inside the image."""
    for axis, (size, count) in enumerate(((job.input.height, job.output.height), (job.input.width, job.output.width))):
        stride, origin, k, d = (v[axis] for v in (job.stride, job.origin, job.kernel, job.dilation))
        begins = range(-origin, (count - 1) * stride - origin + 1, stride)
        if origin > MAX_PAD or job.folds(axis) and not (begins[0] >= 0 and begins[-1] < size):
            return True
        if not all(any(0 <= b + r * d < size for r in range(k)) for b in begins):
            return True
    return False


def _strided_passes(job, sizes):
    """Why DECOMPOSED and DENSE passes cannot run a layer's kernel; None if they can."""
    b, (kh, kw) = sizes.config.basis, job.kernel
    reach = (kw - 1) * job.dilation[1] + 1
    if kh > MAX_KERNEL_ROWS:
        return f"at most {MAX_KERNEL_ROWS} kernel rows", kh
    if reach > b.window:
        return f"kernel rows within {b.window} pixels (basis.window)", reach
    if kh * ceil_div(kw, b.multipliers) > b.tap_rows:
        return f"at most {b.tap_rows} rows of taps (basis.tap_rows)", kh * ceil_div(kw, b.multipliers)
    for axis in (0, 1):
        stride = job.stride[axis]
        if not job.folds(axis) and (stride & (stride - 1) or stride > MAX_STRIDE):
            return f"strides 1, 2, 4 or {MAX_STRIDE}", job.stride
    if max(job.dilation) > MAX_DILATION:
        return f"dilations of at most {MAX_DILATION}", job.dilation
    return None


def _check_growth(total, largest, where):
    """Accumulators stay in 32 bits: ``total`` is the largest sum over |weight|, ``largest`` that of a value."""
    worst = int(total) * int(largest)
    if worst >= 1 << 31:
        raise InputError(f"must have worst-case sums within 32-bit accumulators ({(1 << 31) - 1})", field=where,
                         value=worst)


def _largest_value(zero_point):
    """Largest absolute activation less its zero point."""
    return max(127 - zero_point, 128 + zero_point)


# -- decomposed --------------------------------------------------------------------------------------------------------
def _decomposed(layer, sizes, common, batch):
    b, where = sizes.config.basis, f"layer {layer.name}"
    source, target = common["input"], common["output"]
    basis, coefficients = np.asarray(layer.basis), np.asarray(layer.coefficients)
    if basis.ndim != 3 or coefficients.ndim != 3 or basis.dtype != np.int8 or coefficients.dtype != np.int8 or \
            not basis.size or coefficients.shape != (target.channels, source.channels, len(basis)):
        raise InputError(f"must have int8 basis kernels [M, R, S] and coefficients [{target.channels}, "
                         f"{source.channels}, M]", field=where, value=(basis.shape, coefficients.shape))
    if coefficients.min() < -1 or coefficients.max() > 1:
        raise InputError("must have coefficients -1, 0 or 1", field=where)
    job = BasisJob(**common, op="convolution", format=layer.format, kernel=tuple(int(k) for k in basis.shape[1:]),
                   stride=tuple(layer.stride), origin=tuple(layer.pads[:2]), dilation=tuple(layer.dilation),
                   fill=source.zero_point, zero_point=source.zero_point, starts=(0,) * target.planes,
                   span=source.planes, macs_dense=target.channels * source.channels * basis[0].size * target.height *
                   target.width * batch)
    check_shape(job, layer)
    reason = _strided_passes(job, sizes)
    if reason:
        raise InputError(f"must have {reason[0]} on configuration {sizes.config.name}", field=where, value=reason[1])
    if source.planes > sizes.coefficient_groups:
        raise InputError(f"must have at most {sizes.coefficient_groups * sizes.group_channels} input channels on "
                         f"configuration {sizes.config.name} (basis.coefficient_rows)", field=where,
                         value=source.channels)
    nonzeros = np.count_nonzero(coefficients, axis=1)                                    # [outputs, M]
    largest = _largest_value(source.zero_point)
    _check_intermediate(layer, sizes, int(nonzeros.max()) * largest)
    held = np.minimum(nonzeros.astype(np.int64) * largest, -IntSpec(b.intermediate_bits).lo)
    _check_growth((held * np.abs(basis.astype(np.int64)).sum(axis=(1, 2))).sum(axis=1).max(), 1, where)
    passes = _decomposed_passes(basis, coefficients, sizes, target.planes, source.planes, where)
    longest = max((p for group in passes for p in group), key=lambda p: p.stage_cycles)
    patterns = tuple(f"{n}:{b.group}" for n in longest.terms) or ("maps",)
    return replace(job, passes=passes, patterns=patterns, border=needs_border(job))


def _check_intermediate(layer, sizes, worst):
    """The layer's width of IR is the hardware's, or no coefficient's sum (at most ``worst``) can reach either's end."""
    have, want = sizes.config.basis.intermediate_bits, layer.intermediate_bits
    if have != want and worst > IntSpec(min(have, want)).hi:
        raise InputError(f"must have {have}-bit intermediates on configuration {sizes.config.name} "
                         "(basis.intermediate_bits)", field=f"layer {layer.name}", value=want)


def _decomposed_passes(basis, coefficients, sizes, planes, groups, where):
    b, channels = sizes.config.basis, sizes.group_channels
    outputs, depth, count = coefficients.shape
    parts = ceil_div(count, b.slices)
    full = np.zeros((planes * channels, parts * b.slices, groups * channels), np.int8)
    full[:outputs, :count, :depth] = coefficients.transpose(0, 2, 1)
    full = full.reshape(planes, channels, parts, b.slices, groups, channels).transpose(0, 2, 1, 3, 4, 5)
    full = np.pad(full, [(0, 0)] * 5 + [(0, b.group - channels)])
    taps = [pack_taps(taps_of_basis(basis[m * b.slices:(m + 1) * b.slices], sizes.config), sizes.config)
            for m in range(parts)]
    rows, kernel = ceil_div(basis.shape[2], b.multipliers), basis.shape[1:]
    return tuple(tuple(BasisPass(mode=Mode.DECOMPOSED, kernel=kernel, groups=groups, taps=taps[m], micro_steps=rows,
                                 **_pack_coefficients(full[plane, m], sizes, where))
                       for m in range(parts)) for plane in range(planes))


def _pack_coefficients(coefficients, sizes, where):
    """Fields of a pass: packed coefficients [blocks, slices, groups, group], terms, cycles per pixel."""
    config, groups = sizes.config, coefficients.shape[2]
    b = config.basis
    nonzeros = np.count_nonzero(coefficients, axis=3)
    terms = ()
    if b.coefficients == "maps":
        words = map_words(groups, config)
        padded = np.pad(nonzeros, ((0, 0), (0, 0), (0, words * b.stream_groups - groups)))
        most = padded.reshape(b.blocks, b.slices, words, -1).sum(axis=3).max(axis=(0, 1))
        cycles = int(np.maximum(1, -(-most // b.lanes)).sum())
    else:
        terms = cheapest_series(int(nonzeros.max()), groups, config)
        cycles = words = series_words(groups, terms, config)
    if words > b.coefficient_rows:
        raise InputError(f"must take at most {b.coefficient_rows} stream words per pixel on configuration "
                         f"{config.name} (basis.coefficient_rows)", field=where, value=words)
    data = pack_series(coefficients, config, terms) if terms else pack_maps(coefficients, config)
    load = len(data) // sizes.beat_bytes if terms else _map_load_cycles(data, sizes)
    return {"terms": terms, "coefficients": data, "stage_cycles": cycles, "load_cycles": load}


def _map_load_cycles(data, sizes):
    """Cycles in which map coefficients are decoded: a beat goes to a block's decoder per cycle, which takes a word per
    cycle."""
    b = sizes.config.basis
    words = np.frombuffer(data, "<u2", b.blocks).astype(np.int64)
    per = sizes.config.bus.data_bits // b.group
    return sizes.segment_table_beats + int((np.cumsum(words) // per + words * (per - 1) // per).max()) + 4


# -- dense and pointwise -----------------------------------------------------------------------------------------------
def _convolution(layer, sizes, common, batch):
    source, target, where = common["input"], common["output"], f"layer {layer.name}"
    shapes = {t.values.shape for t in layer.terms}
    if len(shapes) != 1 or any(t.values.dtype != np.int8 for t in layer.terms):
        raise InputError("must have terms of int8 weights of one shape", field=where, value=sorted(shapes))
    outputs, kh, kw, depth = shapes.pop()
    groups = layer.groups
    if groups < 1 or outputs % groups or depth * groups != source.channels or outputs != target.channels:
        raise InputError(f"must have {target.channels} outputs and {source.channels} input channels in {groups} groups",
                         field=where, value=(outputs, kh, kw, depth))
    values = layer.effective_weights()
    if values.min() < -128 or values.max() > 127:
        raise InputError(f"must have terms whose sum is in -128..127 on configuration {sizes.config.name} (no "
                         "structured engine)", field=where, value=int(max(values.max(), -values.min())))
    per, channels = outputs // groups, sizes.group_channels
    first = [g * channels // per * depth // channels for g in range(target.planes)]
    last = [((min((g + 1) * channels, outputs) - 1) // per + 1) * depth - 1 for g in range(target.planes)]
    span = max(z // channels - a + 1 for a, z in zip(first, last))
    starts = tuple(min(a, source.planes - span) for a in first)
    weights = _expand(values.astype(np.int8), groups, sizes, starts, span, target.planes)
    job = BasisJob(**common, op="convolution", format=layer.format, kernel=(kh, kw), stride=tuple(layer.stride),
                   origin=tuple(layer.pads[:2]), dilation=tuple(layer.dilation), fill=source.zero_point, starts=starts,
                   span=span, macs_dense=outputs * kh * kw * depth * target.height * target.width * batch)
    check_shape(job, layer)
    absolute = np.abs(values).reshape(outputs, -1).sum(axis=1, dtype=np.int64)
    return _choose(job, weights, values.reshape(outputs, -1).sum(axis=1, dtype=np.int64), int(absolute.max()), sizes,
                   batch)


def _expand(values, groups, sizes, starts, span, planes):
    """Values [outputs, kh, kw, depth] -> [planes, blocks, taps, span, group], relative to each output group's start."""
    channels, group = sizes.group_channels, sizes.config.basis.group
    outputs, kh, kw, depth = values.shape
    per = outputs // groups
    out = np.zeros((planes * channels, kh * kw, span * channels), np.int8)
    flat = values.reshape(outputs, kh * kw, depth)
    for g in range(groups):
        begin, end = g * per, (g + 1) * per
        for k0 in range(begin // channels * channels, end, channels):
            a, z = max(k0, begin), min(k0 + channels, end)
            channel = g * depth - starts[k0 // channels] * channels
            out[a:z, :, channel:channel + depth] = flat[a:z]
    out = out.reshape(planes, channels, kh * kw, span, channels)
    return np.pad(out, [(0, 0)] * 4 + [(0, group - channels)])


def _channelwise(layer, sizes, common, batch):
    source, target, where = common["input"], common["output"], f"layer {layer.name}"
    if source.channels != target.channels:
        raise InputError(f"must keep the {source.channels} channels of its input", field=where, value=target.channels)
    pool = isinstance(layer, Pool)
    if pool and layer.kind not in ("max", "average"):
        raise InputError("must be a max or average pool", field=where, value=layer.kind)
    maximum = pool and layer.kind == "max"
    kernel = tuple(layer.window) if pool else (1, 1)
    job = BasisJob(**common, op=f"{layer.kind}_pool" if pool else "add", format="identity", kernel=kernel,
                   stride=tuple(layer.stride) if pool else (1, 1), origin=tuple(layer.pads[:2]) if pool else (0, 0),
                   dilation=(1, 1), fill=-128 if maximum else source.zero_point,
                   operation=Operation.MAX if maximum else Operation.ADD, starts=tuple(range(target.planes)))
    check_shape(job, layer)
    # All output groups share one set of passes.
    identity = np.eye(sizes.config.basis.blocks, sizes.config.basis.group, dtype=np.int8)
    taps = kernel[0] * kernel[1]
    weights = np.broadcast_to(identity[None, :, None, None], (1, len(identity), taps, 1, identity.shape[1]))
    return _choose(job, weights, np.full(target.channels, taps, np.int64), taps, sizes, batch)


def _choose(job, weights, sums, absolute, sizes, batch):
    """The job with the cheaper of DENSE and POINTWISE passes.

    weights: int8 [planes or 1, blocks, taps, span, group]; sums: of each output's weights; absolute: largest sum of
    their absolute values.
    """
    used = weights.any(axis=1)                                                   # [planes, taps, span, group]
    runs = [_runs(job, mask, sizes) for mask in used.any(axis=3)]
    plain = _Cost(sum(groups for plane in runs for _, _, groups in plane), sum(len(plane) for plane in runs),
                  sum(groups for plane in runs for _, _, groups in plane))
    rows = job.kernel[0] * ceil_div(job.kernel[1], sizes.config.basis.multipliers)
    chunks = None
    if job.operation is Operation.ADD and _strided_passes(job, sizes) is None:
        chunks = [_chunks(mask, sizes) for mask in used.any(axis=1)]
        count = sum(len(plane) for plane in chunks)
        pixels = job.output.height * job.output.width * batch
        # An output takes at least as long as its share of the input pixels, which come one per cycle.
        share = job.input.height * job.input.width / (job.output.height * job.output.width)
        dense = _Cost(count * max(rows, share), count, count * rows)
        if plain.cycles(pixels, sizes) < dense.cycles(pixels, sizes) or job.kernel == (1, 1) and \
                plain.cycles(pixels, sizes) == dense.cycles(pixels, sizes):
            chunks = None
    where = f"layer {job.name}"
    if chunks is None:
        _check_growth(absolute, 128, where)
        made = [tuple(_pointwise_pass(job, weights[k], run, sizes) for run in plane) for k, plane in enumerate(runs)]
        return replace(job, passes=_every(made, job), border=True, patterns=("pointwise",))
    zero = job.input.zero_point
    _check_growth(absolute, _largest_value(zero), where)
    # The engine sums q - zero_point; the layer's sums are over q, with the zero point outside the image.
    bias = np.asarray(job.requantization.bias, np.int64) + zero * sums
    if bias.min() < BIAS.lo or bias.max() > BIAS.hi:
        raise InputError("must have 32-bit biases without the input's zero point", field=where,
                         value=int(bias[np.argmax(np.abs(bias))]))
    made = [tuple(_dense_pass(job, weights[k], chunk, sizes) for chunk in plane) for k, plane in enumerate(chunks)]
    return replace(job, passes=_every(made, job), border=needs_border(job), patterns=("dense",), zero_point=zero,
                   requantization=replace(job.requantization, bias=bias.astype(np.int32)))


@dataclass(frozen=True)
class _Cost:
    """Micro-steps per pixel, passes per strip and rows of taps of all output groups."""

    micro_steps: float
    passes: int
    rows: int

    def cycles(self, pixels, sizes):
        strips = ceil_div(pixels, sizes.accumulator_depth)
        work = self.micro_steps * pixels + self.passes * strips * PASS_OVERHEAD_CYCLES
        load = self.rows * sizes.tap_row_beats
        return max(work, load) + min(work, load) / 8


def _every(made, job):
    """Passes of every output group: one set for each, or one for all."""
    return tuple(made) if len(made) > 1 else tuple(made) * job.output.planes


def _runs(job, mask, sizes):
    """POINTWISE passes: (kernel position, first group, groups) of runs of channel groups with consecutive addresses.

    mask: bool [taps, span], which channel groups have weights. A run covers a kernel row where columns are not dilated,
    the kernel where its rows follow one another; parts without weights at its ends are cut off.
    """
    (kh, kw), span = job.kernel, mask.shape[1]
    if job.operation is Operation.MAX:
        return [((r, s), 0, 1) for r in range(kh) for s in range(kw)]
    most = min(sizes.config.basis.tap_rows, MAX_GROUPS)
    rows, cols = 1, kw if job.dilation[1] == 1 else 1
    if job.output.width == 1 and job.dilation == (1, 1):
        rows = kh
    out = []
    for r in range(0, kh, rows):
        for s in range(0, kw, cols):
            here = mask.reshape(kh, kw, span)[r:r + rows, s:s + cols].reshape(-1)
            at, end = 0, len(here)
            while at < end:
                if not here[at]:
                    at += 1
                    continue
                count = int(np.flatnonzero(here[at:at + most])[-1]) + 1
                out.append(((r, s), at, count))
                at += count
    return out or [((0, 0), 0, 1)]


def _chunks(mask, sizes):
    """DENSE passes: (group, first channel position), at most ``slices`` channels each. mask: bool [span, group]."""
    out = []
    for group, row in enumerate(mask):
        end = 0
        for channel in np.flatnonzero(row).tolist():
            if channel >= end:
                out.append((group, channel))
                end = channel + sizes.config.basis.slices
    return out or [(0, 0)]


def _pointwise_pass(job, weights, run, sizes):
    """weights: [blocks, taps, span, group]."""
    tap, first, groups = run
    blocks, _, span, group = weights.shape
    flat = weights.reshape(blocks, -1, group)
    at = (tap[0] * job.kernel[1] + tap[1]) * span + first
    taps = pack_taps(taps_of_pointwise(flat[:, at:at + groups], sizes.config), sizes.config)
    return BasisPass(mode=Mode.POINTWISE, kernel=(1, 1), tap=tap, first=first, groups=groups, taps=taps,
                     micro_steps=groups)


def _dense_pass(job, weights, chunk, sizes):
    """weights: [blocks, taps, span, group]."""
    group, channel = chunk
    b = sizes.config.basis
    kernels = weights[:, :, group, channel:channel + b.slices].transpose(0, 2, 1)
    kernels = kernels.reshape(*kernels.shape[:2], *job.kernel)
    taps = pack_taps(taps_of_kernels(kernels, sizes.config), sizes.config)
    return BasisPass(mode=Mode.DENSE, kernel=job.kernel, first=group, channel=channel, taps=taps,
                     micro_steps=ceil_div(job.kernel[1], b.multipliers))
