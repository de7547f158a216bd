"""Basis layers: method strings, the fit step by step, identities, what saturates, storage, and the demo network."""
from dataclasses import replace

import numpy as np
import pytest

from compress import basis, demo, engine, flow, methods, onnx_import, package, validate
from compress import graph as graphs
from compress.network import BasisConvolution, Convolution
from compress.quantize import Calibration, Quantizer, quantize
from golden import basis as golden
from golden import coefficients as formats
from golden import structured
from golden.chain import quantize_rows
from golden.machine import Machine
from lowering.lower import lower
from sim_tests.compress.networks import every_layer_kind, same_network
from sim_tests.compress.test_flow import DIGITS, heldout
from spec.config import Pattern, load
from spec.derive import Sizes
from spec.errors import InputError

HALF = basis.plan(basis.parse("basis:6"))


def plan(text, config=None):
    return basis.plan(basis.parse(text), config)


def kernel(rng, shape=(12, 3, 3, 20)):
    """A kernel whose basis kernels differ in strength, as trained ones do."""
    k, r, s, c = shape
    strength = np.geomspace(1, 0.2, r * s)
    rows = rng.normal(size=(k * c, r * s)) * strength @ np.linalg.qr(rng.normal(size=(r * s, r * s)))[0]
    return rows.reshape(k, c, r, s).transpose(0, 2, 3, 1)


def one_layer(weights, *, name="conv", bias=None, size=(7, 6), **geometry):
    """A network of one convolution."""
    bias = np.zeros(len(weights)) if bias is None else bias
    node = graphs.Conv(name=name, input="x", output="y", weights=weights.astype(np.float32),
                       bias=bias.astype(np.float32), **geometry)
    shape = (*size, weights.shape[3] * node.groups)
    return graphs.Graph(name="one", input="x", output="y", nodes=(node,),
                        shapes={"x": shape, "y": graphs.node_shape(node, shape)})


def samples(graph, rng, *, relu=True, count=6):
    x = rng.normal(size=(count, *graph.shapes[graph.input]))
    return Calibration(x=(np.maximum(x, 0) if relu else x).astype(np.float32), source="test")


# -- method strings ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text,fields", [
    ("basis:6", {}), ("basis:9@0.1", {"count": 9, "density": 0.1}), ("basis:4@1", {"count": 4, "density": 1.0}),
    ("basis:6@2:16", {"pattern": Pattern(2, 16)}), ("basis:e0.9@r8", {"count": None, "energy": 0.9, "rotations": 8}),
    ("basis:e1@4:16@r0", {"count": None, "energy": 1.0, "pattern": Pattern(4, 16), "rotations": 0}),
    ("basis-mix:6@x0.1", {"error": 0.1}),
    ("basis-mix:e0.8@0.25@x0.3", {"count": None, "energy": 0.8, "density": 0.25, "error": 0.3})])
def test_parsed_method(text, fields):
    method = basis.parse(f" {text} ")
    assert method == basis.BasisMethod(**fields) and str(method) == text
    assert methods.parse(text) == methods.Method(text, basis=method) and methods.parse(text).patterns == ()
    assert methods.parse(text).searched == methods.parse(text).mixed == text.startswith("basis-mix")


def test_short_form_of_mix_and_other_kinds():
    assert str(methods.parse("basis-mix")) == "basis-mix:6@x0.1"
    assert [basis.parse(t) for t in ("dense", "nm:2:4", "basin:6", "tasder", "")] == [None] * 5


@pytest.mark.parametrize("text,reason", [
    ("basis", "must be basis:M or basis:eE"), ("basis:", "must be basis:M or basis:eE"),
    ("basis-mix:", "must be basis:M or basis:eE"), ("basis:0", "a number of basis kernels in 1..1024"),
    ("basis:1025", "in 1..1024"), ("basis:six", "in 1..1024"), ("basis:6:4", "in 1..1024"), ("basis:²", "in 1..1024"),
    ("basis:-1", "in 1..1024"), ("basis:e0", "a share of energy above 0 and at most 1"), ("basis:e1.1", "at most 1"),
    ("basis:enan", "at most 1"), ("basis:6@0", "a density above 0"), ("basis:6@1.5", "a density above 0"),
    ("basis:6@5:4", "must be an N:M pattern"), ("basis:6@0:16", "must be an N:M pattern"),
    ("basis:6@", "must have options like"), ("basis:6@x0.1", "must have options like @0.1, @2:16, @r32, not"),
    ("basis:6@-0.1", "must have options like"), ("basis:6@0.1@2:16", "a density or a pattern, not both"),
    ("basis:6@0.1@0.2", "each option once"), ("basis:6@r1@r1", "each option once"),
    ("basis:6@r9999", "a number of rotations in 0..1024"), ("basis:6@r", "a number of rotations"),
    ("basis-mix@x2", "an error above 0"), ("basis-mix@q", "must have options like @0.1, @2:16, @r32, @x0.1"),
    ("bases:6", "did you mean basis?")])
def test_refused_method(text, reason):
    with pytest.raises(InputError) as caught:
        methods.parse(text)
    assert reason in str(caught.value) and "method" in str(caught.value) and "\n" not in str(caught.value)


