"""Ternary coefficients with straight-through gradients: choice, scales, gradients by hand, schedule, export."""
import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

from compress import basis as bases  # noqa: E402 (they follow the skip)
from compress import engine, onnx_import  # noqa: E402
from compress.network import BasisConvolution  # noqa: E402
from compress.quantize import Calibration, Quantizer  # noqa: E402
from compress.training import export, networks, recipe, trainer  # noqa: E402
from compress.training.parametrizations import originals  # noqa: E402
from compress.training.techniques import build, ternary  # noqa: E402
from compress.training.techniques.basis import Basis  # noqa: E402
from compress.training.techniques.ternary import Ternary, TernaryKernels  # noqa: E402
from golden import basis as golden  # noqa: E402
from golden.chain import quantize_rows  # noqa: E402
from sim_tests.compress.training.test_basis import batch, net, steps  # noqa: E402
from sim_tests.compress.training.test_trainer import Stop, interrupted  # noqa: E402
from spec.config import Pattern  # noqa: E402
from spec.errors import InputError  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402

torch.set_num_threads(1)


def started(model=None, **options):
    model = net() if model is None else model
    technique = Ternary(**options)
    technique.start(model)
    return model, technique


# -- the choice of T ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("density", [0.001, 0.1, 0.37, 1.0])
def test_signs_are_those_of_the_numpy_rule(density):
    latent = np.random.default_rng(0).normal(size=(9, 14, 5)).astype(np.float32) * [1, 2, 3, 4, 5]
    want = bases.ternarize(latent, density=density)
    got = ternary.signs(torch.from_numpy(latent), density=density)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.count_nonzero(got, axis=(0, 1)), [max(1, round(density * 126))] * 5)


def test_ties_of_a_density_keep_the_lowest():
    latent = np.random.default_rng(1).integers(-2, 3, (6, 10, 4)).astype(np.float32)
    for density in (0.05, 0.3, 0.6):
        got = ternary.signs(torch.from_numpy(latent), density=density)
        np.testing.assert_array_equal(got, bases.ternarize(latent, density=density))


@pytest.mark.parametrize("pattern", [Pattern(1, 4), Pattern(2, 16), Pattern(3, 5), Pattern(4, 4)])
@pytest.mark.parametrize("ties", [False, True])
def test_pattern_keeps_the_largest_of_each_group(pattern, ties):
    rng = np.random.default_rng(2)
    latent = (rng.integers(-3, 4, (3, 18, 2)) if ties else rng.normal(size=(3, 18, 2))).astype(np.float32)
    got = ternary.signs(torch.from_numpy(latent), pattern=pattern).numpy()
    for o, m in np.ndindex(3, 2):
        for at in range(0, 18, pattern.m):
            part = latent[o, at:at + pattern.m, m]
            first = sorted(range(len(part)), key=lambda i: (-abs(part[i]), i))[:pattern.n]
            want = [np.sign(v) if i in first else 0 for i, v in enumerate(part)]
            assert got[o, at:at + pattern.m, m].tolist() == want


def test_allocation_by_hand():
    sizes = {"a": (16, 16, 6, 3, 3), "b": (32, 16, 6, 3, 3), "c": (64, 64, 6, 3, 3)}
    for density in (0.02, 0.1, 0.5, 0.9, 1.0):
        shares = ternary.allocate(sizes, density, "erk")
        number = {n: o * i * m for n, (o, i, m, _, _) in sizes.items()}
        assert sum(shares[n] * number[n] for n in sizes) == pytest.approx(density * sum(number.values()))
        assert max(shares.values()) <= 1
    shares = ternary.allocate(sizes, 0.02, "erk")
    assert shares["a"] / shares["c"] == pytest.approx((38 / 256) / (134 / 4096))
    assert ternary.allocate(sizes, 0.1) == dict.fromkeys(sizes, 0.1)


# -- the form ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{"density": 0.2}, {"pattern": "2:4", "count": 4},
                                     {"density": 0.5, "basis_bits": 0}, {"density": 0.1, "rotations": 8}])
