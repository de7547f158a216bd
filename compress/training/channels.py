"""Channels of a network that nothing needs, and removing them without changing its function.

The network is traced (`torch.fx`). Each channel of each tensor is a slot; slots that must stay or go together share a
label: what normalisation, activation, pooling and flattening pass on, and both sides of an addition. So a label of a
residual stream stays if any branch or consumer needs it. A label goes if every layer that reads it

* has no weight other than zero for it, in the outputs that themselves stay, or
* reads zero from it for any input: a channel without weights whose normalisation, shift and activation end at 0.

A layer none of whose outputs in a label is read needs nothing either, so this is repeated until nothing changes.
Stay always: the network's input and output, and what passes through an operation that is not known here, among them
shortcuts that fill up with zero channels (`networks.resnet.PadShortcut`), which keep the channel counts of their
streams. Basis kernels (`techniques.basis.BasisKernels`) without a coefficient that stays go as well.

Source: Li et al., "PENNI", ICML 2020, step D, whose published code drops channels with a constant other than zero.
"""
import operator

import numpy as np
import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional
from torch.nn.utils import parametrize

from compress.training.masks import fix_mask, release
from compress.training.parametrizations import Masked, originals
from compress.training.techniques.basis import BasisKernels
from spec.errors import InputError

_SAME = (nn.ReLU, nn.ReLU6, nn.Identity, nn.Dropout, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_SAME_CALLS = (functional.relu, torch.relu, functional.relu6, functional.dropout, functional.max_pool2d,
               functional.adaptive_avg_pool2d)
_SAME_METHODS = ("relu", "contiguous", "clone", "detach")
_ADDITIONS = (operator.add, operator.iadd, torch.add)


class _Tracer(fx.Tracer):
    """Layers with weights, also parametrised ones, are single nodes; so are modules whose source is not a plain chain
    of known calls."""

    def is_leaf_module(self, m, qualified_name):
        return isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)) or not any(True for _ in m.children()) or \
            super().is_leaf_module(m, qualified_name)


class _Labels:
    """Union-find over slots; a label may be pinned, then it stays."""

    def __init__(self):
        self.parent, self.fixed = [], set()

    def new(self, count, *, pinned=False):
        first = len(self.parent)
        self.parent += range(first, first + count)
        slots = np.arange(first, first + count)
        if pinned:
            self.pin(slots)
        return slots

    def find(self, slot):
        while self.parent[slot] != slot:
            self.parent[slot] = self.parent[self.parent[slot]]
            slot = self.parent[slot]
        return slot

    def join(self, one, two):
        for a, b in zip(one, two):
            self.parent[self.find(b)] = self.find(a)

    def pin(self, slots):
        self.fixed.update(int(s) for s in slots)

    def of(self, slots):
        """Labels of slots."""
        return np.array([self.find(int(s)) for s in slots], np.int64)


class _Reader:
    """A layer with weights: labels of inputs and outputs, the constants that it reads, and where it has weights."""

    def __init__(self, layer, inputs, constants, outputs):
        self.layer, self.inputs, self.constants, self.outputs = layer, inputs, constants, outputs
        weight = layer.weight.detach()
        self.used = (weight.flatten(2) != 0).any(2).numpy() if weight.ndim == 4 else (weight != 0).numpy()


def _formed(layer):
    """Whether a layer's weight has a form whose channels cannot be taken away."""
    return parametrize.is_parametrized(layer, "weight") and \
        not isinstance(layer.parametrizations.weight[0], (BasisKernels, Masked))


