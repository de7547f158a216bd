"""Weights as functions of smaller tensors: parametrisations of the formats, and the plain network they stand for.

A parametrisation (`torch.nn.utils.parametrize`) keeps a layer an nn.Conv2d or nn.Linear that computes with the rebuilt
weight; its parameters are the factors. ``right_inverse`` decomposes a weight (in float64, by golden), ``forward``
multiplies the factors together again. `materialize` turns factors into the layers that inference runs.

``chain(layer)`` of a factored form returns plain layers whose composition is the layer: of a convolution
``1x1 (I -> r_in) | RxS (r_in -> r_out), stride, padding and dilation | 1x1 (r_out -> O), bias``; consecutive cores of
one side are multiplied into one matrix. Stages before the last have no bias, so zero padding stays exact.

Source: reference on tensor trains, sections 2 and 3. Kernels are [O, I, R, S], matrices [O, I].
"""
import copy

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from compress.training.projections.svd import check_rank, from_matrix, to_matrix
from compress.training.projections.tensor_train import check_modes, decompose
from golden import tucker
from spec.errors import InputError


def to_array(weight):
    """A weight as a float64 array."""
    return weight.detach().cpu().numpy().astype(np.float64)


def _like(weight, arrays):
    """Arrays as contiguous tensors of the type and device of ``weight``."""
    return tuple(torch.from_numpy(np.ascontiguousarray(a)).to(weight) for a in arrays)


def originals(layer):
    """The tensors that a layer's weight is computed from, in order."""
    parts = layer.parametrizations["weight"]
    return (parts.original,) if hasattr(parts, "original") else tuple(
        getattr(parts, f"original{n}") for n in range(parts.ntensors))


def check_layer(layer, field):
    """Raises: InputError unless a factored form of ``layer`` can run as a chain."""
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1:
            raise InputError("must be a layer without groups", field=field, value=f"{layer.groups} groups")
        if layer.padding_mode != "zeros":
            raise InputError("must be padded with zeros", field=field, value=layer.padding_mode)


# -- plain layers ------------------------------------------------------------------------------------------------------
def _with_weights(layer, weight, bias):
    layer.weight = nn.Parameter(weight.detach().clone().contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _linear(matrix, bias=None):
    """nn.Linear of a matrix [O, I]."""
    outputs, inputs = matrix.shape
    return _with_weights(nn.Linear(inputs, outputs, bias=bias is not None, device="meta"), matrix, bias)


def _convolution(kernel, bias=None, **geometry):
    """nn.Conv2d of a kernel [O, I, R, S]."""
    outputs, inputs = kernel.shape[:2]
    return _with_weights(nn.Conv2d(inputs, outputs, kernel.shape[2:], bias=bias is not None, device="meta", **geometry),
                         kernel, bias)


def _geometry(layer):
    return {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}


def _stages(layer, out_factor, core, in_factor):
    """``in_factor [r_in, I] | core [r_out, r_in, R, S] | out_factor [O, r_out]`` in place of a convolution."""
    return (_convolution(in_factor[:, :, None, None]), _convolution(core, **_geometry(layer)),
            _convolution(out_factor[:, :, None, None], layer.bias))


class Chain(nn.Sequential):
    """A factored layer as plain layers, called ``1``, ``2`` … as the nodes of `compress.factorize`."""

    def __init__(self, *layers):
        super().__init__()
        for number, layer in enumerate(layers, 1):
            self.add_module(str(number), layer)


def materialize(model):
    """A copy of ``model`` without parametrisations: weights are plain, and a layer whose weight has a form with
    ``chain`` is a `Chain`. The model itself does not change. Names stay except in chains (``name.1.weight``).
    """
    made = {}                                                # module -> what takes its place, also under other names

    def plain(module):
        if module not in made:
            made[module] = result = _plain(module)
            if result is module:
                for name, child in module._modules.items():
                    if child is not None:
                        module._modules[name] = plain(child)
        return made[module]

    return plain(copy.deepcopy(model))


@torch.no_grad()
def _plain(module):
    if not parametrize.is_parametrized(module):
        return module
    forms = module.parametrizations["weight"] if parametrize.is_parametrized(module, "weight") else ()
    if len(forms) == 1 and hasattr(forms[0], "chain"):
        check_layer(module, "materialize")
        return Chain(*forms[0].chain(module)).train(module.training)
    # `remove_parametrizations` would take the weight's property off a class that the copy shares with the original
    values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
    module.__class__ = type(module).__bases__[0]
    del module.parametrizations
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))
    return module


