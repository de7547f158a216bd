"""Kernel decomposition ``W[k,r,s,c] ~= sum_m Ce[k,c,m] B[m,r,s]``: basis kernels that a layer shares, and coefficients.

Two orders of evaluation, equal by linearity:

* coefficients first (ESCALATE): ``IR[k,m,y,x] = sum_c Ce[k,c,m] I[c,y,x]``, then
  ``O[k,y,x] = sum_m sum_rs B[m,r,s] IR[k, m, y*st + r*d - p, x*st + s*d - p]``;
* basis first in time (PENNI): ``F[c,m] = B[m] * I[c]``, then ``O[k] = sum_cm Ce[k,c,m] F[c,m]``.

Integers: int8 basis, coefficients in {-1, 0, 1}; the intermediate (IR or F) may be held in fewer bits than it needs and
then saturates, which is counted. All scales lie in the requantiser: ``W ~= alpha[k] * scale * sum_m T[k,c,m] B[m]``; a
factor beta[m] of the coefficients is folded into B.

Source: reference on ESCALATE and PENNI, sections 2, 5, 7 and 10. Tensors are [N, H, W, C], kernels [K, R, S, C]; our
own definitions where the papers are silent (encoding, ternary fit, saturation).
"""
from dataclasses import dataclass, field, replace
from math import log2
from typing import NamedTuple

import numpy as np

from golden._check import image, integers
from golden.chain import convolve, quantize_rows, real
from golden.convolution import _pad, accumulate, output_size
from golden.structured import tasd_series
from spec.config import IntSpec
from spec.derive import ceil_div
from spec.errors import InputError

#: Orders of evaluation.
ORDERS = ("coefficients_first", "basis_first")
#: Channels that one bit of the first map level stands for.
GROUP = 16
_INT8 = IntSpec(8)


def _order(order):
    if order not in ORDERS:
        raise InputError(f"must be {' or '.join(ORDERS)}", field="order", value=order)
    return order


class Operations(NamedTuple):
    """Work of one image. ``adds`` are additions or subtractions of the coefficient stage for ternary coefficients
    (multiplications for others), counted for non-zero coefficients; ``macs`` are those of the basis stage."""

    adds: int
    macs: int


class _Shape:
    """What float and integer decompositions share: ``basis`` [M, R, S], ``coefficients`` [K, C, M]."""

    def _check_shapes(self):
        if self.basis.ndim != 3 or self.coefficients.ndim != 3 or not self.basis.size or not self.coefficients.size \
                or self.coefficients.shape[2] != len(self.basis):
            raise ValueError(f"basis and coefficients must be [M, R, S] and [K, C, M], not {self.basis.shape} and "
                             f"{self.coefficients.shape}")

    @property
    def kernel(self):
        """(R, S)."""
        return self.basis.shape[1:]

    def macs(self, size, order="coefficients_first", *, stride=(1, 1), pads=(0, 0, 0, 0), dilation=(1, 1)):
        """`Operations` of one image of input ``size`` (H, W).

        Coefficients first: nnz(Ce) Hi Wi adds, K M R S Ho Wo MACs. Basis first: nnz(Ce) Ho Wo, C M R S Ho Wo.
        """
        ho, wo = output_size(size, self.kernel, stride=stride, pads=pads, dilation=dilation)
        k, c, m = self.coefficients.shape
        nonzero, taps = int(np.count_nonzero(self.coefficients)), self.kernel[0] * self.kernel[1]
        if _order(order) == "coefficients_first":
            return Operations(nonzero * size[0] * size[1], k * m * taps * ho * wo)
        return Operations(nonzero * ho * wo, c * m * taps * ho * wo)


