"""Collaborative Compression's allocator against loops, hand calculations and enumeration (no PyTorch)."""
import numpy as np
import pytest

from compress.training import allocation


def layer(rng, shape=(6, 5, 4)):
    """(weight, gradient) [O, I, T]."""
    return rng.normal(size=shape), rng.normal(size=shape)


def without(weight, value):
    """``weight`` without one place of its spectrum."""
    u, s, vt = np.linalg.svd(weight.reshape(len(weight), -1), full_matrices=False)
    s[value] = 0
    return (u @ np.diag(s) @ vt).reshape(weight.shape)


def error(weight, gradient, candidate):
    return sum((g * (c - w)) ** 2 for g, c, w in zip(gradient.flat, candidate.flat, weight.flat))


@pytest.mark.parametrize("first_matters", [True, False])
def test_error_curve_against_a_loop(first_matters, rng):
    weight, gradient = layer(rng)
    if not first_matters:                                     # the largest singular values go before smaller ones
        weight[0] *= 10
        gradient[0] *= 1e-3
    o, i, t = weight.shape
    own = [error(weight, gradient, np.where(np.arange(i)[None, :, None] == k, 0, weight)) for k in range(i)]
    own += [error(weight, gradient, without(weight, k)) for k in range(6)]
    now, channels, values, points = weight, i, list(range(6)), []
    for unit in np.argsort(own):
        if unit < i:
            now, channels = np.where(np.arange(i)[None, :, None] == unit, 0, now), channels - 1
        else:
            now = without(now, values.index(unit - i))
            values.remove(unit - i)
        macs = channels * t * o if len(values) == 6 else len(values) * (channels * t + o)
        points.append((1 - macs / 120, error(weight, gradient, now)))
    points = sorted(p for p in points if p[0] > 0)
    shares, errors = allocation.error_curve(weight, gradient)
    np.testing.assert_allclose(shares, [p[0] for p in points])
    np.testing.assert_allclose(np.sort(errors), np.sort([p[1] for p in points]) / max(p[1] for p in points), rtol=1e-9)


def test_fit():
    c = np.linspace(0.05, 1, 12)
    np.testing.assert_allclose(allocation.fit(c, 0.01 * np.exp(4.5 * c)), (0.01, 4.5))
    e = 0.01 * np.exp(4.5 * c) * (1 + 0.3 * np.sin(9 * c))
    slope, start = np.polyfit(c, np.log(e), 1, w=np.sqrt(np.sqrt(e)))          # polyfit squares its weights
    np.testing.assert_allclose(allocation.fit(c, e), (np.exp(start), slope))
    with pytest.raises(ValueError, match="needs two shares with an error"):
        allocation.fit(c, c * 0)
    with pytest.raises(ValueError, match="must grow"):
        allocation.fit(c, 1 - 0.5 * c)


def test_allocation_by_hand():
    # cf = F / p2 ln(x / (p1 p2)): 100/2 ln(x/.2) + 200/4 ln(x/.4) = 120 with x: ln x = (2.4 + ln .2 + ln .4) / 2
    log_x = (2.4 + np.log(0.2) + np.log(0.4)) / 2
    want = [50 * (log_x - np.log(0.2)), 50 * (log_x - np.log(0.4))]
    got = allocation.allocate([100, 200], [(0.1, 2), (0.1, 4)], 0.4)
    np.testing.assert_allclose(got, want)
    slopes = [p1 * p2 * np.exp(p2 * c) for (p1, p2), c in zip([(0.1, 2), (0.1, 4)], got / [100, 200])]
    assert slopes[0] == pytest.approx(slopes[1])


def test_equal_slope_per_multiplication():
    curves, macs = [(0.1, 2), (0.1, 4)], np.array([100, 200])
    got = allocation.allocate(macs, curves, 0.4, equal="mac")
    slopes = [p1 * p2 * np.exp(p2 * c) / f for (p1, p2), c, f in zip(curves, got / macs, macs)]
    assert slopes[0] == pytest.approx(slopes[1]) and got.sum() == pytest.approx(120)


