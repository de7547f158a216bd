"""PyTorch network -> ONNX, operator by operator, with the names of its modules.

``python -m compress.training.export resnet20 resnet20-12fca82f.th --out resnet20.onnx`` writes a network of
`compress.training.networks` with weights from a file (`compress.training.weights`).

`to_onnx` traces the materialised network (`torch.fx`), so that compressed layers become the plain layers that inference
runs, and writes what `compress.onnx_import` reads: convolutions and matrix products are called like their modules (the
stages of a factored layer ``conv`` are ``conv.1``, ``conv.2`` …), their initialisers like the parameters, and batch
normalisation stays an operator. Zero padding before a convolution becomes part of it; the parameter-free shortcut
(option A) becomes a 1x1 convolution with an identity in the middle, which is the same function. Networks that need more
than the importer knows (transformers, LSTM) run in ONNX Runtime.
"""
import argparse
import copy
from dataclasses import dataclass
import math
import operator
from pathlib import Path
import warnings

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
import torch
from torch import fx, nn

from compress.training import networks, weights
from compress.training.networks.lstm import LSTM
from compress.training.networks.resnet import PadShortcut
from compress.training.parametrizations import materialize
from spec.errors import InputError

OPSET = 17
#: Modules that are one operator, or that this file writes itself; others are traced through.
LEAVES = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.LayerNorm, nn.ReLU, nn.ReLU6, nn.GELU, nn.Softmax, nn.MaxPool2d,
          nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Dropout, nn.Identity, PadShortcut, LSTM)
#: Operators that Python spells differently.
SPELLINGS = {operator.iadd: "add", operator.imul: "mul", operator.truediv: "div", operator.matmul: "matmul",
             "add_": "add", "mul_": "mul", "relu_": "relu", "view": "reshape", "bmm": "matmul"}


def to_onnx(model, *, name="network", shape=None):
    """ONNX model of a network in evaluation mode: input ``image`` [N, *shape], output ``logits``.

    Args: shape: of one input, by default ``model.input_shape``. The model does not change.
    Returns: onnx.ModelProto, opset 17, checked. Raises: InputError naming an operation that cannot be written.
    """
    model = materialize(model).eval().float()
    shape = tuple(model.input_shape if shape is None else shape)
    try:
        graph = _Tracer().trace(model)
        traced = fx.GraphModule(model, graph)
        shapes = _Shapes(copy.deepcopy(traced).to("meta"))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")                      # advice on speed, which the trial run has not
            shapes.run(torch.empty(BATCH, *shape, device="meta"))
    except (fx.proxy.TraceError, RuntimeError, TypeError) as error:
        raise InputError(f"cannot be traced ({_first_line(error)})", field="network") from None
    return _Writer(traced, shapes.of, name, shape).build()


def _first_line(error):
    return str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__


class _Tracer(fx.Tracer):
    """Stops at `LEAVES` that kept their forward."""

    def is_leaf_module(self, m, module_qualified_name):
        base = next((kind for kind in LEAVES if isinstance(m, kind)), None)
        if base is None and type(m).__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential):
            return True                                          # unknown: the writer names it
        return base is not None and type(m).forward is base.forward


#: Samples of the trial run that finds shapes, which needs no memory; no other dimension has this size.
BATCH = 1_000_003


