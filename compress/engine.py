"""Runs a compressed network in software: exact integers through `golden`, and the source file through ONNX Runtime."""
from pathlib import Path

import numpy as np

from compress.graph import top1
from compress.network import BasisConvolution, Convolution, Pool
from golden import basis, convolution, pooling, requantize
from spec.errors import InputError

#: Intermediates of a basis layer that are computed at once.
_CHUNK = 1 << 22


def quantize_input(network, x):
    """Float [N, H, W, C] -> int8: ``clip(round(x / scale) + zero_point)``, halves to even."""
    t = network.tensors[network.input]
    x = _shaped(network, x)
    if not np.isfinite(x).all():
        raise InputError("must be finite (NaN or infinity found)", field="input data")
    return np.clip(np.round(x.astype(np.float64) / t.scale) + t.zero_point, -128, 127).astype(np.int8)


def dequantize_output(network, y):
    """int8 of the output tensor -> float64: ``scale * (y - zero_point)``."""
    t = network.tensors[network.output]
    return t.scale * (np.asarray(y, np.float64) - t.zero_point)


def _shaped(network, x):
    x, shape = np.asarray(x), network.tensors[network.input].shape
    if x.ndim != 4 or x.shape[1:] != shape:
        raise InputError(f"must be [N, {', '.join(map(str, shape))}]", field="input data", value=tuple(x.shape))
    return x


def accumulators(layer, network, values):
    """int64 accumulators [N, Ho, Wo, K] of one layer, before bias and rounding; ``values``: int8 by tensor name."""
    x, zero_point = values[layer.input], network.tensors[layer.input].zero_point
    if isinstance(layer, Convolution):
        acc = convolution.accumulate(x, layer.effective_weights(), stride=layer.stride, pads=layer.pads,
                                     dilation=layer.dilation, groups=layer.groups, pad_value=zero_point)
        return convolution.check_accumulator(acc)
    if isinstance(layer, BasisConvolution):
        return convolution.check_accumulator(_basis_accumulators(layer, x, zero_point))
    if isinstance(layer, Pool):
        if layer.kind == "max":
            return pooling.max_pool(x, layer.window, stride=layer.stride, pads=layer.pads).astype(np.int64)
        return pooling.average_pool_sum(x, layer.window, stride=layer.stride, pads=layer.pads, pad_value=zero_point)
    return x.astype(np.int64)


def _basis_accumulators(layer, x, zero_point):
    """Sums over ``x - zero_point``, coefficients first; IR saturates at the layer's width. Outputs are independent, so
    parts of batch and outputs bound the memory."""
    x = x.astype(np.int16) - np.int16(zero_point)
    outputs, _, count = layer.coefficients.shape
    per_output = x.shape[1] * x.shape[2] * count
    step = int(np.clip(_CHUNK // per_output, 1, outputs))
    batch = max(1, _CHUNK // (per_output * step))
    parts = [basis.IntegerDecomposition(basis=layer.basis, coefficients=layer.coefficients[at:at + step])
             for at in range(0, outputs, step)]
    return np.concatenate([
        np.concatenate([part.run(x[at:at + batch], stride=layer.stride, pads=layer.pads, dilation=layer.dilation,
                                 intermediate_bits=layer.intermediate_bits).output for part in parts], axis=3)
        for at in range(0, max(1, len(x)), batch)])


def run_layer(layer, network, values, *, read=None):
    """int8 output of one layer.

    ``read``: callback (layer, int8 input) -> int8 that the layer reads in its place; its residual operand stays.
    """
    r = layer.requantization
    source = values if read is None else values | {layer.input: read(layer, values[layer.input])}
    return requantize.requantize(
        accumulators(layer, network, source), bias=r.bias, multiplier=r.multiplier, shift=r.shift,
        zero_point=r.zero_point, low=r.low, high=r.high,
        residual=None if layer.residual is None else values[layer.residual],
        residual_zero_point=r.residual_zero_point, residual_multiplier=r.residual_multiplier)


def run(network, x, *, keep=False, read=None, progress=None):
    """Integer-exact forward pass.

    Args:
        x: int8 [N, H, W, C] (see `quantize_input`).
        keep: return a dict of every tensor instead of the output alone.
        read: see `run_layer`.
        progress: called with (layer name, fraction).
    Raises: InputError for data of another shape or type; OverflowError if a sum leaves 32 bits.
    """
    x = _shaped(network, x)
    if x.dtype != np.int8:
        raise InputError("must be int8", field="input data", value=str(x.dtype))
    values = {network.input: x}
    last = {t: i for i, layer in enumerate(network.layers) for t in (layer.input, layer.residual)}
    for i, layer in enumerate(network.layers):
        values[layer.output] = run_layer(layer, network, values, read=read)
        if not keep:
            for t in {layer.input, layer.residual} - {None, network.output}:
                if last[t] == i:
                    del values[t]
        if progress:
            progress(layer.name, (i + 1) / len(network.layers))
    return values if keep else values[network.output]


def predict(network, x, *, batch=256, read=None):
    """Float outputs [N, H, W, C] of float inputs [N, H, W, C] by the integer network; ``read``: see `run_layer`."""
    parts = (quantize_input(network, x[at:at + batch]) for at in range(0, len(x), batch))
    return np.concatenate([dequantize_output(network, run(network, part, read=read)) for part in parts])


def accuracy(network, x, labels, *, batch=256, read=None):
    """Share of samples whose largest output is the label.

    Args: x: float [N, H, W, C]; labels: int [N]; read: see `run_layer`.
    """
    labels = np.asarray(labels)
    if not len(labels) or labels.shape != (len(x),):
        raise InputError(f"must be one for each of {len(x)} samples", field="labels", value=labels.shape)
    return float((top1(predict(network, x, batch=batch, read=read)) == labels).mean())


def run_onnx(path, x):
    """Output of an ONNX file in ONNX Runtime; ``x``: float array in the file's own layout ([N, C, H, W] or [N, F]).

    Raises: InputError if the file cannot be loaded or does not accept the data.
    """
    import onnxruntime                                     # slow to import, and only needed here
    from onnxruntime.capi import onnxruntime_pybind11_state as codes
    refusals = (codes.Fail, codes.InvalidArgument, codes.InvalidGraph, codes.InvalidProtobuf, codes.NoSuchFile,
                codes.NotImplemented, codes.RuntimeException)
    if not Path(path).is_file():
        raise InputError("must be a readable file", source=path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return session.run(None, {session.get_inputs()[0].name: np.asarray(x, np.float32)})[0]
    except refusals as error:
        raise InputError(f"must run in ONNX Runtime ({str(error).splitlines()[0][:160]})", source=path) from None
