"""Factorisation as part of training: at the start, later, merged again, resumed; and what ADMM gains over it."""
import io

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

from compress.training import networks, techniques  # noqa: E402 (they follow the skip)
from compress.training.parametrizations import Chain, LowRank, TensorTrain, Tucker2, materialize, originals  # noqa: E402
from compress.training.technique import Technique, default_layers  # noqa: E402
from compress.training.techniques.basis import BasisKernels  # noqa: E402
from golden import tensor_train  # noqa: E402
from sim_tests.compress.training import small  # noqa: E402
from sim_tests.compress.training.test_projections import resnet18, resnet32, train32  # noqa: E402
from spec.errors import InputError  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402

torch.set_num_threads(1)

TT = {"kind": "tensor_train", "ranks": [1, 4, 3, 1]}


def build(**options):
    return techniques.build({"kind": "factorize"} | options)


def run(technique, model, optimiser, epochs):
    """Epochs with the trainer's order of hooks, on images that depend on the epoch alone; weights after each."""
    seen = []
    for epoch in epochs:
        technique.begin_epoch(epoch, 4)
        generator = torch.Generator().manual_seed(epoch)
        for _ in range(3):
            x = torch.randn(8, *small.IMAGE, generator=generator)
            y = torch.randint(0, 4, (8,), generator=generator)
            optimiser.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimiser.step()
        seen.append(model[2].weight.detach().clone())
    return seen


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def rank_of(weight):
    """Rank of the output unfolding."""
    return int(np.linalg.matrix_rank(weight.numpy().reshape(len(weight), -1).astype(np.float64), tol=1e-4))


def test_at_the_start():
    model = small.net()
    before = model[2].weight.detach().clone()
    technique = build(projection=TT, layers=["2"])
    technique.start(model)
    want = tensor_train.tt_convolution(before.numpy().transpose(0, 2, 3, 1), (1, 4, 3, 1)).to_dense()
    assert np.abs(model[2].weight.detach().numpy().transpose(0, 2, 3, 1) - want).max() < 1e-6
    lost = float((before - model[2].weight.detach()).norm() / before.norm())
    assert technique.figures() == {"2/decomposition": pytest.approx(lost)} and lost > 0.1
    assert [tuple(p.shape) for p in originals(model[2])] == [(1, 16, 4), (4, 9, 3), (3, 8, 1)]
    run(technique, model, adam(model), range(4))
    weight = model[2].weight.detach().clone()
    assert (weight - before).abs().max() > 1e-2 and rank_of(weight) == 4
    technique.finish()
    assert torch.equal(model[2].weight, weight) and isinstance(materialize(model)[2], Chain)


@pytest.mark.parametrize("options, form", [
    (TT, TensorTrain), ({"kind": "tucker", "factor": 1.2}, Tucker2), ({"kind": "svd", "rank": 4}, LowRank),
    ({"kind": "svd", "rank": "6", "form": "spatial"}, LowRank), ({"kind": "basis", "count": 3}, BasisKernels)])
def test_later(options, form):
    """Dense until epoch 2: the same as without the technique; then factors of the weights of that moment."""
    model, plain = nets = wide(options), wide(options)
    technique = build(projection=options, layers=["2"], at="2")
    technique.start(model)
    optimisers = [adam(m) for m in nets]
    dense = run(Technique(), plain, optimisers[1], range(2))
    assert all(torch.equal(a, b) for a, b in zip(run(technique, model, optimisers[0], range(2)), dense))
    assert technique.figures() == {}
    technique.begin_epoch(2, 4)
    gap = float((model[2].weight - dense[1]).detach().norm() / dense[1].norm())
    assert technique.figures() == {"2/decomposition": pytest.approx(gap)} and gap > 0.01
    weight = originals(model[2])[0].detach().clone()
    last = run(technique, model, optimisers[0], [3])[0]
    assert torch.equal(originals(model[2])[0], weight)       # no gradient, no decay: the optimiser leaves it alone
    technique.finish()
    assert torch.equal(model[2].weight, last) and type(model[2].parametrizations.weight[0]) is form
    assert (materialize(model)(small.images()) - model(small.images())).abs().max() < 1e-5


def wide(options):
    """`small.net`, with 16 channels in front of layer "2" where ranks must be multiples of 8."""
    if "factor" not in options:
        return small.net()
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4))