def test_start_is_the_fit_of_compress_basis(options):
    model, technique = started(**options)
    for number, name in enumerate(technique.chosen):
        dense = net().get_submodule(name).weight.detach().double().numpy().transpose(0, 2, 3, 1)
        d = golden.decompose(dense, count=options.get("count", 6))
        if options.get("rotations"):
            d = bases.balance(d, 0.1, rotations=8, rng=np.random.default_rng((0, number)))[0]
        pattern = Pattern.parse(options["pattern"]) if "pattern" in options else None
        t = bases.ternarize(d.coefficients, density=options.get("density"), pattern=pattern, threshold=0)
        alpha, beta = bases.rank_one(d.coefficients, t)
        layer = model.get_submodule(name)
        kernels, coefficients = layer.parametrizations.weight[0].ternary(layer)
        np.testing.assert_array_equal(coefficients, t)
        assert coefficients.dtype == np.int8 and kernels.dtype == np.float64
        want = beta[:, None, None] * d.basis
        if options.get("basis_bits", 8):
            q, scale = quantize_rows(want[None])
            want = q[0] * scale[0]
        np.testing.assert_allclose(kernels, want, atol=1e-5)
        np.testing.assert_allclose(originals(layer)[1].detach(), alpha, rtol=1e-4)
        rebuilt = np.einsum("o,oim,mrs->oirs", alpha, t, want)
        np.testing.assert_allclose(layer.weight.detach(), rebuilt, atol=1e-5)


@pytest.mark.parametrize("limits", [{"density": 0.2}, {"pattern": "2:4"}])
def test_descent_lowers_the_error_and_latent_coefficients_are_optima(limits):
    errors, weight = [], net()[5].weight.detach().double().numpy()
    for sweeps in (0, 6):
        model, _ = started(layers=["5"], sweeps=sweeps, basis_bits=0, **limits)
        errors.append(np.linalg.norm(model[5].weight.detach().numpy() - weight))
    assert errors[1] < errors[0]
    basis, alpha, latent = (p.detach().double().numpy() for p in originals(model[5]))
    kept = model[5].parametrizations.weight[0].ternary(model[5])[1] * alpha[:, None, None]
    left = weight - np.einsum("oim,mrs->oirs", kept, basis)
    want = kept + np.einsum("oirs,mrs->oim", left, basis) / (basis ** 2).sum(axis=(1, 2))
    same = np.isclose(want, latent, atol=1e-4).all(axis=2)
    assert same.mean() > 0.5, "not the kernels (o, i) in which the last choice changed"


def test_gain_scales_the_latent_gradient_alone():
    grads = []
    for gain in (1, 3):
        kernels = TernaryKernels(count=2, density=0.5, gain=gain)
        g = torch.Generator().manual_seed(0)
        factors = [torch.randn(*s, generator=g).requires_grad_() for s in ((2, 3, 3), (4,), (4, 5, 2))]
        kernels(*factors).square().sum().backward()
        grads.append([f.grad for f in factors])
    for number, factor in enumerate((1, 1, 3)):
        np.testing.assert_allclose(grads[1][number], factor * grads[0][number], rtol=1e-5)


