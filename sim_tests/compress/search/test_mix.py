"""`basis-mix`: what is offered per layer, what is taken, and what the flow keeps of it."""
import numpy as np
import pytest

from compress import cost, engine, flow, methods
from compress.network import BasisConvolution
from compress.quantize import Quantizer
from compress.search import mix
from sim_tests.compress.test_basis import kernel, one_layer, samples
from sim_tests.compress.test_flow import DIGITS, heldout
from spec.config import load
from spec.errors import InputError


def quantizer(rng, preset, **geometry):
    graph = one_layer(kernel(rng, (16, 3, 3, 32)), **({"pads": (1, 1, 1, 1)} | geometry))
    return Quantizer(graph, samples(graph, rng), config=load(preset)), graph.nodes[0]


@pytest.mark.parametrize("preset,series,basis", [("full", 3, True), ("basis288", 0, True), ("nm256", 3, False)])
def test_every_engine_offers_its_methods(rng, preset, series, basis):
    q, node = quantizer(rng, preset)
    found = mix.choices(q, node, methods.parse("basis:6@8:16"), load(preset))
    kinds = [str(c.method).partition(":")[0] for c in found]
    assert kinds[0] == "dense" and found[0].error == 0
    assert sum(k in ("nm", "tasd") for k in kinds) >= series and ("basis" in kinds) == basis
    for c in found:
        layer = q.layer(node, c.method)
        assert c.error == layer.metrics["output_error"] and (c.error > 0) == (c is not found[0])
        if isinstance(layer, BasisConvolution):
            shapes = q.graph.shapes["x"], q.graph.shapes["y"]
            assert c.cycles == cost.basis_cycles(node, *shapes, layer.coefficients, load(preset))


@pytest.mark.parametrize("preset", ["full", "basis288", "maps288", "nm256"])
@pytest.mark.parametrize("bound", [0.05, 0.2, 0.4, 1.0])
def test_fewest_cycles_within_the_bound(rng, preset, bound):
    q, node = quantizer(rng, preset)
    recipe, facts = mix.search(q, load(preset), methods.parse(f"basis-mix:9@x{bound:g}"))
    choices = facts["layers"]["conv"]["choices"]
    legal = [c for c in choices if c["output_error"] <= bound]
    best = min(c["cycles"] for c in legal)
    taken = next(c for c in choices if c["method"] == facts["layers"]["conv"]["method"])
    assert taken in legal and taken["cycles"] == best
    assert str(recipe.layers["conv"]) == taken["method"] and str(recipe.default) == "dense"
    assert facts["bound"] == bound and facts["config_digest"] == load(preset).digest


def test_what_the_basis_engine_cannot_run_is_not_offered(rng):
    q, node = quantizer(rng, "full", stride=(3, 3))
    assert not any(c.method.basis for c in mix.choices(q, node, methods.parse("basis:6"), load("full")))


def test_fixed_layers_stay_and_only_mix_is_searched(rng):
    q, _ = quantizer(rng, "full")
    recipe, facts = mix.search(q, load("full"), methods.parse("basis-mix"), fixed={"conv": methods.parse("nm:2:8")})
    assert str(recipe.layers["conv"]) == "nm:2:8" and facts["layers"] == {}
    with pytest.raises(InputError, match="method must be basis-mix, not 'basis:6'"):
        mix.search(q, load("full"), methods.parse("basis:6"))


def test_flow_reports_choices_and_accuracy(tmp_path):
    told = []
    network = flow.compress_model(DIGITS, "basis-mix:9@0.5@x0.3", config="full", calibration="demo:calibration",
                                  validation="demo:validation", progress=lambda *a: told.append(a))
    facts = network.provenance["method"]
    assert facts["method"] == "basis-mix:9@0.5@x0.3" and facts["search"]["bound"] == 0.3
    layers = {v.name: v for v in network.layers if hasattr(v, "metrics")}
    assert set(facts["search"]["layers"]) == set(layers) and ("choose", 1.0) in told
    for name, layer in layers.items():
        taken = facts["search"]["layers"][name]["method"]
        assert layer.metrics["output_error"] <= 0.3 and layer.format == taken
    assert any(isinstance(v, BasisConvolution) for v in layers.values())
    assert network.provenance["accuracy"]["samples"] == 250
    assert engine.accuracy(network, *heldout()) >= 0.95
    x = engine.quantize_input(network, heldout()[0][:4])
    assert engine.run(network, x).dtype == np.int8