def test_merged_again():
    model = small.net()
    technique = build(projection=TT, layers=["2"], at=1, merge_at=3)
    technique.start(model)
    weights = run(technique, model, adam(model), range(4))
    assert [rank_of(w) for w in weights] == [16, 4, 4, 16]
    technique.finish()
    assert not parametrize.is_parametrized(model[2]) and torch.equal(model[2].weight, weights[-1])
    at_once = small.net()
    technique = build(projection=TT, layers=["2"], merge_at=4)
    technique.start(at_once)
    weights = run(technique, at_once, adam(at_once), range(4))
    technique.finish()
    assert [rank_of(w) for w in weights] == [4] * 4
    assert type(at_once[2]) is nn.Conv2d and torch.equal(at_once[2].weight, weights[-1])


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_is_the_same(stop):
    options = {"projection": TT, "layers": ["2"], "at": 1, "merge_at": 3}
    whole, technique = small.net(), build(**options)
    technique.start(whole)
    optimiser, stored = adam(whole), io.BytesIO()
    run(technique, whole, optimiser, range(stop))
    torch.save([whole.state_dict(), technique.state_dict(), optimiser.state_dict()], stored)
    run(technique, whole, optimiser, range(stop, 4))
    stored.seek(0)
    saved = torch.load(stored, weights_only=True)
    again, other = small.net(), build(**options)
    other.start(again)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed = adam(again)
    resumed.load_state_dict(saved[2])
    run(other, again, resumed, range(stop, 4))
    assert technique.figures() == other.figures()
    for model, last in ((whole, technique), (again, other)):
        last.finish()
        assert not parametrize.is_parametrized(model[2])
    for a, b in zip(whole.parameters(), again.parameters()):
        assert torch.equal(a, b)


def test_a_conversion_without_epochs():
    model = small.net()
    technique = build(projection=TT, layers=["2"], at=3)
    technique.start(model)
    technique.finish()
    assert rank_of(model[2].weight.detach()) == 4 and isinstance(materialize(model)[2], Chain)


@pytest.mark.parametrize("options, text", [
    ({"projection": {"kind": "nm", "pattern": "2:4"}},
     "technique.projection.kind must be one of tensor_train, tucker, svd, basis, not 'nm'"),
    ({"projection": TT, "merge_at": 0}, "technique.merge_at must be a whole number in 1.."),
    ({"projection": TT, "at": 2, "merge_at": 2}, "technique.merge_at must be a whole number in 3.."),
    ({"projection": TT, "at": -1}, "technique.at must be a whole number in 0.."),
    ({"projection": TT, "layers": {"2": {"kind": "tucker"}}}, "technique.layers.2.ranks must be given, or factor"),
])
def test_bad_options(options, text):
    with pytest.raises(InputError, match=text):
        build(**options)


def test_stages_that_are_too_short():
    for options, text in (({"at": 4}, "^at must be at most 3 in a stage of 4 epochs, not 4"),
                          ({"merge_at": 5}, "^merge_at must be at most 4 in a stage of 4 epochs, not 5")):
        technique = build(projection=TT, layers=["2"], **options)
        technique.start(small.net())
        with pytest.raises(InputError, match=text):
            technique.check(4)
    with pytest.raises(InputError, match=r"^layers.2.ranks\[2\] must be at most 8 \(redundant\), not 9"):
        build(projection=TT | {"ranks": [1, 8, 9, 1]}, layers=["2"]).start(small.net())


def test_published_ranks_on_the_networks_themselves():
    """The layers, their names and their orientation are those that the published tables count."""
    model = networks.build("resnet32")
    layers = list(resnet32())
    technique = build(projection={"kind": "tensor_train"},
                      layers={name: {k: list(v) for k, v in train32(name).items()} for name, *_ in layers})
    technique.start(model)
    assert list(technique.layers) == default_layers(model) == [name for name, *_ in layers]
    assert sum(p.numel() for name, *_ in layers for p in originals(model.get_submodule(name))) == 163328
    plain = materialize(model)
    for name, shape, _, stride in layers:
        first, middle, last = plain.get_submodule(name)
        assert (last.out_channels, first.in_channels) == shape[:2] and middle.stride == (stride, stride)
    published = {name: (shape, stride) for name, shape, _, stride in resnet18()}
    with torch.device("meta"):                               # shapes only
        model = networks.build("resnet18")
    assert {name: (tuple(model.get_submodule(name).weight.shape), model.get_submodule(name).stride[0])
            for name in default_layers(model)} == published
