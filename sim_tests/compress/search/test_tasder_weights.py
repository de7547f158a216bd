"""The TASDER-W search: candidates, order of application, bisection, and the accuracy rule."""
import numpy as np
import pytest

from compress import methods, onnx_import
from compress.quantize import Calibration, Quantizer
from compress.search import series, tasder_weights
from sim_tests.compress.onnx_models import Builder
from spec import config as configs
from spec.errors import InputError

NM256 = configs.load("nm256")


def make_quantizer():
    rng = np.random.default_rng(0)
    b = Builder((3, 6, 6))
    x = b.node("Relu", b.conv(rng, "x", 3, 16, pads=[1] * 4))
    x = b.node("Relu", b.conv(rng, x, 16, 32, pads=[1] * 4))
    x = b.node("Relu", b.conv(rng, x, 32, 16, 1))
    x = b.conv(rng, x, 16, 16, groups=16)
    graph = onnx_import.parse(b.model(b.conv(rng, x, 16, 8, 1)).SerializeToString())
    x = rng.normal(0, 1, (4, *graph.shapes[graph.input])).astype(np.float32)
    return Quantizer(graph, Calibration(x=x, source="test"))


QUANTIZER = make_quantizer()
NAMES = [n.name for n in QUANTIZER.graph.convolutions]


def quality(network):
    """A stand-in for accuracy: falls with the number of weights dropped anywhere."""
    lost = sum(v.metrics["dropped_nonzeros"] * v.terms[0].values.size for v in network.layers)
    return 1 - lost / sum(v.terms[0].values.size for v in network.layers)


def test_candidates_are_the_reachable_series():
    assert [str(m) for m in series.candidates(NM256)] == [
        "nm:1:8", "nm:2:8", "tasd:2:8+1:8", "nm:4:8", "tasd:4:8+1:8", "tasd:4:8+2:8", "tasd:4:8+2:8+1:8"]
    from dataclasses import replace
    two = replace(NM256, structured=replace(NM256.structured, terms=2))
    assert "tasd:4:8+2:8+1:8" not in [str(m) for m in series.candidates(two)]
    assert [str(m) for m in series.candidates(configs.load("tiny"))] == ["nm:1:4", "nm:2:4", "tasd:2:4+1:4"]


def test_choices_are_sorted_and_lower_the_cycles():
    pairs = tasder_weights.choices(QUANTIZER, NM256)
    assert [p.dropped for p in pairs] == sorted(p.dropped for p in pairs)
    assert {p.layer for p in pairs} <= set(NAMES[1:3] + NAMES[4:]), "3 channels and depthwise stay dense"
    from compress import cost
    graph = QUANTIZER.graph
    for node in graph.convolutions:
        dense = cost.layer_cycles(node, graph.shapes[node.output], (), NM256)
        assert all(p.cycles < dense for p in pairs if p.layer == node.name)
    # 16 channels in one tap take one dense fetch already: nothing can be faster
    assert not [p for p in pairs if p.layer == NAMES[4]]


def test_a_later_pair_replaces_an_earlier_one_only_if_sparser():
    def pair(layer, method):
        return tasder_weights.Choice(layer=layer, method=methods.parse(method), dropped=0, cycles=1)

    pairs = [pair("a", "nm:4:8"), pair("b", "nm:2:8"), pair("a", "nm:2:8"), pair("a", "tasd:4:8+1:8")]
    assert tasder_weights.assignment(pairs, 0) == {}
    assert str(tasder_weights.assignment(pairs, 2)["a"]) == "nm:4:8"
    assert str(tasder_weights.assignment(pairs, 4)["a"]) == "nm:2:8"


@pytest.mark.parametrize("count", [0, 1, 2, 7, 33])
def test_bisection_finds_every_threshold(count):
    for threshold in range(count + 1):
        asked = []
        found = series.longest_prefix(count, lambda n, t=threshold, a=asked: a.append(n) or n <= t)
        assert found == threshold
        assert len(asked) <= count.bit_length() + 1 + series.WALK


def test_walk_steps_over_a_dip():
    good = {1: True, 2: True, 3: False, 4: False, 5: True, 6: False, 7: False}
    assert series.longest_prefix(7, good.__getitem__, walk=4) == 5
    assert series.longest_prefix(7, good.__getitem__, walk=0) == 2