class _Shapes(fx.Interpreter):
    """Runs the graph once; ``of`` maps node names to the shapes of their tensors."""

    def __init__(self, traced):
        super().__init__(traced)
        self.of = {}

    def run_node(self, n):
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.of[n.name] = tuple(result.shape)
        return result


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the ONNX graph: ``shape`` with a batch of `BATCH`, and zeros around it that are not written yet,
    ``pads`` (left, right, top, bottom): a convolution takes them over. ``shape`` counts them."""

    name: str
    shape: tuple
    pads: tuple = (0, 0, 0, 0)


@dataclass(frozen=True)
class _Parameter:
    """A parameter or buffer of the network by its full name."""

    name: str
    value: torch.Tensor

    @property
    def shape(self):
        return tuple(self.value.shape)


class _Batch:
    """The size of the batch, as ``x.size(0)`` gives it."""


class _Writer:
    """Writes one ONNX node after the other; methods ``_op_…`` have the arguments of PyTorch's functions."""

    def __init__(self, traced, shapes, name, shape):
        self.traced, self.shapes, self.name, self.shape = traced, shapes, name, shape
        self.modules = dict(traced.named_modules())
        self.nodes, self.constants, self.names, self.values = [], {}, {"image", "logits"}, {}

    def build(self):
        for node in self.traced.graph.nodes:
            self.current, self.out = node, self.shapes.get(node.name)
            self.values[node] = self._write(node)
        last = self.result
        model = helper.make_model(
            helper.make_graph(
                self.nodes, self.name,
                [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", *self.shape])],
                [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", *last.shape[1:]])],
                list(self.constants.values())),
            opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8,
            producer_name="summand compress.training.export")
        onnx.checker.check_model(model, full_check=True)
        return model

    # -- reading the trace ---------------------------------------------------------------------------------------
    def _write(self, node):
        if node.op == "placeholder":
            if self.out is None or "image" in {v.name for v in self.values.values() if isinstance(v, _Tensor)}:
                raise InputError("must have one input", field="network")
            return _Tensor("image", self.out)
        if node.op == "get_attr":
            return _Parameter(node.target, self._attribute(node.target))
        args, kwargs = (fx.node.map_arg(a, self.values.__getitem__) for a in (node.args, node.kwargs))
        if node.op == "output":
            return self._output(args[0])
        if node.op == "call_module":
            module = self.modules[node.target]
            kind = next((k for k in LEAVES if isinstance(module, k)), type(module))
            self.label, self.path = node.target, node.target
            handler = getattr(self, f"_module_{kind.__name__}", None)
            return self._call(handler, kind.__name__, module, *args, **kwargs)
        word = node.target if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
        word = SPELLINGS.get(node.target, SPELLINGS.get(word, word)).strip("_")
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        self.path = stack[-1][0] if stack else ""
        self.label = f"{self.path}.{word}" if self.path else word
        return self._call(getattr(self, f"_op_{word}", None), word, *args, **kwargs)

    def _call(self, handler, word, *args, **kwargs):
        if handler is None:
            self._refuse(f"{word} is not supported")
        try:
            return handler(*args, **kwargs)
        except (TypeError, AttributeError) as error:            # arguments beyond those that the handler knows
            self._refuse(f"{word} is not supported in this form ({_first_line(error)})")
        return None

    def _refuse(self, rule):
        raise InputError(rule, field=f"{self.label} of the network")

    def _attribute(self, target):
        value = self.traced
        for part in target.split("."):
            value = getattr(value, part)
        return value

    # -- writing -------------------------------------------------------------------------------------------------
    def _unique(self, name):
        """``name``, or with a number where it is taken."""
        result, number = name, 1
        while result in self.names:
            number += 1
            result = f"{name}_{number}"
        self.names.add(result)
        return result

    def _constant(self, name, array):
        """An initialiser; the same name twice is the same array (a module that is called twice)."""
        if isinstance(array, torch.Tensor):
            array = array.detach().cpu().float().numpy()
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def _text(self, value):
        """Tensor name of an operand: pending padding is written, numbers become initialisers."""
        if isinstance(value, _Parameter):
            return self._constant(value.name, value.value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return self._constant(self._unique(f"{self.label}.value"), np.float32(value))
        if not isinstance(value, _Tensor):
            self._refuse(f"operand must be a tensor, not {value!r:.60}")
        if any(value.pads):
            left, right, top, bottom = value.pads
            pads = self._constant(self._unique(f"{value.name}.pads"),
                                  np.array([0, 0, top, left, 0, 0, bottom, right], np.int64))
            return self._plain("Pad", f"{value.name}.pad", value.name, pads)
        return value.name

    def _plain(self, kind, label, *inputs, **attributes):
        """Append a node on tensor names; returns the name of its output."""
        name = self._unique(label)
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def _node(self, kind, *inputs, label=None, shape=None, **attributes):
        """Append a node; its output has the shape of the traced operation unless ``shape`` is given."""
        name = self._plain(kind, label or self.label, *(self._text(i) for i in inputs), **attributes)
        return _Tensor(name, self.out if shape is None else shape)

    def _output(self, value):
        if not isinstance(value, _Tensor) or value.name == "image":
            raise InputError("must end in one tensor that it computes", field="network")
        text = self._text(value)
        for node in self.nodes:
            for names in (node.input, node.output):
                for n, found in enumerate(names):
                    if found == text:
                        names[n] = "logits"
        self.result = value
        return value

    def _axis(self, axis, rank):
        return int(axis) % rank

    # -- layers with weights -------------------------------------------------------------------------------------
    def _module_Conv2d(self, module, x):
        if module.padding_mode != "zeros":
            self._refuse(f"padding_mode {module.padding_mode} is not supported")
        padding = module.padding if not isinstance(module.padding, str) else self._same(module)
        return self._convolution(x, module.weight, module.bias, f"{self.path}.weight", module.stride, padding,
                                 module.dilation, module.groups)

    def _same(self, module):
        """The padding that the words "same" and "valid" stand for, where it is the same on both sides."""
        total = [d * (k - 1) if module.padding == "same" else 0 for d, k in zip(module.dilation, module.kernel_size)]
        if any(t % 2 for t in total):
            self._refuse("padding 'same' of an even kernel is not supported")
        return [t // 2 for t in total]

    def _op_conv2d(self, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        if not isinstance(weight, _Parameter) or isinstance(padding, str):
            self._refuse("conv2d must have a parameter as weight and numbers as padding")
        self.label = weight.name.removesuffix(".weight")
        return self._convolution(x, weight.value, bias and bias.value, weight.name, _pair(stride), _pair(padding),
                                 _pair(dilation), groups)

    def _convolution(self, x, weight, bias, name, stride, padding, dilation, groups):
        kernel = tuple(weight.shape[2:])
        left, right, top, bottom = x.pads
        waiting, taken = [0, 0, 0, 0], [padding[0], padding[1], padding[0], padding[1]]     # ONNX: top, left, bottom, …
        for axis, (before, after) in enumerate(((top, bottom), (left, right))):
            total = (before + padding[axis], after + padding[axis])
            if max(total) < dilation[axis] * (kernel[axis] - 1) + 1:
                taken[axis], taken[axis + 2] = total
            elif kernel[axis] == stride[axis] == 1 and bias is None and not padding[axis]:
                waiting[2 - 2 * axis:4 - 2 * axis] = before, after       # a sum of zeros is zero: pad what comes out
            else:
                x = _Tensor(self._text(x), x.shape)
                waiting, taken = [0, 0, 0, 0], [*padding, *padding]
                break
        inputs = [_Tensor(x.name, x.shape), _Parameter(name, weight)]
        if bias is not None:
            inputs.append(_Parameter(f"{name.removesuffix('.weight')}.bias", bias))
        made = self._node("Conv", *inputs, kernel_shape=kernel, strides=list(stride), pads=taken,
                          dilations=list(dilation), group=groups)
        return _Tensor(made.name, self.out, tuple(waiting))

    def _module_Linear(self, module, x):
        return self._matrix(x, module.weight, module.bias, f"{self.path}.weight")

    def _op_linear(self, x, weight, bias=None):
        if not isinstance(weight, _Parameter):
            self._refuse("linear must have a parameter as weight")
        self.label = weight.name.removesuffix(".weight")
        return self._matrix(x, weight.value, bias and bias.value, weight.name)

    def _matrix(self, x, weight, bias, name):
        """Gemm of [N, features]; MatMul and Add of more dimensions."""
        stem = name.removesuffix(".weight")
        matrix = _Parameter(name, weight)
        offset = [] if bias is None else [_Parameter(f"{stem}.bias", bias)]
        if len(x.shape) == 2:
            return self._node("Gemm", x, matrix, *offset, transB=1)
        turned = self._node("Transpose", matrix, label=f"{stem}.transpose", perm=[1, 0], shape=matrix.shape[::-1])
        y = self._node("MatMul", x, turned)
        return self._node("Add", y, *offset, label=f"{stem}.add") if offset else y

    def _module_BatchNorm2d(self, module, x):
        if module.running_mean is None:
            self._refuse("batch normalisation must keep running statistics")
        ones = torch.ones_like(module.running_mean)
        given = {"weight": ones if module.weight is None else module.weight,
                 "bias": 0 * ones if module.bias is None else module.bias,
                 "running_mean": module.running_mean, "running_var": module.running_var}
        return self._node("BatchNormalization", x, *(_Parameter(f"{self.path}.{k}", v) for k, v in given.items()),
                          epsilon=module.eps)

    def _module_LayerNorm(self, module, x):
        ones = torch.ones(module.normalized_shape)
        given = {"weight": ones if module.weight is None else module.weight,
                 "bias": 0 * ones if module.bias is None else module.bias}
        return self._node("LayerNormalization", x, *(_Parameter(f"{self.path}.{k}", v) for k, v in given.items()),
                          axis=-len(module.normalized_shape), epsilon=module.eps)

    def _module_PadShortcut(self, module, x):
        pick = torch.zeros(module.outputs, module.inputs, 1, 1)
        own = torch.arange(module.inputs)
        pick[own + module.before, own] = 1
        return self._node("Conv", x, _Parameter(f"{self.path}.weight", pick), kernel_shape=[1, 1],
                          strides=[module.stride] * 2)

    def _module_LSTM(self, module, x):
        """ONNX orders the gates i, o, f, c; ours are i, f, c, o."""
        def gates(tensor):
            i, f, c, o = tensor.detach().chunk(4)
            return torch.cat([i, o, f, c])

        inputs, offset = _dense(module.input)
        recurrent, _ = _dense(module.recurrent)
        offset = torch.zeros(4 * module.hidden) if offset is None else offset
        steps = self._node("Transpose", x, label=f"{self.path}.steps", perm=[1, 0, 2])
        bias = torch.cat([gates(offset), torch.zeros_like(offset)])
        operands = [steps.name] + [self._constant(f"{self.path}.{key}", value[None]) for key, value in
                                   (("W", gates(inputs)), ("R", gates(recurrent)), ("B", bias))]
        name, last = self._unique(self.path), self._unique(f"{self.path}.last")
        self.nodes.append(helper.make_node("LSTM", operands, ["", last], name=name, hidden_size=module.hidden))
        axis = self._constant(self._unique(f"{self.path}.axis"), np.array([0], np.int64))
        return _Tensor(self._plain("Squeeze", f"{self.path}.squeeze", last, axis), self.out)

    # -- element by element --------------------------------------------------------------------------------------
    def _op_relu(self, x, inplace=False):
        return self._node("Relu", x)

    def _module_ReLU(self, module, x):
        return self._op_relu(x)

    def _op_relu6(self, x, inplace=False):
        low, high = (self._constant(f"relu6.{k}", np.float32(v)) for k, v in (("min", 0), ("max", 6)))
        return _Tensor(self._plain("Clip", self.label, self._text(x), low, high), self.out)

    def _module_ReLU6(self, module, x):
        return self._op_relu6(x)

    def _op_gelu(self, x, approximate="none"):
        """``x / 2 (1 + erf(x / sqrt 2))``."""
        if approximate != "none":
            self._refuse("the approximate GELU is not supported")
        stem = self.label
        inner = self._node("Erf", self._node("Div", x, math.sqrt(2), label=f"{stem}.scale"), label=f"{stem}.erf")
        half = self._node("Mul", x, 0.5, label=f"{stem}.half")
        return self._node("Mul", half, self._node("Add", inner, 1.0, label=f"{stem}.add"))

    def _module_GELU(self, module, x):
        return self._op_gelu(x, module.approximate)

    def _op_add(self, x, y):
        return self._node("Add", x, y)

    def _op_mul(self, x, y):
        return self._node("Mul", x, y)

    def _op_div(self, x, y):
        return self._node("Div", x, y)

    def _op_softmax(self, x, dim, **ignored):
        if ignored.get("dtype") is not None:
            self._refuse("softmax to another type is not supported")
        return self._node("Softmax", x, axis=self._axis(dim, len(x.shape)))

    def _module_Softmax(self, module, x):
        return self._op_softmax(x, module.dim)

    def _op_dropout(self, x, p=0.5, training=False, inplace=False):
        if training:
            self._refuse("dropout must not be active in evaluation: pass training=self.training")
        return x

    def _module_Dropout(self, module, x):
        return x

    def _module_Identity(self, module, x):
        return x

    def _op_contiguous(self, x):
        return x

    # -- windows -------------------------------------------------------------------------------------------------
    def _op_pad(self, x, pad, mode="constant", value=None):
        pad = tuple(pad)
        if len(x.shape) != 4 or mode != "constant" or value or len(pad) > 4 or min(pad) < 0:
            self._refuse("pad must add zeros to height and width")
        pad = (*pad, 0, 0)[:4]
        return _Tensor(x.name, self.out, tuple(a + b for a, b in zip(x.pads, pad)))

    def _op_max_pool2d(self, x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
        if return_indices:
            self._refuse("max pooling must not return indices")
        return self._pool("MaxPool", x, kernel_size, stride, padding, ceil_mode, dilations=_pair(dilation))

    def _module_MaxPool2d(self, m, x):
        return self._op_max_pool2d(x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices)

    def _op_avg_pool2d(self, x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True,
                       divisor_override=None):
        if divisor_override or ceil_mode:
            self._refuse("average pooling must divide by its window and round down")
        return self._pool("AveragePool", x, kernel_size, stride, padding, ceil_mode,
                          count_include_pad=int(count_include_pad))

    def _module_AvgPool2d(self, m, x):
        return self._op_avg_pool2d(x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad,
                                   m.divisor_override)

    def _pool(self, kind, x, kernel, stride, padding, ceil, **attributes):
        kernel = _pair(kernel)
        return self._node(kind, x, kernel_shape=kernel, strides=_pair(stride or kernel), pads=_pair(padding) * 2,
                          ceil_mode=int(ceil), **attributes)

    def _op_adaptive_avg_pool2d(self, x, output_size):
        if _pair(output_size) != [1, 1]:
            self._refuse("adaptive pooling must be to 1 x 1")
        return self._node("GlobalAveragePool", x)

    def _module_AdaptiveAvgPool2d(self, module, x):
        return self._op_adaptive_avg_pool2d(x, module.output_size)

    def _op_mean(self, x, dim, keepdim=False):
        axes = sorted(self._axis(d, len(x.shape)) for d in (dim if isinstance(dim, (tuple, list)) else (dim,)))
        if axes != [2, 3] or len(x.shape) != 4:
            return self._node("ReduceMean", x, axes=axes, keepdims=int(keepdim))
        if keepdim:
            return self._node("GlobalAveragePool", x)
        stem = self.label
        pooled = self._node("GlobalAveragePool", x, shape=(*x.shape[:2], 1, 1))
        return self._node("Flatten", pooled, label=f"{stem}.flatten", axis=1)

    # -- shapes --------------------------------------------------------------------------------------------------
    def _op_flatten(self, x, start_dim=0, end_dim=-1):
        start, end = (self._axis(d, len(x.shape)) for d in (start_dim, end_dim))
        if start == 1 and end == len(x.shape) - 1:
            return self._node("Flatten", x, axis=1)
        return self._to_shape(x)

    def _module_Flatten(self, module, x):
        return self._op_flatten(x, module.start_dim, module.end_dim)

    def _op_size(self, x, dim=None):
        if dim is None:
            self._refuse("size must be of one dimension")
        return _Batch() if self._axis(dim, len(x.shape)) == 0 else x.shape[dim]

    def _op_reshape(self, x, *sizes):
        sizes = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
        if len(self.out) == 2 and self.out[0] == x.shape[0] == BATCH:
            return self._node("Flatten", x, axis=1)
        return self._to_shape(x)

    def _to_shape(self, x):
        """Reshape to the traced shape; the batch, which must come first, is copied."""
        if x.shape[0] != BATCH or self.out[0] != BATCH:
            self._refuse("must keep the batch: the first size of a reshape must be -1 or x.size(0)")
        sizes = self._constant(self._unique(f"{self.label}.shape"), np.array([0, *self.out[1:]], np.int64))
        return _Tensor(self._plain("Reshape", self.label, self._text(x), sizes), self.out)

    def _op_permute(self, x, *dims):
        dims = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
        return self._node("Transpose", x, perm=[self._axis(d, len(x.shape)) for d in dims])

    def _op_transpose(self, x, dim0, dim1):
        order = list(range(len(x.shape)))
        a, b = (self._axis(d, len(order)) for d in (dim0, dim1))
        order[a], order[b] = order[b], order[a]
        return self._node("Transpose", x, perm=order)

    def _op_matmul(self, x, y):
        return self._node("MatMul", x, y)

    def _op_getitem(self, x, index):
        """One position on one axis: ``x[n]``, ``x[:, n]``."""
        index = index if isinstance(index, tuple) else (index,)
        *before, last = index
        if not isinstance(x, _Tensor) or not isinstance(last, int) or any(i != slice(None) for i in before):
            self._refuse("an index must be one number on one axis")
        pick = self._constant(self._unique(f"{self.label}.index"), np.array(last, np.int64))
        return _Tensor(self._plain("Gather", self.label, self._text(x), pick, axis=len(before)), self.out)


def _pair(value):
    return [int(v) for v in value] if isinstance(value, (tuple, list)) else [int(value)] * 2


@torch.no_grad()
def _dense(module):
    """(matrix [O, I], bias or None) of a linear layer, or of the chain that took its place."""
    if isinstance(module, nn.Linear):
        return module.weight.detach(), module.bias
    matrix, bias = None, None
    for layer in module:
        matrix, bias = layer.weight if matrix is None else layer.weight @ matrix, layer.bias
    return matrix, bias


def main(arguments=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", help=f"one of {', '.join(networks.NETWORKS)}")
    parser.add_argument("weights", type=Path, help=f"file of weights ({', '.join(weights.READERS)})")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True, help="ONNX file to write")
    options = parser.parse_args(arguments)
    try:
        model = weights.load(networks.build(options.network, options.classes), options.weights)
        options.out.write_bytes(to_onnx(model, name=options.network).SerializeToString())
    except (InputError, OSError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
