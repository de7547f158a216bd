"""Placement of tensors and constants."""
import numpy as np
import pytest

from lowering.layout import Constants, Placement, align
from spec.errors import InputError


def _placement(**changes):
    fields = {"name": "t", "offset": 64, "images": 2, "planes": 2, "height": 3, "width": 5, "channels": 6,
              "unit_bytes": 4, "zero_point": -7}
    return Placement(**fields | changes)


def test_every_element_lies_at_its_relative_address(rng):
    p = _placement()
    x = rng.integers(-128, 128, (2, 3, 5, 6)).astype(np.int8)
    memory = np.zeros(p.offset + p.bytes, np.uint8)
    p.write(memory, x)
    for image, row, col, channel in np.ndindex(x.shape):
        at = p.offset + p.relative(image, channel // 4, row, col) + channel % 4
        assert memory[at].astype(np.int8) == x[image, row, col, channel]
    np.testing.assert_array_equal(p.read(memory), x)


def test_channels_beyond_the_tensor_hold_the_zero_point(rng):
    p = _placement()
    memory = np.zeros(p.offset + p.bytes, np.uint8)
    p.write(memory, rng.integers(-128, 128, (2, 3, 5, 6)).astype(np.int8))
    assert (p.read(memory, padded=True)[..., 6:] == -7).all()


def test_groups_with_padding(rng):
    """3 channels in units of 4 bytes: channel c in group c // 3 at position c % 3; the fourth byte is padding."""
    p = _placement(group_channels=3)
    x = rng.integers(-128, 128, (2, 3, 5, 6)).astype(np.int8)
    memory = np.zeros(p.offset + p.bytes, np.uint8)
    p.write(memory, x)
    for image, row, col, channel in np.ndindex(x.shape):
        at = p.offset + p.relative(image, channel // 3, row, col) + channel % 3
        assert memory[at].astype(np.int8) == x[image, row, col, channel]
    assert (memory[p.offset + 3::4].view(np.int8) == -7).all() and p.bytes == 2 * 2 * 15 * 4
    np.testing.assert_array_equal(p.read(memory), x)
    seven = _placement(group_channels=3, planes=3, channels=7)
    memory = np.full(seven.offset + seven.bytes, 1, np.uint8)
    seven.write(memory, np.zeros((2, 3, 5, 7), np.int8))
    padded = seven.read(memory, padded=True)
    assert padded.shape == (2, 3, 5, 9) and (padded[..., 7:] == -7).all() and not padded[..., :7].any()


def test_one_image_needs_no_batch_axis(rng):
    p, x = _placement(images=1), rng.integers(-128, 128, (3, 5, 6)).astype(np.int8)
    memory = np.zeros(p.offset + p.bytes, np.uint8)
    p.write(memory, x)
    np.testing.assert_array_equal(p.read(memory)[0], x)


@pytest.mark.parametrize("array", [np.zeros((2, 3, 5, 6)), np.zeros((2, 5, 3, 6), np.int8)])
def test_wrong_array_is_refused(array):
    with pytest.raises(InputError, match=r"tensor t must be int8 of shape \(2, 3, 5, 6\)"):
        _placement().write(np.zeros(4096, np.uint8), array)


def test_constants_are_aligned_and_kept():
    c = Constants()
    first, second = c.add(np.arange(3, dtype=np.uint8)), c.add(np.arange(5, dtype=np.uint8))
    image = c.image(256)
    assert (first, second, c.bytes) == (0, 128, 133) and align(133, 64) == 192
    assert image[:4].tolist() == [0, 1, 2, 0] and image[128:133].tolist() == [0, 1, 2, 3, 4]