def test_configuration_decides_group_default_and_width():
    assert plan("basis:6")[1:4] == (0.5, None, 16)
    assert plan("basis:6", load("nm256"))[1:4] == (0.5, None, 16), "no basis engine"
    assert plan("basis:6", load("basis288"))[1:4] == (None, Pattern(8, 16), 16)
    assert plan("basis:6", load("maps288"))[1:4] == (0.5, None, 16)
    assert plan("basis:6@2:16", load("basis252"))[1:4] == (None, Pattern(2, 14), 16), "14 channels in 16 bytes"
    assert plan("basis:6@16:16", load("basis252")).pattern == Pattern(14, 14)
    assert plan("basis:6@1:4", load("tiny_maps"))[1:4] == (None, Pattern(1, 3), 10)
    for text, config in (("basis:6@2:8", None), ("basis:6@2:16", load("tiny_basis"))):
        with pytest.raises(InputError, match="pattern must have M = (16|4), the channels of a group"):
            plan(text, config)


# -- balance and ternarisation -----------------------------------------------------------------------------------------
def test_rotation_balances_the_slices_of_the_same_kernel(rng):
    weights = kernel(rng, (32, 3, 3, 32))
    d = golden.decompose(weights, count=6)
    rotated, before, after = basis.balance(d, 0.1, rotations=32, rng=np.random.default_rng(1))
    assert before > 2 and after < 1.5
    assert before == basis.imbalance(basis.common_threshold(d.coefficients, 0.1))
    assert after == basis.imbalance(basis.common_threshold(rotated.coefficients, 0.1))
    np.testing.assert_allclose(rotated.to_dense(), d.to_dense(), atol=1e-12)
    np.testing.assert_allclose(rotated.basis.reshape(6, 9) @ rotated.basis.reshape(6, 9).T, np.eye(6), atol=1e-12)
    again = basis.balance(d, 0.1, rotations=32, rng=np.random.default_rng(1))[0]
    assert np.array_equal(again.basis, rotated.basis), "seeded"


def test_rotation_is_never_worse_and_none_is_none(rng):
    for seed in range(5):
        d = golden.decompose(kernel(rng), count=4)
        _, before, after = basis.balance(d, 0.25, rotations=3, rng=np.random.default_rng(seed))
        assert after <= before
    for count, rotations, density in ((4, 0, 0.25), (1, 9, 0.25), (4, 9, 1.0)):
        d = golden.decompose(kernel(rng), count=count)
        same, before, after = basis.balance(d, density, rotations=rotations, rng=rng)
        assert same is d and before == after


def test_imbalance_and_common_threshold():
    ce = np.array([[[4.0, 1], [3, -2]]])                                   # densities of m at 3 of 4: 1 and 1/2
    kept = basis.common_threshold(ce, 0.75)
    assert kept.tolist() == [[[True, False], [True, True]]] and basis.imbalance(kept) == pytest.approx(4 / 3)
    assert basis.imbalance(np.zeros((2, 2, 3))) == 1 and basis.imbalance(np.eye(3)[None]) == 1
    assert basis.common_threshold(ce, 0.01).sum() == 1


@pytest.mark.parametrize("density", [0.01, 0.1, 0.37, 0.5, 1])
def test_density_is_exact_in_every_slice(rng, density):
    ce = rng.normal(size=(7, 13, 5)) * [1, 2, 3, 4, 5]
    ternary = basis.ternarize(ce, density=density)
    assert ternary.dtype == np.int8
    for m in range(5):
        kept = ternary[..., m] != 0
        assert kept.sum() == max(1, round(density * 91))
        assert np.array_equal(ternary[..., m][kept], np.sign(ce[..., m][kept]))
        assert density == 1 or np.abs(ce[..., m][kept]).min() >= np.abs(ce[..., m][~kept]).max()


@pytest.mark.parametrize("pattern", [Pattern(1, 4), Pattern(2, 16), Pattern(3, 14), Pattern(16, 16)])
@pytest.mark.parametrize("channels", [16, 30, 5])
def test_pattern_keeps_the_largest_of_each_group_above_the_threshold(rng, pattern, channels):
    ce = rng.normal(size=(6, channels, 3))
    ternary = basis.ternarize(ce, pattern=pattern)
    limit = 0.7 * np.abs(ce).mean(axis=(0, 1))
    for k in range(6):
        for m in range(3):
            for at in range(0, channels, pattern.m):
                part = ce[k, at:at + pattern.m, m]
                order = sorted(range(len(part)), key=lambda i: -abs(part[i]))[:pattern.n]
                want = [np.sign(v) if i in order and abs(v) > limit[m] else 0 for i, v in enumerate(part)]
                assert ternary[k, at:at + pattern.m, m].tolist() == want