class Channels:
    """The slots of a model.

    Args: model: traceable by torch.fx. shape: of its input without batch (default: ``model.input_shape``).
    Raises: InputError for a model that cannot be traced.
    """

    def __init__(self, model, shape=None):
        shape = model.input_shape if shape is None else shape
        self.model, self.labels, self.readers, self.norms = model, _Labels(), {}, {}
        self.slots, self.values = {}, {}                     # fx node -> slots, constants (NaN: not constant)
        training = model.training
        model.eval()
        try:
            module = fx.GraphModule(model, _Tracer().trace(model))
        except (fx.proxy.TraceError, TypeError, NameError) as error:
            raise InputError(f"cannot be traced ({str(error).splitlines()[0][:100]})", field="model") from None
        with torch.no_grad():
            ShapeProp(module).propagate(torch.zeros(1, *shape))
            for node in module.graph.nodes:
                self._visit(node)
        model.train(training)

    # -- tracing -------------------------------------------------------------------------------------------------
    def _visit(self, node):
        if node.op == "output":
            for source in node.all_input_nodes:
                self.labels.pin(self.slots[source])
            return None
        if node.op in ("placeholder", "get_attr"):
            return self._unknown(node)
        sources, shape = node.all_input_nodes, _shape(node)
        layer = self.model.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(layer, nn.Conv2d) and len(shape) == 4 or isinstance(layer, nn.Linear) and len(shape) == 2:
            return self._layer(node, layer)
        if isinstance(layer, nn.BatchNorm2d):
            return self._norm(node, layer)
        if (node.op == "call_function" and node.target in _ADDITIONS and len(sources) == 2
                and _shape(sources[0]) == _shape(sources[1])):
            one, two = (self.slots[s] for s in sources)
            self.labels.join(one, two)
            return self._set(node, one, self.values[sources[0]] + self.values[sources[1]])
        if len(sources) != 1 or not shape:
            return self._unknown(node)
        return self._single(node, layer, sources[0], shape)

    def _single(self, node, layer, source, shape):
        """An operation on one tensor."""
        slots, values, before = self.slots[source], self.values[source], _shape(source)
        called = node.target if node.op == "call_function" else None
        method = node.target if node.op == "call_method" else None
        relu = isinstance(layer, (nn.ReLU, nn.ReLU6)) or called in _SAME_CALLS[:3] or method == "relu"
        if relu:
            six = isinstance(layer, nn.ReLU6) or called is functional.relu6
            return self._set(node, slots, np.clip(values, 0, 6 if six else np.inf))
        if isinstance(layer, _SAME) or called in _SAME_CALLS or method in _SAME_METHODS:
            return self._set(node, slots, values)
        if isinstance(layer, nn.AvgPool2d) or called is functional.avg_pool2d:
            return self._set(node, slots, np.where(values == 0, 0.0, np.nan))          # padding counts as zeros
        flat = isinstance(layer, nn.Flatten) or called is torch.flatten or method == "flatten"
        if flat and len(shape) == 2:
            each = shape[1] // len(slots)
            return self._set(node, np.repeat(slots, each), np.repeat(values, each))
        mean = (called is torch.mean or method == "mean") and len(before) == 4 and shape[:2] == before[:2]
        if mean and np.prod(shape[2:], dtype=int) == 1:
            return self._set(node, slots, values)
        return self._unknown(node)

    def _set(self, node, slots, values):
        self.slots[node], self.values[node] = slots, values

    def _unknown(self, node):
        """What goes in and comes out stays."""
        for source in node.all_input_nodes:
            self.labels.pin(self.slots[source])
        shape = _shape(node)
        count = shape[1] if len(shape) > 1 else 0
        self._set(node, self.labels.new(count, pinned=True), np.full(count, np.nan))

    def _layer(self, node, layer):
        source = node.all_input_nodes[0]
        name, slots, values = node.target, self.slots[source], self.values[source]
        if getattr(layer, "groups", 1) > 1 or _formed(layer) or self._again(layer):
            return self._unknown(node)
        reader = _Reader(layer, slots, values, self.labels.new(len(layer.weight)))
        self.readers[name] = reader
        bias = np.zeros(len(reader.outputs)) if layer.bias is None else layer.bias.detach().double().numpy()
        return self._set(node, reader.outputs, np.where((reader.used & (values != 0)).any(1), np.nan, bias))

    def _again(self, layer):
        """Whether a layer was met before; then its channels stay."""
        for known, *slots in [(r.layer, r.inputs, r.outputs) for r in self.readers.values()] + [*self.norms.values()]:
            if known is layer:
                self.labels.pin(np.concatenate(slots))
                return True
        return False

    def _norm(self, node, layer):
        source = node.all_input_nodes[0]
        if layer.running_mean is None or self._again(layer):
            return self._unknown(node)
        mean, variance = (t.detach().double().numpy() for t in (layer.running_mean, layer.running_var))
        values = (self.values[source] - mean) / np.sqrt(variance + layer.eps)
        if layer.affine:
            gain, shift = (t.detach().double().numpy() for t in (layer.weight, layer.bias))
            values = np.where(gain == 0, 0.0, values) * gain + shift
        self.norms[node.target] = layer, self.slots[source]
        return self._set(node, self.slots[source], values)

    # -- what stays ----------------------------------------------------------------------------------------------
    def kept(self):
        """{label: whether it stays}; at least one label of each layer's outputs and inputs stays."""
        of = {name: (self.labels.of(r.inputs), self.labels.of(r.outputs)) for name, r in self.readers.items()}
        stays = dict.fromkeys((int(v) for v in self.labels.of(range(len(self.labels.parent)))), True)
        fixed = {self.labels.find(s) for s in self.labels.fixed}
        while True:
            needed = set(fixed)
            for name, r in self.readers.items():
                inputs, outputs = of[name]
                rows = np.array([stays[v] for v in outputs])
                read = r.used[rows].any(0) & (r.constants != 0)                        # NaN != 0
                needed |= {int(v) for v in inputs[read]}
            for inputs, outputs in of.values():
                for labels in (inputs, outputs):
                    if not needed & set(labels.tolist()):
                        needed.add(next(int(v) for v in labels if stays[v]))
            now = {label: label in needed for label in stays}
            if now == stays:
                return stays
            stays = now

    @torch.no_grad()
    def remove(self):
        """Take away every channel and basis kernel that nothing needs, in place.

        Returns: {layer: {"inputs": (before, after), "outputs": …, "basis": …}} of all layers that changed.
        """
        stays, facts = self.kept(), {}

        def keep(slots):
            return torch.tensor([stays[int(v)] for v in self.labels.of(slots)])

        for name, r in self.readers.items():
            changed = _slice(r.layer, keep(r.outputs), keep(r.inputs))
            if changed:
                facts[name] = changed
        for layer, slots in self.norms.values():
            rows = keep(slots)
            if rows.all():
                continue
            for part in ("weight", "bias"):
                if getattr(layer, part) is not None:
                    setattr(layer, part, _parameter(getattr(layer, part)[rows]))
            layer.running_mean, layer.running_var = layer.running_mean[rows], layer.running_var[rows]
            layer.num_features = int(rows.sum())
        return facts