@dataclass(frozen=True, kw_only=True, eq=False)
class Decomposition(_Shape):
    """Float decomposition: basis [M, R, S], coefficients [K, C, M]; ``meta``: kind, count, energy (share kept)."""

    basis: np.ndarray
    coefficients: np.ndarray
    meta: dict = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "basis", real("basis", self.basis, 3))
        object.__setattr__(self, "coefficients", real("coefficients", self.coefficients, 3))
        self._check_shapes()

    def to_dense(self):
        """Kernel [K, R, S, C]."""
        return np.einsum("kcm,mrs->krsc", self.coefficients, self.basis)

    def bits(self, basis_bits=8, coefficient_bits=8):
        """Storage without scales: M R S basis_bits + K C M coefficient_bits."""
        return self.basis.size * basis_bits + self.coefficients.size * coefficient_bits

    def rotated(self, q):
        """The same kernel in another basis of the same span: ``B' = Q B``, ``Ce' = Ce Q^T``.

        Args: q: orthogonal [M, M]. Raises: ValueError for another shape or if Q Q^T differs from 1 by more than 1e-9.
        """
        q = real("q", q, 2)
        m = len(self.basis)
        if q.shape != (m, m) or np.abs(q @ q.T - np.eye(m)).max() > 1e-9:
            raise ValueError(f"q must be an orthogonal [{m}, {m}] matrix")
        return replace(self, basis=np.tensordot(q, self.basis, axes=(1, 0)), coefficients=self.coefficients @ q.T)

    def forward(self, x, order="coefficients_first", *, stride=(1, 1), pads=(0, 0, 0, 0), dilation=(1, 1)):
        """(intermediate, output), float64, with zero padding.

        Args: x: real [N, H, W, C].
        Returns: IR [N, H, W, K, M] or F [N, Ho, Wo, C, M], and output [N, Ho, Wo, K].
        """
        x = real("x", x, 4)
        k, c, m = self.coefficients.shape
        if x.shape[3] != c:
            raise ValueError(f"x must have {c} channels, not {x.shape[3]}")
        geometry = {"stride": stride, "pads": pads, "dilation": dilation}
        if _order(order) == "coefficients_first":
            ir = np.einsum("nyxc,kcm->nyxkm", x, self.coefficients, optimize=True)
            stage = np.broadcast_to(self.basis.transpose(1, 2, 0), (k, *self.kernel, m))
            return ir, convolve(ir.reshape(*x.shape[:3], k * m), stage, groups=k, **geometry)
        stage = np.tile(self.basis, (c, 1, 1))[..., None]
        f = convolve(x, stage, groups=c, **geometry)
        f = f.reshape(*f.shape[:3], c, m)
        return f, np.einsum("nyxcm,kcm->nyxk", f, self.coefficients, optimize=True)


def decompose(weights, *, count=None, energy=None):
    """Truncated uncentred SVD of the kernels: ``W' [K C, R S] ~= Ce B``, B orthonormal, strongest basis first.

    The mean kernel is kept: dropping it (as PENNI's code does) costs accuracy. ``count`` = R * S is exact.

    Args: weights: real [K, R, S, C]; give one of ``count`` (M) and ``energy`` (least share of the squared norm to keep,
    0 < energy <= 1; the smallest M that reaches it, up to rounding of 1e-12).
    Returns: Decomposition. Raises: InputError unless 1 <= M <= min(K C, R S), for energy out of range, none or both.
    """
    w = real("weights", weights, 4)
    k, r, s, c = w.shape
    rows = w.transpose(0, 3, 1, 2).reshape(k * c, r * s)
    _, sigma, v = np.linalg.svd(rows, full_matrices=False)
    total = float(np.sum(sigma ** 2))
    share = np.cumsum(sigma ** 2) / total if total else np.ones(len(sigma))
    if (count is None) == (energy is None):
        raise InputError("must be given, or energy, but not both", field="count")
    if energy is not None:
        if isinstance(energy, bool) or not isinstance(energy, (int, float, np.floating)) or not 0 < energy <= 1:
            raise InputError("must be a number above 0 and at most 1", field="energy", value=energy)
        count = min(int(np.searchsorted(share, energy - 1e-12)) + 1, len(sigma))
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or not 1 <= count <= len(sigma):
        raise InputError(f"must be an integer in 1..{len(sigma)}", field="count", value=count)
    basis = v[:count]
    return Decomposition(basis=basis.reshape(count, r, s), coefficients=(rows @ basis.T).reshape(k, c, count),
                         meta={"kind": "basis", "count": int(count), "energy": float(share[count - 1])})


