"""What a training stage does beyond minimising the loss: one interface for ADMM, straight-through estimators,
regularisers, pruning and factorisation.

The trainer calls the hooks of every technique of a stage in the order of the recipe::

    start(model), check(epochs)                    once, before the optimiser is made; also when a run resumes
    for each epoch:
        begin_epoch(epoch, epochs)
        for each batch:  loss + sum of penalty();  backward;  after_backward();  optimiser step;  after_step()
        figures()                                  logged
    finish()                                       the model takes its final form

`start` and `finish` may exchange parametrisations, masks or whole layers of the model in place (``setattr`` on the
parent module); the optimiser is made from ``model.parameters()`` after `start`. When a run resumes, `start` and
`finish` of the stages before are called again on the weights of that time, so both must depend on nothing but the
model's state, the technique's options and `load_state_dict`. Before a run begins, the same calls on the first weights,
with fresh techniques, find options that do not fit (`Technique.foreseeable`).
"""
from fnmatch import fnmatchcase

from torch import nn

from spec.errors import InputError

#: Layers with weights that techniques compress.
WEIGHTED = (nn.Conv2d, nn.Linear)


class Technique:
    """Base of all techniques; every hook does nothing. Options are keyword-only arguments of ``__init__`` with plain
    YAML values; bad ones raise InputError naming the field."""

    #: Whether the forms and shapes that `finish` leaves follow from the options alone, not from trained weights.
    foreseeable = True

    def start(self, model):
        """Attach to ``model``. Raises: InputError for layers or options that do not fit it."""
        self.model = model

    def check(self, epochs):
        """Raises: InputError if the options do not fit a stage of ``epochs``; called after `start`."""

    def begin_epoch(self, epoch, epochs):
        """Before epoch ``epoch`` of ``epochs`` (from 0)."""

    def penalty(self):
        """Added to the loss of a batch: a scalar tensor, or 0."""
        return 0.0

    def after_backward(self):
        """Between backward and optimiser step: masks gradients."""

    def after_step(self):
        """After each optimiser step: projects weights."""

    def figures(self):
        """Plain numbers for the log of an epoch: {"figure": number} or {"layer/figure": number}."""
        return {}

    def finish(self):
        """Give the model the form that the technique aims at (hard projection, factors, masks)."""

    def state_dict(self):
        """What a resumed run needs besides the model: tensors and plain values in dicts and lists."""
        return {}

    def load_state_dict(self, state):
        """Take back `state_dict`; called after `start`."""


def weighted_layers(model):
    """{name: layer} of all convolutions and linear layers, in order of definition."""
    return {name: m for name, m in model.named_modules() if isinstance(m, WEIGHTED)}


def default_layers(model):
    """Names of the layers that are compressed unless a recipe says otherwise: convolutions with a kernel above 1x1 and
    at least 8 input channels per group, not depthwise; not the first layer, nor the classifier."""
    return [name for n, (name, m) in enumerate(weighted_layers(model).items())
            if n and isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) and m.in_channels // m.groups >= 8]


def select(model, patterns=None, *, field="layers"):
    """{name: layer} of the layers that match any of the glob ``patterns`` (None: `default_layers`), in order.

    ``patterns``: a list, or a mapping whose keys are patterns (its values are options of those layers).
    Raises: InputError for a pattern that matches no layer with weights.
    """
    layers = weighted_layers(model)
    if patterns is None:
        return {name: layers[name] for name in default_layers(model)}
    if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
        raise InputError("must be a list of layer names or patterns", field=field, value=patterns)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise InputError(f"matches no layer with weights; layers: {', '.join(layers)}", field=field, value=pattern)
    return {name: m for name, m in layers.items() if any(fnmatchcase(name, p) for p in patterns)}


def options_of(mapping, name):
    """The value of the first pattern in ``mapping`` that matches the layer ``name``; None if none does."""
    return next((value for pattern, value in mapping.items() if fnmatchcase(name, pattern)), None)


def replace_layer(model, name, layer):
    """Exchange the module called ``name`` (dotted) of ``model``."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)
