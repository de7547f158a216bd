"""Parametrised layers against golden's decompositions, and the plain chains they turn into."""
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

from compress.training.parametrizations import (  # noqa: E402 (they follow the skip)
    Chain, LowRank, Masked, TensorTrain, Tucker2, Unified, check_layer, materialize, originals)
from golden import tensor_train, tucker  # noqa: E402
from spec.errors import InputError  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402

torch.set_num_threads(1)

GEOMETRIES = [{"padding": 1}, {"stride": 2, "padding": (1, 0)}, {"padding": "same", "dilation": (2, 1)},
              {"stride": (1, 3), "padding": (2, 1), "dilation": 2, "bias": False}]
#: name -> form of a kernel [12, 8, 3, 3] that is below full rank.
KERNELS = {
    "order 3": lambda shape: TensorTrain(shape=shape, ranks=(1, 5, 4, 1)),
    "order 5": lambda shape: TensorTrain(shape=shape, ranks=(1, 3, 5, 4, 2, 1), out_modes=(4, 3), in_modes=(4, 2)),
    "tucker": lambda shape: Tucker2(shape=shape, ranks=(5, 4)),
    "channel": lambda shape: LowRank(shape=shape, rank=5),
    "spatial": lambda shape: LowRank(shape=shape, rank=5, form="spatial"),
}
MATRICES = {
    "train of 2": lambda shape: TensorTrain(shape=shape, ranks=(1, 4, 1)),
    "train of 4": lambda shape: TensorTrain(shape=shape, ranks=(1, 3, 4, 2, 1), out_modes=(4, 3), in_modes=(4, 2)),
    "svd": lambda shape: LowRank(shape=shape, rank=4),
}
#: The same at full rank.
FULL = [
    ((12, 8, 3, 3), lambda s: TensorTrain(shape=s, ranks=(1, 12, 8, 1))),
    ((12, 8, 3, 3), lambda s: TensorTrain(shape=s, ranks=(1, 4, 12, 8, 2, 1), out_modes=(4, 3), in_modes=(4, 2))),
    ((12, 8, 3, 3), lambda s: Tucker2(shape=s, ranks=(12, 8))),
    ((12, 8, 3, 3), lambda s: LowRank(shape=s, rank=12)),
    ((12, 8, 3, 3), lambda s: LowRank(shape=s, rank=24, form="spatial")),
    ((12, 8, 3, 2), lambda s: TensorTrain(shape=s, ranks=(1, 12, 8, 1))),
    ((12, 8), lambda s: TensorTrain(shape=s, ranks=(1, 8, 1))),
    ((12, 8), lambda s: TensorTrain(shape=s, ranks=(1, 4, 8, 2, 1), out_modes=(4, 3), in_modes=(4, 2))),
    ((12, 8), lambda s: LowRank(shape=s, rank=8)),
]


@pytest.fixture
def generator(seed):
    return torch.Generator().manual_seed(seed)


def filled(layer, generator):
    """The layer with parameters drawn from ``generator``."""
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return layer


def convolution(generator, **geometry):
    return filled(nn.Conv2d(8, 12, 3, **geometry), generator)


def close(got, want, limit=2e-5):
    got, want = got.detach(), want.detach()
    assert got.shape == want.shape and (got - want).abs().max() <= limit * max(1.0, float(want.abs().max()))


def kernel(weight):
    """Float64 [O, R, S, I]."""
    return weight.detach().numpy().astype(np.float64).transpose(0, 2, 3, 1)


