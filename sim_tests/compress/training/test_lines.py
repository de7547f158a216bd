"""TPrune: the regulariser by hand, which lines go, and that the compact layer is the same function."""
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

from compress.training.technique import Technique, replace_layer  # noqa: E402 (they follow the skip)
from compress.training.techniques import build  # noqa: E402
from compress.training.techniques.hoyer import group_hoyer_square  # noqa: E402
from compress.training.techniques.lines import Lines, cut, kept_lines, line_penalty  # noqa: E402
from sim_tests.compress.training.small import Attention, images, net, steps  # noqa: E402
from spec.errors import InputError  # noqa: E402

torch.set_num_threads(1)


def test_regulariser_by_hand():
    w = torch.tensor([[3.0, 0.0, 1.0], [4.0, 12.0, 0.0]])            # blocks [[3, 0], [4, 12]] and [[1], [0]]
    rows, columns = 3 + 160 ** 0.5, 17
    assert line_penalty(w, (2, 2)).item() == pytest.approx((rows ** 2 + columns ** 2) / 169 + 2)
    assert line_penalty(w, (2, 2), "rows").item() == pytest.approx(rows ** 2 / 169 + 1)
    assert line_penalty(w, (2, 2), "columns").item() == pytest.approx(columns ** 2 / 169 + 1)
    assert line_penalty(w, (2, 2), "both", "lasso").item() == pytest.approx(rows + columns + 2)
    assert line_penalty(w, (2, 3)).item() == pytest.approx(group_hoyer_square(w).item())
    assert cut(w, (2, 2))[0, 1].tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize("regularizer", ["hoyer_square", "lasso"])
def test_gradients(regularizer):
    w = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    for lines in ("both", "rows", "columns"):
        assert torch.autograd.gradcheck(lambda w, lines=lines: line_penalty(w, (2, 3), lines, regularizer), w)
    w = torch.zeros(4, 4, requires_grad=True)
    line_penalty(w, (2, 2), "both", regularizer).backward()
    assert w.grad.abs().sum() == 0


def test_lines_that_stay_by_hand():
    w = torch.tensor([[1.0, 0.1, 0.0], [0.1, 0.1, 0.0], [2.0, 2.0, 0.3]])
    found = [[t.tolist() for t in pair] for pair in kept_lines(w, (2, 2), "both", 0.5)]
    assert found == [[[0], [0]], [[2], [0, 1]]]
    found = [[t.tolist() for t in pair] for pair in kept_lines(w, (3, 3), "rows", 0.5)]
    assert found == [[[0, 2], [0, 1, 2]]]
    found = [[t.tolist() for t in pair] for pair in kept_lines(w, (3, 3), "columns", 0.5)]
    assert found == [[[0, 1, 2], [0, 1]]]
    assert kept_lines(w, (3, 3), "both", 9) == []


@pytest.mark.parametrize("block", [None, ["4", "5"], [1, 12]])
def test_a_transformer_becomes_smaller_dense_products(block):
    model, technique = Attention(), build({"kind": "lines", "strength": "2e-3", "std": "0.7"} |
                                          ({"block": block} if block else {}))
    technique.start(model)
    assert list(technique.targets) == ["embed", "qkv", "out", "up", "down"]
    for epoch in range(2):
        technique.begin_epoch(epoch, 2)
        steps(model, technique, 5, seed=epoch)
    kept, x = technique.figures(), images()
    assert 0 < kept["density"] < 1
    technique.finish()
    size = sum(o.numel() for layer in technique.targets.values() for o in layer.parametrizations.weight.parameters())
    assert size == round(kept["density"] * sum(m.weight.numel() for m in technique.targets.values()))
    steps(model, Technique(), 3, momentum=0.9)                       # what is gone stays gone: it has no parameters
    assert sum(int((m.weight != 0).sum()) for m in technique.targets.values()) <= size
    want = model(x)
    for name, layer in technique.targets.items():
        compact = layer.parametrizations.weight[0].compact(layer)
        inputs = torch.randn(3, 4, layer.in_features, generator=torch.Generator().manual_seed(6))
        torch.testing.assert_close(compact(inputs), layer(inputs), rtol=1e-5, atol=1e-6)
        replace_layer(model, name, compact)
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6)


def test_the_regulariser_empties_lines():
    density = []
    for strength in (0, 0.05):
        model, technique = Attention(), Lines(strength=strength, threshold=0.1)
        technique.start(model)
        steps(model, technique, 100, rate=0.05)
        density.append(technique.figures()["density"])
    assert density[1] < 0.8 * density[0]


def test_bad_options():
    with pytest.raises(InputError, match="threshold must be given, or std"):
        Lines(strength=1)
    with pytest.raises(InputError, match=r"block must be a list of 2 whole numbers, not \[1\]"):
        Lines(strength=1, std=1, block=[1])
    with pytest.raises(InputError, match="layers.2 must be a linear layer, not 'Conv2d'"):
        Lines(strength=1, std=1, layers=["2"]).start(net())
    with pytest.raises(InputError, match="layers must be given: the network has no layer that lines takes by default"):
        Lines(strength=1, std=1).start(net())
    technique = Lines(strength=1, threshold=9)
    technique.start(Attention())
    with pytest.raises(InputError, match="layers.embed drops every line of a layer"):
        technique.finish()
