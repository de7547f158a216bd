"""ADMM: the algorithm worked by hand, its ends, resuming, and what it gains on digits."""
import copy
import io

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

from compress import demo  # noqa: E402 (they follow the skip)
from compress.training import projections, techniques  # noqa: E402
from compress.training.parametrizations import Chain, Masked, TensorTrain, Unified, materialize  # noqa: E402
from compress.training.technique import Technique  # noqa: E402
from compress.training.techniques.admm import ADMM  # noqa: E402
from sim_tests.compress.training import small  # noqa: E402
from spec.errors import InputError  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402

torch.set_num_threads(1)


def build(**options):
    return techniques.build({"kind": "admm"} | options)


def sgd_step(model, technique, rate):
    """One step on the penalty alone."""
    model.zero_grad()
    technique.penalty().backward()
    technique.after_backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= rate * p.grad
    technique.after_step()


def test_two_epochs_by_hand():
    """The two largest weights of four form the set."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0, 1.0], [2.0, -3.0]]))
    admm = build(projection={"kind": "channel", "unit": "kernel", "keep": "0.5"}, layers=["0"], rho="0.5")
    admm.start(model)
    z, u = admm.z["0"], admm.u["0"]
    assert z.tolist() == [[4, 0], [0, -3]] and u.tolist() == [[0, 0], [0, 0]]
    admm.begin_epoch(0, 2)
    assert admm.z["0"].tolist() == [[4, 0], [0, -3]] and admm.u["0"].tolist() == [[0, 1], [2, 0]]
    assert admm.penalty().item() == 0.25 * (2 ** 2 + 4 ** 2)
    sgd_step(model, admm, 0.5)                               # W -= 0.5 * 0.5 * (W - Z + U)
    assert model[0].weight.tolist() == [[4, 0.5], [1, -3]]
    size = (16 + 0.25 + 1 + 9) ** 0.5
    assert admm.figures() == pytest.approx(
        {"0/residual": 1.25 ** 0.5 / size, "0/dual_step": 0, "residual": 1.25 ** 0.5 / size, "dual_step": 0}, abs=1e-7)
    admm.begin_epoch(1, 2)                                   # W + U = [[4, 1.5], [3, -3]]: the first of equals stays
    assert admm.z["0"].tolist() == [[4, 0], [3, 0]] and admm.u["0"].tolist() == [[0, 1.5], [0, -3]]
    assert admm.figures()["0/dual_step"] == pytest.approx(0.5 * 18 ** 0.5 / size)
    with admm.projected():
        assert model[0].weight.tolist() == [[4, 0], [0, -3]]
    assert model[0].weight.tolist() == [[4, 0.5], [1, -3]]


def test_rho_grows_and_updates_pause():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0, 1.0], [2.0, -3.0]]))
    admm = build(projection={"kind": "channel", "unit": "kernel", "keep": 0.5}, layers=["0"], rho=1, rho_factor="4",
                 rho_at=0.5, interval=2)
    admm.start(model)
    seen = []
    for epoch in range(4):
        admm.begin_epoch(epoch, 4)
        seen.append((admm.u["0"].tolist(), admm.penalty().item()))
    first = [[0, 1], [2, 0]]
    quarter = [[0, 1.25], [2.5, 0]]                          # a quarter of U, then once more W - Z
    assert [u for u, _ in seen] == [first, first, quarter, quarter]
    assert [p for _, p in seen] == [10, 10, 2 * (2.25 ** 2 + 4.5 ** 2), 2 * (2.25 ** 2 + 4.5 ** 2)]


def run(admm, model, epochs, first=0, optimiser=None):
    """Epochs with the trainer's order of hooks, on random images that depend on the epoch alone."""
    optimiser = optimiser or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(first, first + epochs):
        admm.begin_epoch(epoch, 6)
        generator = torch.Generator().manual_seed(epoch)
        for _ in range(4):
            x = torch.randn(8, *small.IMAGE, generator=generator)
            y = torch.randint(0, 4, (8,), generator=generator)
            optimiser.zero_grad()
            (functional.cross_entropy(model(x), y) + admm.penalty()).backward()
            optimiser.step()
    return optimiser


