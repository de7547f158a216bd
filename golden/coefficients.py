"""Taps and ternary coefficients of the basis engine as they lie in memory: docs/basis.md, "What is loaded with a pass".

Arrays are in hardware positions: ``blocks`` outputs, ``slices`` basis kernels (or channels) of each, ``groups`` channel
groups of ``group`` positions; slice m of block b has number ``b * slices + m``. What is unused is 0.

The examples use ``tiny_basis`` (4 blocks x 2 slices x 3 multipliers, groups of 4, series) and ``tiny_maps`` (3 blocks x
2 slices x 2 multipliers, groups of 4 bytes, maps, 2 groups in a stream word); both have beats of 8 bytes.
"""
from functools import lru_cache
from itertools import combinations_with_replacement

import numpy as np

from golden._check import integers
from spec.derive import Sizes, ceil_div
from spec.isa import SERIES_TERMS


# -- stream words ------------------------------------------------------------------------------------------------------
def _check_terms(terms, config):
    group, terms = config.basis.group, [int(n) for n in terms]
    if not 1 <= len(terms) <= SERIES_TERMS:
        raise ValueError(f"terms must be 1..{SERIES_TERMS} numbers N, not {terms}")
    for n in terms:
        if n < 1 or n & (n - 1) or n > group:
            raise ValueError(f"terms must be powers of two in 1..{group}, not {terms}")
    return terms


def series_words(groups, terms, config):
    """Stream words per pixel of a series: ``sum over terms of ceil(groups / series_fetch(N))``.

    Args: groups: channel groups, at least 1; terms: the N of each term. Raises: ValueError.

    >>> from spec.config import load
    >>> series_words(5, [1, 2, 4], load("tiny_basis"))          # ceil(5 / 4) + ceil(5 / 2) + 5
    10
    """
    if groups < 1:
        raise ValueError(f"groups must be at least 1, not {groups}")
    sizes = Sizes(config)
    return sum(ceil_div(int(groups), sizes.series_fetch(n)) for n in _check_terms(terms, config))


@lru_cache(maxsize=4096)
def cheapest_series(needed, groups, config):
    """Terms N of the series with the fewest stream words that holds ``needed`` non-zeros per group; fewest terms next,
    then the least sum.

    Args: needed: 0..group; groups: channel groups. Returns: tuple, largest N first. Raises: ValueError beyond a group.

    >>> from spec.config import load
    >>> cheapest_series(3, 16, load("basis288")), cheapest_series(3, 4, load("basis288"))
    ((2, 1), (4,))
    """
    if not 0 <= needed <= config.basis.group:
        raise ValueError(f"needed must be in 0..{config.basis.group}, not {needed}")
    choices = [1 << k for k in range(config.basis.group.bit_length())]
    fitting = (terms for count in range(1, SERIES_TERMS + 1) for terms in combinations_with_replacement(choices, count)
               if sum(terms) >= needed)
    return min((tuple(sorted(t, reverse=True)) for t in fitting),
               key=lambda t: (series_words(groups, t, config), len(t), sum(t)))


def map_words(groups, config):
    """Stream words per pixel of maps: ``ceil(groups / stream_groups)``; each stays for at least one cycle.

    Args: groups: channel groups, at least 1. Raises: ValueError.

    >>> from spec.config import load
    >>> map_words(5, load("tiny_maps"))
    3
    """
    if groups < 1:
        raise ValueError(f"groups must be at least 1, not {groups}")
    return ceil_div(int(groups), config.basis.stream_groups)


