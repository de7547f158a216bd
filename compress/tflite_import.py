"""int8 TFLite file -> `compress.graph.Graph` that keeps the file's scales and integers (`graph.Integers`).

The file is a FlatBuffer, and the library that reads it verifies nothing: an offset may point anywhere, a vector may
claim any length. So it is read in two steps. `_File` copies what is needed into plain values, every length and
reference checked first; `_Importer` then judges their meaning. What cannot be imported is refused by an InputError that
names operator and reason.

Operators (all activations int8): CONV_2D, DEPTHWISE_CONV_2D, FULLY_CONNECTED, ADD, AVERAGE_POOL_2D, MAX_POOL_2D, MEAN
over rows and columns, RESHAPE, PAD before a convolution or average pool, SOFTMAX at the end (left out), QUANTIZE and
DEQUANTIZE at the ends. An ADD stays a layer of its own, since its operands were rounded and clamped to their own
scales; a fused activation becomes the layer's clamp. docs/numerics.md has what differs from TFLite's own kernels, by
operator.

Sources: TFLite schema version 3 (tensorflow/lite/schema/schema.fbs); "TensorFlow Lite 8-bit quantization
specification" (https://ai.google.dev/edge/litert/models/quantization_spec); activation limits and padding as in
tensorflow/lite/kernels/kernel_util.cc and padding.h.
"""
from dataclasses import dataclass, replace
from hashlib import sha256
import math
from pathlib import Path
import struct

import numpy as np
import tflite

from compress.graph import Add, Conv, Graph, Integers, Pool, layer_name, node_shape, unique_name
from compress.validate import MAX_DIM, MAX_ELEMENTS, MAX_KERNEL
from spec.errors import InputError
from spec.strict_yaml import read_regular_file

MAX_FILE_BYTES = 512 << 20
#: Most operators, tensors and buffers.
MAX_ITEMS = 65536
#: Most inputs of an operator, and dimensions of a tensor.
MAX_INPUTS, MAX_RANK = 16, 8
MAX_NAME = 4096
#: Most weights in all layers together: a small file may let many operators share one buffer.
MAX_WEIGHTS = 1 << 27
#: Scales beyond these cannot come from a working network and would leave float32.
MIN_SCALE, MAX_SCALE = 1e-30, 1e6
#: Largest difference of a bias scale from input scale * weight scale, in units of the output scale (as TFLite).
BIAS_TOLERANCE = 0.02
SCHEMA_VERSION = 3

#: What reading a damaged FlatBuffer can raise.
_READ_ERRORS = (struct.error, IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, MemoryError)
_TYPES = {value: name for name, value in vars(tflite.TensorType).items() if isinstance(value, int)}
_ACTIVATIONS = {value: name for name, value in vars(tflite.ActivationFunctionType).items() if isinstance(value, int)}
#: Real limits of fused activations (low, high).
_LIMITS = {"NONE": (None, None), "RELU": (0, None), "RELU_N1_TO_1": (-1, 1), "RELU6": (0, 6)}
_WINDOW = ("Padding", "StrideH", "StrideW", "FusedActivationFunction")
_DILATION = ("DilationHFactor", "DilationWFactor")
#: Options that are read, by operator: table of the schema, its fields.
_OPTIONS = {
    "CONV_2D": (tflite.Conv2DOptions, (*_WINDOW, *_DILATION)),
    "DEPTHWISE_CONV_2D": (tflite.DepthwiseConv2DOptions, (*_WINDOW, *_DILATION, "DepthMultiplier")),
    "FULLY_CONNECTED": (tflite.FullyConnectedOptions, ("FusedActivationFunction", "WeightsFormat")),
    "ADD": (tflite.AddOptions, ("FusedActivationFunction",)),
    "AVERAGE_POOL_2D": (tflite.Pool2DOptions, (*_WINDOW, "FilterHeight", "FilterWidth")),
    "MAX_POOL_2D": (tflite.Pool2DOptions, (*_WINDOW, "FilterHeight", "FilterWidth")),
    "SOFTMAX": (tflite.SoftmaxOptions, ("Beta",)),
}


def load(path):
    """Import an int8 TFLite file.

    Returns: Graph with ``integers``; its weights and biases are the real values of the file's integers.
    Raises: InputError, naming the file and what in it is wrong or unsupported.
    """
    path = Path(path)
    data = read_regular_file(path, max_bytes=MAX_FILE_BYTES)
    try:
        return parse(data, name=layer_name(path.stem) or "network")
    except InputError as error:
        raise error.within(path) from None


