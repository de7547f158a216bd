"""PENNI's decomposition and retraining in turns: exact start, fixed sides, penalties and their numbers."""
import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

from compress.training.parametrizations import materialize, originals  # noqa: E402 (they follow the skip)
from compress.training.techniques import basis, build  # noqa: E402
from compress.training.techniques.basis import Basis, BasisKernels  # noqa: E402
from golden import basis as golden  # noqa: E402
from spec.errors import InputError  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402

torch.set_num_threads(1)


def net(seed=0):
    """3 -> 8 -> 12 (stride 2) -> 12 channels, all 3x3 but the last convolution (1x1), then 4 classes."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1),
                         nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1, bias=False),
                         nn.Conv2d(12, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))


def batch(seed=1, count=8):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 8, 8, generator=g), torch.randint(0, 4, (count,), generator=g)


def steps(model, technique, epochs, *, rate=0.05, momentum=0.9):
    """SGD with momentum and weight decay on one batch per epoch; returns the state after each epoch."""
    optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum, weight_decay=0.01)
    x, labels = batch()
    states = []
    for epoch in range(epochs):
        technique.begin_epoch(epoch, epochs)
        for _ in range(2):
            loss = functional.cross_entropy(model(x), labels) + technique.penalty()
            optimiser.zero_grad()
            loss.backward()
            technique.after_backward()
            optimiser.step()
            technique.after_step()
        states.append(copy.deepcopy(model.state_dict()))
    return states


# -- the form ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [1, 6, 9])
def test_start_is_goldens_truncated_svd(count):
    model, dense = net(), net()
    technique = Basis(count=count)
    technique.start(model)
    assert list(technique.chosen) == ["2", "5"], "not the first layer, the 1x1 layer nor the classifier"
    for name in technique.chosen:
        weight = dense.get_submodule(name).weight.detach().double().numpy()
        want = golden.decompose(weight.transpose(0, 2, 3, 1), count=count)
        layer = model.get_submodule(name)
        np.testing.assert_allclose(originals(layer)[0].detach(), want.basis, atol=1e-6)
        np.testing.assert_allclose(originals(layer)[1].detach(), want.coefficients, atol=1e-6)
        np.testing.assert_allclose(layer.weight.detach(), want.to_dense().transpose(0, 3, 1, 2), atol=1e-6)
    x = batch()[0]
    if count == 9:
        np.testing.assert_allclose(model.eval()(x).detach(), dense.eval()(x).detach(), atol=1e-5)
    np.testing.assert_array_equal(materialize(model).eval()(x).detach(), model.eval()(x).detach())


def test_energy_chooses_the_count_per_layer():
    model = net()
    Basis(layers={"2": {"energy": 0.5}, "5": {"count": 4}}).start(model)
    weight = net()[2].weight.detach().double().numpy()
    want = golden.decompose(weight.transpose(0, 2, 3, 1), energy=0.5).meta["count"]
    assert [len(originals(model[n])[0]) for n in (2, 5)] == [want, 4] and 1 < want < 9


def test_combine_is_the_formula_and_full_precision_under_autocast():
    g = torch.Generator().manual_seed(3)
    ce, b = torch.randn(3, 4, 2, generator=g), torch.randn(2, 3, 5, generator=g)
    want = np.einsum("oim,mrs->oirs", ce.numpy(), b.numpy())
    np.testing.assert_allclose(basis.combine(ce, b), want, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(basis.combine(ce, b), basis.combine(ce, b).float())
        np.testing.assert_allclose(basis.combine(ce, b), want, atol=1e-6)


def test_an_assigned_weight_is_decomposed():
    layer = nn.Conv2d(4, 5, 3)
    parametrize.register_parametrization(layer, "weight", BasisKernels(count=9))
    new = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(4))
    layer.weight = new
    np.testing.assert_allclose(layer.weight.detach(), new, atol=1e-5)


# -- penalties ---------------------------------------------------------------------------------------------------------
def test_hoyer_measure_by_hand():
    assert basis.hoyer_measure(torch.tensor([3.0, -4.0, 0.0, 0.0])) == pytest.approx(2 - 7 / 5)
    assert basis.hoyer_measure(torch.ones(9)) == pytest.approx(0, abs=1e-6)
    assert basis.hoyer_measure(torch.eye(4)[0]) == 1


@pytest.mark.parametrize("regularizer,function", [("l1", lambda c: np.abs(c).sum()),
                                                  ("hoyer_square", lambda c: np.abs(c).sum() ** 2 / (c * c).sum())])
def test_penalty_covers_all_chosen_layers(regularizer, function):
    model = net()
    technique = Basis(regularizer=regularizer, strength=0.25)
    technique.start(model)
    want = 0.25 * sum(function(originals(model[n])[1].detach().numpy()) for n in (2, 5))
    assert technique.penalty().item() == pytest.approx(want, rel=1e-5)
    assert Basis(regularizer="none").penalty() == Basis(strength=0).penalty() == 0


# -- training in turns -------------------------------------------------------------------------------------------------
def test_the_fixed_side_does_not_move_at_all():
    """Momentum and weight decay are on: neither may move the side whose turn it is not."""
    model = net()
    technique = Basis(alternate=2, strength=1e-3)
    technique.start(model)
    states = steps(model, technique, 6)
    sides = {turn: [f"{n}.parametrizations.weight.original{1 - turn}" for n in (2, 5)] for turn in (0, 1)}
    for epoch in range(1, 6):
        turn, old, new = epoch // 2 % 2, states[epoch - 1], states[epoch]
        for name in sides[turn]:
            assert not torch.equal(old[name], new[name]), (epoch, name)
        for name in sides[1 - turn]:
            if epoch != 4:                                   # the factors were scaled when the coefficients' turn began
                assert torch.equal(old[name], new[name]), (epoch, name)
    for n in (2, 5):
        norms = states[4][f"{n}.parametrizations.weight.original0"].flatten(1).norm(dim=1)
        np.testing.assert_allclose(norms, np.ones(6), atol=1e-6)
        assert not torch.equal(states[3][f"{n}.parametrizations.weight.original0"],
                               states[1][f"{n}.parametrizations.weight.original0"])


def test_gradients_of_the_fixed_side_are_none():
    model = net()
    technique = Basis(alternate=1)
    technique.start(model)
    steps(model, technique, 2)
    assert originals(model[2])[1].grad is None and originals(model[2])[0].grad is not None
    technique.finish()
    assert all(p.requires_grad for p in model.parameters())


def test_zero_trains_both_together():
    model = net()
    technique = Basis(alternate=0)
    technique.start(model)
    first, second = steps(model, technique, 2)
    assert all(not torch.equal(first[f"{n}.parametrizations.weight.original{i}"],
                               second[f"{n}.parametrizations.weight.original{i}"]) for n in (2, 5) for i in (0, 1))


def test_normalisation_keeps_every_weight():
    model = net()
    Basis(count=5).start(model)
    with torch.no_grad():
        originals(model[2])[0].mul_(torch.tensor([3.0, 0.5, 2.0, 1.0, 0.0])[:, None, None])
        want = model[2].weight.clone()
        basis.normalize(*originals(model[2]))
    np.testing.assert_allclose(model[2].weight.detach(), want, atol=1e-6)
    np.testing.assert_allclose(originals(model[2])[0].detach().flatten(1).norm(dim=1), [1, 1, 1, 1, 0], atol=1e-6)


def test_l1_leaves_fewer_large_coefficients():
    found = {}
    for strength in (0.0, 3e-3):
        model = net()
        technique = Basis(count=6, alternate=0, strength=strength)
        technique.start(model)
        steps(model, technique, 40, momentum=0.5)
        found[strength] = technique.figures()
    for name in ("2", "5"):
        assert found[3e-3][f"{name}/hoyer"] > found[0.0][f"{name}/hoyer"] + 0.05


def test_figures_count_both_signs():
    model = net()
    technique = Basis(layers=["5"], count=2)
    technique.start(model)
    with torch.no_grad():
        ce = originals(model[5])[1]
        ce.zero_()
        ce.view(-1)[:10] = torch.tensor([1.0, -1] * 5)
    found = technique.figures()
    assert found["density"] == found["5/density"] == 10 / 288
    assert found["5/hoyer"] == pytest.approx((288 ** .5 - 10 ** .5) / (288 ** .5 - 1))


def test_a_second_stage_goes_on_from_the_first():
    model = net()
    Basis(count=4).start(model)
    want = model[2].weight.detach().clone()
    second = Basis(count=6)
    second.start(model)
    assert torch.equal(model[2].weight.detach(), want) and len(originals(model[2])[0]) == 4


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options,text", [
    ({"count": "0"}, "technique.count must be a whole number in 1.."),
    ({"count": 3, "energy": 0.5}, "technique.count must not be given beside energy, not 3"),
    ({"energy": "1.5"}, "technique.energy must be a number above 0, at most 1"),
    ({"alternate": "-1"}, "technique.alternate must be a whole number in 0..10000"),
    ({"regularizer": "l2"}, "technique.regularizer must be one of l1, hoyer_square, none, not 'l2'"),
    ({"strength": "nan"}, "technique.strength must be a number at least 0"),
    ({"layers": {"5": {"rank": 3}}}, "technique.layers.5 must be a mapping with count, energy"),
    ({"layers": {"5": {"count": "x"}}}, "technique.layers.5.count must be a whole number"),
    ({"counts": 3}, "technique.counts is not a known field (did you mean count?)")])
def test_refused_options(options, text):
    with pytest.raises(InputError) as caught:
        build({"kind": "basis"} | options)
    assert text in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("options,text", [
    ({"count": 10}, "layers.2.count must be an integer in 1..9, not 10"),
    ({"layers": ["6"]}, "layers.6 must be a convolution with kernels above 1x1 and one group"),
    ({"layers": ["9"]}, "layers.9 must be a convolution"), ({"layers": ["x*"]}, "layers matches no layer")])
def test_refused_layers(options, text):
    with pytest.raises(InputError) as caught:
        Basis(**options).start(net())
    assert text in str(caught.value)


def test_refused_weights_and_forms():
    model = net()
    with torch.no_grad():
        model[5].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="layers.5 must have finite weights"):
        Basis().start(model)
    model = net()
    parametrize.register_parametrization(model[2], "weight", nn.Identity())
    with pytest.raises(InputError, match="layers.2 must have a plain or masked weight for a basis"):
        Basis().start(model)
