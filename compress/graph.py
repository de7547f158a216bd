"""The float network between import and quantisation: few layer kinds, everything fused, tensors in NHWC.

A fully connected layer is a convolution whose kernel covers its input; batch normalisation, bias, activation clamp and
a residual operand belong to the layer that makes the tensor, exactly as in `compress.network`.
"""
from dataclasses import dataclass, field
import re

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from spec.errors import InputError

#: Elements of the largest patch matrix that one step of a forward pass builds.
_PATCH_ELEMENTS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Node:
    """What all layers share: ``output = clip(layer(input) [+ residual], low, high)``; None is no limit."""

    name: str
    input: str
    output: str
    residual: str | None = None
    low: float | None = None
    high: float | None = None

    @property
    def inputs(self):
        """Tensors read."""
        return (self.input,) if self.residual is None else (self.input, self.residual)


@dataclass(frozen=True, kw_only=True)
class Conv(Node):
    """Convolution: weights [outputs, kernel_h, kernel_w, channels / groups] and bias [outputs], float32."""

    weights: np.ndarray
    bias: np.ndarray
    stride: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)      # top, left, bottom, right
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def depthwise(self):
        """Whether every group has one input channel."""
        return self.weights.shape[3] == 1 and self.groups > 1


@dataclass(frozen=True, kw_only=True)
class Pool(Node):
    """Max pooling, or average pooling over the whole window (padding counts as zeros)."""

    kind: str
    window: tuple[int, int]
    stride: tuple[int, int]
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Add(Node):
    """Sum of ``input`` and ``residual`` that no convolution could absorb."""


@dataclass(frozen=True, kw_only=True)
class Integers:
    """Quantisation that the source file brings (int8 TFLite): `compress.quantize` keeps it and chooses none."""

    #: (scale, zero point) of every tensor.
    tensors: dict[str, tuple[float, int]]
    #: int8 weights [outputs, kernel_h, kernel_w, channels / groups] and float64 scales [outputs], by node.
    weights: dict[str, tuple[np.ndarray, np.ndarray]]
    #: int64 biases [outputs] in units of input scale * weight scale, no zero point folded in, by node.
    biases: dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Nodes in topological order. ``shapes`` gives (height, width, channels) of every tensor, without batch."""

    name: str
    input: str
    output: str
    shapes: dict[str, tuple[int, int, int]]
    nodes: tuple[Node, ...]
    #: Whether the source file's input and output have rank 2 ([batch, features]) instead of NCHW.
    flat_input: bool = False
    flat_output: bool = False
    #: Order of the source file's dimensions: NCHW (ONNX) or NHWC (TFLite).
    layout: str = "NCHW"
    #: The source file's own quantisation; the weights and biases of the nodes are then its real values.
    integers: Integers | None = None
    #: What the import did that a reader should know (a dropped Softmax, a fused layer).
    notes: tuple[str, ...] = ()
    #: sha256 of the source file, hexadecimal.
    source_digest: str = ""
    metadata: dict = field(default_factory=dict)

    @property
    def convolutions(self):
        """The nodes with weights."""
        return tuple(n for n in self.nodes if isinstance(n, Conv))

    def consumers(self, tensor):
        """Nodes that read ``tensor``."""
        return tuple(n for n in self.nodes if tensor in n.inputs)

    def producer(self, tensor):
        """The node that makes ``tensor``; None for the network's input."""
        return next((n for n in self.nodes if n.output == tensor), None)


def layer_name(node_name):
    """Layer of a node of a source file: its letters, digits and _, at most 48 (``/a/a.0/Conv`` -> ``a_a_0_Conv``)."""
    return re.sub(r"\W+", "_", node_name, flags=re.ASCII).strip("_")[:48]


def unique_name(text, taken, fallback):
    """`layer_name` of ``text``, or ``fallback``, not yet in ``taken`` (name -> next suffix to try); adds it there."""
    base = layer_name(text) or fallback
    name, suffix = base, taken.get(base, 1)
    while name in taken:                    # the remembered suffix keeps many equal names linear
        suffix += 1
        name = f"{base}_{suffix}"
    taken[base] = suffix
    taken.setdefault(name, 1)
    return name


