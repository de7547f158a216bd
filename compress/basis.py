"""Basis layers: a convolution as few basis kernels and ternary coefficients.

``W[k,r,s,c] ~= alpha[k] * scale * sum_m T[k,c,m] * B[m,r,s]``, T in {-1, 0, 1}, B int8 (docs/basis.md). A layer is
made in these steps, all but the last on its float weights:

1. Uncentred SVD to M basis kernels, M given or the smallest that keeps a share of the energy.
2. Rotation: of the SVD basis and ``rotations`` seeded random orthogonal rotations of it (exact so far), the one whose
   largest per-m density is nearest to the mean if all coefficients share one threshold.
3. Ternarisation with a threshold for each m. Irregular: each m keeps exactly the asked share of its coefficients, the
   largest ones. N:G: each (k, m) keeps at most the N largest of every G channels, and only those above 0.7 of the mean.
4. Rank-1 scales ``alpha[k] beta[m]`` by alternating least squares, beta folded into the basis.
5. Descent: basis, alpha and coefficients in turn, each to its least-squares optimum under the same density or pattern,
   so the weight error never grows. Then one symmetric int8 scale for the whole basis.
6. With bias correction (`compress.quantize`): alpha[k] times the slope of the dense layer's outputs over this layer's,
   about their means, on calibration samples. Least squares shrinks a kernel it cannot match; layer after layer that
   would cost more than the error itself.

Method strings: ``basis:M`` or ``basis:eE`` (least share of energy), then options, each after an @: a density in 0..1
(``@0.1``) or a pattern (``@2:16``), and ``@rN``, random rotations tried (32; 0 keeps the SVD basis). Without density
and pattern: G/2:G if the configuration's basis engine takes series, else density 0.5; about there the error without
retraining is least. ``basis-mix``, with the same options and ``@xE``, the largest output error of a layer (0.1),
chooses per layer (`compress.search.mix`).

Factors that were trained (`compress.training`) are taken as they are instead (`given`): steps 1 to 6 fall away.

Layers that stay dense: 1x1, fully connected, depthwise and grouped ones; unless named in a recipe, also those with
fewer than 8 input channels. Without retraining ternary coefficients cost much accuracy; the figures say how much.
"""
from dataclasses import dataclass, replace
import math
from typing import NamedTuple

import numpy as np

from golden import basis as golden
from golden import structured
from golden.chain import quantize_rows
from golden.coefficients import cheapest_series, series_words
from golden.convolution import accumulate
from spec.config import BasisConfig, Config, IntSpec, MemoryConfig, BusConfig, Pattern
from spec.derive import Sizes, ceil_div
from spec.errors import InputError

#: Basis kernels of `basis-mix` without a number, and the largest number.
COUNT, MAX_COUNT = 6, 1024
#: Share of non-zero coefficients without an option; of the pattern's N where the engine takes series.
DENSITY = 0.5
#: Channels of a group and width of the intermediate without a configuration that has a basis engine.
GROUP, INTERMEDIATE_BITS = 16, 16
#: Layers with fewer input channels stay dense: K * M intermediates of a few inputs each save nothing.
LEAST_CHANNELS = 8
#: Random rotations tried without an option, and at most.
ROTATIONS, MAX_ROTATIONS = 32, 1024
#: Largest output error of a layer under ``basis-mix`` without an option.
ERROR = 0.1
#: Coefficients of a pattern start with those above this share of the mean magnitude of their m.
THRESHOLD = 0.7
#: Largest relative error of weights rebuilt from given factors: those of an int8 basis are far below.
GIVEN_ERROR = 0.05
#: Alternations of the rank-1 fit, and of the descent.
_SWEEPS, _DESCENT = 20, 10
#: (k, c) rows that judge a rotation; more change nothing and cost time.
_JUDGED_ROWS = 1 << 16
#: Intermediates computed at once, and at most, for the count of saturations.
_CHUNK, _COUNTED = 1 << 22, 1 << 26
KINDS = ("basis", "basis-mix")


