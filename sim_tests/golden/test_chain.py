"""golden.chain against plain loops, exact fractions, golden.convolution and golden.requantize."""
from dataclasses import replace
from fractions import Fraction
from math import floor

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from golden.chain import (Chain, IntegerChain, Product, Requantizer, Stage, array_cycles, convolve, quantize_chain,
                          quantize_rows, three_stages)
from golden.convolution import accumulate, fold_bias
from golden.requantize import requantize
from spec.errors import InputError

GEOMETRIES = [
    {}, {"stride": (2, 2), "pads": (1, 1, 1, 1)}, {"pads": (1, 1, 1, 1)},
    {"stride": (2, 1), "pads": (0, 2, 1, 1), "dilation": (1, 2)},
    {"stride": (1, 3), "pads": (2, 0, 2, 0), "dilation": (2, 1)},
]


def slow_convolution(x, w, stride=(1, 1), pads=(0, 0, 0, 0), dilation=(1, 1), groups=1):
    """By plain loops over every output and every product."""
    (n, h, wd, _), (k, r, s, cg) = x.shape, w.shape
    ho = (h + pads[0] + pads[2] - dilation[0] * (r - 1) - 1) // stride[0] + 1
    wo = (wd + pads[1] + pads[3] - dilation[1] * (s - 1) - 1) // stride[1] + 1
    out = np.zeros((n, ho, wo, k))
    for b, y, z, o in np.ndindex(out.shape):
        for dy, dz, ci in np.ndindex(r, s, cg):
            py, pz = y * stride[0] - pads[0] + dy * dilation[0], z * stride[1] - pads[1] + dz * dilation[1]
            if 0 <= py < h and 0 <= pz < wd:
                out[b, y, z, o] += w[o, dy, dz, ci] * x[b, py, pz, o // (k // groups) * cg + ci]
    return out


def random_chain(rng, geometry, *, integers=False, inputs=6, r_in=3, r_out=4, outputs=5, kernel=(3, 2)):
    """Three stages with random weights."""
    draw = (lambda *s: rng.integers(-128, 128, s).astype(np.int8)) if integers else (lambda *s: rng.normal(size=s))
    stages = (Stage(weights=draw(r_in, 1, 1, inputs)), Stage(weights=draw(r_out, *kernel, r_in), **geometry),
              Stage(weights=draw(outputs, 1, 1, r_out)))
    return stages if integers else Chain(stages=stages)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("groups", [1, 2])
def test_float_convolution_equals_loops(rng, geometry, groups):
    x, w = rng.normal(size=(2, 6, 7, 4)), rng.normal(size=(6, 3, 2, 4 // groups))
    want = slow_convolution(x, w, groups=groups, **geometry)
    got = convolve(x, w, groups=groups, **geometry)
    assert got.shape == want.shape and np.abs(got - want).max() < 1e-12


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_chain_equals_the_dense_convolution(rng, geometry):
    chain, x = random_chain(rng, geometry), rng.normal(size=(2, 7, 8, 6))
    a, g, b = chain.stages[2].weights[:, 0, 0], chain.stages[1].weights, chain.stages[0].weights[:, 0, 0]
    dense = chain.to_dense()
    assert np.abs(dense - np.einsum("oa,arsb,bi->orsi", a, g, b)).max() < 1e-12
    results = chain.forward(x)
    want = convolve(x, dense, **geometry)
    assert len(results) == 3 and results[-1].shape == want.shape and np.abs(results[-1] - want).max() < 1e-11


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("zero_point", [0, -128, 7])
def test_exact_integer_chain_is_the_dense_integer_convolution(rng, geometry, zero_point):
    """Bit for bit, at extremes too, whatever the zero point; padding reads the zero point."""
    stages = random_chain(rng, geometry, integers=True)
    chain = IntegerChain(stages=stages, requantizers=(None,) * 3, zero_point=zero_point)
    dense = chain.to_dense()
    assert dense.dtype == np.int64
    for x in (rng.integers(-128, 128, (2, 7, 8, 6)).astype(np.int8), np.full((1, 7, 8, 6), -128, np.int8),
              np.full((1, 7, 8, 6), 127, np.int8)):
        points = chain.run(x)
        want = accumulate(x, dense, **geometry, pad_value=zero_point)
        want = want + fold_bias(np.zeros(5, np.int64), dense, zero_point)
        assert len(points) == 3 and points[-1].output.shape == want.shape
        assert np.array_equal(points[-1].output, want)


@pytest.mark.parametrize("bits", [(8, 8, 8), (16, 8, 8), (8, 16, 8), (16, 16, 16)])
def test_requantised_stages_are_what_they_say(rng, bits):
    """Each checkpoint follows from the one before by `accumulate` and one exact rounding in fractions."""
    geometry = {"stride": (2, 1), "pads": (1, 0, 1, 1)}
    stages = random_chain(rng, geometry, integers=True)
    requantizers = tuple(Requantizer(
        bias=rng.integers(-5000, 5000, len(s.weights)), multiplier=rng.integers(20000, 65536, len(s.weights)),
        shift=rng.integers(8, 11, len(s.weights)) + 7 * (before == 16) - 7 * (b == 16),
        zero_point=int(rng.integers(-100, 100)), bits=b) for s, b, before in zip(stages, bits, (8, *bits)))
    x, zero = rng.integers(-128, 128, (1, 5, 4, 6)).astype(np.int8), -3
    points, at = IntegerChain(stages=stages, requantizers=requantizers, zero_point=zero).run(x), x
    inside = 0
    for stage, q, point, width in zip(stages, requantizers, points, bits, strict=True):
        acc = accumulate(at, stage.weights, **stage.geometry, pad_value=zero)
        assert np.array_equal(point.accumulator, acc)
        assert point.output.dtype == (np.int8 if width == 8 else np.int16) and point.output.shape == acc.shape
        lo, hi = -(1 << width - 1), (1 << width - 1) - 1
        for index in np.ndindex(acc.shape):
            k = index[-1]
            exact = Fraction((int(acc[index]) + int(q.bias[k])) * int(q.multiplier[k]), 1 << int(q.shift[k]) + 14)
            want = min(max(floor(exact + Fraction(1, 2)) + q.zero_point, lo), hi)
            assert point.output[index] == want
            inside += lo < want < hi
        at, zero = point.output, q.zero_point
    assert inside > 50


def test_sixteen_bits_agree_with_golden_requantize_where_both_fit(rng):
    acc = rng.integers(-(1 << 15), 1 << 15, (50, 4))
    parameters = {"bias": rng.integers(-999, 999, 4), "multiplier": rng.integers(16384, 65536, 4),
                  "shift": rng.integers(5, 9, 4), "zero_point": -7}
    wide = Requantizer(**parameters, bits=16, low=-128, high=127).apply(acc)
    assert np.array_equal(wide, requantize(acc, **parameters)) and np.unique(wide).size > 20
    assert np.array_equal(Requantizer(**parameters, low=-9, high=30).apply(acc),
                          requantize(acc, **parameters, low=-9, high=30))
    free = Requantizer(**parameters, bits=16).apply(acc)
    assert free.max() > 127 and np.array_equal(np.clip(free, -128, 127), wide)
    ends = Requantizer(multiplier=65535, shift=0, bits=16).apply(np.array([-(1 << 31), (1 << 31) - 1]))
    assert ends.tolist() == [-32768, 32767]


def test_requantizer_refuses():
    with pytest.raises(InputError, match="bits must be 8 or 16, not 12"):
        Requantizer(multiplier=1, shift=0, bits=12)
    for name in ("low", "high", "zero_point"):
        with pytest.raises(ValueError, match=f"{name} must fit 8 bits, not 300"):
            Requantizer(multiplier=1, shift=0, **{name: 300})
    with pytest.raises(ValueError, match="low must be at most high"):
        Requantizer(multiplier=1, shift=0, low=4, high=3)
    acc = np.zeros((2, 3), np.int64)
    for bits in (8, 16):
        for name, bad in (("multiplier", 65536), ("shift", 32), ("shift", -1), ("bias", 1 << 31)):
            with pytest.raises(ValueError, match=f"{name} must be in"):
                Requantizer(**{"multiplier": 1, "shift": 0, name: bad}, bits=bits).apply(acc)
        with pytest.raises(ValueError, match="multiplier must be one number or one for each"):
            Requantizer(multiplier=[1, 2], shift=0, bits=bits).apply(acc)
        with pytest.raises(OverflowError, match="must fit 32 bits"):
            Requantizer(multiplier=1, shift=0, bits=bits).apply(acc + (1 << 31))


def test_quantised_chain_stays_near_the_float_one(rng):
    """The bound is derived: each stage's half unit, carried through the weights after it, plus the weights' error."""
    geometry = {"pads": (1, 1, 1, 1)}
    chain = random_chain(rng, geometry, kernel=(3, 3))
    x, scale, zero = rng.integers(-128, 128, (3, 6, 6, 6)).astype(np.int8), 0.02, -5
    bias = rng.normal(size=5)
    wanted = chain.forward((x.astype(np.int64) - zero) * scale)[-1] + bias
    out_scale = np.abs(wanted).max() / 127
    errors = {}
    for bits in ((8, 8, 8), (16, 16, 8)):
        q = quantize_chain(chain, x, scale=scale, zero_point=zero, output_scale=out_scale, bits=bits, bias=bias)
        points = q.run(x)
        for point, width in zip(points[:2], bits):           # intermediates use their whole format
            assert 0.97 <= np.abs(point.output.astype(int)).max() / (2 ** (width - 1) - 1) <= 1
        got = points[-1].output * out_scale
        errors[bits] = np.abs(got - wanted).max()
        # The error of a stage's result: its own rounding, its weights' rounding, and what came in.
        bound, value = 0.0, (x.astype(np.int64) - zero) * scale
        for n, (stage, result) in enumerate(zip(chain.stages, chain.forward(value))):
            w = np.abs(stage.weights).reshape(len(stage.weights), -1)
            row = w.max(axis=1) / 127
            inputs = np.abs(value).max() + bound
            last = n == 2
            unit = out_scale if last else np.abs(result).max() / (2 ** (bits[n] - 1) - 1)
            grown = w.sum(axis=1) * bound + row / 2 * w.shape[1] * inputs
            offset = row.max() * 0.02 if last else 0                # the bias is rounded too
            bound = float((grown + unit / 2 + np.abs(result).max() * 2.0**-15 + offset).max())
            value = result
        assert errors[bits] <= bound + out_scale
    assert errors[16, 16, 8] <= errors[8, 8, 8] and errors[16, 16, 8] < 3 * out_scale


def test_quantise_refuses(rng):
    chain, x = random_chain(rng, {}), rng.integers(-9, 9, (1, 4, 4, 6))
    with pytest.raises(InputError, match="bits must be one width for each of 3 stages"):
        quantize_chain(chain, x, scale=1, output_scale=1, bits=(8, 8))
    with pytest.raises(InputError, match="bits must be 8 or 16"):
        quantize_chain(chain, x, scale=1, output_scale=1, bits=(8, 8, 9))
    with pytest.raises(ValueError, match="scale must be below"):
        quantize_chain(chain, x, scale=1, output_scale=1e-9)


def test_a_silent_channel_is_quantised(rng):
    stages = list(random_chain(rng, {}).stages)
    weights = stages[1].weights.copy()
    weights[2] = 0
    stages[1] = replace(stages[1], weights=weights)
    x = rng.integers(-128, 128, (1, 4, 4, 6)).astype(np.int8)
    q = quantize_chain(Chain(stages=tuple(stages)), x, scale=0.1, output_scale=1.0)
    assert not q.run(x)[1].output[..., 2].any() and q.run(x)[1].output.any()


@given(st.integers(0, 2**32), st.sampled_from([8, 16]))
def test_rows_quantise_within_half_a_unit(seed, bits):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(4, 3, 2)) * 10.0 ** rng.integers(-6, 6, (4, 1, 1))
    w[1] = 0
    q, scale = quantize_rows(w, bits)
    top = (1 << bits - 1) - 1
    assert np.abs(w - q * scale[:, None, None]).max(axis=(1, 2)).tolist() <= (scale / 2 * (1 + 1e-9)).tolist()
    assert np.abs(q.astype(int)).reshape(4, -1).max(axis=1).tolist() == [top, 0, top, top] and scale[1] == 1


def test_equalising_changes_nothing_but_the_ranges(rng):
    chain = random_chain(rng, {"pads": (1, 1, 1, 1)})
    stages = [replace(s, weights=s.weights * 10.0 ** rng.integers(-3, 3, (len(s.weights), 1, 1, 1)))
              for s in chain.stages[:2]]
    chain = Chain(stages=(*stages, chain.stages[2]))
    x = rng.normal(size=(2, 5, 5, 6))
    even = chain.equalized(x)
    assert np.array_equal(even.to_dense(), chain.to_dense())
    before, after = chain.forward(x), even.forward(x)
    assert np.array_equal(before[-1], after[-1])
    for n in (0, 1):
        span = np.abs(after[n]).max(axis=(0, 1, 2))
        assert span.max() / span.min() <= 2 * (1 + 1e-12)
        assert np.abs(before[n]).max(axis=(0, 1, 2)).max() / np.abs(before[n]).max(axis=(0, 1, 2)).min() > 4


def test_equalising_with_groups(rng):
    first = rng.normal(size=(6, 1, 1, 4)) * 100 ** rng.integers(0, 3, (6, 1, 1, 1))
    chain = Chain(stages=(Stage(weights=first), Stage(weights=rng.normal(size=(4, 3, 3, 3)), groups=2),
                          Stage(weights=rng.normal(size=(5, 1, 1, 4)))))
    x = rng.normal(size=(1, 5, 5, 4))
    even = chain.equalized(x)
    assert np.array_equal(even.to_dense(), chain.to_dense()) and even.stages[1].groups == 2
    span = np.abs(even.forward(x)[0]).max(axis=(0, 1, 2))
    assert span.max() / span.min() <= 2 * (1 + 1e-12)


def test_stage_and_chain_refuse(rng):
    one = Stage(weights=rng.normal(size=(4, 1, 1, 3)))
    wide = Stage(weights=rng.normal(size=(4, 3, 3, 4)))
    with pytest.raises(ValueError, match="stages must not be empty"):
        Chain(stages=())
    with pytest.raises(ValueError, match="stage 1 must take the 4 channels of stage 0, not 3"):
        Chain(stages=(one, one))
    for second in (wide, replace(wide, weights=wide.weights[:, :1, :1], stride=(2, 1)),
                   replace(wide, weights=wide.weights[:, :1, :1], pads=(0, 0, 0, 1))):
        with pytest.raises(ValueError, match="at most one stage may have"):
            Chain(stages=(one, wide, second))
    with pytest.raises(ValueError, match=r"weights must be \[K, R, S"):
        Stage(weights=np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"groups \(3\) must divide 4 outputs"):
        Stage(weights=np.ones((4, 1, 1, 1)), groups=3)
    with pytest.raises(ValueError, match="finite and not empty"):
        Chain(stages=(Stage(weights=np.full((1, 1, 1, 1), np.nan)),))
    with pytest.raises(TypeError, match="weights must be real"):
        Chain(stages=(Stage(weights=np.ones((1, 1, 1, 1), complex)),))
    with pytest.raises(TypeError, match="weights must be an integer array"):
        IntegerChain(stages=(one,), requantizers=(None,))
    with pytest.raises(ValueError, match="requantizers must be one for each of 1 stages, not 2"):
        IntegerChain(stages=(Stage(weights=np.ones((1, 1, 1, 1), np.int8)),), requantizers=(None, None))
    with pytest.raises(ValueError, match="x must have 4 axes"):
        convolve(np.ones((2, 2)), wide.weights)
    with pytest.raises(ValueError, match=r"groups \(2\) must divide"):
        convolve(np.ones((1, 4, 4, 4)), wide.weights, groups=2)


def test_counts(rng):
    """The reference's formulas, section 3, with unlike numbers everywhere."""
    i, o, r_in, r_out, size = 10, 14, 3, 5, (9, 12)
    chain = three_stages(rng.normal(size=(o, r_out)), rng.normal(size=(r_out, 3, 3, r_in)), rng.normal(size=(r_in, i)),
                         stride=(2, 2), pads=(1, 1, 1, 1))
    ho, wo = 5, 6
    assert chain.parameters == i * r_in + 9 * r_in * r_out + r_out * o
    assert chain.macs(size) == i * r_in * 9 * 12 + (9 * r_in * r_out + r_out * o) * ho * wo
    assert chain.dense_macs(size) == i * o * 9 * ho * wo
    assert chain.bits() == 8 * chain.parameters and chain.bits(16) == 16 * chain.parameters
    assert chain.products(size) == [(3, 10, 108, 1), (5, 27, 30, 1), (14, 5, 30, 1)]
    assert [p.result_words for p in chain.products(size)] == [324, 150, 420]
    grouped = Stage(weights=rng.normal(size=(6, 3, 3, 2)), groups=3)
    assert grouped.product((5, 5)) == (2, 18, 9, 3) and grouped.product((5, 5)).macs == 6 * 18 * 9
    assert Product(17, 5, 33, 2).cycles(16, 32) == 2 * 2 * 2 * 5 and array_cycles([Product(1, 7, 1)] * 2, 16, 16) == 14


def test_break_even_rank():
    """Section 3: at stride 1, I = O, equal ranks, 3x3, the chain costs less below r / C = 0.895."""
    c = 200
    costs = {r: three_stages(np.broadcast_to(0.0, (c, r)), np.broadcast_to(0.0, (r, 3, 3, r)),
                             np.broadcast_to(0.0, (r, c)), pads=(1, 1, 1, 1)) for r in (178, 180)}
    assert costs[178].macs((4, 4)) < costs[178].dense_macs((4, 4))
    assert costs[180].macs((4, 4)) > costs[180].dense_macs((4, 4))
