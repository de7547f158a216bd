"""golden.coefficients: bytes against bit-by-bit writers written from docs/basis.md, round trips, and every error."""
from dataclasses import replace
import time

import numpy as np
import pytest

from golden.coefficients import (cheapest_series, map_words, pack_maps, pack_series, pack_taps, series_words,
                                 taps_of_basis, taps_of_kernels, taps_of_pointwise, unpack_maps, unpack_series,
                                 unpack_taps)
from spec.config import load
from spec.derive import Sizes

SERIES, MAPS = load("tiny_basis"), load("tiny_maps")
#: All places and widths of map words: groups of 4, 8 and 16.
EIGHT = replace(load("maps288"), basis=replace(load("maps288").basis, group=8, lanes=8, blocks=5, stream_groups=4))
MAP_CONFIGS = {"tiny_maps": MAPS, "maps288": load("maps288"), "eight": EIGHT}
SERIES_CONFIGS = {name: load(name) for name in ("tiny_basis", "basis288", "basis252", "full")}


def ternary(rng, config, groups, density, signs=(-1, 1)):
    """Random coefficients [blocks, slices, groups, group]."""
    b = config.basis
    shape = (b.blocks, b.slices, groups, b.group)
    return (rng.choice(signs, shape) * (rng.random(shape) < density)).astype(np.int8)


def at_most(coefficients, count):
    """The first ``count`` non-zeros of each group."""
    return coefficients * (np.cumsum(coefficients != 0, axis=3) <= count)


