"""SVD training: factors trained in place of a weight, pushed to few singular values without ever computing an SVD.

    W = U diag(|s|) V^T
    penalty = sum over layers of  strength * R(s) + orthogonality / r^2 * (||U^T U - I||_F^2 + ||V^T V - I||_F^2)
    R(s) = ||s||_1 / ||s||_2 (hoyer),  ||s||_1^2 / ||s||_2^2 (hoyer_square)  or  ||s||_1 (l1)

At the end the largest values with a share ``1 - energy`` of ``sum s^2`` stay and are merged into two factors,
``A = U sqrt|s|`` and ``B = sqrt|s| V^T``. The product of both square roots is |s|, whose gradient is finite at s = 0;
training computes with it.

Source: H. Yang, M. Tang, W. Wen et al., "Learning Low-rank Deep Neural Networks via Singular Vector Orthogonality
Regularization and Singular Value Sparsification", CVPR Workshops 2020, arXiv 2004.09031; matrices as in
`compress.training.projections.svd` (channel: ``O x I R S``, spatial: ``I R x O S``).
"""
import copy

import torch
from torch import nn
from torch.nn.utils import parametrize

from compress.training import fields
from compress.training.masks import choose, release
from compress.training.parametrizations import LowRank, check_layer, originals
from compress.training.projections.svd import FORMS, from_matrix, to_matrix
from compress.training.technique import Technique
from compress.training.techniques.hoyer import TINY, hoyer_square
from spec.errors import InputError


def hoyer(values):
    """``sum |v| / sqrt(sum v^2)``: 1 for one non-zero, sqrt(n) for equal values, 0 for zeros."""
    return values.abs().sum() / values.square().sum().clamp_min(TINY).sqrt()


#: Measures of how many singular values are large.
REGULARIZERS = {"hoyer": hoyer, "hoyer_square": hoyer_square, "l1": lambda values: values.abs().sum()}


def orthogonality(u, v):
    """``(||U^T U - I||_F^2 + ||V^T V - I||_F^2) / r^2`` of U [m, r], V [n, r]."""
    eye = torch.eye(u.shape[1], dtype=u.dtype)
    return ((u.T @ u - eye).square().sum() + (v.T @ v - eye).square().sum()) / u.shape[1] ** 2


def rank_at(values, energy):
    """Count of the largest ``|s|`` whose squares hold at least a share ``1 - energy`` of ``sum s^2``; at least 1."""
    squares = values.detach().double().square().sort(descending=True).values
    dropped = squares.sum() - squares.cumsum(0)                      # by keeping 1, 2, … values
    enough = dropped <= energy * squares.sum()
    enough[-1] = True                                                # whatever rounding says
    return int(enough.nonzero()[0]) + 1


class SVDFactors(nn.Module):
    """Parametrisation ``W = U diag(|s|) V^T``; originals U [m, r], s [r], V [n, r], r = min(m, n).

    Args: shape: of the weight [O, I, R, S] or [O, I]; form: ``channel`` or ``spatial``.
    """

    def __init__(self, *, shape, form="channel"):
        super().__init__()
        self.shape, self.form = tuple(shape), form

    def right_inverse(self, weight):
        """Full SVD of a weight."""
        u, s, vt = torch.linalg.svd(to_matrix(weight.detach().double(), self.form), full_matrices=False)
        return u.to(weight), s.to(weight), vt.T.contiguous().to(weight)

    def forward(self, u, s, v):
        return from_matrix((u * s.abs()) @ v.T, self.shape, self.form).contiguous()

    @torch.no_grad()
    def factors(self, layer, rank=None):
        """A [m, rank] and B [rank, n] of the largest values (default: of all that are not zero)."""
        u, s, v = originals(layer)
        rank = max(1, int(s.count_nonzero())) if rank is None else rank
        kept = torch.sort(s.abs(), descending=True, stable=True).indices[:rank].sort().values
        root = s[kept].abs().sqrt()
        return u[:, kept] * root, (v[:, kept] * root).T

    @torch.no_grad()
    def chain(self, layer):
        """Two plain layers in place of ``layer``, see `parametrizations.LowRank`."""
        merged = copy.deepcopy(layer)
        # not `release`: it would take the weight's property off a class that the copy shares with the original
        merged.__class__ = type(layer).__bases__[0]
        del merged.parametrizations
        merged.register_parameter("weight", nn.Parameter(layer.weight.detach().clone()))
        merge(merged, *self.factors(layer), self.form)
        return merged.parametrizations.weight[0].chain(merged)


