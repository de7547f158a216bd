"""DeepHoyer: scale-free regularisers that make weights, or whole channels, zero; then pruning at a threshold.

    HS(w) = (sum |w|)^2 / sum w^2                                                     element
    Group-HS(W) = ((sum_i ||W[:, i]||_2)^2 + (sum_o ||W[o]||_2)^2) / ||W||_F^2        input and output channels

Both lie between 1 (or 2: one weight) and the number of weights (of channels). The gradient of HS shrinks weights with
``|w|`` below ``sum w^2 / sum |w|`` and enlarges the others. Of all-zero weights both are 0.

Source: H. Yang, W. Wen, H. Li, "DeepHoyer: Learning Sparser Neural Network with Differentiable Scale-Invariant Sparsity
Measures", ICLR 2020 (element and structural form; a matrix over columns and rows). The published code prunes single
weights in both cases; here the group form prunes channels.
"""
import torch

from compress.training import fields
from compress.training.groups import Groups
from compress.training.masks import choose, check_threshold, fix_mask, limit_of
from compress.training.technique import Technique

FORMS = ("element", "group")
#: Sums of squares below it count as zero, which keeps gradients finite.
TINY = 1e-30


def hoyer_square(values):
    """``(sum |v|)^2 / sum v^2`` of all elements: a scalar tensor, 0 for zeros."""
    return values.abs().sum().square() / values.square().sum().clamp_min(TINY)


def group_hoyer_square(weight):
    """Group-HS of a weight [O, I, …] over input and output channels: a scalar tensor, 0 for zeros."""
    flat = weight.flatten(2) if weight.dim() > 2 else weight[:, :, None]
    columns = torch.linalg.vector_norm(flat, dim=(0, 2)).sum()       # its gradient at a zero channel is zero
    rows = torch.linalg.vector_norm(flat, dim=(1, 2)).sum()
    return (columns.square() + rows.square()) / weight.square().sum().clamp_min(TINY)


class Hoyer(Technique):
    """Regularisation of the module's docstring, then pruning.

    Options:
        form: ``element`` or ``group``.
        strength: factor of the sum over layers of HS or Group-HS.
        threshold: `finish` drops weights (channels: root mean squares) below it (the paper: 1e-4).
        std: instead, the threshold as a share of the standard deviation of a layer's weights (the paper: 0.25).
        layers: list of layer patterns (default: `technique.default_layers`).

    With neither threshold nor std nothing is pruned. Pruned layers keep to their mask (`parametrizations.Masked`).
    """

    def __init__(self, *, form="element", strength, threshold=None, std=None, layers=None):
        self.form = fields.choice(form, "form", FORMS)
        self.strength = fields.number(strength, "strength", low=0)
        self.threshold, self.std = check_threshold(threshold, std)
        self.layers = layers
        self.measure = hoyer_square if form == "element" else group_hoyer_square
        self.groups = [Groups(g) for g in (("element",) if form == "element" else ("input_channel", "output_channel"))]

    def start(self, model):
        super().start(model)
        self.targets = choose(model, self.layers, "hoyer")

    def penalty(self):
        return self.strength * sum(self.measure(layer.weight) for layer in self.targets.values())

    def _mask(self, layer):
        weight, mask = layer.weight.detach(), torch.ones_like(layer.weight, dtype=torch.bool)
        limit = limit_of(weight, self.threshold, self.std)
        for groups in self.groups if limit is not None else ():
            mask &= groups.spread(groups.rms(weight) >= limit, weight)
        return mask

    @torch.no_grad()
    def figures(self):
        """Per layer: ``hoyer``, the measure over its largest value (1: all weights or channels equal); ``density``,
        the share of weights that pruning now would leave."""
        result, kept, total = {}, 0, 0
        for name, layer in self.targets.items():
            weight, mask = layer.weight, self._mask(layer)
            most = weight.numel() if self.form == "element" else weight.shape[0] + weight.shape[1]
            result |= {f"{name}/hoyer": float(self.measure(weight)) / most,
                       f"{name}/density": int(mask.sum()) / mask.numel()}
            kept, total = kept + int(mask.sum()), total + mask.numel()
        return result | {"density": kept / total}

    def finish(self):
        if self.threshold is not None or self.std is not None:
            for layer in self.targets.values():
                fix_mask(layer, self._mask(layer))
