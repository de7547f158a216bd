"""Structured sparsity: whole input channels, output channels or kernels, by their L2 norm."""
import numpy as np

from compress.training import fields
from compress.training.projections.projection import (
    WEIGHT_BITS, Cost, Encoded, Projection, checked, keep_count, largest, taps_of)

#: Groups by name: what one removes.
UNITS = ("input", "output", "kernel")


class Channel(Projection):
    """Weights of which a share of the groups is not zero; the nearest member (the lowest index wins ties).

    Options: unit: ``input`` (W[:, i]), ``output`` (W[o]) or ``kernel`` (W[o, i]); keep: share that stays, above 0 (of n
    groups ceil(keep n)).
    """

    def __init__(self, *, keep, unit="input"):
        self.unit = fields.choice(unit, "unit", UNITS)
        self.keep = fields.number(keep, "keep", above=0, high=1)

    def _groups(self, weight):
        """View [groups, elements], and its inverse."""
        outputs, inputs = weight.shape[:2]
        if self.unit == "output":
            return weight.reshape(outputs, -1), lambda rows: rows.reshape(weight.shape)
        if self.unit == "kernel":
            return weight.reshape(outputs * inputs, -1), lambda rows: rows.reshape(weight.shape)
        swapped = weight.swapaxes(0, 1)
        return swapped.reshape(inputs, -1), lambda rows: rows.reshape(swapped.shape).swapaxes(0, 1).copy()

    def encode(self, weight):
        """Parts: present bool [groups], values [present, elements]."""
        weight = checked(weight)
        rows, back = self._groups(weight)
        stay = largest(np.square(rows, dtype=np.float64).sum(axis=1), keep_count(self.keep, len(rows)))
        present = np.zeros(len(rows), bool)
        present[stay] = True

        def rebuild(present, values):
            out = np.zeros((len(present), values.shape[1]), weight.dtype)
            out[present] = values
            return back(out)

        return Encoded(parts={"present": present, "values": rows[stay]}, bits=self.cost(weight.shape).bits,
                       rebuild=rebuild)

    def cost(self, shape, positions=1, inputs=None):
        """The groups that stay, and one bit per group."""
        outputs, ins, taps = shape[0], shape[1], taps_of(shape)
        groups = {"input": ins, "output": outputs, "kernel": outputs * ins}[self.unit]
        parameters = keep_count(self.keep, groups) * (outputs * ins * taps // groups)
        return Cost(parameters, parameters * positions, parameters * WEIGHT_BITS + groups)
