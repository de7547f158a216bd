"""golden.basis against plain loops, the dense convolution (bit for bit in integers) and published figures."""
import doctest
from math import log2

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from golden import basis
from golden.basis import (ORDERS, Decomposition, IntegerDecomposition, decode, decompose, encode, encoded_bits, ir_bits,
                          psum_bits, rotation, signed_bits, ternarize)
from golden.chain import convolve
from golden.convolution import accumulate
from golden.structured import fits
from spec.config import IntSpec
from spec.errors import InputError

GEOMETRIES = [
    {}, {"pads": (1, 1, 1, 1)}, {"stride": (2, 2), "pads": (1, 1, 1, 1)}, {"stride": (2, 1), "pads": (0, 2, 1, 0)},
    {"stride": (1, 2), "pads": (2, 2, 1, 3), "dilation": (2, 1)},
]


def test_doctests():
    result = doctest.testmod(basis)
    assert result.attempted >= 5 and result.failed == 0


def ternary(rng, shape, density):
    return (rng.choice(np.array([-1, 1], np.int8), shape) * (rng.random(shape) < density)).astype(np.int8)


def integer_decomposition(rng, k=5, c=18, m=4, kernel=(3, 2), density=0.4):
    return IntegerDecomposition(basis=rng.integers(-128, 128, (m, *kernel)),
                                coefficients=ternary(rng, (k, c, m), density))


# -- float -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(6, 3, 3, 5), (4, 1, 5, 7), (2, 2, 3, 1), (1, 3, 3, 2)])
def test_decomposition_is_the_best_of_its_rank(rng, shape):
    w = rng.normal(size=shape) + 0.5                  # a mean that a centred analysis would lose
    k, r, s, c = shape
    rows = np.array([[w[o, :, :, i].ravel() for i in range(c)] for o in range(k)]).reshape(k * c, r * s)
    sigma = np.linalg.svd(rows, compute_uv=False)
    last = np.inf
    for count in range(1, len(sigma) + 1):
        d = decompose(w, count=count)
        dense = d.to_dense()
        slow = np.zeros(shape)
        for o, y, z, i in np.ndindex(shape):
            slow[o, y, z, i] = sum(d.coefficients[o, i, n] * d.basis[n, y, z] for n in range(count))
        assert dense.shape == shape and np.abs(dense - slow).max() < 1e-12
        lost = np.linalg.norm(w - dense) ** 2
        assert abs(lost - np.sum(sigma[count:] ** 2)) < 1e-9 and lost <= last + 1e-12
        assert abs(1 - lost / np.linalg.norm(w) ** 2 - d.meta["energy"]) < 1e-9 and d.meta["count"] == count
        flat = d.basis.reshape(count, -1)
        assert np.abs(flat @ flat.T - np.eye(count)).max() < 1e-12
        last = lost
        found = decompose(w, energy=min(1.0, d.meta["energy"]))
        assert len(found.basis) == count
        if d.meta["energy"] < 0.999:
            assert len(decompose(w, energy=d.meta["energy"] + 1e-6).basis) == count + 1
    assert last < 1e-12
    assert len(decompose(w, energy=1).basis) == len(sigma) and len(decompose(w, energy=1e-9).basis) == 1
    d = decompose(w, count=2)
    assert d.bits() == 8 * (2 * r * s + k * c * 2) and d.bits(4, 2) == 4 * 2 * r * s + 2 * k * c * 2


def test_all_basis_kernels_are_exact(rng):
    w = rng.normal(size=(6, 3, 3, 5))
    assert np.abs(decompose(w, count=9).to_dense() - w).max() < 1e-12


def test_an_exact_rank_is_found(rng):
    w = np.einsum("kcm,mrs->krsc", rng.normal(size=(6, 5, 3)), rng.normal(size=(3, 3, 3)))
    assert len(decompose(w, energy=1 - 1e-9).basis) == 3 and np.abs(decompose(w, count=3).to_dense() - w).max() < 1e-12


