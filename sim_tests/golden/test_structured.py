"""golden.structured against the paper's examples, closed forms and an independent per-block loop."""
import doctest
from math import comb, sqrt

import numpy as np
import pytest

from golden import structured
from golden.structured import fits, nm_view, tasd_series
from spec.config import Pattern

A = np.array([[2, 0, 0, 0, 0, 3, 1, 4], [1, 3, 0, 0, 2, 4, 4, 1]])

# series, kept non-zeros, kept sum, residual
EXAMPLES = [
    ([(2, 4)], 7, 21, [[0, 0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 2, 0, 0, 1]]),
    ([(2, 4), (2, 8)], 10, 25, [[0] * 8, [0] * 8]),
    ([(3, 4)], 9, 24, [[0] * 8, [0, 0, 0, 0, 0, 0, 0, 1]]),
    ([(2, 8)], 4, 15, [[2, 0, 0, 0, 0, 0, 1, 0], [1, 3, 0, 0, 2, 0, 0, 1]]),
    ([(2, 8), (1, 8)], 6, 20, [[0, 0, 0, 0, 0, 0, 1, 0], [1, 0, 0, 0, 2, 0, 0, 1]]),
    ([(4, 8)], 8, 23, [[0] * 8, [1, 0, 0, 0, 0, 0, 0, 1]]),
    ([(4, 8), (1, 8)], 9, 24, [[0] * 8, [0, 0, 0, 0, 0, 0, 0, 1]]),
]


@pytest.mark.parametrize("series, kept, total, residual", EXAMPLES)
@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.float32])
def test_published_examples(series, kept, total, residual, dtype):
    terms, rest = tasd_series(A.astype(dtype), series)
    assert rest.tolist() == residual and rest.dtype == dtype
    assert sum(np.count_nonzero(t) for t in terms) == kept
    assert sum(t.sum() for t in terms) == total
    assert np.array_equal(sum(terms) + rest, A)


def test_terms_of_the_two_term_example():
    terms, _ = tasd_series(A, [(2, 8), (1, 8)])
    assert terms[1].tolist() == [[2, 0, 0, 0, 0, 0, 0, 0], [0, 3, 0, 0, 0, 0, 0, 0]]


def slow_view(row, n, m):
    """One row by plain Python: sort each block by (-|value|, index)."""
    out = [0] * len(row)
    for at in range(0, len(row), m):
        block = range(at, min(at + m, len(row)))
        for i in sorted(block, key=lambda i: (-abs(int(row[i])), i))[:n]:
            out[i] = int(row[i])
    return out


@pytest.mark.parametrize("pattern", [(1, 4), (2, 4), (3, 4), (4, 4), (1, 8), (5, 8), (8, 8), (3, 16), (2, 7), (1, 1)])
@pytest.mark.parametrize("length", [1, 3, 8, 17, 48])
def test_view_equals_a_plain_loop_with_ties_and_extremes(rng, pattern, length):
    for lo, hi in ((-128, 128), (-2, 3), (0, 1)):
        values = rng.integers(lo, hi, (5, length)).astype(np.int8)
        values[0] = rng.choice(np.array([-128, 127, -127], np.int8), length)
        got = nm_view(values, pattern)
        assert got.tolist() == [slow_view(row, *pattern) for row in values] and got.dtype == np.int8
        assert fits(got, pattern)


def test_magnitude_of_minus_128_is_128():
    assert nm_view(np.array([127, -128, -127, 0], np.int8), (1, 4)).tolist() == [0, -128, 0, 0]
    assert nm_view(np.array([-128, -128], np.int8), (1, 2)).tolist() == [-128, 0]


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_axis(rng, axis):
    values = rng.integers(-9, 10, (6, 10, 7))
    want = np.moveaxis(nm_view(np.moveaxis(values, axis, -1), (2, 4)), -1, axis)
    assert np.array_equal(nm_view(values, (2, 4), axis), want)
    assert fits(want, (2, 4), axis)


@pytest.mark.parametrize("series", [[(4, 8), (1, 8)], [(1, 8), (4, 8)], [(2, 8), (2, 8), (1, 8)]])
def test_same_m_series_equals_one_view(rng, series):
    values = rng.integers(-20, 21, (64, 40))
    terms, _ = tasd_series(values, series)
    assert np.array_equal(sum(terms), nm_view(values, (5, 8)))


@pytest.mark.parametrize("series, one, equal", [
    ([(2, 4), (2, 8)], (6, 8), True), ([(2, 4), (2, 8), (2, 16)], (14, 16), True),
    ([(2, 4), (1, 8)], (5, 8), False), ([(1, 4), (1, 8)], (3, 8), False)])