@pytest.mark.parametrize("ratio", [0, 0.01, 0.3, 0.6, 0.9, 0.95])
def test_allocations_stay_in_their_limits_and_sum_to_the_target(ratio, rng):
    macs, curves = rng.uniform(1e5, 1e8, 20), np.stack([rng.uniform(1e-6, 0.5, 20), rng.uniform(0.5, 15, 20)], 1)
    got = allocation.allocate(macs, curves, ratio)
    assert got.sum() == pytest.approx(ratio * macs.sum(), rel=1e-9) and (got >= 0).all()
    assert (got <= 0.95 * macs * (1 + 1e-12)).all()
    inside = (got > 0) & (got < 0.95 * macs * (1 - 1e-12))
    slopes = (curves[:, 0] * curves[:, 1] * np.exp(curves[:, 1] * got / macs))
    if inside.any():
        x = slopes[inside][0]
        np.testing.assert_allclose(slopes[inside], x)
        assert (slopes[got == 0] >= x * (1 - 1e-9)).all() and (slopes[~inside & (got > 0)] <= x * (1 + 1e-9)).all()


def test_out_of_reach():
    with pytest.raises(ValueError, match="Ratio must be in 0..0.500, not 0.6"):
        allocation.allocate([100, 100], [(0.1, 2), (0.1, 2)], 0.6, most=np.array([0.25, 0.75]))
    assert allocation.most_of((8, 8, 1)) == 1 - 8 / 64 and allocation.most_of((64, 64, 9)) == 0.95
    with pytest.raises(ValueError, match="Target must be in 0..0.875, not 0.9"):
        allocation.compress(np.ones((8, 8, 1)), np.ones((8, 8, 1)), 0.9)


@pytest.mark.parametrize("look_ahead", [0.0, 0.9])
def test_metrics_are_the_expectation_over_the_next_unit(look_ahead, rng):
    weight, gradient = layer(rng)
    now, alive = weight.copy(), np.array([0, 1, 3, 4])
    now[:, 2] = 0
    now = without(now, 1)
    channels, values, (u, s, vt) = allocation.unit_metrics(weight, gradient, now, alive, look_ahead=look_ahead)
    assert len(values) == 5
    parts = [(s[r] * np.outer(u[:, r], vt[r])).reshape(now.shape) for r in range(5)]
    np.testing.assert_allclose(sum(parts), now)

    def only(array, k):
        return np.where(np.arange(5)[None, :, None] == k, array, 0)

    def metric(left, units):
        after = np.mean([error(weight, gradient, left - unit) for unit in units])
        return error(weight, gradient, left) + look_ahead * after

    for k, found in zip(alive, channels):
        left = now - only(now, k)
        units = [only(left, c) for c in alive if c != k] + [p - only(p, k) for p in parts]
        assert found == pytest.approx(metric(left, units))
    for r, found in enumerate(values):
        left = now - parts[r]
        units = [only(left, c) for c in alive] + [p for n, p in enumerate(parts) if n != r]
        assert found == pytest.approx(metric(left, units))


@pytest.mark.parametrize("target", [0, 0.1, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("shape", [(8, 12, 9), (16, 16, 1), (10, 30, 4)])
def test_layers_give_what_is_asked(target, shape, rng):
    target = min(target, allocation.most_of(shape))
    rest = allocation.compress(*layer(rng, shape), target)
    o, i, t = shape
    macs = len(rest.channels) * t * o if rest.rank is None else rest.rank * (len(rest.channels) * t + o)
    assert macs <= (1 - target) * o * i * t * (1 + 1e-9)
    assert len(rest.channels) >= 1 and (np.diff(rest.channels) > 0).all()
    assert rest.rank is None or 1 <= rest.rank <= min(o, len(rest.channels) * t)
    if target == 0:
        assert rest.rank is None and len(rest.channels) == i


def test_what_costs_nothing_goes_first(rng):
    weight, gradient = layer(rng, (12, 10, 9))
    weight[:, [2, 7]] *= 1e-3
    rest = allocation.compress(weight, gradient, 0.2)
    assert rest.channels.tolist() == [0, 1, 3, 4, 5, 6, 8, 9] and rest.rank is None
    weight = np.einsum("or,rit->oit", rng.normal(size=(12, 3)), rng.normal(size=(3, 10, 9)))
    rest = allocation.compress(weight, gradient, 0.7)
    assert rest.rank == 3 and rest.channels.tolist() == list(range(10))
