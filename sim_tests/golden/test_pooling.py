"""golden.pooling against ONNX Runtime's MaxPool, and sums against accumulate with weights of one."""
import itertools

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from golden.convolution import accumulate
from golden.pooling import average_pool_sum, max_pool

GRID = list(itertools.product([(2, 2), (3, 3), (3, 2), (1, 4)], [(1, 1), (2, 2), (3, 1)],
                              [(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 2, 0)]))


@pytest.mark.parametrize("window, stride, pads", [g for g in GRID if max(g[2]) < min(g[0]) or not any(g[2])])
def test_max_equals_onnx_runtime(rng, window, stride, pads):
    x = rng.integers(-128, 128, (2, 9, 11, 5)).astype(np.int8)
    x[0] = -128
    node = helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=window, strides=stride, pads=pads)
    graph = helper.make_graph([node], "one", [helper.make_tensor_value_info("x", TensorProto.INT8, [2, 5, 9, 11])],
                              [helper.make_tensor_value_info("y", TensorProto.INT8, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (want,) = session.run(None, {"x": np.ascontiguousarray(x.transpose(0, 3, 1, 2))})
    got = max_pool(x, window, stride, pads)
    assert got.dtype == np.int8 and np.array_equal(got, want.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("window, stride, pads", GRID)
def test_sum_equals_depthwise_weights_of_one(rng, window, stride, pads):
    x = rng.integers(-128, 128, (2, 9, 11, 5)).astype(np.int8)
    want = accumulate(x, np.ones((5, *window, 1), int), stride=stride, pads=pads, groups=5, pad_value=-9)
    assert np.array_equal(average_pool_sum(x, window, stride, pads, -9), want)


def test_sum_of_extremes_does_not_wrap():
    x = np.full((1, 7, 7, 2), -128, np.int8)
    assert average_pool_sum(x, (7, 7)).tolist() == [[[[-6272, -6272]]]]


def test_bad_arguments():
    x = np.zeros((1, 4, 4, 1), np.int8)
    with pytest.raises(TypeError, match="must be int8, not int32"):
        max_pool(x.astype(np.int32), (2, 2))
    with pytest.raises(ValueError, match="must fit"):
        max_pool(x, (5, 2))
    with pytest.raises(ValueError, match="window must"):
        average_pool_sum(x, (0, 2))
    with pytest.raises(TypeError, match="integer array"):
        average_pool_sum(x.astype(float), (2, 2))