# -- scales and descent ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("limits", [{"density": 0.1}, {"density": 0.6}, {"pattern": Pattern(2, 16)}])
def test_no_step_raises_the_error(limits):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        weights = kernel(rng)
        d = golden.decompose(weights, count=5)
        rows = weights.transpose(0, 3, 1, 2).reshape(12, 20, 9)
        flat, ternary = d.basis.reshape(5, 9), basis.ternarize(d.coefficients, **limits)

        def error(t, alpha, b, rows=rows):
            return float(((rows - alpha[:, None, None] * (t @ b)) ** 2).sum())

        alone = basis.rank_one(d.coefficients, ternary, sweeps=0)
        assert np.array_equal(alone[1], np.ones(5))
        previous = error(ternary, alone[0], flat)
        best = np.einsum("kcm,kcm->k", d.coefficients, ternary) / np.abs(ternary).sum(axis=(1, 2))
        np.testing.assert_allclose(alone[0], best, err_msg="the optimum of each alpha")
        for sweeps in (1, 2, 20):
            alpha, beta = basis.rank_one(d.coefficients, ternary, sweeps=sweeps)
            assert error(ternary, alpha, beta[:, None] * flat) <= previous * (1 + 1e-12)
            previous = error(ternary, alpha, beta[:, None] * flat)
        state = ternary, alpha, beta[:, None] * flat
        for _ in range(6):
            state = basis.descend(rows, *state, **limits, sweeps=1)
            assert error(*state) <= previous * (1 + 1e-12)
            previous = error(*state)
        assert (state[1] >= 0).all() and set(np.unique(state[0])) <= {-1, 0, 1}


def test_rank_one_finds_rank_one_coefficients(rng):
    alpha, beta = rng.uniform(0.5, 2, 8), rng.uniform(0.5, 2, 4)
    ternary = rng.integers(-1, 2, (8, 10, 4)).astype(np.int8)
    got = basis.rank_one(alpha[:, None, None] * ternary * beta, ternary)
    np.testing.assert_allclose(np.outer(*got), np.outer(alpha, beta), rtol=1e-9)


def test_descent_finds_scales_of_outputs(rng):
    """From alpha = 1, rows that are exactly alpha T B: the error vanishes only if alpha is fitted too."""
    ternary = basis.ternarize(rng.normal(size=(8, 60, 3)), density=0.5)
    kernels = np.linalg.qr(rng.normal(size=(9, 3)))[0].T
    alpha = np.geomspace(1, 1.5, 8)
    rows = alpha[:, None, None] * (ternary @ kernels)
    got = basis.descend(rows, ternary, np.ones(8), kernels, density=0.5, sweeps=30)
    assert np.array_equal(got[0], ternary)
    np.testing.assert_allclose(got[1][:, None, None] * (got[0] @ got[2]), rows, atol=1e-6)
    np.testing.assert_allclose(got[1] / got[1][0], alpha, rtol=1e-6)


def hadamard_layer():
    """An int8-exact kernel that is ternary coefficients times nine one-hot kernels, which SVD has to find."""
    h = np.array([[1]])
    for _ in range(8):
        h = np.block([[h, h], [h, -h]])
    ternary = h[:, [1, 2, 4, 7, 8, 16, 31, 64, 100]].reshape(16, 16, 9)       # orthogonal columns
    values = np.diag([127, 113, 101, 89, 77, 65, 53, 41, 29]).reshape(9, 3, 3)
    return np.einsum("kcm,mrs->krsc", ternary, values)


@pytest.mark.parametrize("geometry", [{"pads": (1, 1, 1, 1)}, {"stride": (2, 1), "pads": (0, 1, 2, 1)},
                                      {"dilation": (2, 2), "pads": (1, 2, 1, 0)}])
def test_all_basis_kernels_and_dense_coefficients_are_the_dense_layer(rng, geometry):
    """M = R S, all coefficients +-1: the same integers as the dense int8 layer, bit for bit."""
    weights = hadamard_layer() / 127
    graph = one_layer(weights, bias=rng.normal(size=16), **geometry)
    data = samples(graph, rng, relu=False)
    dense, layered = (quantize(graph, data, m) for m in ("dense", "basis:9@1"))
    layer = layered.layers[0]
    assert isinstance(layer, BasisConvolution) and layer.format == "basis:9@1"
    assert np.count_nonzero(layer.coefficients) == layer.coefficients.size
    assert np.array_equal(layer.effective_weights(), dense.layers[0].effective_weights())
    assert np.array_equal(layer.effective_weights(), hadamard_layer())
    assert layer.metrics["energy"] == pytest.approx(1) and layer.metrics["weight_error"] < 1e-6
    x = engine.quantize_input(dense, data.x)
    want = engine.run(dense, x)
    assert np.array_equal(engine.run(layered, x), want) and len(np.unique(want)) > 50


def test_full_count_keeps_all_energy_and_less_keeps_less(rng):
    kept = [basis.fit(kernel(np.random.default_rng(3)), plan(f"basis:{m}@0.5"), rng=rng)[1]["energy"]
            for m in range(1, 10)]
    assert kept == sorted(kept) and kept[-1] == pytest.approx(1)
    facts = basis.fit(kernel(np.random.default_rng(3)), plan("basis:e0.9@0.5"), rng=rng)[1]
    assert facts["count"] == next(m for m, e in enumerate(kept, 1) if e >= 0.9) and facts["energy"] >= 0.9
    assert basis.fit(kernel(rng), plan("basis:64"), rng=rng)[1]["count"] == 9