def test_mixed_m_series_equals_one_view_exactly_when_the_rule_says_so(rng, series, one, equal):
    values = rng.normal(size=(4000, 16))
    got, want = sum(tasd_series(values, series)[0]), nm_view(values, one)
    assert np.array_equal(got, want) == equal
    if not equal:
        lost = [1 - np.abs(v).sum() / np.abs(values).sum() for v in (got, want)]
        assert lost[0] > lost[1]


def test_narrow_patterns_nest(rng):
    assert fits(nm_view(rng.normal(size=(50, 32)), (2, 4)), (4, 8))
    assert fits(nm_view(np.repeat([[1., 2, 3, 4, 0, 0, 0, 0]], 3, 0), (2, 8)), (2, 4))
    assert not fits(np.array([1, 1, 1, 1, 0, 0, 0, 0]), (2, 4)) and fits(np.array([1, 1, 1, 1, 0, 0, 0, 0]), (4, 8))


def test_residual_never_grows_with_terms_or_n(rng):
    values = rng.normal(size=(30, 24)).astype(np.float32)
    last = np.inf
    for n in range(1, 9):
        rest = np.linalg.norm(tasd_series(values, [(1, 8)] * n)[1])
        assert rest == np.linalg.norm(values - nm_view(values, (n, 8))) and rest <= last
        last = rest
    assert last == 0


def test_product_of_terms_is_exact(rng):
    a, b = rng.integers(-128, 128, (16, 64)), rng.integers(-128, 128, (64, 9))
    terms, rest = tasd_series(a, [(4, 8), (1, 8)])
    assert np.array_equal(sum(t @ b for t in terms), (a - rest) @ b)


PERCENT = {
    (1, 4): (7.25, 14.0, 26.2, 36.7, 45.6, 53.1, 59.4, 64.6), (2, 4): (.24, .95, 3.60, 7.65, 12.8, 18.8, 25.2, 31.9),
    (3, 4): (0, .03, .20, .67, 1.60, 3.12, 5.40, 8.57), (1, 8): (15.9, 28.8, 48.0, 60.7, 69.3, 75.1, 79.2, 82.1),
    (2, 8): (1.54, 5.45, 16.9, 29.7, 41.4, 51.0, 58.5, 64.3), (3, 8): (.10, .69, 4.25, 11.0, 20.0, 29.6, 38.7, 46.7),
    (4, 8): (0, .06, .73, 2.94, 7.27, 13.7, 21.5, 29.8), (5, 8): (0, 0, .08, .53, 1.84, 4.59, 9.14, 15.4),
    (6, 8): (0, 0, .01, .06, .29, .98, 2.57, 5.59), (7, 8): (0, 0, 0, 0, .02, .10, .35, 1.03),
}
DENSITIES = (.05, .1, .2, .3, .4, .5, .6, .7)


@pytest.mark.parametrize("pattern", PERCENT)
def test_dropped_fraction_follows_the_binomial_law(rng, pattern):
    """Measured dropped non-zeros over B blocks against ``E = sum_k max(0, k - N) P(k)`` per block.

    The dropped count of a block has variance V <= sum_k max(0, k - N)**2 P(k), so the mean over B independent blocks
    deviates from E by more than 6 sqrt(V / B) with a chance below 1e-8. The table prints three digits: E / (M d) must
    round to it.
    """
    (n, m), blocks = pattern, 20_000
    for density, printed in zip(DENSITIES, PERCENT[pattern]):
        chance = [comb(m, k) * density**k * (1 - density)**(m - k) for k in range(m + 1)]
        mean = sum(max(0, k - n) * p for k, p in enumerate(chance))
        variance = sum(max(0, k - n)**2 * p for k, p in enumerate(chance))
        percent = 100 * mean / (m * density)
        assert abs(percent - printed) <= (0.0051 if printed < 10 else 0.051)
        values = rng.integers(1, 100, (blocks, m)) * (rng.random((blocks, m)) < density)
        dropped = np.count_nonzero(values) - np.count_nonzero(nm_view(values, pattern))
        assert abs(dropped / blocks - mean) <= 6 * sqrt(variance / blocks) + 6 / blocks


@pytest.mark.parametrize("pattern", [(0, 4), (5, 4), (2,), "2:4", None])
def test_illegal_pattern(pattern):
    with pytest.raises(ValueError, match="Pattern must"):
        nm_view(np.zeros(4), pattern)


def test_illegal_values():
    with pytest.raises(TypeError, match="integers or floats, not bool"):
        nm_view(np.zeros(4, bool), (2, 4))
    with pytest.raises(ValueError, match="finite"):
        nm_view(np.array([1, np.nan]), (1, 2))
    with pytest.raises(ValueError, match="at least one axis"):
        nm_view(3, (1, 2))
    with pytest.raises(ValueError, match="at least one term"):
        tasd_series(np.zeros(4), [])


