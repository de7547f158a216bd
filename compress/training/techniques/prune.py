"""Magnitude pruning: at once or gradually, of weights or of groups of weights; and N:M at once.

Groups of the smallest root mean square go first (of single weights: the smallest ``|w|``). The gradual form follows

    s(t) = s_end * (1 - (1 - t) ** 3),    t = (epoch - begin * epochs) / ((end - begin) * epochs), within 0..1

Masked weights get no gradient and stay zero. Sources: M. Zhu, S. Gupta, "To prune, or not to prune", 2017, equation 1
(cubic schedule, s_i = 0); A. Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021 (a trained network is cut
to N:M once and trained again with its original recipe).
"""
import math

import torch

from compress.training import fields
from compress.training.groups import Groups
from compress.training.masks import choose, fix_mask
from compress.training.technique import Technique, options_of
from spec.errors import InputError

SCOPES = ("global", "layer")


class Prune(Technique):
    """Pruning of the module's docstring.

    Options:
        sparsity: share of the weights that go, 0..1 (1 excluded); with ``groups: nm`` it must not be given.
        groups, block, pattern: what goes as one, see `compress.training.groups` (all kinds but pattern; for nm the
            pattern is ``"2:4"`` or a series).
        scope: ``global``: groups of all layers compete; ``layer``: each layer loses the same share.
        begin, end: shares of the stage's epochs between which the sparsity grows; both 0: at once, at the start.
        layers: list of layer patterns (default: `technique.default_layers`), or a mapping layer pattern -> sparsity
            (scope layer).

    At least one group of each layer stays. The weights that go are at most the share asked for: groups are not split.
    `finish` leaves the masks (`parametrizations.Masked`).
    """

    def __init__(self, *, sparsity=None, groups="element", block=None, pattern=None, scope="global", begin=0.0, end=0.0,
                 layers=None):
        fields.choice(groups, "groups", ("element", "kernel", "input_channel", "output_channel", "block", "nm"))
        self.groups = Groups(groups, block=block, pattern=pattern)
        self.scope = fields.choice(scope, "scope", SCOPES)
        self.begin = fields.number(begin, "begin", low=0, high=1)
        self.end = fields.number(end, "end", low=self.begin, high=1)
        self.layers, self.own = layers, {}
        if groups == "nm":
            for name, given in (("sparsity", sparsity is not None), ("end", self.end > 0),
                                ("layers", isinstance(layers, dict))):
                if given:
                    raise InputError("must not say how much goes: the pattern does", field=name)
        elif isinstance(layers, dict):
            if self.scope != "layer" or sparsity is not None:
                raise InputError("must be a list unless scope is layer and sparsity is not given", field="layers")
            self.own = {p: fields.number(v, f"layers.{p}", low=0, below=1) for p, v in layers.items()}
        elif sparsity is None:
            raise InputError("must be given", field="sparsity")
        self.sparsity = None if sparsity is None else fields.number(sparsity, "sparsity", low=0, below=1)

    def start(self, model):
        super().start(model)
        self.targets = choose(model, self.layers, "prune")
        self.groups.check(self.targets)
        for layer in self.targets.values():
            fix_mask(layer, torch.ones_like(layer.weight, dtype=torch.bool))
        if self.end == 0:
            self._prune(1.0)

    def begin_epoch(self, epoch, epochs):
        first, last = self.begin * epochs, self.end * epochs
        if self.end and epoch >= first:
            self._prune(min(1.0, (epoch - first) / (last - first)) if last > first else 1.0)

    @torch.no_grad()
    def _prune(self, time):
        """Masks of the time 0..1 of the schedule. What is masked has magnitude 0 and goes first again."""
        weights = {name: layer.weight for name, layer in self.targets.items()}
        if self.groups.kind == "nm":
            masks = {name: self.groups.free(w) for name, w in weights.items()}
        else:
            grown = 1 - (1 - time) ** 3
            if self.scope == "global":
                masks = keep_largest(self.groups, weights, grown * self.sparsity)
            else:
                share = {n: options_of(self.own, n) if self.own else self.sparsity for n in weights}
                masks = {n: keep_largest(self.groups, {n: w}, grown * share[n])[n] for n, w in weights.items()}
        for name, mask in masks.items():
            self.targets[name].parametrizations.weight[0].mask.copy_(mask)

    def figures(self):
        """Share of weights that stay, per layer and in all."""
        masks = {name: layer.parametrizations.weight[0].mask for name, layer in self.targets.items()}
        kept = {name: int(mask.sum()) for name, mask in masks.items()}
        return {f"{name}/density": kept[name] / mask.numel() for name, mask in masks.items()} | {
            "density": sum(kept.values()) / sum(mask.numel() for mask in masks.values())}

    def finish(self):
        self._prune(1.0)


@torch.no_grad()
def keep_largest(groups, weights, sparsity):
    """Masks {name: bool} that drop at most the share ``sparsity`` of all weights of {name: weight}: whole groups, the
    smallest root mean square first (ties: the first), one group of each tensor spared."""
    rms = {name: groups.rms(w) for name, w in weights.items()}
    order, sizes = [], []
    for name, w in weights.items():
        score = rms[name].flatten().clone()
        score[score.argmax()] = torch.inf
        order.append(score)
        sizes.append(groups.sizes(w).flatten())
    order, sizes = torch.cat(order), torch.cat(sizes).double()
    order, index = torch.sort(order, stable=True)
    goes = torch.zeros(len(index), dtype=torch.bool)
    # the sum is of whole numbers, so a product like 0.29 * 100 = 28.999… needs the margin
    allowed = math.floor(sparsity * float(sizes.sum()) + 1e-6)
    goes[index] = (sizes[index].cumsum(0) <= allowed) & order.isfinite()
    masks, at = {}, 0
    for name, w in weights.items():
        count = rms[name].numel()
        masks[name] = groups.spread(~goes[at:at + count].reshape(rms[name].shape), w).clone()
        at += count
    return masks
