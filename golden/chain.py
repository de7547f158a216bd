"""Chains of small convolutions: what every factorised layer (tensor train, Tucker-2, SVD, block-term) runs as.

A chain is a list of stages; at most one of them has a kernel above 1x1, a stride, padding or dilation, so the chain is
one convolution with a factorised kernel: ``1x1 -> KxK -> 1x1`` for Tucker-2 and the order-3 tensor train,
``1x1 -> 1x1`` for an SVD, a grouped ``KxK`` in the middle for a block-term decomposition. Stages before the spatial
one run at input resolution. Only a last stage has a bias: an earlier one would break the zero padding of that stage.

Source: reference on tensor trains, sections 3 and 9. Tensors are [N, H, W, C], kernels [K, R, S, C / groups].
"""
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from golden._check import image, integers, tuple_of
from golden.convolution import _pad, accumulate, check_accumulator, fold_bias, output_size
from golden.requantize import encode_scale, requantize
from spec.config import IntSpec
from spec.derive import BIAS, FRACTION_BITS, MULTIPLIER, SHIFT, ceil_div
from spec.errors import InputError

#: Widths that a stage may requantise to.
STAGE_BITS = (8, 16)


def real(name, array, ndim=None):
    """``array`` as float64. Raises: TypeError unless real; ValueError unless finite, not empty and of ``ndim`` axes."""
    array = np.asarray(array)
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise TypeError(f"{name} must be real numbers, not {array.dtype}")
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axes, not shape {array.shape}")
    if not array.size or not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite and not empty")
    return array.astype(np.float64)


