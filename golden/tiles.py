"""Weight tiles as they lie in memory: docs/numerics.md, "Weight tiles".

The examples use the preset ``tiny``: 4 columns, 4 slots, block 4, beats of 8 bytes. A dense tile is 2 beats of values;
a sparse one has a third beat: 16 indices of 2 bits in 4 bytes, and 4 bytes of padding.
"""
import numpy as np

from golden._check import integers
from spec.derive import Sizes


def _check_n(config, n):
    if n not in [p.n for p in config.structured.patterns]:
        known = [str(p) for p in config.structured.patterns]
        raise ValueError(f"n must be the N of a supported pattern {known}, not {n!r}")


def dense_indices(config):
    """Indices that a dense tile stands for: slot mod block, [slots, columns] uint8."""
    s = config.structured
    return np.broadcast_to((np.arange(s.slots) % s.block).astype(np.uint8)[:, None], (s.slots, s.columns)).copy()


def pack_tile(values, indices, config, n):
    """Bytes of one weight tile of pattern ``n``:block; ``tile_beats(n)`` beats.

    Values first, element (s, c) at bit ``8 * (s * columns + c)``; then, unless dense, indices, element (s, c) at bit
    ``log2(block) * (s * columns + c)``; both parts padded with zeros to whole beats.

    Args:
        values: integers [slots, columns] in the weight format; 0 in slots whose block position ``s // n`` the fetch
            does not reach. indices: integers [slots, columns], 0..block-1; for a dense tile None or `dense_indices`.
        n: N of one of the config's patterns.
    Raises: TypeError for floats; ValueError for shapes, ranges, an unsupported n, or a value beyond the fetch.

    >>> from spec.config import load
    >>> tiny, values = load("tiny"), np.arange(16).reshape(4, 4) - 2
    >>> pack_tile(values, None, tiny, 4).hex(" ", 8)
    'feff000102030405 060708090a0b0c0d'
    >>> pack_tile(values, [[0, 1, 2, 3], [3, 2, 1, 0], [0, 0, 0, 1], [2, 0, 0, 0]], tiny, 2).hex(" ", 8)
    'feff000102030405 060708090a0b0c0d e41b400200000000'
    """
    s, sizes = config.structured, Sizes(config)
    _check_n(config, n)
    values = integers("values", values).astype(np.int64)
    if values.shape != (s.slots, s.columns):
        raise ValueError(f"values must be [{s.slots}, {s.columns}], not of shape {values.shape}")
    if values.min() < sizes.weight.lo or values.max() > sizes.weight.hi:
        raise ValueError(f"values must be in {sizes.weight.lo}..{sizes.weight.hi}")
    if values[n * sizes.fetch_blocks(n):].any():
        raise ValueError(f"values of slots from {n * sizes.fetch_blocks(n)} on must be 0: the fetch ends there")
    part = values.astype(np.int8).tobytes()
    data = part.ljust(sizes.value_beats * sizes.beat_bytes, b"\0")
    if n == s.block:
        if indices is not None and not np.array_equal(indices, dense_indices(config)):
            raise ValueError("indices of a dense tile must be None or slot mod block")
        return data
    indices = integers("indices", indices)
    if indices.shape != values.shape:
        raise ValueError(f"indices must be [{s.slots}, {s.columns}], not of shape {indices.shape}")
    if indices.min() < 0 or indices.max() >= s.block:
        raise ValueError(f"indices must be in 0..{s.block - 1}")
    bits = indices.reshape(-1, 1) >> np.arange(sizes.index_bits) & 1
    part = np.packbits(bits.astype(np.uint8).ravel(), bitorder="little").tobytes()
    return data + part.ljust(sizes.index_beats * sizes.beat_bytes, b"\0")