# -- taps --------------------------------------------------------------------------------------------------------------
def taps_of_kernels(kernels, config):
    """Taps of kernels that differ from block to block (mode DENSE): row ``u = r * J + j``, ``s = j * q + i``.

    Args: kernels: integer [blocks, slices, R, S] in -128..127; fewer blocks or slices than there are leave the rest 0.
    Returns: int8 [R * J, blocks, slices, multipliers], ``J = ceil(S / multipliers)``.
    Raises: TypeError for floats; ValueError for shapes or values that do not fit.
    """
    b, kernels = config.basis, integers("kernels", kernels)
    if kernels.ndim != 4 or not kernels.size or kernels.shape[0] > b.blocks or kernels.shape[1] > b.slices:
        raise ValueError(f"kernels must be [up to {b.blocks} blocks, up to {b.slices} slices, R, S], not of shape "
                         f"{kernels.shape}")
    _bytes_range("kernels", kernels)
    blocks, slices, r, s = kernels.shape
    parts = ceil_div(s, b.multipliers)
    out = np.zeros((b.blocks, b.slices, r, parts * b.multipliers), np.int8)
    out[:blocks, :slices, :, :s] = kernels
    out = out.reshape(b.blocks, b.slices, r * parts, b.multipliers)
    return np.ascontiguousarray(out.transpose(2, 0, 1, 3))


def taps_of_basis(basis, config, *, blocks=None):
    """Taps of basis kernels that all blocks share (mode DECOMPOSED), rows as of `taps_of_kernels`.

    Args: basis: integer [M, R, S], M at most ``slices``; blocks: how many blocks have outputs, None for all.
    Returns: int8 [R * J, blocks, slices, multipliers]. Raises: TypeError, ValueError.

    >>> from spec.config import load
    >>> taps = taps_of_basis(np.arange(1, 6).reshape(1, 1, 5), load("tiny_basis"))
    >>> taps.shape, taps[:, 0].tolist()
    ((2, 4, 2, 3), [[[1, 2, 3], [0, 0, 0]], [[4, 5, 0], [0, 0, 0]]])
    """
    basis = integers("basis", basis)
    if basis.ndim != 3:
        raise ValueError(f"basis must be [M, R, S], not of shape {basis.shape}")
    count = config.basis.blocks if blocks is None else blocks
    return taps_of_kernels(np.broadcast_to(basis, (count, *basis.shape)), config)


def taps_of_pointwise(weights, config):
    """Taps of a 1 x 1 layer (mode POINTWISE): row g, multiplier i of slice m takes position ``m * q + i`` of group g.

    Args: weights: integer [blocks, groups, group] in -128..127; fewer blocks than there are leave the rest 0.
    Returns: int8 [groups, blocks, slices, multipliers]. Raises: TypeError, ValueError.
    """
    b, weights = config.basis, integers("weights", weights)
    if weights.ndim != 3 or not weights.size or weights.shape[0] > b.blocks or weights.shape[2] != b.group:
        raise ValueError(f"weights must be [up to {b.blocks} blocks, groups, {b.group}], not of shape {weights.shape}")
    _bytes_range("weights", weights)
    blocks, groups, _ = weights.shape
    out = np.zeros((groups, b.blocks, b.slices * b.multipliers), np.int8)
    out[:, :blocks, :b.group] = weights.transpose(1, 0, 2)
    return out.reshape(groups, b.blocks, b.slices, b.multipliers)


def _bytes_range(name, values):
    if values.min() < -128 or values.max() > 127:
        raise ValueError(f"{name} must be in -128..127")


def pack_taps(taps, config):
    """Bytes of rows of taps: multiplier i of slice n at bits ``8 * (n * q + i)`` of its row of ``tap_row_beats`` beats.

    Args: taps: integer [rows, blocks, slices, multipliers] in -128..127, 1..``tap_rows`` rows.
    Raises: TypeError for floats; ValueError for shapes and ranges.

    >>> from spec.config import load
    >>> pack_taps(np.arange(-2, 10).reshape(1, 3, 2, 2), load("tiny_maps")).hex(" ", 8)
    'feff000102030405 0607080900000000'
    """
    b, sizes, taps = config.basis, Sizes(config), integers("taps", taps)
    if taps.shape[1:] != (b.blocks, b.slices, b.multipliers) or not 1 <= len(taps) <= b.tap_rows:
        raise ValueError(f"taps must be [1..{b.tap_rows} rows, {b.blocks}, {b.slices}, {b.multipliers}], not of shape "
                         f"{taps.shape}")
    _bytes_range("taps", taps)
    out = np.zeros((len(taps), sizes.tap_row_beats * sizes.beat_bytes), np.int8)
    out[:, :b.multiplications] = taps.reshape(len(taps), -1)
    return out.tobytes()