def test_basis_is_rounded_as_golden_rounds():
    b = torch.randn(6, 3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    q, scale = quantize_rows(b.detach().double().numpy()[None])
    got = ternary.rounded(b, 8)
    np.testing.assert_allclose(got.detach(), q[0] * scale[0], atol=1e-6)
    got.sum().backward()
    np.testing.assert_array_equal(b.grad, np.ones((6, 3, 3)))
    assert len(np.unique(ternary.rounded(b.detach(), 2))) == 3
    np.testing.assert_array_equal(ternary.rounded(torch.zeros(1, 2, 2), 8), np.zeros((1, 2, 2)))


def test_gradients_by_hand():
    """One output, two channels, one basis kernel of 1 x 2; the loss is linear in the weight with known slopes."""
    kernels = TernaryKernels(count=1, density=0.5, bits=0)
    basis = torch.tensor([[[2.0, -1.0]]], requires_grad=True)
    alpha = torch.tensor([-0.5], requires_grad=True)
    latent = torch.tensor([[[0.3], [-0.9]]], requires_grad=True)
    weight = kernels(basis, alpha, latent)
    np.testing.assert_allclose(weight.detach(), [[[[0, 0]], [[-1, 0.5]]]])
    slope = torch.tensor([[[[1.0, 10.0]], [[100.0, 1000.0]]]])
    (weight * slope).sum().backward()
    np.testing.assert_allclose(latent.grad.flatten(), [2 - 10, 200 - 1000])         # <slope, B>, kept or not
    np.testing.assert_allclose(alpha.grad, [-1 * -(200 - 1000)])                      # sign(alpha) T <slope, B>
    np.testing.assert_allclose(basis.grad.flatten(), [0.5 * -100, 0.5 * -1000])       # |alpha| T slope


def test_goes_on_from_a_trained_basis():
    model = net()
    first = Basis(count=4, alternate=0, strength=1e-3)
    first.start(model)
    steps(model, first, 3)
    first.finish()
    ce = {n: originals(model[n])[1].detach().clone() for n in (2, 5)}
    model, technique = started(model, density=0.3, basis_bits=0)
    for n in (2, 5):
        kernels, coefficients = model[n].parametrizations.weight[0].ternary(model[n])
        np.testing.assert_array_equal(coefficients, bases.ternarize(ce[n].numpy(), density=0.3))
        assert kernels.shape == (4, 3, 3)
    assert not any(name.endswith("original") for name in model.state_dict())


# -- training ----------------------------------------------------------------------------------------------------------
def test_density_falls_by_the_cubic_rule_and_holds_in_every_step():
    model, technique = started(density=0.1, density_from=0.5, anneal=4)
    want = [0.1 + 0.4 * (1 - e / 4) ** 3 for e in range(4)] + [0.1, 0.1]
    for epoch, share in enumerate(want):
        technique.begin_epoch(epoch, 6)
        for n, size in ((2, 96), (5, 144)):
            t = model[n].parametrizations.weight[0].ternary(model[n])[1]
            assert np.count_nonzero(t, axis=(0, 1)).tolist() == [max(1, round(share * size))] * 6
    technique.begin_epoch(1, 6)
    technique.finish()
    total = 6 * (round(9.6) + round(14.4))
    assert technique.figures()["density"] == total / (6 * 240)


def test_values_turn_ternary_by_degrees():
    model, technique = started(density=0.25, blend=4, basis_bits=0)
    basis, _, latent = (p.detach().double().numpy() for p in originals(model[5]))
    t = model[5].parametrizations.weight[0].ternary(model[5])[1]
    alpha = np.array([np.abs(latent[o][t[o] != 0]).mean() for o in range(12)])
    for epoch, share in enumerate((0, 0.25, 0.5, 0.75, 1, 1)):
        technique.begin_epoch(epoch, 6)
        values = share * alpha[:, None, None] * t + (1 - share) * np.abs(t) * latent
        np.testing.assert_allclose(model[5].weight.detach(), np.einsum("oim,mrs->oirs", values, basis), atol=1e-5)
    technique.begin_epoch(0, 6)
    technique.finish()
    rebuilt = np.einsum("o,oim,mrs->oirs", alpha, t, basis)
    np.testing.assert_allclose(model[5].weight.detach(), rebuilt, atol=1e-5)


def test_pattern_falls_likewise():
    model, technique = started(pattern="1:8", density_from=0.5, anneal=2)
    found = []
    for epoch in range(3):
        technique.begin_epoch(epoch, 3)
        found.append(model[5].parametrizations.weight[0].pattern)
    assert found == [(4, 8), (1, 8), (1, 8)]                 # 8 * (1/8 + 3/8 * 1/8) = 1.375


def test_frozen_pattern_stays_and_the_rest_trains():
    model, technique = started(density=0.2, freeze_at=0.5)
    states = steps(model, technique, 4)
    latent, basis = "5.parametrizations.weight.original2", "5.parametrizations.weight.original0"
    assert not torch.equal(states[0][latent], states[1][latent])
    assert torch.equal(states[1][latent], states[3][latent]) and not torch.equal(states[1][basis], states[3][basis])


def test_training_lowers_the_loss_and_flips_coefficients():
    model, technique = started(density=0.2)
    x, labels = batch()
    before = functional.cross_entropy(model(x), labels).item()
    technique.figures()
    steps(model, technique, 20)
    after = functional.cross_entropy(model(x), labels).item()
    found = technique.figures()
    assert after < 0.7 * before and 0 < found["5/flips"] < 0.5 and found["5/density"] == pytest.approx(0.2, abs=0.01)
    assert technique.figures()["5/flips"] == 0


def test_state_continues_figures_and_form():
    model, technique = started(density=0.2)
    steps(model, technique, 2)
    technique.figures()
    state, weights = technique.state_dict(), copy.deepcopy(model.state_dict())
    steps(model, technique, 1)
    want = technique.figures()
    other, again = started(net(3), density=0.2)
    again.load_state_dict(state)
    other.load_state_dict(model.state_dict())
    assert again.figures() == want
    other.load_state_dict(weights)
    x = batch()[0]
    model.load_state_dict(weights)
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_runs_with_deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        for options in ({"density": 0.2}, {"pattern": "2:4"}):
            model, technique = started(**options)
            steps(model, technique, 1)
    finally:
        torch.use_deterministic_algorithms(False)


# -- export ------------------------------------------------------------------------------------------------------------
def test_export_names_the_modules_and_rebuilds_the_weights():
    model, technique = started(density=0.2)
    steps(model, technique, 2)
    technique.finish()
    found = ternary.export_decompositions(model)
    assert list(found) == ["2", "5"]
    for name, (kernels, coefficients) in found.items():
        layer = model.get_submodule(name)
        alpha = originals(layer)[1].detach().abs().double().numpy()
        np.testing.assert_allclose(np.einsum("o,oim,mrs->oirs", alpha, coefficients, kernels),
                                   layer.weight.detach(), atol=1e-6)
        q, scale = quantize_rows(kernels[None])
        np.testing.assert_allclose(q[0] * scale[0], kernels, atol=1e-7)    # the integers of the package
    assert ternary.export_decompositions(net()) == {}


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options,text", [
    ({"density": "0"}, "technique.density must be a number above 0, at most 1"),
    ({"density": 0.1, "pattern": "2:16"}, "technique.density must not be given beside pattern"),
    ({"pattern": "5:4"}, "technique.pattern must be an N:M pattern"),
    ({"pattern": "2:16", "allocate": "erk"}, "technique.allocate must be uniform with a pattern, not 'erk'"),
    ({"allocate": "best"}, "technique.allocate must be one of uniform, erk"),
    ({"anneal": 3}, "technique.anneal must be given together with density_from, not 3"),
    ({"density_from": 0.5}, "technique.anneal must be given together with density_from"),
    ({"basis_bits": "1"}, "technique.basis_bits must be 0 or 2..16"),
    ({"basis_bits": 17}, "technique.basis_bits must be a whole number"),
    ({"freeze_at": "2"}, "technique.freeze_at must be a number"), ({"count": 0}, "technique.count must be a whole"),
    ({"gain": 0}, "technique.gain must be a number above 0"), ({"sweeps": -1}, "technique.sweeps must be a whole"),
    ({"layers": {"5": {"density": 0.1, "pattern": "1:4"}}}, "layers.5.density must not be given beside pattern"),
    ({"layers": {"5": {"rank": 1}}}, "layers.5 must be a mapping with count, density, pattern")])
