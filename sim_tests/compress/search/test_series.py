"""What the searches share: the prefix search, multiplications of series, rows and totals against loops."""
import doctest

import numpy as np
import pytest

from compress import cost, methods
from compress.search import series, tasder_activations
from sim_tests.compress.networks import small_network
from spec import config as configs
from spec.config import Pattern
from spec.errors import InputError

NM256 = configs.load("nm256")


def test_doctests():
    for module in (series, tasder_activations):
        assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("goal", [0, 1.01, True, "0.9", None])
def test_goal_is_a_share(goal):
    with pytest.raises(InputError, match="goal must be above 0 and at most 1"):
        series.check_goal(goal)


@pytest.mark.parametrize("patterns,depth,slots", [
    ((), 20, 20), (("4:8",), 16, 8), (("4:8",), 20, 12), (("4:8", "1:8"), 16, 10), (("1:8",), 1, 1),
    (("7:8",), 3, 3), (("2:8",), 3, 2), (("1:4", "1:8"), 12, 5)])
def test_multiplications_are_the_slots_of_the_series(patterns, depth, slots):
    """2 outputs, 3 x 1 taps, 5 x 7 pixels; no layer does more than dense."""
    patterns = [Pattern.parse(p) for p in patterns]
    assert series.layer_macs(np.zeros((2, 3, 1, depth)), (5, 7, 2), patterns) == 2 * 3 * 35 * slots


def test_rows_of_a_network():
    network, _, graph = small_network("tasd:4:8+2:8", config=NM256)
    rows = series.weight_rows(network, NM256)
    nodes = {n.name: n for n in graph.convolutions}
    assert [r.layer for r in rows] == list(nodes)
    layers = {layer.name: layer for layer in network.layers}
    for r in rows:
        node, layer = nodes[r.layer], layers[r.layer]
        shape, patterns = graph.shapes[node.output], () if r.method == "dense" else methods.parse(r.method).patterns
        assert r.macs == node.weights.size * shape[0] * shape[1]
        assert r.cycles_padded == cost.layer_cycles(node, shape, patterns, NM256)
        assert r.cycles_dense == cost.layer_cycles(node, shape, (), NM256)
        assert r.cycles == -(-r.macs_executed // 256) <= r.cycles_padded
        assert r.density == (0.75 if patterns else 1.0) and r.output_error == layer.metrics["output_error"]
        assert r.dropped_nonzeros == layer.metrics["dropped_nonzeros"] == r.to_dict()["dropped_nonzeros"]
    kinds = {r.method for r in rows}
    assert kinds == {"dense", "tasd:4:8+2:8"}
    total = series.totals(rows)
    assert total["macs"] == sum(r.macs for r in rows) > total["macs_executed"] == sum(r.macs_executed for r in rows)
    assert total["macs_saved"] == 1 - total["macs_executed"] / total["macs"]
    assert total["cycles_saved"] == 1 - sum(r.cycles_padded for r in rows) / sum(r.cycles_dense for r in rows)


def test_ideal_cycles_fill_every_multiplier():
    assert [cost.ideal_cycles(n, NM256) for n in (1, 256, 257)] == [1, 1, 2]


def test_cycles_of_activation_series_by_hand():
    """64 channels, 3 x 3: 72 blocks of 8. 5 x 7 pixels fill 3 columns' worth of 16; a dense fetch takes 2 blocks."""
    node = type("Node", (), {"weights": np.zeros((10, 3, 3, 64), np.int8), "groups": 1})
    for patterns, steps in (((), 36), (("4:8",), 18), (("4:8", "1:8"), 18 + 5), (("2:8",), 9)):
        patterns = [Pattern.parse(p) for p in patterns]
        assert cost.activation_cycles(node, (5, 7, 10), patterns, NM256) == 3 * 10 * steps
    with pytest.raises(InputError, match="pattern must have M that divides the block"):
        cost.activation_cycles(node, (5, 7, 10), [Pattern(3, 5)], NM256)
    with pytest.raises(InputError, match="structured must be there"):
        cost.activation_cycles(node, (5, 7, 10), (), configs.load("basis288"))