def test_against_an_independent_loop():
    """The same algorithm in NumPy around PyTorch's gradient of the loss alone."""
    options = {"kind": "tensor_train", "ranks": (1, 4, 3, 1)}
    model, other = small.net(), small.net()
    admm = build(projection=options, layers=["2"], rho=0.3)
    admm.start(model)
    run(admm, model, 3)
    projection, layer = projections.build(options), other[2]
    w = layer.weight.detach().numpy().astype(np.float64)
    z, u, speed = projection.project(w), np.zeros_like(w), {}
    for epoch in range(3):
        w = layer.weight.detach().numpy().astype(np.float64)
        z = projection.project(w + u)
        u = u + w - z
        generator = torch.Generator().manual_seed(epoch)
        for _ in range(4):
            x = torch.randn(8, *small.IMAGE, generator=generator)
            y = torch.randint(0, 4, (8,), generator=generator)
            other.zero_grad()
            functional.cross_entropy(other(x), y).backward()
            with torch.no_grad():
                for name, p in other.named_parameters():
                    g = p.grad.numpy().astype(np.float64)
                    if name == "2.weight":
                        g = g + 0.3 * (p.numpy() - z + u)
                    speed[name] = 0.9 * speed.get(name, 0) + g
                    p -= torch.from_numpy(0.05 * speed[name]).float()
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert (p - q).abs().max() < 2e-6, name
    assert np.abs(admm.u["2"].numpy() - u).max() < 2e-6


FORMS = [({"kind": "tensor_train", "ranks": ["1", "4", "3", "1"]}, TensorTrain),
         ({"kind": "nm", "pattern": "2:4"}, Masked), ({"kind": "pattern"}, Masked),
         ({"kind": "diagonal", "count": 4}, Masked), ({"kind": "channel", "keep": 0.5}, Masked),
         ({"kind": "unified", "block": 4}, Unified), ({"kind": "basis", "count": 3}, None),
         ({"kind": "tucker", "ranks": [4, 3]}, None), ({"kind": "svd", "rank": 5}, None)]


@pytest.mark.parametrize("options, form", FORMS, ids=lambda v: v["kind"] if isinstance(v, dict) else "")
def test_the_pull_reaches_the_set(options, form):
    model = small.net()
    admm = build(projection=options, layers=["2"], rho=1.0)
    admm.start(model)
    admm.begin_epoch(0, 6)
    before = admm.figures()["residual"]
    run(admm, model, 12, optimiser=torch.optim.SGD(model.parameters(), lr=0.2))
    assert admm.figures()["residual"] < before / 4
    ends = {}
    for end in ("keep", "project", "factorize"):
        ends[end] = copy.deepcopy(model)
        last = build(projection=options, layers=["2"], finish=end)
        last.start(ends[end])
        last.load_state_dict(admm.state_dict())
        last.finish()
    assert torch.equal(ends["keep"][2].weight, model[2].weight)
    want = projections.build(options | admm.state_dict()["memory"]["2"]).project(model[2].weight.detach().numpy())
    assert np.array_equal(ends["project"][2].weight.detach().numpy(), want)
    assert not parametrize.is_parametrized(ends["project"][2])
    got = ends["factorize"][2]
    assert np.abs(got.weight.detach().numpy() - want).max() < 1e-6
    assert form is None or type(got.parametrizations.weight[0]) is form
    # a later stage stays in the set, and what runs is the network that was trained
    small.steps(ends["factorize"], Technique(), 3)
    weight = got.weight.detach().numpy()
    projection = projections.build(options | admm.state_dict()["memory"]["2"])
    assert np.abs(weight - want).max() > 1e-4
    assert np.abs(projection.project(weight) - weight).max() < 1e-5
    x = small.images()
    assert (materialize(ends["factorize"])(x) - ends["factorize"](x)).abs().max() < 1e-5