def rotation(count, rng):
    """Random orthogonal [count, count] matrix (Haar measure) drawn from ``rng``."""
    q, r = np.linalg.qr(rng.standard_normal((count, count)))
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)


# -- integers ----------------------------------------------------------------------------------------------------------
def signed_bits(lo, hi):
    """Bits of the narrowest two's complement format that holds lo..hi (at least 1)."""
    return max(int(hi).bit_length() if hi > 0 else 0, (~int(lo)).bit_length() if lo < 0 else 0) + 1


def ir_bits(channels, activation=_INT8):
    """Width of IR that is exact for any ternary coefficients over ``channels`` inputs of a format.

    >>> [ir_bits(c) for c in (64, 128, 256, 512, 2048)]
    [15, 16, 17, 18, 20]
    """
    most = channels * max(-activation.lo, activation.hi)
    return signed_bits(-most, most)


def psum_bits(channels, count, taps, activation=_INT8, basis=_INT8):
    """Width of an output sum that is exact for any ternary coefficients and basis.

    >>> [psum_bits(c, 6, 9, IntSpec(8, signed=False)) for c in (64, 512, 2048)]
    [28, 31, 33]
    """
    most = channels * max(-activation.lo, activation.hi) * count * taps * max(-basis.lo, basis.hi)
    return signed_bits(-most, most)


class Checkpoints(NamedTuple):
    """One integer run; all int64.

    intermediate: what stage 2 read: IR [N, H, W, K, M] at input resolution, or F [N, Ho, Wo, C, M], after saturation.
    mac: [N, Ho, Wo, K, M, R, S], ``B[m,r,s] * IR`` of each tap (coefficients first), or None if not asked for.
    output: [N, Ho, Wo, K], accumulators as of `golden.convolution.accumulate`.
    saturations: elements of the intermediate (without padding) that were clamped.
    exact_bits: width at which none of them would be, for these data.
    """

    intermediate: np.ndarray
    mac: np.ndarray | None
    output: np.ndarray
    saturations: int
    exact_bits: int


class CoefficientBits(NamedTuple):
    """Three accountings of the coefficients' storage, in bits; name the one used with every ratio.

    values: 2 per non-zero, no indices. encoded: `encode`, without padding to bytes. entropy: non-zero signs and the
    positions' binary entropy at this density, ``K C M H(density) + nnz`` (a bound for positions without structure).
    """

    values: int
    encoded: int
    entropy: float


