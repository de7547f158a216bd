"""What the set of weights of one format has to offer: a nearest member, its compact form, and its cost.

Weights are arrays [O, I, R, S] (kernels) or [O, I] (matrices), float32 or float64; no PyTorch here.
"""
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

#: Bits of a stored value.
WEIGHT_BITS = 8


class Cost(NamedTuple):
    """Of one layer: ``parameters`` stored values; ``macs`` multiplications of one image; ``bits`` of storage, indices
    included, scales not."""

    parameters: int
    macs: int
    bits: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """A member of the set in its compact form: named arrays ``parts``, the ``bits`` that storing them takes at
    `WEIGHT_BITS` per value, and what rebuilds the weight from them."""

    parts: dict
    bits: int
    rebuild: Callable

    def decode(self):
        """The weight, in the type that was encoded."""
        return self.rebuild(**self.parts)


class Projection:
    """Base of all projections; options are keyword-only arguments with plain YAML values."""

    def check(self, shape):
        """Raises: InputError if weights of ``shape`` cannot have this format (a rank above its bound …)."""

    def bind(self, weight):
        """The projection of one layer, with what it fixes once for all from the layer's first weight."""
        return self

    def memory(self):
        """What `bind` has fixed: a mapping of options in plain values."""
        return {}

    def encode(self, weight):
        """`Encoded` of the projected weight."""
        raise NotImplementedError

    def project(self, weight):
        """Member of the set that is nearest to ``weight`` in the Frobenius norm (or what each class states instead);
        same shape and type."""
        return self.encode(weight).decode()

    def cost(self, shape, positions=1, inputs=None):
        """`Cost` of a layer.

        Args: shape: of the weight; positions: output pixels Ho * Wo (1 for a matrix); inputs: input pixels Hi * Wi of
        stages that run at input resolution, by default ``positions``.
        """
        raise NotImplementedError


def checked(weight):
    """``weight`` as an array. Raises: TypeError, ValueError unless float, finite and [O, I] or [O, I, R, S]."""
    array = np.asarray(weight)
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"weight must be floats, not {array.dtype}")
    if array.ndim not in (2, 4) or not array.size or not np.isfinite(array).all():
        raise ValueError(f"weight must be [O, I] or [O, I, R, S], finite and not empty, not of shape {array.shape}")
    return array


def taps_of(shape):
    """R * S of a kernel, 1 of a matrix."""
    return int(np.prod(shape[2:], dtype=np.int64))


def keep_count(share, total):
    """Members of ``total`` that a share 0 < share <= 1 keeps: at least one, rounded up (to 1e-9)."""
    return max(1, int(np.ceil(share * total - 1e-9)))


def largest(energies, count):
    """Sorted indices of the ``count`` largest values; the lowest index wins ties."""
    return np.sort(np.argsort(-np.asarray(energies), kind="stable")[:count])


def index_bits(count):
    """Bits that tell ``count`` things apart."""
    return max(count - 1, 0).bit_length()
