"""Pruning of coefficients and removal of what they leave dead (PENNI, steps C and D).

At the start of the stage every coefficient of a layer with `BasisKernels`, and every weight of a 1x1 convolution, whose
magnitude is below ``std_factor`` times the standard deviation of its layer's, becomes zero and stays zero: its gradient
is masked. An output without coefficients left is silenced: the shift of the normalisation after it would otherwise make
it a constant, which the next layer's padding turns into an image of its border. The network is fine-tuned so; in the
end the dead channels and basis kernels are removed, which changes its function no more (`compress.training.channels`).

Source: Li et al., "PENNI: Pruned Kernel Sharing for Efficient CNN Inference", ICML 2020, steps C and D. Their code
masks no 1x1 weights, counts negative coefficients as zeros, and drops constants without compensation.
"""
import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from compress.training import fields
from compress.training.channels import Channels
from compress.training.parametrizations import originals
from compress.training.technique import Technique, select, weighted_layers
from compress.training.techniques.basis import BasisKernels, parametrization_of
from spec.errors import InputError


class Shrink(Technique):
    """Prunes at the start, holds the zeros while the network is fine-tuned, and removes what is dead in the end.

    Args:
        layers: names or patterns (default: all layers with `BasisKernels` and all plain 1x1 convolutions).
        prune: ``std``, or ``none`` to remove only what is dead already. std_factor: of the threshold (1).
    Figures: density (share of the coefficients and 1x1 weights that are not zero), per layer and together.
    Attributes: facts: after `finish`, {layer: {"inputs": (before, after), "outputs": …, "basis": …}}.
    """

    foreseeable = False

    def __init__(self, *, layers=None, prune="std", std_factor=1.0):
        self.layers = layers
        self.prune = fields.choice(prune, "prune", ("std", "none"))
        self.std_factor = fields.number(std_factor, "std_factor", low=0, high=100)

    def start(self, model):
        super().start(model)
        self.facts, self.pruned = {}, {}
        every = weighted_layers(model) if self.layers is None else select(model, self.layers)
        for name, layer in every.items():
            tensor = _prunable(layer)
            if tensor is not None:
                self.pruned[name] = tensor
            elif self.layers is not None:
                raise InputError("must have basis kernels, or be a plain 1x1 convolution", field=f"layers.{name}",
                                 value=str(layer))
        self.masks = {name: self._mask(t.detach()) for name, t in self.pruned.items()}
        self._silent = self._silenced()
        self._apply()

    def _mask(self, tensor):
        if self.prune == "none":
            return tensor != 0
        return tensor.abs() >= self.std_factor * tensor.std()

    def _silenced(self):
        """[(bool [channels], shift, normalisation or None)]: outputs without coefficients, and what shifts them."""
        if self.prune == "none":
            return []
        traced, found = Channels(self.model), []
        for name, mask in self.masks.items():
            reader, dead = traced.readers.get(name), ~mask.flatten(1).any(1)
            if reader is None or not dead.any():
                continue
            if reader.layer.bias is not None:
                found.append((dead, reader.layer.bias, None))
            found += [(dead, norm.bias, norm) for norm, slots in traced.norms.values()
                      if norm.affine and np.array_equal(slots, reader.outputs)]
        return found

    @torch.no_grad()
    def _apply(self):
        for name, tensor in self.pruned.items():
            tensor.mul_(self.masks[name])
        for dead, shift, norm in self._silent:
            shift[dead] = 0
            if norm is not None:
                norm.running_mean[dead] = 0
                norm.running_var[dead] = 1

    def after_backward(self):
        for name, tensor in self.pruned.items():
            if tensor.grad is not None:
                tensor.grad.mul_(self.masks[name])
        for dead, shift, _ in self._silent:
            if shift.grad is not None:
                shift.grad[dead] = 0

    def after_step(self):
        self._apply()

    def figures(self):
        kept = {name: int((t != 0).sum()) for name, t in self.pruned.items()}
        total = sum(t.numel() for t in self.pruned.values())
        return {"density": sum(kept.values()) / max(1, total)} | {
            f"{name}/density": kept[name] / t.numel() for name, t in self.pruned.items()}

    def finish(self):
        self._apply()
        self.facts = Channels(self.model).remove()

    def state_dict(self):
        return {"masks": self.masks}

    def load_state_dict(self, state):
        self.masks = state["masks"]
        self._silent = self._silenced()


def _prunable(layer):
    """The parameter of a layer that is pruned, or None."""
    if parametrization_of(layer, BasisKernels) is not None:
        return originals(layer)[1]
    plain = isinstance(layer, nn.Conv2d) and not parametrize.is_parametrized(layer, "weight")
    return layer.weight if plain and layer.kernel_size == (1, 1) and layer.groups == 1 else None
