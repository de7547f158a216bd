"""golden.tiles: literal bytes, an independent bit-by-bit writer, and errors. All doctests of golden run here."""
import doctest
import importlib
import pkgutil

import numpy as np
import pytest

import golden
from golden.structured import nm_view
from golden.tiles import dense_indices, fill_slots, pack_tile, spread, unpack_tile, unpack_tiles
from spec.config import Config, load
from spec.derive import Sizes

TINY = load("tiny")
KINDS = [(c, p.n) for c in ("tiny", "nm64", "nm256", "nm1024") for p in load(c).structured.patterns]


@pytest.mark.parametrize("module", [m.name for m in pkgutil.iter_modules(golden.__path__)])
def test_doctests(module):
    assert doctest.testmod(importlib.import_module(f"golden.{module}"), raise_on_error=False).failed == 0


def slow_pack(values, indices, config, n):
    """One integer, bit by bit, as docs/numerics.md says it."""
    s, z = config.structured, Sizes(config)
    part = 8 * z.value_beats * z.beat_bytes
    word = 0
    for slot in range(s.slots):
        for c in range(s.columns):
            word |= (int(values[slot, c]) & 255) << 8 * (slot * s.columns + c)
            if n < s.block:
                word |= int(indices[slot, c]) << part + z.index_bits * (slot * s.columns + c)
    return word.to_bytes(z.tile_beats(n) * z.beat_bytes, "little")


@pytest.mark.parametrize("name, n", KINDS)
def test_bytes_equal_a_bit_by_bit_writer_and_come_back(rng, name, n):
    config = load(name)
    s = config.structured
    values = rng.integers(-128, 128, (s.slots, s.columns))
    indices = dense_indices(config) if n == s.block else rng.integers(0, s.block, values.shape)
    data = pack_tile(values, indices, config, n)
    assert data == slow_pack(values, indices, config, n)
    got = unpack_tile(data, config, n)
    assert np.array_equal(got[0], values) and np.array_equal(got[1], indices)
    many = unpack_tiles(data * 3, config, n)
    assert many[0].shape == (3, s.slots, s.columns) and np.array_equal(many[1][2], indices)


@pytest.mark.parametrize("name, n", KINDS)
def test_slots_multiply_like_the_weights_they_were_filled_from(rng, name, n):
    config = load(name)
    s, blocks = config.structured, Sizes(config).fetch_blocks(n)
    weights = nm_view(rng.integers(-3, 4, (blocks * s.block, s.columns)), (n, s.block), axis=0)
    values, indices = fill_slots(weights, config, n)
    x = rng.integers(-128, 128, blocks * s.block)
    slow = [sum(int(values[slot, c]) * int(x[slot // n * s.block + indices[slot, c]]) for slot in range(n * blocks))
            for c in range(s.columns)]
    assert slow == (x @ weights).tolist()
    assert np.array_equal(spread(values[None], indices[None], config, n)[0], weights)
    if n < s.block:                                              # rising order; what is left over is (0, 0)
        assert not indices[values == 0].any()
        kept = np.where(values != 0, indices, 99)[:n * blocks].reshape(blocks, n, -1)
        assert (np.diff(kept, axis=1) >= 0).all()


def narrow(**structured):
    tree = TINY.to_dict()
    tree["structured"] |= structured
    return Config.from_dict(tree)


def test_narrow_weights_are_sign_extended_low_bits():
    config = narrow(weight_bits=3)
    values, _ = unpack_tile(bytes([4, 3, 0xF9, 8] * 4), config, 4)
    assert values[0].tolist() == [-4, 3, 1, 0]
    with pytest.raises(ValueError, match="values must be in -4..3"):
        pack_tile(np.full((4, 4), 4), None, config, 4)


def test_errors():
    zeros = np.zeros((4, 4), int)
    for text, call in {
        "n must be the N": lambda: pack_tile(zeros, zeros, TINY, 3),
        r"values must be \[4, 4\]": lambda: pack_tile(zeros[:3], zeros, TINY, 2),
        "values must be in -128..127": lambda: pack_tile(zeros + 128, zeros, TINY, 2),
        r"indices must be \[4, 4\]": lambda: pack_tile(zeros, zeros[0], TINY, 2),
        "indices must be in 0..3": lambda: pack_tile(zeros, zeros + 4, TINY, 2),
        "indices of a dense tile": lambda: pack_tile(zeros, zeros, TINY, 4),
        "values of slots from 2 on": lambda: pack_tile(zeros + 1, zeros, narrow(stream_blocks=2), 1),
        "Slots from 2 on must hold 0": lambda: spread(zeros[None] + 1, zeros[None], narrow(stream_blocks=2), 1),
        "must be multiples of 24 bytes, not 16": lambda: unpack_tile(bytes(16), TINY, 2),
        "must be multiples of 16 bytes, not 0": lambda: unpack_tile(b"", TINY, 4),
        "must be one tile, not 2": lambda: unpack_tile(bytes(32), TINY, 4),
        r"weights must be \[8, 4\]": lambda: fill_slots(zeros, TINY, 2),
        "at most 2 non-zeros": lambda: fill_slots(np.ones((8, 4), int), TINY, 2),
    }.items():
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(TypeError, match="values must be an integer array"):
        pack_tile(zeros * 0.5, zeros, TINY, 2)
