"""golden.requantize against exact fractions and ONNX Runtime's QLinearConv."""
from fractions import Fraction
from math import floor

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from golden.convolution import accumulate, fold_bias
from golden.requantize import encode_residual_scale, encode_scale, requantize

LARGEST = 65535 / 16384


@pytest.mark.parametrize("scale, pair", [
    (1, (16384, 0)), (1.0, (16384, 0)), (2, (32768, 0)), (0.5, (32768, 2)), (LARGEST, (65535, 0)), (3.5, (57344, 0)),
    (0.1, (52429, 5)), (2.0**-30, (32768, 31)), (2.0**-31, (16384, 31)), (2.0**-46, (1, 31)), (2.0**-47, (0, 31)),
    (65535.75 / 65536, (32768, 1)), (65535.5 / 65536, (32768, 1)), (65535.25 / 65536, (65535, 2)),
])
def test_encoding(scale, pair):
    assert encode_scale(scale) == pair
    assert [int(v[0]) for v in encode_scale(np.array([scale]))] == list(pair)


def test_relative_error_of_the_encoding(rng):
    scales = rng.uniform(-30, 1.99, 5000)
    scales = 2.0**scales
    multiplier, shift = encode_scale(scales)
    assert multiplier.dtype == np.uint16 and shift.dtype == np.uint8
    assert multiplier.min() >= 32768
    for s, m, h in zip(scales.tolist(), multiplier.tolist(), shift.tolist()):
        assert abs(Fraction(m, 1 << h + 14) / Fraction(s) - 1) <= Fraction(1, 1 << 16)


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf"), 4, 65535.5 / 16384, [1, 0], 1e300])
def test_bad_scales(scale):
    with pytest.raises(ValueError, match="scale must be"):
        encode_scale(scale)


def test_bad_scale_types():
    for bad in ("1", None, 1j):
        with pytest.raises(TypeError, match="real numbers"):
            encode_scale(bad)


def test_residual_encoding():
    assert [encode_residual_scale(r) for r in (1, LARGEST, 2.0**-15, 2.0**-16, 0.3)] == [16384, 65535, 1, 0, 4915]
    for bad in (0, -2, 4, float("nan"), 65535.5 / 16384):
        with pytest.raises(ValueError, match="ratio must be"):
            encode_residual_scale(bad)
    with pytest.raises(ValueError, match="one number"):
        encode_residual_scale([1.0])


def test_equals_one_exact_rounding(rng):
    """``t = floor(A m / 2**(s+14) + v / 2**14 + 1/2)`` in exact fractions, extremes and ties included."""
    count = 3000
    acc = rng.integers(-(1 << 31), 1 << 31, count)
    acc[::3] >>= rng.integers(0, 31, len(acc[::3]))
    bias = rng.integers(-(1 << 31), 1 << 31, count)
    acc[:4], bias[:4] = [-(1 << 31), (1 << 31) - 1] * 2, [-(1 << 31), (1 << 31) - 1, 0, 0]
    bias[1::3] >>= 16
    multiplier, shift = rng.integers(0, 65536, count), rng.integers(0, 32, count)
    multiplier[:4], shift[:4] = 65535, [0, 0, 31, 31]
    residual = rng.integers(-128, 128, count).astype(np.int8)
    ratio, rz, z, low, high = 40000, -128, 5, -120, 100
    got = requantize(acc, bias=bias, multiplier=multiplier, shift=shift, zero_point=z, low=low, high=high,
                     residual=residual, residual_zero_point=rz, residual_multiplier=ratio)
    inside = 0
    for i in range(count):
        exact = Fraction((int(acc[i]) + int(bias[i])) * int(multiplier[i]), 1 << int(shift[i]) + 14)
        exact += Fraction((int(residual[i]) - rz) * ratio, 1 << 14)
        want = min(max(floor(exact + Fraction(1, 2)) + z, low), high)
        assert got[i] == want
        inside += low < want < high
    assert inside > 80


@pytest.mark.parametrize("acc, want", [(-3, -1), (-1, 0), (1, 1), (3, 2), (5, 3), (-5, -2)])
def test_halves_round_up(acc, want):
    assert requantize(np.array([acc]), bias=0, multiplier=32768, shift=2, zero_point=0).tolist() == [want]