@pytest.mark.parametrize("goal", [0.999, 0.97, 0.9, 0.6])
def test_layer_search_equals_brute_force(goal):
    """With a monotone judge the search must find the longest good prefix."""
    result = tasder_weights.search(QUANTIZER, NM256, quality, reference=1.0, goal=goal)
    pairs = tasder_weights.choices(QUANTIZER, NM256)
    lengths = [n for n in range(len(pairs) + 1) if quality(QUANTIZER.network(
        methods.Recipe(default=methods.parse("dense"), layers=tasder_weights.assignment(pairs, n)))) >= goal]
    best = tasder_weights.assignment(pairs, max(lengths))
    assert result.recipe.layers == best and result.accuracy >= goal
    assert result.facts["evaluations"] <= len(pairs).bit_length() + 2 + series.WALK + 2


def test_network_search_takes_the_sparsest_that_passes():
    seen = []
    result = tasder_weights.search(QUANTIZER, NM256, lambda n: seen.append(n) or quality(n), reference=1.0, goal=0.75,
                           mode="network")
    used = {str(m) for m in result.recipe.layers.values()}
    assert len(used) == 1 and result.accuracy >= 0.75
    order = [str(m) for m in series.candidates(NM256)]
    for sparser in order[:order.index(used.pop())]:
        trial = {p.layer: p.method for p in tasder_weights.choices(QUANTIZER, NM256) if str(p.method) == sparser}
        recipe = methods.Recipe(default=methods.parse("dense"), layers=trial)
        assert quality(QUANTIZER.network(recipe)) < 0.75


def test_fixed_layers_are_left_alone():
    fixed = {NAMES[1]: methods.parse("nm:1:8")}
    result = tasder_weights.search(QUANTIZER, NM256, lambda network: 1.0, reference=1.0, fixed=fixed)
    assert str(result.recipe.layers[NAMES[1]]) == "nm:1:8" and NAMES[2] in result.recipe.layers


def test_nothing_passes_but_dense():
    dense = quality(QUANTIZER.network("dense"))
    result = tasder_weights.search(QUANTIZER, NM256, quality, reference=dense, goal=1.0)
    assert all(quality(QUANTIZER.network(methods.Recipe(default=methods.parse("dense"), layers={n: m}))) == 1.0
               for n, m in result.recipe.layers.items())


@pytest.mark.parametrize("options,text", [
    ({"goal": 0}, "goal must be above 0 and at most 1"), ({"goal": 1.5}, "goal must be above 0 and at most 1"),
    ({"goal": "x"}, "goal must be above 0"), ({"mode": "random"}, "search must be layer or network, not 'random'"),
    ({"first": "last"}, "first must be dense or search, not 'last'"),
    ({"reference": 2.0}, "must be reachable: the dense int8 network has 1.0000, needed are 1.9800")])
def test_refusals(options, text):
    with pytest.raises(InputError) as caught:
        tasder_weights.search(QUANTIZER, NM256, quality, **({"reference": 1.0} | options))
    assert text in str(caught.value)


def test_series_need_a_structured_engine():
    with pytest.raises(InputError, match="structured must be there for a search of series, not 'none'"):
        series.candidates(configs.load("basis288"))


def test_first_convolution_on_request():
    assert tasder_weights.first_convolution(QUANTIZER.graph) == NAMES[0]
    assert NAMES[0] not in {p.layer for p in tasder_weights.choices(QUANTIZER, NM256)}
    pairs = [p for p in tasder_weights.choices(QUANTIZER, NM256, first="search") if p.layer == NAMES[0]]
    # at most 3 of 8 channels are there: 3:8 and all above lose nothing
    assert pairs and {p.method.density >= 3 / 8 for p in pairs if p.dropped == 0} == {True}
    result = tasder_weights.search(QUANTIZER, NM256, lambda network: 1.0, reference=1.0, first="search")
    assert NAMES[0] in result.recipe.layers and result.facts["first"] == "search"


def test_table_is_that_of_the_chosen_network():
    result = tasder_weights.search(QUANTIZER, NM256, quality, reference=1.0, goal=0.6)
    network = QUANTIZER.network(result.recipe)
    assert result.rows == series.weight_rows(network, NM256)
    assert result.facts["table"] == [r.to_dict() for r in result.rows]
    assert result.facts["totals"] == series.totals(result.rows) and result.facts["totals"]["macs_saved"] > 0