# -- forms -------------------------------------------------------------------------------------------------------------
class TensorTrain(nn.Module):
    """Weight as a decoupled train: modes (O_1 .. O_m, R*S, I_1 .. I_n), for a matrix without R*S.

    ``W[o_1..o_m, t, i_1..i_n] = G_1[o_1] .. G_m[o_m] G[t] H_1[i_1] .. H_n[i_n]``; the originals are the cores
    [r_(k-1), n_k, r_k]. Without modes: order 3, ``[O, R*S, I]``, the "special" form; a matrix: ``[O, I]``.

    Args: shape: of the weight; ranks: (1, r_1 .. 1), see `golden.tensor_train.check_ranks`; out_modes, in_modes:
    factors of O and I. Raises: InputError for modes or ranks that the shape does not allow.
    """

    def __init__(self, *, shape, ranks, out_modes=None, in_modes=None):
        super().__init__()
        self.shape = tuple(shape)
        self.ranks, self.out_modes, self.in_modes = check_modes(self.shape, ranks, out_modes, in_modes)

    def right_inverse(self, weight):
        """Cores of a weight (TT-SVD)."""
        layer = decompose(to_array(weight), self.ranks, self.out_modes, self.in_modes)
        return _like(weight, layer.train.cores)

    def _factors(self, cores):
        """(out factor [O, r_out], core [r_out, R*S, r_in] or None, in factor [r_in, I])."""
        m = len(self.out_modes)
        inside = len(self.shape) == 4
        return (_merge(cores[:m])[0], cores[m] if inside else None, _merge(cores[m + inside:])[:, :, 0])

    def forward(self, *cores):
        out, core, inputs = self._factors(cores)
        if core is None:
            return out @ inputs
        taps = torch.tensordot(out, torch.tensordot(core, inputs, dims=1), dims=1)          # [O, R*S, I]
        return taps.reshape(self.shape[0], *self.shape[2:], self.shape[1]).permute(0, 3, 1, 2).contiguous()

    @torch.no_grad()
    def chain(self, layer):
        """Plain layers in place of ``layer``."""
        out, core, inputs = self._factors(originals(layer))
        if core is None:
            return _linear(inputs), _linear(out, layer.bias)
        kernel = core.reshape(len(core), *self.shape[2:], -1).permute(0, 3, 1, 2)
        return _stages(layer, out, kernel, inputs)


def _merge(cores):
    """[r, n .. n, r'] of consecutive cores as [r, product, r']."""
    total = cores[0]
    for core in cores[1:]:
        total = torch.tensordot(total, core, dims=1).reshape(total.shape[0], -1, core.shape[2])
    return total


class Tucker2(nn.Module):
    """Kernel ``W[o,i,r,s] = sum_ab A[o,a] G[a,b,r,s] B[b,i]``.

    Originals: A [O, r_out], G [r_out, r_in, R, S], B [r_in, I].

    Args: shape: of the kernel; ranks: (r_out, r_in); sweeps: of HOOI when a weight is decomposed.
    Raises: InputError for ranks above the shape's, or redundant ones.
    """

    def __init__(self, *, shape, ranks, sweeps=2):
        super().__init__()
        self.shape, self.sweeps = tuple(shape), sweeps
        if len(self.shape) != 4:
            raise InputError("must be a kernel [O, I, R, S]", field="shape", value=self.shape)
        o, i, r, s = self.shape
        self.ranks = tucker.check_ranks(ranks, (o, r, s, i))

    def right_inverse(self, weight):
        """Factors of a kernel."""
        inputs, core, out = (s.weights for s in tucker.tucker2(to_array(weight).transpose(0, 2, 3, 1),
                                                               self.ranks, sweeps=self.sweeps).stages)
        return _like(weight, (out[:, 0, 0], core.transpose(0, 3, 1, 2), inputs[:, 0, 0]))

    def forward(self, out, core, inputs):
        left = torch.tensordot(out, core, dims=1)                                           # [O, r_in, R, S]
        return torch.einsum("obrs,bi->oirs", left, inputs).contiguous()

    @torch.no_grad()
    def chain(self, layer):
        """Plain layers in place of ``layer``."""
        return _stages(layer, *originals(layer))