def test_scale_one_is_the_identity():
    acc = np.arange(-128, 128)
    multiplier, shift = encode_scale(1)
    assert requantize(acc, bias=0, multiplier=multiplier, shift=shift, zero_point=0).tolist() == acc.tolist()


@pytest.mark.parametrize("change, text", [
    ({"acc": [1 << 31]}, "acc must be in"), ({"bias": [1 << 31]}, "bias must be in"),
    ({"multiplier": -1}, "multiplier"), ({"shift": 32}, "shift must be in 0..31"), ({"zero_point": 128}, "zero_point"),
    ({"low": 5, "high": 4}, "low must"),
    ({"bias": [1, 2]}, "one for each of"), ({"residual": [1, 2]}, "residual must have"),
    ({"residual": [300]}, "residual must be in"), ({"residual": [1], "residual_multiplier": 1 << 16}, "residual_mul")])
def test_values_out_of_range(change, text):
    with pytest.raises(ValueError, match=text):
        requantize(**{"acc": [0], "bias": 0, "multiplier": 1, "shift": 0, "zero_point": 0} | change)


def test_floats_are_refused():
    for name in ("acc", "bias", "multiplier"):
        with pytest.raises(TypeError, match=f"{name} must be an integer array"):
            requantize(**{"acc": [0], "bias": 0, "multiplier": 1, "shift": 0, "zero_point": 0} | {name: [0.5]})


def test_within_one_unit_of_qlinearconv(rng):
    """`QLinearConv` rounds a float32 product half to even. At most one unit apart, and rarely: a difference needs the
    exact value within about ``|t| (2**-16 + 2**-22)`` of a rounding boundary, |t| <= 128: chance below 2**-8 each.
    """
    differ = total = 0
    for _ in range(40):
        n, h, w, c, k = (int(v) for v in rng.integers((1, 5, 5, 1, 1), (3, 12, 13, 40, 20)))
        x = rng.integers(-128, 128, (n, h, w, c)).astype(np.int8)
        weights = rng.integers(-127, 128, (k, 3, 3, c)).astype(np.int8)
        bias = rng.integers(-5000, 5000, k).astype(np.int32)
        zx, zy, sx = int(rng.integers(-128, 128)), int(rng.integers(-128, 128)), np.float32(0.02)
        sw = rng.uniform(0.001, 0.01, k).astype(np.float32)
        acc = accumulate(x, weights, pads=(1, 0, 1, 2), stride=(2, 1), pad_value=zx)
        bias_in = fold_bias(bias, weights, zx)
        spread = np.abs(acc + bias_in).max(axis=(0, 1, 2)) * sx * sw
        sy = np.float32(np.median(spread) / 128)
        constants = {"sx": sx, "zx": np.int8(zx), "w": weights.transpose(0, 3, 1, 2), "sw": sw,
                     "zw": np.zeros(k, np.int8), "sy": sy, "zy": np.int8(zy), "b": bias}
        constants = [numpy_helper.from_array(np.ascontiguousarray(v), name) for name, v in constants.items()]
        node = helper.make_node("QLinearConv", ["x", "sx", "zx", "w", "sw", "zw", "sy", "zy", "b"], ["y"],
                                pads=(1, 0, 1, 2), strides=(2, 1))
        graph = helper.make_graph([node], "one", [helper.make_tensor_value_info("x", TensorProto.INT8, [n, c, h, w])],
                                  [helper.make_tensor_value_info("y", TensorProto.INT8, None)], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (want,) = session.run(None, {"x": np.ascontiguousarray(x.transpose(0, 3, 1, 2))})
        multiplier, shift = encode_scale(np.float64(sx) * sw / np.float64(sy))
        got = requantize(acc, bias=bias_in, multiplier=multiplier, shift=shift, zero_point=zy)
        apart = np.abs(got.astype(int) - want.transpose(0, 2, 3, 1))
        assert apart.max() <= 1
        differ, total = differ + np.count_nonzero(apart), total + apart.size
    print(f"{differ} of {total} outputs differ by one unit")
    assert total > 5_000 and differ <= total / 256
