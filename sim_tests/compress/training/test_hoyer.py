"""DeepHoyer: values and gradients by hand, thresholds, and that regularisers make real networks sparser."""
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

from compress.training.technique import Technique  # noqa: E402 (they follow the skip)
from compress.training.techniques import build  # noqa: E402
from compress.training.techniques.hoyer import Hoyer, group_hoyer_square, hoyer_square  # noqa: E402
from sim_tests.compress.training.small import accuracy, digits, digits_net, images, net, steps  # noqa: E402
from spec.errors import InputError  # noqa: E402

torch.set_num_threads(1)


def random(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)


def test_hoyer_square_by_hand():
    w = torch.tensor([3.0, -4.0, 0.0, 1.0], requires_grad=True)
    value = hoyer_square(w)
    assert value.item() == pytest.approx(64 / 26)
    value.backward()
    # d HS / dw = 2 sign(w) S / Q - 2 w S^2 / Q^2, S = 8, Q = 26: zero at |w| = Q / S = 3.25
    want = [2 * (s * 8 / 26) - 2 * v * 64 / 676 for s, v in ((1, 3), (-1, -4), (0, 0), (1, 1))]
    assert w.grad.tolist() == pytest.approx(want) and w.grad[0] > 0 and w.grad[1] > 0      # 3 shrinks, |-4| grows
    assert hoyer_square(10 * w).item() == pytest.approx(64 / 26)
    assert float(hoyer_square(torch.tensor([0.0, 7.0]))) == 1
    assert float(hoyer_square(torch.full((5,), -2.0))) == pytest.approx(5)


def test_group_hoyer_square_by_hand():
    w = torch.tensor([[3.0, 0.0], [4.0, 12.0]])                       # columns 5, 12; rows 3, sqrt(160); squares 169
    assert float(group_hoyer_square(w)) == pytest.approx((17 ** 2 + (3 + 160 ** 0.5) ** 2) / 169)
    assert float(group_hoyer_square(w[:, :, None, None].expand(2, 2, 3, 3))) == pytest.approx(
        (17 ** 2 + (3 + 160 ** 0.5) ** 2) / 169)
    assert float(group_hoyer_square(torch.eye(1))) == 2


@pytest.mark.parametrize("measure", [hoyer_square, group_hoyer_square])
def test_gradients(measure):
    assert torch.autograd.gradcheck(measure, random(3, 4, 2, 2)) and torch.autograd.gradcheck(measure, random(3, 4))
    w = torch.zeros(3, 4, requires_grad=True)
    measure(w).backward()
    assert measure(w).item() == 0 and w.grad.tolist() == torch.zeros(3, 4).tolist()
    part = torch.tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True)                      # a channel of zeros
    measure(part).backward()
    assert bool(part.grad.isfinite().all()) and part.grad[1].tolist() == [0, 0]


def test_finish_prunes_below_the_threshold_and_keeps_the_mask():
    model, technique = net(), Hoyer(strength=0.1, threshold="0.05")
    technique.start(model)
    assert technique.penalty().item() == pytest.approx(0.1 * hoyer_square(model[2].weight).item())
    weight = model[2].weight.detach().clone()
    figures = technique.figures()
    technique.finish()
    want = weight * (weight.abs() >= 0.05)
    torch.testing.assert_close(model[2].weight.detach(), want, rtol=0, atol=0)
    assert figures["density"] == figures["2/density"] == int(want.count_nonzero()) / want.numel()
    steps(model, Technique(), 2, momentum=0.9)
    assert bool(((model[2].weight == 0) == (want == 0)).all())


def test_group_form_drops_channels():
    model = net()
    with torch.no_grad():
        model[2].weight[3] *= 1e-4
        model[2].weight[:, 5] *= 1e-4
    technique = Hoyer(form="group", strength=0, std="0.25")
    technique.start(model)
    x = images()
    before = model(x)
    technique.finish()
    alive = model[2].weight != 0
    assert not alive[3].any() and not alive[:, 5].any() and int(alive.sum()) == 15 * 7 * 9
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-3)


#: Techniques that must leave clearly fewer weights than equal training without them.
REGULARISED = {
    "hoyer": {"kind": "hoyer", "strength": 2e-3},
    "hoyer group": {"kind": "hoyer", "strength": 1e-2, "form": "group"},
    "reweighted": {"kind": "reweighted", "strength": 1e-4, "refresh": 1},
    "reweighted channels": {"kind": "reweighted", "strength": 4e-3, "refresh": 1, "groups": "input_channel"},
}


def train(technique, epochs=4):
    """A network trained on digits with a technique that has not finished."""
    model = digits_net()
    technique.start(model)
    for epoch in range(epochs):
        technique.begin_epoch(epoch, epochs)
        steps(model, technique, 50, seed=epoch, momentum=0.9, data=digits())
    return model


@pytest.fixture(scope="module")
def plain():
    """Weights after training without a technique."""
    return train(Technique()).state_dict()


@pytest.mark.parametrize("name", REGULARISED)
def test_regularisers_make_digits_sparser_at_equal_steps(name, plain):
    results = []
    for regularised in (False, True):
        technique = build(REGULARISED[name] | {"layers": ["2"], "threshold": 0.02})
        if regularised:
            model = train(technique)
        else:
            model = digits_net()
            model.load_state_dict(plain)
            technique.start(model)
        technique.finish()
        results.append(((model[2].weight != 0).double().mean().item(), accuracy(model, digits())))
    (density, right), (sparse_density, sparse_right) = results
    assert sparse_density < 0.6 * density and sparse_right > right - 0.05, results


def test_bad_options():
    with pytest.raises(InputError, match="techniques.strength must be given"):
        build({"kind": "hoyer"}, field="techniques")
    with pytest.raises(InputError, match="form must be one of element, group, not 'row'"):
        Hoyer(form="row", strength=1)
