"""Argument checks that the golden operations share."""
import numpy as np


def integers(name, array):
    """``array`` as a NumPy integer array (not widened). Raises TypeError for floats, bools and objects."""
    array = np.asarray(array)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name} must be an integer array, not {array.dtype}")
    return array


def tuple_of(name, value, count, *, least):
    """``value`` as a tuple of ``count`` ints, each at least ``least``. Raises ValueError."""
    try:
        out = tuple(int(v) for v in value)
    except TypeError:
        raise ValueError(f"{name} must be {count} integers, not {value!r}") from None
    if len(out) != count or any(o != v for o, v in zip(out, value)) or min(out) < least:
        raise ValueError(f"{name} must be {count} integers of at least {least}, not {value!r}")
    return out


def image(name, array):
    """``array`` as an integer [N, H, W, C] array. Raises TypeError, ValueError."""
    array = integers(name, array)
    if array.ndim != 4:
        raise ValueError(f"{name} must be [N, H, W, C], not of shape {array.shape}")
    return array