@pytest.mark.parametrize("options", [FORMS[0][0], FORMS[2][0]], ids=("tensor_train", "pattern"))
def test_a_resumed_run_is_the_same(options):
    whole = small.net()
    admm = build(projection=options, layers=["2"], rho=0.3, rho_factor=3, rho_at=0.5)
    admm.start(whole)
    optimiser = run(admm, whole, 4)
    stored = io.BytesIO()
    torch.save({"model": whole.state_dict(), "admm": admm.state_dict(), "optimiser": optimiser.state_dict()}, stored)
    run(admm, whole, 2, 4, optimiser)

    stored.seek(0)
    saved = torch.load(stored, weights_only=True)
    again, other = small.net(), build(projection=options, layers=["2"], rho=0.3, rho_factor=3, rho_at=0.5)
    with torch.no_grad():
        again[2].weight.normal_(generator=torch.Generator().manual_seed(1))       # other weights when it starts
    other.start(again)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["admm"])
    resumed = torch.optim.SGD(again.parameters(), lr=0.05, momentum=0.9)
    resumed.load_state_dict(saved["optimiser"])
    run(other, again, 2, 4, resumed)
    for a, b in zip(whole.parameters(), again.parameters()):
        assert torch.equal(a, b)
    assert admm.figures() == other.figures()
    for name in ("z", "u"):
        assert torch.equal(getattr(admm, name)["2"], getattr(other, name)["2"])
    admm.finish()
    other.finish()
    assert torch.equal(whole[2].weight, again[2].weight)


def test_options_per_layer():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 1), nn.Linear(16, 16))
    admm = build(projection={"kind": "tensor_train"}, layers={
        "1": {"ranks": [1, 8, 8, 1]}, "2": {"kind": "svd", "rank": 4}, "3": {"kind": "nm", "pattern": "2:4"},
        "*": {"ranks": [1, 4, 4, 1]}})
    admm.start(model)
    assert list(admm.z) == ["0", "1", "2", "3"]
    admm.finish()
    factors = materialize(model)
    assert [type(m) for m in factors] == [Chain, Chain, Chain, nn.Linear]
    assert [m[0].out_channels for m in factors[:3]] == [4, 8, 4]
    default = build(projection={"kind": "nm", "pattern": "1:4"})
    default.start(nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 2)))
    assert list(default.z) == ["1"]


def small_model():
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3, groups=2), nn.Linear(16, 2))


@pytest.mark.parametrize("options, text", [
    ({}, "technique.projection must be given"),
    ({"projection": "tt"}, "technique.projection must be a mapping with kind, not 'tt'"),
    ({"projection": {"kind": "nm"}}, "technique.projection.pattern must be given"),
    ({"projection": {"kind": "tensor_train"}, "layers": ["1"]}, "technique.projection.ranks must be given, or factor"),
    ({"projection": {"kind": "tensor_train"}, "layers": {"1": {"rank": 3}}},
     r"technique.layers.1.rank is not a known field \(did you mean ranks\?\)"),
    ({"projection": {"kind": "tensor_train"}, "layers": {"1": 3}}, "technique.layers.1 must be a mapping of options"),
    ({"projection": {"kind": "nm", "pattern": "2:4"}, "rho": 0}, "technique.rho must be a number above 0"),
    ({"projection": {"kind": "nm", "pattern": "2:4"}, "interval": 0}, "technique.interval must be a whole number in 1"),
    ({"projection": {"kind": "nm", "pattern": "2:4"}, "finish": "round"}, "technique.finish must be one of fact"),
])
def test_bad_options(options, text):
    with pytest.raises(InputError, match=text):
        build(**options)


@pytest.mark.parametrize("options, text", [
    ({"projection": {"kind": "tensor_train", "ranks": [1, 17, 8, 1]}, "layers": ["1"]},
     r"^layers.1.ranks\[1\] must be at most 1 \* 16 = 16 \(would be clipped\), not 17"),
    ({"projection": {"kind": "svd", "rank": 4}, "layers": ["2"]}, "^layers.2 must be a layer without groups, not '2"),
    ({"projection": {"kind": "nm", "pattern": "2:4"}, "layers": ["layer1.*"]}, "^layers matches no layer with weights"),
    ({"projection": {"kind": "nm", "pattern": "2:4"}, "layers": []}, "^layers must be given: the network has no layer"),
    ({"projection": {"kind": "nm", "pattern": "2:16"}, "layers": ["1"]}, "^layers.1.pattern must have blocks of at mo"),
])
def test_layers_that_do_not_fit(options, text):
    with pytest.raises(InputError, match=text):
        build(**options).start(small_model())


