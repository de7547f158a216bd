"""Tucker-2: kernels with few effective output and input channels.

Source: reference on tensor trains, sections 2 and 10.
"""
import numpy as np

from compress.training import fields
from compress.training.projections.projection import WEIGHT_BITS, Cost, Encoded, Projection, checked, taps_of
from compress.training.projections.tensor_train import chosen_ranks, one_of
from golden import tucker
from spec.errors import InputError


class Tucker(Projection):
    """Kernels ``W[o,i,r,s] = sum_ab A[o,a] G[a,b,r,s] B[b,i]``, by HOOI from the truncated HOSVD (quasi-optimal).

    Options: ranks: (r_out, r_in); or factor: the ranks that keep about 1/factor of the parameters; sweeps: of HOOI
    (0: the order-3 tensor train).
    """

    def __init__(self, *, ranks=None, factor=None, sweeps=2):
        one_of(ranks, factor, ("ranks", "factor"))
        self.ranks = None if ranks is None else fields.wholes(ranks, "ranks", low=1, length=2)
        self.factor = None if factor is None else fields.number(factor, "factor", above=1, high=1000)
        self.sweeps = fields.whole(sweeps, "sweeps", high=100)

    def resolve(self, shape):
        """(r_out, r_in) for weights of ``shape``. Raises: InputError."""
        if len(shape) != 4:
            raise InputError("must be svd or tensor_train for a matrix", field="kind", value="tucker")
        o, i, r, s = shape
        return tucker.check_ranks(self.ranks or chosen_ranks(shape, self.factor), (o, r, s, i))

    def check(self, shape):
        self.resolve(shape)

    def encode(self, weight):
        """Parts: out [O, r_out], core [r_out, R, S, r_in], inputs [r_in, I], float64."""
        weight = checked(weight)
        chain = tucker.tucker2(weight.transpose(0, 2, 3, 1), self.resolve(weight.shape), sweeps=self.sweeps)
        inputs, core, out = (s.weights for s in chain.stages)

        def rebuild(out, core, inputs):
            dense = np.tensordot(np.tensordot(out, core, axes=1), inputs, axes=1)
            return np.ascontiguousarray(dense.transpose(0, 3, 1, 2), weight.dtype)

        return Encoded(parts={"out": out[:, 0, 0], "core": core, "inputs": inputs[:, 0, 0]},
                       bits=chain.bits(WEIGHT_BITS), rebuild=rebuild)

    def cost(self, shape, positions=1, inputs=None):
        """``I r_in Hi Wi + (R S r_in r_out + r_out O) Ho Wo``."""
        inputs = positions if inputs is None else inputs
        r_out, r_in = self.resolve(shape)
        first, rest = shape[1] * r_in, r_out * taps_of(shape) * r_in + r_out * shape[0]
        return Cost(first + rest, first * inputs + rest * positions, (first + rest) * WEIGHT_BITS)
