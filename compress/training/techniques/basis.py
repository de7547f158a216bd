"""Kernels as coefficients times a basis that the layer shares, retrained in turns (PENNI).

``weight[o,i,r,s] = sum_m coefficients[o,i,m] basis[m,r,s]``, m < M <= min(R S, O I), starts at the uncentred SVD of the
layer's kernels (`golden.basis.decompose`; dropping the mean kernel, as the published code does, ruins the network).
Training minimises ``loss + strength * sum over layers of penalty(coefficients)``: first over the coefficients with the
basis fixed, then over the basis, in turns of ``alternate`` epochs. The fixed side has no gradient at all, so neither
momentum nor weight decay moves it. What L1 and weight decay push from the coefficients into the basis comes back when
a turn of the coefficients begins: the basis kernels are scaled to norm 1 and the coefficients the other way, which
leaves every weight as it is.

Penalties: ``l1``: ``sum |c|``; ``hoyer_square``: ``(sum |c|)**2 / sum c**2`` (from 1 to the number of coefficients,
blind to their scale).

Sources: Li et al., "PENNI: Pruned Kernel Sharing for Efficient CNN Inference", ICML 2020, steps A and B; Yang, Wen and
Li, "DeepHoyer: Learning Sparser Neural Network with Differentiable Scale-Invariant Sparsity Measures", ICLR 2020.
"""
import math

import torch
from torch import nn
from torch.nn.utils import parametrize

from compress.basis import COUNT
from compress.training import fields
from compress.training.masks import check_plain, release
from compress.training.parametrizations import originals
from compress.training.technique import Technique, options_of, select
from compress.training.techniques.hoyer import hoyer_square
from golden import basis as golden
from spec.errors import InputError

REGULARIZERS = ("l1", "hoyer_square", "none")


def kernels_of(weight):
    """A weight [O, I, R, S] as float64 array [O, R, S, I], the form of `golden.basis`."""
    return weight.detach().double().permute(0, 2, 3, 1).numpy()


def combine(coefficients, basis):
    """``sum_m coefficients[o,i,m] basis[m,r,s]``: [O, I, R, S], in full precision under autocast too."""
    outputs, inputs, count = coefficients.shape
    with torch.autocast(coefficients.device.type, enabled=False):
        return (coefficients.reshape(-1, count) @ basis.reshape(count, -1)).reshape(outputs, inputs, *basis.shape[1:])


def hoyer_measure(x):
    """``(sqrt(n) - sum |x| / sqrt(sum x**2)) / (sqrt(n) - 1)``: 0 for equal magnitudes, 1 for one non-zero (n > 1)."""
    root = math.sqrt(x.numel())
    return float((root - hoyer_square(x.detach()).sqrt()) / (root - 1))


class BasisKernels(nn.Module):
    """Parametrisation of a convolution's weight by ``count`` basis kernels; originals: basis [M, R, S], coefficients
    [O, I, M]. A weight that is assigned is decomposed."""

    def __init__(self, *, count):
        super().__init__()
        self.count = count

    def forward(self, basis, coefficients):
        return combine(coefficients, basis)

    def right_inverse(self, weight):
        """Raises: InputError unless 1 <= count <= min(R S, O I)."""
        d = golden.decompose(kernels_of(weight), count=self.count)
        return tuple(torch.from_numpy(a).to(weight.dtype) for a in (d.basis, d.coefficients))


def parametrization_of(layer, kind):
    """The parametrisation of class ``kind`` of a layer's weight, or None."""
    chain = layer.parametrizations.weight if parametrize.is_parametrized(layer, "weight") else ()
    return next((p for p in chain if isinstance(p, kind)), None)


def decomposable(model, layers):
    """{name: convolution} of a recipe's ``layers`` (see `select`).

    Raises: InputError for one that has no kernels to decompose, or NaN or infinity among its weights.
    """
    chosen = select(model, layers)
    for name, layer in chosen.items():
        if not isinstance(layer, nn.Conv2d) or layer.groups > 1 or layer.kernel_size == (1, 1):
            raise InputError("must be a convolution with kernels above 1x1 and one group", field=f"layers.{name}",
                             value=str(layer))
        if not torch.isfinite(layer.weight).all():
            raise InputError("must have finite weights (NaN or infinity found)", field=f"layers.{name}")
    return chosen