@pytest.mark.parametrize("text", ["basis:6@0.1", "basis:9@0.5", "basis:4@2:16", "basis:6@8:16"])
def test_fit_honours_density_or_pattern_and_reports_its_errors(rng, text):
    weights, p = kernel(rng, (24, 3, 3, 40)), plan(text)
    d, facts = basis.fit(weights, p, rng=np.random.default_rng(0))
    m = facts["count"]
    if p.pattern is None:
        assert np.count_nonzero(d.coefficients, axis=(0, 1)).tolist() == [round(p.density * 960)] * m
        assert facts["imbalance"] == 1
    else:
        assert structured.fits(d.coefficients, p.pattern, axis=1)
        assert np.count_nonzero(d.coefficients) > 0.6 * p.pattern.density * d.coefficients.size
    error = np.linalg.norm(d.to_dense() - weights) / np.linalg.norm(weights)
    assert facts["weight_error"] == pytest.approx(error) and facts["energy_ternary"] == pytest.approx(1 - error ** 2)
    assert facts["weight_error"] < facts["weight_error_rank_one"] <= facts["weight_error_alpha"] * (1 + 1e-9)
    assert facts["energy_ternary"] <= facts["energy"] and (d.alpha > 0).all() and np.abs(d.basis).max() == 127


# -- layers of a network -----------------------------------------------------------------------------------------------
def test_layers_that_stay_dense_say_why(rng):
    graph = onnx_import.parse(every_layer_kind(np.random.default_rng(0)).SerializeToString())
    network = quantize(graph, samples(graph, rng), "basis:6")
    found = {v.name: v.metrics.get("kept_dense") for v in network.layers if hasattr(v, "metrics")}
    kinds = [type(v).__name__ for v in network.layers if hasattr(v, "metrics")]
    assert list(found.values()) == ["3 input channels, fewer than 8", None, None, "depthwise", "fully connected"]
    assert kinds == ["Convolution", "BasisConvolution", "BasisConvolution", "Convolution", "Convolution"]
    first, depthwise, full = (list(found)[i] for i in (0, 3, 4))
    dense = methods.parse("dense")
    four, data = methods.parse("basis:4"), samples(graph, rng)
    named = quantize(graph, data, methods.Recipe(default=dense, layers={first: four}))
    assert isinstance(named.layers[0], BasisConvolution) and isinstance(named.layers[1], Convolution)
    for name, reason in ((depthwise, "depthwise"), (full, "fully connected")):
        with pytest.raises(InputError, match=rf"layers.{name} must not be a basis method: the layer is {reason}"):
            quantize(graph, data, methods.Recipe(default=dense, layers={name: four}))


@pytest.mark.parametrize("weights,geometry,reason", [
    (np.ones((4, 1, 1, 16)), {}, "1x1"), (np.ones((4, 3, 3, 8)), {"groups": 2}, "grouped"),
    (np.ones((4, 3, 3, 7)), {}, "7 input channels, fewer than 8"), (np.zeros((4, 3, 3, 8)), {}, "all weights are zero"),
    (np.ones((4, 7, 6, 8)), {}, "fully connected")])
def test_reasons(rng, weights, geometry, reason):
    graph = one_layer(weights, **geometry)
    layer = quantize(graph, samples(graph, rng), "basis:6").layers[0]
    assert isinstance(layer, Convolution) and layer.metrics["kept_dense"] == reason


def test_requantisation_folds_no_zero_point(rng):
    """Real outputs follow from q - zero_point, the layer's scales and its bias alone."""
    weights = kernel(rng)
    graph = one_layer(weights, bias=rng.normal(size=12), pads=(1, 1, 1, 1))
    data = samples(graph, rng, relu=False)
    network = quantize(graph, data, "basis:9@0.5", bias_correction=False)
    layer, source, output = network.layers[0], network.tensors["x"], network.tensors["y"]
    assert source.zero_point != -128
    np.testing.assert_allclose(layer.requantization.bias * layer.weight_scale * source.scale, graph.nodes[0].bias,
                               atol=float((layer.weight_scale * source.scale).max()))
    real = layer.effective_weights() * layer.weight_scale[:, None, None, None]
    inputs = source.scale * (engine.quantize_input(network, data.x).astype(np.float64) - source.zero_point)
    want = graphs.convolve(inputs, real, pads=(1, 1, 1, 1)) + graph.nodes[0].bias
    ends = [output.scale * (end - output.zero_point) for end in (-128, 127)]
    assert np.abs(engine.predict(network, data.x) - np.clip(want, *ends)).max() < 0.51 * output.scale


