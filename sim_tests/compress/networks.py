"""Compressed networks for the tests."""
import numpy as np

from compress import onnx_import
from compress.quantize import Calibration, quantize
from sim_tests.compress.onnx_models import Builder


def every_layer_kind(rng):
    """An ONNX model with every layer kind: convolution, depthwise, residual, both pools, addition, fully connected."""
    b = Builder((3, 8, 8))
    x = b.node("Relu", b.batch_norm(rng, b.conv(rng, "x", 3, 8, pads=[1] * 4), 8))
    y = b.node("Relu", b.conv(rng, x, 8, 8, pads=[1] * 4))
    x = b.node("Relu", b.node("Add", b.conv(rng, y, 8, 8, pads=[1] * 4), x))
    x = b.node("Add", b.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]),
               b.node("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2]))
    x = b.node("Clip", b.conv(rng, x, 8, 8, groups=8, pads=[1] * 4), np.float32(-1), np.float32(1))
    x = b.node("Flatten", x)
    x = b.node("Gemm", x, rng.normal(0, 0.1, (128, 5)), rng.normal(0, 0.1, 5))
    return b.model(x)


def small_network(method="nm:2:4", *, seed=0, **options):
    """(network, float inputs NHWC, graph) of `every_layer_kind`."""
    rng = np.random.default_rng(seed)
    graph = onnx_import.parse(every_layer_kind(rng).SerializeToString(), name="small")
    x = rng.normal(0, 1, (12, *graph.shapes[graph.input])).astype(np.float32)
    return quantize(graph, Calibration(x=x, source="test"), method, **options), x, graph


def same_network(a, b):
    """Asserts that two networks are equal in every field and every array element."""
    assert (a.name, a.input, a.output, a.tensors, a.provenance) == (b.name, b.input, b.output, b.tensors, b.provenance)
    assert len(a.layers) == len(b.layers)
    for one, two in zip(a.layers, b.layers):
        assert type(one) is type(two)
        _same_fields(one, two)


def _same_fields(one, two):
    assert vars(one).keys() == vars(two).keys()
    for key, value in vars(one).items():
        other = getattr(two, key)
        if isinstance(value, np.ndarray):
            assert value.dtype == other.dtype and np.array_equal(value, other), key
        elif key == "terms":
            assert len(value) == len(other)
            for s, t in zip(value, other):
                _same_fields(s, t)
        elif key == "requantization":
            _same_fields(value, other)
        else:
            assert value == other, key
