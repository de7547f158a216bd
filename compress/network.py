"""The compressed network: what `compress` makes, the package stores, and `golden`-based runs and `lowering` read.

Tensors are [height, width, channels] int8 with one scale and zero point (docs/numerics.md); a fully connected layer is
a convolution whose kernel covers its input. All layers are quantised and fused: bias, activation clamp and a residual
operand belong to the layer that produces the tensor.
"""
from dataclasses import dataclass, field

import numpy as np

from spec.config import Pattern


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An activation tensor: shape without batch, and its quantisation ``x = scale * (q - zero_point)``."""

    name: str
    height: int
    width: int
    channels: int
    scale: float
    zero_point: int

    @property
    def shape(self):
        """(height, width, channels)."""
        return self.height, self.width, self.channels


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of a weight series: int8 values [outputs, kernel_h, kernel_w, channels / groups] that fit ``pattern``
    in blocks of M consecutive channels of one kernel tap (the last block of a ragged tap is padded with zeros)."""

    pattern: Pattern
    values: np.ndarray

    @property
    def dense(self):
        """Whether the pattern allows every element."""
        return self.pattern.n == self.pattern.m


@dataclass(frozen=True, kw_only=True)
class Requantization:
    """Per-output-channel scaling of docs/numerics.md; arrays are [outputs]."""

    bias: np.ndarray            # int32, the input zero point already folded in
    multiplier: np.ndarray      # uint16
    shift: np.ndarray           # uint8, 0..31
    zero_point: int             # of the output tensor
    low: int = -128
    high: int = 127
    residual_zero_point: int = 0
    residual_multiplier: int = 0


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What all layers share. ``residual`` names the tensor added before rounding, if any."""

    name: str
    input: str
    output: str
    requantization: Requantization
    residual: str | None = None


@dataclass(frozen=True, kw_only=True)
class Convolution(Layer):
    """Convolution, depthwise convolution, matrix product: sum over ``terms``. Pads are (top, left, bottom, right)."""

    terms: tuple[Term, ...]
    stride: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    #: Per-output-channel weight scales [outputs], float64; for reports and for rebuilding float weights.
    weight_scale: np.ndarray = None
    #: Method that made the terms, for example ``dense``, ``nm:2:4``, ``tasd:4:8+1:8``.
    format: str = "dense"
    #: Figures of the method: dropped_nonzeros, dropped_magnitude, output_error … (plain numbers).
    metrics: dict = field(default_factory=dict)

    @property
    def kernel(self):
        """(kernel_h, kernel_w)."""
        return self.terms[0].values.shape[1:3]

    @property
    def outputs(self):
        """Output channels."""
        return self.terms[0].values.shape[0]

    def effective_weights(self):
        """Sum of the terms: int32 [outputs, kernel_h, kernel_w, channels / groups]."""
        return sum(t.values.astype(np.int32) for t in self.terms)


@dataclass(frozen=True, kw_only=True)
class BasisConvolution(Layer):
    """Convolution by basis kernels, ``W[k,r,s,c] ~= weight_scale[k] * sum_m coefficients[k,c,m] * basis[m,r,s]``.

    Accumulators are sums over ``q - zero_point`` of the input (docs/basis.md), so the requantisation's bias has no
    zero point folded in, unlike that of `Convolution`.
    """

    #: int8 [M, R, S].
    basis: np.ndarray
    #: int8 [outputs, channels, M], each -1, 0 or 1.
    coefficients: np.ndarray
    #: Width at which the intermediate saturates; part of what the layer computes.
    intermediate_bits: int = 16
    #: At most N non-zeros among M consecutive channels, for each (output, m); None for irregular coefficients.
    pattern: Pattern | None = None
    stride: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    #: Per-output-channel scales [outputs], float64; for reports and for rebuilding float weights.
    weight_scale: np.ndarray = None
    #: Method that made it, for example ``basis:6``.
    format: str = "basis"
    #: Figures of the method, plain numbers.
    metrics: dict = field(default_factory=dict)

    #: Never grouped: the decomposition shares its basis among all channels.
    groups = 1

    @property
    def kernel(self):
        """(kernel_h, kernel_w)."""
        return self.basis.shape[1:]

    @property
    def outputs(self):
        """Output channels."""
        return len(self.coefficients)

    def effective_weights(self):
        """Integer kernel ``sum_m coefficients * basis``: int32 [outputs, kernel_h, kernel_w, channels]."""
        return np.einsum("kcm,mrs->krsc", self.coefficients.astype(np.int32), self.basis.astype(np.int32))


@dataclass(frozen=True, kw_only=True)
class Pool(Layer):
    """Max or average pooling, channel by channel. Average pooling sums raw values, padding with the input's zero
    point, and divides by the whole window in the requantiser; max pooling pads with -128."""

    kind: str                   # "max" or "average"
    window: tuple[int, int]
    stride: tuple[int, int]
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Add(Layer):
    """Elementwise sum of ``input`` (as accumulator, weight 1) and ``residual``, rescaled by the requantiser."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """Layers in an order in which every input is made before it is used; one input and one output tensor."""

    name: str
    input: str
    output: str
    tensors: dict[str, Tensor]
    layers: tuple[Layer, ...]
    #: Where it came from: source file digest, method, calibration, versions, accuracies (plain JSON values).
    provenance: dict = field(default_factory=dict)
