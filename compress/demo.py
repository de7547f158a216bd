"""The demo data: scikit-learn's bundled handwritten digits (1797 images of 8 x 8), split once and for all.

Nothing is downloaded and no data are committed. Pixels 0..16 are scaled to 0..1; images are NCHW [N, 1, 8, 8].
"""
import numpy as np

from spec.errors import InputError

#: Size of each split, in the order in which the seeded permutation is cut. The held-out split is only ever reported.
SPLITS = {"train": 1097, "calibration": 100, "validation": 250, "heldout": 350}
SPLIT_SEED = 20240607


def digits(split):
    """(images float32 [N, 1, 8, 8] in 0..1, labels int64 [N]) of ``train``, ``calibration``, ``validation`` or
    ``heldout``. Raises: InputError for another name."""
    if split not in SPLITS:
        raise InputError(f"must be one of {', '.join(SPLITS)}", field="split", value=split)
    from sklearn.datasets import load_digits                  # slow to import, and only needed for the demo
    x, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(x))
    start = sum(list(SPLITS.values())[:list(SPLITS).index(split)])
    chosen = order[start:start + SPLITS[split]]
    return (x[chosen] / 16).astype(np.float32).reshape(-1, 1, 8, 8), labels[chosen].astype(np.int64)


def definition():
    """The split in words, for provenance."""
    return {"data": "sklearn.datasets.load_digits", "permutation": f"numpy default_rng({SPLIT_SEED}).permutation(1797)",
            "sizes": dict(SPLITS)}
