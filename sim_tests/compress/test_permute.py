"""Channel permutation: exact before pruning, and never worse for the magnitude kept."""
import numpy as np
import pytest

from compress import engine, methods, onnx_import, permute
from compress import graph as graphs
from compress.network import Convolution
from compress.quantize import Calibration, quantize
from sim_tests.compress.networks import every_layer_kind
from sim_tests.compress.onnx_models import Builder, random_model
from spec.errors import InputError


def same_integers(graph, other, x):
    """Both dense int8 networks give the same outputs, element for element."""
    a, b = (quantize(g, Calibration(x=x, source="test")) for g in (graph, other))
    q = engine.quantize_input(a, x)
    assert a.tensors[a.output] == b.tensors[b.output]
    assert np.array_equal(engine.run(a, q), engine.run(b, q))


def test_sets_follow_residuals_pools_and_depthwise_layers():
    graph = onnx_import.parse(every_layer_kind(np.random.default_rng(0)).SerializeToString())
    sets = [set(s) for s in permute.channel_sets(graph)]
    assert len(sets) == 2, "one joined by residual, pools and depthwise; one inside the residual block"
    assert sorted(len(s) for s in sets) == [1, 6]
    assert not {graph.input, graph.output} & set.union(*sets)


@pytest.mark.parametrize("seed", range(15))
def test_any_order_gives_the_same_integers(seed):
    rng = np.random.default_rng([77, seed])
    graph = onnx_import.parse((random_model(rng)[0] if seed else every_layer_kind(rng)).SerializeToString())
    changed = graph
    for tensors in permute.channel_sets(graph):
        changed = permute.reorder(changed, tensors, rng.permutation(graph.shapes[tensors[0]][2]))
    x = rng.normal(0, 1, (6, *graph.shapes[graph.input])).astype(np.float32)
    np.testing.assert_allclose(graphs.forward(graph, x), graphs.forward(changed, x), rtol=1e-3, atol=1e-4)
    # float sums depend on order, so calibrate both on one set of ranges: weights and formats are then permuted exactly
    same_ranges(graph, changed, x)


def same_ranges(graph, changed, x):
    import compress.quantize as q
    found, original = q.ranges(graph, x), q.ranges
    try:
        q.ranges = lambda *a, **k: found
        same_integers(graph, changed, x)
    finally:
        q.ranges = original


def clustered():
    """A pair of pointwise layers whose large weights crowd into the same blocks of four."""
    rng = np.random.default_rng(5)
    b = Builder((4, 3, 3))
    first = b.conv(rng, "x", 4, 16, 1)
    w = rng.normal(0, 0.01, (6, 16, 1, 1))
    w[:, :8] *= 100
    return onnx_import.parse(b.model(b.node("Conv", b.node("Relu", first), w)).SerializeToString())


@pytest.mark.parametrize("method", ["nm:2:4", "nm:2:8", "tasd:1:4+1:8"])
def test_permutation_keeps_more_magnitude(method):
    graph, method = clustered(), methods.parse(method)
    changed, facts = permute.permute(graph, method, rng=np.random.default_rng(0))
    (entry,) = facts["sets"]
    assert entry["kept_after"] > entry["kept_before"]
    x = np.random.default_rng(1).normal(0, 1, (8, 3, 3, 4)).astype(np.float32)
    lost = []
    for g, share in ((graph, entry["kept_before"]), (changed, entry["kept_after"])):
        layer = quantize(g, Calibration(x=x, source="test"), method).layers[-1]
        assert isinstance(layer, Convolution)
        lost.append(layer.metrics["dropped_magnitude"])
        assert layer.metrics["dropped_magnitude"] == pytest.approx(1 - share, abs=0.02)
    assert lost[1] < lost[0]
    if str(method) == "nm:2:4":
        assert entry["kept_after"] > 0.97, "8 large of 16 channels fit 2 to a block"
    same_ranges(graph, changed, x)


def test_repeatable_and_never_worse():
    rng = np.random.default_rng(6)
    magnitudes = np.abs(rng.normal(0, 1, (20, 13)))
    method = methods.parse("nm:2:4")
    one, two = (permute.find_order(magnitudes, method, rng=np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(one[0], two[0]) and one[1:] == two[1:]
    assert sorted(one[0]) == list(range(13)) and one[2] >= one[1]
    padded = np.pad(magnitudes[:, one[0]], ((0, 0), (0, 3)))
    assert permute.kept_magnitude(padded, method.patterns) / magnitudes.sum() == pytest.approx(one[2])


def test_refusals():
    graph = clustered()
    with pytest.raises(InputError, match="must have patterns to permute channels for"):
        permute.permute(graph, methods.parse("dense"), rng=np.random.default_rng(0))
    with pytest.raises(InputError, match="must have M that divide the largest M"):
        permute.permute(graph, methods.parse("tasd:2:4+1:6"), rng=np.random.default_rng(0))