# -- methods -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class BasisMethod:
    """A parsed method. Either ``count`` (M) or ``energy`` is given; at most one of ``density`` and ``pattern``;
    ``error`` for ``basis-mix`` only."""

    count: int | None = COUNT
    energy: float | None = None
    density: float | None = None
    pattern: Pattern | None = None
    rotations: int = ROTATIONS
    error: float | None = None

    def __str__(self):
        parts = [f"{KINDS[self.error is not None]}:{f'e{self.energy:g}' if self.count is None else self.count}"]
        if self.density is not None:
            parts.append(f"{self.density:g}")
        if self.pattern is not None:
            parts.append(str(self.pattern))
        if self.rotations != ROTATIONS:
            parts.append(f"r{self.rotations}")
        if self.error is not None:
            parts.append(f"x{self.error:g}")
        return "@".join(parts)


def _share(text, field, value, what):
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise InputError(f"must have {what} above 0 and at most 1", field=field, value=value)
    return share


def _whole(text, lo, hi, field, value, what):
    if not (text.isascii() and text.isdigit() and len(text) < 6 and lo <= int(text) <= hi):
        raise InputError(f"must have {what} in {lo}..{hi}", field=field, value=value)
    return int(text)


def parse(text, *, field="method"):
    """BasisMethod of a string; None if it names another kind of method.

    Raises: InputError for an unknown, repeated or contradictory option, or a number out of range.

    >>> parse("basis:6@2:16").pattern, parse("basis:e0.9@0.1").energy, parse("nm:2:4")
    (Pattern(n=2, m=16), 0.9, None)
    """
    text = str(text).strip()
    head, *options = text.split("@")
    kind, colon, first = head.partition(":")
    if kind not in KINDS:
        return None
    mix = kind == "basis-mix"
    if not (first or mix and not colon):
        raise InputError("must be basis:M or basis:eE (share of energy)", field=field, value=text)
    found = {"error": ERROR} if mix else {}
    if first.startswith("e"):
        found |= {"count": None, "energy": _share(first[1:], field, text, "a share of energy")}
    elif first:
        found["count"] = _whole(first, 1, MAX_COUNT, field, text, "a number of basis kernels")
    named = []
    for option in options:
        if option.startswith("r"):
            name, value = "rotations", _whole(option[1:], 0, MAX_ROTATIONS, field, text, "a number of rotations")
        elif option.startswith("x") and mix:
            name, value = "error", _share(option[1:], field, text, "an error")
        elif ":" in option:
            name, value = "pattern", Pattern.parse(option, field=field)
        elif option[:1].isdigit() or option[:1] == ".":
            name, value = "density", _share(option, field, text, "a density")
        else:
            raise InputError("must have options like @0.1, @2:16, @r32" + ", @x0.1" * mix, field=field, value=text)
        named.append(name)
        found[name] = value
    if len(set(named)) != len(named) or {"density", "pattern"} <= set(named):
        raise InputError("must have each option once, and a density or a pattern, not both", field=field, value=text)
    return BasisMethod(**found)


class Plan(NamedTuple):
    """A method with everything that a configuration decides: density or pattern, width of IR, sizes of the encoding."""

    method: BasisMethod
    density: float | None
    pattern: Pattern | None
    intermediate_bits: int
    sizes: Sizes


def plan(method, config=None):
    """`Plan` of a BasisMethod. Without a basis engine in ``config`` the encoding is that of one with default sizes.

    Raises: InputError for a pattern whose M is not the configuration's group.
    """
    engine = config.basis if config is not None else None
    # a pattern cuts a channel group, of which padded channels are no part
    group = Sizes(config).group_channels if engine else GROUP
    pattern = method.pattern
    if pattern is not None:
        known = {group, engine.group} if engine else {GROUP}
        if pattern.m not in known:
            raise InputError(f"must have M = {group}, the channels of a group", field="pattern", value=str(pattern))
        pattern = Pattern(min(pattern.n, group), group)
    density = method.density
    if density is None and pattern is None:
        if engine and engine.coefficients == "series":
            pattern = Pattern(int(DENSITY * group), group)
        else:
            density = DENSITY
    if engine is None:
        config = Config(structured=None, basis=BasisConfig(), memory=MemoryConfig(), bus=BusConfig())
    return Plan(method, density, pattern, engine.intermediate_bits if engine else INTERMEDIATE_BITS, Sizes(config))


