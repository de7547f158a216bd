"""The rules of a `compress.network.Network`: structure first (needs shapes only), then the contents of the arrays.

`structure` never looks at an element, so a loader can run it on arrays that do not exist yet.
"""
import math
import re

import numpy as np

from compress import basis as bases
from compress.graph import output_size
from compress.network import Add, BasisConvolution, Convolution, Pool
from golden import structured
from spec.config import Pattern
from spec.errors import InputError

MAX_LAYERS = 65536
MAX_DIM = 1 << 16
MAX_ELEMENTS = 1 << 26
MAX_KERNEL = 1024
MAX_TERMS = 8
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]{0,63}", re.ASCII)
#: Formats a layer may name; the patterns themselves are in the terms. A stage of a chain is dense in itself.
FORMAT = re.compile(r"dense|nm:\d{1,2}:\d{1,2}|tasd:\d{1,2}:\d{1,2}(\+\d{1,2}:\d{1,2}){0,7}"
                    r"|(svd|tucker|tt):\d{1,4}(\.\d{1,6})?", re.ASCII)
#: Formats of a basis layer: M and the density or pattern, as far as they are known.
BASIS_FORMAT = re.compile(r"basis(:(\d{1,4})(@(\d{1,2}:\d{1,2})|@[01](\.\d{1,12})?|@[1-9](\.\d{1,12})?e-\d{1,2})?)?",
                          re.ASCII)
#: Widths at which the intermediate of a basis layer may saturate.
INTERMEDIATE_BITS = (8, 32)


def integer(value, lo, hi, field):
    """``value`` if it is a plain integer in lo..hi. Raises InputError."""
    if type(value) is not int or not lo <= value <= hi:
        raise InputError(f"must be an integer in {lo}..{hi}", field=field, value=value)
    return value


def name(value, field):
    """``value`` if it is a name of 1..64 letters, digits, _ and dots, not starting with a dot. Raises InputError."""
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise InputError("must be a name of 1..64 letters, digits, _ and .", field=field, value=value)
    return value


def _same(field, value, expected, what):
    if value != expected:
        raise InputError(f"must be {expected} ({what})", field=field, value=value)


def network(net):
    """All rules. Raises: InputError naming layer or tensor and the rule."""
    structure(net)
    contents(net)


def structure(net):
    """Names, graph order, shapes, dtypes and field ranges; array contents are not read."""
    name(net.name, "network.name")
    if not 1 <= len(net.layers) <= MAX_LAYERS:
        raise InputError(f"must have 1..{MAX_LAYERS} layers", field="network", value=len(net.layers))
    for key, t in net.tensors.items():
        where = f"tensor {key!r}"
        name(t.name, where)
        _same(f"{where} name", t.name, key, "its key")
        for side in ("height", "width", "channels"):
            integer(getattr(t, side), 1, MAX_DIM, f"{where} {side}")
        if math.prod(t.shape) > MAX_ELEMENTS:
            raise InputError(f"must have at most {MAX_ELEMENTS} elements", field=where, value=t.shape)
        if type(t.scale) is not float or not math.isfinite(t.scale) or t.scale <= 0:
            raise InputError("must be finite and above 0", field=f"{where} scale", value=t.scale)
        integer(t.zero_point, -128, 127, f"{where} zero_point")
    for end in ("input", "output"):
        if getattr(net, end) not in net.tensors:
            raise InputError("must be one of the tensors", field=f"network.{end}", value=getattr(net, end))
    made, names = {net.input}, set()
    for layer in net.layers:
        where = f"layer {layer.name!r}"
        name(layer.name, where)
        if layer.name in names:
            raise InputError("must not be repeated", field=where)
        names.add(layer.name)
        for what, tensor in (("input", layer.input), ("residual", layer.residual)):
            if tensor is None and what == "residual":
                continue
            if tensor not in net.tensors:
                raise InputError("must be one of the tensors", field=f"{where} {what}", value=tensor)
            if tensor not in made:
                raise InputError("must be made by an earlier layer (a cycle or a wrong order)", field=f"{where} {what}",
                                 value=tensor)
        if layer.output not in net.tensors:
            raise InputError("must be one of the tensors", field=f"{where} output", value=layer.output)
        if layer.output in made:
            raise InputError("must not be made twice", field=f"{where} output", value=layer.output)
        made.add(layer.output)
        _layer(net, layer, where)
    if missing := sorted(net.tensors.keys() - made):
        raise InputError("must be made by a layer", field=f"tensor {missing[0]!r}")
    if net.output == net.input:
        raise InputError("must not be the input", field="network.output", value=net.output)