class Bits:
    """Writes bits into one integer."""

    def __init__(self):
        self.word, self.at = 0, 0

    def put(self, value, width):
        assert 0 <= value < 1 << width
        self.word |= value << self.at
        self.at += width

    def bytes(self, beat):
        """Padded with zeros to whole beats."""
        return self.word.to_bytes(-(-self.at // (8 * beat)) * beat, "little")


def slow_series(ce, config, terms):
    """docs/basis.md, "Series coefficients", lane by lane."""
    b, z, data = config.basis, Sizes(config), b""
    rest = [[[int(c) for c in np.flatnonzero(group)] for group in row] for row in ce.reshape(-1, *ce.shape[2:])]
    for n in terms:
        taken = [[[group.pop(0) for _ in range(min(n, len(group)))] for group in row] for row in rest]
        fetch = min(b.lanes // n, b.stream_groups)
        for w in range(-(-ce.shape[2] // fetch)):
            bits = Bits()
            for row, values in zip(taken, ce.reshape(-1, *ce.shape[2:])):
                for lane in range(b.lanes):
                    g = w * fetch + lane // n
                    code = 0
                    if lane // n < fetch and g < ce.shape[2] and lane % n < len(row[g]):
                        c = row[g][lane % n]
                        code = c + b.group * (1 + 2 * (values[g, c] < 0))
                    bits.put(int(code), z.lane_code_bits)
            data += bits.bytes(z.beat_bytes)
    return data


def slow_maps(ce, config):
    """docs/basis.md, "Map coefficients", word by word with a list of signs."""
    b, z, bits, table = config.basis, Sizes(config), Bits(), Bits()
    for block in ce:
        begin, signs, left = bits.at, [int(v < 0) for v in block[block != 0]], 0
        for row in block:
            for run in range(0, ce.shape[2], b.group):
                part = row[run:run + b.group]
                bits.put(sum(1 << g for g, group in enumerate(part) if group.any()), b.group)
                for group in part:
                    if not group.any():
                        continue
                    bits.put(sum(1 << c for c in range(b.group) if group[c]), b.group)
                    count = np.count_nonzero(group)
                    if left < count:
                        now, signs = signs[:b.group], signs[b.group:]
                        bits.put(sum(v << i for i, v in enumerate(now)), b.group)
                        left += b.group
                    left -= count
        table.put((bits.at - begin) // b.group, 16)
    return table.bytes(z.beat_bytes) + bits.bytes(z.beat_bytes)


# -- taps --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["tiny_basis", "tiny_maps", "basis252", "full"])
def test_taps_equal_a_bit_by_bit_writer_and_come_back(rng, name):
    config = load(name)
    b, z = config.basis, Sizes(config)
    taps = rng.integers(-128, 128, (min(5, b.tap_rows), b.blocks, b.slices, b.multipliers))
    data = b""
    for row in taps:
        bits = Bits()
        for n in range(b.blocks * b.slices):
            for i in range(b.multipliers):
                bits.put(int(row[n // b.slices, n % b.slices, i]) & 255, 8)
        data += bits.bytes(z.beat_bytes)
    assert pack_taps(taps, config) == data and len(data) == len(taps) * z.tap_row_beats * z.beat_bytes
    assert np.array_equal(unpack_taps(data, config), taps)


def test_taps_of_kernels_element_by_element(rng):
    kernels = rng.integers(-128, 128, (3, 2, 2, 5))
    taps, q = taps_of_kernels(kernels, SERIES), 3
    assert taps.shape == (4, 4, 2, 3)
    for u, b, m, i in np.ndindex(taps.shape):
        r, s = u // 2, u % 2 * q + i
        assert taps[u, b, m, i] == (kernels[b, m, r, s] if b < 3 and s < 5 else 0)


def test_taps_of_basis_are_the_same_in_each_used_block(rng):
    basis = rng.integers(-128, 128, (1, 3, 3))
    taps = taps_of_basis(basis, SERIES, blocks=3)
    assert np.array_equal(taps, taps_of_kernels(np.stack([basis] * 3), SERIES)) and not taps[:, 3].any()


def test_taps_of_pointwise_element_by_element(rng):
    weights = rng.integers(-128, 128, (2, 5, 4))
    taps = taps_of_pointwise(weights, SERIES)
    assert taps.shape == (5, 4, 2, 3)
    for g, b, m, i in np.ndindex(taps.shape):
        assert taps[g, b, m, i] == (weights[b, g, 3 * m + i] if b < 2 and 3 * m + i < 4 else 0)


@pytest.mark.parametrize("make, text", [
    (lambda: taps_of_kernels(np.zeros((5, 1, 1, 1), int), SERIES), "kernels must be .up to 4 blocks, up to 2 slices"),
    (lambda: taps_of_kernels(np.zeros((1, 3, 1, 1), int), SERIES), "up to 2 slices, R, S., not of shape .1, 3"),
    (lambda: taps_of_kernels(np.full((1, 1, 1, 1), 128), SERIES), "kernels must be in -128..127"),
    (lambda: taps_of_basis(np.zeros((1, 1), int), SERIES), r"basis must be \[M, R, S\]"),
    (lambda: taps_of_pointwise(np.zeros((1, 1, 3), int), SERIES), r"weights must be .*groups, 4\]"),
    (lambda: taps_of_pointwise(np.full((1, 1, 4), -129), SERIES), "weights must be in -128..127"),
    (lambda: pack_taps(np.zeros((17, 4, 2, 3), int), SERIES), r"taps must be \[1..16 rows, 4, 2, 3\]"),
    (lambda: pack_taps(np.zeros((0, 4, 2, 3), int), SERIES), "1..16 rows"),
    (lambda: pack_taps(np.full((1, 4, 2, 3), 200), SERIES), "taps must be in -128..127"),
    (lambda: unpack_taps(bytes(20), SERIES), "whole rows of 24 bytes, not 20"),
    (lambda: unpack_taps(b"", SERIES), "whole rows"),
    (lambda: unpack_taps(bytes(15) + b"\1", MAPS), "must be 0 from byte 12 on"),
])
def test_taps_errors(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_floats_are_refused():
    for call in (lambda: pack_taps(np.zeros((1, 4, 2, 3)), SERIES), lambda: taps_of_basis(np.zeros((1, 1, 1)), SERIES),
                 lambda: pack_series(np.zeros((4, 2, 1, 4)), SERIES, [1]),
                 lambda: pack_maps(np.zeros((3, 2, 1, 4)), MAPS)):
        with pytest.raises(TypeError, match="must be an integer array, not float64"):
            call()


# -- series ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("density", [0, 0.1, 1])
@pytest.mark.parametrize("groups", [1, 3, 4])
@pytest.mark.parametrize("terms", [[1], [2], [4], [1, 1], [2, 1], [4, 4]])
@pytest.mark.parametrize("name", SERIES_CONFIGS)
def test_series_equal_a_lane_by_lane_writer_and_come_back(rng, name, terms, groups, density):
    config = SERIES_CONFIGS[name]
    words = series_words(groups, terms, config)
    ce = at_most(ternary(rng, config, groups, density), sum(terms))
    if words > config.basis.coefficient_rows:
        with pytest.raises(ValueError, match=f"must fit {config.basis.coefficient_rows} tiles, not {words}"):
            pack_series(ce, config, terms)
        return
    data = pack_series(ce, config, terms)
    assert data == slow_series(ce, config, terms)
    assert len(data) == words * Sizes(config).series_tile_beats * Sizes(config).beat_bytes
    assert np.array_equal(unpack_series(data, config, terms, groups), ce)


def test_series_of_one_non_zero_everywhere():
    for place in np.ndindex(4, 2, 3, 4):
        ce = np.zeros((4, 2, 3, 4), np.int8)
        ce[place] = -1
        assert np.array_equal(unpack_series(pack_series(ce, SERIES, [2]), SERIES, [2], 3), ce)


def test_any_order_of_terms_and_lanes_is_read(rng):
    """Codes of a term's lanes of one group exchanged, and the two equal terms too."""
    ce = at_most(ternary(rng, SERIES, 2, 0.9), 4)
    data = np.frombuffer(pack_series(ce, SERIES, [2, 2]), np.uint8).reshape(2, -1)
    swapped = data[::-1] >> 4 | data[::-1] << 4                   # a byte holds two lanes of one group
    assert not np.array_equal(swapped, data)
    assert np.array_equal(unpack_series(swapped.tobytes(), SERIES, [2, 2], 2), ce)


def test_words():
    full = load("basis288")
    assert [series_words(g, [1], full) for g in (1, 16, 17)] == [1, 1, 2]
    assert [series_words(5, [n], full) for n in (1, 2, 4, 8, 16)] == [1, 1, 2, 3, 5]
    assert [map_words(g, load("maps288")) for g in (1, 8, 9)] == [1, 1, 2]
    for call in (lambda: series_words(0, [1], full), lambda: map_words(0, full)):
        with pytest.raises(ValueError, match="groups must be at least 1, not 0"):
            call()


@pytest.mark.parametrize("needed, groups, terms", [
    (0, 16, (1,)), (1, 16, (1,)), (3, 16, (2, 1)), (3, 4, (4,)), (2, 8, (2,)), (5, 8, (4, 1)), (16, 3, (16,)),
    (7, 16, (4, 2, 1)), (11, 16, (8, 2, 1)), (0, 1, (1,)), (2, 1, (2,)), (3, 1, (4,)), (5, 1, (8,)),
    (15, 32, (8, 4, 2, 1))])
def test_cheapest_series(needed, groups, terms):
    """Fewest stream words, then fewest terms: at 16 groups 2:16 + 1:16 take 3 words, 4:16 takes 4."""
    assert cheapest_series(needed, groups, load("basis288")) == terms


def test_cheapest_series_of_small_groups():
    assert cheapest_series(4, 3, SERIES) == (4,)
    for needed in (-1, 5):
        with pytest.raises(ValueError, match=f"needed must be in 0..4, not {needed}"):
            cheapest_series(needed, 3, SERIES)


def flipped(data, bit):
    """``data`` with one bit changed."""
    data = bytearray(data)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def test_series_errors(rng):
    ce = at_most(ternary(rng, SERIES, 3, 0.9), 2)
    good = pack_series(ce, SERIES, [2])                            # 2 words, the second for one group
    dense = ce.copy()
    dense[1, 0, 2, :3] = 1
    narrow = replace(SERIES, basis=replace(SERIES.basis, stream_groups=1))
    pad = replace(SERIES, bus=replace(SERIES.bus, data_bits=256))
    for call, text in [
        (lambda: pack_series(dense, SERIES, [2]), "at most 2 non-zeros in a group, not 3 as in slice 2, group 2"),
        (lambda: pack_series(ce * 2, SERIES, [2]), "must be -1, 0 or 1"),
        (lambda: pack_series(ce[:2], SERIES, [2]), r"must be \[4, 2, groups, 4\], not of shape \(2, 2, 3, 4\)"),
        (lambda: pack_series(ce[:, :, :0], SERIES, [2]), "groups, 4"),
        (lambda: pack_series(ce, SERIES, []), "1..4 numbers N, not"),
        (lambda: pack_series(ce, SERIES, [1] * 5), "1..4 numbers N"),
        (lambda: pack_series(ce, SERIES, [3]), r"powers of two in 1..4, not \[3\]"),
        (lambda: pack_series(ce, SERIES, [8]), r"powers of two in 1..4, not \[8\]"),
        (lambda: pack_series(ce, MAPS, [2]), "config must have series coefficients, not maps"),
        (lambda: unpack_series(good, MAPS, [2], 3), "config must have series"),
        (lambda: unpack_series(good[:-1], SERIES, [2], 3), "must be 2 tiles of 16 bytes, not 31 bytes"),
        (lambda: unpack_series(good, SERIES, [2], 2), "must be 1 tiles"),
        # Lane 2 of slice 0 in the second tile belongs to group 3.
        (lambda: unpack_series(flipped(good, 8 * 16 + 4 * 2 + 2), SERIES, [2], 3),
         "Lane 2 of slice 0 in tile 1 must have the code 0: it belongs to no group"),
        # One group per word: lanes 2 and 3 are idle.
        (lambda: unpack_series(flipped(bytes(16), 4 * (4 + 3) + 2), narrow, [2], 1),
         "Lane 3 of slice 1 in tile 0 must have the code 0: it belongs to no group"),
        (lambda: unpack_series(flipped(bytes(16), 4 * 4), SERIES, [4], 1),
         "Lane 0 of slice 1 in tile 0 must have the code 0: its non-zero bit is 0"),
        (lambda: unpack_series(flipped(flipped(bytes(16), 2), 6), SERIES, [4], 1),
         "Channel 0 of group 0 must occur once in slice 0, not 2 times"),
        (lambda: unpack_series(flipped(bytes(32), 128), pad, [4], 1), "must be 0 from bit 128 on"),
    ]:
        with pytest.raises(ValueError, match=text):
            call()


# -- maps --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("density", [0, 0.02, 0.3, 1])
@pytest.mark.parametrize("groups", [1, 3, 4, 8])
@pytest.mark.parametrize("name", MAP_CONFIGS)
def test_maps_equal_a_word_by_word_writer_and_come_back(rng, name, groups, density):
    config = MAP_CONFIGS[name]
    for signs in ((-1, 1), (-1,), (1,)):
        ce = ternary(rng, config, groups, density, signs)
        data = pack_maps(ce, config)
        assert data == slow_maps(ce, config)
        assert np.array_equal(unpack_maps(data, config, groups), ce)


def test_maps_of_more_groups_than_a_level_1_word(rng):
    config = load("maps288")
    ce = ternary(rng, config, 37, 0.1)
    ce[:, :, 16:32] = 0                                            # an empty run in the middle
    data = pack_maps(ce, config)
    assert data == slow_maps(ce, config)
    assert np.array_equal(unpack_maps(data, config, 37), ce)


def test_maps_of_one_non_zero_everywhere():
    for place in np.ndindex(3, 2, 5, 4):
        ce = np.zeros((3, 2, 5, 4), np.int8)
        ce[place] = -1
        data = pack_maps(ce, MAPS)
        assert np.array_equal(unpack_maps(data, MAPS, 5), ce)
        assert len(data) == 2 * 8                                  # the table, and 14 words in one beat


def nibbles(*segments):
    """Data of tiny_maps: words of 4 bits of each block, the last padded to beats of 8 bytes."""
    table, words = [len(s) for s in segments], [word for s in segments for word in s]
    words += [0] * (-len(words) % 16)
    data = bytes(a | b << 4 for a, b in zip(words[::2], words[1::2]))
    return np.array([*table, *[0] * (4 - len(table))], "<u2").tobytes() + data


def with_length(data, block, words):
    """Data of tiny_maps with another length of one segment in the table."""
    out = np.frombuffer(data, "<u2").copy()
    out[block] = words
    return out.tobytes()


def test_maps_errors(rng):
    good = nibbles([0b01, 0b0101, 0b0010, 0], [0, 0], [0, 0])          # 8 words in one beat
    want = np.zeros((3, 2, 2, 4), int)
    want[0, 0, 0, [0, 2]] = 1, -1
    assert np.array_equal(unpack_maps(good, MAPS, 2), want)
    ce = ternary(rng, MAPS, 8, 0.3)
    full = pack_maps(np.ones((3, 2, 8, 4), np.int8), MAPS)               # 36 words of each block in 7 beats
    assert len(full) == 8 * 8 and full[:6] == b"\x24\0" * 3
    for call, text in [
        (lambda: pack_maps(np.zeros((3, 2, 9, 4), int), MAPS), "groups must be in 1..8, not 9"),
        (lambda: unpack_maps(good, MAPS, 9), "groups must be in 1..8, not 9"),
        (lambda: unpack_maps(good, MAPS, 0), "groups must be in 1..8, not 0"),
        (lambda: pack_maps(ce, SERIES), "config must have maps coefficients, not series"),
        (lambda: unpack_maps(good, SERIES, 2), "config must have maps"),
        (lambda: pack_maps(ce + 1, MAPS), "must be -1, 0 or 1"),
        (lambda: unpack_maps(good[:-1], MAPS, 2), "must be at least 1 whole beats of 8 bytes, not 15 bytes"),
        (lambda: unpack_maps(b"", MAPS, 2), "at least 1 whole beats"),
        (lambda: unpack_maps(flipped(good, 48), MAPS, 2), "table must be 0 behind its 3 lengths"),
        (lambda: unpack_maps(good + bytes(8), MAPS, 2), r"Segments of \[4, 2, 2\] words .* fill 2 beats"),
        (lambda: unpack_maps(good[:8], MAPS, 2), r"Segments of \[4, 2, 2\] words .* fill 0 beats"),
        (lambda: unpack_maps(with_length(good, 2, 11), MAPS, 2), r"Segments of \[4, 2, 11\] words .* fill 1 beats"),
        (lambda: unpack_maps(with_length(good, 2, 0), MAPS, 2), r"Segments of \[4, 2, 0\] words must each have at"),
        (lambda: unpack_maps(flipped(good, 64 + 4 * 8), MAPS, 2), "What lies behind the last segment must be 0"),
        (lambda: unpack_maps(flipped(full, 8 * 64 - 1), MAPS, 8), "What lies behind the last segment must be 0"),
        (lambda: unpack_maps(with_length(good, 2, 1), MAPS, 2),
         "Segment 2 must hold its 2 slices, but ends after 1 words"),
        (lambda: unpack_maps(with_length(good, 2, 10), MAPS, 2),
         "Segment 2: its slices must take all of its 10 words, not 2"),
        (lambda: unpack_maps(with_length(full, 0, 35), MAPS, 8),
         "Segment 0 must hold its 2 slices, but ends after 35 words"),
        (lambda: unpack_maps(with_length(full, 0, 37), MAPS, 8),
         "Segment 0: its slices must take all of its 37 words, not 36"),
        (lambda: unpack_maps(nibbles([0b0100, 1, 0, 0], [0, 0], [0, 0]), MAPS, 2),
         "Segment 0: slice 0 must have no level-1 bit at or beyond group 2"),
        (lambda: unpack_maps(nibbles([0, 0], [0, 0b0010, 0], [0, 0]), MAPS, 2),
         "Segment 1: slice 1 must have a non-zero in group 1"),
        (lambda: unpack_maps(nibbles([0b01, 0b0101, 0b0100, 0], [0, 0], [0, 0]), MAPS, 2),
         "Segment 0: signs behind the last non-zero must be 0"),
    ]:
        with pytest.raises(ValueError, match=text):
            call()


def test_signs_left_over_serve_the_next_slice():
    """Three non-zeros in slice 0, one in slice 1: one sign word for both; a fifth would take another."""
    ce = np.zeros((3, 2, 1, 4), int)
    ce[0, 0, 0, :3], ce[0, 1, 0, 3] = (1, -1, 1), -1
    assert pack_maps(ce, MAPS) == nibbles([1, 0b0111, 0b1010, 1, 0b1000], [0, 0], [0, 0])
    ce[0, 1, 0, 0] = -1
    assert pack_maps(ce, MAPS) == nibbles([1, 0b0111, 0b1010, 1, 0b1001, 0b0001], [0, 0], [0, 0])


@pytest.mark.parametrize("name", ["basis288", "maps288"])
def test_packing_512_channels_is_fast(rng, name):
    config = load(name)
    ce = at_most(ternary(rng, config, 32, 0.3), 4)

    def work():
        data = pack_series(ce, config, [4]) if name == "basis288" else pack_maps(ce, config)
        return unpack_series(data, config, [4], 32) if name == "basis288" else unpack_maps(data, config, 32)

    assert np.array_equal(work(), ce)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05                                        # measured: 4 ms
