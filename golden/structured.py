"""N:M views and TASD series: a tensor as a sum of structured-sparse terms.

Source: arXiv 2403.07953, section 3 (N:M view, series). The paper gives no rule for ties; here the lowest index wins,
and magnitudes are exact integers, so that |-128| = 128.
"""
from math import comb

import numpy as np

from spec.config import Pattern


def _pattern(pattern):
    """``pattern`` as a Pattern. Raises ValueError unless 1 <= N <= M."""
    try:
        n, m = (int(v) for v in pattern)
    except (TypeError, ValueError):
        raise ValueError(f"Pattern must be a pair (N, M), not {pattern!r}") from None
    if not 1 <= n <= m:
        raise ValueError(f"Pattern must have 1 <= N <= M, not {n}:{m}")
    return Pattern(n, m)


def _blocks(values, m, axis):
    """``values`` with ``axis`` last and cut into blocks: [..., blocks, m], the last block padded with zeros."""
    moved = np.moveaxis(values, axis, -1)
    short = -moved.shape[-1] % m
    if short:
        moved = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, short)])
    return moved.reshape(*moved.shape[:-1], -1, m)


def _magnitude(values):
    """|values| that never wraps: integers are widened before their sign is dropped."""
    if np.issubdtype(values.dtype, np.integer):
        return np.abs(values.astype(np.int64))
    return np.abs(values)


def _checked(values):
    values = np.asarray(values)
    if not (np.issubdtype(values.dtype, np.integer) or np.issubdtype(values.dtype, np.floating)):
        raise TypeError(f"values must be integers or floats, not {values.dtype}")
    if values.ndim == 0:
        raise ValueError("values must have at least one axis")
    if not np.isfinite(values).all():
        raise ValueError("values must be finite")
    return values


def nm_view(values, pattern, axis=-1):
    """Keep the N elements of largest magnitude in every block of M consecutive elements along ``axis``.

    ``kept[b, i] = values[b, i] if rank of (-|values[b, i]|, i) in block b < N else 0``

    Args:
        values: int or float array of any shape; a last block shorter than M counts as padded with zeros.
        pattern: (N, M) or `spec.config.Pattern`, 1 <= N <= M.
        axis: the axis that blocks run along.
    Returns: the view: shape and dtype of ``values``; the lowest index wins ties.
    Raises: TypeError for other dtypes; ValueError for an illegal pattern, a scalar, or values that are not finite.
    """
    values, (n, m) = _checked(values), _pattern(pattern)
    if n == m:
        return values.copy()
    blocks = _blocks(values, m, axis)
    order = np.argsort(-_magnitude(blocks), axis=-1, kind="stable")
    kept = np.zeros_like(blocks)
    first = order[..., :n]
    np.put_along_axis(kept, first, np.take_along_axis(blocks, first, -1), -1)
    length = values.shape[axis]
    kept = kept.reshape(*kept.shape[:-2], -1)[..., :length]
    return np.ascontiguousarray(np.moveaxis(kept, -1, axis))


def tasd_series(values, patterns, axis=-1):
    """Greedy TASD series: ``R_0 = values; A_i = nm_view(R_{i-1}, pattern_i); R_i = R_{i-1} - A_i``.

    Elements are moved, never split, so ``sum(terms) + residual == values`` holds exactly, for floats too.

    Args: as `nm_view`; ``patterns`` is the series, for example ``[(4, 8), (1, 8)]``.
    Returns: (list of terms, residual), each of the shape and dtype of ``values``.
    Raises: as `nm_view`; ValueError for an empty series.
    """
    values = _checked(values)
    patterns = [_pattern(p) for p in patterns]
    if not patterns:
        raise ValueError("patterns must name at least one term")
    terms, residual = [], values.copy()
    for pattern in patterns:
        term = nm_view(residual, pattern, axis)
        residual[term != 0] = 0
        terms.append(term)
    return terms, residual


def series_view(values, patterns, axis=-1):
    """``sum(terms)`` of `tasd_series`: the elements that a series keeps, the others zero (arguments and errors alike).

    Terms of one M equal the view of their summed N (greedy top-N of what is left), which is taken at once.
    """
    patterns = [_pattern(p) for p in patterns]
    if len({p.m for p in patterns}) == 1:
        return nm_view(values, Pattern(min(sum(p.n for p in patterns), patterns[0].m), patterns[0].m), axis)
    values = np.asarray(values)
    _, residual = tasd_series(values, patterns, axis)
    return np.where(residual != 0, np.zeros_like(values), values)


def expected_dropped(pattern, density):
    """Share of the non-zeros that an N:M view drops where each element is non-zero with chance ``density`` by itself.

    ``sum_k max(0, k - N) C(M, k) d**k (1 - d)**(M - k) / (M d)``; 0 at density 0. Pattern: (N, M), where N is the sum
    of a series of one M. Raises: ValueError for an illegal pattern or a density outside 0..1.

    >>> round(100 * expected_dropped((2, 8), 0.05), 2), round(100 * expected_dropped((4, 8), 0.5), 1)
    (1.54, 13.7)
    """
    n, m = _pattern(pattern)
    if not 0 <= density <= 1:
        raise ValueError(f"density must be in 0..1, not {density!r}")
    if density == 0:
        return 0.0
    return sum((k - n) * comb(m, k) * density ** k * (1 - density) ** (m - k) for k in range(n + 1, m + 1)) / \
        (m * density)


def pseudo_density(values, share=0.99):
    """Smallest fraction of elements, largest magnitudes first, whose magnitudes sum to ``share`` of the total.

    For tensors without zeros (arXiv 2403.07953, section 4.3; that magnitudes are summed is our reading): their sparsity
    counts as ``1 - pseudo_density``. 0 where all are zero.

    Args: values: int or float array of any shape; share: above 0, at most 1.
    Raises: TypeError, ValueError as `nm_view`; ValueError for no elements or a share out of range.

    >>> pseudo_density([8, -1, 1, 0], 0.8), pseudo_density([8, -1, 1, 0], 0.9), pseudo_density([1.0] * 4, 0.5)
    (0.25, 0.5, 0.5)
    """
    values = _checked(values)
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, not {share!r}")
    if not values.size:
        raise ValueError("values must not be empty")
    sums = np.cumsum(np.sort(_magnitude(values), axis=None)[::-1], dtype=np.float64)
    if sums[-1] == 0:
        return 0.0
    # less than one part in 1e12: the rounding of the sum must not add an element
    return (int(np.searchsorted(sums, share * sums[-1] * (1 - 1e-12))) + 1) / values.size


def fits(values, pattern, axis=-1):
    """Whether no block of ``values`` has more than N non-zeros (arguments and errors as `nm_view`)."""
    values, (n, m) = _checked(values), _pattern(pattern)
    return bool((np.count_nonzero(_blocks(values, m, axis), axis=-1) <= n).all())