def test_weights_are_goldens(generator):
    layer = convolution(generator)
    w = kernel(layer.weight)
    matrix = w.transpose(0, 3, 1, 2).reshape(12, -1)
    across = w.transpose(3, 1, 0, 2).reshape(24, 36)
    want = {
        "order 3": tensor_train.tt_convolution(w, (1, 5, 4, 1)).to_dense(),
        "order 5": tensor_train.tt_convolution(w, (1, 3, 5, 4, 2, 1), out_modes=(4, 3), in_modes=(4, 2)).to_dense(),
        "tucker": tucker.tucker2(w, (5, 4), sweeps=2).to_dense(),
        "channel": tucker.svd(matrix, 5).to_dense().reshape(12, 8, 3, 3).transpose(0, 2, 3, 1),
        "spatial": tucker.svd(across, 5).to_dense().reshape(8, 3, 12, 3).transpose(2, 1, 3, 0)}
    for name, form in KERNELS.items():
        layer = convolution(torch.Generator().manual_seed(1))
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(w.transpose(0, 3, 1, 2)))
        parametrize.register_parametrization(layer, "weight", form((12, 8, 3, 3)))
        assert np.abs(kernel(layer.weight) - want[name]).max() < 1e-5, name
    w = torch.randn(12, 8, generator=generator)
    for name, form in MATRICES.items():
        layer = nn.Linear(8, 12)
        with torch.no_grad():
            layer.weight.copy_(w)
        parametrize.register_parametrization(layer, "weight", form((12, 8)))
        want = tucker.svd(w.numpy(), 4).to_dense()[:, 0, 0] if name != "train of 4" else \
            tensor_train.tt_linear(w.numpy(), (4, 3), (4, 2), (1, 3, 4, 2, 1)).to_dense()
        assert np.abs(layer.weight.detach().numpy() - want).max() < 1e-5, name


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: str(len(g)))
def test_chain_of_a_convolution_is_the_layer(generator, name, geometry):
    layer = convolution(generator, **geometry)
    parametrize.register_parametrization(layer, "weight", KERNELS[name]((12, 8, 3, 3)))
    plain = materialize(layer)
    assert isinstance(plain, Chain) and [n for n, _ in plain.named_children()] == ["1", "2", "3"][:len(plain)]
    assert len(plain) == (2 if name in ("channel", "spatial") else 3)
    assert all(type(m) is nn.Conv2d and not parametrize.is_parametrized(m) for m in plain)
    assert [m.bias is not None for m in plain] == [False] * (len(plain) - 1) + [layer.bias is not None]
    x = torch.randn(2, 8, 9, 11, generator=generator)
    close(plain(x), layer(x))
    if name.startswith("order"):
        first, middle, last = plain
        assert (first.kernel_size, middle.kernel_size, last.kernel_size) == ((1, 1), (3, 3), (1, 1))
        assert (first.out_channels, middle.out_channels) == ((4, 5))
        assert (middle.stride, middle.padding, middle.dilation) == (layer.stride, layer.padding, layer.dilation)


@pytest.mark.parametrize("name", MATRICES)
def test_chain_of_a_linear_layer_is_the_layer(generator, name):
    layer = filled(nn.Linear(8, 12), generator)
    parametrize.register_parametrization(layer, "weight", MATRICES[name]((12, 8)))
    plain = materialize(layer)
    assert [type(m) for m in plain] == [nn.Linear] * 2 and plain[0].bias is None and plain[0].out_features == 4
    x = torch.randn(5, 8, generator=generator)
    close(plain(x), layer(x))


@pytest.mark.parametrize("shape, form", FULL)
def test_full_rank_is_exact_and_originals_come_back(generator, shape, form):
    layer = filled(nn.Conv2d(8, 12, shape[2:], padding=1) if len(shape) == 4 else nn.Linear(8, 12), generator)
    before = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", form(shape))
    close(layer.weight, before)
    first = [p.detach().clone() for p in originals(layer)]
    x = torch.randn(2, 8, *[7] * (len(shape) - 2), generator=generator)
    want = layer(x)
    with torch.no_grad():
        layer.weight = layer.weight.clone()                  # right_inverse of the rebuilt weight
    assert [p.shape for p in originals(layer)] == [p.shape for p in first]
    close(layer(x), want, 5e-5)
    close(materialize(layer)(x), want, 5e-5)


@pytest.mark.parametrize("name", [*KERNELS, *MATRICES])
def test_gradients_reach_every_factor(generator, name):
    layer = convolution(generator) if name in KERNELS else filled(nn.Linear(8, 12), generator)
    shape = tuple(layer.weight.shape)
    parametrize.register_parametrization(layer, "weight", (KERNELS | MATRICES)[name](shape))
    cotangent = torch.randn(shape, generator=generator)
    (layer.weight * cotangent).sum().backward()
    form = layer.parametrizations.weight[0]
    for n, part in enumerate(originals(layer)):
        assert part.grad is not None and part.grad.shape == part.shape
        # the weight is linear in each factor, so a unit step in any direction is an exact derivative
        step = torch.randn(part.shape, generator=generator)
        moved = [p + step if k == n else p for k, p in enumerate(originals(layer))]
        slope = ((form(*moved) - layer.weight) * cotangent).sum()
        close((part.grad * step).sum(), slope, 2e-4)
        assert part.grad.abs().min() > 0


def test_masked(generator):
    layer = convolution(generator, padding=1)
    mask = torch.rand(12, 8, 3, 3, generator=generator) > 0.5
    want = layer.weight.detach() * mask
    parametrize.register_parametrization(layer, "weight", Masked(mask=mask))
    assert torch.equal(layer.weight, want)
    layer.weight.sum().backward()
    assert torch.equal(originals(layer)[0].grad, mask.float())
    plain = materialize(layer)
    assert type(plain) is nn.Conv2d and torch.equal(plain.weight, want) and "mask" not in str(list(plain.state_dict()))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.again = self.body[0]                            # one layer under two names
        self.linear = nn.Linear(12, 12)

    def forward(self, x):
        x = self.body(x) + self.again(x)
        return self.linear(x.mean(dim=(2, 3)))


