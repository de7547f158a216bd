"""SRigL: one exchange by hand, shares of layers, equal fan-in through training, resuming."""
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

from compress.training.parametrizations import Masked  # noqa: E402 (they follow the skip)
from compress.training.techniques import build  # noqa: E402
from compress.training.techniques.constant_fan_in import ConstantFanIn, Exploring, erdos_renyi, exchange  # noqa: E402
from sim_tests.compress.training.small import images, net, steps  # noqa: E402
from spec.errors import InputError  # noqa: E402

torch.set_num_threads(1)


def test_shares_of_layers():
    shapes = [(4, 2, 3, 3), (10, 10, 3, 3), (20, 5)]                  # 12/72, 26/900, 25/100
    assert erdos_renyi(shapes, 1072 * 0.01 / 1072) == pytest.approx(
        [10.72 / 63 * 12 / 72, 10.72 / 63 * 26 / 900, 10.72 / 63 * 25 / 100])
    found = erdos_renyi(shapes, 0.5)                                  # 536 = 72 + 100 + 364: two layers are full
    assert found == pytest.approx([1, 364 / 900, 1])
    assert erdos_renyi(shapes, 1) == pytest.approx([1, 1, 1])


def test_an_exchange_by_hand():
    weight = torch.tensor([[4.0, -3.0, 0, 0], [0, 2.0, 0.1, 0], [0, 0, 0.2, 0.3]])
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]).bool()
    gradient = torch.tensor([[9.0, 9, 1, 5], [3, 9, 9, 6], [0.5, 0.1, 9, 9]])
    # alpha .5: kept 4, 3, 2 (n = 6); candidates: 6 (row 1), 5 (row 0), 3 (row 1); salient 3, 3, 0
    new = exchange(weight, gradient, mask, alpha=0.5, gamma=0.3, budget=6)
    assert new.int().tolist() == [[1, 1, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]]          # row 2 goes, fan-in 6 // 2
    # gamma 0: nobody goes, fan-in 2; row 1 takes its largest |g| of what is not kept, its old 0.1 (9) included
    new = exchange(weight, gradient, mask, alpha=0.5, gamma=0, budget=6)
    assert new.int().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert torch.equal(exchange(weight, gradient, mask, alpha=0.0, gamma=0.3, budget=6), mask)


def test_the_gradient_of_masked_weights_is_seen():
    form, weight = Exploring(mask=torch.tensor([[True, False]])), torch.tensor([[2.0, 3.0]], requires_grad=True)
    form.watch = True
    (form(weight) * torch.tensor([[5.0, 7.0]])).sum().backward()
    assert form.dense.tolist() == [[5, 7]] and weight.grad.tolist() == [[5, 0]]


def test_every_output_left_has_the_same_fan_in():
    model, technique = net(), build({"kind": "constant_fan_in", "sparsity": "0.75", "interval": "3", "layers": ["*"],
                                     "shares": "equal", "gamma": "0.9"})
    technique.start(model)
    first = {name: form.mask.clone() for name, form in technique._forms().items()}
    for epoch in range(4):
        technique.begin_epoch(epoch, 4)
        steps(model, technique, 6, seed=epoch, momentum=0.9)
        for name, form in technique._forms().items():
            counts = form.mask.flatten(1).sum(1)
            assert len(counts[counts > 0].unique()) == 1 and int(counts.sum()) <= technique.budgets[name]
            assert bool((model[int(name)].weight[~form.mask] == 0).all())
        if epoch == 2:
            masks = {name: form.mask.clone() for name, form in technique._forms().items()}
    assert any(not torch.equal(first[name], masks[name]) for name in masks)
    assert all(torch.equal(form.mask, masks[name]) for name, form in technique._forms().items())     # after `until`
    figures, x = technique.figures(), images()
    assert figures["2/outputs"] < 1 and figures["2/fan_in"] > 18 and figures["density"] <= 0.25
    before = model(x)
    technique.finish()
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert all(type(model[n].parametrizations.weight[0]) is Masked for n in (0, 2, 6))


def test_masks_change_at_the_end_of_every_interval_only():
    model, technique = net(), ConstantFanIn(sparsity=0.5, interval=3)
    technique.start(model)
    technique.begin_epoch(0, 4)
    form, changed = technique._forms()["2"], []
    for step in range(7):
        before = form.mask.clone()
        steps(model, technique, 1, seed=step)
        changed.append(not torch.equal(before, form.mask))
    assert changed == [False, False, True, False, False, True, False]


def test_a_resumed_run_exchanges_at_the_same_steps():
    ends = []
    for resume in (False, True):
        model, technique = net(), ConstantFanIn(sparsity=0.5, interval=4)
        technique.start(model)
        technique.begin_epoch(0, 4)
        steps(model, technique, 6)
        if resume:
            saved, state = model.state_dict(), technique.state_dict()
            model, technique = net(), ConstantFanIn(sparsity=0.5, interval=4)
            technique.start(model)
            model.load_state_dict(saved)
            technique.load_state_dict(state)
        technique.begin_epoch(1, 4)
        steps(model, technique, 6, seed=1)
        ends.append(model[2].weight.detach().clone())
    assert torch.equal(*ends)


def test_bad_options():
    with pytest.raises(InputError, match="sparsity must be a number at least 0, below 1, not '1'"):
        ConstantFanIn(sparsity="1")
    with pytest.raises(InputError, match="interval must be a whole number in 1"):
        ConstantFanIn(sparsity=0.5, interval=0)
    with pytest.raises(InputError, match="shares must be one of erdos_renyi, equal"):
        ConstantFanIn(sparsity=0.5, shares="x")