@dataclass(frozen=True, kw_only=True, eq=False)
class IntegerDecomposition(_Shape):
    """Basis int8 [M, R, S], coefficients int8 [K, C, M] in {-1, 0, 1}.

    ``alpha`` [K] and ``scale`` are the real factors: ``W ~= alpha[k] * scale * integer kernel``.
    """

    basis: np.ndarray
    coefficients: np.ndarray
    alpha: np.ndarray = None
    scale: float = 1.0
    meta: dict = field(default_factory=dict)

    def __post_init__(self):
        for name, limit in (("basis", (-128, 127)), ("coefficients", (-1, 1))):
            value = integers(name, getattr(self, name))
            if value.size and not (limit[0] <= value.min() and value.max() <= limit[1]):
                raise ValueError(f"{name} must be in {limit[0]}..{limit[1]}")
            object.__setattr__(self, name, value.astype(np.int8))
        self._check_shapes()
        alpha = np.ones(len(self.coefficients)) if self.alpha is None else real("alpha", self.alpha, 1)
        if alpha.shape != (len(self.coefficients),):
            raise ValueError(f"alpha must have one element for each of {len(self.coefficients)} outputs, "
                             f"not shape {alpha.shape}")
        object.__setattr__(self, "alpha", alpha)

    def integer_kernel(self):
        """``sum_m Ce[k,c,m] B[m,r,s]``: int64 [K, R, S, C]."""
        return np.einsum("kcm,mrs->krsc", self.coefficients.astype(np.int64), self.basis.astype(np.int64))

    def to_dense(self):
        """Real kernel [K, R, S, C]: ``alpha[k] * scale * integer kernel``."""
        return self.integer_kernel() * (self.alpha * self.scale)[:, None, None, None]

    def coefficient_bits(self):
        """`CoefficientBits` of the coefficients."""
        nonzero, total = int(np.count_nonzero(self.coefficients)), self.coefficients.size
        density = nonzero / total
        positions = sum(-p * log2(p) for p in (density, 1 - density) if p)
        return CoefficientBits(2 * nonzero, encoded_bits(self.coefficients), total * positions + nonzero)

    def bits(self, scale_bits=0):
        """Storage in our encoding: 8 bits per basis element, the coefficients' maps and signs, ``scale_bits`` per
        output channel (0: the requantiser has a multiplier per channel anyway)."""
        return 8 * self.basis.size + self.coefficient_bits().encoded + scale_bits * len(self.coefficients)

    def run(self, x, order="coefficients_first", *, stride=(1, 1), pads=(0, 0, 0, 0), dilation=(1, 1), pad_value=0,
            intermediate_bits=None, taps=False):
        """`Checkpoints` of one run, exactly.

        Args:
            x: integer [N, H, W, C], signed or unsigned; ``pad_value`` (its zero point) is read outside the image.
            intermediate_bits: width of IR or F; the exact sum is clamped to it once. None: unlimited.
            taps: also return ``mac`` (coefficients first only: K M R S numbers per output pixel).
        Raises: TypeError for floats; InputError for an unknown order or a width outside 2..63; ValueError for shapes.
        """
        x = image("x", x)
        k, c, m = self.coefficients.shape
        if x.shape[3] != c:
            raise ValueError(f"x must have {c} channels, not {x.shape[3]}")
        if intermediate_bits is not None and (isinstance(intermediate_bits, bool) or not isinstance(
                intermediate_bits, (int, np.integer)) or not 2 <= intermediate_bits <= 63):
            raise InputError("must be an integer in 2..63, or None", field="intermediate_bits", value=intermediate_bits)
        geometry = {"stride": stride, "pads": pads, "dilation": dilation}
        size = output_size(x.shape[1:3], self.kernel, **geometry)
        pad_value = int(integers("pad_value", pad_value))
        if _order(order) == "basis_first":
            if taps:
                raise InputError("must be False for basis_first", field="taps", value=taps)
            stage = np.tile(self.basis, (c, 1, 1))[..., None]
            f = accumulate(x, stage, groups=c, pad_value=pad_value, **geometry).reshape(len(x), *size, c, m)
            f, saturations, exact = _saturate(f, intermediate_bits)
            matrix = self.coefficients.reshape(k, 1, 1, c * m)
            return Checkpoints(f, None, accumulate(f.reshape(len(x), *size, c * m), matrix), saturations, exact)
        rows = self.coefficients.transpose(0, 2, 1).reshape(k * m, 1, 1, c)
        ir, saturations, exact = _saturate(accumulate(x, rows), intermediate_bits)
        # Outside the image IR is that of a pixel of zero points, held in the same width.
        outside, _, _ = _saturate(pad_value * rows.astype(np.int64).sum(axis=(1, 2, 3)), intermediate_bits)
        inside = _pad(np.ones((1, *x.shape[1:3], 1), bool), pads, False)
        padded = np.where(inside, _pad(ir, pads, 0), outside).reshape(len(x), *inside.shape[1:3], k, m)
        output, mac = np.zeros((len(x), *size, k), np.int64), None
        if taps:
            mac = np.zeros((len(x), *size, k, m, *self.kernel), np.int64)
        for r, s in np.ndindex(self.kernel):
            view = padded[:, r * dilation[0]:, s * dilation[1]:][:, ::stride[0], ::stride[1]][:, :size[0], :size[1]]
            product = view * self.basis[:, r, s].astype(np.int64)
            output += product.sum(axis=-1)
            if taps:
                mac[..., r, s] = product
        return Checkpoints(ir.reshape(*x.shape[:3], k, m), mac, output, saturations, exact)

    def as_series(self, patterns):
        """Coefficients as an N:M series along the input channels: regular, so that no concentration is needed.

        Ties (all non-zeros have magnitude 1) keep the lowest channel. Args: patterns: [(N, M), ..].
        Returns: (terms, residual): int8 [K, C, M] each, ``sum(terms) + residual == coefficients``; the residual is zero
        if the series holds every non-zero.
        """
        return tasd_series(self.coefficients, patterns, axis=1)

    def with_coefficients(self, coefficients):
        """The same with other coefficients, for example the sum of `as_series`' terms."""
        return replace(self, coefficients=coefficients)