def unpack_taps(data, config):
    """Inverse of `pack_taps`: int8 [rows, blocks, slices, multipliers].

    Args: data: bytes or uint8 array of whole rows. Raises: ValueError for another length or padding that is not 0.
    """
    b, sizes, data = config.basis, Sizes(config), np.frombuffer(data, np.uint8)
    size = sizes.tap_row_beats * sizes.beat_bytes
    if not data.size or data.size % size:
        raise ValueError(f"Taps must be whole rows of {size} bytes, not {data.size}")
    data = data.reshape(-1, size)
    if data[:, b.multiplications:].any():
        raise ValueError(f"Rows of taps must be 0 from byte {b.multiplications} on")
    return data[:, :b.multiplications].view(np.int8).reshape(-1, b.blocks, b.slices, b.multipliers).copy()


# -- coefficients ------------------------------------------------------------------------------------------------------
def _ternary(coefficients, config):
    b, ce = config.basis, integers("coefficients", coefficients)
    if ce.ndim != 4 or ce.shape != (b.blocks, b.slices, ce.shape[2], b.group) or not ce.size:
        raise ValueError(f"coefficients must be [{b.blocks}, {b.slices}, groups, {b.group}], not of shape {ce.shape}")
    if ce.min() < -1 or ce.max() > 1:
        raise ValueError("coefficients must be -1, 0 or 1")
    return ce.astype(np.int8, copy=False)


def _require_variant(config, variant):
    if config.basis.coefficients != variant:
        raise ValueError(f"config must have {variant} coefficients, not {config.basis.coefficients}")


def pack_series(coefficients, config, terms):
    """Bytes of a series of coefficients: for each term, for each of its stream words, one tile of lane codes.

    Terms and lanes are filled in order: of each group's non-zeros by rising channel, the first ``terms[0]`` go to term
    0, the next ``terms[1]`` to term 1, and so on.

    Args: coefficients: integer [blocks, slices, groups, group], values -1, 0, 1; terms: the N of each term.
    Returns: ``series_words * series_tile_beats`` beats.
    Raises: TypeError for floats; ValueError for shapes, ranges, terms, a group with more than ``sum(terms)`` non-zeros,
        more than ``coefficient_rows`` tiles, or a config with maps.

    One slice's code is 4 bits: place, non-zero, negative. Slice 0 has +1 at channel 1 and -1 at channel 2:

    >>> from spec.config import load
    >>> ce = np.zeros((4, 2, 1, 4), np.int8)
    >>> ce[0, 0, 0, [1, 2]] = 1, -1
    >>> pack_series(ce, load("tiny_basis"), [2]).hex(" ", 8)
    'e500000000000000 0000000000000000'
    >>> pack_series(ce, load("tiny_basis"), [1, 1]).hex(" ", 8)
    '0500000000000000 0000000000000000 0e00000000000000 0000000000000000'
    """
    _require_variant(config, "series")
    b, sizes, terms, ce = config.basis, Sizes(config), _check_terms(terms, config), _ternary(coefficients, config)
    groups, place_bits = ce.shape[2], b.group.bit_length() - 1
    words = series_words(groups, terms, config)
    if words > b.coefficient_rows:
        raise ValueError(f"coefficients must fit {b.coefficient_rows} tiles, not {words}")
    rows = ce.reshape(sizes.basis_slices, groups, b.group)
    some = rows != 0
    count = np.count_nonzero(some, axis=2)
    if count.max() > sum(terms):
        n, g = np.argwhere(count > sum(terms))[0]
        raise ValueError(f"coefficients must have at most {sum(terms)} non-zeros in a group, not {count[n, g]} as in "
                         f"slice {n}, group {g}")
    slot = np.cumsum(some, axis=2, dtype=np.int16) - 1                   # among the lanes of all terms
    slice_, group, place = np.nonzero(some)
    slot = slot[some]
    negative = (rows[some] < 0).astype(np.uint8)
    codes = np.zeros((sizes.basis_slices, groups, sum(terms)), np.uint8)
    codes[slice_, group, slot] = place.astype(np.uint8) | 1 << place_bits | negative << place_bits + 1
    parts, at = [], 0
    for n in terms:
        fetch, used = sizes.series_fetch(n), sizes.series_fetch(n) * n
        tiles = ceil_div(groups, fetch)
        part = np.zeros((sizes.basis_slices, tiles * fetch, n), np.uint8)
        part[:, :groups] = codes[:, :, at:at + n]
        lanes = np.zeros((tiles, sizes.basis_slices, b.lanes), np.uint8)
        lanes[:, :, :used] = part.reshape(sizes.basis_slices, tiles, used).swapaxes(0, 1)
        parts.append(lanes)
        at += n
    lanes = np.concatenate(parts).reshape(words, -1, 1)
    bits = lanes >> np.arange(sizes.lane_code_bits, dtype=np.uint8) & 1
    data = np.packbits(bits.reshape(words, -1), axis=1, bitorder="little")
    out = np.zeros((words, sizes.series_tile_beats * sizes.beat_bytes), np.uint8)
    out[:, :data.shape[1]] = data
    return out.tobytes()


