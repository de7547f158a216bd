"""Integer fine-tuning: the module's tensors are golden's, untrained networks come back unchanged, gradients are those
of the real-valued network, limits hold, and accuracy rises."""
from dataclasses import replace
import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

from compress import demo, engine, onnx_import, validate  # noqa: E402 (they follow the skip)
from compress import graph as graphs  # noqa: E402
from compress.network import BasisConvolution, Convolution  # noqa: E402
from compress.quantize import Calibration, quantize  # noqa: E402
from compress.training import integer  # noqa: E402
from compress.training.integer import IntegerNetwork  # noqa: E402
from golden import convolution, requantize, structured  # noqa: E402
from sim_tests.compress.networks import small_network  # noqa: E402
from sim_tests.compress.onnx_models import random_model  # noqa: E402
from sim_tests.compress.test_engine import basis_network  # noqa: E402
from spec.config import IntSpec  # noqa: E402
from spec.errors import InputError  # noqa: E402
from torch.nn import functional  # noqa: E402

MODEL = Path(__file__).resolve().parents[3] / "models" / "digits.onnx"
METHODS = ("dense", "nm:2:4", "tasd:2:8+1:8", "basis:6", "basis:4@2:16")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def same_arrays(a, b):
    """Asserts that layers and tensors are equal in everything but figures; every element."""
    assert a.tensors == b.tensors and len(a.layers) == len(b.layers)
    for one, two in zip(a.layers, b.layers):
        assert (type(one), one.name, one.input, one.output, one.residual) == (
            type(two), two.name, two.input, two.output, two.residual)
        for key, value in vars(one.requantization).items():
            other = getattr(two.requantization, key)
            assert np.array_equal(value, other) and getattr(value, "dtype", 0) == getattr(other, "dtype", 0), key
        for s, t in zip(getattr(one, "terms", ()), getattr(two, "terms", ()), strict=True):
            assert s.pattern == t.pattern and t.values.dtype == np.int8 and np.array_equal(s.values, t.values)
        for key in ("basis", "coefficients", "weight_scale"):
            if getattr(one, key, None) is not None:
                assert np.array_equal(getattr(one, key), getattr(two, key)), key


def equals_golden(module, x):
    """Asserts that module and golden agree in every element of every tensor and in the outputs; returns the network."""
    network = module.to_network()
    want = engine.run(network, engine.quantize_input(network, x), keep=True)
    got = module.tensors(nchw(x))
    assert want.keys() == got.keys()
    for name, array in want.items():
        assert got[name].dtype == np.int8 and np.array_equal(got[name], array), name
    logits = module.eval()(nchw(x)).detach().numpy()
    real = graphs.to_nchw(engine.dequantize_output(network, want[network.output])).reshape(len(x), -1)
    np.testing.assert_allclose(logits, real, rtol=1e-6, atol=0)
    return network


