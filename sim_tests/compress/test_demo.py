"""The demo data: fixed, disjoint splits."""
import numpy as np
import pytest

from compress import demo
from spec.errors import InputError


def test_splits_are_disjoint_complete_and_fixed():
    images = {s: demo.digits(s) for s in demo.SPLITS}
    assert {s: len(x) for s, (x, _) in images.items()} == demo.SPLITS and sum(demo.SPLITS.values()) == 1797
    from sklearn.datasets import load_digits
    everything = load_digits().data
    stacked = np.concatenate([x.reshape(-1, 64) * 16 for x, _ in images.values()])
    order = np.lexsort(stacked.T)
    assert np.array_equal(stacked[order], everything[np.lexsort(everything.T)])
    for x, labels in images.values():
        assert x.dtype == np.float32 and x.shape[1:] == (1, 8, 8) and x.min() >= 0 and x.max() <= 1
        assert set(labels.tolist()) == set(range(10))
    assert demo.digits("heldout")[1][:8].tolist() == demo.digits("heldout")[1][:8].tolist()


def test_unknown_split():
    with pytest.raises(InputError, match="split must be one of train, calibration, validation, heldout, not 'test'"):
        demo.digits("test")
