"""Micro-structured unification: all weights of a small block share one magnitude and keep their signs.

Source: "Joint Model Compression by Micro-Structured Weight Unification and Pruning", arXiv 2106.08301; blocks along the
input channels of a tap (ours).
"""
import numpy as np

from compress.training import fields
from compress.training.projections.projection import WEIGHT_BITS, Cost, Encoded, Projection, checked, taps_of
from spec.derive import ceil_div
from spec.errors import InputError


class Unified(Projection):
    """``w <- sign(w) q,  q = mean |w|`` over ``block`` consecutive input channels of a tap; the nearest member.

    The sign of 0 is +. A last block that is shorter has a mean of its own elements.

    Options: block: weights that share a magnitude, at least 2.
    """

    def __init__(self, *, block=8):
        self.block = fields.whole(block, "block", low=2, high=64)

    def check(self, shape):
        if self.block > shape[1]:
            raise InputError(f"must be at most {shape[1]}, the input channels", field="block", value=self.block)

    def encode(self, weight):
        """Parts: negative bool [O, taps, I], magnitudes [O, taps, blocks]."""
        weight = checked(weight)
        self.check(weight.shape)
        rows = np.moveaxis(weight.reshape(*weight.shape[:2], -1), 1, 2)                    # [O, taps, I]
        starts = np.arange(0, rows.shape[2], self.block)
        lengths = np.diff([*starts, rows.shape[2]])
        magnitudes = np.add.reduceat(np.abs(rows).astype(np.float64), starts, axis=2) / lengths

        def rebuild(negative, magnitudes):
            values = np.repeat(magnitudes, lengths, axis=2)
            values = np.where(negative, -values, values)
            return np.ascontiguousarray(np.moveaxis(values, 2, 1)).reshape(weight.shape)

        return Encoded(parts={"negative": rows < 0, "magnitudes": magnitudes.astype(weight.dtype)},
                       bits=self.cost(weight.shape).bits, rebuild=rebuild)

    def cost(self, shape, positions=1, inputs=None):
        """One multiplication per block (after signed additions); a sign bit per weight and a value per block."""
        self.check(shape)
        blocks = shape[0] * taps_of(shape) * ceil_div(shape[1], self.block)
        return Cost(blocks, blocks * positions, blocks * WEIGHT_BITS + shape[0] * shape[1] * taps_of(shape))