def unpack_tiles(data, config, n):
    """Values and indices of consecutive tiles of one pattern.

    Args: data: bytes or uint8 array, a multiple of ``tile_beats(n)`` beats.
    Returns: (int8 [tiles, slots, columns], uint8 [tiles, slots, columns]). Weights narrower than a byte are its low
    bits, sign-extended. Raises: ValueError for an unsupported n or another length.
    """
    s, sizes = config.structured, Sizes(config)
    _check_n(config, n)
    data = np.frombuffer(data, np.uint8)
    size, count = sizes.tile_beats(n) * sizes.beat_bytes, s.multipliers
    if not data.size or data.size % size:
        raise ValueError(f"Tiles of {n}:{s.block} must be multiples of {size} bytes, not {data.size}")
    data = data.reshape(-1, size)
    spare = np.int8(8 - sizes.weight.bits)
    values = (data[:, :count].view(np.int8) << spare >> spare).reshape(-1, s.slots, s.columns)
    if n == s.block:
        return values, np.broadcast_to(dense_indices(config), values.shape).copy()
    part = data[:, sizes.value_beats * sizes.beat_bytes:]
    bits = np.unpackbits(part, axis=1, bitorder="little")[:, :count * sizes.index_bits]
    bits = bits.reshape(-1, count, sizes.index_bits)
    indices = (bits << np.arange(sizes.index_bits, dtype=np.uint8)).sum(axis=2, dtype=np.uint8)
    return values, indices.reshape(values.shape)


def unpack_tile(data, config, n):
    """Inverse of `pack_tile`: (int8 [slots, columns], uint8 [slots, columns]).

    >>> from spec.config import load
    >>> data = bytes.fromhex("feff000102030405 060708090a0b0c0d e41b400200000000")
    >>> values, indices = unpack_tile(data, load("tiny"), 2)
    >>> values[0].tolist(), indices.tolist()
    ([-2, -1, 0, 1], [[0, 1, 2, 3], [3, 2, 1, 0], [0, 0, 0, 1], [2, 0, 0, 0]])
    """
    values, indices = unpack_tiles(data, config, n)
    if len(values) != 1:
        raise ValueError(f"Data must be one tile, not {len(values)}")
    return values[0], indices[0]


def fill_slots(weights, config, n):
    """Values and indices of the tile that multiplies a fetch by ``weights``: inverse of `spread`.

    Args: weights: integers [fetch_blocks(n) * block, columns] with at most n non-zeros in each block of a column.
    Returns: (values, indices), int64 [slots, columns]: non-zeros in rising index order, then value 0, index 0 (dense:
    index slot mod block). Raises: TypeError for floats; ValueError for other shapes or a block with more non-zeros.
    """
    s, sizes = config.structured, Sizes(config)
    _check_n(config, n)
    weights, blocks = integers("weights", weights).astype(np.int64), sizes.fetch_blocks(n)
    if weights.shape != (blocks * s.block, s.columns):
        raise ValueError(f"weights must be [{blocks * s.block}, {s.columns}], not of shape {weights.shape}")
    values = np.zeros((s.slots, s.columns), np.int64)
    if n == s.block:
        values[:len(weights)] = weights
        return values, dense_indices(config).astype(np.int64)
    cut = weights.reshape(blocks, s.block, s.columns)
    if (np.count_nonzero(cut, axis=1) > n).any():
        raise ValueError(f"weights must have at most {n} non-zeros in each block of a column")
    order = np.argsort(cut == 0, axis=1, kind="stable")[:, :n]
    kept = np.take_along_axis(cut, order, axis=1)
    values[:blocks * n] = kept.reshape(-1, s.columns)
    indices = np.zeros_like(values)
    indices[:blocks * n] = np.where(kept != 0, order, 0).reshape(-1, s.columns)
    return values, indices


def spread(values, indices, config, n):
    """Tiles as matrices: ``out[t, (s // n) * block + indices[t, s, c], c] += values[t, s, c]``.

    Args: values, indices: [tiles, slots, columns]. Returns: float32 [tiles, fetch_blocks(n) * block, columns], exact.
    Raises: ValueError if a slot beyond the fetch holds a non-zero value.
    """
    s, blocks = config.structured, Sizes(config).fetch_blocks(n)
    if values[:, n * blocks:].any():
        raise ValueError(f"Slots from {n * blocks} on must hold 0: the fetch does not reach them")
    out = np.zeros((len(values), blocks * s.block, s.columns), np.float32)
    tile, column = np.arange(len(values))[:, None], np.arange(s.columns)[None]
    for slot in range(min(s.slots, n * blocks)):                 # one slot at a time: no target occurs twice
        out[tile, slot // n * s.block + indices[:, slot], column] += values[:, slot]
    return out
