"""ADMM: training pulls the weights of a dense network into a set (of low rank, of a sparsity pattern), then projects.

``min L(W)  subject to  W_l in S_l`` for each compressed layer, split as W = Z with Z in S, scaled dual U::

    start:                      Z = Proj_S(W);  U = 0
    begin of each epoch:        Z = Proj_S(W + U);  U = U + W - Z
    each batch:                 step on  L(W) + rho / 2 * sum_l ||W_l - Z_l + U_l||_F^2
    end:                        W = Proj_S(W), or the factors of it

The network stays dense while it trains, and its accuracy is that of W; `ADMM.projected` shows that of Proj_S(W).

Source: M. Yin, Y. Sui, S. Liao, B. Yuan, "Towards Efficient Tensor Decomposition-Based DNN Model Compression with
Optimization Framework", CVPR 2021, section 4, and reference on tensor trains, section 1 (the schedule of the updates,
rho = 1e-3).
"""
from contextlib import contextmanager

import torch
from torch.nn.utils import parametrize

from compress.training import fields, projections
from compress.training.masks import release
from compress.training.technique import Technique
from compress.training.techniques.factorize import Choice, array_of, form_of, tensor_of
from spec.errors import InputError

ENDS = ("factorize", "project", "keep")


class ADMM(Technique):
    """The algorithm of the module's docstring.

    Args:
        projection: ``{kind: …}`` of `compress.training.projections`; layers: see `factorize.Choice`.
        rho: strength of the pull. rho_factor: from the share ``rho_at`` of the stage's epochs on, rho is multiplied by
            it (1: never; the published code has 5 at 0.85, switched off); U is divided by it, being the scaled dual.
        interval: epochs between updates of Z and U.
        finish: ``factorize``: the layers take the form of the set, so that a later stage trains within it (factors of
            low rank; signs and magnitudes; a fixed mask). ``project``: plain weights in the set. ``keep``: nothing.
    Figures, per layer and over all: ``residual``, ``||W - Z|| / ||W||``, and ``dual_step``,
    ``rho ||Z - Z before|| / ||W||`` of the last update.
    """

    def __init__(self, *, projection, layers=None, rho=1e-3, rho_factor=1.0, rho_at=0.85, interval=1,
                 finish="factorize"):
        self.choice = Choice(projection, layers)
        self.rho = fields.number(rho, "rho", above=0, high=1e6)
        self.rho_factor = fields.number(rho_factor, "rho_factor", above=0, high=1e3)
        self.rho_at = fields.number(rho_at, "rho_at", low=0, high=1)
        self.interval = fields.whole(interval, "interval", low=1)
        self.end = fields.choice(finish, "finish", ENDS)

    def start(self, model):
        super().start(model)
        self.chosen = self.choice.of(model, "admm")
        self.now = self.rho
        self.z = {name: self._project(name, layer.weight.detach()) for name, layer in self._layers()}
        self.u = {name: torch.zeros_like(z) for name, z in self.z.items()}
        self.steps = dict.fromkeys(self.z, 0.0)
        self._aim()

    def _layers(self):
        return ((name, layer) for name, (layer, _, _) in self.chosen.items())

    def _project(self, name, weight):
        if not torch.isfinite(weight).all():
            raise InputError("must have finite weights (NaN or infinity found)", field=f"layers.{name}")
        return tensor_of(self.chosen[name][2].project(array_of(weight)), weight)

    def _aim(self):
        """What the penalty pulls each weight to."""
        self.aims = {name: z - self.u[name] for name, z in self.z.items()}

    @torch.no_grad()
    def begin_epoch(self, epoch, epochs):
        rho = self.rho * (self.rho_factor if epoch >= self.rho_at * epochs else 1.0)
        for name, layer in self._layers():
            weight = layer.weight
            if rho != self.now:
                self.u[name] *= self.now / rho
            if epoch % self.interval == 0:
                z = self._project(name, weight + self.u[name])
                self.u[name] += weight - z
                self.steps[name] = float((z - self.z[name]).norm())
                self.z[name] = z
        self.now = rho
        self._aim()

    def penalty(self):
        return self.now / 2 * sum((layer.weight - self.aims[name]).square().sum() for name, layer in self._layers())

    @torch.no_grad()
    def figures(self):
        result, sums = {}, [0.0, 0.0, 0.0]
        for name, layer in self._layers():
            size = float(layer.weight.norm())
            gap, step = float((layer.weight - self.z[name]).norm()), self.now * self.steps[name]
            result |= {f"{name}/residual": _ratio(gap, size), f"{name}/dual_step": _ratio(step, size)}
            sums = [s + v * v for s, v in zip(sums, (size, gap, step))]
        size, gap, step = (s ** 0.5 for s in sums)
        return result | {"residual": _ratio(gap, size), "dual_step": _ratio(step, size)}

    @contextmanager
    def projected(self):
        """While it lasts, the layers compute with the projections of their weights."""
        kept = {}
        try:
            with torch.no_grad():
                for name, layer in self._layers():
                    kept[name] = layer.weight.detach().clone()
                    _assign(layer, self._project(name, kept[name]))
            yield
        finally:
            with torch.no_grad():
                for name, weight in kept.items():
                    _assign(self.chosen[name][0], weight)

    @torch.no_grad()
    def finish(self):
        if self.end == "keep":
            return
        for name, (layer, options, projection) in self.chosen.items():
            release(layer)
            if self.end == "project":
                layer.weight.copy_(self._project(name, layer.weight))
            else:
                form = form_of(options["kind"], projection, layer.weight)
                parametrize.register_parametrization(layer, "weight", form)

    def state_dict(self):
        z, u = ({name: tensor.clone() for name, tensor in side.items()} for side in (self.z, self.u))
        return {"z": z, "u": u, "steps": dict(self.steps), "rho": self.now,
                "memory": {name: projection.memory() for name, (_, _, projection) in self.chosen.items()}}

    def load_state_dict(self, state):
        for mine, theirs in ((self.z, state["z"]), (self.u, state["u"])):
            for name, tensor in mine.items():
                tensor.copy_(theirs[name])
        self.steps = {name: float(state["steps"][name]) for name in self.z}
        self.now = float(state["rho"])
        for name, (layer, options, _) in self.chosen.items():
            self.chosen[name] = layer, options, projections.build(options | state["memory"][name])
        self._aim()


def _ratio(part, whole):
    return part / whole if whole else 0.0


def _assign(layer, weight):
    """Sets a plain or masked weight."""
    if parametrize.is_parametrized(layer, "weight"):
        layer.weight = weight
    else:
        layer.weight.copy_(weight)