def _saturate(values, bits):
    """(clamped values, how many were clamped, bits that would hold all)."""
    exact = signed_bits(values.min(initial=0), values.max(initial=0))
    if bits is None:
        return values, 0, exact
    spec = IntSpec(int(bits))
    held = np.clip(values, spec.lo, spec.hi)
    return held, int(np.count_nonzero(held != values)), exact


def ternarize(decomposition, *, threshold=0.7, sweeps=20):
    """Ternary coefficients and int8 basis: ``Ce[k,c,m] ~= alpha[k] beta[m] T[k,c,m]``, beta folded into the basis.

    ``T = sign(Ce) where |Ce| > threshold * mean|Ce[:, :, m]| else 0``, then alternating least squares for alpha, beta
    (the error never grows), then one symmetric scale for all of ``beta[m] B[m]``. A network needs retraining after it.

    Args: decomposition: Decomposition; threshold: at least 0, relative to the mean of each m.
    Returns: IntegerDecomposition; meta adds density and relative_error (Frobenius, to the decomposition's kernel).
    Raises: InputError for a threshold that is negative or not a number, or leaves no coefficient at all.
    """
    number = isinstance(threshold, (int, float, np.floating)) and not isinstance(threshold, bool)
    if not number or not 0 <= threshold < np.inf:
        raise InputError("must be a number of at least 0", field="threshold", value=threshold)
    ce = decomposition.coefficients
    t = np.where(np.abs(ce) > threshold * np.abs(ce).mean(axis=(0, 1)), np.sign(ce), 0)
    if not t.any():
        raise InputError("must leave a non-zero coefficient", field="threshold", value=threshold)
    dot, count = np.einsum("kcm,kcm->km", ce, t), np.abs(t).sum(axis=1)
    alpha, beta = np.ones(len(ce)), np.ones(ce.shape[2])
    for _ in range(sweeps):                              # min over alpha, beta of sum |Ce - alpha beta T|**2
        beta = _ratio(alpha @ dot, alpha ** 2 @ count)
        alpha = _ratio(dot @ beta, count @ beta ** 2)
    q, scale = quantize_rows((beta[:, None, None] * decomposition.basis)[None])
    out = IntegerDecomposition(basis=q[0], coefficients=t.astype(np.int8), alpha=alpha, scale=float(scale[0]))
    dense = decomposition.to_dense()
    error = np.linalg.norm(dense - out.to_dense()) / np.linalg.norm(dense)
    return replace(out, meta={**decomposition.meta, "kind": "ternary_basis", "threshold": float(threshold),
                              "density": float(np.count_nonzero(t) / t.size), "relative_error": float(error)})


