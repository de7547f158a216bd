"""Tiles: windows, strips, and that plans fit."""
from dataclasses import replace

import numpy as np
import pytest

from lowering import lower
from lowering.tiling import Tiler, make_window
from sim_tests.lowering.networks import check, convolution, network, pool
from sim_tests.lowering.test_steps import _job
from spec.config import load
from spec.errors import InputError


def test_windows_cover_what_the_outputs_read(rng):
    for _ in range(300):
        stride, origin, dilation, taps = (int(v) for v in rng.integers((1, 0, 1, 1), (4, 6, 3, 5)))
        size, first, count = (int(v) for v in rng.integers((1, 0, 1), (12, 5, 6)))
        w = make_window(first, count, stride=stride, origin=origin, dilation=dilation, taps=(0, taps), size=size)
        read = {(first + o) * stride - origin + t * dilation for o in range(count) for t in range(taps)}
        begin = first * stride - origin
        assert (min(read), max(read)) == (begin, begin + w.extent - 1)
        inside = [p for p in range(begin, begin + w.extent) if 0 <= p < size]
        assert w.data == len(inside) and w.before + w.data + w.after == w.extent
        if inside:
            assert w.start == inside[0] and w.before == inside[0] - begin


def test_strips_fit_a_bank_and_are_balanced(rng):
    job, sizes = _job(rng, load("nm256"), pads=(1, 1, 1, 1))
    tiler = Tiler(job, sizes, 1)
    assert tiler.strips(8, 8) == (4, 8)          # two strips: the store of one hides behind the other
    assert tiler.strips(7, 7) == (7, 7)          # halves would be too small for the weight tiles
    assert tiler.strips(14, 14) == (7, 14)
    assert tiler.strips(3, 300) == (1, 100)


@pytest.mark.parametrize("size, channels, outputs, kernel, chunked", [
    ((40, 40), 4, 8, (3, 3), False), ((3, 150), 8, 4, (3, 3), False), ((5, 5), 200, 8, (3, 3), True),
    ((8, 8), 40, 4, (8, 8), True), ((2, 300), 4, 4, (1, 290), True), ((300, 2), 4, 4, (290, 1), True),
    ((6, 6), 700, 3, (1, 1), True)])
def test_layers_larger_than_the_scratchpad(rng, size, channels, outputs, kernel, chunked):
    config = load("tiny")
    layer, out = convolution(rng, size=size, channels=channels, outputs=outputs, kernel=kernel, patterns=["2:4"])
    lowered, _ = check(network(size, channels, [layer], [out]), config, rng)
    plan = lowered.layers[0].plan
    assert plan.regions == 2 and (len(plan.chunks) > 1) == chunked


def test_large_pools(rng):
    config = load("tiny")
    for kind, size, window in (("max", (30, 30), (3, 3)), ("average", (26, 26), (26, 26)), ("max", (24, 24), (23, 23))):
        layer, out = pool(rng, size=size, channels=9, kind=kind, window=window, stride=(1, 1))
        check(network(size, 9, [layer], [out]), config, rng)


def test_pool_that_the_array_cannot_fetch_at_once(rng):
    """One block per fetch but two in a channel group: the other half's sums would be 0, wrong for a maximum."""
    tiny = load("tiny")
    config = replace(tiny, structured=replace(tiny.structured, columns=8, stream_blocks=1))
    layer, out = pool(rng, size=(4, 4), channels=8, kind="max", window=(2, 2), stride=(2, 2))
    with pytest.raises(InputError, match=r"layer pool must fit configuration tiny \(memory.activation_bytes"):
        lower(network((4, 4), 8, [layer], [out]), config)
    layer, out = pool(rng, size=(4, 4), channels=8, kind="average", window=(2, 2), stride=(2, 2))
    check(network((4, 4), 8, [layer], [out]), config, rng)


def test_padding_wider_than_the_image(rng):
    layer, out = convolution(rng, size=(2, 3), channels=5, outputs=4, kernel=(2, 2), pads=(5, 7, 4, 6))
    check(network((2, 3), 5, [layer], [out]), load("tiny"), rng)


def test_whole_image_stays_if_it_fits(rng):
    job, sizes = _job(rng, load("nm256"), size=(14, 14), channels=256, pads=(1, 1, 1, 1))
    plan = Tiler(job, sizes, 1).plan()
    assert (plan.rows, plan.cols, plan.regions, len(plan.chunks)) == (14, 14, 1, 1)
    assert plan.area <= sizes.activation_blocks and plan.pitch >= 15 and plan.cb == 32
    assert np.prod(job.kernel) == 9


def test_a_batch_of_single_pixels_shares_weights(rng):
    """Fully connected: the images are the pixels of one strip, as far as accumulators and scratchpad reach."""
    for name, batch, residual in (("nm256", 9, False), ("nm256", 150, True), ("tiny", 5, True)):
        config = load(name)
        layer, out = convolution(rng, size=(2, 2), channels=20, outputs=18, kernel=(2, 2), residual=residual)
        lowered, machine = check(network((2, 2), 20, [layer], [out]), config, rng, batch=batch)
        plan = lowered.layers[0].plan
        assert plan.images == min(batch, 128)
        if name == "nm256":
            assert machine.counts["EXECUTE"] <= 8 * -(-batch // 128)
