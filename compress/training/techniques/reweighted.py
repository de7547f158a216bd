"""Dynamically updated (reweighted) regularisation: each group's penalty falls as the group grows.

    penalty = strength * sum_g P_g * E_g,    P_g = 1 / (E_g + eps), refreshed every few epochs and constant between

with ``E_g = |w|`` for single weights and ``E_g = ||W_g||_F^2`` for groups. Large groups soon cost almost nothing while
small ones are driven to zero; there is one factor, and the penalty is bounded by the number of groups.

Source: T. Zhang, X. Ma, Z. Zhan et al., "A Unified DNN Weight Pruning Framework Using Reweighted Optimization Methods",
arXiv 2004.05531 (after E. Candes, M. Wakin, S. Boyd, "Enhancing Sparsity by Reweighted l1 Minimization", 2008). The
free weights of the kinds nm and pattern, which no term penalises, are ours.
"""
import torch

from compress.training import fields
from compress.training.groups import Groups
from compress.training.masks import choose, check_threshold, fix_mask, limit_of
from compress.training.technique import Technique
from spec.errors import InputError


class Reweighted(Technique):
    """Regularisation of the module's docstring, then pruning.

    Options:
        groups, block, pattern, taps: see `compress.training.groups`.
        strength: factor of the penalty.
        refresh: epochs between refreshes of P and of the free weights.
        eps: keeps P finite; above 0.
        threshold, std: `finish` drops groups whose root mean square is below the threshold, or below this share of the
            standard deviation of the layer's weights. For the kinds nm and pattern neither is given: `finish` keeps the
            free weights.
        layers: list of layer patterns (default: `technique.default_layers`).

    Pruned layers keep to their mask (`parametrizations.Masked`).
    """

    def __init__(self, *, groups="element", strength, refresh=5, eps=1e-3, block=None, pattern=None, taps=None,
                 threshold=None, std=None, layers=None):
        self.groups = Groups(groups, block=block, pattern=pattern, taps=taps)
        self.strength = fields.number(strength, "strength", low=0)
        self.refresh = fields.whole(refresh, "refresh", low=1)
        self.eps = fields.number(eps, "eps", above=0)
        self.threshold, self.std = check_threshold(threshold, std)
        self.hard = groups in ("nm", "pattern")
        for name, value in (("threshold", threshold), ("std", std)):
            if self.hard and value is not None:
                raise InputError(f"must not be given: groups {groups} say what stays", field=name)
        self.layers = layers

    def start(self, model):
        super().start(model)
        self.targets = choose(model, self.layers, "reweighted")
        self.groups.check(self.targets)
        self._refresh()

    def _amounts(self, weight, held):
        """E of each group, free weights left out."""
        weight = weight * held
        return weight.abs() if self.groups.kind in ("element", "nm") else self.groups.energy(weight)

    @torch.no_grad()
    def _refresh(self):
        self.held = {name: ~self.groups.free(layer.weight) for name, layer in self.targets.items()}
        self.factors = {name: 1 / (self._amounts(layer.weight, self.held[name]) + self.eps)
                        for name, layer in self.targets.items()}

    def begin_epoch(self, epoch, epochs):
        if epoch % self.refresh == 0:
            self._refresh()

    def penalty(self):
        return self.strength * sum((self.factors[name] * self._amounts(layer.weight, self.held[name])).sum()
                                   for name, layer in self.targets.items())

    def _mask(self, layer):
        weight = layer.weight.detach()
        if self.hard:
            return self.groups.free(weight)
        limit = limit_of(weight, self.threshold, self.std)
        return self.groups.spread(self.groups.rms(weight) >= (0 if limit is None else limit), weight)

    @torch.no_grad()
    def figures(self):
        """Per layer and in all: ``density``, the share of weights that pruning now would leave; ``outside``, the share
        of the layer's energy that it would drop."""
        result, kept, total = {}, 0, 0
        for name, layer in self.targets.items():
            weight, mask = layer.weight, self._mask(layer)
            energy = float(weight.square().sum())
            dropped = float((weight * ~mask).square().sum())
            result |= {f"{name}/density": int(mask.sum()) / mask.numel(),
                       f"{name}/outside": dropped / energy if energy else 0.0}
            kept, total = kept + int(mask.sum()), total + mask.numel()
        return result | {"density": kept / total}

    def finish(self):
        if self.hard or self.threshold is not None or self.std is not None:
            for layer in self.targets.values():
                fix_mask(layer, self._mask(layer))

    def state_dict(self):
        return {"factors": self.factors, "held": self.held}

    def load_state_dict(self, state):
        self.factors, self.held = state["factors"], state["held"]
