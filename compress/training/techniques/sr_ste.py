"""SR-STE: N:M sparse networks trained from scratch, or fine-tuned, with a mask that follows the weights.

Forward: ``w * mask(w)``, the mask recomputed in every step. Backward, through the mask as if it were not there
(straight through), with a term that shrinks what the mask drops::

    dL/dw = dL/d(w * mask) + decay * (1 - mask) * w

Source: A. Zhou, Y. Ma, J. Zhu, J. Liu, Z. Zhang, K. Yuan, W. Sun, H. Li, "Learning N:M Fine-grained Structured Sparse
Neural Networks From Scratch", ICLR 2021 (decay = 2e-4). Series of patterns and the freezing of the mask
are ours.
"""
import torch
from torch import nn
from torch.nn.utils import parametrize

from compress.training import fields
from compress.training.masks import choose, fix_mask, nm_mask, parse_series, release
from compress.training.technique import Technique, options_of
from spec.errors import InputError


class _Masked(torch.autograd.Function):
    """``w * mask`` with the gradient of the module's docstring."""

    @staticmethod
    def forward(ctx, weight, mask, decay):
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx, gradient):
        weight, mask = ctx.saved_tensors
        return torch.addcmul(gradient, weight, ~mask, value=ctx.decay), None, None


class SparseRefined(nn.Module):
    """Parametrisation: the N:M view of a latent weight [O, I, …] of the same shape.

    Args: patterns: pairs (N, M), their union is kept; decay: of the dropped weights; mask: bool, the first mask.
    ``frozen``: the mask stays as it is and the gradient is that of ``w * mask``.
    """

    def __init__(self, *, patterns, decay, mask):
        super().__init__()
        self.patterns, self.decay, self.frozen = patterns, decay, False
        self.register_buffer("mask", mask)

    def refresh(self, weight):
        """Recompute the mask from the latent weight."""
        self.mask.copy_(nm_mask(weight, self.patterns))

    def forward(self, weight):
        if self.frozen:
            return weight * self.mask
        self.mask = nm_mask(weight, self.patterns)           # a new tensor: backward still needs the one before
        return _Masked.apply(weight, self.mask, self.decay)

    def right_inverse(self, weight):
        return weight


class SRSTE(Technique):
    """N:M training of the module's docstring.

    Options:
        pattern: ``"2:4"``, or a series ``"4:8+1:8"`` whose greedy terms are kept together.
        decay: of dropped weights, per unit of gradient; at least 0.
        layers: list of layer patterns (default: `technique.default_layers`), or a mapping layer pattern -> N:M pattern
            (``"dense"``: not this layer).
        freeze_at: share of the stage's epochs after which the mask is fixed, 0..1 (1: never).

    A layer with fewer input channels per group than the largest M stays dense: it appears in ``dense`` and with density
    1 in `figures`. `finish` fixes the masks (`parametrizations.Masked`).
    """

    def __init__(self, *, pattern="2:4", decay=2e-4, layers=None, freeze_at=1.0):
        self.patterns = parse_series(pattern, "pattern")
        self.decay = fields.number(decay, "decay", low=0, high=1e6)
        self.layers = layers
        self.freeze_at = fields.number(freeze_at, "freeze_at", low=0, high=1)
        own = layers if isinstance(layers, dict) else {}
        self.own = {p: () if text == "dense" else parse_series(text, f"layers.{p}") for p, text in own.items()}
        self.frozen = False

    def start(self, model):
        super().start(model)
        layers = choose(model, self.layers, "sr_ste")
        self.sparse, self.dense = {}, []
        chosen = {name: options_of(self.own, name) if self.own else self.patterns for name in layers}
        fit = {name for name, p in chosen.items() if p and max(m for _, m in p) <= layers[name].weight.shape[1]}
        for name, layer in layers.items():
            if name not in fit:
                self.dense.append(name)
                continue
            release(layer)
            form = SparseRefined(patterns=chosen[name], decay=self.decay, mask=nm_mask(layer.weight, chosen[name]))
            parametrize.register_parametrization(layer, "weight", form)
            self.sparse[name] = layer
        if not self.sparse:
            raise InputError("must fit a layer: all have fewer input channels than M, or are dense", field="pattern",
                             value="+".join(map(str, self.patterns)))

    def _forms(self):
        """(name, parametrisation, latent weight) of each sparse layer."""
        for name, layer in self.sparse.items():
            parts = layer.parametrizations.weight
            yield name, parts[0], parts.original

    def _refresh(self):
        if not self.frozen:
            for _, form, weight in self._forms():
                form.refresh(weight)

    def begin_epoch(self, epoch, epochs):
        self._refresh()
        if epoch >= self.freeze_at * epochs:
            self._freeze()
        self._before = {name: form.mask.clone() for name, form, _ in self._forms()}

    def _freeze(self):
        self.frozen = True
        for _, form, _ in self._forms():
            form.frozen = True

    def figures(self):
        """Per layer and over all sparse layers: ``density`` and ``mask_changed``, the share of the mask's bits that
        are not what they were when the epoch began."""
        self._refresh()
        result = {f"{name}/density": 1.0 for name in self.dense}
        kept = changed = total = 0
        for name, form, _ in self._forms():
            ones, flips, size = int(form.mask.sum()), int((form.mask ^ self._before[name]).sum()), form.mask.numel()
            result |= {f"{name}/density": ones / size, f"{name}/mask_changed": flips / size}
            kept, changed, total = kept + ones, changed + flips, total + size
        return result | ({"density": kept / total, "mask_changed": changed / total} if total else {})

    def finish(self):
        self._refresh()
        masks = {name: form.mask.clone() for name, form, _ in self._forms()}
        for name, layer in self.sparse.items():
            fix_mask(layer, masks[name])

    def state_dict(self):
        return {"frozen": self.frozen}

    def load_state_dict(self, state):
        if state["frozen"]:
            self._freeze()