def _ratio(a, b):
    """a / b, 0 where b is 0 (a row without coefficients)."""
    return np.divide(a, b, out=np.zeros_like(b), where=b > 0)


# -- two-level map encoding --------------------------------------------------------------------------------------------
def _parts(coefficients):
    """Bits of each (k, m) row and which of them are stored: bool [K M, G + 16 G + 16 G] twice."""
    ce = integers("coefficients", coefficients)
    if ce.ndim != 3 or not ce.size or ce.min() < -1 or ce.max() > 1:
        raise ValueError("coefficients must be [K, C, M] with values -1, 0, 1")
    k, c, m = ce.shape
    groups = ceil_div(c, GROUP)
    rows = np.zeros((k * m, groups * GROUP), np.int8)
    rows[:, :c] = ce.transpose(0, 2, 1).reshape(k * m, c)
    present = (rows.reshape(k * m, groups, GROUP) != 0).any(axis=2)
    bits = np.concatenate([present, rows != 0, rows < 0], axis=1)
    stored = np.concatenate([np.ones_like(present), np.repeat(present, GROUP, axis=1), rows != 0], axis=1)
    return bits, stored


def encoded_bits(coefficients):
    """Bits of `encode`, without padding: ``K M ceil(C / 16) + 16 * groups present + non-zeros``."""
    return int(_parts(coefficients)[1].sum())


def encode(coefficients):
    """Two-level maps of ternary coefficients.

    For each k, and in it each m, one record: level 1, one bit per group of 16 channels, set if the group has a
    non-zero; level 2, for each group present in rising order a 16-bit map, bit i for channel i of the group; then one
    bit per non-zero in rising channel order, 1 for -1. Records follow one another without gaps; bits fill each byte
    from the lowest; zeros fill the last byte.

    Args: coefficients: integer [K, C, M], values -1, 0, 1. Returns: bytes. Raises: TypeError, ValueError.

    One output, 18 channels, one basis kernel; +1 at channel 1, -1 at 3 and 17. Level 1 is 0b11, the maps are 0x000a and
    0x0002, the signs (+, -, -) 0b110:

    >>> ce = np.zeros((1, 18, 1), np.int8)
    >>> ce[0, [1, 3, 17], 0] = 1, -1, -1
    >>> encode(ce).hex(" "), encoded_bits(ce)
    ('2b 00 08 00 18', 37)
    """
    bits, stored = _parts(coefficients)
    return np.packbits(bits[stored], bitorder="little").tobytes()


def decode(data, shape):
    """Inverse of `encode` for ``shape`` (K, C, M): int8.

    Raises: ValueError if the data end early or go on, if a group marked present is empty, if a bit beyond channel C or
    a filling bit is set: each tensor has exactly one encoding.
    """
    k, c, m = (int(v) for v in shape)
    groups = ceil_div(c, GROUP)
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").astype(bool)
    rows, at = np.zeros((k * m, groups, GROUP), np.int8), 0

    def take(count):
        nonlocal at
        at += count
        if at > len(bits):
            raise ValueError(f"data must hold {k * m} records, but end after {len(data)} bytes")
        return bits[at - count:at]

    for row in rows:
        present = take(groups)
        maps = take(GROUP * int(present.sum())).reshape(-1, GROUP)
        if not maps.any(axis=1).all():
            raise ValueError("a group marked present must have a non-zero")
        held = np.zeros((groups, GROUP), bool)
        held[present] = maps
        if held.reshape(-1)[c:].any():
            raise ValueError(f"maps must be empty beyond channel {c - 1}")
        row[held] = np.where(take(int(held.sum())), -1, 1)
    if len(data) != ceil_div(at, 8) or bits[at:].any():
        raise ValueError(f"data must end with the last record ({ceil_div(at, 8)} bytes) and be filled with zeros")
    return np.ascontiguousarray(rows.reshape(k, m, -1)[:, :, :c].transpose(0, 2, 1))
