"""golden.convolution against ONNX Runtime's ConvInteger and MatMulInteger, element by element."""
import itertools

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from golden.convolution import accumulate, check_accumulator, fold_bias, output_size
from golden.structured import tasd_series


def run_onnx(node, kind, feeds):
    """Output of a one-node model; ``feeds`` are int8 arrays, ``kind`` the output type."""
    info = [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for k, v in feeds.items()]
    graph = helper.make_graph([node], "one", info, [helper.make_tensor_value_info("y", kind, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def conv_integer(x, w, zero_point, *, stride, pads, dilation, groups):
    """int32 [N, Ho, Wo, K] by ONNX Runtime, from NHWC and KRSC."""
    node = helper.make_node("ConvInteger", ["x", "w", "z"], ["y"], strides=stride, pads=pads, dilations=dilation,
                            group=groups)
    feeds = {"x": np.ascontiguousarray(x.transpose(0, 3, 1, 2)), "w": np.ascontiguousarray(w.transpose(0, 3, 1, 2)),
             "z": np.array(zero_point, np.int8)}
    return run_onnx(node, TensorProto.INT32, feeds).transpose(0, 2, 3, 1)


GRID = list(itertools.product([(1, 1), (2, 1), (2, 3)], [(0, 0, 0, 0), (1, 1, 1, 1), (2, 0, 1, 3)], [(1, 1), (2, 1)],
                              [1, 3, "depthwise"]))


@pytest.mark.parametrize("stride, pads, dilation, groups", GRID)
def test_equals_conv_integer(rng, stride, pads, dilation, groups):
    for kernel in ((1, 1), (3, 3), (2, 5)):
        g = 6 if groups == "depthwise" else groups
        c, k = (6, 12) if groups == "depthwise" else (3 * int(rng.integers(1, 6)), 3 * int(rng.integers(1, 5)))
        n, h, w = (int(v) for v in rng.integers((1, 7, 9), (4, 14, 15)))
        x = rng.integers(-128, 128, (n, h, w, c)).astype(np.int8)
        weights = rng.integers(-128, 128, (k, *kernel, c // g)).astype(np.int8)
        zero_point, bias = int(rng.integers(-128, 128)), rng.integers(-1000, 1000, k)
        how = {"stride": stride, "pads": pads, "dilation": dilation, "groups": g}
        acc = accumulate(x, weights, pad_value=zero_point, **how)
        want = conv_integer(x, weights, zero_point, **how)
        assert acc.dtype == np.int64
        assert np.array_equal(acc + fold_bias(bias, weights, zero_point), want.astype(np.int64) + bias)


@pytest.mark.parametrize("x, w", [(-128, -128), (-128, 127), (127, -128)])
def test_whole_vector_extremes(x, w):
    """Every product at its extreme: the largest sums a layer of 512 channels can make."""
    x, w = np.full((1, 5, 5, 512), x, np.int8), np.full((3, 3, 3, 512), w, np.int8)
    acc = accumulate(x, w, pads=(1, 1, 1, 1), pad_value=int(x.flat[0]))
    assert (acc == 9 * 512 * int(x.flat[0]) * int(w.flat[0])).all()
    how = {"stride": (1, 1), "pads": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1}
    assert np.array_equal(accumulate(x, w, **how), conv_integer(x, w, 0, **how))


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 17, 9), (64, 100, 10)])
def test_equals_matmul_integer(rng, shape):
    m, k, n = shape
    a, b = rng.integers(-128, 128, (m, k)).astype(np.int8), rng.integers(-128, 128, (k, n)).astype(np.int8)
    node = helper.make_node("MatMulInteger", ["a", "b", "z"], ["y"])
    want = run_onnx(node, TensorProto.INT32, {"a": a, "b": b, "z": np.array(5, np.int8)})
    weights = b.T.reshape(n, 1, 1, k)
    got = accumulate(a.reshape(m, 1, 1, k), weights) + fold_bias(np.zeros(n, int), weights, 5)
    assert np.array_equal(got.reshape(m, n), want)


def test_terms_add_up(rng):
    x = rng.integers(-128, 128, (2, 6, 5, 20)).astype(np.int8)
    w = rng.integers(-128, 128, (7, 3, 3, 20)).astype(np.int8)
    terms, rest = tasd_series(w, [(4, 8), (1, 8)])
    whole = accumulate(x, w, pads=(1, 1, 1, 1))
    assert np.array_equal(accumulate(x, [*terms, rest], pads=(1, 1, 1, 1)), whole)
    parts = sum(accumulate(x, t, pads=(1, 1, 1, 1)) for t in (*terms, rest))
    assert np.array_equal(parts, whole)
    bias = np.arange(7)
    assert np.array_equal(fold_bias(bias, [*terms, rest], -7), fold_bias(bias, w, -7))


@pytest.mark.parametrize("bits", [8, 20, 40])
def test_exact_in_every_arithmetic(rng, bits):
    """Weights of 8, 20 and 40 bits make the sum run in float32, float64 and int64."""
    x, w = rng.integers(-128, 128, (1, 4, 4, 30)), rng.integers(-(1 << bits - 1), 1 << bits - 1, (2, 3, 3, 30))
    got = accumulate(x, w)
    for y, z, k in itertools.product(range(2), range(2), range(2)):
        exact = sum(int(a) * int(b) for a, b in zip(x[0, y:y + 3, z:z + 3].ravel(), w[k].ravel()))
        assert int(got[0, y, z, k]) == exact
    with pytest.raises(OverflowError, match="do not fit 64 bits"):
        accumulate(x, np.full((1, 1, 1, 30), 1 << 60))


def test_pad_value_wider_than_the_input():
    x = np.ones((1, 1, 1, 1), np.int8)
    assert accumulate(x, np.ones((1, 3, 3, 1), int), pads=(1, 1, 1, 1), pad_value=300).item() == 1 + 8 * 300


def test_many_images_are_done_in_parts(rng, monkeypatch):
    x, w = rng.integers(-128, 128, (5, 6, 6, 4)).astype(np.int8), rng.integers(-128, 128, (3, 3, 3, 4))
    whole = accumulate(x, w)
    monkeypatch.setattr("golden.convolution._CHUNK_BYTES", 2 * 4 * 4 * 36 * 4)
    assert np.array_equal(accumulate(x, w), whole)


def test_output_size():
    assert output_size((224, 224), (7, 7), stride=(2, 2), pads=(3, 3, 3, 3)) == (112, 112)
    assert output_size((5, 9), (3, 2), stride=(2, 3), pads=(1, 0, 0, 2), dilation=(2, 3)) == (1, 3)


@pytest.mark.parametrize("change, text", [
    ({"x": np.zeros((1, 4, 4), np.int8)}, r"x must be \[N, H, W, C\]"),
    ({"weights": np.zeros((2, 3, 3), np.int8)}, r"weights must be \[K, R, S"),
    ({"weights": []}, "at least one term"),
    ({"weights": [np.zeros((2, 3, 3, 6), int), np.zeros((2, 3, 3, 3), int)]}, "share one shape"),
    ({"groups": 4}, "groups .4. must divide"), ({"groups": 2}, "into 6 inputs each"), ({"groups": 0}, "groups must"),
    ({"stride": (0, 1)}, "stride must"), ({"stride": 2}, "stride must"), ({"dilation": (1,)}, "dilation must"),
    ({"pads": (0, 0)}, "pads must"), ({"pads": (0, -1, 0, 0)}, "pads must"), ({"dilation": (2, 2)}, "must fit"),
])
def test_wrong_shapes(change, text):
    with pytest.raises(ValueError, match=text):
        accumulate(**{"x": np.zeros((1, 4, 4, 6), np.int8), "weights": np.zeros((2, 3, 3, 6), np.int8)} | change)


def test_floats_are_refused():
    x, w = np.zeros((1, 4, 4, 6), np.int8), np.zeros((2, 3, 3, 6), np.int8)
    for a, b in ((x.astype(float), w), (x, w.astype(np.float32)), (x, [w, w.astype(float)])):
        with pytest.raises(TypeError, match="must be an integer array"):
            accumulate(a, b)
    with pytest.raises(TypeError, match="bias must be an integer array"):
        fold_bias(np.zeros(2), w, 0)
    with pytest.raises(ValueError, match="bias must have one element"):
        fold_bias(np.zeros(3, int), w, 0)


def test_accumulator_ends():
    ends = np.array([[-(1 << 31), (1 << 31) - 1]])
    assert check_accumulator(ends) is ends
    for bad in (ends - [1, 0], ends + [0, 1]):
        with pytest.raises(OverflowError, match="must fit 32 bits"):
            check_accumulator(bad)
    with pytest.raises(OverflowError, match=r"Accumulator \(1,\) must fit 16 bits, not 32768"):
        check_accumulator(np.array([0, 32768]), bits=16)
    with pytest.raises(TypeError):
        check_accumulator(np.zeros(2))
