"""Reweighted regularisation: the penalty by hand, refresh, free weights, resuming."""
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

from compress.training.groups import Groups  # noqa: E402 (they follow the skip)
from compress.training.techniques import build  # noqa: E402
from compress.training.techniques.reweighted import Reweighted  # noqa: E402
from golden import structured  # noqa: E402
from sim_tests.compress.training.small import net, steps  # noqa: E402
from spec.errors import InputError  # noqa: E402
from torch import nn  # noqa: E402

torch.set_num_threads(1)


def linear(values):
    layer = nn.Linear(len(values[0]), len(values), bias=False)
    layer.weight.data = torch.tensor(values)
    return nn.Sequential(layer)


def test_elements_by_hand():
    model, technique = linear([[1.0, -3.0], [0.0, 0.5]]), Reweighted(strength="0.1", eps=0.5, layers=["0"])
    technique.start(model)
    penalty = technique.penalty()
    assert penalty.item() == pytest.approx(0.1 * (1 / 1.5 + 3 / 3.5 + 0.5 / 1))
    penalty.backward()
    assert model[0].weight.grad.flatten().tolist() == pytest.approx([0.1 / 1.5, -0.1 / 3.5, 0, 0.1])


def test_channels_by_hand_and_constant_factors():
    model = linear([[1.0, -3.0], [2.0, 0.5]])
    technique = Reweighted(groups="input_channel", strength=1, eps=1, refresh=2, layers=["0"])
    technique.start(model)
    assert technique.penalty().item() == pytest.approx(5 / 6 + 9.25 / 10.25)
    with torch.no_grad():
        model[0].weight *= 2
    technique.begin_epoch(1, 4)
    assert technique.penalty().item() == pytest.approx(4 * (5 / 6 + 9.25 / 10.25))
    technique.begin_epoch(2, 4)
    assert technique.penalty().item() == pytest.approx(20 / 21 + 37 / 38)


@pytest.mark.parametrize("options", [{}, {"groups": "kernel"}, {"groups": "block", "block": (4, 3)},
                                     {"groups": "nm", "pattern": "2:4"}, {"groups": "pattern", "taps": 4}])
def test_gradients_against_differences(options):
    model, technique = net().double(), Reweighted(strength=0.3, **options)
    technique.start(model)
    weight = model[2].weight
    (gradient,) = torch.autograd.grad(technique.penalty(), weight)
    generator = torch.Generator().manual_seed(4)
    for _ in range(3):
        step = 1e-6 * torch.randn(weight.shape, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            weight += step
            up = technique.penalty().item()
            weight -= 2 * step
            down = technique.penalty().item()
            weight += step
        assert up - down == pytest.approx(2 * (gradient * step).sum().item(), rel=1e-4, abs=1e-9)


def test_free_weights_are_not_penalised_and_stay():
    for options in ({"groups": "nm", "pattern": "2:4"}, {"groups": "pattern", "taps": 4}):
        model, technique = net(), build({"kind": "reweighted", "strength": 1e-3} | options)
        technique.start(model)
        free = Groups(**{k: v for k, v in options.items() if k != "groups"}, kind=options["groups"]).free(
            model[2].weight)
        (gradient,) = torch.autograd.grad(technique.penalty(), model[2].weight)
        assert bool((gradient[free] == 0).all()) and bool((gradient[~free] != 0).all())
        before = technique.figures()["2/outside"]
        for epoch in range(4):
            technique.begin_epoch(epoch, 4)
            steps(model, technique, 20, rate=0.02, seed=epoch)
        assert technique.figures()["2/outside"] < before
        technique.finish()
        w = model[2].weight.detach().numpy()
        if "pattern" in options:
            assert structured.fits(w, (2, 4), axis=1)
        else:
            assert (np.count_nonzero(w, axis=(2, 3)) == 4).all()


def test_a_resumed_run_keeps_its_factors():
    model, technique = net(), Reweighted(strength=1e-3, refresh=3)
    technique.start(model)
    technique.begin_epoch(0, 3)
    steps(model, technique, 2)
    again, resumed = net(), Reweighted(strength=1e-3, refresh=3)
    resumed.start(again)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(technique.state_dict())
    for one, two in ((technique, model), (resumed, again)):
        one.begin_epoch(1, 3)
        steps(two, one, 2, seed=1)
    torch.testing.assert_close(again[2].weight, model[2].weight, rtol=0, atol=0)


def test_threshold_drops_small_groups():
    model = net()
    with torch.no_grad():
        model[2].weight[:, 1] *= 1e-3
    technique = Reweighted(groups="input_channel", strength=1, std=0.5)
    technique.start(model)
    assert technique.figures()["density"] == 7 / 8
    technique.finish()
    assert bool((model[2].weight[:, 1] == 0).all()) and int(model[2].weight.count_nonzero()) == 16 * 7 * 9


def test_bad_options():
    with pytest.raises(InputError, match="threshold must not be given: groups nm say what stays"):
        Reweighted(groups="nm", pattern="2:4", strength=1, threshold=1)
    with pytest.raises(InputError, match="eps must be a number above 0, not '0'"):
        Reweighted(strength=1, eps="0")
    with pytest.raises(InputError, match="layers.0 must have at least M = 4 input channels, not 3"):
        Reweighted(groups="nm", pattern="2:4", strength=1, layers=["0"]).start(net())
