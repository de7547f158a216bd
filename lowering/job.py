"""Layers in the one form that the array runs: a convolution whose column groups each read a range of channel groups.

A dense convolution reads all channel groups in every column group; a grouped or depthwise one only those that its
outputs belong to; pooling and addition are depthwise with weight 1.
"""
from dataclasses import dataclass

import numpy as np

from compress.network import Add, Convolution, Pool
from lowering.layout import Placement
from spec.derive import BIAS, MULTIPLIER, PARAMETER_BITS, SHIFT, ceil_div
from spec.errors import InputError
from spec.isa import Operation


@dataclass(frozen=True, kw_only=True)
class Part:
    """One term, in the hardware's coordinates: weights [column groups or 1, columns, taps, blocks, block] int8."""

    weights: np.ndarray
    #: Most non-zeros that any block is promised to have; ``block`` for a dense term.
    required: int
    #: Whether the term must run as the dense pattern (an ordinary dense convolution, the baseline).
    dense: bool


@dataclass(frozen=True, kw_only=True)
class Job:
    """One layer, ready for tiling."""

    name: str
    op: str
    format: str
    mark: int
    input: Placement
    output: Placement
    residual: Placement | None
    kernel: tuple[int, int]
    stride: tuple[int, int]
    #: Rows above and columns left of the image; what lies beyond the other edges follows from the output size.
    origin: tuple[int, int]
    dilation: tuple[int, int]
    #: Value outside the image.
    fill: int
    operation: Operation
    parts: tuple[Part, ...]
    #: First input channel group that each column group reads, and how many all of them read.
    starts: tuple[int, ...]
    span: int
    requantization: object
    macs_dense: int

    @property
    def taps(self):
        """Kernel positions."""
        return self.kernel[0] * self.kernel[1]

    def bundles(self):
        """Runs of column groups that read the same channel groups: (first channel group, [column groups])."""
        return bundles_of(self.starts)


def bundles_of(starts):
    """Runs of column groups that begin to read at the same channel group: (first channel group, [column groups])."""
    runs = []
    for group, start in enumerate(starts):
        if runs and runs[-1][0] == start:
            runs[-1][1].append(group)
        else:
            runs.append((start, [group]))
    return runs


def make_job(layer, *, sizes, mark, tensors, batch):
    """The `Job` of a layer. ``tensors``: name -> Placement. Raises InputError for what the hardware cannot run."""
    if not isinstance(layer, (Convolution, Pool, Add)):
        raise InputError("must be a Convolution, Pool or Add", field=f"layer {layer.name}", value=type(layer).__name__)
    common = common_fields(layer, mark, tensors)
    if isinstance(layer, Convolution):
        job = _convolution(layer, sizes, common, batch)
    else:
        job = _channelwise(layer, sizes, common)
    check_shape(job, layer)
    return job


def common_fields(layer, mark, tensors):
    """What jobs of both engines have in common, checked: a dict of their fields."""
    source, target = tensors[layer.input], tensors[layer.output]
    residual = tensors[layer.residual] if layer.residual is not None else None
    if residual is not None and (residual.height, residual.width, residual.channels) != \
            (target.height, target.width, target.channels):
        raise InputError("must have the shape of the output", field=f"layer {layer.name}: residual {layer.residual}")
    if isinstance(layer, Add) and residual is None:
        raise InputError("must name a residual operand", field=f"layer {layer.name}")
    _check_requantization(layer, target)
    return {"name": layer.name, "mark": mark, "input": source, "output": target, "residual": residual,
            "requantization": layer.requantization}


