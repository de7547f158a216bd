"""SRigL: dynamic sparse training in which every output that is left keeps the same number of weights.

An output's fan-in is its number of weights that are not masked. Every ``interval`` steps, with n weights of a layer
left and the share ``alpha`` to exchange (cosine from ``drop`` to 0 at the share ``until`` of the epochs):

1. kept: the largest (1 - alpha) n of the active ``|w|``, layer-wide; candidates: the largest alpha n of the masked
   ``|g|``, g the gradient of the dense layer. An output with fewer than ``gamma * fan-in`` kept or candidate weights
   loses all of its weights for good (ablation).
2. The new fan-in is ``floor(budget / outputs left)``, at most the layer's inputs; budget: the weights at the start.
3. Each output left holds its largest kept weights up to the fan-in, filled up by the largest ``|g|`` of all its
   others (what was active stays as it was, what is new starts at 0).

Layers share the sparsity as Erdos-Renyi kernels do (`erdos_renyi`), or equally.

Source: M. Lasby, A. Golubeva, U. Evci, M. Nica, Y. Ioannou, "Dynamic Sparse Training with Structured Sparsity", ICLR
2024, arXiv 2305.02299 (drop .3, gamma .3 for convolutions, interval 100); shares: U. Evci et al., "Rigging the
Lottery", ICML 2020. Ties: the first; at least one output stays.
"""
import math

import torch
from torch import nn
from torch.nn.utils import parametrize

from compress.training import fields
from compress.training.masks import choose, fix_mask, release
from compress.training.technique import Technique

SHARES = ("erdos_renyi", "equal")


class Exploring(nn.Module):
    """Parametrisation ``w * mask`` of a weight [O, I, …] that also shows the gradient of what is masked.

    ``dense``: after a backward pass with ``watch`` set, the gradient of the loss by the product, before the mask.
    """

    def __init__(self, *, mask):
        super().__init__()
        self.register_buffer("mask", mask)
        self.watch, self.dense = False, None

    def right_inverse(self, weight):
        return weight * self.mask

    def forward(self, weight):
        product = weight * self.mask
        if self.watch and product.requires_grad:
            product.register_hook(self._keep)
        return product

    def _keep(self, gradient):
        self.dense = gradient.detach()


def erdos_renyi(shapes, density):
    """Density of each layer: proportional to ``(O + I + R + S) / (O I R S)``, at most 1, and ``density`` in all."""
    sizes = [math.prod(s) for s in shapes]
    raw = [sum(s) / size for s, size in zip(shapes, sizes)]
    full = set()
    while True:
        left = [n for n in range(len(shapes)) if n not in full]
        budget = density * sum(sizes) - sum(sizes[n] for n in full)
        scale = budget / sum(raw[n] * sizes[n] for n in left) if left else 0
        over = [n for n in left if scale * raw[n] > 1]
        if not over:
            return [1.0 if n in full else scale * raw[n] for n in range(len(shapes))]
        full.update(over)


@torch.no_grad()
def fill(scores, fan_in):
    """Bool [O, n]: the ``fan_in`` largest scores of each row, -inf never; ties: the first."""
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :fan_in]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True) & (scores > -torch.inf)


