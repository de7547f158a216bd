"""Basis layers with ternary coefficients, trained with a straight-through estimator.

``weight[o,i,r,s] = alpha[o] * sum_m T[o,i,m] B[m,r,s]``, T in {-1, 0, 1}: what the basis engine computes, with alpha in
its requantiser and all other scales in B (rank-1 scales ``alpha[o] beta[m]``, beta folded into B).

* T = sign(L) where a latent coefficient L[o,i,m] is kept, else 0, chosen anew in every step. Irregular: each m keeps
  exactly ``max(1, round(density * O * I))``, those of largest |L| (ties: lowest output, then channel). N:G: each (o, m)
  keeps the N largest of every G consecutive channels (ties: lowest channel).
* Gradients: with ``V = alpha T``, ``dL/dV[o,i,m] = sum_rs dL/dW[o,i,r,s] B[m,r,s]``. Straight through, all latent
  coefficients, kept or not, get dL/dV unscaled, since L is in the unit of V; alpha gets ``sum_im T dL/dV`` (as the
  scales of Zhu et al., equation 7, where the latent gradient has the factors alpha and 1; after batch normalisation
  only its ratio to |L| counts). Only B sees T.
* B is rounded to ``basis_bits`` with one symmetric scale, ``max |B| / (2**(bits - 1) - 1)``, straight through, exactly
  as `compress.quantize` rounds it.
* Density may begin at ``density_from`` and fall within ``anneal`` epochs to its end by the cubic rule ``end + (from -
  end) (1 - epoch / anneal)**3`` (Zhu and Gupta, "To prune, or not to prune", 2017), patterns likewise in N.
* Values may turn ternary by degrees: ``V = share alpha T + (1 - share) |T| L``, where share rises from 0 to 1 within
  ``blend`` epochs, linearly, and alpha[o] is the mean ``|L|`` of those kept whenever it rises.

Without retraining such coefficients ruin a network. Sources: reference on ESCALATE and PENNI, section 7 (scheme and
scale placement are ours; the papers' ternary scheme is unknown); Zhu, Han, Mao, Dally, "Trained Ternary Quantization",
ICLR 2017.
"""
import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from compress import basis as bases
from compress.training import fields
from compress.training.masks import check_plain, release
from compress.training.parametrizations import originals
from compress.training.technique import Technique, options_of
from compress.training.techniques.basis import (BasisKernels, combine, decomposable, kernels_of, layer_options,
                                                parametrization_of)
from golden import basis as golden
from spec.config import Pattern
from spec.errors import InputError

ALLOCATIONS = ("uniform", "erk")
_OWN = ("count", "density", "pattern")


@torch.no_grad()
def signs(latent, *, density=None, pattern=None):
    """T of latent coefficients [O, I, M], in their dtype: the sign of those that are kept, else 0 (see above)."""
    outputs, inputs, count = latent.shape
    magnitude = latent.abs()
    if pattern is not None:
        blocks = functional.pad(magnitude, (0, 0, 0, -inputs % pattern.m), value=-1.0)
        blocks = blocks.reshape(outputs, -1, pattern.m, count)
        first = blocks.argsort(dim=2, descending=True, stable=True)[:, :, :pattern.n]
        kept = torch.zeros_like(blocks, dtype=torch.bool).scatter_(2, first, True)
        return torch.where(kept.reshape(outputs, -1, count)[:, :inputs], latent.sign(), 0.0)
    rows = magnitude.reshape(-1, count).T.contiguous()
    keep = max(1, round(density * rows.shape[1]))
    limit = rows.kthvalue(rows.shape[1] - keep + 1, dim=1, keepdim=True).values
    kept = rows >= limit
    if int(kept.sum()) > keep * count:                       # ties at the limit
        first = rows.argsort(dim=1, descending=True, stable=True)[:, :keep]
        kept = torch.zeros_like(kept).scatter_(1, first, True)
    return torch.where(kept.T.reshape(latent.shape), latent.sign(), 0.0)


def rounded(basis, bits):
    """``basis`` in multiples of ``max |basis| / (2**(bits - 1) - 1)``, halves to even; gradients pass unchanged."""
    peak = (1 << bits - 1) - 1
    scale = basis.detach().abs().max() / peak
    if not scale > 0:
        return basis
    return (basis.detach() / scale).round() * scale + (basis - basis.detach())