def test_a_zero_kernel():
    d = decompose(np.zeros((2, 3, 3, 2)), energy=0.9)
    assert len(d.basis) == 1 and not d.to_dense().any() and d.meta["energy"] == 1


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_float_orders_equal_the_dense_convolution(rng, geometry):
    d, x = decompose(rng.normal(size=(5, 3, 2, 7)), count=4), rng.normal(size=(2, 6, 7, 7))
    want = convolve(x, d.to_dense(), **geometry)
    shapes = {"coefficients_first": (2, 6, 7, 5, 4), "basis_first": (*want.shape[:3], 7, 4)}
    for order in ORDERS:
        middle, got = d.forward(x, order, **geometry)
        assert middle.shape == shapes[order] and got.shape == want.shape and np.abs(got - want).max() < 1e-11
    ir, _ = d.forward(x, **geometry)
    assert np.abs(ir[1, 2, 3, 4, 1] - d.coefficients[4, :, 1] @ x[1, 2, 3]).max() < 1e-12
    f, _ = d.forward(x, "basis_first", **geometry)
    assert np.abs(f[..., 3, 2] - convolve(x[..., 3:4], d.basis[2][None, ..., None], **geometry)[..., 0]).max() < 1e-12


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_rotation_inside_the_span(seed, count):
    rng = np.random.default_rng(seed)
    d, q = decompose(rng.normal(size=(4, 2, 3, 5)), count=count), rotation(count, rng)
    assert np.abs(q @ q.T - np.eye(count)).max() < 1e-12
    turned = d.rotated(q)
    assert np.abs(turned.to_dense() - d.to_dense()).max() < 1e-12
    assert np.abs(turned.basis.reshape(count, -1) - q @ d.basis.reshape(count, -1)).max() < 1e-12
    assert abs(np.linalg.norm(turned.coefficients) - np.linalg.norm(d.coefficients)) < 1e-9


def test_decompose_refuses(rng):
    w = rng.normal(size=(2, 3, 3, 2))
    for call, text in [
            (lambda: decompose(w, count=5), "count must be an integer in 1..4, not 5"),       # only K C = 4 kernels
            (lambda: decompose(w, count=0), "count must be an integer in 1..4, not 0"),
            (lambda: decompose(w, count=2.0), "count must be an integer in 1..4, not 2.0"),
            (lambda: decompose(w), "count must be given, or energy, but not both"),
            (lambda: decompose(w, count=1, energy=0.5), "but not both"),
            (lambda: decompose(w, energy=0), "energy must be a number above 0 and at most 1, not 0"),
            (lambda: decompose(w, energy=1.5), "energy must be"), (lambda: decompose(w, energy="x"), "energy must be"),
            (lambda: decompose(w, count=1).forward(np.ones((1, 4, 4, 2)), "x"), "order must be coefficients_first or"),
            (lambda: decompose(w, count=1).macs((4, 4), "x"), "order must be coefficients_first or"),
            (lambda: ternarize(decompose(w, count=1), threshold=-1), "threshold must be a number of at least 0"),
            (lambda: ternarize(decompose(w, count=1), threshold=float("nan")), "threshold must be a number"),
            (lambda: ternarize(decompose(w, count=1), threshold=99), "threshold must leave a non-zero coefficient"),
    ]:
        with pytest.raises(InputError, match=text):
            call()
    with pytest.raises(ValueError, match="weights must have 4 axes"):
        decompose(w[0], count=1)
    with pytest.raises(ValueError, match="x must have 2 channels, not 3"):
        decompose(w, count=1).forward(np.ones((1, 4, 4, 3)))
    d = decompose(w, count=2)
    for q in (np.eye(3), 2 * np.eye(2), np.ones((2, 2))):
        with pytest.raises(ValueError, match=r"q must be an orthogonal \[2, 2\] matrix"):
            d.rotated(q)
    with pytest.raises(ValueError, match=r"basis and coefficients must be \[M, R, S\] and \[K, C, M\]"):
        Decomposition(basis=d.basis, coefficients=d.coefficients[..., :1])


# -- integers ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype, pad_value", [(np.int8, 0), (np.int8, -128), (np.uint8, 0), (np.int8, 127)])
def test_both_orders_are_the_dense_integer_convolution(rng, geometry, dtype, pad_value):
    d = integer_decomposition(rng)
    info = np.iinfo(dtype)
    for x in (rng.integers(info.min, info.max + 1, (2, 6, 7, 18)).astype(dtype),
              np.full((1, 6, 7, 18), info.min, dtype), np.full((1, 6, 7, 18), info.max, dtype)):
        want = accumulate(x, d.integer_kernel(), **geometry, pad_value=pad_value)
        for order in ORDERS:
            points = d.run(x, order, **geometry, pad_value=pad_value, intermediate_bits=32)
            assert points.output.shape == want.shape and np.array_equal(points.output, want)
            assert points.saturations == 0


