"""Small int8 TFLite files for the tests, and what TFLite's reference kernels compute for them.

`Builder` writes the FlatBuffer with the generated functions of the schema. `reference` is NumPy after the published
specification (https://ai.google.dev/edge/litert/models/quantization_spec) and the arithmetic of gemmlowp's
fixedpoint.h: a 31-bit multiplier with two roundings, ADD by way of a common scale.
"""
import flatbuffers
import numpy as np
import tflite

SAME, VALID = tflite.Padding.SAME, tflite.Padding.VALID
NONE, RELU, RELU_N1_TO_1, RELU6 = (getattr(tflite.ActivationFunctionType, n)
                                   for n in ("NONE", "RELU", "RELU_N1_TO_1", "RELU6"))
_OPTIONS = {"CONV_2D": "Conv2DOptions", "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions", "ADD": "AddOptions",
            "FULLY_CONNECTED": "FullyConnectedOptions", "AVERAGE_POOL_2D": "Pool2DOptions", "SOFTMAX": "SoftmaxOptions",
            "MAX_POOL_2D": "Pool2DOptions", "MEAN": "ReducerOptions", "RESHAPE": "ReshapeOptions", "PAD": "PadOptions"}
_LIMITS = {NONE: (None, None), RELU: (0, None), RELU_N1_TO_1: (-1, 1), RELU6: (0, 6)}