def test_weights_that_are_not_numbers():
    model = small_model()
    admm = build(projection={"kind": "nm", "pattern": "2:4"}, layers=["1"])
    admm.start(model)
    with torch.no_grad():
        model[1].weight[0, 0, 0, 0] = float("nan")
    for call in (lambda: admm.begin_epoch(0, 1), lambda: admm.start(model)):
        with pytest.raises(InputError, match=r"layers.1 must have finite weights \(NaN or infinity found\)"):
            call()


def test_a_factored_layer_is_refused():
    model = small_model()
    parametrize.register_parametrization(model[1], "weight", TensorTrain(shape=(16, 8, 3, 3), ranks=(1, 4, 4, 1)))
    with pytest.raises(InputError, match="layers.1 must have a plain .*TensorTrain"):
        build(projection={"kind": "nm", "pattern": "2:4"}, layers=["1"]).start(model)


def test_masked_weights_stay_masked():
    model = small_model()
    mask = torch.rand(16, 8, 3, 3, generator=torch.Generator().manual_seed(0)) > 0.5
    parametrize.register_parametrization(model[1], "weight", Masked(mask=mask))
    admm = build(projection={"kind": "nm", "pattern": "1:4"}, layers=["1"])
    admm.start(model)
    before = model[1].weight.detach().clone()
    with admm.projected():
        assert int((model[1].weight != 0).sum()) < int((before != 0).sum())
    assert torch.equal(model[1].weight, before)
    admm.begin_epoch(0, 1)
    admm.finish()
    assert not (model[1].weight != 0)[~mask].any() and isinstance(admm, ADMM)


# -- digits ------------------------------------------------------------------------------------------------------------
def digits_net():
    """1 -> 16 -> 32 -> 32 channels with batch normalisation, 10 classes: convolutions "0", "3", "6"."""
    torch.manual_seed(7)
    body = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1)):
        body += [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs),
                 nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def train(model, technique, *, epochs, rate, seed):
    """SGD with momentum and a falling rate on the demo's training images, with the trainer's order of hooks."""
    optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=1e-4)
    generator, (x, y) = torch.Generator().manual_seed(seed), small.digits()
    done, steps = 0, epochs * -(-len(x) // 64)
    for epoch in range(epochs):
        technique.begin_epoch(epoch, epochs)
        model.train()
        for part in torch.randperm(len(x), generator=generator).split(64):
            for group in optimiser.param_groups:
                group["lr"] = rate * (1 - done / steps)
            done += 1
            optimiser.zero_grad()
            (functional.cross_entropy(model(x[part]), y[part]) + technique.penalty()).backward()
            optimiser.step()


@torch.no_grad()
def settled_accuracy(model):
    """Held-out accuracy of a copy whose batch statistics are those of the training images."""
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
            m.momentum = None
    model.train()(small.digits()[0])
    return small.accuracy(model.eval(), tuple(torch.from_numpy(a) for a in demo.digits("heldout")))


def test_digits_admm_against_decomposition_after_training():
    """Ranks (4, 4), 736 parameters of 13,824: little is left after training, much after training by ADMM."""
    options = {"projection": {"kind": "tensor_train", "ranks": [1, 4, 4, 1]}, "layers": ["3", "6"]}
    model = digits_net()
    train(model, Technique(), epochs=8, rate=0.1, seed=1)
    dense = settled_accuracy(model)
    after = copy.deepcopy(model)
    techniques.build({"kind": "factorize"} | options).start(after)
    post_training = settled_accuracy(after)
    admm = build(**options, rho=1)
    admm.start(model)
    first = admm.figures()["residual"]
    train(model, admm, epochs=12, rate=0.05, seed=2)
    with admm.projected():
        projected = settled_accuracy(model)
    residual = admm.figures()["residual"]
    admm.finish()
    train(model, Technique(), epochs=4, rate=0.02, seed=3)
    tuned = settled_accuracy(materialize(model))
    shown = f"dense {dense:.3f}, after training {post_training:.3f}, ADMM {projected:.3f}, fine-tuned {tuned:.3f}"
    assert dense > 0.95 and residual < first / 3, shown
    assert projected > post_training + 0.3 and tuned > post_training + 0.5 and tuned > dense - 0.08, shown
