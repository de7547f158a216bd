"""Packed arrays: sparse terms, slot by slot as the hardware reads them (when asked to), and ternary coefficients.

A term N:M with values [outputs, kernel_h, kernel_w, channels] is cut into blocks of M consecutive channels (the last
one of a tap padded with zeros). Each block has N slots. Its non-zeros fill the slots in rising channel order; slots
left over hold value 0, index 0. Two arrays:

- ``slots`` int8 [outputs, kernel_h, kernel_w, blocks, N]: the values;
- ``index`` uint8 [bytes]: for each slot, in the same order, the place in its block in ceil(log2 M) bits, lowest bit
  first, the whole bit string cut into bytes from their lowest bit on and padded with zeros.

Ternary coefficients of basis layers are always packed, two bits each: see `pack_ternary`.

Every term has exactly one packed form. A weight tile (docs/numerics.md) is a choice of these slots: `lowering` only
reorders them for the columns of a configuration.

>>> from spec.config import Pattern
>>> slots, index = pack_term(np.array([[[[0, 5, 0, -3, 0, 0, 7, 0]]]], np.int8), Pattern(2, 4))
>>> slots.tolist(), index.tobytes().hex()
([[[[[5, -3], [7, 0]]]]], '2d')
>>> unpack_term(slots, index, 8, Pattern(2, 4)).tolist()
[[[[0, 5, 0, -3, 0, 0, 7, 0]]]]
"""
import math

import numpy as np

from spec.derive import ceil_div
from spec.errors import InputError


def index_bits(pattern):
    """Bits of one index."""
    return (pattern.m - 1).bit_length()


def pack_term(values, pattern):
    """(slots, index) of a term; see the module.

    Args: values: int8 [outputs, kernel_h, kernel_w, channels] that fit ``pattern``, a Pattern with N < M.
    Raises: ValueError if a block has more than N non-zeros.
    """
    blocks = ceil_div(values.shape[3], pattern.m)
    padded = np.zeros((*values.shape[:3], blocks * pattern.m), np.int8)
    padded[..., :values.shape[3]] = values
    padded = padded.reshape(*values.shape[:3], blocks, pattern.m)
    if (np.count_nonzero(padded, axis=-1) > pattern.n).any():
        raise ValueError(f"values must fit {pattern}")
    order = np.argsort(padded == 0, axis=-1, kind="stable")[..., :pattern.n]       # non-zeros first, in channel order
    slots = np.take_along_axis(padded, order, axis=-1)
    places = np.where(slots != 0, order, 0)
    bits = (places[..., None] >> np.arange(index_bits(pattern))) & 1
    return slots, np.packbits(bits.ravel().astype(np.uint8), bitorder="little")


def check_shapes(slots, index, channels, pattern, where="term"):
    """Shape [outputs, kernel_h, kernel_w, channels] of the term, from shapes alone.

    Raises: InputError unless N < M, and both arrays have the shapes that ``channels`` and ``pattern`` imply.
    """
    if pattern.n == pattern.m:
        raise InputError("must have N below M to be packed", field=f"{where}.pattern", value=str(pattern))
    if type(channels) is not int or not 1 <= channels <= 1 << 20:
        raise InputError("must be an integer in 1..1048576", field=f"{where}.channels", value=channels)
    shape = (ceil_div(channels, pattern.m), pattern.n)
    if slots.ndim != 5 or slots.shape[3:] != shape:
        raise InputError(f"must be [outputs, kernel_h, kernel_w, {shape[0]}, {shape[1]}]", field=f"{where}.slots",
                         value=slots.shape)
    count = ceil_div(math.prod(slots.shape) * index_bits(pattern), 8)
    if index.shape != (count,):
        raise InputError(f"must be [{count}]", field=f"{where}.index", value=index.shape)
    return *slots.shape[:3], channels


