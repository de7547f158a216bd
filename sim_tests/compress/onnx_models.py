"""Small ONNX models for the tests, made with ``onnx.helper``."""
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Builder:
    """Collects nodes and initializers; every method returns the name of the tensor it makes."""

    def __init__(self, shape, *, opset=17, batch="N"):
        self.nodes, self.initializers, self.count, self.opset = [], [], 0, opset
        self.input = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *shape])

    def constant(self, array, name=None):
        """Add an initializer; floats become float32."""
        array = np.asarray(array)
        array = array.astype(np.float32) if array.dtype.kind == "f" else array
        self.count += 1
        name = name or f"c{self.count}"
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, op, *inputs, outputs=1, **attributes):
        """Add a node; arrays among ``inputs`` become initializers."""
        self.count += 1
        names = [i if isinstance(i, str) else self.constant(i) for i in inputs]
        made = [f"t{self.count}_{i}" if i else f"t{self.count}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, names, made, name=f"{op.lower()}{self.count}", **attributes))
        return made[0]

    def conv(self, rng, x, inputs, outputs, kernel=3, *, groups=1, bias=True, **attributes):
        """A convolution with random weights of unit gain."""
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        depth = inputs // groups
        w = rng.normal(0, (depth * kernel[0] * kernel[1]) ** -0.5, (outputs, depth, *kernel))
        rest = [rng.normal(0, 0.2, outputs)] if bias else []
        return self.node("Conv", x, w, *rest, group=groups, kernel_shape=list(kernel), **attributes)

    def batch_norm(self, rng, x, channels):
        """Batch normalisation with random statistics."""
        return self.node("BatchNormalization", x, rng.uniform(0.5, 1.5, channels), rng.normal(0, 0.2, channels),
                         rng.normal(0, 0.2, channels), rng.uniform(0.5, 2, channels), epsilon=1e-5)

    def model(self, output, *, check=True):
        """The finished model."""
        info = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "g", [self.input], [info], self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        if check:
            model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
            onnx.checker.check_model(model)
        return model


def random_model(rng):
    """A random small network over the supported operators: (model, input shape)."""
    channels, size = int(rng.integers(1, 6)), int(rng.integers(7, 13))
    b = Builder((channels, size, size + 1), opset=int(rng.choice([11, 13, 17, 21])))
    shape, x = (channels, size, size + 1), "x"
    for _ in range(int(rng.integers(2, 5))):
        c, h, w = shape
        kind = rng.choice(["conv", "depthwise", "group", "same", "max", "average", "residual", "dilated", "affine"])
        k = int(rng.integers(1, 4))
        if min(h, w) < 4:
            break
        if kind in ("conv", "dilated", "residual", "same"):
            outputs = c if kind == "residual" else int(rng.integers(1, 9))
            pad = k // 2
            if kind == "conv":
                stride = int(rng.integers(1, 3))
                pads = rng.integers(0, k, 4).tolist()
                y = b.conv(rng, x, c, outputs, k, strides=[stride, 1], pads=pads)
            elif kind == "same":
                stride = int(rng.integers(1, 3))
                y = b.conv(rng, x, c, outputs, (k, 2), strides=[stride, stride],
                           auto_pad=str(rng.choice(["SAME_UPPER", "SAME_LOWER"])))
            elif kind == "dilated":
                y = b.conv(rng, x, c, outputs, 2, dilations=[2, 1], pads=[1, 0, 1, 1], bias=False)
            else:
                y = b.conv(rng, x, c, outputs, 2 * (k // 2) + 1, pads=[pad] * 4)
                y = b.batch_norm(rng, y, outputs)
                y = b.node("Add", *([x, y] if rng.integers(2) else [y, x]))
            x = y
            if rng.integers(2):
                x = b.node("Relu", x)
            elif rng.integers(2):
                x = b.node("Clip", x, np.float32(0), np.float32(1.5))
        elif kind == "depthwise":
            x = b.batch_norm(rng, b.conv(rng, x, c, 2 * c, 3, groups=c, pads=[1, 1, 1, 1]), 2 * c)
        elif kind == "group" and c % 2 == 0:
            x = b.node("Relu", b.conv(rng, x, c, 4, k, groups=2))
        elif kind == "max":
            x = b.node("MaxPool", x, kernel_shape=[2, 3], strides=[2, 2], pads=[0, 1, 0, 0],
                       ceil_mode=int(rng.integers(2)))
        elif kind == "average":
            x = b.node("AveragePool", x, kernel_shape=[2, 2], strides=[1, 2], pads=[1, 0, 0, 1], count_include_pad=1)
        elif kind == "affine":
            x = b.node("Mul", x, rng.uniform(0.5, 2, (1, c, 1, 1)))
            x = b.node("Add", rng.normal(0, 1, (c, 1, 1)), x)
        shape = _shape_of(b, x) if b.nodes else shape
    c, h, w = shape
    ending = rng.choice(["flatten", "global", "reshape", "none"])
    if ending == "global":
        x = b.node("GlobalAveragePool", x)
        h = w = 1
    if ending != "none":
        x = b.node("Reshape", x, np.array([-1, c * h * w])) if ending == "reshape" else b.node("Flatten", x)
        x = b.node("Gemm", x, rng.normal(0, (c * h * w) ** -0.5, (10, c * h * w)), rng.normal(0, 1, 10), transB=1)
        x = b.node("Relu", x)
        x = b.node("Add", b.node("MatMul", x, rng.normal(0, 0.3, (10, 7))), rng.normal(0, 1, 7))
    elif len(b.nodes) == 0:
        x = b.conv(rng, x, c, 3, 1)
    return b.model(x), (channels, size, size + 1)


def _shape_of(builder, tensor):
    inferred = onnx.shape_inference.infer_shapes(builder.model(tensor, check=False), strict_mode=True)
    return tuple(d.dim_value for d in inferred.graph.output[0].type.tensor_type.shape.dim[1:])