def test_corrections_take_out_mean_and_shrinkage(rng):
    weights = kernel(rng, (16, 3, 3, 32))
    graph = one_layer(weights, bias=rng.normal(size=16), pads=(1, 1, 1, 1))
    data = samples(graph, rng, count=20)
    plain, corrected = (quantize(graph, data, "basis:6@0.1", bias_correction=c) for c in (False, True))
    exact = graphs.forward(graph, data.x).reshape(-1, 16)
    errors, means, slopes = [], [], []
    for network in (plain, corrected):
        got = engine.predict(network, data.x).reshape(-1, 16)
        means.append(np.abs((got - exact).mean(axis=0)).max())
        g, e = got - got.mean(axis=0), exact - exact.mean(axis=0)
        slopes.append((g * e).sum(axis=0) / (g * g).sum(axis=0))
        errors.append(np.linalg.norm(got - exact))
    assert means[1] < 0.1 * means[0] and errors[1] < errors[0]
    assert np.abs(slopes[1] - 1).max() < 0.05 < np.abs(slopes[0] - 1).max()


def test_large_bias_silences_its_output(rng):
    weights = kernel(rng)
    weights[3] *= 1e-12
    bias = np.zeros(12)
    bias[3] = 40.0
    graph = one_layer(weights, bias=bias, pads=(1, 1, 1, 1))
    data = samples(graph, rng)
    network = quantize(graph, data, "basis:6@0.5")
    validate.network(network)
    layer = network.layers[0]
    assert isinstance(layer, BasisConvolution) and not layer.coefficients[3].any() and layer.coefficients[4].any()
    got = engine.predict(network, data.x)[..., 3]
    assert np.abs(got - 40).max() <= network.tensors["y"].scale


def test_output_error_is_measured_on_the_calibration_data(rng):
    graph = one_layer(kernel(rng), pads=(1, 1, 1, 1))
    data = samples(graph, rng)
    quantizer = Quantizer(graph, data)
    layer = quantizer.layer(graph.nodes[0], methods.parse("basis:6@0.3"))
    values, scale = quantizer.weights["conv"]
    dense = graphs.convolve(data.x, values * scale[:, None, None, None], pads=(1, 1, 1, 1))
    kept = graphs.convolve(data.x, layer.effective_weights() * layer.weight_scale[:, None, None, None],
                           pads=(1, 1, 1, 1))
    error = np.linalg.norm(dense - kept) / np.linalg.norm(dense)
    assert layer.metrics["output_error"] == pytest.approx(error, rel=1e-5) and 0.1 < error < 1


def test_repeatable_and_seeded(rng):
    graph = one_layer(kernel(rng, (32, 3, 3, 32)), pads=(1, 1, 1, 1))
    data = samples(graph, rng)
    one, two, other = (quantize(graph, data, "basis:6@0.1", seed=s) for s in (0, 0, 1))
    same_network(one, two)
    assert not np.array_equal(one.layers[0].basis, other.layers[0].basis)


# -- given factors -----------------------------------------------------------------------------------------------------
def factors(rng, shape=(12, 3, 3, 20), count=6, density=0.1):
    """(weights [K, R, S, C], basis, coefficients) that rebuild them, with positive and negative scales of outputs."""
    k, r, s, c = shape
    made = rng.integers(-127, 128, (count, r, s)) / 64
    made[0, 0, 0] = 127 / 64
    ternary = basis.ternarize(rng.normal(size=(k, c, count)), density=density)
    alpha = rng.uniform(0.5, 2, k) * np.where(np.arange(k) % 3 == 1, -1, 1)
    return np.einsum("k,kcm,mrs->krsc", alpha, ternary, made), made, ternary


@pytest.mark.parametrize("config", [None, "maps288", "basis288"])
def test_given_factors_are_the_layer(rng, config):
    weights, made, ternary = factors(rng)
    graph = one_layer(weights, bias=rng.normal(size=12), pads=(1, 1, 1, 1))
    data = samples(graph, rng)
    quantizer = Quantizer(graph, data, config=config and load(config), decompositions={"conv": (made, ternary)})
    network = quantizer.network("basis:6")
    validate.network(network)
    layer = network.layers[0]
    assert np.array_equal(layer.basis, np.round(made * 64)), "int8 already"
    flipped = np.where(np.arange(12) % 3 == 1, -1, 1)[:, None, None] * ternary
    assert np.array_equal(layer.coefficients, np.where(ternary.any(axis=(1, 2), keepdims=True), flipped, 0))
    np.testing.assert_allclose(layer.effective_weights() * layer.weight_scale[:, None, None, None],
                               graph.nodes[0].weights, atol=1e-6)
    facts = layer.metrics
    assert facts["retrained"] and facts["weight_error"] < 1e-6 and facts["output_error"] < 1e-6
    assert facts["nonzeros"] == np.count_nonzero(ternary) and facts["density"] == facts["nonzeros"] / ternary.size
    if config == "basis288":
        most = max(np.count_nonzero(ternary[:, at:at + 16], axis=1).max() for at in (0, 16))
        assert layer.pattern == (most, 16) and layer.format == f"basis:6@{most}:16"
    else:
        assert layer.pattern is None and layer.format == f"basis:6@{facts['density']:g}"
    exact = np.clip(graphs.forward(graph, data.x), *(network.tensors["y"].scale * (v - network.tensors["y"].zero_point)
                                                     for v in (-128, 127)))
    inputs = network.tensors["x"].scale
    reach = np.abs(graph.nodes[0].weights).sum(axis=(1, 2, 3)).max() * inputs / 2     # rounding of the input
    assert np.abs(engine.predict(network, data.x) - exact).max() < 0.51 * network.tensors["y"].scale + reach
    assert quantize(graph, data, "basis:6").layers[0].metrics["retrained"] is False