@torch.no_grad()
def exchange(weight, gradient, mask, *, alpha, gamma, budget):
    """The new mask [O, n] (steps 1 to 3). Args: weight, gradient: float [O, n]; mask: bool [O, n]."""
    active, nothing = mask.any(1), -torch.inf
    size = int(mask.sum())
    moved = int(alpha * size)
    worth = weight.abs().masked_fill(~mask, nothing)
    kept = fill(worth.reshape(1, -1), size - moved).reshape(mask.shape)
    promise = gradient.abs().masked_fill(mask | ~active[:, None], nothing)
    salient = (kept | fill(promise.reshape(1, -1), moved).reshape(mask.shape)).sum(1)
    left = active & (salient >= gamma * size / int(active.sum()))
    if not left.any():
        left[salient.argmax()] = True
    fan_in = min(mask.shape[1], budget // int(left.sum()))
    held = fill(worth.masked_fill(~kept, nothing), fan_in)
    grown = fill(gradient.abs().masked_fill(held, torch.inf), fan_in)      # what is held comes first
    return (held | grown) & left[:, None]


class ConstantFanIn(Technique):
    """Training of the module's docstring.

    Options:
        sparsity: share of the selected layers' weights that go, 0..1 (1 excluded).
        shares: ``erdos_renyi`` or ``equal``; each layer's fan-in is rounded down, but at least 1.
        interval: steps between exchanges. drop: first share of weights exchanged. gamma: see the module's docstring.
        until: share of the stage's epochs after which masks stay, 0..1.
        layers: list of layer patterns (default: `technique.default_layers`).

    The stage begins with the largest weights of each output. `finish` fixes the masks (`parametrizations.Masked`).
    """

    def __init__(self, *, sparsity, shares="erdos_renyi", interval=100, drop=0.3, gamma=0.3, until=0.75, layers=None):
        self.sparsity = fields.number(sparsity, "sparsity", low=0, below=1)
        self.shares = fields.choice(shares, "shares", SHARES)
        self.interval = fields.whole(interval, "interval", low=1)
        self.drop = fields.number(drop, "drop", low=0, high=1)
        self.gamma = fields.number(gamma, "gamma", low=0, high=1)
        self.until = fields.number(until, "until", low=0, high=1)
        self.layers, self.step, self.alpha = layers, 0, 0.0

    def start(self, model):
        super().start(model)
        self.targets = choose(model, self.layers, "constant_fan_in")
        shapes = [tuple(layer.weight.shape) for layer in self.targets.values()]
        density = [1 - self.sparsity] * len(shapes)
        if self.shares == "erdos_renyi":
            density = erdos_renyi(shapes, 1 - self.sparsity)
        self.budgets = {}
        for (name, layer), share in zip(self.targets.items(), density):
            release(layer)
            flat = layer.weight.detach().flatten(1)
            fan_in = max(1, int(share * flat.shape[1] + 1e-6))
            self.budgets[name] = fan_in * len(flat)
            mask = fill(flat.abs(), fan_in).reshape(layer.weight.shape)
            parametrize.register_parametrization(layer, "weight", Exploring(mask=mask))

    def _forms(self):
        return {name: layer.parametrizations.weight[0] for name, layer in self.targets.items()}

    def begin_epoch(self, epoch, epochs):
        time = epoch / (self.until * epochs) if self.until else 1.0
        self.alpha = self.drop / 2 * (1 + math.cos(math.pi * time)) if time < 1 else 0.0
        self._watch()

    def _watch(self):
        """Gradients are kept only for a step that ends in an exchange."""
        due = self.alpha > 0 and (self.step + 1) % self.interval == 0
        for form in self._forms().values():
            form.watch, form.dense = due, None

    @torch.no_grad()
    def after_step(self):
        self.step += 1
        for name, form in self._forms().items():
            if form.dense is None:
                continue
            weight = self.targets[name].parametrizations.weight.original
            old = form.mask.flatten(1)
            new = exchange(weight.flatten(1), form.dense.flatten(1), old, alpha=self.alpha, gamma=self.gamma,
                           budget=self.budgets[name])
            weight.mul_((old & new).reshape(weight.shape))               # what is new, or gone, is 0
            form.mask = new.reshape(weight.shape)
        self._watch()

    def figures(self):
        """Per layer: ``fan_in``, ``outputs`` left, as a share, and ``density``; ``density`` in all."""
        result, kept, total = {}, 0, 0
        for name, form in self._forms().items():
            counts = form.mask.flatten(1).sum(1)
            result |= {f"{name}/fan_in": int(counts.max()), f"{name}/outputs": float((counts > 0).double().mean()),
                       f"{name}/density": int(counts.sum()) / form.mask.numel()}
            kept, total = kept + int(counts.sum()), total + form.mask.numel()
        return result | {"density": kept / total}

    def finish(self):
        for name, form in self._forms().items():
            fix_mask(self.targets[name], form.mask)

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]
