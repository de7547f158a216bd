"""Decomposition as part of training: layers become factors of low rank at some epoch, and whole again if asked to.

Source of the schedule: "Accelerating training using tensor decomposition", arXiv 1909.05675 (dense for some epochs,
then decomposed, optionally recomposed). A layer computes with the weight that its factors make, so what is saved is
parameters; time is saved where the factors run as a chain (`compress.training.parametrizations.materialize`).
"""
import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from compress.training import fields, parametrizations, projections
from compress.training.masks import choose, release
from compress.training.parametrizations import originals
from compress.training.technique import Technique, options_of
from compress.training.techniques.basis import BasisKernels
from spec.errors import InputError

#: Kinds of projections whose factors run as chains of plain layers.
CHAINS = ("tensor_train", "tucker", "svd")


def array_of(tensor):
    """A tensor as an array of its own."""
    return tensor.detach().cpu().contiguous().numpy().copy()


def tensor_of(array, like):
    """An array as a tensor of the type and device of ``like``."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(like)


def form_of(kind, projection, weight):
    """The parametrisation that stays within a projection's set, for a layer with ``weight`` (a tensor).

    Factors for tensor_train, tucker, svd and basis, signs and magnitudes for unified, else the projection's mask.
    """
    shape = tuple(weight.shape)
    if kind == "tensor_train":
        ranks, out_modes, in_modes = projection.resolve(shape)
        return parametrizations.TensorTrain(shape=shape, ranks=ranks, out_modes=out_modes, in_modes=in_modes)
    if kind == "tucker":
        return parametrizations.Tucker2(shape=shape, ranks=projection.resolve(shape), sweeps=projection.sweeps)
    if kind == "svd":
        return parametrizations.LowRank(shape=shape, rank=projection.resolve(shape), form=projection.form)
    if kind == "basis":
        return BasisKernels(count=projection.count)
    if kind == "unified":
        return parametrizations.Unified(negative=weight < 0, block=projection.block)
    return parametrizations.Masked(mask=tensor_of(projection.project(array_of(weight)), weight) != 0)


class Choice:
    """The option pair ``projection`` and ``layers`` of a recipe, checked; what each layer gets.

    Args: projection: mapping with kind (`compress.training.projections`), with all options unless ``layers`` gives
    them; layers: names or patterns (default: `technique.default_layers`), or a mapping of them to options that come on
    top of ``projection`` (with another kind: in place of it).
    """

    def __init__(self, projection, layers, kinds=tuple(projections.PROJECTIONS)):
        if not isinstance(projection, dict) or "kind" not in projection:
            raise InputError("must be a mapping with kind", field="projection", value=projection)
        self.projection, self.layers = projection, layers
        if isinstance(layers, dict):
            self.own = {pattern: self._merged(own, f"layers.{pattern}") for pattern, own in layers.items()}
            checked = {f"layers.{pattern}": own for pattern, own in self.own.items()}
        else:
            self.own, checked = {}, {"projection": projection}
        for field, options in checked.items():
            projections.build(options, field=field)
            fields.choice(options["kind"], f"{field}.kind", kinds)

    def _merged(self, own, field):
        if not isinstance(own, dict):
            raise InputError("must be a mapping of options", field=field, value=own)
        same = own.get("kind", self.projection["kind"]) == self.projection["kind"]
        return self.projection | own if same else own

    def of(self, model, technique):
        """{name: (layer, options, projection)}, projections bound to the layers' weights.

        Raises: InputError, with the layer's name, for options that do not fit it, a weight that is not plain or not
        finite, or a layer with groups where factors must run as a chain; if there is no layer.
        """
        result = {}
        for name, layer in choose(model, self.layers, technique).items():
            options = options_of(self.own, name) if self.own else self.projection
            projection, field = projections.build(options), f"layers.{name}"
            if not torch.isfinite(layer.weight).all():
                raise InputError("must have finite weights (NaN or infinity found)", field=field)
            try:
                projection.check(tuple(layer.weight.shape))
            except InputError as error:
                raise error.inside(field) from None
            if options["kind"] in CHAINS:
                parametrizations.check_layer(layer, field)
            result[name] = layer, options, projection.bind(array_of(layer.weight))
        return result


class Staged(nn.Module):
    """A dense weight and the factors of another form, of which one is in use; the other has no gradient.

    Originals: the weight, then those of ``form``. ``factored``: whether the factors are in use.
    """

    def __init__(self, *, form):
        super().__init__()
        self.form, self.factored = form, False

    def right_inverse(self, weight):
        parts = self.form.right_inverse(weight)
        return weight, *(parts if isinstance(parts, tuple) else (parts,))

    def forward(self, weight, *parts):
        return self.form(*parts) if self.factored else weight

    @torch.no_grad()
    def decompose(self, layer):
        """The factors take over."""
        weight, *parts = originals(layer)
        for part, new in zip(parts, self.right_inverse(weight)[1:]):
            part.copy_(new)
        self.factored = True

    @torch.no_grad()
    def merge(self, layer):
        """The dense weight takes over."""
        weight, *parts = originals(layer)
        weight.copy_(self.form(*parts))
        self.factored = False


class Factorize(Technique):
    """Trains the factors of layers instead of their weights.

    Args:
        projection: ``{kind: tensor_train | tucker | svd | basis, …}``, with ranks or, except for basis, a ``factor`` of
            fewer parameters (`compress.factorize`). layers: see `Choice`.
        at: epoch of the stage, from 0, at whose begin the layers are decomposed.
        merge_at: epoch, above ``at`` and at most the stage's epochs, at whose begin they become dense again (without it
            they stay factors, also after the stage). Factors are decomposed from the weights of that moment; the
            optimiser's memory of them is empty then.
    Figures: ``<layer>/decomposition``, the error ``||W - factors|| / ||W||`` when it was decomposed.
    """

    def __init__(self, *, projection, layers=None, at=0, merge_at=None):
        self.choice = Choice(projection, layers, (*CHAINS, "basis"))
        self.at = fields.whole(at, "at")
        self.merge_at = None if merge_at is None else fields.whole(merge_at, "merge_at", low=self.at + 1)

    @property
    def _staged(self):
        return self.at > 0 or self.merge_at is not None

    def start(self, model):
        super().start(model)
        self.layers, self.errors = {}, {}
        for name, (layer, options, projection) in self.choice.of(model, "factorize").items():
            form, dense = form_of(options["kind"], projection, layer.weight), layer.weight.detach().clone()
            release(layer)
            parametrize.register_parametrization(layer, "weight", Staged(form=form) if self._staged else form)
            self.layers[name] = layer
            if self.at == 0:
                self._form(layer).factored = True
                self._note(name, dense)

    @staticmethod
    def _form(layer):
        return layer.parametrizations.weight[0]

    @torch.no_grad()
    def _note(self, name, dense):
        """The error of a layer that has just been decomposed."""
        norm = float(dense.norm())
        self.errors[name] = float((dense - self.layers[name].weight).norm()) / norm if norm else 0.0

    def check(self, epochs):
        for field, value, most in (("at", self.at, max(0, epochs - 1)), ("merge_at", self.merge_at or 0, epochs)):
            if value > most:
                raise InputError(f"must be at most {most} in a stage of {epochs} epochs", field=field, value=value)

    def begin_epoch(self, epoch, epochs):
        for name, layer in self.layers.items():
            if epoch == self.at > 0:
                dense = layer.weight.detach().clone()
                self._form(layer).decompose(layer)
                self._note(name, dense)
            elif epoch == self.merge_at:
                self._form(layer).merge(layer)

    def figures(self):
        return {f"{name}/decomposition": error for name, error in self.errors.items()}

    def finish(self):
        """Factors stay factors, with the same numbers; layers that were merged are plain."""
        if not self._staged:
            return
        for layer in self.layers.values():
            staged = self._form(layer)
            parts = [p.detach().clone() for p in originals(layer)[1:]] if staged.factored else None
            release(layer)
            if self.merge_at is not None:
                continue
            parametrize.register_parametrization(layer, "weight", staged.form)
            for part, value in zip(originals(layer), parts or ()):
                part.data.copy_(value)

    def state_dict(self):
        factored = {n: self._form(m).factored for n, m in self.layers.items()} if self._staged else {}
        return {"factored": factored, "errors": dict(self.errors)}

    def load_state_dict(self, state):
        self.errors = dict(state["errors"])
        for name, factored in state["factored"].items():
            self._form(self.layers[name]).factored = bool(factored)
