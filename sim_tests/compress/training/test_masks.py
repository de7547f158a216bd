"""Masks: the rule of golden, ties, speed; thresholds; what may be masked."""
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

from compress.training import masks  # noqa: E402 (they follow the skip)
from compress.training.parametrizations import LowRank  # noqa: E402
from golden import structured  # noqa: E402
from spec.errors import InputError  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402

torch.set_num_threads(1)


@pytest.mark.parametrize("patterns", [[(2, 4)], [(1, 4)], [(4, 8)], [(4, 8), (1, 8)], [(2, 4), (1, 8)], [(3, 16)],
                                      [(1, 1)], [(1, 3)], [(9, 32), (2, 16)]])
@pytest.mark.parametrize("shape", [(3, 32, 3, 3), (2, 20, 1, 2), (5, 48)])
def test_mask_is_the_greedy_series_of_golden(patterns, shape, rng):
    w = rng.normal(size=shape).astype(np.float32)
    terms, _ = structured.tasd_series(w, patterns, axis=1)
    mask = masks.nm_mask(torch.from_numpy(w), patterns).numpy()
    np.testing.assert_array_equal(mask, sum(terms) != 0)
    channels_last = torch.from_numpy(np.moveaxis(np.ascontiguousarray(np.moveaxis(w, 1, -1)), -1, 1))
    np.testing.assert_array_equal(masks.nm_mask(channels_last, patterns).numpy(), mask)


@pytest.mark.parametrize("pattern", [(2, 4), (3, 16)])
def test_lowest_channel_wins_ties(pattern, rng):
    w = rng.integers(-2, 3, size=(4, 32, 3, 3)).astype(np.float32)
    mask = masks.nm_mask(torch.from_numpy(w), [pattern]).numpy()
    np.testing.assert_array_equal(w * mask, structured.nm_view(w, pattern, axis=1))
    assert (mask.reshape(4, -1, pattern[1], 9).sum(2) == pattern[0]).all()           # zeros take places too


def test_masks_of_a_large_layer_are_fast():
    w = torch.randn(512, 512, 3, 3, generator=torch.Generator().manual_seed(1))
    masks.nm_mask(w[:8], [(2, 4)])
    start = time.perf_counter()
    masks.nm_mask(w, [(2, 4)])
    assert time.perf_counter() - start < 2                          # about .02 s; a full sort takes four times as long


def test_a_fixed_mask_can_be_replaced():
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    masks.fix_mask(layer, torch.tensor([[True, False, True, True]]))
    masks.fix_mask(layer, torch.tensor([[True, True, True, False]]))
    assert layer.weight.tolist() == [[1, 0, 3, 0]]
    assert masks.choose(nn.Sequential(layer), ["0"], "a test") == {"0": layer}
    masks.release(layer)
    assert isinstance(layer.weight, nn.Parameter) and layer.weight.tolist() == [[1, 0, 3, 0]]


def test_other_forms_are_refused():
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", LowRank(shape=(4, 4), rank=2))
    with pytest.raises(InputError, match="layers.0 must have a plain or masked weight for prune; .* LowRank"):
        masks.choose(nn.Sequential(layer), ["*"], "prune")
    with pytest.raises(InputError, match="layers must be given: the network has no layer that prune takes by default"):
        masks.choose(nn.Sequential(layer), None, "prune")


def test_thresholds():
    w = torch.tensor([[-2.0, 2.0, 4.0, 0.0]])
    assert masks.limit_of(w, *masks.check_threshold("0.25", None)) == 0.25
    assert masks.limit_of(w, *masks.check_threshold(None, "0.5")) == pytest.approx(0.5 * 5 ** 0.5)      # variance 5
    assert masks.limit_of(w, None, None) is None
    with pytest.raises(InputError, match="std must not be given with threshold, not 1"):
        masks.check_threshold(1, 1)
    with pytest.raises(InputError, match="threshold must be a number above 0, not 0"):
        masks.check_threshold(0, None)


@pytest.mark.parametrize("text", ["", "4", "2:4+", "5:4", "0:4", "2:4:8"])
def test_bad_patterns(text):
    with pytest.raises(InputError, match="pattern must be an N:M pattern with 1 <= N <= M <= 64"):
        masks.parse_series(text, "pattern")