def test_refused_options(options, text):
    with pytest.raises(InputError) as caught:
        build({"kind": "ternary"} | options)
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_refused_layers():
    with pytest.raises(InputError, match=r"layers.2.count must be an integer in 1..9, not 10"):
        started(count=10)
    model = net()
    parametrize.register_parametrization(model[5], "weight", torch.nn.Identity())
    with pytest.raises(InputError, match="layers.5 must have a plain or masked weight for ternary coeff"):
        started(model)


# -- evidence ----------------------------------------------------------------------------------------------------------
RECIPE = """
network: digits
data: {kind: digits}
precision: float32
seed: 3
stages:
  - {name: dense, epochs: 8, batch: 64, optimizer: {rate: 0.1, weight_decay: 0.0005}}
  - name: ternary
    epochs: 10
    batch: 64
    optimizer: {rate: 0.05}
    distill: {weight: 0.5}
    techniques: [{kind: ternary, count: 4, density: 0.05, rotations: 16}]
"""


def test_retraining_saves_what_ternarisation_after_training_loses(tmp_path):
    """Digits, 4 basis kernels, 5 % of the coefficients: the same density, format and engine, with and without."""
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    plan, digest, _ = recipe.load(tmp_path / "recipe.yaml")
    data = plan.data.load(seed=plan.seed)
    run = trainer.Trainer(plan, digest, data, tmp_path / "run")
    model = run.run()
    rows = {r["stage"]: r for r in run.rows if "rate" in r}
    assert rows["ternary"]["density"] == pytest.approx(0.05, abs=0.001)
    dense = networks.build("digits")
    dense.load_state_dict(torch.load(tmp_path / "run" / "stage-0.pt", weights_only=True)["model"])
    images, labels = data.test
    nhwc = [data.normalized(i).permute(0, 2, 3, 1).numpy() for i in (images, data.train[0][:200])]
    found = {}
    kept = ternary.export_decompositions(model)
    for name, net_, factors in (("after training", dense, {}), ("retrained", model, kept)):
        graph = onnx_import.parse(export.to_onnx(net_).SerializeToString())
        quantizer = Quantizer(graph, Calibration(x=nhwc[1], source="train"), decompositions=factors)
        network = quantizer.network("basis:4@0.05")
        layers = [layer for layer in network.layers if isinstance(layer, BasisConvolution)]
        assert [layer.name for layer in layers] == ["block_a", "block_b", "conv2"]
        assert all(layer.metrics["retrained"] == bool(factors) for layer in layers)
        assert all(layer.metrics["density"] <= 0.0505 for layer in layers)
        found[name] = trainer.accuracy(net_, data, "test"), engine.accuracy(network, nhwc[0], labels)
        assert all(m["compression_values"] > m["compression_entropy"] > m["compression_maps"] > 30
                   for m in (layer.metrics for layer in layers))
    assert found["retrained"][1] >= found["after training"][1] + 0.1
    assert abs(found["retrained"][1] - found["retrained"][0]) <= 0.01
    assert found["retrained"][1] >= 0.88
    for layer in layers:
        rebuilt = layer.effective_weights() * layer.weight_scale[:, None, None, None]
        node = next(n for n in graph.convolutions if n.name == layer.name)
        assert np.linalg.norm(rebuilt - node.weights) <= 1e-5 * np.linalg.norm(node.weights)


