"""Groups of weights: sums, sizes and spread against loops; free weights; bad options."""
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

from compress.training.groups import KINDS, Groups  # noqa: E402 (they follow the skip)
from golden import structured  # noqa: E402
from spec.errors import InputError  # noqa: E402
from torch import nn  # noqa: E402

OPTIONS = {"block": {"block": (2, 3)}, "nm": {"pattern": "2:4"}, "pattern": {"taps": "4"}}


def group_of(kind, o, i, r, s):
    """Name of the group of a weight."""
    return {"kernel": (o, i), "pattern": (o, i), "input_channel": i, "output_channel": o,
            "block": (o // 2, i // 3)}.get(kind, (o, i, r, s))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 8, 3, 3), (4, 7, 1, 1), (3, 5)])
def test_sums_against_a_loop(kind, shape, rng):
    groups, w = Groups(kind, **OPTIONS.get(kind, {})), torch.from_numpy(rng.normal(size=shape))
    full = w.reshape(*shape, *[1] * (4 - len(shape))).numpy()
    sums, sizes = {}, {}
    for place in np.ndindex(full.shape):
        g = group_of(kind, *place)
        sums[g], sizes[g] = sums.get(g, 0) + full[place] ** 2, sizes.get(g, 0) + 1
    energy = groups.energy(w)
    assert energy.numel() == len(sums)
    rms = groups.spread(groups.rms(w), w).reshape(full.shape)
    for place in np.ndindex(full.shape):
        g = group_of(kind, *place)
        assert float(rms[place]) == pytest.approx((sums[g] / sizes[g]) ** 0.5)
    torch.testing.assert_close(energy.sum(), w.square().sum())


def test_energy_has_gradients():
    w = torch.randn(3, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    for kind in KINDS:
        assert torch.autograd.gradcheck(Groups(kind, **OPTIONS.get(kind, {})).energy, w)


def test_free_weights(rng):
    w = rng.normal(size=(6, 8, 3, 3)).astype(np.float32)
    free = Groups("nm", pattern="2:4").free(torch.from_numpy(w)).numpy()
    np.testing.assert_array_equal(free, structured.nm_view(w, (2, 4), axis=1) != 0)
    free = Groups("pattern", taps=4).free(torch.from_numpy(w)).numpy().reshape(48, 9)
    assert (free.sum(1) == 4).all() and free[:, 4].all()
    for kernel, mask in zip(np.abs(w).reshape(48, 9), free):
        others = np.delete(np.arange(9), 4)
        assert set(others[np.argsort(-kernel[others])[:3]]) == set(np.flatnonzero(mask)) - {4}
    assert not Groups("kernel").free(torch.from_numpy(w)).any()


def test_bad_options():
    with pytest.raises(InputError, match="groups must be one of element, .*, not 'row'"):
        Groups("row")
    with pytest.raises(InputError, match="block must be given with groups block, and only then"):
        Groups("block")
    with pytest.raises(InputError, match="taps must be given with groups pattern, and only then"):
        Groups("element", taps=4)
    layers = {"a": nn.Linear(3, 4), "b": nn.Conv2d(3, 3, 1)}
    with pytest.raises(InputError, match=r"layers.a must have at least M = 4 input channels, not 3"):
        Groups("nm", pattern="2:4").check(layers)
    with pytest.raises(InputError, match=r"layers.a must be a convolution of at least 4 taps, not \(4, 3\)"):
        Groups("pattern", taps=4).check(layers)
    with pytest.raises(InputError, match=r"layers.b must be a convolution of at least 4 taps, not \(3, 3, 1, 1\)"):
        Groups("pattern", taps=4).check({"b": layers["b"]})
