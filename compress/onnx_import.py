"""ONNX file -> `compress.graph.Graph`: every attribute, dimension and size is checked here, before any array exists.

The ONNX checker lets much through (zero strides, groups that do not divide the channels, raw data longer than the
shape, opset 9999), so nothing is taken on trust. What cannot be imported exactly is refused by an InputError that names
node, operator and reason; nothing is silently approximated.
"""
from dataclasses import dataclass, replace
from hashlib import sha256
import math
from pathlib import Path
import re

from google.protobuf.message import DecodeError
import numpy as np
import onnx
from onnx import AttributeProto, TensorProto

from compress.graph import Add, Conv, Graph, Pool, node_shape, unique_name
from spec.errors import InputError
from spec.strict_yaml import read_regular_file

MAX_FILE_BYTES = 512 << 20
MAX_NODES = 65536
#: Largest height, width or channel count.
MAX_DIM = 1 << 16
#: Most elements in one activation tensor (of one sample) or one weight tensor.
MAX_ELEMENTS = 1 << 26
MAX_KERNEL = 1024
MAX_PAD = 1023
MIN_OPSET, MAX_OPSET = 7, 28
MAX_NAME = 1024
#: Weights beyond this cannot come from a working network and would overflow float32 arithmetic.
MAX_WEIGHT = 1e12

_DTYPES = {TensorProto.FLOAT: np.float32, TensorProto.DOUBLE: np.float64, TensorProto.FLOAT16: np.float16,
           TensorProto.INT64: np.int64, TensorProto.INT32: np.int32}
#: Protobuf field that holds the elements when raw_data does not.
_TYPED = {TensorProto.FLOAT: "float_data", TensorProto.DOUBLE: "double_data", TensorProto.INT64: "int64_data",
          TensorProto.INT32: "int32_data", TensorProto.FLOAT16: "int32_data"}
_MISSING = object()


@dataclass(frozen=True, kw_only=True)
class _Value:
    """A tensor of the ONNX graph: the NHWC tensor that holds it, and whether ONNX sees it as [batch, features]."""

    tensor: str
    flat: bool


@dataclass(frozen=True, kw_only=True)
class _Affine:
    """Per-channel ``scale * x + shift`` (batch normalisation, a constant operand); folded or made a 1 x 1 layer."""

    name: str
    input: str
    output: str
    scale: np.ndarray
    shift: np.ndarray


@dataclass(frozen=True, kw_only=True)
class _Clamp:
    """Activation, before it finds its producer."""

    name: str
    input: str
    output: str
    low: float | None
    high: float | None


def load(path):
    """Import an ONNX file.

    Returns: Graph, batch normalisation, biases, activations and residual sums already fused.
    Raises: InputError, naming the file and what in it is wrong or unsupported.
    """
    path = Path(path)
    data = read_regular_file(path, max_bytes=MAX_FILE_BYTES)
    try:
        return parse(data, name=unique_name(path.stem, {}, "network"))
    except InputError as error:
        raise error.within(path) from None


def parse(data, *, name="network"):
    """Import the bytes of an ONNX file; see `load`."""
    if not data:
        raise InputError("must not be an empty file")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except (DecodeError, RecursionError, ValueError) as error:
        raise InputError(f"must be an ONNX model ({type(error).__name__}: truncated or not protobuf)") from None
    return _Importer(model, name=name, digest=sha256(data).hexdigest()).build()


class _Attributes:
    """The attributes of one node, each read with its type and range; `close` refuses those that nobody read."""

    def __init__(self, node, where):
        self.where, self.read, self.table = where, set(), {}
        for attribute in node.attribute:
            if attribute.name in self.table:
                raise InputError(f"must not repeat attribute {attribute.name!r}", field=where)
            if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS, AttributeProto.SPARSE_TENSOR,
                                  AttributeProto.SPARSE_TENSORS) or attribute.ref_attr_name:
                raise InputError(f"must not use subgraphs, sparse tensors or references (attribute {attribute.name!r})",
                                 field=where)
            self.table[attribute.name] = attribute

    def _get(self, name, kind, field):
        self.read.add(name)
        attribute = self.table.get(name)
        if attribute is None:
            return _MISSING
        if attribute.type != kind:
            raise InputError(f"attribute {name} must be of type {AttributeProto.AttributeType.Name(kind)}",
                             field=self.where)
        return getattr(attribute, field)

    def _range(self, name, value, lo, hi):
        if not lo <= value <= hi:
            raise InputError(f"attribute {name} must be in {lo}..{hi}", field=self.where, value=value)
        return value

    def integer(self, name, default, lo, hi):
        value = self._get(name, AttributeProto.INT, "i")
        return default if value is _MISSING else self._range(name, int(value), lo, hi)

    def real(self, name, default, lo, hi):
        value = self._get(name, AttributeProto.FLOAT, "f")
        return default if value is _MISSING else self._range(name, float(value), lo, hi)

    def integers(self, name, default, count, lo, hi):
        value = self._get(name, AttributeProto.INTS, "ints")
        if value is _MISSING:
            return default
        if len(value) != count:
            raise InputError(f"attribute {name} must have {count} elements", field=self.where, value=list(value)[:8])
        return tuple(self._range(name, int(v), lo, hi) for v in value)

    def text(self, name, default):
        value = self._get(name, AttributeProto.STRING, "s")
        return default if value is _MISSING else bytes(value).decode("ascii", "replace")

    def tensor(self, name):
        value = self._get(name, AttributeProto.TENSOR, "t")
        return None if value is _MISSING else value

    def close(self):
        if extra := sorted(self.table.keys() - self.read):
            raise InputError(f"attribute {extra[0]!r} is not supported", field=self.where)


