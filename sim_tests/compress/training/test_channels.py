"""Channels and basis kernels that nothing needs: the function stays, the sizes shrink."""
import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

from compress.training import networks  # noqa: E402 (they follow the skip)
from compress.training.channels import Channels  # noqa: E402
from compress.training.masks import fix_mask  # noqa: E402
from compress.training.parametrizations import originals  # noqa: E402
from compress.training.technique import weighted_layers  # noqa: E402
from compress.training.techniques.basis import Basis  # noqa: E402
from compress.training.techniques.ternary import Ternary  # noqa: E402
from spec.errors import InputError  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

torch.set_num_threads(1)


class Residual(nn.Module):
    """conv1 3 -> 8; block: conv2 8 -> 10 | conv3 10 -> 8, plus the stream; a second branch with a 1x1 shortcut 8 -> 12
    beside conv4 8 -> 12; pooled to 2x2, flattened, two linear layers."""

    input_shape = (3, 8, 8)

    def __init__(self):
        super().__init__()
        sizes = {"conv1": (3, 8), "conv2": (8, 10), "conv3": (10, 8), "conv4": (8, 12)}
        for name, (i, o) in sizes.items():
            setattr(self, name, nn.Conv2d(i, o, 3, padding=1, bias=name == "conv2"))
            setattr(self, f"{name}_bn", nn.BatchNorm2d(o))
        self.shortcut = nn.Conv2d(8, 12, 1, bias=False)
        self.shortcut_bn = nn.BatchNorm2d(12)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc1, self.fc2 = nn.Linear(48, 7), nn.Linear(7, 4)

    def forward(self, x):
        x = functional.relu(self.conv1_bn(self.conv1(x)))
        y = functional.relu(self.conv2_bn(self.conv2(x)))
        x = functional.relu(self.conv3_bn(self.conv3(y)) + x)
        x = functional.relu(torch.add(self.conv4_bn(self.conv4(x)), self.shortcut_bn(self.shortcut(x))))
        x = torch.flatten(self.pool(x), 1)
        return self.fc2(functional.relu(self.fc1(x)))


