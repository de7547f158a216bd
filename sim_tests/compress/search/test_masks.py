"""Series for pruning masks: geometry of ResNet-50, sorting against views, choice and totals, the real masks."""
import doctest
import json
from math import prod
import time

import numpy as np
import pytest

from compress import cost, dlmc
from compress.search import masks
from compress.search.series import candidates
from golden.structured import expected_dropped, nm_view
from sim_tests.compress.test_dlmc import text
from sim_tests.real_data import real_data
from spec import config as configs
from spec.errors import InputError

NM256 = configs.load("nm256")


def test_doctests():
    assert doctest.testmod(masks).failed == 0


def mask(rng, name, rows, columns, density):
    return dlmc.parse(text(rng.random((rows, columns)) < density), name=name)


@pytest.mark.parametrize("depth,block", [(16, 8), (12, 8), (3, 8), (16, 4)])
def test_places_in_blocks_serve_every_view(rng, depth, block):
    weights = np.where(rng.random((6, 9, depth)) < 0.4, rng.normal(size=(6, 9, depth)), 0)
    counts, sums = masks.by_rank(weights, block)
    assert counts.sum() == np.count_nonzero(weights) and sums.sum() == pytest.approx(np.abs(weights).sum())
    for n in range(1, block):
        kept = nm_view(weights, (n, block))
        assert counts[n:].sum() == np.count_nonzero(weights) - np.count_nonzero(kept)
        assert sums[n:].sum() == pytest.approx(np.abs(weights - kept).sum())


def test_uniform_loss_of_a_short_last_block():
    """12 channels: 8 with 3 kept, then 4 with 3 kept; 2 of 3 left channels alone lose nothing."""
    want = (8 * expected_dropped((3, 8), 0.3) + 4 * expected_dropped((3, 4), 0.3)) / 12
    assert masks._expected(3, 8, 12, 0.3) == pytest.approx(want)
    assert masks._expected(3, 8, 11, 0.3) == pytest.approx(8 * expected_dropped((3, 8), 0.3) / 11)


@pytest.mark.parametrize("bound", [0, 0.01, 0.1, 1])
@pytest.mark.parametrize("first", ["dense", "search"])
def test_choice_by_trying_every_series(rng, bound, first):
    found = [mask(rng, "bottleneck_2_block_group4_1_1", 32, 9 * 64, 0.1), mask(rng, "initial_conv", 16, 147, 0.3),
             mask(rng, "bottleneck_1_block_group3_1_1", 16, 40, 0.3), mask(rng, "other", 8, 16, 0.02)]
    facts = masks.report(found, NM256, bound=bound, first=first, seed=3)
    json.dumps(facts)
    assert facts["note"] == "real masks, synthetic values"
    networks = {str(m): np.zeros(2) for m in candidates(NM256)}
    for row, m, kernel, pixels in zip(facts["layers"], found, ((3, 3), (7, 7), (1, 1), (1, 1)), (49, 12544, 196, 1)):
        weights, _, _ = masks._kernel(m, 3)
        assert np.array_equal(weights.reshape(m.rows, -1) != 0, m.to_dense())
        depth = m.columns // prod(kernel)
        assert row["shape"] == [m.rows, *kernel, depth] and row["macs"] == m.rows * m.columns * pixels
        node = type("Node", (), {"weights": weights.reshape(row["shape"]), "groups": 1})
        best = cost.layer_cycles(node, (pixels, 1), (), NM256), "dense", 0.0
        assert row["cycles_dense"] == best[0]
        for method in reversed(candidates(NM256)):
            n = sum(p.n for p in method.patterns)
            kept = nm_view(weights, (n, 8))
            dropped = 1 - np.count_nonzero(kept) / np.count_nonzero(weights)
            if depth >= 8:
                networks[str(method)] += (np.count_nonzero(weights) - np.count_nonzero(kept), np.count_nonzero(weights))
            cycles = cost.layer_cycles(node, (pixels, 1), method.patterns, NM256)
            if dropped <= bound and cycles < best[0] and (depth >= 8 or first == "search"):
                best = cycles, str(method), dropped
        assert (row["cycles_padded"], row["method"]) == best[:2] and row["dropped_nonzeros"] == pytest.approx(best[2])
        assert row["dropped_nonzeros"] <= bound and row["dropped_magnitude"] <= row["dropped_nonzeros"] + 1e-12
    for row in facts["networks"]:
        lost, nonzeros = networks[row["method"]]
        assert row["dropped_nonzeros"] == pytest.approx(lost / nonzeros)
    total = facts["totals"]
    assert total["macs"] == sum(r["macs"] for r in facts["layers"])
    assert total["cycles_saved"] == 1 - total["cycles_padded"] / total["cycles_dense"]
    elements = sum(m.rows * m.columns for m in found)
    assert total["density"] == pytest.approx(sum(len(m.indices) for m in found) / elements)


def test_values_depend_on_seed_and_name_alone(rng):
    two = [mask(rng, name, 8, 32, 0.5) for name in "ab"]
    first, again = ({r["layer"]: r for r in masks.report(order, NM256)["layers"]} for order in (two, two[::-1]))
    assert first == again
    other = masks.report(two, NM256, seed=5, bound=1)["layers"]
    assert other[0]["dropped_magnitude"] != masks.report(two, NM256, bound=1)["layers"][0]["dropped_magnitude"]


def test_refusals(rng):
    for options, rule in (({"bound": 2}, "bound must be in 0..1, not 2"), ({"bound": True}, "bound must be in 0..1"),
                          ({"first": "x"}, "first must be dense or search, not 'x'")):
        with pytest.raises(InputError, match=rule):
            masks.report([], NM256, **options)
    with pytest.raises(InputError, match="initial_conv must have columns for 7x7 taps, not 50"):
        masks.report([mask(rng, "initial_conv", 2, 50, 0.5)], NM256)
    with pytest.raises(InputError, match="structured must be there"):
        masks.report([], "basis288")


@pytest.mark.parametrize("level,cuts", [("0.8", 0.35), ("0.9", 0.5)])
def test_resnet50(level, cuts):
    """Multiplications of ResNet-50 at 224 x 224, and a choice for every layer in less than a minute."""
    path = real_data("dlmc", f"rn50_magnitude_{level}.tar.xz")
    began = time.process_time()
    facts = masks.report(dlmc.load(path), "nm256")
    assert time.process_time() - began < 60
    assert len(facts["layers"]) == 54 and facts["totals"]["macs"] == 4089184256
    assert facts["totals"]["macs_saved"] > cuts and facts["layers"][-1]["method"] == "dense"
    for row in facts["networks"]:            # real zeros cluster: they lose a little more than independent ones
        assert row["dropped_nonzeros"] > row["dropped_uniform"] > row["dropped_magnitude"] * 0.02
