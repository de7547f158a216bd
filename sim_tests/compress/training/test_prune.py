"""Pruning: which weights go, the cubic schedule, masks through training, N:M at once."""
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

from compress.training.groups import Groups  # noqa: E402 (they follow the skip)
from compress.training.techniques import build  # noqa: E402
from compress.training.techniques.prune import Prune, keep_largest  # noqa: E402
from golden import structured  # noqa: E402
from sim_tests.compress.training.small import images, net, steps  # noqa: E402
from spec.errors import InputError  # noqa: E402

torch.set_num_threads(1)


def test_the_smallest_weights_of_all_layers_go():
    weights = {"a": torch.tensor([[4.0, -1.0], [0.5, 3.0]]), "b": torch.tensor([[-0.75, 2.0], [0.25, -5.0]])}
    masks = keep_largest(Groups("element"), weights, 0.5)
    assert masks["a"].tolist() == [[True, False], [False, True]]
    assert masks["b"].tolist() == [[False, True], [False, True]]


def test_kernels_of_different_size_compete_by_their_mean_and_are_not_split():
    weights = {"a": torch.full((2, 1, 3, 3), 2.0), "b": torch.tensor([[[[1.0]]], [[[3.0]]], [[[1.5]]]])}
    weights["a"][0] = 0.5                                              # rms: a .5, 2 (9 weights each); b 1, 3, 1.5
    kept = {share: {n: m.flatten(1)[:, 0].tolist() for n, m in keep_largest(Groups("kernel"), weights, share).items()}
            for share in (8.9 / 21, 9 / 21, 11 / 21, 20 / 21)}
    assert kept[8.9 / 21] == {"a": [True, True], "b": [True, True, True]}
    assert kept[9 / 21] == {"a": [False, True], "b": [True, True, True]}
    assert kept[11 / 21] == {"a": [False, True], "b": [False, True, False]}
    assert kept[20 / 21] == {"a": [False, True], "b": [False, True, False]}           # each layer keeps one


def test_shares_that_floats_cannot_hold_are_exact():
    w = {"a": torch.arange(1.0, 101.0)[None]}
    for percent in range(100):
        assert int(keep_largest(Groups("element"), w, percent / 100)["a"].sum()) == 100 - percent


def test_schedule_by_hand():
    model, technique = net(), build({"kind": "prune", "sparsity": "0.8", "begin": "0.25", "end": "0.75",
                                     "scope": "layer", "layers": ["2"]})
    technique.start(model)
    size, seen = model[2].weight.numel(), []
    for epoch in range(8):
        technique.begin_epoch(epoch, 8)
        before = model[2].weight == 0
        steps(model, technique, 1, seed=epoch, momentum=0.9)
        assert bool((model[2].weight == 0)[before].all())
        seen.append(1 - technique.figures()["density"])
    want = [0, 0] + [0.8 * (1 - (1 - t) ** 3) for t in (0, 0.25, 0.5, 0.75, 1)] + [0.8]
    assert seen == pytest.approx([int(v * size + 1e-6) / size for v in want])
    technique.finish()
    assert np.count_nonzero(model[2].weight.detach()) == size - int(0.8 * size)


def test_at_once_with_shares_of_layers():
    model = net()
    weight = model[2].weight.detach().clone()
    technique = Prune(scope="layer", layers={"2": 0.5, "6": "0.25"})
    technique.start(model)
    assert technique.figures() == {"2/density": 0.5, "6/density": 0.75, "density": (576 + 48) / (1152 + 64)}
    kept = model[2].weight != 0
    assert float(weight.abs()[kept].min()) >= float(weight.abs()[~kept].max())
    steps(model, technique, 3, momentum=0.9)
    x = images()
    before = model(x)
    technique.finish()
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert bool((kept == (model[2].weight != 0)).all()) and bool((model[2].weight != weight)[kept].any())


@pytest.mark.parametrize("groups, axes", [("input_channel", (0, 2, 3)), ("output_channel", (1, 2, 3)),
                                          ("kernel", (2, 3))])
def test_whole_groups_go(groups, axes):
    model, technique = net(), Prune(sparsity=0.5, groups=groups)
    norms = model[2].weight.detach().square().sum(axes)
    technique.start(model)
    left = (model[2].weight != 0).sum(axes)
    assert int((left > 0).sum()) == left.numel() // 2 and len(left.unique()) == 2
    assert float(norms[left > 0].min()) > float(norms[left == 0].max())


def test_n_of_m_at_once(rng):
    model, technique = net(), Prune(groups="nm", pattern="2:4")
    weight = model[2].weight.detach().numpy().copy()
    technique.start(model)
    np.testing.assert_array_equal(model[2].weight.detach(), structured.nm_view(weight, (2, 4), axis=1))
    steps(model, technique, 2)
    kept = weight * 0 + (model[2].weight.detach().numpy() != 0)
    technique.finish()
    np.testing.assert_array_equal(kept, model[2].weight.detach().numpy() != 0)


def test_bad_options():
    for options, text in (
            ({}, "sparsity must be given"),
            ({"sparsity": "1"}, "sparsity must be a number at least 0, below 1, not '1'"),
            ({"groups": "nm", "pattern": "2:4", "sparsity": 0.5}, "sparsity must not say how much goes"),
            ({"groups": "nm"}, "pattern must be given with groups nm"),
            ({"groups": "pattern", "sparsity": 0.5}, "groups must be one of element"),
            ({"sparsity": 0.5, "layers": {"a": 0.5}}, "layers must be a list unless scope is layer"),
            ({"sparsity": 0.5, "begin": 0.5, "end": 0.2}, "end must be a number at least 0.5, at most 1, not 0.2"),
            ({"sparsity": 0.5, "scope": "both"}, "scope must be one of global, layer, not 'both'")):
        with pytest.raises(InputError, match=text):
            Prune(**options)