def parse(data, *, name="network"):
    """Import the bytes of a TFLite file; see `load`."""
    return _Importer(_File(data), name=name, digest=sha256(data).hexdigest()).build()


# -- the file as plain values ------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """``data``: its elements as a view of the file, None for what operators make. ``scale``, ``zero_point``: float64
    and int64 arrays, empty without quantisation."""

    name: str
    type: str
    dims: tuple[int, ...]
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int
    data: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class _Operator:
    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: dict | None


def _count(length, most, what, field):
    """``length`` if it is at most ``most``: before anything walks along a vector."""
    if length > most:
        raise InputError(f"must have at most {most} {what}", field=field, value=length)
    return length


def _vector(vector, dtype, where):
    """A vector as ``dtype``, empty if it is absent (0 in the FlatBuffer interface)."""
    if np.isscalar(vector):
        return np.zeros(0, dtype)
    if not np.isfinite(vector).all():               # before the cast: a signalling NaN warns there
        raise InputError("must have finite scales", field=where)
    return vector.astype(dtype)


class _File:
    """The first subgraph of a TFLite file: ``tensors``, ``operators``, ``inputs``, ``outputs``."""

    def __init__(self, data):
        if data[4:8] != b"TFL3":
            raise InputError("must be a TFLite file (it has no TFL3 mark)")
        try:
            self._read(data)
        except InputError:
            raise
        except _READ_ERRORS as error:
            raise InputError(f"must be an undamaged TFLite file ({type(error).__name__} in its tables)") from None

    def _read(self, data):
        self.model = model = tflite.Model.GetRootAs(data, 0)
        if model.Version() != SCHEMA_VERSION:
            raise InputError(f"must be {SCHEMA_VERSION}", field="schema version", value=model.Version())
        if model.SubgraphsLength() != 1:
            raise InputError("must have one subgraph", field="model", value=model.SubgraphsLength())
        graph = model.Subgraphs(0)
        self.codes = [self._code(model.OperatorCodes(n))
                      for n in range(_count(model.OperatorCodesLength(), MAX_ITEMS, "operator codes", "model"))]
        _count(model.BuffersLength(), MAX_ITEMS, "buffers", "model")
        self.tensors = tuple(self._tensor(n, graph.Tensors(n))
                             for n in range(_count(graph.TensorsLength(), MAX_ITEMS, "tensors", "model")))
        self.operators = tuple(self._operator(n, graph.Operators(n))
                               for n in range(_count(graph.OperatorsLength(), MAX_ITEMS, "operators", "model")))
        self.inputs = self._references(graph, "Inputs", "model inputs")
        self.outputs = self._references(graph, "Outputs", "model outputs")

    @staticmethod
    def _code(code):
        number = max(code.DeprecatedBuiltinCode(), code.BuiltinCode())         # the older field holds up to 127
        if number == tflite.BuiltinOperator.CUSTOM:
            return f"custom operator {_text(code.CustomCode() or b'', 'custom operator')[:64]}"
        return tflite.utils.BUILTIN_OPCODE2NAME.get(number, f"operator {number}")

    def _references(self, table, side, where):
        """Indices of tensors; -1 stands for an optional one that is left out."""
        count = _count(getattr(table, f"{side}Length")(), MAX_INPUTS, side.lower(), where)
        found = tuple(int(getattr(table, side)(n)) for n in range(count))
        for index in found:
            if not -1 <= index < len(self.tensors):
                raise InputError(f"must refer to one of {len(self.tensors)} tensors", field=where, value=index)
        return found

    def _tensor(self, number, tensor):
        where = f"tensor {number}"
        rank = _count(tensor.ShapeLength(), MAX_RANK, "dimensions", where)
        dims = tuple(int(tensor.Shape(n)) for n in range(rank))
        if any(not 0 <= d <= MAX_ELEMENTS for d in dims) or math.prod(dims) > MAX_ELEMENTS:
            raise InputError(f"must have dimensions of 0 or more and at most {MAX_ELEMENTS} elements", field=where,
                             value=dims)
        if tensor.Sparsity() is not None or tensor.IsVariable():
            raise InputError("must not be sparse or a variable", field=where)
        scale, zero_point, axis = np.zeros(0), np.zeros(0, np.int64), 0
        quantization = tensor.Quantization()
        if quantization is not None:
            if quantization.DetailsType() != 0:
                raise InputError("must not have a custom quantisation", field=where)
            _count(max(quantization.ScaleLength(), quantization.ZeroPointLength()), MAX_DIM, "scales", where)
            scale = _vector(quantization.ScaleAsNumpy(), np.float64, where)
            zero_point = _vector(quantization.ZeroPointAsNumpy(), np.int64, where)
            axis = quantization.QuantizedDimension()
        return _Tensor(name=_text(tensor.Name() or b"", where), type=_TYPES.get(tensor.Type(), str(tensor.Type())),
                       dims=dims, scale=scale, zero_point=zero_point, axis=axis, data=self._data(tensor, where))

    def _data(self, tensor, where):
        if tensor.Buffer() >= self.model.BuffersLength():
            raise InputError(f"must refer to one of {self.model.BuffersLength()} buffers", field=where,
                             value=tensor.Buffer())
        buffer = self.model.Buffers(tensor.Buffer())
        if buffer.Offset() > 1 or buffer.Size() > 1:
            raise InputError("must have its data inside the FlatBuffer", field=where)
        return buffer.DataAsNumpy() if buffer.DataLength() else None

    def _operator(self, number, operator):
        where = f"operator {number}"
        if not 0 <= operator.OpcodeIndex() < len(self.codes):
            raise InputError(f"must refer to one of {len(self.codes)} operator codes", field=where,
                             value=operator.OpcodeIndex())
        kind, options = self.codes[operator.OpcodeIndex()], None
        table, fields = _OPTIONS.get(kind, (None, ()))
        if table is not None and operator.BuiltinOptionsType() == getattr(tflite.BuiltinOptions, table.__name__):
            union, reader = operator.BuiltinOptions(), table()
            if union is not None:
                reader.Init(union.Bytes, union.Pos)
                options = {field: getattr(reader, field)() for field in fields}
        return _Operator(kind=kind, inputs=self._references(operator, "Inputs", where),
                         outputs=self._references(operator, "Outputs", where), options=options)


def _text(raw, where):
    text = raw.decode("utf-8", "replace") if len(raw) <= MAX_NAME else None
    if text is None or not text.isprintable():
        raise InputError(f"name must be printable text of at most {MAX_NAME} bytes", field=where, value=raw[:64])
    return text


# -- the network -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class _Value:
    """An activation of the file: the NHWC tensor that holds it, and what operators still have to know.

    ``dims``: sizes that TFLite sees, without batch; a RESHAPE changes them and not the tensor. ``pads``: rows and
    columns (top, left, bottom, right) of a PAD that its readers apply; part of ``dims``. ``end``: the operator after
    which nothing may compute.
    """

    tensor: str
    dims: tuple[int, ...]
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    end: str | None = None


class _Importer:
    def __init__(self, file, *, name, digest):
        self.file, self.name, self.digest = file, name, digest
        self.values, self.shapes, self.formats, self.nodes, self.notes = {}, {}, {}, [], []
        self.weights, self.biases, self.weight_count = {}, {}, 0
        self.tensor_names, self.layer_names = {}, {}
        self.where = "model"

    # -- the whole -----------------------------------------------------------------------------------------------
    def build(self):
        self._read_input()
        for number, operator in enumerate(self.file.operators):
            self._read_operator(number, operator)
        output = self._output()
        nodes = self._live(output.tensor)
        used = {t for n in nodes for t in (*n.inputs, n.output)}
        names = {n.name for n in nodes}
        integers = Integers(tensors={t: f for t, f in self.formats.items() if t in used},
                            weights={n: w for n, w in self.weights.items() if n in names},
                            biases={n: b for n, b in self.biases.items() if n in names})
        return Graph(name=self.name, input=self.input, output=output.tensor, nodes=nodes, layout="NHWC",
                     shapes={t: s for t, s in self.shapes.items() if t in used}, integers=integers,
                     flat_input=len(self.source.dims) == 2, flat_output=len(output.dims) == 1, notes=tuple(self.notes),
                     source_digest=self.digest, metadata={"schema": SCHEMA_VERSION})

    def _read_input(self):
        if len(self.file.inputs) != 1 or len(self.file.outputs) != 1 or -1 in self.file.inputs + self.file.outputs:
            raise InputError("must have one input and one output", field="model",
                             value=(self.file.inputs, self.file.outputs))
        index = self.file.inputs[0]
        self.source = tensor = self.file.tensors[index]
        self.where = f"input {tensor.name[:64]!r}"
        if tensor.type not in ("INT8", "UINT8", "FLOAT32"):
            raise InputError("must be INT8, or UINT8 or FLOAT32 with a QUANTIZE behind it", field=self.where,
                             value=tensor.type)
        if tensor.data is not None:
            raise InputError("must not have data in the file", field=self.where)
        if not 2 <= len(tensor.dims) <= 4 or not 1 <= tensor.dims[0] <= MAX_DIM:
            raise InputError("must have 2 to 4 dimensions, the batch first", field=self.where, value=tensor.dims)
        self.batch, *dims = tensor.dims
        self.input = unique_name(tensor.name, self.tensor_names, "input")
        self._shape(self.input, (1,) * (3 - len(dims)) + tuple(dims))
        if tensor.type == "INT8":
            self.formats[self.input] = self._format(tensor)
        self.values[index] = _Value(tensor=self.input, dims=tuple(dims))

    def _output(self):
        index = self.file.outputs[0]
        if index not in self.values:
            raise InputError("must be made by an operator", field=f"output tensor {index}")
        value = self.values[index]
        self.where = f"output {self.file.tensors[index].name[:64]!r}"
        self._no_pads(value)
        if value.tensor == self.input:
            raise InputError("must have at least one layer to run between input and output")
        return value

    def _live(self, output):
        """The nodes that ``output`` depends on, in order."""
        live = {output}
        for node in reversed(self.nodes):
            if node.output in live:
                live |= set(node.inputs)
        nodes = tuple(n for n in self.nodes if n.output in live)
        if dropped := len(self.nodes) - len(nodes):
            self.notes.append(f"{dropped} operators that the output does not depend on are left out")
        return nodes

    def _shape(self, tensor, shape):
        if any(not 1 <= d <= MAX_DIM for d in shape) or math.prod(shape) > MAX_ELEMENTS:
            raise InputError(f"makes a tensor [height, width, channels] = {list(shape)}; each must be in 1..{MAX_DIM}, "
                             f"all together at most {MAX_ELEMENTS} elements", field=self.where)
        self.shapes[tensor] = tuple(int(d) for d in shape)

    # -- operators -----------------------------------------------------------------------------------------------
    def _read_operator(self, number, operator):
        self.number, self.operator = number, operator
        self.where = f"operator {number} ({operator.kind})"
        reader = getattr(self, f"_op_{operator.kind}", None)
        if reader is None:
            known = ", ".join(sorted(n[4:] for n in dir(self) if n.startswith("_op_")))
            raise InputError(f"is not supported; supported: {known}", field=self.where)
        if len(operator.outputs) != 1 or operator.outputs[0] < 0:
            raise InputError("must have one output", field=self.where, value=operator.outputs)
        self.index = operator.outputs[0]
        self.made = self.file.tensors[self.index]
        if self.index in self.values or self.made.data is not None:
            raise InputError(f"must not make tensor {self.index}, which is there already", field=self.where)
        if operator.kind in _OPTIONS and operator.options is None:
            raise InputError(f"must have options of type {_OPTIONS[operator.kind][0].__name__}", field=self.where)
        self.options = operator.options
        reader()

    def _inputs(self, least, most):
        """Tensor indices, -1 for optional ones that are left out."""
        found = self.operator.inputs
        if not least <= len(found) <= most or -1 in found[:least]:
            raise InputError(f"must have {least}..{most} inputs", field=self.where, value=found)
        return found + (-1,) * (most - len(found))

    def _any_value(self, index):
        if index not in self.values:
            raise InputError(f"must read what an earlier operator makes, not tensor {index}", field=self.where)
        return self.values[index]

    def _value(self, index, *, rank=None, padded=False):
        """An int8 activation to compute with; as a map of ``rank`` 3 where the operator needs rows and columns."""
        value, kind = self._any_value(index), self.file.tensors[index].type
        if kind != "INT8":
            raise InputError("must read INT8 (quantise the network to full integers)", field=self.where, value=kind)
        if value.end is not None:
            raise InputError("is only supported at the end of the network", field=value.end)
        if not padded:
            self._no_pads(value)
        top, left, bottom, right = value.pads
        height, width, channels = self.shapes[value.tensor]
        if rank is not None and value.dims != (height + top + bottom, width + left + right, channels):
            raise InputError(f"must read a tensor of [batch, {height}, {width}, {channels}] as it was made",
                             field=self.where, value=value.dims)
        return value

    def _no_pads(self, value):
        if any(value.pads):
            raise InputError("must not read a PAD directly: it is only supported before convolutions and average pools",
                             field=self.where)

    def _format(self, tensor):
        """(scale, zero point) of an int8 or uint8 activation."""
        if tensor.scale.shape != (1,) or tensor.zero_point.size > 1:
            raise InputError(f"tensor {tensor.name[:64]!r} must have one scale and zero point", field=self.where,
                             value=(tensor.scale.size, tensor.zero_point.size))
        scale, zero_point = float(tensor.scale[0]), int(tensor.zero_point.sum())
        least = 0 if tensor.type == "UINT8" else -128
        if not MIN_SCALE <= scale <= MAX_SCALE or not least <= zero_point <= least + 255:
            raise InputError(f"tensor {tensor.name[:64]!r} must have a scale in {MIN_SCALE:g}..{MAX_SCALE:g} and a "
                             f"zero point in {least}..{least + 255}", field=self.where, value=(scale, zero_point))
        return scale, zero_point

    def _made_format(self):
        """Format of the operator's output, an int8 activation."""
        if self.made.type != "INT8":
            raise InputError("must make INT8", field=self.where, value=self.made.type)
        return self._format(self.made)

    def _elements(self, index, kinds, what):
        """Elements of a constant in its shape, a view of the file."""
        tensor = self.file.tensors[index] if index >= 0 else None
        if tensor is None or tensor.data is None or index in self.values:
            raise InputError(f"{what} must be a constant of the file", field=self.where, value=index)
        if tensor.type not in kinds:
            raise InputError(f"{what} must be {' or '.join(kinds)}", field=self.where, value=tensor.type)
        dtype = np.dtype(tensor.type.lower()).newbyteorder("<")
        if tensor.data.size != math.prod(tensor.dims) * dtype.itemsize or not tensor.data.size:
            raise InputError(f"{what} must have the bytes of its shape {list(tensor.dims)}", field=self.where,
                             value=tensor.data.size)
        return tensor.data.view(dtype).reshape(tensor.dims)

    def _emit(self, node, *, dims=None):
        """Add a node; the tensor it makes has the file's format and must have the shape that follows from its input.

        ``dims``: sizes of its output as the file may state them, if not [height, width, channels].
        """
        self._new_tensor()
        shape = node_shape(node, self.shapes[node.input])
        self._shape(self.tensor, shape)
        stated = self._stated()
        if stated not in (dims or (shape,)):
            raise InputError(f"must make a tensor of [{self.batch}, {', '.join(map(str, (dims or (shape,))[0]))}]",
                             field=self.where, value=self.made.dims)
        self.nodes.append(replace(node, output=self.tensor))
        self.values[self.index] = _Value(tensor=self.tensor, dims=stated)

    def _stated(self):
        """Dimensions of the operator's output as the file has them, without batch."""
        if not self.made.dims or self.made.dims[0] != self.batch:
            raise InputError(f"must keep the batch of {self.batch}", field=self.where, value=self.made.dims)
        return self.made.dims[1:]

    def _new_tensor(self):
        """Name and format of the operator's output."""
        self.tensor = unique_name(self.made.name.partition(";")[0], self.tensor_names, f"tensor_{self.index}")
        self.formats[self.tensor] = self._made_format()

    def _shared(self, value):
        """Name, input and clamp of a node, and no output yet.

        The limits are those of TFLite in integers, -128 and 127 or, tighter, ``zero_point + round(limit / scale)`` with
        halves away from zero in float32, as the real values of these integers: the float network saturates like them.
        """
        kind = _ACTIVATIONS.get(self.options["FusedActivationFunction"], "unknown") if self.options else "NONE"
        if kind not in _LIMITS:
            raise InputError(f"must have the activation {', '.join(_LIMITS)}", field=self.where, value=kind)
        scale, zero_point = self._made_format()
        limits = []
        for limit, end, tighter in zip(_LIMITS[kind], (-128, 127), (max, min)):
            steps = end - zero_point
            if limit is not None:
                ratio = float(np.float32(limit) / np.float32(scale))
                steps = tighter(steps, math.copysign(math.floor(abs(ratio) + 0.5), ratio))
            limits.append(scale * steps)
        name = unique_name(self.made.name.partition(";")[0], self.layer_names,
                           f"{self.operator.kind.lower()}_{self.number}")
        return {"name": name, "input": value.tensor, "output": "", "low": limits[0], "high": limits[1]}

    # -- convolutions --------------------------------------------------------------------------------------------
    def _window(self, value, kernel, dilation=(1, 1)):
        """Stride and pads (top, left, bottom, right) of a window on ``value``, those of a PAD before it included."""
        o = self.options
        stride = self._sizes((o["StrideH"], o["StrideW"]), MAX_DIM, "stride")
        span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
        pads = [0, 0, 0, 0]
        if o["Padding"] == tflite.Padding.SAME:
            for axis in (0, 1):
                size = value.dims[axis]
                need = max(0, (-(-size // stride[axis]) - 1) * stride[axis] + span[axis] - size)
                pads[axis], pads[axis + 2] = need // 2, need - need // 2
        elif o["Padding"] != tflite.Padding.VALID:
            raise InputError("padding must be SAME or VALID", field=self.where, value=o["Padding"])
        for axis in (0, 1):
            if value.dims[axis] + pads[axis] + pads[axis + 2] < span[axis]:
                raise InputError(f"window of {span[axis]} must fit the padded input", field=self.where,
                                 value=value.dims)
        total = tuple(a + b for a, b in zip(pads, value.pads))
        for axis, pad in zip((0, 1, 0, 1), total):
            if pad >= span[axis] or pad > MAX_KERNEL:
                raise InputError(f"pads must be smaller than the window, at most {MAX_KERNEL}", field=self.where,
                                 value=total)
        return stride, total, any(pads)

    def _sizes(self, pair, most, what):
        if any(not 1 <= v <= most for v in pair):
            raise InputError(f"{what} must be in 1..{most}", field=self.where, value=pair)
        return tuple(int(v) for v in pair)

    def _take_weights(self, index, axis):
        """(tensor, int8 elements) of a weight whose output channels are along ``axis``."""
        values, tensor = self._elements(index, ("INT8",), "weight"), self.file.tensors[index]
        outputs = tensor.dims[axis] if tensor.dims else 0
        good = tensor.scale.size == 1 or tensor.scale.size == outputs and tensor.axis == axis
        if not good or tensor.zero_point.any():
            raise InputError("weight must have one scale, or one for each output channel, and zero point 0",
                             field=self.where, value=(tensor.scale.size, tensor.axis))
        scale = np.broadcast_to(tensor.scale, (outputs,)).copy()
        if not ((scale >= MIN_SCALE) & (scale <= MAX_SCALE)).all():
            raise InputError(f"weight scales must be in {MIN_SCALE:g}..{MAX_SCALE:g}", field=self.where)
        self.weight_count += values.size
        if self.weight_count > MAX_WEIGHTS:
            raise InputError(f"and those before must have at most {MAX_WEIGHTS} weights", field=self.where,
                             value=self.weight_count)
        return values, scale

    def _convolution(self, value, values, scale, bias, **fields):
        """A node of int8 ``values`` [K, R, S, C / groups], its integers kept."""
        shared = self._shared(value)
        outputs, unit = len(values), self.formats[value.tensor][0] * scale
        integers = np.zeros(outputs, np.int64)
        if bias >= 0:
            integers, tensor = self._elements(bias, ("INT32",), "bias").astype(np.int64), self.file.tensors[bias]
            if integers.shape != (outputs,):
                raise InputError(f"bias must have {outputs} elements", field=self.where, value=integers.shape)
            if tensor.scale.size not in (0, 1, outputs) or tensor.zero_point.any():
                raise InputError("bias must have one scale, or one for each output channel, and zero point 0",
                                 field=self.where, value=tensor.scale.size)
            apart = np.abs(unit - tensor.scale) if tensor.scale.size else np.zeros(1)
            if not apart.max() <= BIAS_TOLERANCE * self._format(self.made)[0]:
                raise InputError("bias scale must be input scale * weight scale", field=self.where)
        values = np.ascontiguousarray(values)
        self.weights[shared["name"]], self.biases[shared["name"]] = (values, scale), integers
        return Conv(**shared, weights=values * scale.astype(np.float32)[:, None, None, None],
                    bias=(integers * unit).astype(np.float32), **fields)

    def _op_CONV_2D(self):
        x, w, b = self._inputs(2, 3)
        value = self._value(x, rank=3, padded=True)
        values, scale = self._take_weights(w, 0)
        self._rank(values, 4)
        outputs, *kernel, depth = values.shape
        channels = value.dims[2]
        if channels % depth or outputs % (channels // depth):
            raise InputError(f"weight must divide {channels} input and {outputs} output channels into groups",
                             field=self.where, value=values.shape)
        self._spatial(value, values, scale, b, kernel, channels // depth)

    def _op_DEPTHWISE_CONV_2D(self):
        x, w, b = self._inputs(2, 3)
        value = self._value(x, rank=3, padded=True)
        values, scale = self._take_weights(w, 3)
        self._rank(values, 4)
        one, *kernel, outputs = values.shape
        channels, multiplier = value.dims[2], self.options["DepthMultiplier"]
        if one != 1 or outputs % channels or multiplier not in (0, outputs // channels):
            raise InputError(f"weight must be [1, rows, columns, {channels} * depth multiplier]", field=self.where,
                             value=(values.shape, multiplier))
        self._spatial(value, values.transpose(3, 1, 2, 0), scale, b, kernel, channels)

    def _rank(self, values, rank):
        if values.ndim != rank:
            raise InputError(f"weight must have {rank} dimensions", field=self.where, value=values.shape)

    def _spatial(self, value, values, scale, bias, kernel, groups):
        self._sizes(kernel, MAX_KERNEL, "kernel")
        dilation = self._sizes([self.options[f] for f in _DILATION], MAX_KERNEL, "dilation")
        stride, pads, _ = self._window(value, kernel, dilation)
        self._emit(self._convolution(value, values, scale, bias, stride=stride, pads=pads, dilation=dilation,
                                     groups=groups))

    def _op_FULLY_CONNECTED(self):
        x, w, b = self._inputs(2, 3)
        value = self._value(x)
        values, scale = self._take_weights(w, 0)
        self._rank(values, 2)
        shape = self.shapes[value.tensor]
        if self.options["WeightsFormat"] != tflite.FullyConnectedOptionsWeightsFormat.DEFAULT:
            raise InputError("weights must be in the default format", field=self.where,
                             value=self.options["WeightsFormat"])
        if values.shape[1] != math.prod(shape) or max(shape[:2]) > MAX_KERNEL:
            raise InputError(f"weight must have {math.prod(shape)} input features, of a map of at most {MAX_KERNEL} x "
                             f"{MAX_KERNEL}", field=self.where, value=values.shape)
        outputs = len(values)
        self._emit(self._convolution(value, values.reshape(outputs, *shape), scale, b),
                   dims=((outputs,), (1, outputs), (1, 1, outputs)))

    # -- channel by channel --------------------------------------------------------------------------------------
    def _op_ADD(self):
        first, second = (self._value(index) for index in self._inputs(2, 2))
        shapes = [self.shapes[v.tensor] for v in (first, second)]
        if first.dims != second.dims or shapes[0] != shapes[1]:
            raise InputError("operands must have equal shapes (no broadcasting)", field=self.where,
                             value=(first.dims, second.dims))
        self._emit(Add(**self._shared(first), residual=second.tensor), dims=(first.dims,))

    def _same_format(self, value):
        if self._made_format() != self.formats[value.tensor]:
            raise InputError("must keep scale and zero point of its input", field=self.where,
                             value=(self._made_format(), self.formats[value.tensor]))

    def _pool(self, kind):
        (x,) = self._inputs(1, 1)
        value = self._value(x, rank=3, padded=kind == "average")
        self._same_format(value)
        o = self.options
        window = self._sizes((o["FilterHeight"], o["FilterWidth"]), MAX_KERNEL, "window")
        stride, pads, same = self._window(value, window)
        if kind == "average" and same:
            raise InputError("must not need padding (SAME): the hardware divides every window by its full size",
                             field=self.where, value=pads)
        self._emit(Pool(**self._shared(value), kind=kind, window=window, stride=stride, pads=pads))

    def _op_AVERAGE_POOL_2D(self):
        self._pool("average")

    def _op_MAX_POOL_2D(self):
        self._pool("max")

    def _op_MEAN(self):
        x, a = self._inputs(2, 2)
        value = self._value(x, rank=3)
        axes = {int(v) + 4 * int(v < 0) for v in self._elements(a, ("INT32",), "axes").reshape(-1)[:MAX_INPUTS]}
        if not axes <= {1, 2}:
            raise InputError("must be taken over rows and columns (axes 1 and 2)", field=self.where, value=sorted(axes))
        window = tuple(size if axis in axes else 1 for axis, size in zip((1, 2), value.dims))
        self._sizes(window, MAX_KERNEL, "map")
        node = Pool(**self._shared(value), kind="average", window=window, stride=(1, 1))
        kept = node_shape(node, value.dims)
        self._emit(node, dims=(kept, tuple(d for axis, d in enumerate(kept, 1) if axis not in axes)))

    # -- shapes and ends -----------------------------------------------------------------------------------------
    def _op_RESHAPE(self):
        value = self._value(self._inputs(1, 2)[0])
        self._same_format(value)
        dims = self._stated()
        if math.prod(dims) != math.prod(value.dims) or not dims:
            raise InputError("must keep the number of elements", field=self.where, value=self.made.dims)
        unread = value.tensor == self.input and not any(self.input in n.inputs for n in self.nodes)
        if unread and len(dims) == 3:
            self._shape(self.input, dims)          # the order in memory is the same: the input simply has this shape
        self.values[self.index] = replace(value, dims=dims)

    def _op_PAD(self):
        x, p = self._inputs(2, 2)
        value = self._value(x, rank=3)
        self._same_format(value)
        pads = self._elements(p, ("INT32", "INT64"), "paddings")
        if pads.shape != (4, 2) or pads[[0, 3]].any() or pads.min() < 0 or pads.max() > MAX_KERNEL:
            raise InputError(f"paddings must be [4, 2], rows and columns only, in 0..{MAX_KERNEL}", field=self.where,
                             value=pads.tolist() if pads.size <= 16 else pads.shape)
        (top, bottom), (left, right) = pads[1:3].tolist()
        dims = (value.dims[0] + top + bottom, value.dims[1] + left + right, value.dims[2])
        if self._stated() != dims:
            raise InputError(f"must make a tensor of {[self.batch, *dims]}", field=self.where, value=self.made.dims)
        self.values[self.index] = replace(value, dims=dims, pads=(top, left, bottom, right))

    def _op_SOFTMAX(self):
        (x,) = self._inputs(1, 1)
        value = self._value(x)
        if math.prod(value.dims) != value.dims[-1] or not self.options["Beta"] > 0 or self._stated() != value.dims:
            raise InputError("must run along the classes of [batch, classes], with beta above 0", field=self.where,
                             value=(value.dims, self.options["Beta"]))
        self.notes.append(f"{self.where} at the end is left out: it does not change the order of the classes")
        self.values[self.index] = replace(value, end=self.where)

    def _op_QUANTIZE(self):
        (x,) = self._inputs(1, 1)
        value, tensor = self._any_value(x), self.file.tensors[x]
        if self._stated() != value.dims:
            raise InputError("must keep the shape", field=self.where, value=self.made.dims)
        scale, zero_point = self._format(self.made)
        if x == self.file.inputs[0] and tensor.type != "INT8" and self.made.type == "INT8":
            if tensor.type == "UINT8" and self._format(tensor) != (scale, zero_point + 128):
                raise InputError("must keep the scale and move the zero point by 128", field=self.where,
                                 value=(self._format(tensor), (scale, zero_point)))
            if self.formats.setdefault(value.tensor, (scale, zero_point)) != (scale, zero_point):
                raise InputError("must quantise the input in one way", field=self.where)
            self.values[self.index] = value
        elif (tensor.type, self.made.type) == ("INT8", "UINT8") and (scale, zero_point - 128) == self._format(tensor):
            self.values[self.index] = replace(value, end=self.where)
        else:
            raise InputError("is only supported from the input to INT8, and to UINT8 of equal scale at the end",
                             field=self.where, value=(tensor.type, self.made.type))

    def _op_DEQUANTIZE(self):
        (x,) = self._inputs(1, 1)
        value, kind = self._any_value(x), self.file.tensors[x].type
        if kind not in ("INT8", "UINT8") or self.made.type != "FLOAT32" or self._stated() != value.dims:
            raise InputError("is only supported from int8 to FLOAT32, at the end", field=self.where,
                             value=(kind, self.made.type))
        self.values[self.index] = replace(value, end=value.end or self.where)