def impossible(node, shape):
    """Why a layer cannot be a basis layer, or None. ``node``: `graph.Conv`; ``shape``: (H, W, C) of its input."""
    kernel = node.weights.shape[1:3]
    if node.groups > 1:
        return "depthwise" if node.depthwise else "grouped"
    if kernel == (1, 1):
        return "1x1"
    if kernel == tuple(shape[:2]) and not any(node.pads):
        return "fully connected"
    return None


def kept_dense(node, shape):
    """Why a layer that no recipe names stays dense under a basis method, or None."""
    channels = node.weights.shape[3]
    few = f"{channels} input channels, fewer than {LEAST_CHANNELS}" if channels < LEAST_CHANNELS else None
    return impossible(node, shape) or few


# -- the fit -----------------------------------------------------------------------------------------------------------
def imbalance(coefficients):
    """Largest over mean density of the basis kernels: 1 if all slices have the same work.

    Args: coefficients: [K, C, M]. Returns: 1..M; 1 if all are zero.
    """
    counts = np.count_nonzero(coefficients, axis=(0, 1))
    return float(counts.max() / counts.mean()) if counts.any() else 1.0


def common_threshold(coefficients, density):
    """Bool [K, C, M]: the ``density`` largest magnitudes of all (at least one), by one threshold for all m."""
    magnitude = np.abs(coefficients)
    count = max(1, round(density * magnitude.size))
    return magnitude >= np.partition(magnitude, magnitude.size - count, axis=None)[magnitude.size - count]


def balance(decomposition, density, *, rotations, rng):
    """The decomposition in the basis of its span whose slices are balanced best.

    Tried are the given basis and ``rotations`` random ones; the first of the best is taken. The kernel is the same.

    Args: decomposition: golden.basis.Decomposition; density: total, of the common threshold; rng: np.random.Generator.
    Returns: (Decomposition, imbalance before, imbalance after).
    """
    ce, count = decomposition.coefficients, len(decomposition.basis)
    rows = ce.reshape(-1, count)
    rows = rows[::ceil_div(len(rows), _JUDGED_ROWS)]

    def judge(q):
        return imbalance(common_threshold((rows @ q.T)[None], density))

    best, chosen = judge(np.eye(count)), None
    for _ in range(rotations if count > 1 else 0):
        q = golden.rotation(count, rng)
        score = judge(q)
        if score < best:
            best, chosen = score, q
    before = imbalance(common_threshold(ce, density))
    if chosen is None:
        return decomposition, before, before
    rotated = decomposition.rotated(chosen)
    return rotated, before, imbalance(common_threshold(rotated.coefficients, density))


def _largest(score, sign, density):
    """int8 ``sign`` [K, C] at the ``density`` largest scores (at least one; ties: lowest k, then c), else 0."""
    order = np.argsort(-score, axis=None, kind="stable")[:max(1, round(density * score.size))]
    kept = np.zeros(score.size, np.int8)
    kept[order] = sign.reshape(-1)[order]
    return kept.reshape(score.shape)


def ternarize(coefficients, *, density=None, pattern=None, threshold=THRESHOLD):
    """Signs of the coefficients that are kept: int8 [K, C, M].

    Args:
        coefficients: real [K, C, M].
        density: each m keeps ``max(1, round(density * K * C))`` of its coefficients, the largest; zeros stay zero.
        pattern: instead; at most N of each M consecutive channels of a (k, m), the largest (ties: lowest channel), of
            those above ``threshold`` times the mean magnitude of their m.
    """
    ce = np.asarray(coefficients, np.float64)
    if pattern is None:
        return np.stack([_largest(np.abs(ce[..., m]), np.sign(ce[..., m]).astype(np.int8), density)
                         for m in range(ce.shape[2])], axis=2)
    large = np.abs(ce) > threshold * np.abs(ce).mean(axis=(0, 1))
    return np.sign(structured.nm_view(np.where(large, ce, 0), pattern, axis=1)).astype(np.int8)