STAGES = """
network: digits
data: {kind: digits}
precision: float32
stages:
  - name: basis
    epochs: 2
    batch: 256
    optimizer: {rate: 0.02, weight_decay: 0.001}
    techniques: [{kind: basis, count: 5, alternate: 1}]
  - {name: shrink, epochs: 1, batch: 256, optimizer: {rate: 0.02}, techniques: [{kind: shrink}]}
  - name: ternary
    epochs: 3
    batch: 256
    optimizer: {rate: 0.02}
    techniques: [{kind: ternary, density: 0.2, density_from: 0.6, anneal: 2, blend: 2, freeze_at: 0.6}]
"""


@pytest.mark.parametrize("share", [0.3, 0.75])
def test_killed_runs_of_all_three_stages_end_like_whole_ones(tmp_path, share):
    (tmp_path / "recipe.yaml").write_text(STAGES, encoding="utf-8")
    plan, digest, _ = recipe.load(tmp_path / "recipe.yaml")
    data = plan.data.load(seed=plan.seed)
    whole = trainer.Trainer(plan, digest, data, tmp_path / "whole")
    want = whole.run().state_dict()
    with pytest.raises(Stop):
        trainer.Trainer(plan, digest, data, tmp_path / "cut", progress=interrupted(share)).run()
    again = trainer.Trainer(plan, digest, data, tmp_path / "cut")
    found = again.run().state_dict()
    assert found.keys() == want.keys() and all(torch.equal(found[n], v) for n, v in want.items())
    timing = ("seconds", "images_per_second")
    rows = [[{k: v for k, v in r.items() if k not in timing} for r in t.rows] for t in (whole, again)]
    assert rows[0] == rows[1]