def layer_options(layers, known):
    """``layers`` of a recipe, checked: None, a list, or a mapping of patterns to mappings with keys of ``known``."""
    for pattern, options in (layers.items() if isinstance(layers, dict) else ()):
        if not isinstance(options, dict) or not options.keys() <= set(known):
            raise InputError(f"must be a mapping with {', '.join(known)}", field=f"layers.{pattern}", value=options)
    return layers


def count_and_energy(options, field=""):
    """(count, energy) of options, one of them None; without both the default count.

    Raises: InputError for both, or one out of range.
    """
    count, energy = options.get("count"), options.get("energy")
    if count is not None and energy is not None:
        raise InputError("must not be given beside energy", field=f"{field}count", value=count)
    if energy is not None:
        return None, fields.number(energy, f"{field}energy", above=0, high=1)
    return fields.whole(COUNT if count is None else count, f"{field}count", low=1), None


class Basis(Technique):
    """Decomposes layers at the start and trains coefficients and bases in turns; they stay decomposed.

    Args:
        layers: names or patterns of convolutions (default: `technique.default_layers`), or a mapping of them to
            ``{count: M}`` or ``{energy: E}``.
        count: basis kernels M (6); energy: instead, the least share of the squared norm of the weights to keep.
        alternate: epochs of a turn (2), coefficients first; 0 trains both together.
        regularizer: ``l1``, ``hoyer_square`` or ``none``; strength: its factor (1e-4).
    Figures: density (share of coefficients above their standard deviation, which `Shrink` would keep) and hoyer
    (`hoyer_measure`), per layer and together.
    """

    def __init__(self, *, layers=None, count=None, energy=None, alternate=2, regularizer="l1", strength=1e-4):
        self.layers = layer_options(layers, ("count", "energy"))
        self.size = count_and_energy({"count": count, "energy": energy})
        for pattern, options in (layers.items() if isinstance(layers, dict) else ()):
            count_and_energy(options, f"layers.{pattern}.")
        self.alternate = fields.whole(alternate, "alternate", high=10_000)
        self.regularizer = fields.choice(regularizer, "regularizer", REGULARIZERS)
        self.strength = fields.number(strength, "strength", low=0)

    def start(self, model):
        super().start(model)
        self.chosen = decomposable(model, self.layers)
        for name, layer in self.chosen.items():
            if parametrization_of(layer, BasisKernels) is not None:
                continue                                    # an earlier stage's; it goes on from there
            check_plain({name: layer}, "a basis")
            release(layer)
            own = options_of(self.layers, name) if isinstance(self.layers, dict) else None
            count, energy = count_and_energy(own) if own else self.size
            try:
                if count is None:
                    count = golden.decompose(kernels_of(layer.weight), energy=energy).meta["count"]
                parametrize.register_parametrization(layer, "weight", BasisKernels(count=count))
            except InputError as error:
                raise error.inside(f"layers.{name}") from None

    def begin_epoch(self, epoch, epochs):
        if not self.alternate:
            return
        turn = epoch // self.alternate % 2
        for layer in self.chosen.values():
            basis, coefficients = originals(layer)
            if not turn and not epoch % self.alternate:
                normalize(basis, coefficients)
            for number, side in enumerate((coefficients, basis)):
                side.requires_grad_(number == turn)
                side.grad = None

    def penalty(self):
        if self.regularizer == "none" or not self.strength:
            return 0.0
        function = hoyer_square if self.regularizer == "hoyer_square" else lambda c: c.abs().sum()
        return self.strength * sum(function(originals(layer)[1]) for layer in self.chosen.values())

    @torch.no_grad()
    def figures(self):
        found, kept, total = {}, 0, 0
        for name, layer in self.chosen.items():
            coefficients = originals(layer)[1]
            large = int((coefficients.abs() > coefficients.std()).sum())
            found[f"{name}/density"] = large / coefficients.numel()
            found[f"{name}/hoyer"] = hoyer_measure(coefficients)
            kept, total = kept + large, total + coefficients.numel()
        return {"density": kept / max(1, total)} | found

    def finish(self):
        for layer in self.chosen.values():
            for side in originals(layer):
                side.requires_grad_(True)


@torch.no_grad()
def normalize(basis, coefficients):
    """Scale each basis kernel to norm 1 and its coefficients the other way, in place; a zero kernel stays."""
    norm = basis.flatten(1).norm(dim=1)
    norm = torch.where(norm > 0, norm, torch.ones_like(norm))
    basis.div_(norm[:, None, None])
    coefficients.mul_(norm)
