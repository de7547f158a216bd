"""Truncated SVD: two factors of a matrix, a 1x1 kernel, or a kernel read as a matrix.

Source: H. Yang et al., "Learning Low-rank Deep Neural Networks via Singular Vector Orthogonality Regularization and
Singular Value Sparsification", CVPR workshops 2020, section 3.1 (channel-wise and spatial-wise decomposition).
"""
import numpy as np

from compress.factorize import RANK_STEP, matrix_rank
from compress.training import fields
from compress.training.projections.projection import WEIGHT_BITS, Cost, Encoded, Projection, checked
from compress.training.projections.tensor_train import one_of
from golden import tucker
from spec.errors import InputError

#: How a kernel [O, I, R, S] is read as a matrix: [O, I R S] or [I R, O S].
FORMS = ("channel", "spatial")


def matrix_shape(shape, form):
    """Rows and columns of the matrix that weights of ``shape`` are read as."""
    if len(shape) == 2:
        return tuple(shape)
    o, i, r, s = shape
    return (o, i * r * s) if form == "channel" else (i * r, o * s)


def to_matrix(weight, form):
    """The matrix of a weight (array or tensor)."""
    shape = matrix_shape(weight.shape, form)
    if form == "spatial":
        weight = weight.swapaxes(0, 1).swapaxes(1, 2)                                       # [I, R, O, S]
    return weight.reshape(shape)


def from_matrix(matrix, shape, form):
    """Inverse of `to_matrix` for weights of ``shape``."""
    if form == "channel":
        return matrix.reshape(tuple(shape))
    o, i, r, s = shape
    return matrix.reshape(i, r, o, s).swapaxes(1, 2).swapaxes(0, 1)


def check_rank(shape, rank, form):
    """``rank`` if weights of ``shape`` can have it. Raises: InputError naming the bound."""
    fields.choice(form, "form", FORMS)
    if form == "spatial" and len(shape) != 4:
        raise InputError("must be channel for a matrix", field="form", value=form)
    return fields.whole(rank, "rank", low=1, high=min(matrix_shape(shape, form)))


class SVD(Projection):
    """Matrices of at most a rank; the nearest one.

    Options: rank; or factor: the rank that keeps about 1/factor of the parameters; form: ``channel`` ([O, I R S]: RxS
    convolution, then 1x1; of matrices and 1x1 kernels I -> r -> O) or ``spatial`` ([I R, O S]: Rx1, then 1xS).
    """

    def __init__(self, *, rank=None, factor=None, form="channel"):
        one_of(rank, factor, ("rank", "factor"))
        self.rank = None if rank is None else fields.whole(rank, "rank", low=1)
        self.factor = None if factor is None else fields.number(factor, "factor", above=1, high=1000)
        self.form = fields.choice(form, "form", FORMS)

    def resolve(self, shape):
        """The rank for weights of ``shape``. Raises: InputError."""
        rank = self.rank
        if rank is None:
            rank = matrix_rank(*matrix_shape(shape, self.form), self.factor)
            if not rank:
                raise InputError(f"must leave a rank of at least {RANK_STEP} of a weight {tuple(shape)}",
                                 field="factor", value=self.factor)
        return check_rank(shape, rank, self.form)

    def check(self, shape):
        self.resolve(shape)

    def encode(self, weight):
        """Parts: a [rows, rank], b [rank, columns], float64."""
        weight = checked(weight)
        rank = self.resolve(weight.shape)
        b, a = (s.weights[:, 0, 0] for s in tucker.svd(to_matrix(weight, self.form), rank).stages)

        def rebuild(a, b):
            return np.ascontiguousarray(from_matrix(a @ b, weight.shape, self.form), weight.dtype)

        return Encoded(parts={"a": a, "b": b}, bits=(a.size + b.size) * WEIGHT_BITS, rebuild=rebuild)

    def cost(self, shape, positions=1, inputs=None):
        """``positions`` also count for the first stage, which takes the stride; of the spatial form it is the geometric
        mean of input and output pixels (the stride of one axis)."""
        rows, columns = matrix_shape(shape, self.form)
        rank = self.resolve(shape)
        inputs = positions if inputs is None else inputs
        if self.form == "channel":
            macs = (rank * columns + rows * rank) * positions
        else:
            macs = rank * rows * round((inputs * positions) ** 0.5) + rank * columns * positions
        parameters = rank * (rows + columns)
        return Cost(parameters, macs, parameters * WEIGHT_BITS)
