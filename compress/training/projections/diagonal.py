"""Diagonal sparsity: few wrapped diagonals of the matrix of output and input channels.

Source: "Dynamic Sparse Training of Diagonally Sparse Networks" (DynaDiag), ICML 2025, arXiv 2506.11449; all taps of a
kernel share the diagonals (ours).
"""
import numpy as np

from compress.training import fields
from compress.training.projections.projection import (
    WEIGHT_BITS, Cost, Encoded, Projection, checked, index_bits, keep_count, largest, taps_of)
from compress.training.projections.tensor_train import one_of
from spec.errors import InputError


def diagonals(outputs, inputs):
    """(rows, columns) [diagonals, elements] of the max(O, I) wrapped diagonals, min(O, I) elements each.

    O >= I: diagonal p has row ``(j + p) mod O`` in column j; else column ``(i + p) mod I`` in row i. Every element of
    the matrix lies on exactly one of them.
    """
    p, n = np.ogrid[:max(outputs, inputs), :min(outputs, inputs)]
    moved, fixed = (p + n) % max(outputs, inputs), np.broadcast_to(n, (max(outputs, inputs), n.size))
    return (moved, fixed) if outputs >= inputs else (fixed, moved)


class Diagonal(Projection):
    """Weights with K wrapped diagonals; the nearest member keeps those of most energy (the lowest number wins ties).

    Options: count: K; or sparsity S: ``K = ceil((1 - S) O I / min(O, I))``, 0 <= S < 1.
    """

    def __init__(self, *, count=None, sparsity=None):
        one_of(count, sparsity, ("count", "sparsity"))
        self.count = None if count is None else fields.whole(count, "count", low=1)
        self.sparsity = None if sparsity is None else fields.number(sparsity, "sparsity", low=0, below=1)

    def resolve(self, shape):
        """K for weights of ``shape``. Raises: InputError above max(O, I)."""
        most = max(shape[:2])
        if self.count is None:
            return keep_count(1 - self.sparsity, most)
        if self.count > most:
            raise InputError(f"must be at most {most}", field="count", value=self.count)
        return self.count

    def check(self, shape):
        self.resolve(shape)

    def encode(self, weight):
        """Parts: numbers [K] of the diagonals, values [K, elements, taps]."""
        weight = checked(weight)
        outputs, inputs = weight.shape[:2]
        rows, columns = diagonals(outputs, inputs)
        cells = weight.reshape(outputs, inputs, -1)
        energy = np.square(cells, dtype=np.float64).sum(axis=2)[rows, columns].sum(axis=1)
        stay = largest(energy, self.resolve(weight.shape))

        def rebuild(numbers, values):
            out = np.zeros(cells.shape, weight.dtype)
            out[rows[numbers], columns[numbers]] = values
            return out.reshape(weight.shape)

        return Encoded(parts={"numbers": stay, "values": cells[rows[stay], columns[stay]]},
                       bits=self.cost(weight.shape).bits, rebuild=rebuild)

    def cost(self, shape, positions=1, inputs=None):
        """``K min(O, I) R S`` values, and a number of ceil(log2 max(O, I)) bits for each diagonal."""
        count = self.resolve(shape)
        parameters = count * min(shape[:2]) * taps_of(shape)
        return Cost(parameters, parameters * positions,
                    parameters * WEIGHT_BITS + count * index_bits(max(shape[:2])))
