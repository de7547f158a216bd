"""SR-STE: masks against golden, the gradient by hand, freezing, resuming."""
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

from compress.training.masks import nm_mask  # noqa: E402 (they follow the skip)
from compress.training.techniques import build  # noqa: E402
from compress.training.techniques.sr_ste import SRSTE, SparseRefined  # noqa: E402
from golden import structured  # noqa: E402
from spec.errors import InputError  # noqa: E402
from torch import nn  # noqa: E402

torch.set_num_threads(1)


def net():
    """3 -> 8 -> 16 channels, then 4 classes."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def steps(model, technique, count, *, rate=0.1, seed=0):
    """Plain SGD on random data with the hooks of a technique."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(count):
        x, y = torch.randn(8, 3, 6, 6, generator=generator), torch.randint(0, 4, (8,), generator=generator)
        optimiser.zero_grad()
        (nn.functional.cross_entropy(model(x), y) + technique.penalty()).backward()
        technique.after_backward()
        optimiser.step()
        technique.after_step()


@pytest.mark.parametrize("patterns", [[(2, 4)], [(1, 4)], [(4, 8)], [(4, 8), (1, 8)], [(2, 4), (1, 8)], [(3, 16)],
                                      [(1, 1)], [(1, 3)], [(9, 32), (2, 16)]])
@pytest.mark.parametrize("shape", [(3, 32, 3, 3), (2, 20, 1, 2), (5, 48)])
def test_mask_is_the_greedy_series_of_golden(patterns, shape, rng):
    w = rng.normal(size=shape).astype(np.float32)
    terms, _ = structured.tasd_series(w, patterns, axis=1)
    mask = nm_mask(torch.from_numpy(w), patterns).numpy()
    np.testing.assert_array_equal(mask, sum(terms) != 0)
    channels_last = torch.from_numpy(np.moveaxis(np.ascontiguousarray(np.moveaxis(w, 1, -1)), -1, 1))
    np.testing.assert_array_equal(nm_mask(channels_last, patterns).numpy(), mask)


@pytest.mark.parametrize("pattern", [(2, 4), (3, 16)])
def test_lowest_channel_wins_ties(pattern, rng):
    w = rng.integers(-2, 3, size=(4, 32, 3, 3)).astype(np.float32)
    mask = nm_mask(torch.from_numpy(w), [pattern]).numpy()
    np.testing.assert_array_equal(w * mask, structured.nm_view(w, pattern, axis=1))
    assert (mask.reshape(4, -1, pattern[1], 9).sum(2) == pattern[0]).all()           # zeros take places too


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
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(9))
    before = model(x)
    technique.finish()
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
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
    with pytest.raises(InputError, match="layers.2 must have a plain weight for sr_ste; it has the form SparseRefined"):
        SRSTE().start(model)


def test_masks_of_a_large_layer_are_fast():
    w = torch.randn(512, 512, 3, 3, generator=torch.Generator().manual_seed(1))
    nm_mask(w[:8], [(2, 4)])
    start = time.perf_counter()
    nm_mask(w, [(2, 4)])
    assert time.perf_counter() - start < 2                          # about .03 s; a full sort takes ten times as long
