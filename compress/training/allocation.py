"""Which channels and how much rank each layer gives up: the allocator of Collaborative Compression (NumPy).

Compression units of a layer are its input channels (pruning) and the singular values of its ``O x (I T)`` matrix, T
taps (decomposition). The sensitivity of a candidate W' is ``S(W') = sum (g * (W' - W))^2``, g the mean gradient.

1. `error_curve`: units are removed in order of their own sensitivity, 1 % at a time: error S over its largest value
   against c, the share of multiplications removed. `fit`: ``e(c) ~ p1 exp(p2 c)``.
2. `allocate`: multiplications removed of layer l, ``cf_l = (F_l / p2_l) ln(x / (p1_l p2_l))`` within ``0 .. .95 F_l``,
   x such that they sum to the target: all layers then have the same slope de/dc.
3. `compress`: one layer loses units until cf_l is reached, again and again the 1 % with the smallest
   ``S(without the unit) + .9 * E[S after one more unit, any of the rest]``.

Source: Y. Li, S. Lin, J. Liu et al., "Towards Compact CNNs via Collaborative Compression", CVPR 2021, and its published
code, whose metrics these are. Ours: bisection for x instead of gradient descent, one clip at .95 (the code sums with
.9), points of the curve at every 1 % of the units (the code: at every unit), one SVD for all candidates of step 3.
"""
from dataclasses import dataclass

import numpy as np

#: Largest share of a layer's multiplications that goes.
MOST = 0.95
#: Weight of the look ahead, and share of the units that go in one step of `compress`.
LOOK_AHEAD, STEP = 0.9, 0.01
#: Singular values below this share of the largest are zeros.
ZERO = 1e-10
#: What the slopes of a layer are compared per.
EQUAL = ("share", "mac")


@dataclass(frozen=True)
class Rest:
    """What stays of a layer: kept input channels (numbers, ascending), and a rank or None for no decomposition."""

    channels: np.ndarray
    rank: int | None


def _macs(shape, channels, rank):
    """Multiplications per output position of [O, I, T] with ``channels`` inputs; ``rank`` None: not decomposed."""
    o, _, t = shape
    return channels * t * o if rank is None else rank * (channels * t + o)


def _svd(weight):
    """U [O, n], s [n], V^T [n, I T] of [O, I, T]."""
    return np.linalg.svd(weight.reshape(len(weight), -1), full_matrices=False)


def at_once(units):
    """Units that go in one step."""
    return max(1, int(units * STEP))


def most_of(shape):
    """Largest share of the multiplications of [O, I, T] that can go: one channel stays, or one of rank 1."""
    least = min(_macs(shape, 1, 1), _macs(shape, 1, None))
    return min(MOST, 1 - least / np.prod(shape))


def sensitivity(weight, gradient, candidate):
    """``sum (g * (W' - W))^2``."""
    return float(np.square(gradient * (candidate - weight)).sum())