def unpack_term(slots, index, channels, pattern, where="term"):
    """int8 [outputs, kernel_h, kernel_w, channels] of a packed term.

    Raises: InputError for shapes (see `check_shapes`), an index at or above M or beyond the channels, slots that are
    not in rising order with the unused ones last and zero, or padding bits that are not zero.
    """
    shape = check_shapes(slots, index, channels, pattern, where)
    width = index_bits(pattern)
    bits = np.unpackbits(index, bitorder="little")
    if bits[slots.size * width:].any():
        raise InputError("must end with zero bits", field=f"{where}.index")
    places = (bits[:slots.size * width].reshape(*slots.shape, width).astype(np.int64) << np.arange(width)).sum(axis=-1)
    used = slots != 0
    first = np.arange(slots.shape[3])[:, None] * pattern.m
    if (places >= pattern.m).any() or (used & (first + places >= channels)).any():
        raise InputError(f"must be below {pattern.m} and within the {channels} channels", field=f"{where}.index")
    if (used[..., 1:] & ~used[..., :-1]).any() or (used[..., 1:] & (places[..., 1:] <= places[..., :-1])).any() or \
            (~used & (places != 0)).any():
        raise InputError("must fill the slots of a block in rising order, unused ones last and zero",
                         field=f"{where}.index")
    dense = np.zeros((*slots.shape[:4], pattern.m), np.int8)
    for n in range(pattern.n):          # an unused slot adds 0 to element 0
        at, value = places[..., n:n + 1], slots[..., n:n + 1]
        np.put_along_axis(dense, at, np.take_along_axis(dense, at, axis=-1) + value, axis=-1)
    return np.ascontiguousarray(dense.reshape(*shape[:3], -1)[..., :channels])


#: Most coefficients of one layer.
MAX_TERNARY = 1 << 26


def pack_ternary(coefficients):
    """Codes of ternary coefficients [K, C, M]: uint8 [ceil(K C M / 4)].

    Four to a byte from its lowest bits on, in the order of the array: -1, 0, 1 as two's complement of two bits (3, 0,
    1); zeros fill the last byte. Every tensor has exactly one packed form.

    >>> pack_ternary(np.array([[[1], [0], [-1], [0], [-1]]], np.int8)).tobytes().hex(" ")
    '31 03'
    """
    codes = np.zeros(ceil_div(coefficients.size, 4) * 4, np.uint8)
    codes[:coefficients.size] = coefficients.reshape(-1).view(np.uint8) & 3
    return (codes.reshape(-1, 4) << np.array([0, 2, 4, 6], np.uint8)).sum(axis=1).astype(np.uint8)


def check_ternary(codes, shape, where="coefficients"):
    """(K, C, M) of packed coefficients, from shapes alone.

    Raises: InputError unless ``shape`` is three sizes of at most 65536 and 2**26 elements that ``codes`` holds.
    """
    good = len(shape) == 3 and all(type(d) is int and 1 <= d <= 1 << 16 for d in shape)
    if not good or math.prod(shape) > MAX_TERNARY:
        raise InputError(f"must be [outputs, channels, M], at most {MAX_TERNARY} elements", field=f"{where}.shape",
                         value=shape)
    count = ceil_div(math.prod(shape), 4)
    if codes.shape != (count,):
        raise InputError(f"must be [{count}]", field=f"{where}.codes", value=codes.shape)
    return tuple(shape)


def unpack_ternary(codes, shape, where="coefficients"):
    """int8 [K, C, M] of packed coefficients.

    Raises: InputError as `check_ternary`, for the code 2, or filling bits that are not zero.
    """
    shape = check_ternary(codes, shape, where)
    total = math.prod(shape)
    values = (codes[:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(-1)
    if (values == 2).any() or values[total:].any():
        raise InputError("must hold codes 0, 1 and 3, and zeros behind the last", field=f"{where}.codes")
    return np.array([0, 1, 0, -1], np.int8)[values[:total]].reshape(shape)