# -- writing -----------------------------------------------------------------------------------------------------------
class Builder:
    """Collects tensors (dictionaries) and operators; every method that adds an operator returns its output's index."""

    def __init__(self, shape, *, scale=0.05, zero_point=-3, kind="INT8"):
        self.tensors, self.operators, self.fields = [], [], {"version": 3}
        self.input = self.tensor((1, *shape), kind, scale, zero_point)

    def tensor(self, shape, kind="INT8", scale=(), zero_point=(), *, axis=0, data=None):
        """Add a tensor; ``data`` (an array) makes it a constant."""
        self.tensors.append({
            "name": f"t{len(self.tensors)}", "shape": list(shape), "kind": kind, "axis": axis,
            "scale": np.atleast_1d(np.asarray(scale, np.float32)).tolist(),
            "zero_point": np.atleast_1d(np.asarray(zero_point, np.int64)).tolist(),
            "data": None if data is None else np.ascontiguousarray(data)})
        return len(self.tensors) - 1

    def shape(self, index):
        """Shape with batch."""
        return tuple(self.tensors[index]["shape"])

    def operator(self, kind, inputs, shape, *, scale=0.05, zero_point=-3, output="INT8", **options):
        """Add an operator with fields of its options table; ``scale`` None takes the first input's format."""
        if scale is None:
            source = self.tensors[inputs[0]]
            scale, zero_point = source["scale"], source["zero_point"]
        made = self.tensor(shape, output, scale, zero_point)
        self.operators.append({"kind": kind, "inputs": list(inputs), "outputs": [made], "options": options})
        return made

    def _weights(self, rng, x, shape, axis, per_channel):
        """Constants (weight, bias) of unit gain for one product of ``shape``; output channels along ``axis``."""
        outputs = shape[axis]
        size = outputs if per_channel else 1
        scale = rng.uniform(0.5, 1.5, size) * 0.6 / (128 * np.sqrt(np.prod(shape) / outputs))
        weight = self.tensor(shape, "INT8", scale, [0] * size, axis=axis, data=rng.integers(-127, 128, shape, np.int8))
        unit = np.float32(self.tensors[x]["scale"][0]) * np.asarray(self.tensors[weight]["scale"], np.float32)
        bias = self.tensor((outputs,), "INT32", unit, [0] * size,
                           data=(rng.normal(0, 1, outputs) / unit).astype(np.int32))
        return weight, bias

    def conv(self, rng, x, outputs, kernel=(3, 3), *, stride=(1, 1), dilation=(1, 1), padding=SAME, activation=NONE,
             per_channel=True, bias=True, multiplier=None, groups=1, **form):
        """A random convolution; with ``multiplier`` a depthwise one, of ``channels * multiplier`` outputs."""
        _, height, width, channels = self.shape(x)
        if multiplier is None:
            shape, axis, kind, extra = (outputs, *kernel, channels // groups), 0, "CONV_2D", {}
        else:
            outputs = channels * multiplier
            shape, axis, kind = (1, *kernel, outputs), 3, "DEPTHWISE_CONV_2D"
            extra = {"DepthMultiplier": multiplier}
        weight, b = self._weights(rng, x, shape, axis, per_channel)
        size = [_output_size(n, k, s, d, padding)
                for n, k, s, d in zip((height, width), kernel, stride, dilation)]
        return self.operator(kind, [x, weight, b] if bias else [x, weight], (1, *size, outputs), **form,
                             Padding=padding, StrideH=stride[0], StrideW=stride[1], DilationHFactor=dilation[0],
                             DilationWFactor=dilation[1], FusedActivationFunction=activation, **extra)

    def dense(self, rng, x, outputs, *, activation=NONE, per_channel=False, **form):
        """A random matrix product."""
        weight, bias = self._weights(rng, x, (outputs, int(np.prod(self.shape(x)))), 0, per_channel)
        return self.operator("FULLY_CONNECTED", [x, weight, bias], (1, outputs), **form,
                             FusedActivationFunction=activation)

    def pool(self, x, kind, window, *, stride=(1, 1), padding=VALID, activation=NONE):
        """``kind``: AVERAGE or MAX."""
        _, height, width, channels = self.shape(x)
        size = [_output_size(n, k, s, 1, padding) for n, k, s in zip((height, width), window, stride)]
        return self.operator(f"{kind}_POOL_2D", [x], (1, *size, channels), scale=None, Padding=padding,
                             StrideH=stride[0], StrideW=stride[1], FilterHeight=window[0], FilterWidth=window[1],
                             FusedActivationFunction=activation)

    def add(self, x, y, *, activation=NONE, **form):
        """Sum of two tensors."""
        return self.operator("ADD", [x, y], self.shape(x), FusedActivationFunction=activation, **form)

    def mean(self, x, axes=(1, 2), *, keep=True, **form):
        """Mean over ``axes``."""
        full = self.shape(x)
        shape = [1 if i in axes else d for i, d in enumerate(full) if keep or i not in axes]
        constant = self.tensor((len(axes),), "INT32", data=np.array(axes, np.int32))
        return self.operator("MEAN", [x, constant], shape, KeepDims=keep, **form)

    def reshape(self, x, shape):
        """Another shape (with batch), the same elements."""
        constant = self.tensor((len(shape),), "INT32", data=np.array(shape, np.int32))
        return self.operator("RESHAPE", [x, constant], shape, scale=None)

    def pad(self, x, top, bottom, left, right):
        """Rows and columns of zeros around a map."""
        _, height, width, channels = self.shape(x)
        constant = self.tensor((4, 2), "INT32", data=np.array([[0, 0], [top, bottom], [left, right], [0, 0]], np.int32))
        return self.operator("PAD", [x, constant], (1, height + top + bottom, width + left + right, channels),
                             scale=None)

    def softmax(self, x, *, beta=1.0):
        """Softmax with its fixed output format."""
        return self.operator("SOFTMAX", [x], self.shape(x), scale=1 / 256, zero_point=-128, Beta=beta)

    def file(self, output):
        """Bytes of the file whose output is tensor ``output``."""
        b = flatbuffers.Builder(4096)
        kinds = sorted({o["kind"] for o in self.operators})
        buffers = [_table(b, "Buffer")]                        # buffer 0 is the empty one
        tensors = []
        for t in self.tensors:
            number = 0
            if t["data"] is not None:
                raw = np.frombuffer(t["data"].tobytes(), np.uint8)
                buffers.append(_table(b, "Buffer", Data=b.CreateNumpyVector(raw)))
                number = len(buffers) - 1
            quantization = _table(b, "QuantizationParameters", Scale=_vector(b, np.float32, t["scale"]),
                                  ZeroPoint=_vector(b, np.int64, t["zero_point"]), QuantizedDimension=t["axis"])
            kind = t["kind"] if isinstance(t["kind"], int) else getattr(tflite.TensorType, t["kind"])
            tensors.append(_table(b, "Tensor", Shape=_vector(b, np.int32, t["shape"]), Type=kind, Buffer=number,
                                  Name=b.CreateString(t["name"]), Quantization=quantization))
        operators = []
        for o in self.operators:
            extra = {}
            if name := o.get("table", _OPTIONS.get(o["kind"])):
                extra = {"BuiltinOptions": _table(b, name, **o["options"]),
                         "BuiltinOptionsType": getattr(tflite.BuiltinOptions, name)}
            operators.append(_table(b, "Operator", OpcodeIndex=kinds.index(o["kind"]),
                                    Inputs=_vector(b, np.int32, o["inputs"]),
                                    Outputs=_vector(b, np.int32, o["outputs"]), **extra))
        graph = _table(b, "SubGraph", Tensors=_offsets(b, tensors), Operators=_offsets(b, operators),
                       Inputs=_vector(b, np.int32, [self.input]), Outputs=_vector(b, np.int32, [output]))
        codes = [getattr(tflite.BuiltinOperator, k) for k in kinds]
        codes = [_table(b, "OperatorCode", DeprecatedBuiltinCode=min(c, 127), BuiltinCode=c) for c in codes]
        model = _table(b, "Model", Version=self.fields["version"], OperatorCodes=_offsets(b, codes),
                       Subgraphs=_offsets(b, [graph] * self.fields.get("subgraphs", 1)), Buffers=_offsets(b, buffers))
        b.Finish(model, b"TFL3")
        return bytes(b.Output())


def _table(b, name, **fields):
    getattr(tflite, f"{name}Start")(b)
    for field, value in fields.items():
        getattr(tflite, f"{name}Add{field}")(b, value)
    return getattr(tflite, f"{name}End")(b)


def _vector(b, dtype, values):
    return b.CreateNumpyVector(np.asarray(values, dtype))


def _offsets(b, items):
    b.StartVector(4, len(items), 4)
    for item in reversed(items):
        b.PrependUOffsetTRelative(item)
    return b.EndVector()


def _output_size(size, kernel, stride, dilation, padding):
    span = (kernel - 1) * dilation + 1
    return -(-size // stride) if padding == SAME else (size - span + stride) // stride


# -- computing ---------------------------------------------------------------------------------------------------------
def multiply(x, real):
    """gemmlowp: ``x * real`` for int32 ``x`` by a 31-bit multiplier, doubling high product, then a rounding shift."""
    fraction, exponent = np.frexp(np.asarray(real, np.float64))
    q = np.floor(fraction * (1 << 31) + 0.5).astype(np.int64)
    exponent = exponent + (q == 1 << 31)
    q = np.where(q == 1 << 31, 1 << 30, q)
    left, right = np.maximum(exponent, 0), np.maximum(-exponent, 0)
    product = (np.asarray(x, np.int64) << left) * q
    nudged = product + np.where(product >= 0, 1 << 30, 1 - (1 << 30))
    high = np.sign(nudged) * (np.abs(nudged) >> 31)                            # C divides towards zero
    mask = (np.int64(1) << right) - 1
    return (high >> right) + ((high & mask) > (mask >> 1) + (high < 0))


def _clamp(y, output, activation):
    low, high = -128, 127
    scale, zero_point = np.float32(output["scale"][0]), output["zero_point"][0]
    for n, limit in enumerate(_LIMITS[activation]):
        if limit is not None:
            ratio = np.float32(limit) / scale
            q = zero_point + int(np.sign(ratio) * np.floor(np.abs(ratio) + np.float32(0.5)))
            low, high = (max(low, q), high) if n == 0 else (low, min(high, q))
    return np.clip(y, low, high).astype(np.int8)


def _edges(size, kernel, stride, dilation, padding):
    """Padding before and after by TFLite's rule."""
    span = (kernel - 1) * dilation + 1
    if padding == VALID:
        return 0, 0
    need = max(0, (-(-size // stride) - 1) * stride + span - size)
    return need // 2, need - need // 2


def _patches(x, kernel, o, fill, dilation=(1, 1)):
    """[N, Ho, Wo, taps, C], and how many taps of each window lie inside the map."""
    stride, padding = (o["StrideH"], o["StrideW"]), o["Padding"]
    edges = [_edges(n, k, s, d, padding) for n, k, s, d in zip(x.shape[1:3], kernel, stride, dilation)]
    size = [_output_size(n, k, s, d, padding) for n, k, s, d in zip(x.shape[1:3], kernel, stride, dilation)]
    inside = np.zeros((1, *x.shape[1:3], 1), np.int64) + 1
    found, counted = [], []
    for array, value, into in ((x, fill, found), (inside, 0, counted)):
        padded = np.pad(array, ((0, 0), *edges, (0, 0)), constant_values=value)
        for r in range(kernel[0]):
            for s in range(kernel[1]):
                at = r * dilation[0], s * dilation[1]
                into.append(padded[:, at[0]:at[0] + (size[0] - 1) * stride[0] + 1:stride[0],
                                   at[1]:at[1] + (size[1] - 1) * stride[1] + 1:stride[1]])
    return np.stack(found, axis=3), np.stack(counted, axis=3).sum(axis=3)


def _weighted(model, op, x):
    """Convolution, depthwise convolution, matrix product: accumulators, then per-channel scaling."""
    source, weight, output = (model.tensors[i] for i in (*op["inputs"][:2], op["outputs"][0]))
    o, w = op["options"], weight["data"].astype(np.int64)
    bias = model.tensors[op["inputs"][2]]["data"].astype(np.int64) if len(op["inputs"]) > 2 else 0
    x = x.astype(np.int64) - source["zero_point"][0]
    if op["kind"] == "FULLY_CONNECTED":
        acc = x.reshape(len(x), -1) @ w.T
    else:
        dilation = o["DilationHFactor"], o["DilationWFactor"]
        patches, _ = _patches(x, w.shape[1:3], o, 0, dilation)
        if op["kind"] == "CONV_2D":
            depth, outputs = w.shape[3], w.shape[0]
            groups = x.shape[3] // depth
            parts = [np.einsum("nhwtc,ktc->nhwk", patches[..., g * depth:(g + 1) * depth],
                               w.reshape(outputs, -1, depth)[g * outputs // groups:(g + 1) * outputs // groups])
                     for g in range(groups)]
            acc = np.concatenate(parts, axis=3)
        else:
            repeated = np.repeat(patches, o["DepthMultiplier"], axis=4)
            acc = np.einsum("nhwtk,tk->nhwk", repeated, w.reshape(-1, w.shape[3]))
    real = np.float64(source["scale"][0]) * np.asarray(weight["scale"]) / np.float64(output["scale"][0])
    y = multiply(acc + bias, real) + output["zero_point"][0]
    return _clamp(y, output, o["FusedActivationFunction"])


def _sum(model, op, x, y):
    a, b, out = (model.tensors[i] for i in (*op["inputs"], op["outputs"][0]))
    twice = 2 * max(a["scale"][0], b["scale"][0])
    total = sum(multiply((v.astype(np.int64) - t["zero_point"][0]) << 20, t["scale"][0] / twice)
                for v, t in ((x, a), (y, b)))
    return _clamp(multiply(total, twice / ((1 << 20) * out["scale"][0])) + out["zero_point"][0], out,
                  op["options"]["FusedActivationFunction"])


def _pooled(model, op, x):
    o, out = op["options"], model.tensors[op["outputs"][0]]
    window = o["FilterHeight"], o["FilterWidth"]
    if op["kind"] == "MAX_POOL_2D":
        y = _patches(x.astype(np.int64), window, o, -128)[0].max(axis=3)
    else:
        patches, count = _patches(x.astype(np.int64), window, o, 0)
        acc = patches.sum(axis=3)
        y = np.sign(acc) * ((np.abs(acc) + count // 2) // count)               # halves away from zero
    return _clamp(y, out, o["FusedActivationFunction"])


def _mean(model, op, x):
    source, out = model.tensors[op["inputs"][0]], model.tensors[op["outputs"][0]]
    axes = tuple(int(a) for a in model.tensors[op["inputs"][1]]["data"])
    ratio = source["scale"][0] / out["scale"][0]
    y = (x.astype(np.float64).mean(axis=axes, keepdims=True) - source["zero_point"][0]) * ratio
    y = np.sign(y) * np.floor(np.abs(y) + 0.5)
    y = np.clip(y + out["zero_point"][0], -128, 127).astype(np.int8)
    return y.reshape(len(x), *out["shape"][1:])


def reference(model, op, values):
    """int8 output of one operator of a `Builder` under TFLite's reference kernels; ``values``: int8 by tensor index."""
    inputs = [values[i] for i in op["inputs"] if i in values]
    out = model.tensors[op["outputs"][0]]
    kind = op["kind"]
    if kind in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"):
        return _weighted(model, op, *inputs)
    if kind == "ADD":
        return _sum(model, op, *(values[i] for i in op["inputs"]))
    if kind in ("AVERAGE_POOL_2D", "MAX_POOL_2D"):
        return _pooled(model, op, *inputs)
    if kind == "MEAN":
        return _mean(model, op, *inputs)
    if kind == "PAD":
        return np.pad(inputs[0], model.tensors[op["inputs"][1]]["data"], constant_values=out["zero_point"][0])
    if kind == "RESHAPE":
        return inputs[0].reshape(len(inputs[0]), *out["shape"][1:])
    raise ValueError(f"{kind} has no reference")
