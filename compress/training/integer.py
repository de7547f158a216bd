"""Fine-tuning of a package: a PyTorch module whose every tensor is the int8 tensor that `golden` computes.

Trained are real ("latent") weights; each forward pass rounds them to the integers of the package that `to_network`
would write, and computes with these. With ``u = q - zero_point`` for every tensor and, per layer,

    W = clip(round(w / s_w), -127, 127) where the mask keeps      b = round(bias / (s_in s_w))
    u_out = clamp(floor((conv(u, W) + b) m + u_res m_res + 1/2), low, high)     m = multiplier / 2**(shift + 14)

(docs/numerics.md; basis layers have ``W = sum_m T round(B / s_B)`` with fixed T in {-1, 0, 1}). Convolutions are
float32 where ``sum |W| * max |u| < 2**24``, in parts of the input channels where only these are so small, else float64;
everything after them is float64: all of it exact, in training too. The backward pass is that of

    u_out = clamp(conv(u, m W) + m b + u_res m_res, low, high)

with rounding taken as identity: gradients pass where u_out lies strictly between its limits, and weights whose
rounding is clipped only move inwards. In real units, with ``m = s_in s_w / s_out``, this is the gradient of the float
network at the quantised point; gradients of scales are those of LSQ (Esser et al., "Learned Step Size Quantization",
ICLR 2020, equation 3), here of their logarithms.

Formats stay legal at every step: weights shrink where 128 sum |W| would leave 32 bits, biases are clipped to 32 bits,
and an output's scale grows where a ratio would leave the requantiser's range.
"""
from dataclasses import replace
from functools import cache
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from compress import basis as bases
from compress import validate
from compress.network import BasisConvolution, Convolution, Pool
from compress.training import fields
from golden import requantize, structured
from spec.derive import BIAS, FRACTION_BITS, MULTIPLIER
from spec.errors import InputError

#: What `IntegerNetwork` can learn besides weights.
LEARNED = ("none", "weights", "activations", "all")
#: Integers below it are exact in float32.
_EXACT = 1 << 24
#: Largest scale that the requantiser encodes.
_LARGEST_RATIO = MULTIPLIER.hi / (1 << FRACTION_BITS)
#: Sums of |W| at which raw sums over int8 inputs still fit 32 bits.
_LARGEST_SUM = BIAS.hi // 128
#: Learned scales stay within this factor of the package's.
_LARGEST_CHANGE = 8.0
#: Elements that are requantised at once: their float64 copies stay in the processor's cache.
_CHUNK = 1 << 17
#: Figures of a layer that describe the weights before training.
_STALE = ("dropped_nonzeros", "dropped_magnitude", "output_error", "weight_error", "weight_error_alpha",
          "weight_error_rank_one", "energy_ternary")


# -- rounding with straight-through gradients --------------------------------------------------------------------------
class _Round(torch.autograd.Function):
    """``round(clip(x, low, high))``, halves to even; the gradient passes unless it would move a clipped x outwards."""

    @staticmethod
    def forward(ctx, x, low, high):
        ctx.save_for_backward(x)
        ctx.limits = low, high
        return x.clamp(low, high).round_()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _inwards(gradient, ctx.saved_tensors[0], *ctx.limits), None, None


class _Clip(torch.autograd.Function):
    """``clip(x, low, high)`` with the gradient of `_Round`: a value beyond its limits can come back."""

    @staticmethod
    def forward(ctx, x, low, high):
        ctx.save_for_backward(x)
        ctx.limits = low, high
        return x.clamp(low, high)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _inwards(gradient, ctx.saved_tensors[0], *ctx.limits), None, None


def _inwards(gradient, x, low, high):
    # descent moves against the gradient: above the upper limit only a positive one leads back
    return gradient.masked_fill(((x > high) & (gradient < 0)) | ((x < low) & (gradient > 0)), 0)


def _plain(x):
    return float(x.detach())


def _standing(value, x):
    """``value`` with the gradient of ``x``; exact for integers, and where they differ by less than a factor of 2."""
    return x + (value - x).detach()


def _slowed(x, factor):
    """``x`` whose gradient is multiplied by ``factor``."""
    return x.detach() + (x - x.detach()) * factor


# -- exact arithmetic --------------------------------------------------------------------------------------------------
def _rows(values, width):
    """A parameter per channel [K], repeated along ``width`` pixels of an NHWC row."""
    return values.detach().repeat(width)