def _layer(net, layer, where):
    source, output = net.tensors[layer.input], net.tensors[layer.output]
    if isinstance(layer, Convolution):
        shape = _convolution(layer, source, where)
    elif isinstance(layer, BasisConvolution):
        shape = _basis_convolution(layer, source, where)
    elif isinstance(layer, Pool):
        if layer.kind not in ("max", "average"):
            raise InputError("must be max or average", field=f"{where} kind", value=layer.kind)
        _integers(layer.window, 2, 1, MAX_KERNEL, f"{where} window")
        shape = (*_window(layer, source, layer.window, (1, 1), where), source.channels)
        if layer.residual is not None:
            raise InputError("must not be given for pooling", field=f"{where} residual", value=layer.residual)
    elif isinstance(layer, Add):
        if layer.residual is None:
            raise InputError("must be given for an addition", field=f"{where} residual")
        shape = source.shape
    else:
        raise InputError("must be a convolution, a basis convolution, a pool or an addition", field=where,
                         value=type(layer).__name__)
    _same(f"{where} output", output.shape, shape, "the shape that its input and window give")
    r = layer.requantization
    for part, dtype in (("bias", np.int32), ("multiplier", np.uint16), ("shift", np.uint8)):
        _array(getattr(r, part), dtype, (output.channels,), f"{where} {part}")
    for part in ("zero_point", "low", "high", "residual_zero_point"):
        integer(getattr(r, part), -128, 127, f"{where} {part}")
    integer(r.residual_multiplier, 0, 65535, f"{where} residual_multiplier")
    _same(f"{where} zero_point", r.zero_point, output.zero_point, "the output tensor's")
    if r.low > r.high:
        raise InputError(f"must be at most high ({r.high})", field=f"{where} low", value=r.low)
    if layer.residual is None:
        _same(f"{where} residual_multiplier", r.residual_multiplier, 0, "it has no residual")
        _same(f"{where} residual_zero_point", r.residual_zero_point, 0, "it has no residual")
    else:
        residual = net.tensors[layer.residual]
        _same(f"{where} residual", residual.shape, output.shape, "the output's shape")
        _same(f"{where} residual_zero_point", r.residual_zero_point, residual.zero_point, "the residual tensor's")


def _convolution(layer, source, where):
    if not 1 <= len(layer.terms) <= MAX_TERMS:
        raise InputError(f"must have 1..{MAX_TERMS} terms", field=f"{where} terms", value=len(layer.terms))
    if not isinstance(layer.format, str) or not FORMAT.fullmatch(layer.format):
        raise InputError("must be dense, nm:N:M, tasd:N:M+N:M…, svd:F, tucker:F or tt:F", field=f"{where} format",
                         value=layer.format)
    kind, _, rest = layer.format.partition(":")
    written = rest.split("+") if kind in ("nm", "tasd") else []
    if written:
        _same(f"{where} format", written, [str(t.pattern) for t in layer.terms], "the patterns of its terms")
    elif any(not t.dense for t in layer.terms):
        raise InputError("must name the patterns of its terms", field=f"{where} format", value=layer.format)
    shape = layer.terms[0].values.shape
    if len(shape) != 4 or not all(1 <= d <= MAX_DIM for d in shape) or math.prod(shape) > MAX_ELEMENTS:
        raise InputError("must be [outputs, kernel_h, kernel_w, channels / groups] of legal size",
                         field=f"{where} values", value=shape)
    for t in layer.terms:
        _array(t.values, np.int8, shape, f"{where} values")
    outputs, *kernel, depth = shape
    integer(layer.groups, 1, MAX_DIM, f"{where} groups")
    if depth * layer.groups != source.channels or outputs % layer.groups:
        raise InputError(f"must divide {source.channels} inputs into {depth} each, and {outputs} outputs",
                         field=f"{where} groups", value=layer.groups)
    _integers(layer.dilation, 2, 1, MAX_KERNEL, f"{where} dilation")
    _integers(tuple(kernel), 2, 1, MAX_KERNEL, f"{where} kernel")
    if layer.weight_scale is not None:
        _array(layer.weight_scale, np.float64, (outputs,), f"{where} weight_scale")
    return (*_window(layer, source, kernel, layer.dilation, where), outputs)


def _basis_convolution(layer, source, where):
    shape, (outputs, depth, count) = _basis_shapes(layer, where)
    _same(f"{where} coefficients", depth, source.channels, "the input's channels")
    written = BASIS_FORMAT.fullmatch(layer.format) if isinstance(layer.format, str) else None
    if written is None:
        raise InputError("must be basis, basis:M, basis:M@density or basis:M@N:G", field=f"{where} format",
                         value=layer.format)
    if written[2] is not None:
        _same(f"{where} format", int(written[2]), count, "the number of its basis kernels")
    pattern = layer.pattern
    if pattern is not None:
        good = isinstance(pattern, Pattern) and all(type(v) is int for v in pattern)
        if not good or not 1 <= pattern.n <= pattern.m <= 64:
            raise InputError("must be an N:M pattern with 1 <= N <= M <= 64, or none", field=f"{where} pattern",
                             value=pattern)
    if written[3] is not None:
        own = pattern and str(pattern)
        if (written[4] or None) != own:
            raise InputError("must name the pattern of its coefficients", field=f"{where} format", value=layer.format)
    integer(layer.intermediate_bits, *INTERMEDIATE_BITS, f"{where} intermediate_bits")
    _integers(layer.dilation, 2, 1, MAX_KERNEL, f"{where} dilation")
    if layer.weight_scale is not None:
        _array(layer.weight_scale, np.float64, (outputs,), f"{where} weight_scale")
    return (*_window(layer, source, shape[1:], layer.dilation, where), outputs)


