"""Collaborative Compression in the trainer's hooks: mean gradients, unchanged weights, forms, chains, resuming."""
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

from compress.training import allocation  # noqa: E402 (they follow the skip)
from compress.training.parametrizations import Chain, Masked, materialize  # noqa: E402
from compress.training.technique import Technique  # noqa: E402
from compress.training.techniques import build  # noqa: E402
from compress.training.techniques.collaborative import Collaborative, Gathered, take_form  # noqa: E402
from sim_tests.compress.training.small import accuracy, digits, digits_net, net, steps  # noqa: E402
from spec.errors import InputError  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402

torch.set_num_threads(1)


def test_the_stage_measures_and_changes_nothing():
    model, technique = net(), build({"kind": "collaborative", "ratio": "0.5"})
    before = [p.detach().clone() for p in model.parameters()]
    technique.start(model)
    steps(model, technique, 3, rate=1, momentum=0.9)
    for p, q in zip(model.parameters(), before):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
    generator, total = torch.Generator().manual_seed(0), torch.zeros_like(model[2].weight)
    for _ in range(3):
        x, y = torch.randn(8, 3, 6, 6, generator=generator), torch.randint(0, 4, (8,), generator=generator)
        total += torch.autograd.grad(functional.cross_entropy(model(x), y), model[2].weight)[0]
    torch.testing.assert_close(technique.sums["2"], total, rtol=1e-5, atol=1e-7)
    assert technique.figures() == {"batches": 3} and technique.positions == {"2": 36}


def test_all_layers_together_give_the_ratio_and_the_chain_is_the_layer():
    model = digits_net()
    steps(model, Technique(), 60, momentum=0.9, data=digits())
    technique = Collaborative(ratio=0.6, layers=["2", "6"])
    technique.start(model)
    steps(model, technique, 5, data=digits())
    technique.finish()
    macs = 0
    for name, positions in (("2", 16), ("6", 1)):
        rest, weight = technique.chosen[name], model[int(name)].weight
        o, t = len(weight), weight[0, 0].numel()
        macs += positions * (len(rest.channels) * t * o if rest.rank is None else
                             rest.rank * (len(rest.channels) * t + o))
        used = (weight != 0).reshape(o, -1, t).any(2).any(0)
        assert set(used.nonzero()[:, 0].tolist()) <= set(rest.channels.tolist())
    assert macs <= 0.4 * (16 * 2304 + 640)
    steps(model, Technique(), 60, momentum=0.9, data=digits())                           # a later stage
    assert accuracy(model, digits()) > 0.8
    x = digits()[0][:4]
    plain = materialize(model)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer, shape", [(lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 9, 7)),
                                          (lambda: nn.Linear(6, 8), (5, 6))])
def test_gathered_factors(layer, shape):
    torch.manual_seed(4)
    layer = layer()
    weight = layer.weight.detach().clone()
    take_form(layer, allocation.Rest(channels=np.array([0, 2, 5]), rank=2))
    assert type(layer.parametrizations.weight[0]) is Gathered
    part = weight[:, [0, 2, 5]].flatten(1).double().numpy()
    u, s, vt = np.linalg.svd(part, full_matrices=False)
    want = torch.zeros_like(weight)
    want[:, [0, 2, 5]] = torch.from_numpy((u[:, :2] * s[:2]) @ vt[:2]).float().reshape(8, 3, *weight.shape[2:])
    torch.testing.assert_close(layer.weight, want)
    a, b = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    torch.testing.assert_close(a.square().sum(0), torch.from_numpy(s[:2]).float())
    torch.testing.assert_close(b.square().sum(1), torch.from_numpy(s[:2]).float())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(8))
    chain = materialize(layer)
    assert isinstance(chain, Chain) and chain[0].weight.shape[1] == 6
    torch.testing.assert_close(chain(x), layer(x), rtol=1e-5, atol=1e-6)
    layer(x).square().sum().backward()
    assert a.grad.abs().sum() > 0 and b.grad.abs().sum() > 0


def test_channels_alone_are_a_mask_and_nothing_is_plain():
    layer = nn.Conv2d(4, 4, 3)
    take_form(layer, allocation.Rest(channels=np.arange(4), rank=None))
    assert not parametrize.is_parametrized(layer)
    take_form(layer, allocation.Rest(channels=np.array([1, 3]), rank=None))
    assert type(layer.parametrizations.weight[0]) is Masked
    assert (layer.weight != 0).sum((0, 2, 3)).tolist() == [0, 36, 0, 36]


def test_a_resumed_run_chooses_the_same():
    chosen = []
    for resume in (False, True):
        model, technique = net(), Collaborative(ratio=0.5)
        technique.start(model)
        steps(model, technique, 2)
        if resume:
            state, model, technique = technique.state_dict(), net(), Collaborative(ratio=0.5)
            technique.start(model)
            technique.load_state_dict(state)
        steps(model, technique, 2, seed=1)
        technique.finish()
        chosen.append(technique.chosen["2"])
    assert chosen[0].channels.tolist() == chosen[1].channels.tolist() and chosen[0].rank == chosen[1].rank


def test_bad_options():
    with pytest.raises(InputError, match="ratio must be a number above 0, below 1, not '1'"):
        Collaborative(ratio="1")
    with pytest.raises(InputError, match="equal must be one of share, mac, not 'x'"):
        Collaborative(ratio=0.5, equal="x")
    technique = Collaborative(ratio=0.5)
    technique.start(net())
    with pytest.raises(InputError, match="collaborative needs a stage of at least one epoch"):
        technique.finish()
    model, technique = net(), Collaborative(ratio=0.97)
    technique.start(model)
    steps(model, technique, 1)
    with pytest.raises(InputError, match="ratio is out of reach"):
        technique.finish()
    model, technique = net(), Collaborative(ratio=0.5)
    technique.start(model)
    technique.batches = 1
    with pytest.raises(InputError, match="layers.2 cannot be judged by its gradient"):
        technique.finish()
    with pytest.raises(InputError, match="layers.0 must be a layer without groups"):
        Collaborative(ratio=0.5, layers=["0"]).start(nn.Sequential(nn.Conv2d(8, 8, 3, groups=2)))
