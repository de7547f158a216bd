"""SR-STE: the gradient by hand, freezing, resuming."""
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

from compress.training.parametrizations import Masked  # noqa: E402 (they follow the skip)
from compress.training.techniques import build  # noqa: E402
from compress.training.techniques.sr_ste import SRSTE, SparseRefined  # noqa: E402
from golden import structured  # noqa: E402
from sim_tests.compress.training.small import images, net, steps  # noqa: E402
from spec.errors import InputError  # noqa: E402

torch.set_num_threads(1)


def test_gradient_by_hand():
    form = SparseRefined(patterns=[(2, 4)], decay=0.5, mask=torch.zeros(1, 4, dtype=torch.bool))
    w = torch.tensor([[1.0, -3.0, 2.0, -1.0]], requires_grad=True)
    y = form(w)
    assert y.tolist() == [[0.0, -3.0, 2.0, 0.0]]
    (y * torch.tensor([[10.0, 20.0, 30.0, 40.0]])).sum().backward()
    assert w.grad.tolist() == [[10.5, 20.0, 30.0, 39.5]]              # g + .5 * w where dropped
    form.frozen, w.grad = True, None
    (form(w) * torch.tensor([[10.0, 20.0, 30.0, 40.0]])).sum().backward()
    assert w.grad.tolist() == [[0.0, 20.0, 30.0, 0.0]]


def test_trains_and_leaves_masked_weights():
    model, technique = net(), build({"kind": "sr_ste", "pattern": "2:4", "layers": ["*"]})
    technique.start(model)
    assert technique.dense == ["0"] and list(technique.sparse) == ["2", "6"]
    for epoch in range(2):
        technique.begin_epoch(epoch, 2)
        steps(model, technique, 3, seed=epoch)
    figures = technique.figures()
    assert figures["0/density"] == 1.0 and figures["density"] == figures["2/density"] == figures["6/density"] == 0.5
    assert 0 < figures["mask_changed"] < 0.2
    x = images()
    before = model(x)
    technique.finish()
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert type(model[2].parametrizations.weight[0]) is Masked
    w = model[2].weight.detach().numpy()
    assert structured.fits(w, (2, 4), axis=1) and np.count_nonzero(w) == w.size // 2


def test_the_mask_is_fixed_after_the_share_of_epochs_and_when_resumed():
    model, technique = net(), SRSTE(freeze_at=0.5)
    technique.start(model)
    changed = []
    for epoch in range(4):
        technique.begin_epoch(epoch, 4)
        steps(model, technique, 3, rate=0.5, seed=epoch)
        changed.append(technique.figures()["mask_changed"])
        if epoch == 2:
            saved, state = {k: v.clone() for k, v in model.state_dict().items()}, technique.state_dict()
    assert min(changed[:2]) > 0 and changed[2:] == [0, 0]
    again, resumed = net(), SRSTE(freeze_at="0.5")
    resumed.start(again)
    again.load_state_dict(saved)
    resumed.load_state_dict(state)
    resumed.begin_epoch(3, 4)
    steps(again, resumed, 3, rate=0.5, seed=3)
    for one, two in zip((technique, resumed), (model, again)):
        one.finish()
        torch.testing.assert_close(two[2].weight, model[2].weight, rtol=0, atol=0)


def test_layers_may_have_patterns_of_their_own():
    model, technique = net(), SRSTE(layers={"2": "4:8+1:8", "6": "dense"})
    technique.start(model)
    assert technique.dense == ["6"] and technique.sparse["2"].parametrizations.weight[0].mask.float().mean() == 0.625


def test_bad_options():
    with pytest.raises(InputError, match="technique.pattern must be an N:M pattern with 1 <= N <= M <= 64, not '5:4'"):
        build({"kind": "sr_ste", "pattern": "5:4"})
    with pytest.raises(InputError, match="layers.a must be an N:M pattern"):
        SRSTE(layers={"a": "x"})
    with pytest.raises(InputError, match="freeze_at must be a number at least 0, at most 1, not '2'"):
        SRSTE(freeze_at="2")
    model = net()
    SRSTE().start(model)
    with pytest.raises(InputError, match="layers.2 must have a plain or masked weight for sr_ste; .* SparseRefined"):
        SRSTE().start(model)