def convolve(x, weights, *, stride=(1, 1), pads=(0, 0, 0, 0), dilation=(1, 1), groups=1):
    """Float convolution, the counterpart of `golden.convolution.accumulate` (same arguments, zero padding).

    Args: x: real [N, H, W, C]; weights: real [K, R, S, C / groups].
    Returns: float64 [N, Ho, Wo, K]. Raises: TypeError, ValueError for shapes that do not fit.
    """
    x, w = real("x", x, 4), real("weights", weights, 4)
    n, h, wd, c = x.shape
    k, r, s, cg = w.shape
    if k % groups or cg * groups != c:
        raise ValueError(f"groups ({groups}) must divide {c} inputs and {k} outputs into {cg} inputs each")
    ho, wo = output_size((h, wd), (r, s), stride=stride, pads=pads, dilation=dilation)
    padded, out = _pad(x, pads, 0.0), np.zeros((n, ho, wo, groups, k // groups))
    for tap in range(r * s):
        top, left = tap // s * dilation[0], tap % s * dilation[1]
        view = padded[:, top:top + (ho - 1) * stride[0] + 1:stride[0], left:left + (wo - 1) * stride[1] + 1:stride[1]]
        part = view.reshape(n, ho, wo, groups, 1, cg)
        matrix = w[:, tap // s, tap % s].reshape(groups, k // groups, cg).swapaxes(1, 2)
        out += np.matmul(part, matrix)[..., 0, :]
    return out.reshape(n, ho, wo, k)


class Product(NamedTuple):
    """``count`` matrix products [m, k] x [k, n]: m output channels, k summed elements, n pixels."""

    m: int
    k: int
    n: int
    count: int = 1

    @property
    def macs(self):
        """Multiplications."""
        return self.m * self.k * self.n * self.count

    @property
    def result_words(self):
        """Elements of the result."""
        return self.m * self.n * self.count

    def cycles(self, rows, columns):
        """Output-stationary array of ``rows`` output channels x ``columns`` pixels: ceil(m/rows) ceil(n/columns) k."""
        return self.count * ceil_div(self.m, rows) * ceil_div(self.n, columns) * self.k


def array_cycles(products, rows, columns):
    """Cycles of products that run one after the other on an output-stationary array, see `Product.cycles`."""
    return sum(p.cycles(rows, columns) for p in products)


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """One convolution of a chain: weights [K, R, S, C / groups], float or integer; other fields as `accumulate`."""

    weights: np.ndarray
    stride: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __post_init__(self):
        w = np.asarray(self.weights)
        if w.ndim != 4 or not w.size:
            raise ValueError(f"weights must be [K, R, S, C / groups], not of shape {w.shape}")
        object.__setattr__(self, "weights", w)
        for name, count, least in (("stride", 2, 1), ("pads", 4, 0), ("dilation", 2, 1)):
            object.__setattr__(self, name, tuple_of(name, getattr(self, name), count, least=least))
        object.__setattr__(self, "groups", tuple_of("groups", (self.groups,), 1, least=1)[0])
        if len(w) % self.groups:
            raise ValueError(f"groups ({self.groups}) must divide {len(w)} outputs")

    @property
    def inputs(self):
        """Input channels."""
        return self.weights.shape[3] * self.groups

    @property
    def outputs(self):
        """Output channels."""
        return self.weights.shape[0]

    @property
    def kernel(self):
        """(R, S)."""
        return self.weights.shape[1:3]

    @property
    def geometry(self):
        """Stride, pads and dilation, as keyword arguments of a convolution."""
        return {"stride": self.stride, "pads": self.pads, "dilation": self.dilation}

    @property
    def spatial(self):
        """Whether it looks at or skips neighbours."""
        return self.kernel != (1, 1) or self.stride != (1, 1) or any(self.pads) or self.dilation != (1, 1)

    def output_size(self, size):
        """(Ho, Wo) of an input (H, W)."""
        return output_size(size, self.kernel, **self.geometry)

    def product(self, size):
        """The matrix product per image of input ``size`` (H, W)."""
        k, r, s, c = self.weights.shape
        ho, wo = self.output_size(size)
        return Product(k // self.groups, r * s * c, ho * wo, self.groups)

    def ungrouped(self):
        """Weights [K, R, S, C] with zeros between the groups."""
        k, r, s, c = self.weights.shape
        out = np.zeros((k, r, s, self.inputs), self.weights.dtype)
        for g in range(self.groups):
            rows = slice(g * k // self.groups, (g + 1) * k // self.groups)
            out[rows, :, :, g * c:(g + 1) * c] = self.weights[rows]
        return out


def _compose(stages):
    """The kernel [K, R, S, C] of stages of which at most one is above 1x1 (in the weights' own arithmetic)."""
    total = stages[0].ungrouped()
    for stage in stages[1:]:
        w = stage.ungrouped()
        if stage.kernel == (1, 1):
            total = np.tensordot(w[:, 0, 0], total, axes=(1, 0))
        else:
            total = np.tensordot(w, total[:, 0, 0], axes=(3, 0))
    return total


def _check_stages(stages):
    if not stages:
        raise ValueError("stages must not be empty")
    for n, (a, b) in enumerate(zip(stages, stages[1:])):
        if a.outputs != b.inputs:
            raise ValueError(f"stage {n + 1} must take the {a.outputs} channels of stage {n}, not {b.inputs}")
    if sum(s.spatial for s in stages) > 1:
        raise ValueError("at most one stage may have a kernel above 1x1, a stride, padding or dilation")


class _Counts:
    """What float and integer chains share: geometry and counts."""

    @property
    def spatial(self):
        """The stage with kernel, stride, padding and dilation (the first if none has any)."""
        return next((s for s in self.stages if s.spatial), self.stages[0])

    @property
    def parameters(self):
        """Weights stored."""
        return sum(s.weights.size for s in self.stages)

    def products(self, size):
        """Matrix products of one image of input ``size`` (H, W), in order."""
        out = []
        for stage in self.stages:
            out.append(stage.product(size))
            size = stage.output_size(size)
        return out

    def macs(self, size):
        """Multiplications of one image: ``I r_in Hi Wi + (K^2 r_in r_out + r_out O) Ho Wo`` for three stages."""
        return sum(p.macs for p in self.products(size))

    def dense_macs(self, size):
        """Multiplications of the dense layer of the same shape."""
        first, last, spatial = self.stages[0], self.stages[-1], self.spatial
        ho, wo = spatial.output_size(size)
        return first.inputs * last.outputs * spatial.kernel[0] * spatial.kernel[1] * ho * wo

    def bits(self, weight_bits=8):
        """Storage of the weights, without scales."""
        return self.parameters * weight_bits


@dataclass(frozen=True, kw_only=True, eq=False)
class Chain(_Counts):
    """A factorised layer. ``meta`` holds plain values: kind, ranks, relative_error (Frobenius) where known."""

    stages: tuple[Stage, ...]
    meta: dict = field(default_factory=dict)

    def __post_init__(self):
        stages = tuple(replace(s, weights=real("weights", s.weights, 4)) for s in self.stages)
        _check_stages(stages)
        object.__setattr__(self, "stages", stages)

    def to_dense(self):
        """The kernel that the chain stands for: float64 [K, R, S, C]."""
        return _compose(self.stages)

    def forward(self, x):
        """Float result of every stage, a list of float64 [N, H, W, C]; the last is the layer's output."""
        results = []
        for stage in self.stages:
            x = convolve(x, stage.weights, **stage.geometry, groups=stage.groups)
            results.append(x)
        return results

    def equalized(self, x):
        """The same function with rank channels of like range: ``G_k -> D G_k, G_(k+1) -> G_(k+1) D^-1``.

        D is diagonal with powers of two, so `to_dense` and `forward` change by nothing, not even rounding. It brings
        the largest magnitude that inputs ``x`` cause in each channel to within a factor sqrt(2) of the largest of all.
        """
        stages = list(self.stages)
        for n, result in enumerate(self.forward(x)[:-1]):
            # Relative to this stage's unscaled result: the scaling of the stage before cancels inside the stage.
            span = np.abs(result).max(axis=(0, 1, 2))
            span = np.where(span > 0, span, span.max() or 1.0)
            up = np.round(np.log2(span.max() / span)).astype(int)
            stages[n] = replace(stages[n], weights=np.ldexp(stages[n].weights, up[:, None, None, None]))
            after = stages[n + 1]
            per_group = after.weights.shape[3]
            down = up.reshape(after.groups, 1, 1, 1, per_group)
            grouped = after.weights.reshape(after.groups, -1, *after.kernel, per_group)
            stages[n + 1] = replace(after, weights=np.ldexp(grouped, -down).reshape(after.weights.shape))
        return replace(self, stages=tuple(stages))


def three_stages(out_factor, core, in_factor, *, stride=(1, 1), pads=(0, 0, 0, 0), dilation=(1, 1), meta=None):
    """Chain ``1x1 (I -> r_in) | RxS (r_in -> r_out) | 1x1 (r_out -> O)``.

    Args: out_factor [O, r_out]; core [r_out, R, S, r_in]; in_factor [r_in, I].
    """
    first = Stage(weights=np.asarray(in_factor)[:, None, None, :])
    middle = Stage(weights=core, stride=stride, pads=pads, dilation=dilation)
    last = Stage(weights=np.asarray(out_factor)[:, None, None, :])
    return Chain(stages=(first, middle, last), meta=meta or {})


@dataclass(frozen=True, kw_only=True, eq=False)
class Requantizer:
    """Requantisation of one stage to ``bits`` (8 or 16): docs/numerics.md with the clamp at that width.

    ``y = clamp(((((acc + bias) * multiplier) >> shift) + 2**13 >> 14) + zero_point, low, high)``

    Args: bias, multiplier, shift: one number or one per output channel; ``bias`` has the input's zero point folded in
    (`golden.convolution.fold_bias`). low, high: default to the ends of the format.
    Raises: InputError for bits other than 8 or 16; ValueError, TypeError as `golden.requantize`.
    """

    multiplier: np.ndarray
    shift: np.ndarray
    bias: np.ndarray = 0
    zero_point: int = 0
    bits: int = 8
    low: int = None
    high: int = None

    def __post_init__(self):
        if self.bits not in STAGE_BITS:
            raise InputError("must be 8 or 16", field="bits", value=self.bits)
        spec = IntSpec(self.bits)
        for name, default in (("low", spec.lo), ("high", spec.hi)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        for name in ("low", "high", "zero_point"):
            if not spec.lo <= getattr(self, name) <= spec.hi:
                raise ValueError(f"{name} must fit {self.bits} bits, not {getattr(self, name)}")
        if self.low > self.high:
            raise ValueError(f"low must be at most high ({self.high}), not {self.low}")

    def apply(self, acc):
        """int8 or int16 outputs of accumulators [..., K]. Raises: OverflowError beyond 32 bits; as `requantize`."""
        check_accumulator(acc)
        if self.bits == 8:
            return requantize(acc, bias=self.bias, multiplier=self.multiplier, shift=self.shift,
                              zero_point=self.zero_point, low=self.low, high=self.high)
        values = []
        for name, spec in (("bias", BIAS), ("multiplier", MULTIPLIER), ("shift", SHIFT)):
            value = integers(name, getattr(self, name)).astype(np.int64)
            if value.shape not in ((), acc.shape[-1:]):
                raise ValueError(f"{name} must be one number or one for each of {acc.shape[-1:]} channels, "
                                 f"not {value.shape}")
            if not (spec.lo <= value.min() and value.max() <= spec.hi):
                raise ValueError(f"{name} must be in {spec.lo}..{spec.hi}")
            values.append(value)
        bias, multiplier, shift = values
        u = ((acc.astype(np.int64) + bias) * multiplier) >> shift
        t = (u + (1 << FRACTION_BITS - 1)) >> FRACTION_BITS
        return np.clip(t + self.zero_point, self.low, self.high).astype(np.int16)


class Checkpoint(NamedTuple):
    """One stage of an integer run: int64 ``accumulator`` and what the next stage reads."""

    accumulator: np.ndarray
    output: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class IntegerChain(_Counts):
    """A chain in integers. ``requantizers`` has one `Requantizer`, or None, per stage.

    None: the stage hands on ``acc - zero_point * sum of weights``, exact and unlimited in width, with zero point 0.
    With None throughout the chain is bit-exactly the dense integer convolution with `to_dense`.
    """

    stages: tuple[Stage, ...]
    requantizers: tuple
    zero_point: int = 0
    meta: dict = field(default_factory=dict)

    def __post_init__(self):
        for s in self.stages:
            integers("weights", s.weights)
        _check_stages(self.stages)
        if len(self.requantizers) != len(self.stages):
            raise ValueError(f"requantizers must be one for each of {len(self.stages)} stages, "
                             f"not {len(self.requantizers)}")

    def to_dense(self):
        """Integer kernel of the chain: int64 [K, R, S, C] (no requantisation in between)."""
        return _compose([replace(s, weights=s.weights.astype(np.int64)) for s in self.stages])

    def run(self, x):
        """Checkpoints of every stage, in order; the last one's ``output`` is the layer's.

        Args: x: integer [N, H, W, C] with zero point ``zero_point``, which is also read outside the image.
        Raises: OverflowError if a requantised stage's accumulator leaves 32 bits, an exact one's 63.
        """
        x, zero_point, out = image("x", x), self.zero_point, []
        for stage, requantizer in zip(self.stages, self.requantizers):
            acc = accumulate(x, stage.weights, **stage.geometry, groups=stage.groups, pad_value=zero_point)
            if requantizer is None:
                x = acc + fold_bias(np.zeros(stage.outputs, np.int64), stage.weights, zero_point)
                zero_point = 0
            else:
                x = requantizer.apply(acc)
                zero_point = requantizer.zero_point
            out.append(Checkpoint(acc, x))
        return out


def quantize_rows(weights, bits=8):
    """Symmetric quantisation, one scale per row: ``weights ~= scale * q``, |q| <= 2**(bits-1) - 1.

    Args: weights: real [K, ...]. Returns: (int8 or int16 values, float64 scales [K]); an all-zero row has scale 1.
    """
    w = np.asarray(weights, np.float64)
    top = IntSpec(bits).hi
    span = np.abs(w).reshape(len(w), -1).max(axis=1)
    scale = np.where(span > 0, span / top, 1.0)
    q = np.clip(np.floor(w / scale.reshape(-1, *[1] * (w.ndim - 1)) + 0.5), -top, top)
    return q.astype(np.int8 if bits <= 8 else np.int16), scale


def quantize_chain(chain, x, *, scale, output_scale, zero_point=0, output_zero_point=0, bits=None, bias=None):
    """Integer chain of a float one: int8 weights per output channel, every stage requantised.

    The range of an intermediate is the largest magnitude that the calibration inputs cause (symmetric, zero point 0).

    Args:
        chain: Chain; x: integer [N, H, W, C] calibration inputs with ``scale`` and ``zero_point``.
        bits: width of each stage's output, 8 or 16; by default 8 throughout. bias: real [K] of the last stage.
        output_scale, output_zero_point: of the layer's output.
    Raises: InputError for bits that are not one 8 or 16 per stage; ValueError for a scale ratio of 4 and more.
    """
    x = image("x", x)
    bits = (8,) * len(chain.stages) if bits is None else tuple(bits)
    if len(bits) != len(chain.stages):
        raise InputError(f"must be one width for each of {len(chain.stages)} stages", field="bits", value=bits)
    results = chain.forward((x.astype(np.int64) - zero_point) * float(scale))
    stages, requantizers, zero, at = [], [], zero_point, float(scale)
    for n, (stage, result, width) in enumerate(zip(chain.stages, results, bits)):
        last = n == len(results) - 1
        q, row_scale = quantize_rows(stage.weights)
        if last:
            after, zero_after = float(output_scale), output_zero_point
        else:
            after, zero_after = (np.abs(result).max() or 1.0) / IntSpec(width).hi, 0
        silent = ~q.any(axis=(1, 2, 3))                      # any scale will do for rows of zeros
        multiplier, shift = encode_scale(np.where(silent, 1.0, at * row_scale / after))
        offset = np.zeros(stage.outputs, np.int64)
        if last and bias is not None:
            offset = np.floor(real("bias", bias, 1) / (at * row_scale) + 0.5).astype(np.int64)
        requantizers.append(Requantizer(bias=fold_bias(offset, q, zero), multiplier=multiplier, shift=shift,
                                        zero_point=zero_after, bits=width))
        stages.append(replace(stage, weights=q))
        at, zero = after, zero_after
    return IntegerChain(stages=tuple(stages), requantizers=tuple(requantizers), zero_point=zero_point,
                        meta={**chain.meta, "bits": list(bits)})