def _convolution(layer, sizes, common, batch):
    block, columns = sizes.config.structured.block, sizes.unit_bytes
    source, target = common["input"], common["output"]
    where = f"layer {layer.name}"
    if not 1 <= len(layer.terms) <= sizes.config.structured.terms:
        raise InputError(f"must have 1..{sizes.config.structured.terms} terms for configuration "
                         f"{sizes.config.name} (structured.terms)", field=where, value=len(layer.terms))
    outputs, kh, kw, depth = layer.terms[0].values.shape
    groups = layer.groups
    if any(t.values.shape != (outputs, kh, kw, depth) for t in layer.terms):
        raise InputError("must have terms of one shape", field=where)
    if groups < 1 or outputs % groups or depth * groups != source.channels or outputs != target.channels:
        raise InputError(f"must have {target.channels} outputs and {source.channels} input channels in {groups} groups",
                         field=where, value=layer.terms[0].values.shape)
    _check_growth(layer, sizes)
    # Column group g computes outputs g*columns .. and reads the channels of the convolution groups these belong to.
    per = outputs // groups
    first = [g * columns // per * depth // columns for g in range(target.planes)]
    last = [((min((g + 1) * columns, outputs) - 1) // per + 1) * depth - 1 for g in range(target.planes)]
    span = max(b // columns - a + 1 for a, b in zip(first, last))
    starts = tuple(min(a, source.planes - span) for a in first)
    parts = []
    for term in layer.terms:
        m, dense = term.pattern.m, term.pattern.n == term.pattern.m
        if not dense and (m > block or block % m):
            raise InputError(f"must have a pattern whose M divides {block} (block of configuration "
                             f"{sizes.config.name})", field=where, value=str(term.pattern))
        weights = _expand(term.values, layer, sizes, starts, span, target.planes)
        most = int(np.count_nonzero(weights, axis=-1).max())
        aligned = groups == 1 or depth % block == 0
        nominal = block if dense else term.pattern.n * block // m
        if aligned and most > nominal:
            raise InputError(f"must fit its pattern {term.pattern}", field=where, value=f"{most} non-zeros in {block}")
        parts.append(Part(weights=weights, required=max(1, most if not aligned else min(most, nominal)),
                          dense=dense and groups == 1))
    return Job(**common, op="convolution", format=layer.format, kernel=(kh, kw), stride=tuple(layer.stride),
               origin=tuple(layer.pads[:2]), dilation=tuple(layer.dilation), fill=source.zero_point,
               operation=Operation.ADD, parts=tuple(parts), starts=starts, span=span,
               macs_dense=outputs * kh * kw * depth * target.height * target.width * batch)


def _expand(values, layer, sizes, starts, span, planes):
    """Values [outputs, kh, kw, depth] -> [planes, columns, taps, blocks, block], relative to each group's start."""
    block, columns = sizes.config.structured.block, sizes.unit_bytes
    outputs, kh, kw, depth = values.shape
    per, width = outputs // layer.groups, span * columns
    out = np.zeros((planes * columns, kh * kw, width), np.int8)
    flat = values.reshape(outputs, kh * kw, depth)
    for group in range(layer.groups):
        begin, end = group * per, (group + 1) * per
        for k0 in range(begin // columns * columns, end, columns):
            a, b = max(k0, begin), min(k0 + columns, end)
            channel = group * depth - starts[k0 // columns] * columns
            out[a:b, :, channel:channel + depth] = flat[a:b]
    return out.reshape(planes, columns, kh * kw, width // block, block)


def _channelwise(layer, sizes, common):
    block, columns = sizes.config.structured.block, sizes.unit_bytes
    source, target = common["input"], common["output"]
    if source.channels != target.channels:
        raise InputError(f"must keep the {source.channels} channels of its input", field=f"layer {layer.name}",
                         value=target.channels)
    pool = isinstance(layer, Pool)
    if pool and layer.kind not in ("max", "average"):
        raise InputError("must be a max or average pool", field=f"layer {layer.name}", value=layer.kind)
    maximum = pool and layer.kind == "max"
    kernel = tuple(layer.window) if pool else (1, 1)
    identity = np.eye(columns, dtype=np.int8).reshape(1, columns, 1, columns // block, block)
    weights = np.broadcast_to(identity, (1, columns, kernel[0] * kernel[1], columns // block, block))
    bound = (1 if maximum else kernel[0] * kernel[1]) << sizes.activation.bits - 1
    if bound - 1 > sizes.accumulator.hi:
        raise InputError(f"must have sums within {sizes.accumulator.bits}-bit accumulators",
                         field=f"layer {layer.name}", value=bound)
    return Job(**common, op=f"{layer.kind}_pool" if pool else "add", format="identity", kernel=kernel,
               stride=tuple(layer.stride) if pool else (1, 1), origin=tuple(layer.pads[:2]) if pool else (0, 0),
               dilation=(1, 1), fill=-128 if maximum else source.zero_point,
               operation=Operation.MAX if maximum else Operation.ADD,
               parts=(Part(weights=weights, required=1, dense=False),), starts=tuple(range(target.planes)), span=1,
               macs_dense=0)


def _check_growth(layer, sizes):
    """Accumulators of every order of summation stay in their format: sum over |w| times the largest |activation|."""
    total = np.zeros(layer.terms[0].values.shape[0], np.int64)
    for term in layer.terms:
        if term.values.dtype != np.int8:
            raise InputError("must have int8 weights", field=f"layer {layer.name}", value=str(term.values.dtype))
        lo, hi = int(term.values.min()), int(term.values.max())
        if lo < sizes.weight.lo or hi > sizes.weight.hi:
            raise InputError(f"must have weights in {sizes.weight.lo}..{sizes.weight.hi}", field=f"layer {layer.name}")
        total += np.abs(term.values.astype(np.int64)).reshape(total.size, -1).sum(axis=1)
    worst = int(total.max()) << sizes.activation.bits - 1
    if worst > sizes.accumulator.hi:
        raise InputError(f"must have worst-case sums within {sizes.accumulator.bits}-bit accumulators "
                         f"({sizes.accumulator.hi})", field=f"layer {layer.name}", value=worst)


def _check_requantization(layer, target):
    r = layer.requantization
    for name, spec in (("bias", BIAS), ("multiplier", MULTIPLIER), ("shift", SHIFT)):
        values = np.asarray(getattr(r, name))
        if values.shape != (target.channels,) or not np.issubdtype(values.dtype, np.integer) or \
                int(values.min()) < spec.lo or int(values.max()) > spec.hi:
            raise InputError(f"must be {target.channels} integers in {spec.lo}..{spec.hi}",
                             field=f"layer {layer.name}: {name}")


def check_shape(job, layer):
    """The output size agrees with kernel, stride, dilation and pads."""
    pads = getattr(layer, "pads", (0, 0, 0, 0))
    for axis, name in enumerate(("height", "width")):
        size, out = getattr(job.input, name), getattr(job.output, name)
        reach = (job.kernel[axis] - 1) * job.dilation[axis] + 1
        # A pool in ceil mode may have one more output than whole windows; it reads beyond the lower pad.
        room = size + pads[axis] + pads[axis + 2] - reach
        steps = room // job.stride[axis] + 1
        if min(pads) < 0 or room < 0 or not steps <= out <= steps + (job.op.endswith("pool")):
            raise InputError(f"must have output {name} {steps}", field=f"layer {layer.name}", value=out)


def pack_parameters(job, sizes):
    """uint8 [planes * parameter beats * beat bytes]: bias, multiplier and shift of every output channel."""
    r, columns, channels = job.requantization, sizes.unit_bytes, sizes.group_channels
    words = np.zeros(job.output.planes * channels, np.uint64)
    count = job.output.channels
    words[:count] = (np.asarray(r.bias, np.int64) & 0xFFFFFFFF).astype(np.uint64)
    words[:count] |= np.asarray(r.multiplier).astype(np.uint64) << np.uint64(32)
    words[:count] |= np.asarray(r.shift).astype(np.uint64) << np.uint64(48)
    # A group's channels, then the columns that have none.
    words = np.pad(words.reshape(job.output.planes, channels), ((0, 0), (0, columns - channels)))
    out = np.zeros((job.output.planes, sizes.parameter_beats * sizes.beat_bytes), np.uint8)
    out[:, :columns * PARAMETER_BITS // 8] = words.astype("<u8").view(np.uint8).reshape(job.output.planes, -1)
    return out.reshape(-1)


def planes_of(channels, sizes):
    """Channel groups that hold ``channels`` channels."""
    return ceil_div(channels, sizes.group_channels)