def _basis_shapes(layer, where):
    """Shapes of basis [M, R, S] and coefficients [K, C, M], of legal size and int8."""
    found = []
    for part, ndim, meaning in (("basis", 3, "[M, kernel_h, kernel_w]"),
                                ("coefficients", 3, "[outputs, channels, M]")):
        array = getattr(layer, part)
        shape = array.shape if isinstance(array, np.ndarray) else ()
        if len(shape) != ndim or not all(1 <= d <= MAX_DIM for d in shape) or math.prod(shape) > MAX_ELEMENTS:
            raise InputError(f"must be {meaning} of legal size", field=f"{where} {part}", value=shape)
        _array(array, np.int8, shape, f"{where} {part}")
        found.append(shape)
    basis, coefficients = found
    if max(basis[1:]) > MAX_KERNEL:
        raise InputError(f"must be at most {MAX_KERNEL} x {MAX_KERNEL}", field=f"{where} basis", value=basis)
    _same(f"{where} coefficients", coefficients[2], basis[0], "the number of basis kernels")
    return basis, coefficients


def _window(layer, source, kernel, dilation, where):
    _integers(layer.stride, 2, 1, MAX_DIM, f"{where} stride")
    _integers(layer.pads, 4, 0, MAX_KERNEL, f"{where} pads")
    top, left, bottom, right = layer.pads
    size = (output_size(source.height, kernel[0], layer.stride[0], top, bottom, dilation[0]),
            output_size(source.width, kernel[1], layer.stride[1], left, right, dilation[1]))
    if min(size) < 1:
        raise InputError("must fit the padded input", field=f"{where} window", value=tuple(kernel))
    return size


def _integers(values, count, lo, hi, field):
    if not isinstance(values, tuple) or len(values) != count:
        raise InputError(f"must be {count} integers", field=field, value=values)
    for v in values:
        integer(v, lo, hi, field)


def _array(array, dtype, shape, field):
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != tuple(shape):
        have = (str(array.dtype), array.shape) if isinstance(array, np.ndarray) else array
        raise InputError(f"must be {np.dtype(dtype)} of shape {tuple(shape)}", field=field, value=have)


def contents(net):
    """What needs the elements: at most N per block, shifts, positive finite scales, sums that fit 32 bits."""
    for layer in net.layers:
        where = f"layer {layer.name!r}"
        r = layer.requantization
        if int(r.shift.max()) > 31:
            raise InputError("must be in 0..31", field=f"{where} shift", value=int(r.shift.max()))
        if not isinstance(layer, (Convolution, BasisConvolution)):
            continue
        if layer.weight_scale is not None and not (np.isfinite(layer.weight_scale) & (layer.weight_scale > 0)).all():
            raise InputError("must be finite and above 0", field=f"{where} weight_scale")
        if isinstance(layer, BasisConvolution):
            _basis_contents(layer, net.tensors[layer.input].zero_point, where)
            continue
        for t in layer.terms:
            if not t.dense and not structured.fits(t.values, t.pattern):
                raise InputError(f"must have at most {t.pattern.n} non-zeros in each block of {t.pattern.m} channels",
                                 field=f"{where} values")
        if int(np.abs(layer.effective_weights().astype(np.int64)).sum(axis=(1, 2, 3)).max()) * 128 >= 1 << 31:
            raise InputError("must not be able to leave a 32-bit accumulator", field=f"{where} values")


def _basis_contents(layer, zero_point, where):
    if layer.coefficients.min() < -1 or layer.coefficients.max() > 1:
        raise InputError("must be -1, 0 or 1", field=f"{where} coefficients")
    p = layer.pattern
    if p is not None and not structured.fits(layer.coefficients, p, axis=1):
        raise InputError(f"must have at most {p.n} non-zeros in each block of {p.m} channels",
                         field=f"{where} coefficients")
    if bases.largest_accumulator(layer.basis, layer.coefficients, zero_point, layer.intermediate_bits) >= 1 << 31:
        raise InputError("must not be able to leave a 32-bit accumulator", field=f"{where} basis")
