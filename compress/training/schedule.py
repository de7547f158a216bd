"""Learning-rate schedules and optimisers of a stage, as recipes write them. Schedules are functions of the progress
alone, so that a resumed run needs no state of theirs."""
import math

import torch

from compress.training import fields
from spec.errors import InputError


class Schedule:
    """Factor of the learning rate at a progress 0..1 of a stage.

    kind:
        ``constant``: 1.
        ``cosine``: rises linearly over the share ``warmup``, then ``final + (1 - final) (1 + cos(pi t)) / 2``.
        ``linear``: rises likewise, then falls linearly to ``final``.
        ``step``: ``factor`` to the number of ``milestones`` (shares of the stage) passed, after the warm-up.
    """

    def __init__(self, *, kind="cosine", warmup=0.0, final=0.0, milestones=(), factor=0.1):
        self.kind = fields.choice(kind, "kind", ("constant", "cosine", "linear", "step"))
        self.warmup = fields.number(warmup, "warmup", low=0, below=1)
        self.final = fields.number(final, "final", low=0, high=1)
        if not isinstance(milestones, (list, tuple)):
            raise InputError("must be a list of shares of the stage", field="milestones", value=milestones)
        self.milestones = [fields.number(m, f"milestones[{n}]", above=0, below=1) for n, m in enumerate(milestones)]
        if (kind == "step") != bool(self.milestones):
            raise InputError("must be given for step schedules, and only there", field="milestones", value=milestones)
        self.factor = fields.number(factor, "factor", above=0, high=1)

    def __call__(self, progress):
        rise = min(1.0, progress / self.warmup) if self.warmup else 1.0
        rest = max(0.0, (progress - self.warmup) / (1 - self.warmup))
        if self.kind == "cosine":
            return rise * (self.final + (1 - self.final) * (1 + math.cos(math.pi * rest)) / 2)
        if self.kind == "linear":
            return rise * (1 - (1 - self.final) * rest)
        if self.kind == "step":
            return rise * self.factor ** sum(progress >= m for m in self.milestones)
        return rise


class Optimizer:
    """SGD with momentum, or AdamW. Weight decay acts on tensors of two or more axes only: not on biases, scales and
    batch normalisation."""

    def __init__(self, *, rate, kind="sgd", momentum=0.9, nesterov=True, weight_decay=0.0):
        self.kind = fields.choice(kind, "kind", ("sgd", "adamw"))
        self.rate = fields.number(rate, "rate", above=0, high=10)
        self.momentum = fields.number(momentum, "momentum", low=0, below=1)
        self.nesterov = fields.flag(nesterov, "nesterov")
        self.weight_decay = fields.number(weight_decay, "weight_decay", low=0, high=1)
        if self.nesterov and not self.momentum:
            self.nesterov = False

    def make(self, model):
        """The optimiser of a model's parameters."""
        parameters = list(model.parameters())
        groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
                  {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
        groups = [g for g in groups if g["params"]]
        if self.kind == "adamw":
            return torch.optim.AdamW(groups, lr=self.rate, betas=(self.momentum, 0.999))
        return torch.optim.SGD(groups, lr=self.rate, momentum=self.momentum, nesterov=self.nesterov)
