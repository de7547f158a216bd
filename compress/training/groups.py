"""Groups of weights that are pruned, or penalised, together. Kernels are [O, I, R, S] or [O, I].

=================  =====================================================================================
element            each weight alone
kernel             the taps of one (output, input) pair
input_channel      all weights that read one input channel
output_channel     all weights of one output channel
block              a block of outputs x inputs, all taps; blocks at the edges may be smaller
nm                 each weight alone; free: the weights of the N:M view along input channels
pattern            the taps of one kernel; free: its strongest taps, the centre always among them
=================  =====================================================================================

Free weights are those that the format keeps; they belong to no group.
"""
from math import prod

import torch
from torch.nn import functional

from compress.training import fields
from compress.training.masks import nm_mask, parse_series
from spec.errors import InputError

KINDS = ("element", "kernel", "input_channel", "output_channel", "block", "nm", "pattern")
#: Axes that a group runs along, where groups are whole slices.
_AXES = {"kernel": (2, 3), "input_channel": (0, 2, 3), "output_channel": (1, 2, 3), "pattern": (2, 3)}


class Groups:
    """Partition of a weight.

    Args: kind: see above; block: (outputs, inputs) of kind block; pattern: N:M or a series, of kind nm; taps: kept ones
    of kind pattern. ``field``: name of the option that ``kind`` is.
    Raises: InputError for an option that is missing, or that belongs to another kind.
    """

    def __init__(self, kind, *, block=None, pattern=None, taps=None, field="groups"):
        self.kind = fields.choice(kind, field, KINDS)
        for name, value, owner in (("block", block, "block"), ("pattern", pattern, "nm"), ("taps", taps, "pattern")):
            if (value is None) == (kind == owner):
                raise InputError(f"must be given with {field} {owner}, and only then", field=name)
        self.block = None if block is None else fields.wholes(block, "block", low=1, length=2)
        self.patterns = None if pattern is None else parse_series(pattern, "pattern")
        self.taps = None if taps is None else fields.whole(taps, "taps", low=1)

    def check(self, layers):
        """Raises: InputError for a layer of {name: layer} that has no such groups."""
        for name, layer in layers.items():
            shape = tuple(layer.weight.shape)
            if self.kind == "pattern" and (len(shape) != 4 or self.taps > prod(shape[2:])):
                raise InputError(f"must be a convolution of at least {self.taps} taps", field=f"layers.{name}",
                                 value=shape)
            if self.kind == "block" and (self.block[0] > shape[0] or self.block[1] > shape[1]):
                raise InputError(f"must be at most {list(shape[:2])}, the channels of layer {name}", field="block",
                                 value=list(self.block))
            if self.kind == "nm" and max(m for _, m in self.patterns) > shape[1]:
                raise InputError(f"must have at least M = {max(m for _, m in self.patterns)} input channels",
                                 field=f"layers.{name}", value=shape[1])

    @torch.no_grad()
    def free(self, weight):
        """Bool mask of the free weights."""
        if self.kind == "nm":
            return nm_mask(weight, self.patterns)
        mask = torch.zeros(weight.shape, dtype=torch.bool)
        if self.kind == "pattern":
            strength = weight.detach().abs().flatten(2)
            centre = (weight.shape[2] // 2) * weight.shape[3] + weight.shape[3] // 2
            strength[:, :, centre] = torch.inf
            order = torch.sort(strength, dim=2, descending=True, stable=True).indices
            mask = mask.flatten(2).scatter_(2, order[:, :, :self.taps], True).reshape(weight.shape)
        return mask

    def energy(self, weight):
        """Sum of squares of each group; differentiable. The shape is that of the groups."""
        squares = weight.square()
        if self.kind == "block":
            (b, c), (o, i) = self.block, weight.shape[:2]
            squares = functional.pad(squares.reshape(o, i, -1).sum(2), (0, -i % c, 0, -o % b))
            return squares.reshape(-1, b, squares.shape[1] // c, c).sum((1, 3))
        axes = tuple(a for a in _AXES.get(self.kind, ()) if a < weight.dim())
        return squares.sum(axes, keepdim=True) if axes else squares

    def sizes(self, weight):
        """Weights in each group, free ones included."""
        return self.energy(torch.ones_like(weight))

    def spread(self, values, weight):
        """Values of groups, for each weight."""
        if self.kind == "block":
            o, i = weight.shape[:2]
            values = values.repeat_interleave(self.block[0], 0).repeat_interleave(self.block[1], 1)[:o, :i]
            values = values.reshape(o, i, *[1] * (weight.dim() - 2))
        return values.expand(weight.shape)

    @torch.no_grad()
    def rms(self, weight):
        """Root mean square of each group."""
        return (self.energy(weight) / self.sizes(weight)).sqrt()
