"""Pruning of coefficients and 1x1 weights with masked gradients, and what is removed in the end."""
import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

from compress.training.parametrizations import originals  # noqa: E402 (they follow the skip)
from compress.training.techniques import build  # noqa: E402
from compress.training.techniques.basis import Basis  # noqa: E402
from compress.training.techniques.shrink import Shrink  # noqa: E402
from sim_tests.compress.training.test_basis import steps  # noqa: E402
from sim_tests.compress.training.test_channels import outputs, residual  # noqa: E402
from spec.errors import InputError  # noqa: E402

torch.set_num_threads(1)


def started(**options):
    model = residual().train()
    with torch.no_grad():
        model.conv2.weight[3] *= 1e-3                        # an output that pruning empties
    Basis(count=6, layers=["conv2", "conv3", "conv4"]).start(model)
    technique = Shrink(**options)
    technique.start(model)
    return model, technique


def test_pruning_is_the_rule_for_coefficients_and_1x1():
    model, technique = started(std_factor=0.8)
    plain = residual()
    with torch.no_grad():
        plain.conv2.weight[3] *= 1e-3
    Basis(count=6, layers=["conv2", "conv3", "conv4"]).start(plain)
    assert list(technique.pruned) == ["conv2", "conv3", "conv4", "shortcut"]
    for name, tensor in technique.pruned.items():
        old = plain.shortcut.weight if name == "shortcut" else originals(getattr(plain, name))[1]
        old = old.detach().numpy()
        want = np.where(np.abs(old) < 0.8 * old.std(ddof=1), 0, old)
        np.testing.assert_array_equal(tensor.detach(), want)
        assert technique.figures()[f"{name}/density"] == np.count_nonzero(want) / want.size
    assert not originals(model.conv2)[1][3].any()
    kept = sum(int(np.count_nonzero(t.detach())) for t in technique.pruned.values())
    total = sum(t.numel() for t in technique.pruned.values())
    assert technique.figures()["density"] == kept / total


def test_zeros_stay_zero_while_the_rest_trains_and_removal_changes_nothing():
    model, technique = started(std_factor=1.0)
    zeros = {n: t.detach() == 0 for n, t in technique.pruned.items()}
    old = {n: t.detach().clone() for n, t in technique.pruned.items()}
    steps(model, technique, 4)
    for name, tensor in technique.pruned.items():
        assert torch.equal(tensor.detach() == 0, zeros[name]) and zeros[name].any()
        assert not torch.equal(tensor.detach(), old[name])
    assert model.conv2_bn.bias[3] == 0 == model.conv2.bias[3]
    want = outputs(model)
    technique.finish()
    np.testing.assert_allclose(outputs(model), want, atol=1e-5)
    assert technique.facts["conv2"]["outputs"][1] < 10 and technique.facts["conv3"]["inputs"][1] < 10


def test_without_pruning_only_the_dead_go():
    model, technique = started(prune="none")
    assert technique.figures()["density"] == 1
    want = outputs(model)
    technique.finish()
    assert technique.facts == {}
    np.testing.assert_allclose(outputs(model), want, atol=1e-6)


def test_resumes_with_its_masks():
    model, technique = started()
    state, weights = technique.state_dict(), copy.deepcopy(model.state_dict())
    other, again = started(std_factor=0.1)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    for m, t in ((model, technique), (other, again)):
        steps(m, t, 2)
        t.finish()
    assert technique.facts == again.facts
    for a, b in zip(model.state_dict().values(), other.state_dict().values()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options,text", [
    ({"prune": "all"}, "technique.prune must be one of std, none, not 'all'"),
    ({"std_factor": "-1"}, "technique.std_factor must be a number")])
def test_refused_options(options, text):
    with pytest.raises(InputError) as caught:
        build({"kind": "shrink"} | options)
    assert text in str(caught.value)


def test_refused_layers():
    with pytest.raises(InputError, match="layers.conv1 must have basis kernels, or be a plain 1x1 convolution"):
        Shrink(layers=["conv1"]).start(residual())