def output_size(size, kernel, stride, before, after, dilation=1):
    """Output rows (or columns) of a window operation; 0 or less where the window does not fit."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def node_shape(node, shape):
    """Shape (height, width, channels) of the tensor that ``node`` makes from an input of ``shape``."""
    if isinstance(node, Add):
        return shape
    height, width, channels = shape
    if isinstance(node, Conv):
        kernel, dilation, outputs = node.weights.shape[1:3], node.dilation, node.weights.shape[0]
    else:
        kernel, dilation, outputs = node.window, (1, 1), channels
    top, left, bottom, right = node.pads
    return (output_size(height, kernel[0], node.stride[0], top, bottom, dilation[0]),
            output_size(width, kernel[1], node.stride[1], left, right, dilation[1]), outputs)


def windows(x, kernel, stride, pads, dilation=(1, 1), fill=0):
    """Strided view [N, Ho, Wo, C, kernel_h, kernel_w] of NHWC ``x`` padded with ``fill``; no copy of the windows."""
    top, left, bottom, right = pads
    if any(pads):
        x = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=fill)
    span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
    return sliding_window_view(x, span, axis=(1, 2))[:, ::stride[0], ::stride[1], :, ::dilation[0], ::dilation[1]]


def convolve(x, weights, *, stride=(1, 1), pads=(0, 0, 0, 0), dilation=(1, 1), groups=1):
    """Float convolution of NHWC ``x`` with weights [K, R, S, C / groups]; returns float32 [N, Ho, Wo, K]."""
    outputs, rows, columns, depth = weights.shape
    view = windows(x, (rows, columns), stride, pads, dilation)
    count, height, width = view.shape[:3]
    per_group = outputs // groups
    result = np.empty((count, height, width, outputs), np.float32)
    step = max(1, _PATCH_ELEMENTS // max(1, height * width * depth * rows * columns))
    if depth == 1 and groups > 1:                    # depthwise: one pass per tap is far cheaper than one per group
        lanes = np.repeat(np.arange(groups), per_group)
        result[:] = 0
        for r in range(rows):
            for s in range(columns):
                result += view[..., r, s][..., lanes] * weights[:, r, s, 0]
        return result
    for g in range(groups):
        matrix = np.ascontiguousarray(weights[g * per_group:(g + 1) * per_group].transpose(3, 1, 2, 0), np.float32)
        matrix = matrix.reshape(-1, per_group)
        for at in range(0, count, step):
            patches = view[at:at + step, :, :, g * depth:(g + 1) * depth].reshape(-1, matrix.shape[0])
            block = (patches @ matrix).reshape(-1, height, width, per_group)
            result[at:at + step, ..., g * per_group:(g + 1) * per_group] = block
    return result


def apply_node(node, values, *, read=None):
    """Float result of one node; ``values`` maps tensor names to NHWC arrays.

    ``read``: callback (node, input) -> array that the node reads in its place; its residual operand stays.
    """
    x = values[node.input] if read is None else read(node, values[node.input])
    if isinstance(node, Conv):
        y = convolve(x, node.weights, stride=node.stride, pads=node.pads, dilation=node.dilation, groups=node.groups)
        y += node.bias
    elif isinstance(node, Pool):
        fill = -np.inf if node.kind == "max" else 0
        view = windows(x, node.window, node.stride, node.pads, fill=fill)
        y = view.max(axis=(4, 5)) if node.kind == "max" else view.mean(axis=(4, 5), dtype=np.float32)
    else:
        y = x.copy()
    if node.residual is not None:
        y = y + values[node.residual]
    if node.low is not None or node.high is not None:
        y = np.clip(y, node.low, node.high)
    return y


def forward(graph, x, *, keep=False, read=None):
    """Dense float32 forward pass.

    Args:
        x: float array [N, height, width, channels] (see `to_nhwc`).
        keep: return a dict of every tensor instead of the output alone.
        read: see `apply_node`.
    Raises: InputError if the shape is not the network's.
    """
    x = np.asarray(x, np.float32)
    if x.ndim != 4 or x.shape[1:] != tuple(graph.shapes[graph.input]):
        raise InputError(f"must be [N, {', '.join(map(str, graph.shapes[graph.input]))}]", field="input", value=x.shape)
    values = {graph.input: x}
    last = {t: i for i, n in enumerate(graph.nodes) for t in n.inputs}
    with np.errstate(over="ignore", invalid="ignore"):        # calibration refuses what is not finite, with a name
        for i, node in enumerate(graph.nodes):
            values[node.output] = apply_node(node, values, read=read)
            if not keep:
                for t in node.inputs:
                    if last[t] == i and t != graph.output:
                        values.pop(t, None)
    return values if keep else values[graph.output]


def to_nhwc(x, shape, layout="NCHW"):
    """Input data in the source file's layout -> [N, H, W, C].

    NCHW: [N, C, H, W], or [N, C] for 1 x 1 maps. NHWC: [N, H, W, C], or flattened [N, H * W * C].

    Raises: InputError if the data do not fit ``shape`` = (height, width, channels).
    """
    x = np.asarray(x)
    height, width, channels = shape
    if layout == "NHWC":
        if x.shape[1:] not in ((height, width, channels), (height * width * channels,)):
            raise InputError(f"must be [N, {height}, {width}, {channels}] like the network's input",
                             field="input data", value=tuple(x.shape))
        return np.ascontiguousarray(x).reshape(-1, height, width, channels)
    if x.ndim == 4 and x.shape[1:] == (channels, height, width):
        return np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    if x.ndim == 2 and (height, width) == (1, 1) and x.shape[1] == channels:
        return x.reshape(-1, 1, 1, channels)
    raise InputError(f"must be [N, {channels}, {height}, {width}] like the network's input", field="input data",
                     value=tuple(x.shape))


def to_nchw(y):
    """[N, H, W, C] -> [N, C, H, W]."""
    return np.ascontiguousarray(np.asarray(y).transpose(0, 3, 1, 2))


def top1(logits):
    """Class per image of an NHWC (or [N, classes]) output: the first largest value in NCHW order."""
    logits = np.asarray(logits)
    flat = to_nchw(logits).reshape(len(logits), -1) if logits.ndim == 4 else logits
    return flat.argmax(axis=1)