class LowRank(nn.Module):
    """Weight as a matrix of low rank ``A B``; originals A, B. Two plain layers.

    channel: ``W[o, (i,r,s)] = A [O, r] B [r, I R S]``: RxS convolution to r channels, then 1x1. Of a matrix or a 1x1
    kernel: ``I -> r -> O``.
    spatial: ``W[(i,r), (o,s)]``, originals [I R, r] and [r, O S]: Rx1 convolution to r channels, then 1xS.

    Args: shape: of the weight; rank: at most the smaller side of the matrix; form: see above.
    Raises: InputError for a rank that the shape does not allow. Source: other systems, section 7.
    """

    def __init__(self, *, shape, rank, form="channel"):
        super().__init__()
        self.shape, self.form = tuple(shape), form
        self.rank = check_rank(self.shape, rank, form)

    def right_inverse(self, weight):
        """Factors of a weight (truncated SVD; the singular values go to the second layer of the chain)."""
        matrix = to_matrix(to_array(weight), self.form)
        if self.form == "spatial":
            first, last = (s.weights[:, 0, 0] for s in tucker.svd(matrix.T, self.rank).stages)
            return _like(weight, (first.T, last.T))
        first, last = (s.weights[:, 0, 0] for s in tucker.svd(matrix, self.rank).stages)
        return _like(weight, (last, first))

    def forward(self, a, b):
        return from_matrix(a @ b, self.shape, self.form).contiguous()

    @torch.no_grad()
    def chain(self, layer):
        """Plain layers in place of ``layer``."""
        a, b = originals(layer)
        if isinstance(layer, nn.Linear):
            return _linear(b), _linear(a, layer.bias)
        o, i, r, s = self.shape
        if self.form == "channel":
            return (_convolution(b.reshape(-1, i, r, s), **_geometry(layer)),
                    _convolution(a[:, :, None, None], layer.bias))
        down, right = ({key: _one_axis(value, axis, 0 if key == "padding" else 1)
                        for key, value in _geometry(layer).items()} for axis in (0, 1))
        return (_convolution(a.reshape(i, r, -1).permute(2, 0, 1)[..., None], **down),
                _convolution(b.reshape(-1, o, s).permute(1, 0, 2)[:, :, None], layer.bias, **right))


def _one_axis(value, axis, other):
    """A pair of which one axis only counts; words ("same", "valid") stay."""
    if isinstance(value, str):
        return value
    return (value[0], other) if axis == 0 else (other, value[1])


class Masked(nn.Module):
    """Weight times a fixed mask of zeros and ones (a buffer, saved with the model)."""

    def __init__(self, *, mask):
        super().__init__()
        self.register_buffer("mask", mask.detach().clone())

    def right_inverse(self, weight):
        """The weight where the mask is set."""
        return weight * self.mask

    def forward(self, weight):
        return weight * self.mask


class Unified(nn.Module):
    """``sign * magnitude``, one magnitude for each ``block`` of consecutive input channels of a tap; signs are fixed.

    Originals: magnitudes [O, ceil(I / block), R, S], of a matrix [O, ceil(I / block)].
    Args: negative: bool, shape of the weight (a buffer); block: weights that share a magnitude.
    """

    def __init__(self, *, negative, block):
        super().__init__()
        self.block = block
        self.register_buffer("sign", 1.0 - 2.0 * negative.detach().float())

    def right_inverse(self, weight):
        """Means of the magnitudes: the least squares for these signs."""
        ends = (weight * self.sign).split(self.block, dim=1)
        return torch.stack([part.mean(dim=1) for part in ends], dim=1)

    def forward(self, magnitudes):
        return magnitudes.repeat_interleave(self.block, dim=1)[:, :self.sign.shape[1]] * self.sign