def test_given_factors_run_on_the_golden_machine(rng):
    config = load("maps288")
    weights, made, ternary = factors(rng, (16, 3, 3, 16))
    graph = one_layer(weights, pads=(1, 1, 1, 1))
    data = samples(graph, rng, count=1)
    network = Quantizer(graph, data, config=config, decompositions={"conv": (made, ternary)}).network("basis:6")
    x, low = engine.quantize_input(network, data.x), lower(network, config)
    memory = low.new_memory()
    low.write_tensor(memory, network.input, x)
    machine = Machine(config, memory)
    machine.run(low.program_offset, low.instruction_count)
    np.testing.assert_array_equal(low.read_tensor(machine.memory, network.output), engine.run(network, x))


def test_outputs_without_weights_have_no_coefficients(rng):
    weights, made, ternary = factors(rng)
    weights[3] = 0                                           # batch normalisation with a factor of 0
    d, facts = basis.given(weights, HALF, made, ternary)
    assert not d.coefficients[3].any() and d.alpha[3] == 1 and d.coefficients[4].any() and facts["weight_error"] < 1e-9


def test_float_basis_is_rounded_once(rng):
    weights, made, ternary = factors(rng)
    made = made * (1 + 0.001 * rng.normal(size=made.shape))
    d, facts = basis.given(np.einsum("kcm,mrs->krsc", ternary, made), HALF, made, ternary)
    q, scale = quantize_rows(made[None])
    assert np.array_equal(d.basis, q[0]) and d.scale == scale[0] and 0 < facts["weight_error"] < 0.01
    np.testing.assert_allclose(d.alpha, 1, atol=0.01)


@pytest.mark.parametrize("change,method,text", [
    (lambda w, b, t: (w, b[:, :2], t), "basis:6", "decompositions.conv.basis must be finite floats"),
    (lambda w, b, t: (w, b * np.nan, t), "basis:6", "decompositions.conv.basis must be finite floats"),
    (lambda w, b, t: (w, b, t[..., :3]), "basis:6", "decompositions.conv.coefficients must be -1, 0 or 1"),
    (lambda w, b, t: (w, b, 2 * t), "basis:6", "coefficients must be -1, 0 or 1"),
    (lambda w, b, t: (w, b, t.astype(float)), "basis:6", "coefficients must be -1, 0 or 1"),
    (lambda w, b, t: (w, b, t), "basis:4", "basis must have at most 4 kernels for basis:4, not 6"),
    (lambda w, b, t: (w, b, t), "basis:6@0.05", "must have a density of at most 0.05 for basis:6@0.05, not 0.1"),
    (lambda w, b, t: (w, b, t), "basis:6@1:16", "coefficients must have at most 1 non-zeros in each 16 channels"),
    (lambda w, b, t: (w[::-1], b, t), "basis:6", "must rebuild the layer's weights (relative error at most 0.05)")])
def test_refused_factors(rng, change, method, text):
    weights, made, ternary = change(*factors(rng))
    graph = one_layer(weights)
    quantizer = Quantizer(graph, samples(graph, rng), decompositions={"conv": (made, ternary)})
    with pytest.raises(InputError) as caught:
        quantizer.network(method)
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_factors_of_an_unknown_layer_are_refused(rng):
    graph = one_layer(kernel(rng))
    with pytest.raises(InputError, match="decompositions.con is not a layer with weights; layers: conv"):
        Quantizer(graph, samples(graph, rng), decompositions={"con": (None, None)})


# -- saturation and accumulators ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("zero_point", [-128, 0, 5, 127])
def test_saturation_bound_is_tight(rng, zero_point):
    for seed in range(20):
        ce = np.random.default_rng(seed).integers(-1, 2, (3, 40, 2)).astype(np.int8)
        low, high = -128 - zero_point, 127 - zero_point
        ends = np.where(ce == 1, high, np.where(ce == -1, low, 0)), np.where(ce == 1, low, np.where(ce == -1, high, 0))
        most, least = ((ce * e).sum(axis=1, dtype=np.int64) for e in ends)
        exact = golden.signed_bits(least.min(), most.max())
        assert not basis.can_saturate(ce, zero_point, exact) and basis.can_saturate(ce, zero_point, exact - 1)


def test_saturations_are_counted_as_the_golden_model_counts(rng):
    ce = rng.integers(-1, 2, (5, 24, 3)).astype(np.int8)
    x = rng.integers(-128, 128, (4, 5, 6, 24)).astype(np.int8)
    d = golden.IntegerDecomposition(basis=np.ones((3, 1, 1), np.int8), coefficients=ce)
    for bits in (8, 10, 12):
        want = d.run(x.astype(np.int16) + 7, intermediate_bits=bits)
        assert basis.saturation(ce, x, -7, bits) == (want.saturations, 4 * 30 * 15, want.exact_bits)
    assert basis.saturation(ce, x, -7, 8).saturations > 0


