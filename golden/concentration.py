"""Cycles of the maps variant's lanes: docs/basis.md, "Concentration (maps)".

A slice adds up the *matches* of a stream word (coefficient not 0 and activation not equal to the zero point), with one
lane for each channel position. In every cycle each lane takes a match of its own column if there is one; then, in
rounds ``d = 1 .. look_aside``, each lane that has nothing yet takes one of column ``(l + d) mod lanes`` if one is left.
How many matches a column has is all that matters for the cycles, as a cycle takes from it a count that does not depend
on their channel groups.
"""
import numpy as np

from golden._check import integers

#: Counts that are worked on at once: small enough for a core's cache.
_CHUNK = 1 << 16


def _matches(matches):
    matches = np.asarray(matches)
    if matches.dtype != bool or matches.ndim < 2:
        raise ValueError(f"matches must be a bool array [..., stream_groups, lanes], not {matches.dtype} of shape "
                         f"{matches.shape}")
    return matches


def _cycles(columns, look_aside):
    """Cycles until all columns are empty: ``columns`` uint8 [lanes, N], changed in place; uint8 [N]."""
    lanes, total = columns.shape
    cycles = np.zeros(total, np.uint8)
    left = np.arange(total)
    while True:
        pending = columns > 0
        busy = pending.any(axis=0)
        if not busy.all():
            columns, left = columns[:, busy], left[busy]
            if not left.size:
                return cycles
            pending = pending[:, busy]
        cycles[left] += 1
        free, taken = ~pending, pending.astype(np.uint8)
        for d in range(1, look_aside + 1):
            # Lane l sees column l + d, which begins with lane d.
            rest = columns > taken
            take = np.concatenate([rest[d % lanes:], rest[:d % lanes]])
            take &= free
            free ^= take
            taken[d % lanes:] += take[:lanes - d % lanes]
            taken[:d % lanes] += take[lanes - d % lanes:]
        columns -= taken


def word_cycles(matches, *, look_aside):
    """Cycles that each slice needs for its matches of one stream word; 0 without matches.

    Args: matches: bool [..., stream_groups, lanes]; look_aside: neighbour lanes, at least 0.
    Returns: int64 [...]. Raises: ValueError.

    >>> matches = np.zeros((4, 4), bool)
    >>> matches[:, 1] = True                                     # four matches at channel position 1
    >>> [int(word_cycles(matches, look_aside=n)) for n in (0, 1, 3)]
    [4, 2, 1]
    """
    matches = _matches(matches)
    return _column_cycles(np.count_nonzero(matches, axis=-2), look_aside)


def _column_cycles(columns, look_aside):
    """`word_cycles` of the numbers of matches in each column, [..., lanes]."""
    if isinstance(look_aside, bool) or not isinstance(look_aside, (int, np.integer)) or look_aside < 0:
        raise ValueError(f"look_aside must be an integer of at least 0, not {look_aside!r}")
    shape, lanes = columns.shape[:-1], columns.shape[-1]
    columns = columns.reshape(-1, lanes)
    out = np.zeros(len(columns), np.int64)
    step = max(1, _CHUNK // lanes)
    for at in range(0, len(columns), step):
        part = np.ascontiguousarray(columns[at:at + step].T.astype(np.uint8))
        out[at:at + step] = _cycles(part, int(look_aside))
    return out.reshape(shape)


def full_compaction_cycles(matches, lanes):
    """What lanes that may take any match of the word would need: ``max(1, ceil(matches / lanes))``.

    No rule for the same lanes needs fewer cycles; a bound for software, the hardware has no such lanes.

    Args: matches: bool [..., stream_groups, lanes]; lanes: lanes of a slice. Returns: int64 [...]. Raises: ValueError.

    >>> int(full_compaction_cycles(np.ones((2, 4), bool), 4))
    2
    """
    if lanes < 1:
        raise ValueError(f"lanes must be at least 1, not {lanes}")
    return np.maximum(1, -(-np.count_nonzero(_matches(matches), axis=(-2, -1)) // lanes))


def pixel_word_cycles(active, coefficients, *, stream_groups, look_aside):
    """Cycles of each stream word of each pixel: ``max(1, most cycles of any slice)``.

    Args:
        active: bool [pixels, groups, group], activation not equal to the zero point.
        coefficients: integer [blocks, slices, groups, group], not 0 where a slice takes part.
        stream_groups: channel groups in a word; look_aside: neighbour lanes.
    Returns: int64 [pixels, ceil(groups / stream_groups)]. Raises: TypeError for coefficients that are no integers;
        ValueError for shapes.

    Only slice 0 has coefficients, all of them; the second pixel has half of the activations:

    >>> active = np.array([[1, 1, 1, 1], [1, 0, 1, 0]], bool)[:, None, :].repeat(6, axis=1)
    >>> ce = np.stack([np.ones((1, 6, 4), int), np.zeros((1, 6, 4), int)])
    >>> pixel_word_cycles(active, ce, stream_groups=4, look_aside=1).tolist()
    [[4, 2], [2, 1]]
    """
    active, ce = np.asarray(active), integers("coefficients", coefficients)
    if active.dtype != bool or active.ndim != 3 or ce.ndim != 4 or ce.shape[2:] != active.shape[1:]:
        raise ValueError("active and coefficients must be bool [pixels, groups, group] and [blocks, slices, groups, "
                         f"group], not {active.dtype} {active.shape} and {ce.shape}")
    if stream_groups < 1:
        raise ValueError(f"stream_groups must be at least 1, not {stream_groups}")
    pixels, groups, lanes = active.shape
    rows = (ce != 0).reshape(-1, groups, lanes)
    rows = rows[rows.any(axis=(1, 2))]                            # slices that never work cost no cycle
    words = -(-groups // stream_groups)
    out = np.ones((pixels, words), np.int64)
    if not len(rows):
        return out
    at_once = max(1, _CHUNK // (len(rows) * lanes))
    for word in range(words):
        of_word = slice(word * stream_groups, (word + 1) * stream_groups)
        # Matches per column: a product over the word's groups for each lane, exact in float32.
        weight = np.ascontiguousarray(rows[:, of_word].transpose(2, 1, 0)).astype(np.float32)   # [lane, group, slice]
        operand = np.ascontiguousarray(active[:, of_word].transpose(2, 0, 1)).astype(np.float32)
        for at in range(0, pixels, at_once):
            count = np.matmul(operand[:, at:at + at_once], weight)                              # [lane, pixel, slice]
            cycles = _cycles(count.astype(np.uint8).reshape(lanes, -1), look_aside).reshape(-1, len(rows))
            out[at:at + at_once, word] = np.maximum(cycles.max(axis=1), 1)
    return out