def rank_one(coefficients, ternary, *, sweeps=_SWEEPS):
    """(alpha [K], beta [M]) of least ``sum |Ce - alpha beta T|**2``, alternating from the optimum for beta = 1.

    No error of any sweep is above that of ``beta`` = 1 with the best alpha. Rows without coefficients have alpha 0.
    """
    dot = np.einsum("kcm,kcm->km", coefficients, ternary)
    count = np.count_nonzero(ternary, axis=1).astype(np.float64)
    beta = np.ones(dot.shape[1])
    alpha = _ratio(dot @ beta, count @ beta ** 2)
    for _ in range(sweeps):
        beta = _ratio(alpha @ dot, alpha ** 2 @ count)
        alpha = _ratio(dot @ beta, count @ beta ** 2)
    return alpha, beta


def _ratio(a, b):
    """a / b, 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(b), where=b > 0)


def _error(rows, ternary, alpha, basis):
    """||W - alpha T B|| / ||W||; rows [K, C, RS], basis [M, RS]."""
    return float(np.linalg.norm(rows - alpha[:, None, None] * (ternary @ basis)) / np.linalg.norm(rows))


def descend(rows, ternary, alpha, basis, *, density=None, pattern=None, sweeps=_DESCENT):
    """(T, alpha, B) after ``sweeps`` of basis, alpha and each T[:, :, m], every one to its optimum given the others.

    With p the projection of what the other basis kernels leave over onto B[m], in units of alpha, T = sign(p) lowers
    the squared error by ``alpha**2 ||B[m]||**2 (2 |p| - 1)``: the density keeps the largest gains, a pattern the N
    largest |p| of a group, of those that gain.

    Args: rows: W as float64 [K, C, RS]; ternary int8 [K, C, M]; alpha [K]; basis [M, RS].
    """
    t, count = ternary.astype(np.float64), ternary.shape[2]
    for _ in range(sweeps):
        scaled = (alpha[:, None, None] * t).reshape(-1, count)
        basis = np.linalg.lstsq(scaled.T @ scaled, scaled.T @ rows.reshape(len(scaled), -1), rcond=None)[0]
        made = t @ basis
        better = _ratio((rows * made).sum(axis=(1, 2)), (made * made).sum(axis=(1, 2)))
        alpha = np.where(better > 0, better, alpha)             # the requantiser's multiplier has no sign
        left = rows - alpha[:, None, None] * made
        for m in range(count):
            norm = float(basis[m] @ basis[m])
            if norm <= 0:
                continue
            left += (alpha[:, None] * t[..., m])[..., None] * basis[m]
            p = np.divide(left @ basis[m], alpha[:, None] * norm, out=np.zeros(t.shape[:2]),
                          where=alpha[:, None] > 0)
            sign = np.sign(p).astype(np.int8)
            if pattern is None:
                gain = np.where(alpha[:, None] > 0, alpha[:, None] ** 2 * (2 * np.abs(p) - 1), -np.inf)
                t[..., m] = _largest(gain, sign, density)
            else:
                t[..., m] = np.sign(structured.nm_view(np.where(np.abs(p) > 0.5, p, 0), pattern, axis=1))
            left -= (alpha[:, None] * t[..., m])[..., None] * basis[m]
    return t.astype(np.int8), alpha, basis


def fit(weights, plan, *, rng):
    """The integer decomposition of one kernel.

    Args: weights: real [K, R, S, C], not all zero; plan: Plan; rng: np.random.Generator, for the rotations.
    Returns: (golden.basis.IntegerDecomposition, facts). ``alpha`` is above 0, 1 for outputs without coefficients.
    Facts: count (M), energy (kept by M), energy_ternary (kept after ternarisation and the int8 basis, 1 - error**2),
    weight_error (Frobenius, relative; before step 6), weight_error_alpha and weight_error_rank_one (steps 3 and 4, with
    a float basis), rotation_imbalance_before and _after (under a common threshold), imbalance (of the result).
    """
    w = np.asarray(weights, np.float64)
    k, r, s, c = w.shape
    if plan.method.count is None:
        d = golden.decompose(w, energy=plan.method.energy)
    else:
        d = golden.decompose(w, count=min(plan.method.count, r * s, k * c))
    density = plan.pattern.density if plan.pattern is not None else plan.density
    d, before, after = balance(d, density, rotations=plan.method.rotations, rng=rng)
    limits = {"density": plan.density, "pattern": plan.pattern}
    ternary = ternarize(d.coefficients, **limits)
    rows = w.transpose(0, 3, 1, 2).reshape(k, c, r * s)
    flat = d.basis.reshape(len(d.basis), -1)
    plain = _error(rows, ternary, rank_one(d.coefficients, ternary, sweeps=0)[0], flat)
    alpha, beta = rank_one(d.coefficients, ternary)
    first = ternary, alpha, beta[:, None] * flat
    ranked = _error(rows, *first)
    ternary, alpha, basis = min(first, descend(rows, *first, **limits), key=lambda f: _error(rows, *f))
    alpha = np.where(ternary.any(axis=(1, 2)) & (alpha > 0), alpha, 0)
    ternary[alpha == 0] = 0
    q, scale = quantize_rows(basis.reshape(1, len(basis), r, s))
    out = golden.IntegerDecomposition(basis=q[0], coefficients=ternary, alpha=np.where(alpha > 0, alpha, 1.0),
                                      scale=float(scale[0]))
    error = float(np.linalg.norm(out.to_dense() - w) / np.linalg.norm(w))
    facts = {"count": len(basis), "energy": d.meta["energy"], "energy_ternary": 1 - error ** 2, "weight_error": error,
             "weight_error_alpha": plain, "weight_error_rank_one": ranked, "rotation_imbalance_before": before,
             "rotation_imbalance_after": after, "imbalance": imbalance(ternary)}
    return replace(out, meta=facts), facts


def given(weights, plan, basis, coefficients):
    """The integer decomposition of a kernel whose factors are known, as training makes them: no search.

    The basis is rounded to int8 with one scale; then ``alpha[k] = <W[k], G[k]> / <G[k], G[k]>`` with G = T B, the least
    squares, exact up to rounding for W = alpha G. Outputs with a negative alpha (folded batch normalisation may turn
    the sign of a row) get it positive and the signs of their coefficients the other way.

    Args: weights: real [K, R, S, C]; plan: Plan; basis: real [M, R, S]; coefficients: [K, C, M], each -1, 0 or 1.
    Returns: (golden.basis.IntegerDecomposition, facts: count, weight_error, energy_ternary, imbalance, as of `fit`).
    Raises: InputError for factors of another shape, or that do not rebuild the weights (error above `GIVEN_ERROR`), or
    are more than the plan's method allows: a larger M, a higher density, more than N of its pattern.
    """
    w, b, t = np.asarray(weights, np.float64), np.asarray(basis), np.asarray(coefficients)
    k, r, s, c = w.shape
    if b.ndim != 3 or b.shape[1:] != (r, s) or not len(b) or b.dtype.kind != "f" or not np.isfinite(b).all():
        raise InputError(f"must be finite floats [M, {r}, {s}]", field="basis", value=(str(b.dtype), b.shape))
    if t.shape != (k, c, len(b)) or t.dtype.kind not in "iu" or t.size and not -1 <= t.min() <= t.max() <= 1:
        raise InputError(f"must be -1, 0 or 1, [{k}, {c}, {len(b)}]", field="coefficients",
                         value=(str(t.dtype), t.shape))
    method = plan.method
    if method.count is not None and len(b) > method.count:
        raise InputError(f"must have at most {method.count} kernels for {method}", field="basis", value=len(b))
    nonzeros = int(np.count_nonzero(t))
    if method.density is not None and nonzeros > len(b) * max(1, round(method.density * k * c)):
        raise InputError(f"must have a density of at most {method.density:g} for {method}", field="coefficients",
                         value=nonzeros / t.size)
    if method.pattern is not None and not structured.fits(t, plan.pattern, axis=1):
        raise InputError(f"must have at most {plan.pattern.n} non-zeros in each {plan.pattern.m} channels",
                         field="coefficients")
    q, scale = quantize_rows(b.astype(np.float64)[None])
    made = np.einsum("kcm,mrs->krsc", t.astype(np.float64), q[0].astype(np.float64))
    alpha = _ratio((w * made).sum(axis=(1, 2, 3)), (made * made).sum(axis=(1, 2, 3)))
    ternary = np.where((alpha == 0)[:, None, None], 0, t * np.where(alpha < 0, -1, 1)[:, None, None])
    out = golden.IntegerDecomposition(basis=q[0], coefficients=ternary, scale=float(scale[0]),
                                      alpha=np.where(alpha != 0, np.abs(alpha) / float(scale[0]), 1.0))
    error = float(np.linalg.norm(out.to_dense() - w) / np.linalg.norm(w))
    if error > GIVEN_ERROR:
        raise InputError(f"must rebuild the layer's weights (relative error at most {GIVEN_ERROR:g})",
                         field="coefficients", value=error)
    facts = {"count": len(b), "weight_error": error, "energy_ternary": 1 - error ** 2, "imbalance": imbalance(ternary)}
    return replace(out, meta=facts), facts


def tightest(coefficients, channels):
    """The pattern N:``channels`` of coefficients [K, C, M]: N is the most non-zeros of a group (at least 1)."""
    most = max(int(np.count_nonzero(coefficients[:, at:at + channels], axis=1).max())
               for at in range(0, coefficients.shape[1], channels))
    return Pattern(max(1, most), channels)


# -- what the integers do ----------------------------------------------------------------------------------------------
def peak(zero_point):
    """Largest ``|q - zero_point|`` of an int8 activation."""
    return max(127 - zero_point, 128 + zero_point)


def can_saturate(coefficients, zero_point, bits):
    """Whether any input could drive an intermediate beyond ``bits``.

    ``q - zero_point`` reaches 127 - zero_point and -128 - zero_point, each at the non-zeros of one (k, m) by sign.
    """
    limit = IntSpec(bits)
    plus, minus = ((coefficients == sign).sum(axis=1, dtype=np.int64) for sign in (1, -1))
    high, low = 127 - zero_point, -128 - zero_point
    return bool((plus * high - minus * low).max() > limit.hi or (plus * low - minus * high).min() < limit.lo)


def largest_accumulator(basis, coefficients, zero_point, bits):
    """Bound on the magnitude of every partial sum over m, r, s of an accumulator: ``sum_m min(nnz[k,m] * peak,
    2**(bits-1)) * sum_rs |B[m]|``, largest over k."""
    reach = np.count_nonzero(coefficients, axis=1).astype(np.int64) * peak(zero_point)
    return int((np.minimum(reach, 1 << bits - 1) @ np.abs(basis.astype(np.int64)).sum(axis=(1, 2))).max())


class Saturation(NamedTuple):
    """Of IR on some data: elements clamped, elements looked at, and the bits that would hold all of these."""

    saturations: int
    elements: int
    exact_bits: int


def saturation(coefficients, x, zero_point, bits):
    """`Saturation` of ``IR = sum_c T[k,c,m] (x - zero_point)`` at width ``bits``.

    Args: coefficients int8 [K, C, M]; x: int8 [N, H, W, C], of which the first samples are taken, at least one, at most
    as many as have 2**26 intermediates.
    """
    k, c, m = coefficients.shape
    rows = coefficients.transpose(0, 2, 1).reshape(k * m, 1, 1, c)
    pixels = np.asarray(x, np.int16).reshape(-1, 1, 1, c) - np.int16(zero_point)
    per_sample = x.shape[1] * x.shape[2]
    taken = pixels[:per_sample * max(1, _COUNTED // (per_sample * k * m))]
    spec, step, clamped, lo, hi = IntSpec(bits), max(1, _CHUNK // (k * m)), 0, 0, 0
    for at in range(0, len(taken), step):
        ir = accumulate(taken[at:at + step], rows)
        clamped += int(np.count_nonzero((ir < spec.lo) | (ir > spec.hi)))
        lo, hi = min(lo, int(ir.min())), max(hi, int(ir.max()))
    return Saturation(clamped, len(taken) * k * m, golden.signed_bits(lo, hi))


# -- storage -----------------------------------------------------------------------------------------------------------
def positions(coefficients, sizes):
    """Coefficients by channel group: [K, groups, channels of a group, M], padded with zeros."""
    k, c, m = coefficients.shape
    channels = sizes.group_channels
    out = np.zeros((k, ceil_div(c, channels) * channels, m), np.int8)
    out[:, :c] = coefficients
    return out.reshape(k, -1, channels, m)


def storage(basis, coefficients, sizes):
    """Bits of a basis layer in our formats (docs/basis.md) and in theory, each with 8 bits per basis element; scales
    lie in the requantiser.

    values: 2 per non-zero, no positions. maps: segment tables and segments of all blocks, in whole beats.
    series: tiles, in whole beats. entropy: positions at their binary entropy, plus a sign per non-zero (a bound for
    positions without structure).
    """
    k, _, m = coefficients.shape
    engine, beat = sizes.config.basis, sizes.config.bus.data_bits
    placed = positions(coefficients, sizes)
    groups, kernel_bits = placed.shape[1], 8 * basis.size
    parts = [slice(at, at + engine.slices) for at in range(0, m, engine.slices)]
    tiles = ceil_div(k, engine.blocks)
    used = np.count_nonzero(placed, axis=2)                                    # [K, groups, M]
    words = series_words(groups, cheapest_series(int(used.max()), groups, sizes.config), sizes.config)
    maps = 0
    for part in parts:
        mine = used[..., part]
        level_1 = engine.slices * ceil_div(groups, engine.group)               # unused slices too have their words
        signs = -(-mine.sum(axis=(1, 2)) // engine.group)
        of_block = np.full(tiles * engine.blocks, level_1)                     # blocks without an output: level 1 alone
        of_block[:k] += np.count_nonzero(mine, axis=(1, 2)) + signs
        bits = engine.group * of_block.reshape(tiles, engine.blocks).sum(axis=1)
        maps += int((-(-bits // beat)).sum()) + tiles * sizes.segment_table_beats
    bound = golden.IntegerDecomposition(basis=basis, coefficients=coefficients).coefficient_bits()
    return {"values": bound.values + kernel_bits, "maps": maps * beat + kernel_bits,
            "series": tiles * len(parts) * words * sizes.series_tile_beats * beat + kernel_bits,
            "entropy": bound.entropy + kernel_bits}


def storage_metrics(basis, coefficients, sizes, *, pattern):
    """Plain figures of `storage`: ``bits`` (in the encoding that suits: series for a pattern, else maps),
    ``bits_<accounting>`` and ``compression_<accounting>``, 32 bits per dense weight over these bits."""
    held = storage(basis, coefficients, sizes)
    dense = coefficients.shape[0] * coefficients.shape[1] * basis[0].size
    figures = {"bits": held["series" if pattern is not None else "maps"], "dense_bits": 8 * dense}
    for name, bits in held.items():
        figures |= {f"bits_{name}": bits, f"compression_{name}": 32 * dense / bits}
    return figures