def test_metrics_count_saturations_of_a_narrow_configuration(rng):
    graph = one_layer(np.abs(kernel(rng, (12, 3, 3, 48))), pads=(1, 1, 1, 1))
    data = samples(graph, rng)
    layer = quantize(graph, data, "basis:1@0.9", config=load("tiny_maps")).layers[0]
    assert layer.intermediate_bits == 10 and layer.metrics["exact_intermediate_bits"] > 10
    assert 0 < layer.metrics["saturations"] <= layer.metrics["intermediates_checked"] == 6 * 42 * 12
    wide = quantize(graph, data, "basis:1@0.9").layers[0]
    assert wide.intermediate_bits == 16 and wide.metrics["saturations"] == 0


def test_accumulator_bound_holds_for_the_worst_input(rng):
    kernels = rng.integers(-128, 128, (3, 3, 3)).astype(np.int8)
    ce = rng.integers(-1, 2, (4, 20, 3)).astype(np.int8)
    for bits in (8, 16):
        bound = basis.largest_accumulator(kernels, ce, -128, bits)
        weights = np.einsum("kcm,mrs->krsc", ce.astype(int), kernels.astype(int))
        x = np.where(weights[0] > 0, 127, -128).astype(np.int16)[None] + 128
        acc = golden.IntegerDecomposition(basis=kernels, coefficients=ce).run(x, intermediate_bits=bits).output
        assert np.abs(acc).max() <= bound
    one = np.ones((1, 1, 1), np.int8)
    assert basis.largest_accumulator(one, np.ones((1, 10, 1), np.int8), -128, 16) == 2550
    assert basis.largest_accumulator(one, np.ones((1, 10, 1), np.int8), -128, 8) == 128


# -- storage -----------------------------------------------------------------------------------------------------------
def tiles(ce, config):
    """Coefficients [K, C, M] as the hardware's tiles [blocks, slices, groups, group], one by one."""
    b, sizes = config.basis, Sizes(config)
    placed = basis.positions(ce, sizes).transpose(0, 3, 1, 2)
    for part in range(0, ce.shape[2], b.slices):
        for at in range(0, len(placed), b.blocks):
            out = np.zeros((b.blocks, b.slices, placed.shape[2], b.group), np.int8)
            mine = placed[at:at + b.blocks, part:part + b.slices]
            out[:len(mine), :mine.shape[1], :, :mine.shape[3]] = mine
            yield out


@pytest.mark.parametrize("preset", ["maps288", "tiny_maps", "basis288", "basis252", "tiny_basis"])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(16, 40, 6), (5, 7, 3)])
def test_our_encoding_has_the_bits_of_the_real_one(rng, preset, density, shape):
    config = load(preset)
    ce = (rng.choice([-1, 1], shape) * (rng.random(shape) < density)).astype(np.int8)
    if preset == "tiny_maps":
        ce = ce[:, :20]
    kernels, sizes = np.ones((shape[2], 3, 3), np.int8), Sizes(config)
    held = basis.storage(kernels, ce, sizes)
    if config.basis.coefficients == "maps":
        want = sum(len(formats.pack_maps(t, config)) for t in tiles(ce, config))
        assert held["maps"] == 8 * want + 72 * shape[2]
    else:
        most = max(int(np.count_nonzero(t, axis=3).max()) for t in tiles(ce, config))
        groups = -(-shape[1] // sizes.group_channels)
        terms = formats.cheapest_series(most, groups, config)
        if formats.series_words(groups, terms, config) <= config.basis.coefficient_rows:
            want = sum(len(formats.pack_series(t, config, terms)) for t in tiles(ce, config))
            assert held["series"] == 8 * want + 72 * shape[2]
    assert held["values"] == 2 * np.count_nonzero(ce) + 72 * shape[2] <= held["maps"]
    assert held["entropy"] <= 2 * ce.size + 72 * shape[2]


def test_compression_of_three_accountings(rng):
    """16 outputs, 32 channels, M = 6, a tenth of 3072 coefficients: 147456 bits of fp32."""
    graph = one_layer(kernel(rng, (16, 3, 3, 32)), pads=(1, 1, 1, 1))
    metrics = quantize(graph, samples(graph, rng), "basis:6@0.1").layers[0].metrics
    per_m = round(0.1 * 512)
    assert metrics["nonzeros"] == 6 * per_m and metrics["bits_values"] == 12 * per_m + 432
    assert metrics["compression_values"] == pytest.approx(147456 / (12 * per_m + 432))
    p = 6 * per_m / 3072
    entropy = 3072 * -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) + 6 * per_m + 432
    assert metrics["compression_entropy"] == pytest.approx(147456 / entropy)
    assert metrics["bits"] == metrics["bits_maps"] and metrics["dense_bits"] == 147456 // 4
    assert metrics["compression_values"] > metrics["compression_entropy"] > metrics["compression_maps"]
    pattern = quantize(graph, samples(graph, rng), "basis:6@2:16").layers[0].metrics
    assert pattern["bits"] == pattern["bits_series"] and pattern["pattern_density"] == 0.125