def test_the_reference_case(rng):
    """C = 24, K = 10, M = 6, 12x12, pad 1, strides 1 and 2."""
    d = integer_decomposition(rng, 10, 24, 6, (3, 3), 0.3)
    x = rng.integers(0, 256, (1, 12, 12, 24)).astype(np.uint8)
    for stride in (1, 2):
        geometry = {"stride": (stride, stride), "pads": (1, 1, 1, 1)}
        want = accumulate(x, d.integer_kernel(), **geometry)
        assert want.shape == (1, 12 // stride, 12 // stride, 10)
        assert all(np.array_equal(d.run(x, order, **geometry).output, want) for order in ORDERS)


@pytest.mark.parametrize("bits", [None, 8, 5])
@pytest.mark.parametrize("pad_value", [0, -9])
def test_checkpoints_by_loops(rng, bits, pad_value):
    """IR, each tap's product and the output from the definition, with saturation; the count of clamped IR values."""
    k, c, m, height, width = 2, 18, 3, 4, 5
    d = integer_decomposition(rng, k, c, m, (2, 3))
    x = rng.integers(-20, 21, (1, height, width, c)).astype(np.int8)
    stride, pads, dilation = (2, 1), (1, 0, 1, 2), (1, 2)
    points = d.run(x, stride=stride, pads=pads, dilation=dilation, pad_value=pad_value, intermediate_bits=bits,
                   taps=True)
    lo, hi = (-(1 << bits - 1), (1 << bits - 1) - 1) if bits else (-10**9, 10**9)
    ce, clamped, widest = d.coefficients.astype(int), 0, 0

    def exact_ir(y, z, o, n):
        inside = 0 <= y < height and 0 <= z < width
        return sum(int(ce[o, i, n]) * (int(x[0, y, z, i]) if inside else pad_value) for i in range(c))

    assert points.intermediate.shape == (1, height, width, k, m)
    for y, z, o, n in np.ndindex(height, width, k, m):
        value = exact_ir(y, z, o, n)
        held = min(max(value, lo), hi)
        clamped += held != value
        widest = max(widest, (value if value >= 0 else ~value).bit_length() + 1)
        assert points.intermediate[0, y, z, o, n] == held
    ho, wo = (height + 2 - 1 - 1) // 2 + 1, width + 2 - 4
    assert points.mac.shape == (1, ho, wo, k, m, 2, 3) and points.output.shape == (1, ho, wo, k)
    for y, z, o in np.ndindex(ho, wo, k):
        total = 0
        for n, dy, dz in np.ndindex(m, 2, 3):
            ir = min(max(exact_ir(y * 2 - 1 + dy, z + dz * 2, o, n), lo), hi)
            assert points.mac[0, y, z, o, n, dy, dz] == ir * int(d.basis[n, dy, dz])
            total += ir * int(d.basis[n, dy, dz])
        assert points.output[0, y, z, o] == total
    assert points.saturations == clamped and (bits == 5) <= (clamped > 0)
    assert points.exact_bits == widest


@pytest.mark.parametrize("order", ORDERS)
def test_exact_width_is_exact_and_one_less_is_not(rng, order):
    d = integer_decomposition(rng)
    x = rng.integers(-128, 128, (2, 5, 5, 18)).astype(np.int8)
    free = d.run(x, order)
    assert free.saturations == 0
    at = d.run(x, order, intermediate_bits=free.exact_bits)
    assert at.saturations == 0 and np.array_equal(at.output, free.output)
    counts = []
    for bits in range(free.exact_bits - 1, 2, -1):
        tight = d.run(x, order, intermediate_bits=bits)
        spec = IntSpec(bits)
        assert np.array_equal(tight.intermediate, np.clip(free.intermediate, spec.lo, spec.hi))
        assert tight.saturations == np.count_nonzero(tight.intermediate != free.intermediate) > 0
        assert tight.exact_bits == free.exact_bits
        counts.append(tight.saturations)
    assert counts == sorted(counts)


@pytest.mark.parametrize("channels, signed, bits", [
    (64, True, 15), (64, False, 15), (128, False, 16), (256, False, 17), (512, False, 18), (2048, False, 20),
    (2048, True, 20), (1, True, 9), (1, False, 9)])
def test_worst_case_widths_are_reached(channels, signed, bits):
    """Reference, section 4; at the extreme input with all coefficients of one sign, the run says the same width."""
    spec = IntSpec(8, signed=signed)
    assert ir_bits(channels, spec) == bits
    extreme = spec.lo if signed else spec.hi
    x = np.full((1, 1, 1, channels), extreme, np.int8 if signed else np.uint8)
    for sign in (1, -1):
        d = IntegerDecomposition(basis=np.full((1, 1, 1), -128), coefficients=np.full((1, channels, 1), sign))
        points = d.run(x)
        assert points.intermediate.ravel().tolist() == [sign * channels * extreme]
        assert points.exact_bits in (bits, bits - 1) and d.run(x, intermediate_bits=bits).saturations == 0
    assert max(signed_bits(v, v) for v in (channels * extreme, -channels * extreme)) == bits


def test_published_psum_widths():
    unsigned = IntSpec(8, signed=False)
    assert [psum_bits(c, 6, 9, unsigned) for c in (64, 512, 2048)] == [28, 31, 33]
    d = IntegerDecomposition(basis=np.full((6, 3, 3), -128), coefficients=np.full((1, 64, 6), -1))
    top = d.run(np.full((1, 3, 3, 64), 255, np.uint8)).output.ravel().tolist()
    assert top == [6 * 9 * 64 * 255 * 128] and signed_bits(top[0], top[0]) == 28


def test_signed_bits():
    for bits in range(1, 40):
        lo, hi = -(1 << bits - 1), (1 << bits - 1) - 1
        assert signed_bits(lo, hi) == bits and signed_bits(lo - 1, 0) == bits + 1 and signed_bits(0, hi + 1) == bits + 1


@given(st.integers(0, 2**32), st.sampled_from([0, 0.5, 0.7, 1.0]))
def test_ternary_fit(seed, threshold):
    rng = np.random.default_rng(seed)
    d = decompose(rng.normal(size=(6, 3, 3, 5)), count=4)
    t = ternarize(d, threshold=threshold)
    want = np.sign(d.coefficients) * (np.abs(d.coefficients) > threshold * np.abs(d.coefficients).mean(axis=(0, 1)))
    assert np.array_equal(t.coefficients, want) and np.abs(t.basis.astype(int)).max() == 127
    slow = np.zeros((6, 3, 3, 5))
    for o, y, z, i in np.ndindex(slow.shape):
        total = sum(int(t.coefficients[o, i, n]) * int(t.basis[n, y, z]) for n in range(4))
        slow[o, y, z, i] = t.alpha[o] * t.scale * total
    assert np.abs(t.to_dense() - slow).max() < 1e-9
    error = np.linalg.norm(d.to_dense() - slow) / np.linalg.norm(d.to_dense())
    assert abs(t.meta["relative_error"] - error) < 1e-12 and error < 0.8
    # Alternating fits never lose; the rounding of the basis to 8 bits adds at most half a unit per element.
    worse = ternarize(d, threshold=threshold, sweeps=1)
    slack = 0.01
    assert error <= worse.meta["relative_error"] + slack


def test_ternary_fit_recovers_what_is_ternary(rng):
    coefficients = ternary(rng, (6, 20, 3), 0.6)
    alpha, beta = rng.uniform(0.5, 2, 6), rng.uniform(0.5, 2, 3)
    d = Decomposition(basis=rng.normal(size=(3, 3, 3)), coefficients=alpha[:, None, None] * beta * coefficients)
    t = ternarize(d, threshold=0.2)
    assert np.array_equal(t.coefficients, coefficients)
    assert np.abs(t.to_dense() - d.to_dense()).max() <= (t.scale * t.alpha.max() / 2 * 3) * (1 + 1e-6)


def test_integer_decomposition_refuses(rng):
    d = integer_decomposition(rng)
    x = np.zeros((1, 4, 4, 18), np.int8)
    good = {"basis": d.basis, "coefficients": d.coefficients}
    for call, error, text in [
            (lambda: IntegerDecomposition(**good | {"coefficients": d.coefficients * 2}), ValueError, "in -1..1"),
            (lambda: IntegerDecomposition(**good | {"basis": d.basis.astype(int) * 2}), ValueError, "in -128..127"),
            (lambda: IntegerDecomposition(**good | {"basis": d.basis * 1.0}), TypeError, "basis must be an integer"),
            (lambda: IntegerDecomposition(**good | {"basis": d.basis[:3]}), ValueError, "basis and coefficients"),
            (lambda: IntegerDecomposition(**good, alpha=[1.0]), ValueError, "alpha must have one"),
            (lambda: d.run(x[..., :3]), ValueError, "x must have 18 channels, not 3"),
            (lambda: d.run(x * 1.0), TypeError, "x must be an integer array"),
            (lambda: d.run(x, "both"), InputError, "order must be coefficients_first or basis_first"),
            (lambda: d.run(x, intermediate_bits=1), InputError, "intermediate_bits must be an integer in 2..63"),
            (lambda: d.run(x, intermediate_bits=8.0), InputError, "intermediate_bits must be an integer in 2..63"),
            (lambda: d.run(x, "basis_first", taps=True), InputError, "taps must be False for basis_first"),
            (lambda: d.run(x[:, :2]), ValueError, "Kernel reach"),
            (lambda: encode(np.full((1, 1, 1), 2)), ValueError, r"coefficients must be \[K, C, M\]"),
            (lambda: encode(np.zeros((1, 1))), TypeError, "coefficients must be an integer"),
    ]:
        with pytest.raises(error, match=text):
            call()


# -- counts ------------------------------------------------------------------------------------------------------------
def test_operations_of_both_orders(rng):
    d = integer_decomposition(rng, 5, 18, 4, (3, 3))
    nonzero = np.count_nonzero(d.coefficients)
    geometry = {"stride": (2, 2), "pads": (1, 1, 1, 1)}
    assert d.macs((9, 12), **geometry) == (nonzero * 108, 5 * 4 * 9 * 30)
    assert d.macs((9, 12), "basis_first", **geometry) == (nonzero * 30, 18 * 4 * 9 * 30)


def test_published_totals_of_resnet56():
    """Section 9: 3x3 layers with C > 3 at M = 6: (3) .0279G MAC, .088G adds; (2) .0275G and .083G (full density)."""
    layers = [*[(16, 16, 32, 1)] * 18, (32, 16, 32, 2), *[(32, 32, 16, 1)] * 17, (64, 32, 16, 2),
              *[(64, 64, 8, 1)] * 17]
    totals = np.zeros((2, 2))
    for k, c, size, stride in layers:
        d = Decomposition(basis=np.ones((6, 3, 3)), coefficients=np.ones((k, c, 6)))
        totals += [d.macs((size, size), order, stride=(stride, stride), pads=(1, 1, 1, 1)) for order in ORDERS]
    assert np.round(totals[:, 1] / 1e9, 4).tolist() == [0.0279, 0.0275]
    assert np.round(totals[:, 0] / 1e9, 3).tolist() == [0.088, 0.083]


# -- encoding ----------------------------------------------------------------------------------------------------------
def slow_stream(ce):
    """The stream as a list of bits, record by record."""
    out = []
    for o in range(ce.shape[0]):
        for n in range(ce.shape[2]):
            row = ce[o, :, n].tolist()
            groups = [row[at:at + 16] for at in range(0, len(row), 16)]
            out += [int(any(g)) for g in groups]
            for g in groups:
                if any(g):
                    out += [int(v != 0) for v in g] + [0] * (16 - len(g))
            out += [int(v < 0) for v in row if v]
    return out


@given(st.integers(0, 2**32), st.integers(1, 3), st.sampled_from([1, 5, 15, 16, 17, 32, 40]), st.integers(1, 3),
       st.sampled_from([0.0, 0.02, 0.3, 1.0]))
def test_encoding_round_trip(seed, k, c, m, density):
    ce = ternary(np.random.default_rng(seed), (k, c, m), density)
    data, bits = encode(ce), slow_stream(ce)
    assert encoded_bits(ce) == len(bits)
    assert len(data) == (len(bits) + 7) // 8
    assert int.from_bytes(data, "little") == sum(b << n for n, b in enumerate(bits))
    back = decode(data, ce.shape)
    assert back.dtype == np.int8 and np.array_equal(back, ce)


def test_encoding_refuses_every_other_stream(rng):
    """Any stream of the right kind that decodes at all encodes back to itself: one encoding per tensor."""
    ce = ternary(rng, (2, 20, 2), 0.2)
    data = encode(ce)
    for bad, text in [(data[:-1], "data must hold 4 records"), (data + b"\0", "data must end with the last record"),
                      (b"", "data must hold 4 records")]:
        with pytest.raises(ValueError, match=text):
            decode(bad, ce.shape)
    refused = 0
    for n in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[n // 8] ^= 1 << n % 8
        try:
            other = decode(bytes(flipped), ce.shape)
        except ValueError:
            refused += 1
        else:
            assert encode(other) == bytes(flipped) and not np.array_equal(other, ce)
    assert refused
    with pytest.raises(ValueError, match="a group marked present must have a non-zero"):
        decode(bytes([0b1, 0, 0]), (1, 16, 1))
    with pytest.raises(ValueError, match="maps must be empty beyond channel 2"):
        decode(bytes([0b10001, 0, 0]), (1, 3, 1))
    with pytest.raises(ValueError, match="filled with zeros"):
        decode(bytes([0b10]), (1, 3, 1))


@pytest.mark.parametrize("density, two_level, entropy, values", [
    (0.20, 39, 52, 120), (0.10, 49, 84, 240), (0.05, 71, 143, 480), (0.02, 134, 297, 1200), (0.01, 217, 529, 2400),
    (0.005, 332, 952, 4800)])
def test_published_compression(rng, density, two_level, entropy, values):
    """Section 10: ratio to 288 bits per kernel at M = 6; exactly this density, random positions."""
    count = round(64 * 512 * 6 * density)
    flat = np.zeros(64 * 512 * 6, np.int8)
    flat[rng.choice(len(flat), count, replace=False)] = rng.choice(np.array([-1, 1], np.int8), count)
    shape = (64, 512, 6)
    d = IntegerDecomposition(basis=np.ones((6, 3, 3), np.int8), coefficients=flat.reshape(shape))
    bits, reference = d.coefficient_bits(), 288 * 64 * 512
    assert round(reference / bits.values) == pytest.approx(values, rel=2e-3)
    assert bits.values == 2 * count and reference / bits.entropy == pytest.approx(entropy, rel=0.012)
    assert reference / bits.encoded == pytest.approx(two_level, rel=0.025)
    p = count / flat.size
    assert bits.entropy == pytest.approx(flat.size * (-p * log2(p) - (1 - p) * log2(1 - p)) + count)
    assert bits.encoded == encoded_bits(d.coefficients) and d.bits() == bits.encoded + 8 * 54
    assert d.bits(scale_bits=24) == d.bits() + 24 * 64


def test_bits_of_empty_and_full_coefficients():
    empty = IntegerDecomposition(basis=np.ones((1, 1, 1), int), coefficients=np.zeros((2, 16, 1), int))
    assert empty.coefficient_bits() == (0, 2, 0) and not empty.to_dense().any()
    full = IntegerDecomposition(basis=np.ones((1, 1, 1), int), coefficients=np.ones((2, 16, 1), int))
    assert full.coefficient_bits() == (64, 2 * 33, 32)


# -- N:M series of coefficients ----------------------------------------------------------------------------------------
def test_coefficients_as_a_series(rng):
    d = integer_decomposition(rng, 4, 24, 3, (3, 3), 0.35)
    terms, residual = d.as_series([(2, 8), (1, 8)])
    assert len(terms) == 2 and np.array_equal(sum(terms) + residual, d.coefficients) and residual.any()
    for o, n, at in np.ndindex(4, 3, 3):
        block = d.coefficients[o, 8 * at:8 * at + 8, n]
        where = np.flatnonzero(block)
        assert np.flatnonzero(terms[0][o, 8 * at:8 * at + 8, n]).tolist() == where[:2].tolist()
        assert np.flatnonzero(terms[1][o, 8 * at:8 * at + 8, n]).tolist() == where[2:3].tolist()
    assert fits(terms[0], (2, 8), axis=1) and fits(terms[1], (1, 8), axis=1)
    kept = d.with_coefficients(sum(terms))
    x = rng.integers(-128, 128, (1, 5, 5, 24)).astype(np.int8)
    parts = [d.with_coefficients(t).run(x).output for t in (*terms, residual)]
    assert np.array_equal(kept.run(x).output, parts[0] + parts[1])
    assert np.array_equal(d.run(x).output, sum(parts)) and not np.array_equal(d.run(x).output, kept.run(x).output)
    most = max(np.count_nonzero(d.coefficients[:, at:at + 8], axis=1).max() for at in (0, 8, 16))
    terms, residual = d.as_series([(int(most), 8)])
    assert not residual.any() and np.array_equal(terms[0], d.coefficients)
