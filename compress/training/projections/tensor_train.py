"""Tensor trains: TT-SVD to given ranks, order 3 ("special") or with factored output and input modes ("general").

Source: reference on tensor trains, sections 2 to 4.
"""
from dataclasses import replace
from math import prod

import numpy as np

from compress.factorize import RANK_STEP, kernel_ranks, matrix_rank
from compress.training import fields
from compress.training.projections.projection import WEIGHT_BITS, Cost, Encoded, Projection, checked, taps_of
from golden import tensor_train
from spec.errors import InputError


def check_modes(shape, ranks, out_modes=None, in_modes=None):
    """(ranks, out_modes, in_modes) of a train for weights of ``shape``; by default one mode for each side.

    Raises: InputError unless the modes multiply to O and I, and for ranks that `golden.tensor_train` refuses.
    """
    outputs, inputs = shape[:2]
    out_modes = (outputs,) if out_modes is None else tuple(out_modes)
    in_modes = (inputs,) if in_modes is None else tuple(in_modes)
    for name, modes, size in (("out_modes", out_modes, outputs), ("in_modes", in_modes, inputs)):
        if prod(modes) != size:
            raise InputError(f"must multiply to {size}", field=name, value=list(modes))
    taps = (taps_of(shape),) if len(shape) == 4 else ()
    return tensor_train.check_ranks((*out_modes, *taps, *in_modes), tuple(ranks)), out_modes, in_modes


def decompose(weight, ranks, out_modes, in_modes):
    """golden's TTConvolution or TTLinear of a weight [O, I, R, S] or [O, I]."""
    if weight.ndim == 2:
        return tensor_train.tt_linear(weight, out_modes, in_modes, ranks)
    return tensor_train.tt_convolution(weight.transpose(0, 2, 3, 1), ranks, out_modes=out_modes, in_modes=in_modes)


def chosen_ranks(shape, factor):
    """(r_out, r_in) of a kernel, or (r,) of a matrix, that keep 1/factor of the parameters (`compress.factorize`).

    Raises: InputError if a rank would fall below RANK_STEP.
    """
    outputs, inputs = shape[:2]
    ranks = (matrix_rank(outputs, inputs, factor),)
    if len(shape) == 4:
        ranks = kernel_ranks(outputs, taps_of(shape), inputs, factor)
    if not min(ranks):
        raise InputError(f"must leave ranks of at least {RANK_STEP} of a weight {tuple(shape)}", field="factor",
                         value=factor)
    return ranks


def one_of(first, second, names):
    """Raises: InputError unless exactly one of two options is given."""
    if (first is None) == (second is None):
        raise InputError(f"must be given, or {names[1]}, but not both", field=names[0])


class TensorTrain(Projection):
    """Trains over modes (O_1 .. O_m, R*S, I_1 .. I_n), a matrix without R*S.

    TT-SVD is quasi-optimal: an error of at most sqrt(d - 1) times the least, for two modes the least.

    Options:
        ranks: (1, r_1 .. r_(d-1), 1); of order 3 (1, r_out, r_in, 1). Or
        factor: the ranks that keep about 1/factor of the parameters, with one mode for each side.
        out_modes, in_modes: factors of O and I (by default [O] and [I]).
    """

    def __init__(self, *, ranks=None, factor=None, out_modes=None, in_modes=None):
        one_of(ranks, factor, ("ranks", "factor"))
        self.ranks = None if ranks is None else fields.wholes(ranks, "ranks", low=1)
        self.factor = None if factor is None else fields.number(factor, "factor", above=1, high=1000)
        self.out_modes, self.in_modes = (None if modes is None else fields.wholes(modes, name, low=1)
                                         for name, modes in (("out_modes", out_modes), ("in_modes", in_modes)))
        if self.factor and (out_modes is not None or in_modes is not None):
            raise InputError("must not be given with factor", field="in_modes" if out_modes is None else "out_modes")

    def resolve(self, shape):
        """(ranks, out_modes, in_modes) for weights of ``shape``. Raises: InputError."""
        ranks = (1, *chosen_ranks(shape, self.factor), 1) if self.ranks is None else self.ranks
        return check_modes(shape, ranks, self.out_modes, self.in_modes)

    def check(self, shape):
        self.resolve(shape)

    def encode(self, weight):
        """Parts: core1, core2 … [r_(k-1), n_k, r_k], float64."""
        weight = checked(weight)
        layer = decompose(weight, *self.resolve(weight.shape))

        def rebuild(**cores):
            dense = replace(layer, train=replace(layer.train, cores=tuple(cores.values()))).to_dense()
            return np.ascontiguousarray(dense.transpose(0, 3, 1, 2) if dense.ndim == 4 else dense, weight.dtype)

        cores = {f"core{n}": core for n, core in enumerate(layer.train.cores, 1)}
        return Encoded(parts=cores, bits=layer.bits(WEIGHT_BITS), rebuild=rebuild)

    def cost(self, shape, positions=1, inputs=None, *, merged=False):
        """Cores contracted last to first, the input side at ``inputs`` pixels; ``merged``: each side multiplied into
        one matrix beforehand, as the chain of three stages that the hardware runs."""
        inputs = positions if inputs is None else inputs
        ranks, out_modes, in_modes = self.resolve(shape)
        middle = len(out_modes) + (len(shape) == 4)
        r_out, r_in = ranks[len(out_modes)], ranks[middle]
        if merged:
            ranks, out_modes, in_modes = (1, r_out, *[r_in] * (len(shape) == 4), 1), shape[:1], shape[1:2]
            middle = len(out_modes) + (len(shape) == 4)
        core = r_out * taps_of(shape) * r_in if len(shape) == 4 else 0
        parameters, macs, left, done = core, core * positions, prod(in_modes), 1
        for k, n in reversed(list(enumerate(in_modes, middle))):
            left //= n
            size = ranks[k] * n * ranks[k + 1]
            parameters, macs = parameters + size, macs + size * left * inputs
        for k, n in reversed(list(enumerate(out_modes))):
            size = ranks[k] * n * ranks[k + 1]
            parameters, macs, done = parameters + size, macs + size * done * positions, done * n
        return Cost(parameters, macs, parameters * WEIGHT_BITS)
