"""Collaborative Compression: channels and rank of all layers are chosen together, by what the loss says.

The stage of this technique only measures: the mean gradient of each weight over its batches (normalisation as in
training), while after every step weights and statistics are put back. `finish` chooses (`compress.training.allocation`,
where the formulas and the source are) and gives each layer its form: `parametrizations.Masked` where channels alone go,
else `Gathered`, two factors on the kept channels. A later stage trains them (the paper's: 300 epochs).
"""
import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from compress.training import allocation, fields
from compress.training.masks import choose, fix_mask, release
from compress.training.parametrizations import LowRank, check_layer
from compress.training.technique import Technique
from spec.errors import InputError


class Gathered(LowRank):
    """`parametrizations.LowRank` of form channel on some input channels; the weights of the others are zero.

    Originals A [O, r] and B [r, I' R S], I' kept channels. Its chain reads all channels, with zeros in the first
    kernel for those that are gone.

    Args: shape: of the weight [O, I, R, S] or [O, I]; channels: the kept ones, int64; rank.
    """

    def __init__(self, *, shape, channels, rank):
        super().__init__(shape=(shape[0], len(channels), *shape[2:]), rank=rank)
        self.inputs = shape[1]
        self.register_buffer("channels", channels)

    def right_inverse(self, weight):
        """Factors ``A = U sqrt(s)``, ``B = sqrt(s) V^T`` of the kept channels."""
        part = weight.detach().index_select(1, self.channels)
        u, s, vt = torch.linalg.svd(part.flatten(1).double(), full_matrices=False)
        root = s[:self.rank].sqrt()
        return (u[:, :self.rank] * root).to(weight), (root[:, None] * vt[:self.rank]).to(weight)

    def _spread(self, part):
        """[n, I, …] of values of the kept channels [n, I', …]."""
        whole = part.new_zeros(len(part), self.inputs, *part.shape[2:])
        return whole.index_copy(1, self.channels, part)

    def forward(self, a, b):
        return self._spread(super().forward(a, b))

    @torch.no_grad()
    def chain(self, layer):
        """Two plain layers in place of ``layer``."""
        first, last = super().chain(layer)
        first.weight = nn.Parameter(self._spread(first.weight))
        if isinstance(first, nn.Conv2d):
            first.in_channels = self.inputs
        else:
            first.in_features = self.inputs
        return first, last


class Collaborative(Technique):
    """Compression of the module's docstring.

    Options:
        ratio: share of the multiplications of the selected layers that goes, above 0, below 1.
        look_ahead: weight of the expected error after one more unit, at least 0 (the published code: 0.9).
        equal: ``share``, the paper's rule, or ``mac``, see `allocation.allocate`.
        layers: list of layer patterns (default: `technique.default_layers`).

    The stage needs at least one epoch; its optimiser's options have no effect.
    """

    foreseeable = False

    def __init__(self, *, ratio, look_ahead=allocation.LOOK_AHEAD, equal="share", layers=None):
        self.ratio = fields.number(ratio, "ratio", above=0, below=1)
        self.look_ahead = fields.number(look_ahead, "look_ahead", low=0)
        self.equal = fields.choice(equal, "equal", allocation.EQUAL)
        self.layers = layers

    def start(self, model):
        super().start(model)
        self.targets = choose(model, self.layers, "collaborative")
        for name, layer in self.targets.items():
            check_layer(layer, f"layers.{name}")
            release(layer)
        self.sums = {name: torch.zeros_like(layer.weight) for name, layer in self.targets.items()}
        self.batches, self.positions, self.chosen = 0, {}, {}
        self.held = [value.detach().clone() for value in self._state()]
        self.hooks = [layer.register_forward_hook(self._observer(name)) for name, layer in self.targets.items()]

    def check(self, epochs):
        if not epochs:
            raise InputError("needs a stage of at least one epoch", field="collaborative")

    def _observer(self, name):
        def observe(layer, inputs, output):
            """Output positions of one image."""
            per = output.shape[1] if isinstance(layer, nn.Conv2d) else output.shape[-1]
            self.positions[name] = output[0].numel() // per
        return observe

    def after_backward(self):
        self.batches += 1
        for name, layer in self.targets.items():
            if layer.weight.grad is not None:
                self.sums[name] += layer.weight.grad

    def _state(self):
        """Parameters and statistics of the model."""
        return (*self.model.parameters(), *self.model.buffers())

    @torch.no_grad()
    def after_step(self):
        for value, held in zip(self._state(), self.held):
            value.copy_(held)

    def figures(self):
        """``batches`` measured so far."""
        return {"batches": self.batches}

    def finish(self):
        for hook in self.hooks:
            hook.remove()
        if not self.batches:
            raise InputError("needs a stage of at least one epoch", field="collaborative")
        kernels = {name: [_kernel(t) for t in (layer.weight, self.sums[name] / self.batches)]
                   for name, layer in self.targets.items()}
        curves = []
        for name, (weight, gradient) in kernels.items():
            try:
                curves.append(allocation.fit(*allocation.error_curve(weight, gradient)))
            except ValueError as error:
                raise InputError(f"cannot be judged by its gradient ({error})", field=f"layers.{name}") from None
        macs = np.array([weight.size * self.positions[name] for name, (weight, _) in kernels.items()])
        most = np.array([allocation.most_of(weight.shape) for weight, _ in kernels.values()])
        try:
            gives = allocation.allocate(macs, curves, self.ratio, equal=self.equal, most=most)
        except ValueError as error:
            raise InputError(f"is out of reach ({error})", field="ratio", value=self.ratio) from None
        for (name, layer), share in zip(self.targets.items(), gives / macs):
            self.chosen[name] = rest = allocation.compress(*kernels[name], share, look_ahead=self.look_ahead)
            take_form(layer, rest)

    def state_dict(self):
        return {"sums": self.sums, "batches": self.batches, "positions": self.positions}

    def load_state_dict(self, state):
        self.sums, self.batches, self.positions = state["sums"], state["batches"], dict(state["positions"])


def _kernel(tensor):
    """Float64 array [O, I, T] of a weight."""
    array = tensor.detach().cpu().numpy().astype(np.float64)
    return array.reshape(*array.shape[:2], -1)


def take_form(layer, rest):
    """Give a layer the form of an `allocation.Rest`; all channels and no rank: it stays plain."""
    channels = torch.from_numpy(rest.channels.astype(np.int64))
    if rest.rank is not None:
        form = Gathered(shape=layer.weight.shape, channels=channels, rank=rest.rank)
        parametrize.register_parametrization(layer, "weight", form)
    elif len(channels) < layer.weight.shape[1]:
        mask = torch.zeros_like(layer.weight, dtype=torch.bool)
        mask[:, channels] = True
        fix_mask(layer, mask)