def random_norms(model, generator):
    """Statistics and factors as after training."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.copy_(torch.randn(m.num_features, generator=generator) / 4)
                m.running_var.copy_(torch.rand(m.num_features, generator=generator) + 0.5)
                m.weight.copy_(torch.rand(m.num_features, generator=generator) + 0.5)
                m.bias.copy_(torch.randn(m.num_features, generator=generator) / 4 + 0.2)


def residual(seed=0):
    torch.manual_seed(seed)
    model = Residual()
    random_norms(model, torch.Generator().manual_seed(seed))
    return model.eval()


def outputs(model, count=3):
    x = torch.randn(count, *model.input_shape, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return model.eval()(x).numpy()


def check_same(model):
    """Removes what is dead; the outputs must not change. Returns the facts."""
    want = outputs(model)
    facts = Channels(model).remove()
    np.testing.assert_allclose(outputs(model), want, atol=1e-5)
    return facts


def silence(model, name, rows):
    """Outputs that are zero for any input."""
    with torch.no_grad():
        layer, norm = model.get_submodule(name), model.get_submodule(f"{name}_bn")
        layer.weight[rows] = 0
        if layer.bias is not None:
            layer.bias[rows] = 0
        norm.bias[rows] = norm.running_mean[rows] = 0


# -- what is dead ------------------------------------------------------------------------------------------------------
def test_nothing_dead_nothing_removed():
    assert check_same(residual()) == {}


def test_outputs_without_weights_go_with_their_consumers():
    model = residual()
    silence(model, "conv2", [1, 4, 5])
    assert check_same(model) == {"conv2": {"outputs": (10, 7)}, "conv3": {"inputs": (10, 7)}}
    assert (model.conv2.out_channels, model.conv3.in_channels, model.conv2_bn.num_features) == (7, 7, 7)
    assert model.conv2.bias.shape == model.conv2_bn.running_mean.shape == (7,)


def test_unread_inputs_go_with_their_producers():
    model = residual()
    with torch.no_grad():
        model.conv3.weight[:, [0, 9]] = 0
    assert check_same(model) == {"conv2": {"outputs": (10, 8)}, "conv3": {"inputs": (10, 8)}}


def test_constants_other_than_zero_stay():
    model = residual()
    with torch.no_grad():
        model.conv2.weight[[1, 4]] = 0
        model.conv2.bias[[1, 4]] = 0
        model.conv2_bn.running_mean[[1, 4]] = 0
        model.conv2_bn.bias[[1, 4]] = torch.tensor([0.5, -0.5])            # relu ends the second one at 0
    assert check_same(model) == {"conv2": {"outputs": (10, 9)}, "conv3": {"inputs": (10, 9)}}


def test_a_stream_keeps_the_union_of_its_branches():
    model = residual()
    silence(model, "conv1", [2, 3, 6])
    silence(model, "conv3", [3, 6, 7])                                      # 3 and 6 are dead in both branches
    assert check_same(model) == {
        "conv1": {"outputs": (8, 6)}, "conv2": {"inputs": (8, 6)}, "conv3": {"outputs": (8, 6)},
        "conv4": {"inputs": (8, 6)}, "shortcut": {"inputs": (8, 6)}}
    model = residual()
    with torch.no_grad():                                                   # nobody reads channel 5 of the stream
        for name in ("conv2", "conv4", "shortcut"):
            getattr(model, name).weight[:, 5] = 0
    assert check_same(model)["conv1"] == {"outputs": (8, 7)}


def test_first_linear_layer_loses_all_positions():
    model = residual()
    silence(model, "conv4", [0, 11])
    silence(model, "shortcut", [0, 11])
    assert check_same(model) == {"conv4": {"outputs": (12, 10)}, "shortcut": {"outputs": (12, 10)},
                                 "fc1": {"inputs": (48, 40)}}
    with torch.no_grad():
        model.fc2.weight[:, 3] = 0
    assert check_same(model) == {"fc1": {"outputs": (7, 6)}, "fc2": {"inputs": (7, 6)}}


def test_death_spreads_until_nothing_changes():
    """fc2 ignores fc1's output 3, which alone read conv4's channel 2; what only those needed goes with them."""
    model = residual()
    with torch.no_grad():
        model.fc2.weight[:, 3] = 0
        others = [0, 1, 2, 4, 5, 6]
        model.fc1.weight[others, 8:12] = 0
        model.conv4.weight[[i for i in range(12) if i != 2], 6] = 0
        model.shortcut.weight[[i for i in range(12) if i != 2], 6] = 0
        model.conv2.weight[:, 6] = 0
    assert check_same(model) == {
        "conv1": {"outputs": (8, 7)}, "conv2": {"inputs": (8, 7)}, "conv3": {"outputs": (8, 7)},
        "conv4": {"outputs": (12, 11), "inputs": (8, 7)}, "shortcut": {"outputs": (12, 11), "inputs": (8, 7)},
        "fc1": {"outputs": (7, 6), "inputs": (48, 44)}, "fc2": {"inputs": (7, 6)}}


def test_a_dead_branch_keeps_one_channel():
    model = residual()
    with torch.no_grad():
        model.conv3.weight.zero_()
    facts = check_same(model)
    assert facts == {"conv2": {"outputs": (10, 1)}, "conv3": {"inputs": (10, 1)}}


def test_basis_kernels_and_coefficients_shrink():
    model = residual()
    Basis(count=5, layers=["conv2", "conv3"]).start(model)
    with torch.no_grad():
        originals(model.conv3)[1][:, [2, 3]] = 0
        originals(model.conv3)[1][:, :, [0, 4]] = 0
        originals(model.conv2)[1][:, :, 1] = 0
    assert check_same(model) == {"conv2": {"outputs": (10, 8), "basis": (5, 4)},
                                 "conv3": {"inputs": (10, 8), "basis": (5, 3)}}
    assert originals(model.conv3)[1].shape == (8, 8, 3) and originals(model.conv2)[0].shape == (4, 3, 3)
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


def test_masks_shrink_and_other_forms_stay():
    model = residual()
    mask = torch.ones(8, 10, 3, 3)
    mask[:, 4] = 0
    fix_mask(model.conv3, mask)
    assert check_same(model) == {"conv2": {"outputs": (10, 9)}, "conv3": {"inputs": (10, 9)}}
    model = residual()
    Ternary(density=0.2, layers=["conv3"]).start(model)
    silence(model, "conv2", [1])
    assert check_same(model) == {}, "ternary coefficients keep their channels"


@pytest.mark.parametrize("name", ["digits", "resnet20", "resnet8", "ds_cnn"])
def test_networks_of_the_zoo(name):
    """A tenth of all outputs silenced, a tenth of all inputs unread, at random."""
    torch.manual_seed(0)
    model, rng = networks.build(name), np.random.default_rng(5)
    random_norms(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for layer in weighted_layers(model).values():
            rows, columns = (rng.random(n) < 0.1 for n in layer.weight.shape[:2])
            layer.weight[torch.from_numpy(rows)] = 0
            layer.weight[:, torch.from_numpy(columns)] *= 0
    before = sum(p.numel() for p in model.parameters())
    facts = check_same(model)
    assert facts and sum(p.numel() for p in model.parameters()) < before
    if name == "resnet20":
        assert {v for f in facts.values() for v in f} <= {"inputs", "outputs"}
        assert all("conv1" in n and "outputs" in f or "conv2" in n and "inputs" in f for n, f in facts.items()), \
            "shortcuts that fill up with zeros keep the streams"


def test_layers_used_twice_and_unknown_operations_stay():
    class Odd(nn.Module):
        input_shape = (3, 6, 6)

        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 5, 1), nn.Conv2d(5, 4, 1)

        def forward(self, x):
            return self.c(torch.sigmoid(self.b(self.b(self.a(x)))).flip(1)).mean(dim=(2, 3))

    torch.manual_seed(0)
    model = Odd()
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.weight[2] = 0
            layer.bias[2] = 0
        model.b.weight[:, 1] = model.c.weight[:, 1] = 0
    assert check_same(model) == {}


def test_models_that_cannot_be_traced_are_refused():
    class Branch(nn.Module):
        input_shape = (1, 2, 2)

        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else x

    with pytest.raises(InputError, match="model cannot be traced"):
        Channels(Branch())