def test_materialize_leaves_the_model_alone(generator):
    model = filled(Net(), generator).eval()
    x = torch.randn(2, 8, 5, 5, generator=generator)
    parametrize.register_parametrization(model.body[0], "weight", TensorTrain(shape=(12, 8, 3, 3), ranks=(1, 5, 4, 1)))
    parametrize.register_parametrization(model.linear, "weight", Masked(mask=torch.eye(12)))
    want, names = model(x), list(model.state_dict())
    plain = materialize(model)
    assert list(model.state_dict()) == names and parametrize.is_parametrized(model.linear)
    assert isinstance(plain.body[0], Chain) and plain.again is plain.body[0] and not plain.training
    assert not any(parametrize.is_parametrized(m) for m in plain.modules())
    assert "body.0.1.weight" in plain.state_dict() and type(plain.linear) is nn.Linear
    close(plain(x), want)
    assert all(p.requires_grad for p in plain.parameters())


def test_two_forms_on_one_weight_become_a_plain_weight(generator):
    layer = filled(nn.Linear(8, 12), generator)
    mask = torch.rand(12, 8, generator=generator) > 0.3
    parametrize.register_parametrization(layer, "weight", LowRank(shape=(12, 8), rank=2))
    parametrize.register_parametrization(layer, "weight", Masked(mask=mask))
    plain = materialize(layer)
    assert type(plain) is nn.Linear and torch.equal(plain.weight, layer.weight)
    assert isinstance(plain.weight, nn.Parameter) and list(plain.state_dict()) == ["bias", "weight"]
    close(plain(torch.eye(8)), layer(torch.eye(8)))


def test_refuses():
    shape = (12, 8, 3, 3)
    for call, text in [
            (lambda: TensorTrain(shape=shape, ranks=(1, 13, 8, 1)), r"ranks\[1\] must be at most 1 \* 12 = 12"),
            (lambda: TensorTrain(shape=shape, ranks=(1, 12, 9, 1)), r"ranks\[2\] must be at most 8"),
            (lambda: TensorTrain(shape=shape, ranks=(12, 8)), r"ranks must be 4 numbers with 1 at both ends"),
            (lambda: TensorTrain(shape=shape, ranks=(1, 4, 5, 4, 1), out_modes=(4, 4)), "out_modes must multiply to"),
            (lambda: TensorTrain(shape=(12, 8), ranks=(1, 9, 1)), r"ranks\[1\] must be at most 8"),
            (lambda: Tucker2(shape=shape, ranks=(13, 8)), r"ranks.r_out must be an integer in 1..12, not 13"),
            (lambda: Tucker2(shape=(12, 8), ranks=(2, 2)), r"shape must be a kernel \[O, I, R, S\], not \(12, 8\)"),
            (lambda: LowRank(shape=shape, rank=13), r"rank must be a whole number in 1..12, not 13"),
            (lambda: LowRank(shape=(12, 8), rank=2, form="spatial"), "form must be channel for a matrix"),
            (lambda: LowRank(shape=shape, rank=2, form="other"), "form must be one of channel, spatial, not 'other'"),
            (lambda: check_layer(nn.Conv2d(8, 12, 3, groups=4), "layers.a"),
             "layers.a must be a layer without groups, not '4 groups'"),
            (lambda: check_layer(nn.Conv2d(8, 12, 3, padding_mode="reflect"), "layers.a"),
             "layers.a must be padded with zeros, not 'reflect'")]:
        with pytest.raises(InputError, match=text):
            call()


def test_materialize_keeps_many_layers_apart():
    """Modules that are dropped on the way must not lend their identity to new ones."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(60)))
    for layer in model:
        parametrize.register_parametrization(layer, "weight", LowRank(shape=(8, 8), rank=2))
    plain = materialize(model)
    assert [[type(m) for m in chain] for chain in plain] == [[nn.Linear] * 2] * 60
    assert len({id(m) for m in plain.modules()}) == 1 + 3 * 60


def test_unified_by_hand():
    layer = nn.Linear(5, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -3.0, 2.0, 0.0, -7.0]]))
    parametrize.register_parametrization(layer, "weight", Unified(negative=layer.weight < 0, block=2))
    assert layer.weight.tolist() == [[2, -2, 1, 1, -7]] and originals(layer)[0].tolist() == [[2, 1, 7]]
    (layer.weight * torch.tensor([[1.0, 10.0, 100.0, 1000.0, 10000.0]])).sum().backward()
    assert originals(layer)[0].grad.tolist() == [[-9, 1100, -10000]]