def test_the_argument_is_not_changed():
    values = A.copy()
    tasd_series(values, [Pattern(8, 8)])
    nm_view(values, (8, 8))[:] = 0
    assert np.array_equal(values, A)


@pytest.mark.parametrize("patterns", [[(4, 8)], [(4, 8), (1, 8)], [(4, 8), (2, 8), (1, 8)], [(2, 4), (1, 8)],
                                      [(1, 4), (1, 8)], [(8, 8), (1, 8)]])
def test_view_of_a_series_is_the_sum_of_its_terms(rng, patterns):
    for values in (rng.integers(-128, 128, (3, 5, 20)).astype(np.int8), rng.normal(size=(2, 24)),
                   rng.integers(-2, 3, (7, 16))):
        for axis in (-1, 0):
            terms, _ = structured.tasd_series(values, patterns, axis)
            got = structured.series_view(values, patterns, axis)
            assert got.dtype == values.dtype and np.array_equal(got, sum(terms))


#: Reference, section 4: percent of the non-zeros dropped at densities .05 .10 .20 .30 .40 .50 .60 .70.
LOSS = {
    (1, 4): (7.25, 14.0, 26.2, 36.7, 45.6, 53.1, 59.4, 64.6), (2, 4): (0.24, 0.95, 3.60, 7.65, 12.8, 18.8, 25.2, 31.9),
    (3, 4): (0.00, 0.03, 0.20, 0.67, 1.60, 3.12, 5.40, 8.57), (1, 8): (15.9, 28.8, 48.0, 60.7, 69.3, 75.1, 79.2, 82.1),
    (2, 8): (1.54, 5.45, 16.9, 29.7, 41.4, 51.0, 58.5, 64.3), (3, 8): (0.10, 0.69, 4.25, 11.0, 20.0, 29.6, 38.7, 46.7),
    (4, 8): (0.00, 0.06, 0.73, 2.94, 7.27, 13.7, 21.5, 29.8), (5, 8): (0.00, 0.00, 0.08, 0.53, 1.84, 4.59, 9.14, 15.4),
    (6, 8): (0.00, 0.00, 0.01, 0.06, 0.29, 0.98, 2.57, 5.59), (7, 8): (0.00, 0.00, 0.00, 0.00, 0.02, 0.10, 0.35, 1.03)}


@pytest.mark.parametrize("pattern", LOSS)
def test_expected_loss_of_the_reference(pattern):
    for density, percent in zip((.05, .1, .2, .3, .4, .5, .6, .7), LOSS[pattern]):
        rounding = 0.051 if percent >= 10 else 0.0051
        assert abs(100 * structured.expected_dropped(pattern, density) - percent) <= rounding
    assert structured.expected_dropped(pattern, 0) == 0
    assert structured.expected_dropped(pattern, 1) == pytest.approx(1 - pattern[0] / pattern[1])


def test_pseudo_density():
    """The smallest count whose largest magnitudes reach the share, by trying every count."""
    rng = np.random.default_rng(3)
    for values in (rng.normal(size=(4, 25)), rng.integers(-128, 128, 60).astype(np.int8), np.array([-128], np.int8)):
        order = np.sort(np.abs(values.astype(np.float64)).ravel())[::-1]
        for share in (0.01, 0.5, 0.9, 0.99, 1.0):
            want = next(n for n in range(1, values.size + 1)
                        if order[:n].sum() >= share * order.sum() * (1 - 1e-12)) / values.size
            assert structured.pseudo_density(values, share) == want
    assert structured.pseudo_density(np.zeros(5)) == 0 and structured.pseudo_density([0, 0, 0, -7]) == 0.25
    assert structured.pseudo_density(np.ones(100), 0.99) == 0.99


def test_examples_run():
    assert doctest.testmod(structured).failed == 0


@pytest.mark.parametrize("call,text", [
    (lambda: structured.expected_dropped((2, 8), 1.5), "density must be in 0..1, not 1.5"),
    (lambda: structured.expected_dropped((9, 8), 0.5), "Pattern must have 1 <= N <= M, not 9:8"),
    (lambda: structured.pseudo_density([1.0], 0), "share must be above 0 and at most 1, not 0"),
    (lambda: structured.pseudo_density([]), "values must not be empty"),
    (lambda: structured.series_view([1.0], []), "patterns must name at least one term")])
def test_refusals_of_figures(call, text):
    with pytest.raises(ValueError, match=text):
        call()