class TernaryKernels(nn.Module):
    """Parametrisation of a convolution's weight; originals: basis [M, R, S], alpha [O] (its magnitude counts), latent
    coefficients [O, I, M]. A weight that is assigned is decomposed, rotated for balance and fitted (`compress.basis`,
    steps 1 to 4).

    Args: count: M. density, pattern: of T now, one of them None; both may change at any time, as may share, that of the
    ternary values in V. bits: of the basis, 0 for float. gain: factor of the latent gradient. rotations, seed: of the
    balance; sweeps: of the descent.
    """

    def __init__(self, *, count, density=None, pattern=None, bits=8, gain=1.0, rotations=0, sweeps=0, seed=0):
        super().__init__()
        self.count, self.density, self.pattern, self.bits, self.gain = count, density, pattern, bits, gain
        self.rotations, self.sweeps, self.seed, self.share = rotations, sweeps, seed, 1.0

    def signs(self, latent):
        """T of latent coefficients at the present density or pattern."""
        return signs(latent, density=self.density, pattern=self.pattern)

    def basis(self, latent_basis):
        """B as the weights have it."""
        return rounded(latent_basis, self.bits) if self.bits else latent_basis

    def forward(self, basis, alpha, latent):
        ternary = self.signs(latent)
        values = alpha.abs()[:, None, None] * ternary
        if self.share < 1:
            values = self.share * values + (1 - self.share) * latent.detach() * ternary.abs()
        return combine(values + self.gain * (latent - latent.detach()), self.basis(basis))

    def right_inverse(self, weight):
        """Raises: InputError unless 1 <= count <= min(R S, O I)."""
        d = golden.decompose(kernels_of(weight), count=self.count)
        density = self.pattern.density if self.pattern is not None else self.density
        d = bases.balance(d, density, rotations=self.rotations, rng=np.random.default_rng(self.seed))[0]
        start = self.fit(*(torch.from_numpy(a).to(weight.dtype) for a in (d.basis, d.coefficients)))
        return self._descend(kernels_of(weight), *start) if self.sweeps else start

    def fit(self, basis, coefficients):
        """Originals for real factors: scales of least ``sum |coefficients - alpha beta T|**2`` (`compress.basis`)."""
        ternary = self.signs(coefficients).numpy()
        alpha, beta = bases.rank_one(coefficients.double().numpy(), ternary)
        alpha = np.where(alpha > 0, alpha, alpha[alpha > 0].mean() if (alpha > 0).any() else 1.0)
        beta = torch.from_numpy(np.where(beta > 0, beta, 1.0)).to(basis.dtype)
        return basis * beta[:, None, None], torch.from_numpy(alpha).to(basis.dtype), coefficients / beta

    def _descend(self, kernel, basis, alpha, latent):
        """Originals after `compress.basis.descend`: latent coefficients are each the least squares given all others."""
        k, r, s, c = kernel.shape
        rows = kernel.transpose(0, 3, 1, 2).reshape(k, c, r * s)
        flat = basis.double().flatten(1).numpy()
        ternary, scale, flat = bases.descend(rows, self.signs(latent).numpy(), alpha.double().numpy(), flat,
                                             density=self.density, pattern=self.pattern, sweeps=self.sweeps)
        values = scale[:, None, None] * ternary
        norm = (flat * flat).sum(axis=1)
        values = values + (rows - values @ flat) @ flat.T / np.where(norm > 0, norm, 1)
        return tuple(torch.from_numpy(a).to(basis.dtype) for a in (flat.reshape(basis.shape), scale, values))

    @torch.no_grad()
    def ternary(self, layer):
        """(B float64 [M, R, S], T int8 [O, I, M]) of a layer with this parametrisation."""
        basis, _, latent = originals(layer)
        return self.basis(basis).double().numpy(), self.signs(latent).to(torch.int8).numpy()


@torch.no_grad()
def _refit(layer):
    """alpha[o] of a layer becomes the mean |L| of the coefficients kept; it stays where none is."""
    _, alpha, latent = originals(layer)
    kept = parametrization_of(layer, TernaryKernels).signs(latent).abs()
    count = kept.sum(dim=(1, 2))
    mean = (kept * latent.abs()).sum(dim=(1, 2)) / count.clamp_min(1)
    alpha.copy_(torch.where(count > 0, mean, alpha))


def export_decompositions(model):
    """{module name: (basis float64 [M, R, S], coefficients int8 [O, I, M])} of all layers with ternary coefficients,
    for `compress.quantize.Quantizer`."""
    return {name: p.ternary(layer) for name, layer in model.named_modules()
            if parametrize.is_parametrized(layer, "weight")
            for p in layer.parametrizations.weight if hasattr(p, "ternary")}