def error_curve(weight, gradient):
    """Shares of multiplications removed, and errors relative to the largest (step 1); only shares above 0, ascending.

    Args: weight, gradient: float64 [O, I, T]. Returns: two float64 arrays of one length.
    """
    u, s, vt = _svd(weight)
    squares = np.square(gradient)
    flat = squares.reshape(len(weight), -1)
    own = np.concatenate([(squares * np.square(weight)).sum((0, 2)),
                          np.square(s) * np.einsum("or,op,rp->r", np.square(u), flat, np.square(vt))])
    inputs, full = weight.shape[1], len(s)
    now, channels, rank, shares, errors = weight.copy(), inputs, full, [], []
    gone = np.zeros(full, bool)                              # removed values, by their place in the first spectrum
    order = np.argsort(own, kind="stable")
    for units in np.array_split(order, -(-len(order) // at_once(len(order)))):
        now[:, units[units < inputs]] = 0
        channels -= int((units < inputs).sum())
        places = units[units >= inputs] - inputs
        if len(places):
            u, s, vt = _svd(now)
            s[[place - int(gone[:place].sum()) for place in places]] = 0     # places in the spectrum that is left
            gone[places] = True
            now = ((u * s) @ vt).reshape(weight.shape)
            rank -= len(places)
        macs = _macs(weight.shape, channels, None if rank == full else rank)
        shares.append(1 - macs / weight.size)
        errors.append(sensitivity(weight, gradient, now))
    shares, errors = np.array(shares), np.array(errors)
    order = np.argsort(shares, kind="stable")
    shares, errors = shares[order], errors[order]
    errors = errors[shares > 0]
    return shares[shares > 0], errors / errors.max() if errors.max() > 0 else errors


def fit(shares, errors):
    """(p1, p2) of ``e ~ p1 exp(p2 c)``: least squares of ``ln e`` weighted by ``sqrt(e)``, as the published code does.

    Raises: ValueError unless two different shares have an error above 0 and errors grow with the share.
    """
    good = errors > 0
    if len(np.unique(shares[good])) < 2:
        raise ValueError("An error curve needs two shares with an error")
    c, y, weight = shares[good], np.log(errors[good]), np.sqrt(errors[good])
    mean_c, mean_y = np.average(c, weights=weight), np.average(y, weights=weight)
    p2 = np.average((c - mean_c) * (y - mean_y), weights=weight) / np.average(np.square(c - mean_c), weights=weight)
    if p2 <= 0:
        raise ValueError("An error curve must grow")
    return float(np.exp(mean_y - p2 * mean_c)), float(p2)


def allocate(macs, curves, ratio, *, equal="share", most=MOST):
    """Multiplications that each layer gives up (step 2).

    Args: macs: F_l; curves: (p1_l, p2_l), p2 > 0; ratio: share of ``sum F`` that goes; equal: ``share`` (equal de/dc)
    or ``mac``: equal slope per multiplication, ``cf_l = (F_l / p2_l) ln(x F_l / (p1_l p2_l))``; most: largest share of
    each layer.
    Returns: float64, one per layer. Raises: ValueError for a ratio that the layers cannot give.
    """
    macs, (p1, p2) = np.asarray(macs, np.float64), np.asarray(curves, np.float64).T
    limits = most * macs
    if not 0 <= ratio * macs.sum() <= limits.sum():
        raise ValueError(f"Ratio must be in 0..{limits.sum() / macs.sum():.3f}, not {ratio!r}")
    start = np.log(p1 * p2) - (np.log(macs) if equal == "mac" else 0)       # ln x at which a layer begins to give

    def removed(log_x):
        return np.clip(macs / p2 * (log_x - start), 0, limits)

    low, high = start.min(), (start + p2).max()                             # nothing, and all that may go
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if removed(middle).sum() < ratio * macs.sum() else (low, middle)
    return removed(high)


def unit_metrics(weight, gradient, now, alive, *, look_ahead=LOOK_AHEAD):
    """Metric of removing each unit that is left (step 3).

    With D = W' - W after the removal and n - 1 units left, U_j what one of them adds to W'::

        E_j S(W' - U_j) = sum g^2 D^2 - 2 g^2 D E_j[U_j] + g^2 E_j[U_j^2]
        E_j[U_j] = 2 W' / (n - 1)                                (channels sum to W', and so do singular values)
        E_j[U_j^2] = (W'^2 + sum_r s_r^2 u_r^2 v_r^2) / (n - 1)

    Args: weight, gradient, now: float64 [O, I, T]; now: what is left of weight; alive: numbers of channels left.
    Returns: metrics of the channels ``alive``, metrics of the singular values of ``now``, and its SVD (U, s, V^T)
    without values that are zero.
    """
    u, s, vt = _svd(now)
    rank = max(1, int((s > s[0] * ZERO).sum()))
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    squares = np.square(gradient)
    rest = max(1, len(alive) + len(s) - 1)

    def parts(difference, product):
        """S, ``sum g^2 D W'`` and ``sum g^2 W'^2`` before anything goes, by channel."""
        return [(squares * value).sum((0, 2)) for value in (np.square(difference), product, np.square(now))]

    error, cross, energy = parts(now - weight, (now - weight) * now)
    flat = squares.reshape(len(weight), -1)
    value_energy = np.square(s)[:, None] * np.square(vt) * (np.square(u).T @ flat)          # [r, I T]
    by_channel = value_energy.sum(0).reshape(weight.shape[1], -1).sum(1)

    def metric(error, cross, energy, spectrum):
        return error + look_ahead * (error + (-4 * cross + energy + spectrum) / rest)

    own = (squares * np.square(weight)).sum((0, 2))          # D of a removed channel is -W, its W' is 0
    channels = metric((error.sum() - error + own)[alive], (cross.sum() - cross)[alive], (energy.sum() - energy)[alive],
                      (by_channel.sum() - by_channel)[alive])

    def along(values):
        """``sum values * T_r`` over a weight's places, T_r the part of the singular value r."""
        return s * np.einsum("or,op,rp->r", u, values.reshape(len(weight), -1), vt, optimize=True)

    own = value_energy.sum(1)                                # sum g^2 T_r^2
    of_error, of_now = along(squares * (now - weight)), along(squares * now)
    values = metric(error.sum() - 2 * of_error + own, cross.sum() - of_error - of_now + own,
                    energy.sum() - 2 * of_now + own, value_energy.sum() - own)
    return channels, values, (u, s, vt)


def compress(weight, gradient, target, *, look_ahead=LOOK_AHEAD):
    """What stays of a layer after at least the share ``target`` of its multiplications is gone (step 3).

    Decomposed only if that is needed: where the pruned channels alone reach the target, the rank stays whole. At least
    one channel and one singular value stay.

    Args: weight, gradient: float64 [O, I, T]; target: share, 0 .. `most_of`. Returns: `Rest`.
    Raises: ValueError for a target that is out of reach.
    """
    shape = weight.shape
    if not 0 <= target <= most_of(shape):
        raise ValueError(f"Target must be in 0..{most_of(shape):.3f}, not {target!r}")
    allowed = (1 - target) * weight.size * (1 + 1e-12)
    now, alive = weight.copy(), np.arange(shape[1])
    rank = len(unit_metrics(weight, gradient, now, alive)[1])
    count = at_once(len(alive) + rank)

    def done(channels, rank):
        return min(_macs(shape, channels, None), _macs(shape, channels, rank)) <= allowed

    while not done(len(alive), rank):
        channels, values, (u, s, vt) = unit_metrics(weight, gradient, now, alive, look_ahead=look_ahead)
        gone, dropped = [], np.zeros(len(s), bool)
        for unit in np.argsort(np.concatenate([channels, values]), kind="stable"):
            if unit < len(alive):
                if len(gone) + 1 < len(alive):
                    gone.append(int(unit))
            elif dropped.sum() + 1 < len(s):
                dropped[unit - len(alive)] = True
            rank = len(s) - int(dropped.sum())
            if len(gone) + dropped.sum() == count or done(len(alive) - len(gone), rank):
                break
        if dropped.any():
            now = ((u * (s * ~dropped)) @ vt).reshape(shape)
        now[:, alive[gone]] = 0
        alive = np.delete(alive, gone)
    return Rest(channels=alive, rank=None if _macs(shape, len(alive), None) <= allowed else rank)