def unpack_series(data, config, terms, groups):
    """Inverse of `pack_series`, whatever the order of terms and lanes: int8 [blocks, slices, groups, group].

    Args: data: bytes or uint8 array; terms: the N of each term; groups: channel groups.
    Raises: ValueError for another length, a lane that belongs to no group and has a code, a code without its non-zero
        bit, two lanes with the same channel, padding that is not 0, or a config with maps.
    """
    _require_variant(config, "series")
    b, sizes, terms, data = config.basis, Sizes(config), _check_terms(terms, config), np.frombuffer(data, np.uint8)
    words, size, place_bits = series_words(groups, terms, config), sizes.series_tile_beats * sizes.beat_bytes, \
        b.group.bit_length() - 1
    if data.size != words * size:
        raise ValueError(f"Coefficients must be {words} tiles of {size} bytes, not {data.size} bytes")
    bits = np.unpackbits(data.reshape(words, size), axis=1, bitorder="little")
    count = sizes.basis_slices * b.lanes * sizes.lane_code_bits
    if bits[:, count:].any():
        raise ValueError(f"Tiles of coefficients must be 0 from bit {count} on")
    bits = bits[:, :count].reshape(words, sizes.basis_slices, b.lanes, sizes.lane_code_bits)
    codes = (bits << np.arange(sizes.lane_code_bits, dtype=np.uint8)).sum(axis=3, dtype=np.uint8)
    out, times = (np.zeros((sizes.basis_slices, groups, b.group), np.int8) for _ in range(2))
    first, lane = 0, np.arange(b.lanes)
    for n in terms:
        fetch = sizes.series_fetch(n)
        tiles = ceil_div(groups, fetch)
        word, slice_, at = np.nonzero(codes[first:first + tiles])
        code = codes[first:first + tiles][word, slice_, at]
        group = word * fetch + at // n
        lost = (lane[at] // n >= fetch) | (group >= groups)
        if lost.any():
            i = np.argmax(lost)
            raise ValueError(f"Lane {at[i]} of slice {slice_[i]} in tile {first + word[i]} must have the code 0: it "
                             "belongs to no group")
        if not (code >> place_bits & 1).all():
            i = np.argmin(code >> place_bits & 1)
            raise ValueError(f"Lane {at[i]} of slice {slice_[i]} in tile {first + word[i]} must have the code 0: its "
                             "non-zero bit is 0")
        where = slice_, group, code & b.group - 1
        np.add.at(times, where, 1)
        out[where] = np.where(code >> place_bits + 1, -1, 1)
        first += tiles
    if times.max() > 1:
        n, g, c = np.argwhere(times > 1)[0]
        raise ValueError(f"Channel {c} of group {g} must occur once in slice {n}, not {times[n, g, c]} times")
    return out.reshape(b.blocks, b.slices, groups, b.group)


def _check_map_groups(groups, config):
    limit = Sizes(config).coefficient_groups
    if not 1 <= groups <= limit:
        raise ValueError(f"groups must be in 1..{limit}, not {groups}")


def pack_maps(coefficients, config):
    """Bytes of two-level maps: the table of segment lengths in words, then all blocks' segments of ``group``-bit words,
    one directly behind the other, with zeros behind the last up to the end of its beat.

    Args: coefficients: integer [blocks, slices, groups, group], values -1, 0, 1.
    Returns: whole beats; their number is the field ``coefficients``.
    Raises: TypeError for floats; ValueError for shapes, ranges, more than ``coefficient_groups`` groups, or a config
        with series.

    Words are 4 bits. Block 0 has +1 at channel 1 of group 0 in slice 0 and -1 at channels 0 and 3 of group 1 in slice
    1: level 1 0b0001, map 0b0010, signs 0b0110 of all three, level 1 0b0010, map 0b1001. Blocks 1 and 2 have two empty
    level-1 words each, in the same beat.

    >>> from spec.config import load
    >>> ce = np.zeros((3, 2, 2, 4), np.int8)
    >>> ce[0, 0, 0, 1], ce[0, 1, 1, 0], ce[0, 1, 1, 3] = 1, -1, -1
    >>> pack_maps(ce, load("tiny_maps")).hex(" ", 8)
    '0500020002000000 2126090000000000'
    """
    _require_variant(config, "maps")
    b, sizes, ce = config.basis, Sizes(config), _ternary(coefficients, config)
    groups, width = ce.shape[2], b.group
    _check_map_groups(groups, config)
    runs = ceil_div(groups, width)
    weight = 1 << np.arange(width, dtype=np.int64)
    some = np.zeros((b.blocks, b.slices, runs * width, width), bool)
    some[:, :, :groups] = ce != 0
    maps = (some @ weight).reshape(b.blocks, b.slices, runs, width)
    # Items of a block in their order: each run's level-1 word, then its groups; behind each perhaps a sign word.
    value = np.concatenate([((maps != 0) @ weight)[..., None], maps], axis=3).reshape(b.blocks, -1)
    there = np.concatenate([np.ones((*maps.shape[:3], 1), bool), maps != 0], axis=3).reshape(b.blocks, -1)
    held = np.count_nonzero(some, axis=3).reshape(maps.shape)
    read = np.concatenate([np.zeros((*maps.shape[:3], 1), np.int64), held], axis=3).reshape(b.blocks, -1).cumsum(axis=1)
    needed = -(-read // width)                                           # sign words up to here
    before = np.concatenate([np.zeros((b.blocks, 1), np.int64), needed[:, :-1]], axis=1)
    signs = np.zeros((b.blocks, int(needed.max()) + 1, width), bool)
    flat = (ce != 0).reshape(b.blocks, -1)
    block = np.nonzero(flat)[0]
    order = (np.cumsum(flat, axis=1) - 1)[flat]
    signs[block, order // width, order % width] = ce.reshape(b.blocks, -1)[flat] < 0
    sign_words = np.take_along_axis(signs @ weight, before, axis=1)
    words, mask = np.stack([value, sign_words], axis=2), np.stack([there, needed > before], axis=2)
    # 16 bits are enough: the 255 groups that a pass has at most are under 600 words of each slice.
    lengths, words = np.count_nonzero(mask, axis=(1, 2)), words[mask]
    padded = np.zeros(ceil_div(len(words) * width, 8 * sizes.beat_bytes) * sizes.beat_bytes * 8 // width, np.int64)
    padded[:len(words)] = words
    table = lengths.astype("<u2").tobytes().ljust(sizes.segment_table_beats * sizes.beat_bytes, b"\0")
    return table + _words_to_bytes(padded, width)


def _words_to_bytes(words, width):
    """``width``-bit words (4, 8 or 16), the first in the lowest bits, an even number of 4-bit ones."""
    if width == 4:
        return (words[::2] | words[1::2] << 4).astype(np.uint8).tobytes()
    return words.astype(f"<u{width // 8}").tobytes()


def _bytes_to_words(data, width):
    """Inverse of `_words_to_bytes`: a list of ints."""
    if width == 4:
        return np.stack([data & 15, data >> 4], axis=1).ravel().tolist()
    return np.frombuffer(data.tobytes(), f"<u{width // 8}").tolist()


def unpack_maps(data, config, groups):
    """Inverse of `pack_maps`: int8 [blocks, slices, groups, group].

    Args: data: bytes or uint8 array, whole beats; groups: channel groups.
    Raises: ValueError for groups out of range, data that are no whole beats, segment lengths that do not add up to the
        data or are not those of their words, a level-1 bit beyond the groups, an empty map, a sign that belongs to no
        non-zero or padding that is not 0, or a config with series.
    """
    _require_variant(config, "maps")
    b, sizes, data = config.basis, Sizes(config), np.frombuffer(data, np.uint8)
    _check_map_groups(groups, config)
    beat, width, first = sizes.beat_bytes, b.group, sizes.segment_table_beats
    if data.size % beat or data.size < first * beat:
        raise ValueError(f"Coefficients must be at least {first} whole beats of {beat} bytes, not {data.size} bytes")
    table = data[:first * beat].view("<u2")
    lengths = table[:b.blocks].tolist()
    if table[b.blocks:].any():
        raise ValueError(f"The segment table must be 0 behind its {b.blocks} lengths")
    if min(lengths) < 1 or ceil_div(sum(lengths) * width, 8 * beat) != data.size // beat - first:
        raise ValueError(f"Segments of {lengths} words must each have at least 1 and fill {data.size // beat - first} "
                         "beats")
    words = _bytes_to_words(data[first * beat:], width)
    if any(words[sum(lengths):]):
        raise ValueError("What lies behind the last segment must be 0")
    maps, flags, at = [], [], 0                                           # flags: the sign words of each block
    for block, length in enumerate(lengths):
        segment = words[at:at + length]
        at += length
        try:
            found, signs = _read_segment(segment, b.slices, groups, width)
        except IndexError:
            raise ValueError(f"Segment {block} must hold its {b.slices} slices, but ends after {length} words") \
                from None
        except ValueError as error:
            raise ValueError(f"Segment {block}: {error}") from None
        maps += found
        flags.append(signs)
    maps = np.array(maps, np.int64).reshape(-1, 1)
    some = (maps >> np.arange(width) & 1).astype(bool)                   # [blocks * slices * groups, group]
    signs = np.zeros(some.shape, np.int8)
    signs[some] = _signs(flags, np.count_nonzero(some.reshape(b.blocks, -1), axis=1), width)
    return signs.reshape(b.blocks, b.slices, groups, width)


def _read_segment(words, slices, groups, width):
    """(level-2 maps of all groups of all slices, sign words) of one segment. Raises IndexError if it ends early."""
    maps, signs, at, left = [], [], 0, 0
    for m in range(slices):
        for start in range(0, groups, width):
            level1, here = words[at], min(width, groups - start)
            at += 1
            if level1 >> here:
                raise ValueError(f"slice {m} must have no level-1 bit at or beyond group {groups}")
            for g in range(here):
                if not level1 >> g & 1:
                    maps.append(0)
                    continue
                level2 = words[at]
                at += 1
                if not level2:
                    raise ValueError(f"slice {m} must have a non-zero in group {start + g}, which level 1 names")
                maps.append(level2)
                count = level2.bit_count()
                if left < count:
                    signs.append(words[at])
                    at += 1
                    left += width
                left -= count
    if signs and signs[-1] >> width - left:
        raise ValueError("signs behind the last non-zero must be 0")
    if at != len(words):
        raise ValueError(f"its slices must take all of its {len(words)} words, not {at}")
    return maps, signs


def _signs(flags, counts, width):
    """1 or -1 for the non-zeros of all blocks: ``flags`` holds each block's sign words, ``counts`` its non-zeros."""
    out = []
    for words, count in zip(flags, counts.tolist()):
        bits = (np.array(words, np.int64)[:, None] >> np.arange(width) & 1).ravel()[:count]
        out.append(np.where(bits, -1, 1))
    return np.concatenate(out).astype(np.int8)