def allocate(sizes, density, rule="uniform"):
    """Density of each layer, of which the mean weighted by coefficients is ``density``.

    Args: sizes: {name: (O, I, M, R, S)}. rule: ``uniform``, or ``erk``: proportional to ``(O + I + R + S) / (O I R S)``
    (Erdos-Renyi kernel; Evci et al., "Rigging the Lottery", ICML 2020), cut at 1.

    >>> {k: round(v, 3) for k, v in allocate({"a": (4, 4, 2, 3, 3), "b": (8, 8, 2, 3, 3)}, 0.4, "erk").items()}
    {'a': 0.718, 'b': 0.321}
    """
    if rule == "uniform":
        return dict.fromkeys(sizes, density)
    number = {n: o * i * m for n, (o, i, m, _, _) in sizes.items()}
    weight = {n: (o + i + r + s) / (o * i * r * s) for n, (o, i, _, r, s) in sizes.items()}
    full = set()
    while True:
        left = density * sum(number.values()) - sum(number[n] for n in full)
        factor = left / sum(weight[n] * number[n] for n in sizes if n not in full) if len(full) < len(sizes) else 0
        over = {n for n in sizes if n not in full and factor * weight[n] > 1}
        if not over:
            return {n: 1.0 if n in full else factor * weight[n] for n in sizes}
        full |= over


def _limits(options, field=""):
    """(density, pattern) of options, one of them None; both None if neither is given."""
    density, pattern = options.get("density"), options.get("pattern")
    if density is not None and pattern is not None:
        raise InputError("must not be given beside pattern", field=f"{field}density", value=density)
    if density is not None:
        density = fields.number(density, f"{field}density", above=0, high=1)
    if pattern is not None and not isinstance(pattern, Pattern):
        pattern = Pattern.parse(pattern, field=f"{field}pattern")
    return density, pattern


