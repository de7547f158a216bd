"""SVD training: measures by hand, the factored layer against the plain one, rank by energy, merging."""
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

from compress.training.parametrizations import Chain, LowRank, materialize, originals  # noqa: E402 (after the skip)
from compress.training.techniques import build  # noqa: E402
from compress.training.techniques.svd_training import (SVDTraining, hoyer, merge, orthogonality,  # noqa: E402
                                                       rank_at)
from sim_tests.compress.training.small import images, net, steps  # noqa: E402
from spec.errors import InputError  # noqa: E402
from torch import nn  # noqa: E402

torch.set_num_threads(1)


def random(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)


def test_measures_by_hand():
    assert hoyer(torch.tensor([3.0, -4.0, 0.0])).item() == pytest.approx(7 / 5)
    u, v = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    # U^T U - I = [[0, 1], [1, 0]], V^T V - I = [[3, 0], [0, 0]]
    assert orthogonality(u, v).item() == pytest.approx((2 + 9) / 4)
    assert torch.autograd.gradcheck(hoyer, random(5)) and torch.autograd.gradcheck(
        lambda u, v: orthogonality(u, v), (random(4, 3), random(5, 3)))


def test_rank_at_an_energy():
    s = torch.tensor([1.0, -3.0, 2.0, 0.0])                           # squares 9, 4, 1, 0
    assert [rank_at(s, e) for e in (0, 0.07, 0.0715, 5 / 14 - 1e-6, 5 / 14 + 1e-6, 0.99)] == [3, 3, 2, 2, 1, 1]
    assert rank_at(torch.zeros(4), 0.5) == 1


@pytest.mark.parametrize("form", ["channel", "spatial"])
@pytest.mark.parametrize("regularizer", ["hoyer", "hoyer_square", "l1"])
def test_penalty_against_numpy_and_factors_rebuild_the_weight(form, regularizer):
    model = net()
    weight = model[2].weight.detach().numpy().astype(np.float64)
    technique = SVDTraining(form=form, regularizer=regularizer, strength=0.5, orthogonality=2)
    technique.start(model)
    torch.testing.assert_close(model[2].weight.detach().numpy(), weight.astype(np.float32), rtol=1e-4, atol=1e-6)
    o, i, r, s = weight.shape
    matrix = weight.reshape(o, -1) if form == "channel" else weight.transpose(1, 2, 0, 3).reshape(i * r, o * s)
    values = np.linalg.svd(matrix, compute_uv=False)
    want = {"hoyer": values.sum() / (values ** 2).sum() ** 0.5, "hoyer_square": values.sum() ** 2 / (values ** 2).sum(),
            "l1": values.sum()}[regularizer]
    assert technique.penalty().item() == pytest.approx(0.5 * want, rel=1e-4)
    (technique.penalty() + model(images()).sum()).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("form", ["channel", "spatial"])
@pytest.mark.parametrize("stride, padding", [(1, 1), (2, 0)])
def test_training_then_merging_keeps_the_function(form, stride, padding):
    model = net()
    model[2].stride, model[2].padding = (stride, stride), (padding, padding)
    technique = build({"kind": "svd_training", "form": form, "strength": "0.5", "energy": "0.1"})
    technique.start(model)
    before = technique.figures()["2/rank"]
    for epoch in range(2):
        technique.begin_epoch(epoch, 2)
        steps(model, technique, 30, rate=0.05, seed=epoch)
    figures, x = technique.figures(), images()
    assert figures["2/rank"] < before and figures["2/orthogonality"] < 0.05
    trained, out = model[2].weight.detach().clone(), model(x)
    torch.testing.assert_close(materialize(model)(x), out, rtol=1e-4, atol=1e-4)           # the chain of U, s, V
    technique.finish()
    form_of = model[2].parametrizations.weight[0]
    assert type(form_of) is LowRank and form_of.rank == figures["2/rank"]
    a, b = originals(model[2])
    torch.testing.assert_close(a.square().sum(0), b.square().sum(1), rtol=0.5, atol=0.05)  # both hold sqrt|s|
    assert (model[2].weight - trained).square().sum() <= 0.101 * trained.square().sum()
    plain = materialize(model)
    assert isinstance(plain[2], Chain) and len(list(plain[2])) == 2
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)


def test_linear_layers_and_merged_factors():
    layer = nn.Linear(6, 4)
    a, b = torch.randn(4, 2), torch.randn(2, 6)
    merge(layer, a, b, "channel")
    torch.testing.assert_close(layer.weight, a @ b)
    model, technique = net(), SVDTraining(layers=["6"], energy=0)
    technique.start(model)
    x = images()
    before = model(x)
    technique.finish()                                                # full rank saves nothing: the weight is plain
    assert isinstance(model[6].weight, nn.Parameter)
    torch.testing.assert_close(model(x), before)


def test_bad_options():
    with pytest.raises(InputError, match="form must be one of channel, spatial, not 'row'"):
        SVDTraining(form="row")
    with pytest.raises(InputError, match="energy must be a number at least 0, below 1, not '1'"):
        SVDTraining(energy="1")
    with pytest.raises(InputError, match="layers.6 must be a convolution for form spatial"):
        SVDTraining(form="spatial", layers=["6"]).start(net())
    model = net()
    SVDTraining().start(model)
    with pytest.raises(InputError, match="layers.2 must have a plain or masked weight for svd_training"):
        SVDTraining().start(model)