def train(module, x, *, steps=3, rate=0.05, classes=3):
    """Some steps towards arbitrary labels; the last loss, 0 for a network without weights."""
    if not list(module.parameters()):
        return 0.0
    labels = torch.arange(len(x)) % classes
    optimizer = torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9)
    for _ in range(steps):
        loss = functional.cross_entropy(module(nchw(x)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


# -- the whole network -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("learn", integer.LEARNED)
@pytest.mark.parametrize("method", METHODS)
def test_untrained_is_the_package_and_trained_is_golden(method, learn):
    network, x, graph = small_network(method)
    module = IntegerNetwork(network, graph if learn in ("none", "all") else None, learn_scales=learn)
    same_arrays(network, module.to_network())
    equals_golden(module, x)
    train(module, x)
    trained = equals_golden(module, x)
    assert any(not np.array_equal(a.effective_weights(), b.effective_weights())
               for a, b in zip(network.layers, trained.layers) if hasattr(a, "weight_scale"))
    moved = [trained.tensors[n].scale != t.scale for n, t in network.tensors.items() if n != network.input]
    assert any(moved) == (learn in ("activations", "all"))
    assert network.tensors[network.input] == trained.tensors[network.input]


@pytest.mark.parametrize("number", range(12))
def test_random_networks(rng, number):
    """Any layer kinds, pads, strides, groups and dilations, with steps and with random parameters."""
    model, _ = random_model(rng)
    graph = onnx_import.parse(model.SerializeToString(), name="random")
    x = rng.normal(0, 1, (5, *graph.shapes[graph.input])).astype(np.float32)
    network = quantize(graph, Calibration(x=x, source="test"), METHODS[number % 3])
    module = IntegerNetwork(network, graph if number // 4 % 2 else None, learn_scales=integer.LEARNED[number % 4])
    same_arrays(network, module.to_network())
    train(module, x, steps=2, classes=math.prod(graph.shapes[graph.output]))
    equals_golden(module, x)
    with torch.no_grad():
        for p in module.parameters():
            noise = torch.from_numpy(rng.normal(0, 1, p.shape))
            p.add_(noise * (p.abs().mean() if number < 8 else 30 * p.abs().max() + 1))
    equals_golden(module, x)


@pytest.mark.parametrize("bits", [9, 12, 16])
@pytest.mark.parametrize("zero_point", [-128, -7, 127])
def test_basis_layer_with_and_without_saturation(rng, bits, zero_point):
    """9 and 12 bits saturate; the layer has no weight scales of its own."""
    network, q = basis_network(rng, bits=bits, zero_point=zero_point)
    x = (0.5 * (q.astype(np.float32) - zero_point))
    for learn in ("none", "all"):
        module = IntegerNetwork(network, learn_scales=learn)
        assert module.layers[0].saturates == (bits < 16)
        same_arrays(network, module.to_network())
        equals_golden(module, x)
        train(module, x, rate=1.0, classes=5)
        trained = equals_golden(module, x).layers[0]
        assert not np.array_equal(trained.basis, network.layers[0].basis)
        assert (trained.weight_scale is None) == (learn == "none")
        assert np.array_equal(trained.coefficients, network.layers[0].coefficients)


def test_figures_and_provenance_of_a_trained_package():
    network, x, _ = small_network("nm:2:4")
    network = replace(network, provenance=network.provenance | {"accuracy": {"float": 1.0}})
    module = IntegerNetwork(network)
    train(module, x)
    trained = module.to_network()
    assert trained.provenance["retrained"] is True and "accuracy" not in trained.provenance
    for layer in trained.layers:
        if isinstance(layer, Convolution):
            m = layer.metrics
            assert m["retrained"] is True and m["nonzeros"] == np.count_nonzero(layer.effective_weights())
            assert m["density"] == m["nonzeros"] / layer.terms[0].values.size and "output_error" not in m
            assert m["bits"] > 0


# -- masks -------------------------------------------------------------------------------------------------------------
def test_masks_hold_and_chosen_zeros_return():
    """Weights that the pattern left out stay 0; one that it chose and rounding made 0 comes back, with the graph."""
    network, x, graph = small_network("tasd:2:8+1:8")
    index = next(i for i, layer in enumerate(network.layers)
                 if isinstance(layer, Convolution) and len(layer.terms) == 2)
    layer = network.layers[index]
    node = next(n for n in graph.convolutions if n.name == layer.name)
    weights = node.weights.copy()
    chosen, _ = structured.tasd_series(np.abs(weights), [t.pattern for t in layer.terms])
    where = tuple(np.argwhere(chosen[0] != 0)[0])
    peers = [n for n in range(weights.shape[3]) if chosen[0][(*where[:3], n)] == 0]
    weights[(*where[:3], peers)] = 0                                 # so that the tiny weight is still chosen
    weights[where] = 0.3 * layer.weight_scale[where[0]]
    graph = replace(graph, nodes=tuple(replace(n, weights=weights) if n is node else n for n in graph.nodes))
    network = quantize(graph, Calibration(x=x, source="test"), "tasd:2:8+1:8")
    layer = network.layers[index]
    assert layer.effective_weights()[where] == 0
    for source, comes_back in ((graph, True), (None, False)):
        module = IntegerNetwork(network, source)
        with torch.no_grad():
            module.layers[index].weight += 4 * float(layer.weight_scale[where[0]])
        trained = module.to_network().layers[index]
        assert (trained.effective_weights()[where] != 0) == comes_back
        keep = [c != 0 for c in structured.tasd_series(np.abs(weights), [t.pattern for t in layer.terms])[0]] \
            if comes_back else [t.values != 0 for t in layer.terms]
        for term, mask in zip(trained.terms, keep):
            assert structured.fits(term.values, term.pattern) and not term.values[~mask].any()
        assert not (keep[0] & keep[1]).any()


def test_terms_that_overlap_stay_apart(rng):
    """A series whose terms share elements is no greedy one, but legal."""
    network, x, _ = small_network("nm:2:4")
    index, layer = next((i, v) for i, v in enumerate(network.layers) if hasattr(v, "terms") and not v.terms[0].dense)
    term = layer.terms[0]
    twice = replace(layer, terms=(term, term), format=f"tasd:{term.pattern}+{term.pattern}")
    r = twice.requantization
    twice = replace(twice, requantization=replace(r, multiplier=r.multiplier // 2))
    network = replace(network, layers=(*network.layers[:index], twice, *network.layers[index + 1:]))
    validate.network(network)
    module = IntegerNetwork(network)
    same_arrays(network, module.to_network())
    train(module, x)
    equals_golden(module, x)


# -- exact arithmetic --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shift", [0, 5, 27, 28, 31])
@pytest.mark.parametrize("residual", [False, True])
def test_requantisation_is_goldens(rng, shift, residual):
    """Whole 32-bit sums, sums near ties, the largest multipliers, shifts and residuals."""
    n, outputs = 4, 6
    multiplier = rng.integers(1 << 15, 1 << 16, outputs).astype(np.uint16)
    multiplier[0] = 65535
    bias = rng.integers(-(1 << 31), 1 << 31, outputs) >> rng.integers(0, 32, outputs)
    span = min((1 << 31) - 1, 300 << shift)
    acc = rng.integers(-span, span, (n, 5, 7, outputs))
    ties = ((2 * rng.integers(-100, 100, acc.shape) + 1) << shift + 13) // multiplier.astype(np.int64) - bias
    acc = np.where(rng.random(acc.shape) < 0.5, acc, np.clip(ties, -(1 << 31), (1 << 31) - 1))
    other = rng.integers(-128, 128, acc.shape).astype(np.int8)
    if residual:                                                     # ties of the sum with the residual
        v = (other.astype(np.int64) + 100) * 65535 << shift
        exact = (((2 * rng.integers(-90, 130, acc.shape) + 1) << shift + 13) - v) // multiplier.astype(np.int64) - bias
        acc = np.where(rng.random(acc.shape) < 0.7, np.clip(exact, -(1 << 31), (1 << 31) - 1), acc)
    acc[0, 0, 0] = -(1 << 31)
    acc[0, 0, 1] = (1 << 31) - 1
    shifts = np.full(outputs, shift, np.uint8)
    extra = {"residual": other, "residual_zero_point": -100, "residual_multiplier": 65535} if residual else {}
    want = requantize.requantize(acc, bias=bias, multiplier=multiplier, shift=shifts, zero_point=-28, low=-120,
                                 high=101, **extra)
    r = integer.Requantizer(torch.from_numpy(integer._exact_scale(multiplier, shifts)), multiplier, shifts, -92, 129,
                            None, 65535)
    sums, operand = (torch.from_numpy(a).permute(0, 3, 1, 2) for a in (acc.astype(np.float64),
                                                                       other.astype(np.float32) + 100))
    got = integer.requantized(sums, torch.from_numpy(bias.astype(np.float64)), r, operand if residual else None)
    assert got.dtype == torch.float32 and len(np.unique(want)) > 5
    assert np.array_equal(got.permute(0, 2, 3, 1).numpy(), want.astype(np.float32) + 28)


@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("outputs,channels,groups,largest", [
    (5, 7, 1, 127), (8, 8, 8, 127), (6, 12, 3, 127), (4, 300, 1, 127), (4, 300, 1, 600), (4, 600, 2, 127)])
def test_convolution_is_goldens(rng, monkeypatch, int8, outputs, channels, groups, largest):
    """Extremes everywhere: in one pass, in parts of the channels (300 channels leave 24 bits), in float64 (groups)."""
    if not int8:
        monkeypatch.setattr(integer, "_int8_is_exact", lambda: False)
    w = rng.integers(-largest, largest + 1, (outputs, 3, 2, channels // groups))
    w[0], w[1] = largest, -largest
    peak = 0
    for zero_point in (-128, 127, 5):
        q = rng.choice([-128, 127, 3], (4, 6, 5, channels)).astype(np.int8)
        q[0], q[1] = 127, -128
        want = convolution.accumulate(q.astype(np.int64) - zero_point, w, stride=(2, 1), pads=(1, 1, 1, 1),
                                      dilation=(1, 2), groups=groups)
        u = torch.from_numpy(q.astype(np.float32) - zero_point).permute(0, 3, 1, 2)
        got = integer.convolved(u, torch.from_numpy(w.transpose(0, 3, 1, 2).astype(np.float64)), zero_point,
                                stride=(2, 1), padding=(1, 1), dilation=(1, 2), groups=groups)
        assert np.array_equal(got.permute(0, 2, 3, 1).numpy().astype(np.int64), want)
        peak = max(peak, np.abs(want).max())
    assert (peak > 1 << 24) == (channels // groups >= 300)


def test_batches_and_fallbacks_give_the_same(monkeypatch):
    network, x, _ = small_network("basis:6")
    module = IntegerNetwork(network)
    whole = module.tensors(nchw(x))
    monkeypatch.setattr(integer, "_CHUNK", 64)
    monkeypatch.setattr(integer, "_int8_is_exact", lambda: False)
    for at in range(0, len(x), 5):
        for name, part in module.tensors(nchw(x[at:at + 5])).items():
            assert np.array_equal(part, whole[name][at:at + 5])


# -- gradients ---------------------------------------------------------------------------------------------------------
def one_layer(rng, *, relu=True, residual=True, size=6):
    """(network, x, graph) of one 3x3 convolution of stride 1, optionally with its own input as residual."""
    weights = rng.normal(0, 0.3, (4, 3, 3, 4)).astype(np.float32)
    node = graphs.Conv(name="c", input="x", output="y", weights=weights, residual="x" if residual else None,
                       bias=rng.normal(0, 0.2, 4).astype(np.float32), pads=(1, 1, 1, 1), low=0.0 if relu else None)
    graph = graphs.Graph(name="one", input="x", output="y", nodes=(node,),
                         shapes={"x": (size, size, 4), "y": (size, size, 4)})
    x = rng.normal(0, 1, (3, size, size, 4)).astype(np.float32)
    return quantize(graph, Calibration(x=x / 1.5, source="test"), "dense"), x, graph


def test_gradients_are_those_of_the_real_network(rng):
    """Against PyTorch's own autograd of ``clip(conv(x, W) + b + r)`` at the quantised point, with the same mask."""
    network, x, _ = one_layer(rng)
    module, layer = IntegerNetwork(network), network.layers[0]
    source, target = network.tensors["x"], network.tensors["y"]
    toward = torch.from_numpy(rng.normal(0, 1, (3, 4 * 36))).float()
    (module(nchw(x)) * toward).sum().backward()
    real = torch.from_numpy(engine.quantize_input(network, x).astype(np.float32) - source.zero_point) * source.scale
    real = real.permute(0, 3, 1, 2)
    scale = torch.from_numpy(layer.weight_scale).float()
    w = (torch.from_numpy(layer.terms[0].values.transpose(0, 3, 1, 2).astype(np.float32))
         * scale.view(-1, 1, 1, 1)).requires_grad_()
    b = module.layers[0].bias.detach().float().requires_grad_()
    u = module.tensors(nchw(x))["y"].astype(int) - target.zero_point
    inside = torch.from_numpy((u > 0) & (u < 255)).permute(0, 3, 1, 2)
    assert target.zero_point == -128 and 0.2 < float(inside.float().mean()) < 0.8
    y = functional.conv2d(real, w, b, padding=1) + real
    torch.testing.assert_close((y * inside).flatten(1), module(nchw(x)).detach() * inside.flatten(1), rtol=0,
                               atol=0.51 * target.scale)
    ((y * inside).flatten(1) * toward).sum().backward()
    got = module.layers[0]
    free = torch.from_numpy(np.abs(layer.terms[0].values.transpose(0, 3, 1, 2)) < 127)      # others only move inwards
    torch.testing.assert_close(got.weight.grad[0][free], w.grad[free], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got.bias.grad.float(), b.grad, rtol=1e-3, atol=1e-3)


def test_gradient_reaches_input_and_residual(rng):
    """Two layers, the second with the first's output as operand twice: convolution and residual."""
    network, x, _ = one_layer(rng, relu=False)
    first = network.layers[0]
    again = replace(first, name="d", input="y", output="z", residual="y", requantization=replace(
        first.requantization, residual_zero_point=network.tensors["y"].zero_point))
    tensors = network.tensors | {"z": replace(network.tensors["y"], name="z")}
    network = replace(network, layers=(first, again), tensors=tensors, output="z")
    module = IntegerNetwork(network)
    module(nchw(x)).sum().backward()
    u = {k: torch.from_numpy(v.astype(np.float32)).permute(0, 3, 1, 2) - tensors[k].zero_point
         for k, v in module.tensors(nchw(x)).items()}
    m = [torch.from_numpy(integer._exact_scale(v.requantization.multiplier, v.requantization.shift)).float()
         for v in network.layers]
    q = torch.from_numpy(first.terms[0].values.transpose(0, 3, 1, 2).astype(np.float32))
    open_ = {k: ((u[k] > -128 - tensors[k].zero_point) & (u[k] < 127 - tensors[k].zero_point)).float() for k in "yz"}
    g = open_["z"] * tensors["z"].scale
    back = functional.conv_transpose2d(g * m[1].view(1, -1, 1, 1), q, padding=1) \
        + g * (again.requantization.residual_multiplier / 16384)
    bias = (back * open_["y"]).sum((0, 2, 3)) * m[0]
    unit = tensors["x"].scale * torch.from_numpy(first.weight_scale).float()
    torch.testing.assert_close(module.layers[0].bias.grad.float(), bias / unit, rtol=1e-4, atol=1e-4)


def test_gradient_of_the_output_scale_is_lsqs(rng):
    """LSQ, equation 3, in logarithms: ``sum g s (q - x / s)`` inside the limits, ``sum g s q`` at them."""
    network, x, _ = one_layer(rng)
    module, layer = IntegerNetwork(network, learn_scales="activations"), network.layers[0]
    toward = rng.normal(0, 1, (3, 6, 6, 4))
    (module(nchw(x)) * nchw(toward).float().flatten(1)).sum().backward()
    q = engine.quantize_input(network, x)
    r, target = layer.requantization, network.tensors["y"]
    acc = engine.accumulators(layer, network, {"x": q}) + r.bias
    pre = acc * integer._exact_scale(r.multiplier, r.shift)
    pre = pre + (q.astype(float) - r.residual_zero_point) * r.residual_multiplier / 16384
    u = np.clip(np.floor(pre + 0.5), 0, 255)
    inside = (u > 0) & (u < 255)
    want = (toward * target.scale * np.where(inside, u - pre, u)).sum()
    assert float(module.scale_change.grad) == pytest.approx(want / math.sqrt(127 * 6 * 6 * 4), rel=1e-3)


def test_gradient_of_the_weight_scales_is_lsqs(rng):
    """Equation 3 again: ``sum g (s q - w)`` inside, ``sum g s q`` for clipped weights that would grow."""
    network, x, graph = one_layer(rng, relu=False)
    toward = torch.from_numpy(rng.normal(0, 1, (3, 4 * 36))).float()
    grads = []
    for source in (None, graph):
        module = IntegerNetwork(network, source, learn_scales="weights")
        got = module.layers[0]
        with torch.no_grad():
            got.weight.mul_(1 if source else 0.999)                  # no weight is clipped: the whole gradient
        (module(nchw(x)) * toward).sum().backward()
        grads.append(got.weight.grad[0].double())
    q = torch.from_numpy(network.layers[0].terms[0].values.transpose(0, 3, 1, 2).astype(np.float64))
    whole, seen = grads
    want = (whole * q * got.weight_scale.view(-1, 1, 1, 1) - seen * got.weight.detach()[0]).sum((1, 2, 3))
    norm = got.weight.detach()[0].double().square().sum((1, 2, 3))
    torch.testing.assert_close(got.weight_change.grad.double(), want / norm, rtol=2e-2, atol=1e-2)


def test_clipped_weights_only_move_inwards():
    x = torch.tensor([-3.0, -1.0, 0.4, 1.0, 5.0, 5.0, -3.0], dtype=torch.float64, requires_grad=True)
    y = integer._Round.apply(x, -2, 2)
    assert y.tolist() == [-2, -1, 0, 1, 2, 2, -2]
    y.backward(torch.tensor([1.0, 1, 1, -1, -1, 1, -1], dtype=torch.float64))
    assert x.grad.tolist() == [0, 1, 1, -1, 0, 1, -1]
    x.grad = None
    assert integer._Clip.apply(x, -2, 2).tolist() == [-2, -1, 0.4, 1, 2, 2, -2]


def test_reduced_gradients_keep_the_integers():
    """Under autocast only the backward convolutions are bfloat16."""
    network, x, _ = small_network("nm:2:4")
    grads, outputs = [], []
    for enabled in (False, True):
        module = IntegerNetwork(network)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = module(nchw(x))
        assert y.dtype == torch.float32
        functional.cross_entropy(y, torch.arange(len(x)) % 5).backward()
        outputs.append(y.detach())
        grads.append(torch.cat([p.grad.double().flatten() for p in module.parameters()]))
    assert torch.equal(*outputs) and not torch.equal(*grads)
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 0.02


# -- limits ------------------------------------------------------------------------------------------------------------
def test_sums_stay_within_32_bits(monkeypatch):
    """Weights and bases shrink to the bound; with the bound as tight as here they lose most of their values."""
    monkeypatch.setattr(integer, "_LARGEST_SUM", 1500)
    for method in ("dense", "tasd:2:8+1:8"):
        network, x, _ = small_network(method)
        trained = equals_golden(IntegerNetwork(network), x)
        sums = [np.abs(layer.effective_weights()).sum(axis=(1, 2, 3)).max()
                for layer in trained.layers if isinstance(layer, Convolution)]
        assert max(sums) <= 1500 < max(np.abs(v.effective_weights()).sum(axis=(1, 2, 3)).max()
                                       for v in network.layers if isinstance(v, Convolution))
        assert min(sums) > 100


def test_basis_sums_stay_within_32_bits(monkeypatch):
    network, x, _ = small_network("basis:6")
    monkeypatch.setattr(integer, "BIAS", IntSpec(19))
    module = IntegerNetwork(network)
    trained = equals_golden(module, x)
    layer = next(v for v in trained.layers if isinstance(v, BasisConvolution))
    before = next(v for v in network.layers if isinstance(v, BasisConvolution))
    reach = np.count_nonzero(layer.coefficients, axis=1) * 255
    bounds = [(reach @ np.abs(v.basis.astype(int)).sum(axis=(1, 2))).max() for v in (before, layer)]
    assert bounds[1] < 1 << 18 < bounds[0]


def test_biases_are_clipped_to_32_bits():
    network, x, _ = small_network("dense")
    module = IntegerNetwork(network)
    with torch.no_grad():
        module.layers[0].bias[:] = torch.tensor([1e30, -1e30] * 4, dtype=torch.float64)
    stored = equals_golden(module, x).layers[0].requantization.bias
    assert set(stored[::2]) == {(1 << 31) - 1} and set(stored[1::2]) == {-(1 << 31)}


def test_output_scale_grows_where_a_ratio_would_leave_its_range(monkeypatch):
    monkeypatch.setattr(integer, "_LARGEST_CHANGE", 64.0)
    network, x, _ = small_network("dense")
    module = IntegerNetwork(network, learn_scales="all")
    with torch.no_grad():
        module.scale_change[:] = -1e9                                # all outputs as fine as allowed
        for layer in module.layers:
            if getattr(layer, "weight_change", None) is not None:
                layer.weight_change[:] = 1e9
    trained = equals_golden(module, x)
    ratios = []
    for layer in trained.layers:
        r = layer.requantization
        ratios.append(integer._exact_scale(r.multiplier, r.shift).max())
        ratios.append(r.residual_multiplier / 16384)
    assert max(ratios) <= 65535 / 16384 and max(ratios) > 3.99
    first = network.tensors[network.layers[0].output].scale, trained.tensors[trained.layers[0].output].scale
    assert 1 / 64 < first[1] / first[0] <= 64
    with torch.no_grad():
        module.scale_change[:] = 1e9
        for layer in module.layers:
            if getattr(layer, "weight_change", None) is not None:
                layer.weight_change[:] = -1e9
    equals_golden(module, x)


def test_real_activation_limits_follow_the_scale():
    """Clip(-1, 0.5) stays at -1 and 0.5 when the tensor's scale changes; max pooling keeps its input's scale."""
    network, x, _ = small_network("dense")
    index, layer = next((i, v) for i, v in enumerate(network.layers) if v.requantization.low == -127)
    layer = replace(layer, requantization=replace(layer.requantization, high=64))
    network = replace(network, layers=(*network.layers[:index], layer, *network.layers[index + 1:]))
    module = IntegerNetwork(network, learn_scales="activations")
    with torch.no_grad():
        module.scale_change[index] = math.log(2)
    trained = equals_golden(module, x)
    before, after = layer.requantization, trained.layers[index].requantization
    for limit in ("low", "high"):
        wanted = (getattr(before, limit) - before.zero_point) / 2 + before.zero_point
        assert abs(getattr(after, limit) - wanted) <= 0.5
    with torch.no_grad():
        module.scale_change[:] = torch.linspace(-0.5, 0.5, len(network.layers))
    trained = equals_golden(module, x)
    pool = next(v for v in trained.layers if getattr(v, "kind", "") == "max")
    assert trained.tensors[pool.input].scale == trained.tensors[pool.output].scale


def test_diverged_parameters_do_not_stop_training_and_make_no_package():
    network, x, _ = small_network("basis:6")
    for name in ("bias", "weight_change", "weight", "basis"):
        module = IntegerNetwork(network, learn_scales="all")
        layer = next(v for v in module.layers if getattr(v, name, None) is not None)
        with torch.no_grad():
            getattr(layer, name).view(-1)[0] = math.nan
        with pytest.raises(InputError, match=rf"layer '\w+' {name} must be finite \(training diverged\)"):
            module.to_network()
        train(module, x, steps=2)
    module = IntegerNetwork(network, learn_scales="activations")
    with torch.no_grad():
        module.scale_change[0] = math.inf
    module(nchw(x))
    with pytest.raises(InputError, match=r"scale_change must be finite \(training diverged\)"):
        module.to_network()


# -- bad input ---------------------------------------------------------------------------------------------------------
def test_another_network_is_refused():
    network, _, graph = small_network("nm:2:4")
    nodes = tuple(replace(n, weights=n.weights * 1.5) if n is graph.nodes[0] else n for n in graph.nodes)
    with pytest.raises(InputError, match=r"graph: layer '\w+' must be the network that the package was made from; its "
                                         r"weights differ \(without it, training starts from the package's own weigh"):
        IntegerNetwork(network, replace(graph, nodes=nodes))
    nodes = tuple(replace(n, weights=n.weights[..., :1]) if n is graph.nodes[0] else n for n in graph.nodes)
    with pytest.raises(InputError, match="must be the network that the package was made from"):
        IntegerNetwork(network, replace(graph, nodes=nodes))
    with pytest.raises(InputError, match="learn_scales must be one of none, weights, activations, all, not 'some'"):
        IntegerNetwork(network, learn_scales="some")


# -- what it is for ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method,learn,gain", [("nm:1:8", "none", 0.2), ("basis:6@0.1", "weights", 0.2)])
def test_two_epochs_win_back_accuracy_on_digits(method, learn, gain):
    """The module's accuracy is golden's, exactly, and clearly above that of quantisation after training."""
    graph = onnx_import.load(MODEL)
    calibration = Calibration(x=demo.digits("calibration")[0].transpose(0, 2, 3, 1), source="digits")
    network = quantize(graph, calibration, method)
    module = IntegerNetwork(network, graph, learn_scales=learn)
    x, labels = (torch.from_numpy(a) for a in demo.digits("train"))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    generator = torch.Generator().manual_seed(1)
    steps, batch = 2 * (len(x) // 32), 32
    for step in range(steps):
        if step % (steps // 2) == 0:
            order = torch.randperm(len(x), generator=generator)
        part = order[step % (steps // 2) * batch:][:batch]
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / steps)) / 2
        loss = functional.cross_entropy(module(x[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held, right = demo.digits("validation")
    held = held.transpose(0, 2, 3, 1)
    trained = module.to_network()
    before, after = (engine.accuracy(n, held, right) for n in (network, trained))
    with torch.no_grad():
        mine = float((module.eval()(nchw(held)).argmax(1) == torch.from_numpy(right)).double().mean())
    assert mine == after >= before + gain
    equals_golden(module, held[:20])