@torch.no_grad()
def merge(layer, a, b, form):
    """The layer takes the form `parametrizations.LowRank` with factors A and B."""
    shape = layer.weight.shape
    release(layer)
    parametrize.register_parametrization(layer, "weight", LowRank(shape=shape, rank=a.shape[1], form=form))
    for original, value in zip(originals(layer), (a, b)):
        original.copy_(value)


class SVDTraining(Technique):
    """Training of the module's docstring.

    Options:
        form: ``channel`` (RxS convolution to r channels, then 1x1) or ``spatial`` (Rx1, then 1xS).
        regularizer: ``hoyer``, ``hoyer_square`` or ``l1``; strength: its factor (the paper's code: 0.003, ImageNet).
        orthogonality: factor of that penalty (the paper's code: 2).
        energy: share of ``sum s^2`` that `finish` may drop, 0..1 (1 excluded; the paper's code: 1e-3).
        layers: list of layer patterns (default: `technique.default_layers`).

    `finish` leaves the form `parametrizations.LowRank` of the rank found; a rank that saves no parameters is kept as a
    plain weight.
    """

    foreseeable = False

    def __init__(self, *, form="channel", regularizer="hoyer", strength=0.003, orthogonality=2.0, energy=1e-3,
                 layers=None):
        self.form = fields.choice(form, "form", FORMS)
        self.regularizer = REGULARIZERS[fields.choice(regularizer, "regularizer", tuple(REGULARIZERS))]
        self.strength = fields.number(strength, "strength", low=0)
        self.orthogonality = fields.number(orthogonality, "orthogonality", low=0)
        self.energy = fields.number(energy, "energy", low=0, below=1)
        self.layers = layers

    def start(self, model):
        super().start(model)
        self.targets = choose(model, self.layers, "svd_training")
        for name, layer in self.targets.items():
            check_layer(layer, f"layers.{name}")
            if self.form == "spatial" and layer.weight.dim() != 4:
                raise InputError("must be a convolution for form spatial", field=f"layers.{name}")
        for layer in self.targets.values():
            release(layer)
            form = SVDFactors(shape=layer.weight.shape, form=self.form)
            parametrize.register_parametrization(layer, "weight", form)

    def penalty(self):
        total = 0.0
        for layer in self.targets.values():
            u, s, v = originals(layer)
            total = total + self.strength * self.regularizer(s) + self.orthogonality * orthogonality(u, v)
        return total

    @torch.no_grad()
    def figures(self):
        """Per layer: ``rank`` that `finish` would keep now, ``orthogonality``; in all ``rank_share``, kept ranks over
        full ranks."""
        result, kept, full = {}, 0, 0
        for name, layer in self.targets.items():
            u, s, v = originals(layer)
            rank = rank_at(s, self.energy)
            result |= {f"{name}/rank": rank, f"{name}/orthogonality": float(orthogonality(u, v))}
            kept, full = kept + rank, full + len(s)
        return result | {"rank_share": kept / full}

    def finish(self):
        for layer in self.targets.values():
            form, (u, s, v) = layer.parametrizations.weight[0], originals(layer)
            rank = rank_at(s, self.energy)
            a, b = form.factors(layer, rank)
            if rank * (len(u) + len(v)) < len(u) * len(v):
                merge(layer, a, b, self.form)
            else:
                release(layer)