class _Importer:
    def __init__(self, model, *, name, digest):
        self.model, self.graph, self.name, self.digest = model, model.graph, name, digest
        self.constants, self.arrays = {}, {}
        self.values, self.shapes, self.items, self.notes = {}, {}, [], []
        self.layer_names, self.tensor_names = {}, {}
        self.softmax = None

    # -- the whole -----------------------------------------------------------------------------------------------
    def build(self):
        self._check_model()
        for tensor in self.graph.initializer:
            self._add_constant(tensor.name, tensor)
        self._read_input()
        for index, node in enumerate(self.graph.node):
            self._read_node(index, node)
        output = self._output()
        nodes = self._fuse(output.tensor)
        if not nodes:
            raise InputError("must have at least one layer to run between input and output")
        used = {t for n in nodes for t in (*n.inputs, n.output)}
        return Graph(name=self.name, input=self.input, output=output.tensor, nodes=tuple(nodes),
                     shapes={t: s for t, s in self.shapes.items() if t in used}, flat_input=self.flat_input,
                     flat_output=output.flat, notes=tuple(self.notes), source_digest=self.digest,
                     metadata={"ir_version": self.model.ir_version, "opset": self.opset,
                               "producer": self.model.producer_name[:64]})

    def _check_model(self):
        model, graph = self.model, self.graph
        if not model.HasField("graph") or not graph.node:
            raise InputError("must contain a graph with nodes")
        if not 3 <= model.ir_version <= 64:
            raise InputError("must be in 3..64", field="ir_version", value=model.ir_version)
        domains = [o.domain for o in model.opset_import]
        if len(set(domains)) != len(domains):
            raise InputError("must not repeat an operator set (two files joined?)", field="opset_import")
        sets = {("" if o.domain == "ai.onnx" else o.domain): o.version for o in model.opset_import}
        self.opset = sets.get("", 0)
        if not MIN_OPSET <= self.opset <= MAX_OPSET:
            raise InputError(f"of the standard operators must be in {MIN_OPSET}..{MAX_OPSET}", field="opset_import",
                             value=self.opset)
        if len(graph.node) > MAX_NODES or len(graph.initializer) > MAX_NODES:
            raise InputError(f"must have at most {MAX_NODES} nodes and initializers", field="graph",
                             value=max(len(graph.node), len(graph.initializer)))
        if model.functions or graph.sparse_initializer or graph.quantization_annotation or model.training_info:
            raise InputError("must not hold functions, sparse initializers, quantisation notes or training graphs",
                             field="graph")

        named = [model.producer_name, graph.name]
        for info in (*graph.input, *graph.output):
            named.append(info.name)
        for tensor in graph.initializer:
            named.append(tensor.name)
        for node in graph.node:
            named += [node.name, node.op_type, node.domain, *node.input, *node.output]
            named += [a.name for a in node.attribute]
        for text in named:                  # protobuf hands out bytes where a string is not UTF-8
            if not isinstance(text, str) or not text.isprintable() or len(text) > MAX_NAME:
                raise InputError(f"must be printable UTF-8 text of at most {MAX_NAME} characters", field="name",
                                 value=text)

    # -- constants -----------------------------------------------------------------------------------------------
    def _add_constant(self, name, tensor):
        if not name:
            raise InputError("must have a name", field="initializer")
        if name in self.constants or name in self.values:
            raise InputError("must be defined once", field=f"tensor {name!r}")
        where = f"initializer {name!r}"
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise InputError("must lie inside the file; external data are not read", field=where)
        if tensor.HasField("segment"):
            raise InputError("must not be segmented", field=where)
        if tensor.data_type not in _DTYPES:
            known = TensorProto.DataType.Name(tensor.data_type) if tensor.data_type in TensorProto.DataType.values() \
                else tensor.data_type
            raise InputError("must be FLOAT, DOUBLE, FLOAT16, INT64 or INT32", field=where, value=known)
        dims = list(tensor.dims)
        if len(dims) > 5 or any(not 0 <= d <= MAX_ELEMENTS for d in dims):
            raise InputError(f"must have at most 5 dimensions in 0..{MAX_ELEMENTS}", field=where, value=dims[:8])
        count = math.prod(dims)
        if count > MAX_ELEMENTS:
            raise InputError(f"must have at most {MAX_ELEMENTS} elements", field=where, value=dims)
        typed = getattr(tensor, _TYPED[tensor.data_type])
        others = sum(len(getattr(tensor, f)) for f in
                     ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data"))
        itemsize = np.dtype(_DTYPES[tensor.data_type]).itemsize
        if tensor.raw_data and others:
            raise InputError("must hold its elements once, raw or typed", field=where)
        have = len(tensor.raw_data) / itemsize if tensor.raw_data else len(typed)
        if have != count or others not in (0, len(typed)):
            raise InputError(f"must hold exactly the {count} elements of its shape {dims}", field=where,
                             value=int(have) if have == int(have) else have)
        self.constants[name] = tensor

    def _array(self, name, where):
        """Elements of a constant as float64 or int64; refuses what is not finite."""
        if name in self.arrays:
            return self.arrays[name]
        tensor = self.constants[name]
        dtype = np.dtype(_DTYPES[tensor.data_type])
        if tensor.raw_data:
            array = np.frombuffer(tensor.raw_data, dtype.newbyteorder("<"))
        elif tensor.data_type == TensorProto.FLOAT16:
            bits = np.array(tensor.int32_data, np.int64)
            if bits.size and (bits.min() < 0 or bits.max() > 0xFFFF):
                raise InputError(f"initializer {name!r} must hold 16-bit patterns", field=where)
            array = bits.astype(np.uint16).view(np.float16)
        else:
            array = np.array(getattr(tensor, _TYPED[tensor.data_type]), dtype)
        array = array.reshape(tuple(tensor.dims))
        if dtype.kind == "f":
            if not np.isfinite(array).all():            # before the cast: a signalling NaN warns there
                raise InputError(f"initializer {name!r} must be finite (NaN or infinity found)", field=where)
            array = array.astype(np.float64)
            if array.size and np.abs(array).max() > MAX_WEIGHT:
                raise InputError(f"initializer {name!r} must not exceed {MAX_WEIGHT:g} in magnitude", field=where,
                                 value=float(np.abs(array).max()))
        else:
            array = array.astype(np.int64)
        self.arrays[name] = array
        return array

    def _weights(self, name, where, ndim):
        array = self._array(name, where)
        if array.dtype != np.float64 or array.ndim not in ndim or array.size == 0:
            raise InputError(f"initializer {name!r} must hold floats, in {' or '.join(map(str, ndim))} dimensions, "
                             "none of them 0", field=where, value=array.shape)
        return array

    # -- input and output ----------------------------------------------------------------------------------------
    def _read_input(self):
        inputs = [i for i in self.graph.input if i.name not in self.constants]
        if len(inputs) != 1 or len(self.graph.output) != 1:
            raise InputError("must have one input and one output", field="graph",
                             value=([i.name for i in inputs][:8], [o.name for o in self.graph.output][:8]))
        info, where = inputs[0], f"input {inputs[0].name!r}"
        kind = info.type.tensor_type
        if info.type.WhichOneof("value") != "tensor_type" or kind.elem_type != TensorProto.FLOAT:
            raise InputError("must be a FLOAT tensor", field=where)
        if not info.name:
            raise InputError("must have a name", field="input")
        if not kind.HasField("shape") or len(kind.shape.dim) not in (2, 4):
            raise InputError("must have shape [N, C, H, W] or [N, features]", field=where)
        batch, *dims = kind.shape.dim
        if batch.HasField("dim_value") and not 1 <= batch.dim_value <= MAX_DIM:
            raise InputError(f"batch size must be symbolic or in 1..{MAX_DIM}", field=where, value=batch.dim_value)
        sizes = []
        for axis, dim in enumerate(dims, 1):
            if not dim.HasField("dim_value"):
                raise InputError(f"dimension {axis} must be a number; only the batch may be symbolic", field=where,
                                 value=dim.dim_param)
            if not 1 <= dim.dim_value <= MAX_DIM:
                raise InputError(f"dimension {axis} must be in 1..{MAX_DIM}", field=where, value=dim.dim_value)
            sizes.append(dim.dim_value)
        channels, height, width = sizes if len(sizes) == 3 else (sizes[0], 1, 1)
        self.input = unique_name(info.name, self.tensor_names, "input")
        self.flat_input = len(sizes) == 1
        self._shape(self.input, (height, width, channels), where)
        self.values[info.name] = _Value(tensor=self.input, flat=self.flat_input)

    def _output(self):
        name = self.graph.output[0].name
        if self.softmax is not None:
            operator, made, source = self.softmax
            if name != made:
                raise InputError(f"is only supported as the last operator (before output {name!r})", field=operator)
            self.notes.append(f"{operator} at the end is left out: it does not change the order of the classes")
            return source
        if name not in self.values:
            raise InputError("must be made by a node", field=f"output {name!r}")
        return self.values[name]

    def _shape(self, tensor, shape, where):
        if any(not 1 <= d <= MAX_DIM for d in shape) or math.prod(shape) > MAX_ELEMENTS:
            raise InputError(f"makes a tensor [height, width, channels] = {list(shape)}; each must be in 1..{MAX_DIM}, "
                             f"all together at most {MAX_ELEMENTS} elements", field=where)
        self.shapes[tensor] = tuple(int(d) for d in shape)

    # -- nodes ---------------------------------------------------------------------------------------------------
    def _read_node(self, index, node):
        self.index, self.node = index, node
        label = node.name or f"#{index}"
        self.where = f"node {label[:64]!r} ({node.op_type[:32]})"
        if self.softmax is not None:
            raise InputError("is only supported as the last operator", field=self.softmax[0])
        reader = getattr(self, f"_op_{node.op_type}", None) if re.fullmatch(r"[A-Za-z]+", node.op_type) else None
        if node.domain not in ("", "ai.onnx") or reader is None:
            known = ", ".join(sorted(n[4:] for n in dir(self) if n.startswith("_op_")))
            raise InputError(f"operator is not supported; supported: {known}", field=self.where)
        for name in node.input:
            if name and name not in self.values and name not in self.constants:
                raise InputError(f"reads {name[:64]!r}, which no earlier node makes", field=self.where)
        outputs = [o for o in node.output if o]
        if not node.output or not node.output[0]:
            raise InputError("must have an output", field=self.where)
        if len(outputs) > 1 and node.op_type not in ("Dropout", "BatchNormalization"):
            raise InputError("must have one output", field=self.where, value=outputs[:8])
        for name in outputs:
            if name in self.values or name in self.constants:
                raise InputError("must be defined once", field=f"tensor {name!r}")
        self.attributes = _Attributes(node, self.where)
        reader()
        self.attributes.close()

    def _inputs(self, least, most):
        names = list(self.node.input)
        while names and not names[-1]:
            names.pop()
        if not least <= len(names) <= most or any(not n for n in names[:least]):
            raise InputError(f"must have {least}..{most} inputs", field=self.where, value=len(names))
        return names + [""] * (most - len(names))

    def _data(self, name, *, flat=None):
        if name not in self.values:
            raise InputError(f"input {name!r} must come from the network's input, not a constant", field=self.where)
        value = self.values[name]
        if flat is not None and value.flat != flat:
            raise InputError(f"input {name!r} must have rank {2 if flat else 4}", field=self.where)
        return value

    def _constant(self, name, what):
        if name not in self.constants:
            raise InputError(f"{what} must be a constant", field=self.where, value=name)
        return name

    def _layer_name(self):
        return unique_name(self.node.name, self.layer_names, f"{self.node.op_type.lower()}_{self.index}")

    def _define(self, flat=False):
        name = self.node.output[0]
        tensor = unique_name(name, self.tensor_names, f"tensor_{self.index}")
        self.values[name] = _Value(tensor=tensor, flat=flat)
        return tensor

    def _emit(self, item, *, flat=False):
        """Add a node reading ``item.input``; its output tensor and shape follow from it."""
        output = self._define(flat)
        item = replace(item, output=output)
        shape = self.shapes[item.input]
        self._shape(output, shape if isinstance(item, (_Affine, _Clamp)) else node_shape(item, shape), self.where)
        self.items.append(item)

    def _window(self, kernel, dilation, shape, *, ceil=False):
        """Strides and pads (top, left, bottom, right) of a window operation on ``shape``; every rule checked.

        Returns: stride, pads, extra: pixels by which ``ceil`` lengthened the lower and right pads.
        """
        a = self.attributes
        stride = a.integers("strides", (1, 1), 2, 1, MAX_DIM)
        pads = a.integers("pads", None, 4, 0, MAX_PAD)
        auto = a.text("auto_pad", "NOTSET")
        if auto not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
            raise InputError("attribute auto_pad must be NOTSET, VALID, SAME_UPPER or SAME_LOWER", field=self.where,
                             value=auto)
        if auto != "NOTSET" and pads is not None and any(pads):
            raise InputError("must not have both pads and auto_pad", field=self.where, value=auto)
        span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
        size = shape[:2]
        if auto.startswith("SAME"):
            need = [max(0, (-(-n // s) - 1) * s + w - n) for n, s, w in zip(size, stride, span)]
            small, large = [n // 2 for n in need], [-(-n // 2) for n in need]
            first, last = (small, large) if auto == "SAME_UPPER" else (large, small)
            pads = (*first, *last)
        pads = pads or (0, 0, 0, 0)
        extra = [0, 0]
        if ceil:
            for axis in (0, 1):
                free = size[axis] + pads[axis] + pads[axis + 2] - span[axis]
                steps = -(-free // stride[axis])
                if steps * stride[axis] >= size[axis] + pads[axis]:      # a window may not begin in the lower padding
                    steps -= 1
                extra[axis] = max(0, steps * stride[axis] - free)
        pads = (pads[0], pads[1], pads[2] + extra[0], pads[3] + extra[1])
        if any(p > MAX_PAD for p in pads):
            raise InputError(f"must need pads of at most {MAX_PAD}", field=self.where, value=pads)
        for axis in (0, 1):
            if size[axis] + pads[axis] + pads[axis + 2] < span[axis]:
                raise InputError(f"window of {span[axis]} must fit the padded input of "
                                 f"{size[axis] + pads[axis] + pads[axis + 2]}", field=self.where)
            if max(pads[axis], pads[axis + 2] - extra[axis]) >= span[axis]:
                raise InputError("pads must be smaller than the window", field=self.where, value=pads)
        return stride, tuple(int(p) for p in pads), extra

    def _op_Conv(self):
        x, w, b = self._inputs(2, 3)
        value = self._data(x, flat=False)
        weights = self._weights(self._constant(w, "weight"), self.where, (4,))
        outputs, depth, *kernel = weights.shape
        channels = self.shapes[value.tensor][2]
        a = self.attributes
        groups = a.integer("group", 1, 1, MAX_DIM)
        if channels % groups or outputs % groups or depth * groups != channels:
            raise InputError(f"attribute group must divide {channels} input and {outputs} output channels and match "
                             f"the weight's {depth} channels", field=self.where, value=groups)
        if a.integers("kernel_shape", tuple(kernel), 2, 1, MAX_KERNEL) != tuple(kernel) or max(kernel) > MAX_KERNEL:
            raise InputError(f"attribute kernel_shape must equal the weight's {kernel}, at most {MAX_KERNEL}",
                             field=self.where)
        dilation = a.integers("dilations", (1, 1), 2, 1, MAX_KERNEL)
        stride, pads, _ = self._window(kernel, dilation, self.shapes[value.tensor])
        bias = np.zeros(outputs)
        if b:
            bias = self._weights(self._constant(b, "bias"), self.where, (1,))
            if bias.shape != (outputs,):
                raise InputError(f"bias must have {outputs} elements", field=self.where, value=bias.shape)
        self._emit(Conv(name=self._layer_name(), input=value.tensor, output="", bias=bias, stride=stride, pads=pads,
                        weights=weights.transpose(0, 2, 3, 1), dilation=dilation, groups=groups))

    def _dense(self, value, matrix, bias):
        """Matrix product [features, outputs] on a flattened map: a kernel that covers the map, NCHW order undone."""
        height, width, channels = self.shapes[value.tensor]
        features, outputs = matrix.shape
        if features != height * width * channels:
            raise InputError(f"weight must have {height * width * channels} input features", field=self.where,
                             value=features)
        if max(height, width) > MAX_KERNEL:
            raise InputError(f"must cover a map of at most {MAX_KERNEL}", field=self.where, value=(height, width))
        kernel = matrix.T.reshape(outputs, channels, height, width).transpose(0, 2, 3, 1)
        self._emit(Conv(name=self._layer_name(), input=value.tensor, output="", weights=kernel, bias=bias), flat=True)

    def _op_Gemm(self):
        x, w, c = self._inputs(2, 3)
        value = self._data(x, flat=True)
        a = self.attributes
        alpha, beta = a.real("alpha", 1.0, -MAX_WEIGHT, MAX_WEIGHT), a.real("beta", 1.0, -MAX_WEIGHT, MAX_WEIGHT)
        if a.integer("transA", 0, 0, 1):
            raise InputError("attribute transA must be 0", field=self.where, value=1)
        matrix = self._weights(self._constant(w, "weight"), self.where, (2,))
        matrix = alpha * (matrix.T if a.integer("transB", 0, 0, 1) else matrix)
        bias = np.zeros(matrix.shape[1])
        if c:
            bias = bias + beta * self._per_channel(self._constant(c, "bias"), matrix.shape[1], flat=True)
        self._dense(value, matrix, bias)

    def _op_MatMul(self):
        x, w = self._inputs(2, 2)
        matrix = self._weights(self._constant(w, "right operand"), self.where, (2,))
        self._dense(self._data(x, flat=True), matrix, np.zeros(matrix.shape[1]))

    def _per_channel(self, name, channels, *, flat):
        """A constant that broadcasts along everything but the channels, as float64 [channels]."""
        array = self._array(name, self.where)
        axis = array.ndim - (1 if flat else 3)
        good = array.dtype == np.float64 and array.size in (1, channels) and array.ndim <= (2 if flat else 4)
        if good and array.size > 1:
            good = axis >= 0 and array.shape[axis] == channels
        if not good:
            raise InputError(f"constant {name!r} must be one value or one for each of {channels} channels",
                             field=self.where, value=array.shape)
        return np.broadcast_to(array.reshape(-1), (channels,))

    def _affine(self, value, scale, shift):
        if value.flat and self.shapes[value.tensor][:2] != (1, 1):
            raise InputError("must not follow Flatten directly; apply it before flattening", field=self.where)
        self._emit(_Affine(name=self._layer_name(), input=value.tensor, output="", scale=np.array(scale, np.float64),
                           shift=np.array(shift, np.float64)), flat=value.flat)

    def _op_BatchNormalization(self):
        x, *names = self._inputs(5, 5)
        value, a = self._data(x), self.attributes
        channels = self.shapes[value.tensor][2]
        epsilon = a.real("epsilon", 1e-5, 0.0, 1.0)
        a.real("momentum", 0.9, 0.0, 1.0)
        if a.integer("training_mode", 0, 0, 1) or not a.integer("spatial", 1, 0, 1):
            raise InputError("must be in inference mode, per channel", field=self.where)
        if len([o for o in self.node.output if o]) > 1:
            raise InputError("must have one output (inference mode)", field=self.where)
        scale, shift, mean, var = (self._weights(self._constant(n, "parameter"), self.where, (1,)) for n in names)
        if any(p.shape != (channels,) for p in (scale, shift, mean, var)):
            raise InputError(f"parameters must have {channels} elements", field=self.where)
        if (var + epsilon <= 0).any():
            raise InputError("variance + epsilon must be above 0", field=self.where, value=float((var + epsilon).min()))
        gain = scale / np.sqrt(var + epsilon)
        self._affine(value, gain, shift - mean * gain)

    def _op_Mul(self):
        first, second = self._inputs(2, 2)
        if first in self.constants:
            first, second = second, first
        value = self._data(first)
        channels = self.shapes[value.tensor][2]
        scale = self._per_channel(self._constant(second, "one factor"), channels, flat=value.flat)
        self._affine(value, scale, np.zeros(channels))

    def _op_Add(self):
        first, second = self._inputs(2, 2)
        if first in self.constants:
            first, second = second, first
        value = self._data(first)
        if second in self.constants:
            channels = self.shapes[value.tensor][2]
            self._affine(value, np.ones(channels), self._per_channel(second, channels, flat=value.flat))
            return
        other = self._data(second)
        if self.shapes[value.tensor] != self.shapes[other.tensor] or value.flat != other.flat:
            raise InputError("operands must have equal shapes (no broadcasting)", field=self.where,
                             value=(self.shapes[value.tensor], self.shapes[other.tensor]))
        self._emit(Add(name=self._layer_name(), input=value.tensor, residual=other.tensor, output=""), flat=value.flat)

    def _clamp(self, low, high):
        value = self._data(self.node.input[0])
        self._emit(_Clamp(name=self._layer_name(), input=value.tensor, output="", low=low, high=high), flat=value.flat)

    def _op_Relu(self):
        self._inputs(1, 1)
        self._clamp(0.0, None)

    def _op_Clip(self):
        _, *names = self._inputs(1, 3)
        limits = [self.attributes.real(name, None, -3.5e38, 3.5e38) for name in ("min", "max")]
        for i, name in enumerate(names):
            if name:
                array = self._array(self._constant(name, "limit"), self.where)
                if array.size != 1 or array.dtype != np.float64:
                    raise InputError("limits must be single floats", field=self.where, value=array.shape)
                limits[i] = float(array.reshape(()))
        low, high = (None if v is None or abs(v) > MAX_WEIGHT else v for v in limits)
        if low is not None and high is not None and low >= high:
            raise InputError("lower limit must be below the upper one", field=self.where, value=(low, high))
        self._clamp(low, high)

    def _pool(self, kind):
        (x,) = self._inputs(1, 1)
        value, a = self._data(x, flat=False), self.attributes
        if "kernel_shape" not in a.table:
            raise InputError("attribute kernel_shape must be given", field=self.where)
        window = a.integers("kernel_shape", None, 2, 1, MAX_KERNEL)
        if a.integers("dilations", (1, 1), 2, 1, MAX_KERNEL) != (1, 1):
            raise InputError("attribute dilations must be 1", field=self.where)
        ceil = bool(a.integer("ceil_mode", 0, 0, 1))
        counted = 1
        if kind == "max":
            a.integer("storage_order", 0, 0, 1)
        else:
            counted = a.integer("count_include_pad", 0, 0, 1)
        stride, pads, extra = self._window(window, (1, 1), self.shapes[value.tensor], ceil=ceil)
        if kind == "average" and any(extra):
            raise InputError("attribute ceil_mode must be 0 where it adds a row or column: the hardware divides every "
                             "window by its full size", field=self.where, value=1)
        if kind == "average" and any(pads) and not counted:
            raise InputError("with pads must have count_include_pad = 1: the hardware divides every window by its full "
                             "size", field=self.where, value=0)
        self._emit(Pool(name=self._layer_name(), input=value.tensor, output="", kind=kind, window=window, stride=stride,
                        pads=pads))

    def _op_MaxPool(self):
        self._pool("max")

    def _op_AveragePool(self):
        self._pool("average")

    def _global_pool(self, kind):
        (x,) = self._inputs(1, 1)
        value = self._data(x, flat=False)
        window = self.shapes[value.tensor][:2]
        if max(window) > MAX_KERNEL:
            raise InputError(f"must cover a map of at most {MAX_KERNEL}", field=self.where, value=window)
        self._emit(Pool(name=self._layer_name(), input=value.tensor, output="", kind=kind, window=window,
                        stride=(1, 1)))

    def _op_GlobalAveragePool(self):
        self._global_pool("average")

    def _op_GlobalMaxPool(self):
        self._global_pool("max")

    def _alias(self, value, *, flat=None):
        self.values[self.node.output[0]] = value if flat is None else replace(value, flat=flat)

    def _op_Identity(self):
        (x,) = self._inputs(1, 1)
        if x in self.constants:
            self._add_constant(self.node.output[0], self.constants[x])
        else:
            self._alias(self._data(x))

    def _op_Dropout(self):
        x, _, training = self._inputs(1, 3)
        self.attributes.real("ratio", 0.5, 0.0, 1.0)
        self.attributes.integer("seed", 0, -(1 << 63), (1 << 63) - 1)
        if training and self.constants.get(training) is None:
            raise InputError("training mode must be absent or a constant", field=self.where)
        if training and self._array(training, self.where).any():
            raise InputError("must be in inference mode", field=self.where)
        self._alias(self._data(x))

    def _op_Constant(self):
        self._inputs(0, 0)
        tensor = self.attributes.tensor("value")
        if tensor is None:
            raise InputError("must have attribute value (a tensor)", field=self.where)
        self._add_constant(self.node.output[0], tensor)

    def _op_Flatten(self):
        (x,) = self._inputs(1, 1)
        axis = self.attributes.integer("axis", 1, -64, 64)
        value = self._data(x)
        if axis not in (1, 1 - (2 if value.flat else 4)):
            raise InputError("attribute axis must be 1: the batch stays", field=self.where, value=axis)
        self._alias(value, flat=True)

    def _op_Reshape(self):
        x, target = self._inputs(2, 2)
        value = self._data(x)
        self.attributes.integer("allowzero", 0, 0, 1)
        array = self._array(self._constant(target, "target shape"), self.where)
        if array.dtype != np.int64 or array.ndim != 1 or not 1 <= array.size <= 8:
            raise InputError("target shape must be a list of integers", field=self.where)
        dims = [int(d) for d in array]
        height, width, channels = self.shapes[value.tensor]
        features = height * width * channels
        if len(dims) == 2 and (dims[1] == features or dims[1] == -1 and dims[0] != -1):
            self._alias(value, flat=True)
        elif len(dims) == 4 and dims[1:] == [channels, height, width]:
            self._alias(value, flat=False)
        else:
            raise InputError(f"must flatten to [batch, {features}] or keep [batch, {channels}, {height}, {width}]",
                             field=self.where, value=dims)

    def _softmax(self):
        (x,) = self._inputs(1, 1)
        value = self._data(x)
        default = 1 if self.opset < 13 else -1
        axis = self.attributes.integer("axis", default, -64, 64)
        if self.shapes[value.tensor][:2] != (1, 1) or axis % (2 if value.flat else 4) != 1:
            raise InputError("must run along the classes of a [batch, classes] tensor", field=self.where, value=axis)
        self.softmax = (self.where, self.node.output[0], value)

    def _op_Softmax(self):
        self._softmax()

    def _op_LogSoftmax(self):
        self._softmax()

    # -- fusion --------------------------------------------------------------------------------------------------
    def _fuse(self, output):
        """The reachable items in order, affine, clamp and sum items merged into the layer that makes their operand."""
        made = {i.output: i for i in self.items}
        live, stack = set(), [output]
        while stack:
            item = made.get(stack.pop())
            if item is not None and item.output not in live:
                live.add(item.output)
                stack += [item.input, getattr(item, "residual", None)]
        items = [i for i in self.items if i.output in live]
        if dropped := len(self.items) - len(items):
            self.notes.append(f"{dropped} operators that the output does not depend on are left out")
        uses = {output: 1}
        for item in items:
            for tensor in (item.input, getattr(item, "residual", None)):
                uses[tensor] = uses.get(tensor, 0) + 1
        nodes, position = {}, {}                       # by output tensor, insertion order = execution order
        for index, item in enumerate(items):
            producer = nodes.get(item.input)
            alone = producer is not None and uses[item.input] == 1
            if isinstance(item, _Affine):
                free = alone and isinstance(producer, Conv) and producer.low is None and producer.high is None \
                    and producer.residual is None
                node = self._fold(producer, item) if free else self._depthwise(item)
            elif isinstance(item, _Clamp):
                node = self._clip(producer, item) if alone else self._clip(self._depthwise(item), item)
                free = alone
            elif isinstance(item, Add):
                node, free = item, False
                choices = [(a, b) for a, b in ((item.input, item.residual), (item.residual, item.input))
                           if a != b and uses[a] == 1 and self._can_add(nodes.get(a))]
                if choices:
                    main, other = max(choices, key=lambda c: position[c[0]])
                    node = replace(nodes.pop(main), output=item.output, residual=other)
            else:
                node, free = item, False
            if not isinstance(item, Add) and free:
                del nodes[item.input]
                node = replace(node, output=item.output)
            nodes[node.output], position[node.output] = node, index
        return [self._finish(n) for n in nodes.values()]

    @staticmethod
    def _can_add(node):
        return isinstance(node, Conv) and node.residual is None and node.low is None and node.high is None

    @staticmethod
    def _fold(conv, affine):
        return replace(conv, weights=conv.weights * affine.scale[:, None, None, None],
                       bias=conv.bias * affine.scale + affine.shift)

    def _depthwise(self, item):
        """An affine or clamp item that no layer can absorb: a 1 x 1 depthwise convolution."""
        channels = self.shapes[item.input][2]
        scale = getattr(item, "scale", np.ones(channels))
        self.notes.append(f"{item.name} runs as a 1 x 1 depthwise layer (it cannot be fused)")
        return Conv(name=item.name, input=item.input, output=item.output, weights=scale.reshape(channels, 1, 1, 1),
                    bias=getattr(item, "shift", np.zeros(channels)), groups=channels)

    @staticmethod
    def _clip(node, clamp):
        """``node`` followed by ``clamp``: clip(clip(x, a, b), c, d) is one clip with both limits clipped to c..d."""
        low, high = node.low, node.high
        if clamp.low is not None:
            low = clamp.low if low is None else max(low, clamp.low)
            high = None if high is None else max(high, clamp.low)
        if clamp.high is not None:
            low = None if low is None else min(low, clamp.high)
            high = clamp.high if high is None else min(high, clamp.high)
        return replace(node, low=low, high=high)

    def _finish(self, node):
        if not isinstance(node, Conv):
            return node
        weights, bias = (np.ascontiguousarray(a, np.float64) for a in (node.weights, node.bias))
        if max(np.abs(weights).max(), np.abs(bias).max()) > MAX_WEIGHT:
            raise InputError(f"weights after folding must not exceed {MAX_WEIGHT:g}", field=f"layer {node.name!r}")
        return replace(node, weights=weights.astype(np.float32), bias=bias.astype(np.float32))
