"""Tiles, strips and extents of the basis engine."""
from dataclasses import replace

import pytest

from lowering import lower
from lowering.basis_tiling import BasisTiler, Extent, pass_cycles
from sim_tests.lowering.networks import basis_convolution, convolution, network
from sim_tests.lowering.test_basis import _job
from spec.config import load
from spec.derive import Sizes
from spec.errors import InputError


def _tiler(rng, config, *, size=(12, 10), channels=8, outputs=4, made=basis_convolution, batch=1, **fields):
    if made is basis_convolution:
        fields = {"count": 2, "density": 0.1} | fields
    layer, out = made(rng, size=size, channels=channels, outputs=outputs, **fields)
    return BasisTiler(_job(layer, out, size=size, channels=channels, config=config), Sizes(config), batch)


def test_extent_of_edge_and_inner_strips(rng):
    tiler = _tiler(rng, load("basis252"), pads=(1, 1, 1, 1))
    (run,) = tiler.job.passes[0]
    whole = tiler.window(0, 0, 12)
    assert (whole.extent, whole.before, whole.start) == (12, 0, 0)
    assert tiler.extent(0, run, whole, 0, 4) == Extent(0, 5, 1, 4, 1, 1)
    assert tiler.extent(0, run, whole, 4, 4) == Extent(3, 6, 0, 4, 1, 1)
    assert tiler.extent(0, run, whole, 8, 4) == Extent(7, 5, 0, 4, 1, 1)
    inner = tiler.window(0, 4, 8)
    assert inner.start == 3 and tiler.extent(0, run, inner, 8, 4) == Extent(4, 5, 0, 4, 1, 1)
    assert [tiler.rows_needed(whole, y, 4) for y in (0, 4, 8)] == [5, 9, 12] and tiler.rows_needed(inner, 4, 4) == 6


def test_extent_with_stored_padding_and_strides_of_addresses(rng):
    tiler = _tiler(rng, load("basis252"), kernel=(1, 3), stride=(3, 2), pads=(2, 1, 0, 1))
    assert tiler.job.border
    (run,) = tiler.job.passes[0]
    rows, cols = tiler.window(0, 0, 5), tiler.window(1, 0, 5)
    assert (rows.extent, rows.before, rows.data) == (13, 2, 11) and tiler.rows_needed(rows, 1, 2) == 7
    assert tiler.extent(0, run, rows, 1, 2) == Extent(3, 2, 0, 2, 3, 1)
    assert tiler.extent(1, run, cols, 1, 2) == Extent(2, 5, 0, 2, 1, 2)


@pytest.mark.parametrize("fields", [{"pads": (1, 1, 1, 1)}, {"stride": (2, 2), "pads": (1, 0, 1, 1)},
                                    {"kernel": (5, 5), "dilation": (2, 1), "pads": (2, 3, 4, 0)}])
def test_micro_steps_are_those_of_rows_inside(rng, fields):
    config = load("basis252")
    tiler = _tiler(rng, config, **fields)
    job = tiler.job
    (run,) = job.passes[0]
    out, kh = job.output, job.kernel[0]
    inside = sum(0 <= y * job.stride[0] + r * job.dilation[0] - job.origin[0] < 12 for y in range(out.height)
                 for r in range(kh))
    whole = tiler.window(0, 0, out.height), tiler.window(1, 0, out.width)
    cycles, micro_steps = pass_cycles(tiler, run, *whole, (0, out.height, 0, out.width))
    assert micro_steps == inside * out.width * -(-job.kernel[1] // config.basis.multipliers) and cycles >= micro_steps


@pytest.mark.parametrize("name", ["tiny_basis", "tiny_maps", "basis252"])
@pytest.mark.parametrize("size", [(1, 1), (12, 10), (3, 200), (64, 64)])
def test_plans_cover_all_outputs_and_fit(rng, name, size):
    config = load(name)
    bits = config.basis.intermediate_bits
    tiler = _tiler(rng, config, size=size, pads=(1, 1, 1, 1), intermediate_bits=bits, batch=2)
    plan, sizes, out = tiler.plan(), tiler.sizes, tiler.job.output
    assert plan.area * plan.images * plan.bundles * plan.regions <= sizes.activation_blocks
    covered = set()
    for y, n, x, m in plan.strips(plan.rows, plan.cols):
        assert n >= 1 and m >= 1 and n * m <= sizes.accumulator_depth
        fresh = {(r, c) for r in range(y, y + n) for c in range(x, x + m)}
        assert not covered & fresh
        covered |= fresh
    assert len(covered) == plan.rows * plan.cols
    assert plan.rows <= out.height and plan.cols <= out.width and plan.cost_cycles > 0


def test_residuals_bound_the_strip(rng):
    config = load("basis252")
    config = replace(config, memory=replace(config.memory, residual_bytes=256))
    layer, out = basis_convolution(rng, size=(16, 16), channels=8, outputs=4, count=2, residual=True)
    assert BasisTiler(_job(layer, out, size=(16, 16), config=config), Sizes(config), 1).max_pixels == 8


def test_what_does_not_fit(rng):
    layer, out = convolution(rng, size=(4, 4), channels=150, outputs=2, kernel=(4, 4))
    with pytest.raises(InputError, match=r"layer conv must fit configuration tiny_maps \(memory.activation_bytes\)"):
        lower(network((4, 4), 150, [layer], [out]), load("tiny_maps"))
    config = load("maps288")
    config = replace(config, memory=replace(config.memory, weight_bytes=16384))
    layer, out = basis_convolution(rng, size=(4, 4), channels=1500, outputs=16, count=6, density=0.5)
    with pytest.raises(InputError, match=r"layer basis must have passes whose weights fit configuration maps288 "
                                         r"\(memory.weight_bytes\)"):
        lower(network((4, 4), 1500, [layer], [out]), config)
