"""Kernel decomposition: the kernels of a layer in the span of few basis kernels.

Source: S. Li, E. Hanson, H. Li, Y. Chen, "PENNI", ICML 2020, section 3.1.
"""
import numpy as np

from compress.training import fields
from compress.training.projections.projection import WEIGHT_BITS, Cost, Encoded, Projection, checked, taps_of
from golden import basis
from spec.errors import InputError


class Basis(Projection):
    """Kernels ``W[k,c] = sum_m Ce[k,c,m] B[m]``; the nearest member (truncated SVD of the kernels).

    Options: count: M basis kernels, at most R * S.
    """

    def __init__(self, *, count=6):
        self.count = fields.whole(count, "count", low=1)

    def check(self, shape):
        most = min(taps_of(shape), shape[0] * shape[1])
        if self.count > most:
            raise InputError(f"must be at most {most}", field="count", value=self.count)

    def encode(self, weight):
        """Parts: basis [M, R, S], coefficients [O, I, M], float64."""
        weight = checked(weight)
        self.check(weight.shape)
        kernel = weight.reshape(*weight.shape[:2], *(weight.shape[2:] or (1, 1)))
        found = basis.decompose(kernel.transpose(0, 2, 3, 1), count=self.count)

        def rebuild(basis, coefficients):
            return np.tensordot(coefficients, basis, axes=1).reshape(weight.shape).astype(weight.dtype)

        return Encoded(parts={"basis": found.basis, "coefficients": found.coefficients},
                       bits=found.bits(WEIGHT_BITS, WEIGHT_BITS), rebuild=rebuild)

    def cost(self, shape, positions=1, inputs=None):
        """Coefficients first: ``O I M Hi Wi + O M R S Ho Wo``, dense coefficients."""
        self.check(shape)
        inputs = positions if inputs is None else inputs
        coefficients, bases = shape[0] * shape[1] * self.count, self.count * taps_of(shape)
        return Cost(coefficients + bases, coefficients * inputs + shape[0] * bases * positions,
                    (coefficients + bases) * WEIGHT_BITS)