# -- the demo network --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method,least", [("basis:9@0.5", 0.97), ("basis:6", 0.93), ("basis:6@8:16", 0.95)])
def test_accuracy_of_the_demo_network_without_retraining(method, least):
    network = flow.compress_model(DIGITS, method, calibration="demo:calibration", validation="demo:validation")
    x, labels = (demo.digits("validation")[i] for i in (0, 1))
    facts = network.provenance["accuracy"]
    assert facts["compressed"] == engine.accuracy(network, graphs.to_nhwc(x, (8, 8, 1)), labels) < facts["float"]
    assert (facts["samples"], facts["retrained"]) == (250, False) and "validation" in facts["split"]
    assert engine.accuracy(network, *heldout()) >= least
    assert [type(v).__name__ for v in network.layers if hasattr(v, "metrics")] == \
        ["Convolution", "BasisConvolution", "BasisConvolution", "BasisConvolution", "Convolution"]


@pytest.mark.parametrize("preset,method", [("full", "basis-mix:9@0.5@x0.3"), ("basis252", "basis:6@3:14"),
                                           ("maps288", "basis:6@0.25")])
def test_compressed_network_runs_bit_exactly_on_the_golden_machine(preset, method):
    config = load(preset)
    network = flow.compress_model(DIGITS, method, config=config, calibration="demo:calibration")
    assert any(isinstance(v, BasisConvolution) for v in network.layers)
    x = engine.quantize_input(network, heldout()[0][:1])
    want, low = engine.run(network, x, keep=True), lower(network, config)
    memory = low.new_memory()
    low.write_tensor(memory, network.input, x)
    machine = Machine(config, memory)
    machine.run(low.program_offset, low.instruction_count)
    assert set(low.outputs) >= {network.output}
    for name in low.outputs:
        np.testing.assert_array_equal(low.read_tensor(machine.memory, name), want[name], err_msg=name)


def test_few_coefficients_without_retraining_are_reported_as_ruinous():
    network = flow.compress_model(DIGITS, "basis:4@0.05", calibration="demo:calibration")
    facts = network.provenance["accuracy"]
    assert facts["compressed"] < 0.5 < facts["float"] and "calibration" in facts["split"]


def test_recipe_file_and_round_trip(tmp_path):
    (tmp_path / "r.yaml").write_text("method: nm:2:4\nlayers: {block_a: 'basis:6@2:16', conv2: 'basis:e0.9@0.3'}\n",
                                     encoding="utf-8")
    network = flow.compress_model(DIGITS, str(tmp_path / "r.yaml"), config="full", calibration="demo:calibration")
    formats_ = {v.name: v.format for v in network.layers if hasattr(v, "metrics")}
    assert formats_["block_a"] == "basis:6@2:16" and formats_["conv2"].startswith("basis:8@0.3")
    assert formats_["block_b"] == "nm:2:4" and network.provenance["method"]["layers"]["conv2"] == "basis:e0.9@0.3"
    package.save(network, tmp_path / "n.sum", packed=True)
    loaded = package.load(tmp_path / "n.sum")
    same_network(loaded, network)
    x = engine.quantize_input(network, heldout()[0][:8])
    assert np.array_equal(engine.run(loaded, x), engine.run(network, x))


@pytest.mark.parametrize("options,text", [
    ({"method": "basis-mix"}, "basis-mix needs a configuration"),
    ({"method": "basis:6", "permutation": True}, "permutation must not be asked for with basis methods"),
    ({"method": "basis:6@2:8"}, "pattern must have M = 16"),
    ({"method": "tasder", "config": "basis288"}, "structured must be there for a structured layer, not 'none'")])
def test_refusals_of_the_flow(options, text):
    with pytest.raises(InputError, match=text):
        flow.compress_model(DIGITS, **({"calibration": "demo:calibration"} | options))


def test_searched_methods_are_refused_where_nothing_searches(tmp_path, rng):
    graph = one_layer(kernel(rng))
    with pytest.raises(InputError, match="basis-mix must be searched"):
        quantize(graph, samples(graph, rng), "basis-mix")
    (tmp_path / "r.yaml").write_text("method: dense\nlayers: {a: basis-mix}\n", encoding="utf-8")
    with pytest.raises(InputError, match="layers.a must not be basis-mix: the search covers the whole network"):
        methods.recipe(tmp_path / "r.yaml")


def test_scales_or_sums_that_do_not_fit_stay_dense(rng, monkeypatch):
    graph = one_layer(kernel(rng))
    data = samples(graph, rng)
    monkeypatch.setattr(basis, "largest_accumulator", lambda *_: 1 << 31)
    assert quantize(graph, data, "basis:6").layers[0].metrics["kept_dense"] == "could leave the 32-bit accumulator"
    quantizer = Quantizer(graph, data)
    quantizer.tensors["y"] = replace(quantizer.tensors["y"], scale=1e-9)
    quantizer.weights["conv"] = quantizer.weights["conv"][0], np.full(12, 1e-12)
    layer = quantizer.layer(graph.nodes[0], methods.parse("basis:6"))
    assert layer.metrics["kept_dense"] == "scales of the basis layer do not fit"