class Requantizer(NamedTuple):
    """What turns the sums of a layer into its output; ``multiplier`` and ``shift`` are what the package stores."""

    #: Exact scale [K], float64: multiplier / 2**(shift + 14).
    scale: torch.Tensor
    multiplier: np.ndarray
    shift: np.ndarray
    #: Limits of u_out.
    low: int
    high: int
    #: Exact scale of the residual operand, float64, and its encoding.
    residual: torch.Tensor | None
    residual_multiplier: int


def requantized(sums, bias, r, residual=None):
    """``u_out`` of a layer, float32 [N, K, H, W] in channels-last order, exactly as `golden.requantize`.

    ``A m`` has at most 33 + 16 bits. With the residual all bits lie 2**-45 and up (14 + 31 at the largest shift), so a
    float64 holds every sum below 2**8, and what is rounded above lies beyond all limits of u: one floor suffices.

    Args: sums: integers as float32 or float64 [N, K, H, W]; bias: float64 [K]; r: Requantizer; residual: u_res or None.
    """
    sums = sums.permute(0, 2, 3, 1).contiguous()
    count, height, width, outputs = sums.shape
    scale, offset = _rows(r.scale, width), _rows(bias * r.scale + 0.5, width)
    out = torch.empty(sums.shape, dtype=torch.float32)
    a, y = sums.view(-1, width * outputs), out.view(-1, width * outputs)
    if residual is not None:
        other = residual.permute(0, 2, 3, 1).contiguous().view(-1, width * outputs)
    step = max(1, _CHUNK // (width * outputs))
    for at in range(0, len(a), step):
        part = slice(at, at + step)
        t = torch.addcmul(offset, a[part].double(), scale)
        if residual is not None:
            t.add_(other[part].double(), alpha=r.residual_multiplier * 2.0 ** -FRACTION_BITS)
        y[part].copy_(t.floor_()).clamp_(r.low, r.high)             # what float32 rounds lies beyond the limits
    return out.permute(0, 3, 1, 2)


def _parts(weights, peak):
    """Fewest equal parts of the input channels in which every sum stays below 2**24; None if single channels do not."""
    total = weights.abs().sum(dim=(2, 3))                            # [K, C]
    for count in range(1, total.shape[1] + 1):
        step = -(-total.shape[1] // count)
        if all(float(p.sum(1).max()) * peak < _EXACT for p in total.split(step, 1)):
            return step
    return None


def _int8_sums(u, weights, zero_point, geometry):
    """The same by oneDNN's int8 convolution, which sums in int32 and gives float32: exact below 2**24."""
    stride, padding, dilation = (list(geometry[k]) for k in ("stride", "padding", "dilation"))
    start = zero_point + 128                                         # u = x - start with x in 0..255
    x = u.to(torch.int32)                                            # float32 to uint8 in one step is far slower
    x = (x.add_(start) if start else x).to(torch.uint8)
    ones, zeros = torch.ones(len(weights)), torch.zeros(len(weights), dtype=torch.int64)
    packed = torch.ops.onednn.qconv_prepack(weights.to(torch.int8), ones, 1.0, start, stride, padding, dilation,
                                            geometry["groups"], None)
    return torch.ops.onednn.qconv2d_pointwise(x, 1.0, start, packed, ones, zeros, None, stride, padding, dilation,
                                              geometry["groups"], 1.0, 0, torch.float32, "none", [], "")


@cache
def _int8_is_exact():
    """Whether this processor's int8 convolution is there and sums pairs of products without saturating them (older
    ones hold them in 16 bits)."""
    u, w = torch.full((2, 64, 5, 5), 255.0), torch.full((16, 64, 3, 3), 127.0)
    w[::2] = -127
    geometry = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    try:
        return torch.equal(_int8_sums(_compact(u), w, -128, geometry), functional.conv2d(u, w, padding=1))
    except (AttributeError, RuntimeError):
        return False


def convolved(u, weights, zero_point, **geometry):
    """Exact sums, float32 or float64 [N, K, H, W].

    Args: u: q - zero_point as float32 [N, C, H, W]; weights: integers as float64 [K, C / groups, R, S]; geometry:
    stride, padding, dilation, groups of `conv2d`.
    """
    step = _parts(weights, bases.peak(zero_point))
    # NNPACK's transforms would round
    with torch.backends.nnpack.flags(enabled=False):
        if step == weights.shape[1]:
            if float(weights.abs().max()) <= 127 and _int8_is_exact():
                return _int8_sums(u, weights, zero_point, geometry)
            return functional.conv2d(u, _compact(weights.float()), **geometry)
        if step is None or geometry["groups"] > 1:
            return functional.conv2d(u.double(), weights, **geometry)
        return sum(functional.conv2d(_compact(x), _compact(w.float()), **geometry).double()
                   for x, w in zip(u.split(step, 1), weights.split(step, 1)))


def _compact(x):
    return x.contiguous(memory_format=torch.channels_last)


class _Layer(torch.autograd.Function):
    """A convolution with its requantisation: exact integers forward, the real convolution with ``m W`` backward."""

    @staticmethod
    def forward(ctx, u, scaled, offset, residual, residual_scale, exact):
        # scaled: m W, float32; offset: m b, float32; both stand for their integers in the backward pass alone
        weights, bias, zero_point, r, geometry, ctx.reduced = exact
        y = requantized(convolved(u, weights, zero_point, **geometry), bias, r, residual)
        ctx.save_for_backward(u, scaled, y, residual, residual_scale)
        ctx.limits, ctx.geometry = (r.low, r.high), geometry
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        u, scaled, y, residual, residual_scale = ctx.saved_tensors
        gradient = torch.ops.aten.hardtanh_backward(_compact(gradient), y, *ctx.limits)
        g, operands = ctx.geometry, (gradient, u, scaled)
        if ctx.reduced:                                              # u has 8 bits and a sign: exact
            operands = [t.bfloat16() for t in operands]
        to_u, to_weights, _ = torch.ops.aten.convolution_backward(
            *operands, None, g["stride"], g["padding"], g["dilation"], False, (0, 0), g["groups"],
            (ctx.needs_input_grad[0], ctx.needs_input_grad[1], False))
        to_u, to_weights = (None if t is None else t.float() for t in (to_u, to_weights))
        # oneDNN's own gradient of the bias would cost a fifth of the layer
        to_offset = gradient.permute(0, 2, 3, 1).reshape(-1, gradient.shape[1]).sum(0)
        to_residual = gradient * float(residual_scale) if ctx.needs_input_grad[3] else None
        to_scale = (gradient * residual).sum(dtype=torch.float64) if ctx.needs_input_grad[4] else None
        return to_u, to_weights, to_offset, to_residual, to_scale, None


class _Rescale(torch.autograd.Function):
    """Requantisation of sums that PyTorch made: pooling, additions, basis layers whose intermediates can saturate."""

    @staticmethod
    def forward(ctx, sums, bias, scale, residual, residual_scale, r):
        y = requantized(sums, bias, r, residual)
        ctx.save_for_backward(sums, bias, scale, y, residual, residual_scale)
        ctx.limits = r.low, r.high
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        sums, bias, scale, y, residual, residual_scale = ctx.saved_tensors
        gradient = torch.ops.aten.hardtanh_backward(_compact(gradient), y, *ctx.limits)
        per_channel = (1, -1, 1, 1)
        to_sums = (gradient * scale.float().view(per_channel)).to(sums.dtype) if ctx.needs_input_grad[0] else None
        to_bias = gradient.sum((0, 2, 3)).double() * scale if ctx.needs_input_grad[1] else None
        to_scale = None
        if ctx.needs_input_grad[2]:
            to_scale = (gradient * (sums + bias.view(per_channel))).sum((0, 2, 3), dtype=torch.float64)
        to_residual = gradient * float(residual_scale) if ctx.needs_input_grad[3] else None
        to_ratio = (gradient * residual).sum(dtype=torch.float64) if ctx.needs_input_grad[4] else None
        return to_sums, to_bias, to_scale, to_residual, to_ratio, None


# -- layers ------------------------------------------------------------------------------------------------------------
def _exact_scale(multiplier, shift):
    """multiplier / 2**(shift + 14), exact in float64."""
    return np.ldexp(np.asarray(multiplier, np.float64), -(np.asarray(shift, np.int64) + FRACTION_BITS))


class _Base(nn.Module):
    """One layer of a network: its place, its formats, its requantisation."""

    def __init__(self, layer, network):
        super().__init__()
        self.layer = layer
        self.source, self.target = network.tensors[layer.input], network.tensors[layer.output]
        self.other = None if layer.residual is None else network.tensors[layer.residual]
        self.peak = bases.peak(self.source.zero_point)
        r = layer.requantization
        self.register_buffer("base_scale", torch.from_numpy(_exact_scale(r.multiplier, r.shift)), persistent=False)
        self.base_ratio = r.residual_multiplier / (1 << FRACTION_BITS)

    def changes(self):
        """Logarithms [K] of the weight scales over the package's; None where they are fixed."""

    def least(self, changes, weights):
        """Least logarithm of the output's scale over the package's at which all ratios can be encoded.

        Args: changes: {tensor: logarithm of its scale over the package's}; weights: see `changes`.
        """
        grown = self.base_scale * math.exp(_plain(changes[self.layer.input]))
        largest = float((grown if weights is None else grown * weights.detach().exp()).max())
        if self.other is not None:
            largest = max(largest, self.base_ratio * math.exp(_plain(changes[self.layer.residual])))
        return math.log(max(largest, 1e-300) / _LARGEST_RATIO)

    def requantizer(self, changes, weights):
        """Requantizer under changed scales (arguments as `least`); without changes exactly the package's."""
        r, layer = self.layer.requantization, self.layer
        ours = {t for t in (layer.input, layer.output, layer.residual) if t is not None}
        moved = {t for t in ours if changes[t].requires_grad or _plain(changes[t])}
        ratio = None if self.other is None else torch.tensor(self.base_ratio, dtype=torch.float64)
        low, high = (v - r.zero_point for v in (r.low, r.high))
        if not moved and weights is None:
            return Requantizer(self.base_scale, r.multiplier, r.shift, low, high, ratio, r.residual_multiplier)
        source, target = changes[layer.input], changes[layer.output]
        real = self.base_scale * torch.exp(source - target)
        if weights is not None:
            real = real * weights.exp()
        wanted = real.detach().numpy()
        multiplier, shift = requantize.encode_scale(np.where(wanted > 0, np.minimum(wanted, _LARGEST_RATIO), 1.0))
        # a multiplier of 0 stays 0, and what does not move keeps its encoding
        kept = (self.base_scale.numpy() == 0) | (wanted == self.base_scale.numpy())
        multiplier = np.where(kept, r.multiplier, multiplier).astype(np.uint16)
        shift = np.where(kept, r.shift, shift).astype(np.uint8)
        scale = _standing(torch.from_numpy(_exact_scale(multiplier, shift)), real)
        encoded = r.residual_multiplier
        if self.other is not None:
            real = ratio * torch.exp(changes[layer.residual] - target)
            if _plain(real) != self.base_ratio:
                encoded = requantize.encode_residual_scale(min(max(_plain(real), 1e-9), _LARGEST_RATIO))
            ratio = _standing(encoded / (1 << FRACTION_BITS), real)
        # limits that are no ends of int8 are real ones (an activation), and keep their real value
        shrink = math.exp(-_plain(target))
        low, high = (v if q == end else min(max(round(v * shrink), -128 - r.zero_point), 127 - r.zero_point)
                     for v, q, end in ((low, r.low, -128), (high, r.high, 127)))
        return Requantizer(scale, multiplier, shift, low, high, ratio, encoded)

    def requantization(self, r, bias):
        """The package's form of ``r``; ``bias`` as stored."""
        zero_point = self.layer.requantization.zero_point
        return replace(self.layer.requantization, bias=bias, multiplier=r.multiplier, shift=r.shift,
                       low=r.low + zero_point, high=r.high + zero_point, residual_multiplier=r.residual_multiplier)


class _Channelwise(_Base):
    """Pooling and addition: no weights. The bias takes the input's zero point out, so little or nothing of it is left
    for sums over ``u``."""

    def __init__(self, layer, network):
        super().__init__(layer, network)
        average = isinstance(layer, Pool) and layer.kind == "average"
        self.count = math.prod(layer.window) if average else 1
        left = layer.requantization.bias.astype(np.float64) + self.count * self.source.zero_point
        self.register_buffer("bias", torch.from_numpy(left), persistent=False)

    def forward(self, u, residual, r, *_):
        if isinstance(self.layer, Pool):
            top, left, bottom, right = self.layer.pads
            window, stride = self.layer.window, self.layer.stride
            # max pooling pads with raw -128
            fill = -128 - self.source.zero_point if self.layer.kind == "max" else 0
            if any(self.layer.pads):
                u = functional.pad(u, (left, right, top, bottom), value=fill)
            if self.layer.kind == "max":
                u = functional.max_pool2d(u, window, stride)
            else:
                wide = u if self.count * self.peak < _EXACT else u.double()
                u = functional.avg_pool2d(wide, window, stride, divisor_override=1)
        return _Rescale.apply(u, self.bias, r.scale, residual, r.residual, r)

    def to_layer(self, r, _):
        return replace(self.layer, requantization=self.requantization(r, self.layer.requantization.bias))


class _Weighted(_Base):
    """What convolutions share: bias, learned weight scales, the exact convolution.

    Parameters: ``bias`` float64 [K], real units; ``weight_change`` float32 [K] or None, see `changes`.
    """

    def __init__(self, layer, network, *, learn):
        super().__init__(layer, network)
        r = layer.requantization
        exact = self.base_scale.numpy() * self.target.scale / self.source.scale
        scale = exact if layer.weight_scale is None else layer.weight_scale
        scale = np.where(np.isfinite(scale) & (scale > 0), scale, 1.0)
        self.register_buffer("weight_scale", torch.from_numpy(scale), persistent=False)
        unit = self.source.scale * scale
        self.bias = nn.Parameter(torch.from_numpy((r.bias + self._folded()) * unit))
        self.weight_change = nn.Parameter(torch.zeros(layer.outputs)) if learn else None
        kernel = torch.from_numpy(layer.effective_weights() * scale[:, None, None, None])
        square = kernel.square().sum((1, 2, 3))
        # along its own direction a kernel then moves as fast by its scale as by its weights
        self.register_buffer("pace", torch.where(square > 0, 1 / square, 0.0), persistent=False)

    def _folded(self):
        """What the package's bias lacks to that of sums over u: int64 [K]."""
        return self.source.zero_point * self.layer.effective_weights().astype(np.int64).sum(axis=(1, 2, 3))

    def changes(self):
        if self.weight_change is None:
            return None
        limit = math.log(_LARGEST_CHANGE)
        return _slowed(_Clip.apply(torch.nan_to_num(self.weight_change.double()), -limit, limit), self.pace)

    def _scales(self, changes, weights):
        """(weight scales [K], unit of the sums [K]), float64."""
        scale = self.weight_scale if weights is None else self.weight_scale * weights.exp()
        source = changes[self.layer.input]
        unit = self.source.scale * scale
        return scale, unit * source.exp() if source.requires_grad or _plain(source) else unit

    def _rounded_bias(self, unit, weights):
        """Integer biases of sums over u, float64 [K], whose stored form fits 32 bits."""
        fold = self._fold(weights)
        bias = _Round.apply(self.bias / unit, -2.0 ** 40, 2.0 ** 40)
        kept = (bias.detach() - fold).clamp_(BIAS.lo, BIAS.hi) + fold
        return _standing(kept, bias)

    def _fold(self, weights):
        return weights.detach().sum((1, 2, 3)) * self.source.zero_point

    def forward(self, u, residual, r, changes, reduced):
        layer = self.layer
        weights, bias = self.integers(*changes)
        top, left, bottom, right = layer.pads
        padding = (top, left)
        if (top, left) != (bottom, right):
            u, padding = functional.pad(u, (left, right, top, bottom)), (0, 0)
        geometry = {"stride": layer.stride, "padding": padding, "dilation": layer.dilation, "groups": layer.groups}
        return self.run(u, weights, bias, residual, r, geometry, reduced)

    def run(self, u, weights, bias, residual, r, geometry, reduced):
        """u_out of the padded input."""
        scaled = _compact((weights * r.scale.view(-1, 1, 1, 1)).float())
        exact = weights.detach(), bias.detach(), self.source.zero_point, r, geometry, reduced
        return _Layer.apply(u, scaled, (bias * r.scale).float(), residual, r.residual, exact)

    def stored(self, r, changes):
        """(integers, fields of a layer that all convolutions update)."""
        weights, bias = self.integers(*changes)
        for name, parameter in self.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise InputError("must be finite (training diverged)", field=f"layer {self.layer.name!r} {name}")
        bias = (bias - self._fold(weights)).numpy().astype(np.int64).astype(np.int32)
        scale = self._scales(*changes)[0]
        kept = {} if self.layer.weight_scale is None and self.weight_change is None else {
            "weight_scale": scale.numpy().copy()}
        return weights, kept | {"requantization": self.requantization(r, bias)}


class _Convolution(_Weighted):
    """Parameter ``weight`` float32 [terms, K, C / groups, R, S]: real weights, a slice for each term of the series;
    elements outside their term's mask are not used."""

    def __init__(self, layer, network, node, *, learn):
        super().__init__(layer, network, learn=learn)
        values = np.stack([t.values for t in layer.terms])
        keep, real = self._latent(values, node)
        order = (0, 1, 4, 2, 3)
        self.weight = nn.Parameter(torch.from_numpy(np.ascontiguousarray(real.transpose(order), np.float32)))
        self.register_buffer("keep", torch.from_numpy(np.ascontiguousarray(keep.transpose(order))), persistent=False)
        self.low = min(-127, int(values.min()))
        self.fits = values[:, 0].size * 128 <= _LARGEST_SUM

    def _latent(self, values, node):
        """(masks, real weights) of the terms' values, both [terms, K, R, S, C / groups].

        A dense term may use all elements. Of others the package alone shows the non-zeros; the float weights also show
        the chosen ones that were rounded to 0. Raises: InputError if float weights of that name are others.
        """
        layer, scale = self.layer, self.weight_scale.numpy()[:, None, None, None]
        dense = np.array([t.dense for t in layer.terms])[:, None, None, None, None]
        if node is None:
            return dense | (values != 0), values * scale
        keep = np.array(np.broadcast_to(dense, values.shape))        # a copy: PyTorch wants it writable
        if not dense.all() and node.weights.shape == values.shape[1:]:
            chosen, _ = structured.tasd_series(np.abs(node.weights), [t.pattern for t in layer.terms])
            keep = np.stack(chosen) != 0
        same = node.weights.shape == values.shape[1:]
        if same:
            rounded = np.clip(np.round(node.weights.astype(np.float64) / scale), -127, 127)
            same = np.array_equal(np.where(keep, rounded, 0), values)
        if not same:
            raise InputError("must be the network that the package was made from; its weights differ (without it, "
                             "training starts from the package's own weights)", field=f"graph: layer {layer.name!r}")
        return keep, np.where(keep, node.weights, 0)

    def _rounded(self, scale):
        """Integers of all terms, float64 [terms, K, C / groups, R, S]."""
        q = _Round.apply(self.weight.double() / scale.view(-1, 1, 1, 1), self.low, 127) * self.keep
        if not self.fits:
            total = q.detach().sum(0).abs().sum((1, 2, 3))
            if bool((total > _LARGEST_SUM).any()):
                each = q.detach().abs().sum((0, 2, 3, 4))
                factor = torch.where(total > _LARGEST_SUM, _LARGEST_SUM / each, 1.0)
                q = _standing((q * factor.view(-1, 1, 1, 1)).trunc(), q)
        return q

    def integers(self, changes, weights):
        """(weights [K, C / groups, R, S], bias [K]), integers in float64 with straight-through gradients."""
        scale, unit = self._scales(changes, weights)
        total = self._rounded(scale).sum(0)
        return total, self._rounded_bias(unit, total)

    def to_layer(self, r, changes):
        _, kept = self.stored(r, changes)
        each = self._rounded(self._scales(*changes)[0]).numpy().transpose(0, 1, 3, 4, 2)
        terms = tuple(replace(t, values=np.ascontiguousarray(v, np.int8)) for t, v in zip(self.layer.terms, each))
        nonzeros = int(np.count_nonzero(each.sum(axis=0)))
        metrics = {k: v for k, v in self.layer.metrics.items() if k not in _STALE}
        metrics |= {"nonzeros": nonzeros, "density": nonzeros / each[0].size, "retrained": True}
        return replace(self.layer, terms=terms, metrics=metrics, **kept)


class _Basis(_Weighted):
    """Parameter ``basis`` float32 [M, R, S], in units of the weights (times the root mean square of the weight scales);
    the ternary coefficients are fixed. All weights share a basis kernel, so its gradient is divided by the sum of their
    squared factors: a step then moves the kernel as far as one of its weights alone could, in the least-squares sense.

    Where no input can saturate an intermediate the layer is the dense convolution with its integer kernel.
    """

    def __init__(self, layer, network, *, learn):
        super().__init__(layer, network, learn=learn)
        used = self.weight_scale.numpy()[layer.coefficients.any(axis=(1, 2))]
        self.step = float(np.sqrt(np.square(used).mean())) if len(used) else 1.0
        self.basis = nn.Parameter(torch.from_numpy((layer.basis * self.step).astype(np.float32)))
        factors = (np.square(self.weight_scale.numpy() / self.step)
                   @ np.count_nonzero(layer.coefficients, axis=1))[:, None, None]
        self.register_buffer("basis_pace", torch.from_numpy(1 / np.maximum(factors, 1)), persistent=False)
        self.low = min(-127, int(layer.basis.min()))
        self.register_buffer("coefficients", torch.from_numpy(layer.coefficients.astype(np.float64)), persistent=False)
        bits, zero_point = layer.intermediate_bits, self.source.zero_point
        self.saturates = bases.can_saturate(layer.coefficients, zero_point, bits)
        nonzero = np.count_nonzero(layer.coefficients, axis=1)
        self.register_buffer("reach", torch.from_numpy(np.minimum(nonzero * float(self.peak), 2.0 ** (bits - 1))),
                             persistent=False)                       # [K, M]: largest magnitude of IR

    def _folded(self):
        return 0                                                     # sums are over q - zero_point already

    def _fold(self, _):
        return 0

    def _rounded(self):
        """Integer basis, float64 [M, R, S]."""
        b = _Round.apply(_slowed(self.basis.double(), self.basis_pace) / self.step, self.low, 127)
        bound = float((self.reach @ b.detach().abs().sum((1, 2))).max())
        if bound > BIAS.hi:
            b = _standing((b * (BIAS.hi / bound)).trunc(), b)
        return b

    def integers(self, changes, weights):
        """As `_Convolution.integers`, of the kernel ``sum_m T B``."""
        kernel = torch.einsum("kcm,mrs->kcrs", self.coefficients, self._rounded())
        return kernel, self._rounded_bias(self._scales(changes, weights)[1], kernel)

    def run(self, u, weights, bias, residual, r, geometry, reduced):
        if not self.saturates:
            return super().run(u, weights, bias, residual, r, geometry, reduced)
        outputs, channels, count = self.coefficients.shape
        rows = self.coefficients.transpose(1, 2).reshape(outputs * count, channels, 1, 1).float()
        basis = self._rounded().expand(outputs, -1, -1, -1)
        # one sum of up to 65536 inputs of 8 bits and a sign is exact in float32
        limit = 1 << self.layer.intermediate_bits - 1
        exact = float((self.reach @ basis[0].detach().abs().sum((1, 2))).max()) < _EXACT
        with torch.backends.nnpack.flags(enabled=False):
            ir = functional.conv2d(u, rows).clamp(-limit, limit - 1)
            if exact:
                sums = functional.conv2d(ir, basis.float(), **geometry | {"groups": outputs})
            else:
                sums = functional.conv2d(ir.double(), basis, **geometry | {"groups": outputs})
        return _Rescale.apply(sums, bias, r.scale, residual, r.residual, r)

    def to_layer(self, r, changes):
        _, kept = self.stored(r, changes)
        metrics = {k: v for k, v in self.layer.metrics.items() if k not in _STALE} | {"retrained": True}
        return replace(self.layer, basis=self._rounded().numpy().astype(np.int8), metrics=metrics, **kept)


# -- the network -------------------------------------------------------------------------------------------------------
class IntegerNetwork(nn.Module):
    """Trainable twin of a package.

    Args:
        network: compress.network.Network of any layers.
        graph: compress.graph.Graph it was made from, or None. Where it has a layer's float weights, training starts
            from them instead of the package's rounded ones, and elements that a pattern chose but rounding made 0 may
            come back; masks never change.
        learn_scales: ``none``; ``weights``, a scale per output channel; ``activations``, a scale per tensor but the
            input's (max pooling keeps its input's); ``all``. They stay within a factor of 8 of the package's.
    Raises: InputError if ``graph`` is another network, or for an unknown word.

    Without training, `to_network` gives the arrays of ``network``. Under ``torch.autocast`` only the convolutions of
    the backward pass are bfloat16; the integers stay exact. Equality with golden needs PyTorch's default precision of
    float32 convolutions (no reduced precision in ``torch.backends``).
    """

    def __init__(self, network, graph=None, *, learn_scales="none"):
        super().__init__()
        fields.choice(learn_scales, "learn_scales", LEARNED)
        self.network = network
        nodes = {} if graph is None else {n.name: n for n in graph.convolutions}
        learn = learn_scales in ("weights", "all")
        self.layers = nn.ModuleList()
        for layer in network.layers:
            if isinstance(layer, Convolution):
                made = _Convolution(layer, network, nodes.get(layer.name), learn=learn)
            elif isinstance(layer, BasisConvolution):
                made = _Basis(layer, network, learn=learn)
            else:
                made = _Channelwise(layer, network)
            self.layers.append(made)
        self.last = {t: i for i, layer in enumerate(network.layers) for t in (layer.input, layer.residual)}
        #: Logarithm of every layer's output scale over the package's, in order; None where they are fixed.
        self.scale_change = None
        if learn_scales in ("activations", "all"):
            self.scale_change = nn.Parameter(torch.zeros(len(network.layers)))
            sizes = [math.prod(network.tensors[layer.output].shape) for layer in network.layers]
            # LSQ, section 2.2: 1 / sqrt(elements * levels)
            self.register_buffer("pace", (torch.tensor(sizes) * 127.0).rsqrt().double(), persistent=False)

    def _formats(self):
        """({tensor: logarithm of its scale over the package's}, [(changes of weights, Requantizer) of each layer])."""
        zero = torch.zeros((), dtype=torch.float64)
        changes, formats = {self.network.input: zero}, []
        if self.scale_change is not None:
            limit = math.log(_LARGEST_CHANGE)
            learned = _Clip.apply(torch.nan_to_num(self.scale_change.double()), -limit, limit)
            learned = _slowed(learned, self.pace)
        for i, module in enumerate(self.layers):
            layer, weights = module.layer, module.changes()
            if isinstance(layer, Pool) and layer.kind == "max":
                changes[layer.output] = changes[layer.input]
            else:
                own = zero if self.scale_change is None else learned[i]
                moved = weights is not None or any(
                    changes[t].requires_grad or _plain(changes[t]) for t in (layer.input, layer.residual) if t)
                if moved and (least := module.least(changes, weights)) > _plain(own):
                    own = torch.tensor(least, dtype=torch.float64)
                changes[layer.output] = own
            formats.append((weights, module.requantizer(changes, weights)))
        return changes, formats

    def _quantized(self, x):
        """u of the input, as `compress.engine.quantize_input`; x: float [N, C, H, W] or [N, C]."""
        t = self.network.tensors[self.network.input]
        if x.ndim == 2:
            x = x[:, :, None, None]
        q = torch.round(x.double() / t.scale) + t.zero_point
        return _compact((q.clamp(-128, 127) - t.zero_point).float())

    def _run(self, x, *, keep=False):
        """({tensor: u}, changes of scales)."""
        reduced = torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", enabled=False):
            return self._run_exact(x, keep, reduced)

    def _run_exact(self, x, keep, reduced):
        changes, formats = self._formats()
        values = {self.network.input: self._quantized(x)}
        for i, (module, (weights, r)) in enumerate(zip(self.layers, formats)):
            layer = module.layer
            values[layer.output] = module(values[layer.input], values.get(layer.residual), r, (changes, weights),
                                          reduced)
            for t in {layer.input, layer.residual} - {None, self.network.output}:
                if not keep and self.last[t] == i:
                    del values[t]
        return values, changes

    def forward(self, x):
        """Real outputs, float32 [N, values in NCHW order].

        Args: x: float [N, C, H, W], normalised as for the network, or [N, C] where maps are 1 x 1.
        """
        values, changes = self._run(x)
        change = changes[self.network.output]
        scale = self.network.tensors[self.network.output].scale * change.exp()
        return (values[self.network.output] * scale.float()).flatten(1)

    @torch.no_grad()
    def tensors(self, x):
        """{name: int8 [N, H, W, C]} of every tensor, as ``compress.engine.run(…, keep=True)``."""
        values, _ = self._run(x, keep=True)
        raw = {name: u + self.network.tensors[name].zero_point for name, u in values.items()}
        return {name: q.permute(0, 2, 3, 1).to(torch.int8).contiguous().numpy() for name, q in raw.items()}

    @torch.no_grad()
    def to_network(self):
        """The package's network with the trained integers: same patterns, masks and zero points; figures of the float
        weights and accuracies of before are left out.

        Raises: InputError if a parameter is not finite.
        """
        changes, formats = self._formats()
        layers = tuple(module.to_layer(r, (changes, weights))
                       for module, (weights, r) in zip(self.layers, formats))
        if self.scale_change is not None and not bool(torch.isfinite(self.scale_change).all()):
            raise InputError("must be finite (training diverged)", field="scale_change")
        tensors = {name: replace(t, scale=t.scale * math.exp(_plain(changes[name])))
                   for name, t in self.network.tensors.items()}
        facts = {k: v for k, v in self.network.provenance.items() if k != "accuracy"}
        network = replace(self.network, layers=layers, tensors=tensors, provenance=facts | {"retrained": True})
        validate.network(network)
        return network