def _shape(node):
    held = node.meta.get("tensor_meta")
    return tuple(held.shape) if hasattr(held, "shape") else ()


def _parameter(tensor):
    return nn.Parameter(tensor.detach().clone())


def _slice(layer, rows, columns):
    """Keep outputs ``rows`` and inputs ``columns`` (bool) of a layer, and the basis kernels that they need."""
    linear = isinstance(layer, nn.Linear)
    changes = {"outputs": (len(rows), int(rows.sum())), "inputs": (len(columns), int(columns.sum()))}
    form = layer.parametrizations.weight[0] if parametrize.is_parametrized(layer, "weight") else None
    if isinstance(form, Masked):
        mask = form.mask[rows][:, columns]
        release(layer)
        layer.weight = _parameter(layer.weight[rows][:, columns])
        fix_mask(layer, mask)
    elif form is not None:
        basis, coefficients = originals(layer)
        coefficients = coefficients[rows][:, columns]
        used = (coefficients != 0).flatten(0, 1).any(0)
        used[0] |= not used.any()
        changes["basis"] = (len(used), int(used.sum()))
        form.count, held = int(used.sum()), layer.parametrizations.weight
        held.original0, held.original1 = _parameter(basis[used]), _parameter(coefficients[:, :, used])
    else:
        layer.weight = _parameter(layer.weight[rows][:, columns])
    if layer.bias is not None:
        layer.bias = _parameter(layer.bias[rows])
    names = ("out_features", "in_features") if linear else ("out_channels", "in_channels")
    for name, kept in zip(names, (rows, columns)):
        setattr(layer, name, int(kept.sum()))
    return {what: pair for what, pair in changes.items() if pair[0] != pair[1]}
