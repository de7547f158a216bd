"""Packed terms: round trips, one form per term, and packages whose packed terms break a rule."""
import numpy as np
import pytest

from compress import engine, flow, package, packing
from compress.network import Convolution
from golden.structured import nm_view
from sim_tests.compress.test_package import build, split
from spec.config import Pattern
from spec.errors import InputError


def term(rng, shape, pattern):
    """Random int8 values that fit, with empty and full blocks among them."""
    values = rng.integers(-128, 128, shape, np.int8) * (rng.random(shape) < rng.choice([0.1, 0.5, 1.0]))
    return nm_view(values.astype(np.int8), pattern)


@pytest.mark.parametrize("pattern", [Pattern(1, 4), Pattern(2, 4), Pattern(3, 5), Pattern(1, 8), Pattern(4, 8),
                                     Pattern(7, 16), Pattern(1, 2), Pattern(5, 64)])
@pytest.mark.parametrize("shape", [(3, 3, 2, 16), (1, 1, 1, 1), (5, 1, 3, 13), (2, 2, 2, 64)])
def test_round_trip(rng, pattern, shape):
    values = term(rng, shape, pattern)
    slots, index = packing.pack_term(values, pattern)
    blocks = -(-shape[3] // pattern.m)
    assert slots.shape == (*shape[:3], blocks, pattern.n) and slots.dtype == np.int8
    assert index.shape == (-(-slots.size * (pattern.m - 1).bit_length() // 8),) and index.dtype == np.uint8
    got = packing.unpack_term(slots, index, shape[3], pattern)
    assert got.dtype == np.int8
    np.testing.assert_array_equal(got, values)


def test_too_many_values_are_not_packed():
    with pytest.raises(ValueError, match="must fit 2:4"):
        packing.pack_term(np.ones((1, 1, 1, 4), np.int8), Pattern(2, 4))


def one(slots, places, channels=8, pattern=None, tail=0):
    """unpack_term of hand-made slots and places; 2:4 unless said otherwise."""
    pattern = pattern or Pattern(2, 4)
    slots = np.array(slots, np.int8).reshape(1, 1, 1, -1, pattern.n)
    width = (pattern.m - 1).bit_length()
    bits = [(p >> k) & 1 for p in places for k in range(width)] + [tail]
    index = np.packbits(np.array(bits, np.uint8), bitorder="little")[:-(-len(places) * width // 8)]
    return packing.unpack_term(slots, index, channels, pattern)


def test_hand_made_slots():
    assert one([5, -3, 7, 0], [1, 3, 2, 0]).ravel().tolist() == [0, 5, 0, -3, 0, 0, 7, 0]


@pytest.mark.parametrize("arguments, text", [
    (dict(slots=[5, -3, 7, 0], places=[3, 1, 2, 0]), "rising order"),
    (dict(slots=[5, -3, 7, 0], places=[1, 1, 2, 0]), "rising order"),
    (dict(slots=[0, -3, 7, 0], places=[0, 1, 2, 0]), "rising order"),
    (dict(slots=[5, -3, 7, 0], places=[1, 3, 2, 1]), "rising order"),
    (dict(slots=[5, -3, 7, 0], places=[1, 3, 2, 0], channels=6), "within the 6 channels"),
    (dict(slots=[5, 0], places=[5, 0], channels=5, pattern=Pattern(2, 5)), "below 5"),
    (dict(slots=[5, 0], places=[1, 0], channels=3, pattern=Pattern(2, 3), tail=1), "zero bits"),
    (dict(slots=[5, -3], places=[1, 3]), r"slots must be \[outputs, kernel_h, kernel_w, 2, 2\]"),
    (dict(slots=[5, -3, 7, 0], places=[1, 3, 2]), None),
    (dict(slots=[5, -3, 7, 0], places=[1] * 9), r"index must be \[1\]"),
    (dict(slots=[5, -3, 7, 0], places=[1, 3, 2, 0], channels=0), "channels must be an integer"),
    (dict(slots=[5, -3, 7, 0], places=[0] * 4, channels=4, pattern=Pattern(4, 4)), "N below M"),
])
def test_illegal_packed_terms(arguments, text):
    if text is None:        # three places fit in the same byte as four: the fourth is 0
        assert one(**arguments).ravel().tolist() == [0, 5, 0, -3, 0, 0, 7, 0]
        return
    with pytest.raises(InputError, match=text):
        one(**arguments)


@pytest.mark.parametrize("method", ["nm:2:4", "tasd:4:8+1:8", "dense"])
def test_packed_package_is_the_same_network(method, tmp_path):
    net = flow.compress_model("models/digits.onnx", method, calibration="demo:calibration")
    package.save(net, tmp_path / "plain.summand")
    package.save(net, tmp_path / "packed.summand", packed=True)
    plain, packed = (package.load(tmp_path / f"{n}.summand") for n in ("plain", "packed"))
    assert [x.name for x in packed.layers] == [x.name for x in plain.layers]
    for a, b in zip(plain.layers, packed.layers):
        if isinstance(a, Convolution):
            assert a.format == b.format and [t.pattern for t in a.terms] == [t.pattern for t in b.terms]
            for s, t in zip(a.terms, b.terms):
                np.testing.assert_array_equal(s.values, t.values)
    x = np.random.default_rng(1).integers(-128, 128, (2, 8, 8, 1)).astype(np.int8)
    np.testing.assert_array_equal(engine.run(packed, x), engine.run(plain, x))
    sizes = [(tmp_path / f"{n}.summand").stat().st_size for n in ("plain", "packed")]
    assert sizes[1] < 0.9 * sizes[0] if method == "nm:2:4" else sizes[1] <= 1.3 * sizes[0]


def test_damaged_packed_members_are_refused(tmp_path):
    """Whatever byte of the slots or indices changes, the member's sha256 no longer agrees."""
    net = flow.compress_model("models/digits.onnx", "nm:2:4", calibration="demo:calibration")
    data, _ = package.pack(net, packed=True)
    at = data.index(b"l1_index0.npy")
    for offset in (300, 1000):
        bad = bytearray(data)
        bad[at + offset] ^= 1
        with pytest.raises(InputError):
            package.unpack(bytes(bad))


@pytest.mark.parametrize("change, text", [
    (lambda t: t.pop("channels"), "must have exactly the fields channels, index, pattern, slots"),
    (lambda t: t.update(channels=10 ** 9), "channels must be an integer in 1..1048576"),
    (lambda t: t.update(channels=True), "channels must be an integer"),
    (lambda t: t.update(channels=8), r"slots must be \[outputs, kernel_h, kernel_w, 2, 2\]"),
    (lambda t: t.update(pattern="4:4"), "must have N below M"),
    (lambda t: t.update(pattern="1:4"), "slots must be"),
    (lambda t: t.update(slots=t["index"]), r"must have type \|i1"),
    (lambda t: t.update(index=t["slots"]), "must not share an array"),
    (lambda t: t.update(values=t["slots"]), "must have exactly the fields pattern, values"),
])
def test_wrong_manifests(change, text):
    net = flow.compress_model("models/digits.onnx", "nm:2:4", calibration="demo:calibration")
    manifest, members = split(package.pack(net, packed=True)[0])
    change(manifest["network"]["layers"][1]["terms"][0])
    with pytest.raises(InputError, match=text):
        package.unpack(build(manifest, members))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (4, 16, 6)])
def test_ternary_round_trip(rng, shape):
    ce = rng.integers(-1, 2, shape).astype(np.int8)
    codes = packing.pack_ternary(ce)
    assert codes.dtype == np.uint8 and codes.shape == (-(-ce.size // 4),)
    back = packing.unpack_ternary(codes, list(shape))
    assert back.dtype == np.int8 and np.array_equal(back, ce) and back.flags.writeable
    assert np.array_equal(packing.pack_ternary(np.asfortranarray(ce)), codes)


@pytest.mark.parametrize("codes,shape,text", [
    (np.zeros(1, np.uint8), [1, 1], "c.shape must be"), (np.zeros(1, np.uint8), [1, 0, 1], "c.shape must be"),
    (np.zeros(1, np.uint8), [1, True, 1], "c.shape must be"),
    (np.zeros(2, np.uint8), [2, 2, 1], r"codes must be \[1\]"),
    (np.zeros(1, np.uint8), [1 << 13, 1 << 13, 2], "at most 67108864 elements"),
    (np.full(1, 8, np.uint8), [2, 2, 1], "codes 0, 1 and 3"),
    (np.full(1, 1 << 6, np.uint8), [3, 1, 1], "zeros behind")])
def test_refused_ternary_codes(codes, shape, text):
    with pytest.raises(InputError, match=text):
        packing.unpack_ternary(codes, shape, "c")