class Ternary(Technique):
    """Trains layers whose coefficients are ternary in every forward pass.

    A layer with `BasisKernels` goes on from its factors; a dense one is decomposed first.

    Args:
        layers: as of `Basis`; a mapping may give ``count``, ``density`` or ``pattern`` for its layers.
        count: basis kernels M of dense layers (6).
        density: share of the coefficients of each m that is kept (0.1), or pattern: ``N:G`` along input channels.
        allocate: ``uniform``, or ``erk``: small layers keep more, the mean over all coefficients being ``density``;
            layers with a density or pattern of their own stay outside.
        density_from, anneal: the density of epoch 0 and the epochs in which it falls to ``density``.
        blend: epochs within which kept coefficients turn from real to ternary (0: they are from the start).
        gain: factor of the latent gradients, as if the latent coefficients had this many times the rate (1).
        rotations: random rotations tried for balance before a dense layer is cut (0 keeps the SVD basis), with seed;
            sweeps: of the descent that follows (`compress.basis.descend`; 0: none).
        basis_bits: 2..16, or 0 for a float basis.
        freeze_at: share of the epochs (0..1) after which T is fixed and only B, alpha and the rest train; 1: never.
    Figures: density (of all), and per layer density and flips, the share of T that changed since the last figures.
    """

    def __init__(self, *, layers=None, count=None, density=None, pattern=None, allocate="uniform", density_from=None,
                 anneal=0, blend=0, gain=1.0, rotations=0, sweeps=0, seed=0, basis_bits=8, freeze_at=1.0):
        self.layers = layer_options(layers, _OWN)
        self.count = fields.whole(bases.COUNT if count is None else count, "count", low=1)
        density, self.pattern = _limits({"density": density, "pattern": pattern})
        self.density = 0.1 if density is None and self.pattern is None else density
        for key, options in (layers.items() if isinstance(layers, dict) else ()):
            _limits(options, f"layers.{key}.")
            if "count" in options:
                fields.whole(options["count"], f"layers.{key}.count", low=1)
        self.allocate = fields.choice(allocate, "allocate", ALLOCATIONS)
        if self.pattern is not None and self.allocate != "uniform":
            raise InputError("must be uniform with a pattern", field="allocate", value=allocate)
        self.anneal = fields.whole(anneal, "anneal", high=10_000)
        self.density_from = density_from
        if density_from is not None:
            self.density_from = fields.number(density_from, "density_from", above=0, high=1)
        if bool(self.anneal) != (density_from is not None):
            raise InputError("must be given together with density_from", field="anneal", value=anneal)
        self.blend = fields.whole(blend, "blend", high=10_000)
        self.gain = fields.number(gain, "gain", above=0, high=1e6)
        self.rotations = fields.whole(rotations, "rotations", high=bases.MAX_ROTATIONS)
        self.sweeps = fields.whole(sweeps, "sweeps", high=1000)
        self.seed = fields.whole(seed, "seed")
        self.basis_bits = fields.whole(basis_bits, "basis_bits", high=16)
        if self.basis_bits == 1:
            raise InputError("must be 0 or 2..16", field="basis_bits", value=basis_bits)
        self.freeze_at = fields.number(freeze_at, "freeze_at", low=0, high=1)

    def start(self, model):
        super().start(model)
        self.chosen = decomposable(model, self.layers)
        self.aims, self._last = self._aims(), {}
        for number, (name, layer) in enumerate(self.chosen.items()):
            if parametrization_of(layer, TernaryKernels) is not None:
                continue                                    # an earlier stage's; it goes on from there
            if parametrization_of(layer, BasisKernels) is None:
                check_plain({name: layer}, "ternary coefficients")
            try:
                self._attach(name, layer, number)
            except InputError as error:
                raise error.inside(f"layers.{name}") from None
        self._set(0)

    def _own(self, name):
        return (options_of(self.layers, name) or {}) if isinstance(self.layers, dict) else {}

    def _count(self, name, layer):
        if parametrization_of(layer, BasisKernels) is not None:
            return len(originals(layer)[0])
        if (held := parametrization_of(layer, TernaryKernels)) is not None:
            return held.count
        return fields.whole(self._own(name).get("count", self.count), "count", low=1)

    def _aims(self):
        """{name: (density, pattern)} at the end of the annealing."""
        aims = {name: _limits(self._own(name)) for name in self.chosen}
        free = {name: layer for name, layer in self.chosen.items() if aims[name] == (None, None)}
        sizes = {n: (layer.out_channels, layer.in_channels, self._count(n, layer), *layer.kernel_size)
                 for n, layer in free.items()}
        shares = dict.fromkeys(free) if self.density is None else allocate(sizes, self.density, self.allocate)
        return aims | {name: (share, self.pattern) for name, share in shares.items()}

    def _attach(self, name, layer, number):
        """Exchange a layer's weight, or its `BasisKernels`, for `TernaryKernels`."""
        given, count = None, self._count(name, layer)
        if parametrization_of(layer, BasisKernels) is not None:
            given = [f.detach().clone() for f in originals(layer)]
        release(layer)
        density, pattern = self._at(name, 0)
        kernels = TernaryKernels(count=count, density=density, pattern=pattern, bits=self.basis_bits,
                                 gain=self.gain, rotations=self.rotations, sweeps=self.sweeps,
                                 seed=(self.seed, number))
        parametrize.register_parametrization(layer, "weight", kernels)
        if given is not None:
            with torch.no_grad():
                for old, new in zip(originals(layer), kernels.fit(*given)):
                    old.copy_(new)

    def _at(self, name, epoch):
        """(density, pattern) of a layer in an epoch."""
        density, pattern = self.aims[name]
        if epoch >= self.anneal:
            return density, pattern
        end = density if pattern is None else pattern.density
        share = end + max(0.0, self.density_from - end) * (1 - epoch / self.anneal) ** 3
        if pattern is None:
            return share, None
        return None, Pattern(max(pattern.n, round(share * pattern.m)), pattern.m)

    def _set(self, epoch):
        for name, layer in self.chosen.items():
            held = parametrization_of(layer, TernaryKernels)
            held.density, held.pattern = self._at(name, epoch)
            held.share = min(1.0, epoch / self.blend) if self.blend else 1.0

    def begin_epoch(self, epoch, epochs):
        self._set(epoch)
        if self.blend and epoch <= self.blend:
            for layer in self.chosen.values():
                _refit(layer)
        if epoch >= self.freeze_at * epochs:
            self._freeze()

    def _freeze(self):
        """T stays as it is: it depends on the latent coefficients alone, and they have no gradient any more."""
        for layer in self.chosen.values():
            latent = originals(layer)[2]
            latent.requires_grad_(False)
            latent.grad = None

    def figures(self):
        found, nonzeros, total = {}, 0, 0
        for name, layer in self.chosen.items():
            ternary = parametrization_of(layer, TernaryKernels).ternary(layer)[1]
            old = self._last.get(name, ternary)
            kept = int(np.count_nonzero(ternary))
            found |= {f"{name}/density": kept / ternary.size, f"{name}/flips": float((ternary != old).mean())}
            self._last[name] = ternary
            nonzeros, total = nonzeros + kept, total + ternary.size
        return {"density": nonzeros / max(1, total)} | found

    def finish(self):
        self._set(max(self.anneal, self.blend))
        self._freeze()

    def state_dict(self):
        return {name: torch.from_numpy(ternary) for name, ternary in self._last.items()}

    def load_state_dict(self, state):
        self._last = {name: ternary.numpy() for name, ternary in state.items()}
