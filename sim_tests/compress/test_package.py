"""Packages: exact round trips, and a corpus of damaged files, each refused by one line of InputError."""
import copy
from functools import reduce
import hashlib
import io
import json
import os
import struct
import zipfile

import numpy as np
import pytest

from compress import arrays, package, packing
from compress.network import BasisConvolution
from sim_tests.compress.networks import same_network, small_network
from spec.errors import InputError

NETWORK = small_network()[0]
DATA, DIGEST = package.pack(NETWORK)


def split(data):
    """(manifest tree, {member: bytes}) of a package."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    return json.loads(members.pop("manifest.json")), members


MANIFEST, MEMBERS = split(DATA)


def build(manifest, members, *, sign=True, hashes=True, compression=zipfile.ZIP_STORED):
    """Package bytes of a tampered tree, digests made to fit again, so that only the tampering can be the reason."""
    manifest = copy.deepcopy(manifest)
    if hashes and isinstance(manifest.get("arrays"), dict):
        for name, body in members.items():
            if isinstance(manifest["arrays"].get(name), dict):
                manifest["arrays"][name]["sha256"] = hashlib.sha256(body).hexdigest()
    if sign and "digest" in manifest:
        tree = {k: v for k, v in manifest.items() if k != "digest"}
        text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
        manifest["digest"] = hashlib.sha256(text.encode()).hexdigest()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, body in (("manifest.json", json.dumps(manifest).encode()), *members.items()):
            archive.writestr(zipfile.ZipInfo(name), body, compress_type=compression)
    return stream.getvalue()


def refused(data, text=""):
    with pytest.raises(InputError) as caught:
        package.unpack(data)
    message = str(caught.value)
    assert text in message and "\n" not in message and len(message) < 600
    return message


def test_rebuilding_without_tampering_loads():
    same_network(package.unpack(build(MANIFEST, MEMBERS)), NETWORK)


@pytest.mark.parametrize("method", ["dense", "nm:2:4", "nm:4:4", "tasd:4:8+1:8", "tasd:2:4+1:8"])
def test_round_trip_is_exact(tmp_path, method):
    network = small_network(method)[0]
    path = tmp_path / "n.sum"
    digest = package.save(network, path)
    same_network(package.load(path), network)
    assert package.digest(path) == digest and len(digest) == 64
    first = path.read_bytes()
    package.save(package.load(path), path)
    assert path.read_bytes() == first
    assert os.listdir(tmp_path) == ["n.sum"]


def test_failed_save_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="must be writable"):
        package.save(NETWORK, tmp_path / "missing" / "n.sum")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="must be writable"):
        package.save(NETWORK, tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("content,text", [(b"", "too short"), (b"x" * 100, "must be a ZIP archive in one part"),
                                          (DATA + b"x", "must be a ZIP archive in one part"),
                                          (b"x" + DATA, "without other bytes"), (DATA[:-1], "must be a ZIP archive")])
def test_wrong_file_names_itself(tmp_path, content, text):
    path = tmp_path / "bad.sum"
    path.write_bytes(content)
    with pytest.raises(InputError, match=text) as caught:
        package.load(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.sum", tmp_path):
        with pytest.raises(InputError):
            package.load(path)


# -- manifest ----------------------------------------------------------------------------------------------------------
def leaves(tree, path=()):
    """Paths of all scalars of the manifest that mean something (provenance and metrics are free)."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        if key in ("provenance", "metrics", "digest"):
            continue
        if isinstance(value, (dict, list)):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def put(path, value, manifest=None):
    tree = copy.deepcopy(manifest or MANIFEST)
    at = tree
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return tree


def at_path(path, manifest=None):
    """The manifest's value at a path."""
    return reduce(lambda tree, key: tree[key], path, manifest or MANIFEST)


def one_of_each(paths):
    """The first path of each meaning: list positions and member names do not count, the layer's kind does."""
    found = {}
    for path in paths:
        kind = ""
        if path[:2] == ("network", "layers") and len(path) > 3:
            layer = MANIFEST["network"]["layers"][path[2]]
            kind = layer["kind"], layer.get("format"), layer["residual"] is None
        meaning = tuple("*" if isinstance(k, int) or str(k).endswith(".npy") else k for k in path)
        found.setdefault((kind, meaning), path)
    return list(found.values())


LEAVES = one_of_each(p for p in leaves(MANIFEST) if p[-1] != "sha256")
VALUES = (-1, 0, 2**31 - 1, 2**32, 2**64, 1.5, True, "", "x" * 70, "../w", None, [], {}, "a/b", "0:4", "\u202e")


@pytest.mark.parametrize("path", LEAVES, ids=["/".join(map(str, p)) for p in LEAVES])
def test_wild_value_in_a_field(path):
    """Whatever loads must be legal: a number within the field's range, or an absent optional array."""
    for value in VALUES:
        if type(value) is type(at_path(path)) and value == at_path(path):
            continue
        try:
            network = package.unpack(build(put(path, value), MEMBERS))
        except InputError as error:
            assert "\n" not in str(error)
            continue
        leaf = path[-1]
        small = type(value) is int and -128 <= value <= 65535
        assert (leaf == "scale" and type(value) in (int, float) and value > 0) or (leaf == "weight_scale") or \
            (leaf in ("low", "high", "residual_multiplier") and small) or \
            (path == ("network", "tensors", 0, "zero_point") and small) or \
            (path[-2] in ("pads", "stride", "dilation") and small), (path, value)
        assert network.name == NETWORK.name


def objects(tree, path=()):
    """Paths of all mappings with fixed fields."""
    if isinstance(tree, dict):
        if path not in (("arrays",),):
            yield path
        for key, value in tree.items():
            if key not in ("provenance", "metrics"):
                yield from objects(value, (*path, key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from objects(value, (*path, index))


KEYS = [(p[:-1], p[-1]) for p in one_of_each((*p, k) for p in objects(MANIFEST) for k in at_path(p))]


@pytest.mark.parametrize("path,key", KEYS, ids=["/".join(map(str, (*p, k))) for p, k in KEYS])
def test_missing_renamed_or_extra_key(path, key):
    for change in ("delete", "rename", "extra"):
        tree = copy.deepcopy(MANIFEST)
        at = tree
        for step in path:
            at = at[step]
        if change == "extra":
            at[f"{key}_"] = 1
        else:
            value = at.pop(key)
            if change == "rename":
                at[f"{key}x"] = value
        refused(build(tree, MEMBERS, hashes=False))


def network_change(change):
    tree = copy.deepcopy(MANIFEST)
    change(tree["network"])
    return build(tree, MEMBERS)


def _cycle(n):
    n["layers"][0]["input"] = n["layers"][1]["output"]


TREES = [
    (_cycle, "must be made by an earlier layer"),
    (lambda n: n["layers"].reverse(), "must be made by an earlier layer"),
    (lambda n: n["layers"].append(copy.deepcopy(n["layers"][-1])), "must not share an array"),
    (lambda n: n["layers"].clear(), "must have 1..65536 layers"),
    (lambda n: n["layers"].pop(), "must be made by a layer"),
    (lambda n: n["tensors"].append(dict(n["tensors"][0], name="spare")), "must be made by a layer"),
    (lambda n: n["tensors"].append(n["tensors"][0]), "must not be repeated"),
    (lambda n: n["tensors"].pop(), "must be one of the tensors"),
    (lambda n: n["tensors"][1].update(channels=9), "the shape that its input and window give"),
    (lambda n: n["tensors"][1].update(zero_point=5), "the output tensor's"),
    (lambda n: n["tensors"][0].update(scale=0.0), "must be finite and above 0"),
    (lambda n: n["tensors"][0].update(height=1 << 16, width=1 << 16), "must have at most"),
    (lambda n: n["layers"][1].update(name=n["layers"][0]["name"]), "must not be repeated"),
    (lambda n: n["layers"][1].update(name="../up"), "must be a name of 1..64"),
    (lambda n: n["layers"][0].update(terms=[]), "must have at least one term"),
    (lambda n: n["layers"][0].update(groups=2), "must divide 3 inputs"),
    (lambda n: n["layers"][0].update(stride=[1]), "must be 2 integers"),
    (lambda n: n["layers"][0].update(dilation=[9, 9]), "must fit the padded input"),
    (lambda n: n["layers"][1]["terms"][0].update(pattern="5:4"), "must be an N:M pattern"),
    (lambda n: n["layers"][1]["terms"][0].update(pattern="1:4"), "the patterns of its terms"),
    (lambda n: n["layers"][1].update(format="dense"), "must name the patterns of its terms"),
    (lambda n: n["layers"][1].update(format="basis:6"), "must be dense, nm:N:M, tasd:N:M"),
    (lambda n: n["layers"][1].update(kind="deconvolution"), "must be convolution, basis, pool or add"),
    (lambda n: n["layers"][0]["requantization"].update(low=3, high=2), "must be at most high"),
    (lambda n: n["layers"][0]["requantization"].update(bias="nowhere.npy"), "must name a member"),
    (lambda n: n["layers"][1]["requantization"].update(bias=n["layers"][0]["requantization"]["bias"]),
     "must not share an array"),
    (lambda n: n["layers"][0]["requantization"].update(bias=n["layers"][0]["requantization"]["shift"]),
     "must have type <i4"),
    (lambda n: n["layers"][2].update(residual=None), "must be 0 (it has no residual)"),
    (lambda n: n["layers"][2].update(residual="x"), "must be (8, 8, 8) (the output's shape)"),
    (lambda n: n.update(output=n["input"]), "must not be the input"),
    (lambda n: n["layers"][0].update(weight_scale=None), "must be used by a layer"),
]


@pytest.mark.parametrize("index", range(len(TREES)))
def test_broken_network(index):
    change, text = TREES[index]
    refused(network_change(change), text)


def test_unknown_version_and_digest():
    refused(build(put(("version",), 2), MEMBERS), "version must be 1, not 2")
    refused(build(put(("format",), "other"), MEMBERS), "format must be 'summand-package'")
    refused(build(put(("digest",), "0" * 64), MEMBERS, sign=False), "must be the digest of the content")
    refused(build(put(("network", "layers", 0, "groups"), 7), MEMBERS, sign=False), "must be the digest of the content")


@pytest.mark.parametrize("text,reason", [
    (b"", "must be JSON"), (b"[]", "must be a mapping"), (b"nul", "must be JSON"), (b"\xff\xfe", "must be JSON"),
    (b'{"format": 1, "format": 2}', "must not repeat a key"), (b'{"a": NaN}', "must not hold NaN"),
    (b'{"a": -Infinity}', "must not hold NaN"), (b"[" * 100_000, "must be JSON"),
    (b'{"a":' * 100_000, "must be JSON"), (b'{"a": ' + b"9" * 5000 + b"}", "must be JSON"),
    (b'{"format": "summand-package", "version": 1, "digest": "", "arrays": 1e999, "network": 0}', "must hold finite"),
])
def test_malformed_manifest(text, reason):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(zipfile.ZipInfo("manifest.json"), text)
    refused(stream.getvalue(), reason)


# -- arrays ------------------------------------------------------------------------------------------------------------
VALUES_NAME = next(t["values"] for layer in MANIFEST["network"]["layers"] if layer.get("format") == "nm:2:4"
                   for t in layer["terms"])


def array_change(name, array=None, *, body=None, say=True):
    """Package in which member ``name`` holds another array or raw body, with the manifest made to agree."""
    tree, members = copy.deepcopy(MANIFEST), dict(MEMBERS)
    members[name] = arrays.write_npy(array) if body is None else body
    if say and array is not None:
        tree["arrays"][name].update(dtype=array.dtype.str, shape=list(array.shape))
    return build(tree, members)


def stored(name):
    return arrays.read_npy(MEMBERS[name], where=name, types=("<i4", "<u2", "|u1", "<f8", "|i1"))


def header_change(name, **fields):
    """The .npy member with its header rewritten."""
    array = stored(name)
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape} | fields
    text = repr(header).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + array.tobytes()


def _too_full():
    array = stored(VALUES_NAME)
    array[0, 0, 0, :] = 1
    return array_change(VALUES_NAME, array)


ARRAYS = [
    (_too_full, "must have at most 2 non-zeros in each block of 4 channels"),
    (lambda: array_change("l0_shift.npy", np.full(8, 32, np.uint8)), "must be in 0..31"),
    (lambda: array_change("l0_shift.npy", np.zeros(7, np.uint8)), "must be uint8 of shape (8,)"),
    (lambda: array_change("l0_bias.npy", np.zeros(8, np.int64)), "must be of type"),
    (lambda: array_change("l0_bias.npy", np.zeros(8, np.uint8)), "must have type <i4"),
    (lambda: array_change("l0_bias.npy", np.zeros((8, 1), np.int32)), "must be int32 of shape (8,)"),
    (lambda: array_change("l0_bias.npy", np.zeros(7, np.int32), say=False), "like the array's header"),
    (lambda: array_change("l0_weight_scale.npy", np.full(8, np.nan)), "must be finite (NaN"),
    (lambda: array_change("l0_weight_scale.npy", np.full(8, -1.0)), "must be finite and above 0"),
    (lambda: array_change("l0_weight_scale.npy", np.zeros(8)), "must be finite and above 0"),
    (lambda: array_change("l0_weight_scale.npy", np.full(8, np.inf)), "must be finite (NaN"),
    (lambda: array_change("l0_bias.npy", body=MEMBERS["l0_bias.npy"] + b"x"), "must have a body of 32 bytes"),
    (lambda: array_change("l0_bias.npy", body=MEMBERS["l0_bias.npy"][:-1]), "must have a body of 32 bytes"),
    (lambda: array_change("l0_bias.npy", body=b""), "must be a .npy array"),
    (lambda: array_change("l0_bias.npy", body=b"\x93NUMPY"), "must be a .npy array"),
    (lambda: array_change("l0_bias.npy", body=b"\x93NUMPY\x03\x00" + b"0" * 99), "must be .npy format version 1.0"),
    (lambda: array_change("l0_bias.npy", body=b"\x93NUMPY\x01\x00\xff\xff{"), "must be a .npy array"),
    (lambda: array_change("l0_bias.npy", body=header_change("l0_bias.npy", descr=">i4")), "must be of type"),
    (lambda: array_change("l0_bias.npy", body=header_change("l0_bias.npy", descr="|O")), "must be of type"),
    (lambda: array_change("l0_bias.npy", body=header_change("l0_bias.npy", descr="<M8[s]")), "must be of type"),
    (lambda: array_change("l0_bias.npy", body=header_change("l0_bias.npy", descr="<U4")), "must be of type"),
    (lambda: array_change("l0_bias.npy", body=header_change("l0_bias.npy", descr="<c8")), "must be of type"),
    (lambda: array_change("l0_bias.npy", body=header_change("l0_bias.npy", descr=[("a", "<i4")])), "must be of type"),
    (lambda: array_change("l0_bias.npy", body=header_change("l0_bias.npy", descr=("<i4", (2,)))), "must be of type"),
    (lambda: array_change("l0_bias.npy", body=header_change("l0_bias.npy", descr=7)), "must be a .npy array"),
    (lambda: array_change("l0_bias.npy", body=header_change("l0_bias.npy", fortran_order=True)), "must be in C order"),
    (lambda: array_change("l0_bias.npy", body=header_change("l0_bias.npy", fortran_order=3)), "must be a .npy array"),
    (lambda: array_change("l0_bias.npy", body=header_change("l0_bias.npy", extra=1)), "must be a .npy array"),
    (lambda: array_change("l0_bias.npy", body=header_change("l0_bias.npy", shape=(2**40,))), "dimensions in 1.."),
    (lambda: array_change("l0_bias.npy", body=header_change("l0_bias.npy", shape=(2**20, 2**20))), "must have at most"),
    (lambda: array_change("l0_bias.npy", body=header_change("l0_bias.npy", shape=(2**64,))), "dimensions in 1.."),
    (lambda: array_change("l0_bias.npy", body=header_change("l0_bias.npy", shape=(-8,))), "dimensions in 1.."),
    (lambda: array_change("l0_bias.npy", body=header_change("l0_bias.npy", shape=(0,))), "dimensions in 1.."),
    (lambda: array_change("l0_bias.npy", body=header_change("l0_bias.npy", shape=())), "must have 1..5 dimensions"),
    (lambda: array_change("l0_bias.npy", body=header_change("l0_bias.npy", shape=(1,) * 40)), "must have 1..5"),
    (lambda: array_change("l0_bias.npy", body=header_change("l0_bias.npy", shape=(True,))), "dimensions in 1.."),
    (lambda: array_change("l0_bias.npy", body=header_change("l0_bias.npy", shape=(8.0,))), "must be a .npy array"),
    (lambda: array_change("l0_bias.npy", body=header_change("l0_bias.npy", shape=[8])), "must be a .npy array"),
    (lambda: build(MANIFEST, MEMBERS | {"l0_bias.npy": arrays.write_npy(np.ones(8, np.int32))}, hashes=False),
     "must have the sha256 that the manifest gives"),
    (lambda: build(MANIFEST, MEMBERS | {"spare.npy": MEMBERS["l0_bias.npy"]}), "must list exactly the members"),
    (lambda: build(MANIFEST, {n: b for n, b in MEMBERS.items() if n != "l0_bias.npy"}), "must list exactly the"),
]


@pytest.mark.parametrize("index", range(len(ARRAYS)))
def test_broken_array(index):
    change, text = ARRAYS[index]
    refused(change(), text)


# -- archive -----------------------------------------------------------------------------------------------------------
def archive_of(entries, *, compression=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, body in entries:
            archive.writestr(zipfile.ZipInfo(name), body, compress_type=compression)
    return stream.getvalue()


@pytest.mark.parametrize("name", ["../w.npy", "/w.npy", "..\\w.npy", "w/", "W.npy", "\u202ew.npy", "w.txt", "a/b.npy",
                                  "x" * 70 + ".npy", ".npy", ""])
def test_illegal_member_name(name):
    refused(archive_of([("manifest.json", b"{}"), (name, b"x")]))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_repeated_member():
    refused(archive_of([("manifest.json", b"{}"), ("a.npy", b"1"), ("a.npy", b"2")]), "once each")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_members(compression):
    refused(build(MANIFEST, MEMBERS, compression=compression), "must be stored")


def test_manifest_must_come_first():
    refused(archive_of([("a.npy", b"x"), ("manifest.json", b"{}")]), "must begin with manifest.json")
    refused(archive_of([("a.npy", b"x")]), "must begin with manifest.json")
    refused(archive_of([]))


def test_too_many_members():
    refused(archive_of([("manifest.json", b"{}"), *((f"a{n}.npy", b"") for n in range(5000))]), "1..4097 members")


def test_encrypted_flag_and_comment():
    data = bytearray(DATA)
    at = data.rindex(b"PK\x01\x02")
    data[at + 8] |= 1
    refused(bytes(data), "must be stored")
    refused(DATA[:-2] + b"\x03\x00abc", "must be a ZIP archive in one part")


def test_false_sizes():
    for offset in (20, 24):                                # compressed and real size in the central directory
        data = bytearray(DATA)
        at = data.index(b"PK\x01\x02")
        data[at + offset:at + offset + 4] = struct.pack("<L", 1 << 30)
        refused(bytes(data))


@pytest.mark.parametrize("part", range(8))
def test_truncation(part):
    for length in range(part * 7, len(DATA), 97):
        refused(DATA[:length])


@pytest.mark.parametrize("part", range(16))
def test_bit_flips_never_change_the_network(part):
    """A flipped bit is refused, or it sits in a field without meaning (a date) and the network is the same."""
    rng = np.random.default_rng([5, part])
    caught = 0
    for _ in range(40):
        data = bytearray(DATA)
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        try:
            same_network(package.unpack(bytes(data)), NETWORK)
        except InputError as error:
            caught += 1
            assert "\n" not in str(error)
    assert caught >= 20


def test_save_refuses_a_broken_network(tmp_path):
    from dataclasses import replace
    with pytest.raises(InputError, match="must not be the input"):
        package.save(replace(NETWORK, output=NETWORK.input), tmp_path / "n.sum")
    with pytest.raises(InputError, match="must be plain JSON values"):
        package.save(replace(NETWORK, provenance={"a": np.float32(1)}), tmp_path / "n.sum")
    with pytest.raises(InputError, match="must be plain JSON values"):
        package.save(replace(NETWORK, provenance={"a": float("nan")}), tmp_path / "n.sum")
    assert not list(tmp_path.iterdir())


# -- basis layers ------------------------------------------------------------------------------------------------------
BASIS = small_network("basis:4@2:16")[0]
BASIS_MANIFEST, BASIS_MEMBERS = split(package.pack(BASIS)[0])
BASIS_AT = next(i for i, layer in enumerate(BASIS_MANIFEST["network"]["layers"]) if layer["kind"] == "basis")
BASIS_LEAVES = [p for p in leaves(BASIS_MANIFEST["network"]["layers"][BASIS_AT]) if p[-1] != "sha256"]


@pytest.mark.parametrize("method", ["basis:4@2:16", "basis:9@1", "basis:6@0.3", "basis:e0.9", "basis:1@1:16"])
@pytest.mark.parametrize("packed", [False, True])
def test_basis_round_trip_is_exact(tmp_path, method, packed):
    network = small_network(method)[0]
    assert sum(isinstance(layer, BasisConvolution) for layer in network.layers) == 2
    path = tmp_path / "n.sum"
    digest = package.save(network, path, packed=packed)
    loaded = package.load(path)
    same_network(loaded, network)
    assert package.digest(path) == digest
    for layer in loaded.layers:
        if isinstance(layer, BasisConvolution):
            assert layer.coefficients.dtype == layer.basis.dtype == np.int8
    first = path.read_bytes()
    package.save(loaded, path, packed=packed)
    assert path.read_bytes() == first


def test_basis_coefficients_take_two_bits():
    layer = BASIS.layers[BASIS_AT]
    held = stored_basis(f"l{BASIS_AT}_codes.npy")
    assert held.dtype == np.uint8 and held.shape == (-(-layer.coefficients.size // 4),)


def stored_basis(name):
    return arrays.read_npy(BASIS_MEMBERS[name], where=name, types=("<i4", "<u2", "|u1", "<f8", "|i1"))


@pytest.mark.parametrize("path", BASIS_LEAVES, ids=["/".join(map(str, p)) for p in BASIS_LEAVES])
def test_wild_value_in_a_field_of_a_basis_layer(path):
    full = ("network", "layers", BASIS_AT, *path)
    for value in (*VALUES, "basis:5@2:16", "dense", "16:2", "1:16", 33, 7):
        if type(value) is type(at_path(full, BASIS_MANIFEST)) and value == at_path(full, BASIS_MANIFEST):
            continue
        try:
            package.unpack(build(put(full, value, BASIS_MANIFEST), BASIS_MEMBERS))
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
            continue
        small = type(value) is int and -128 <= value <= 127
        if path == ("name",):
            assert isinstance(value, str)
            continue
        assert (path[-1] in ("low", "high") or path[0] in ("pads", "stride", "dilation")) and small or \
            path[-1] == "intermediate_bits" and 8 <= value <= 32, (path, value)


def basis_change(change, members=None):
    """Package whose basis layer's tree was changed."""
    tree = copy.deepcopy(BASIS_MANIFEST)
    change(tree["network"]["layers"][BASIS_AT])
    return build(tree, BASIS_MEMBERS | (members or {}))


@pytest.mark.parametrize("key", ["basis", "coefficients", "intermediate_bits", "pattern", "format", "weight_scale"])
def test_missing_or_renamed_key_of_a_basis_layer(key):
    refused(basis_change(lambda n: n.pop(key)), "must have exactly the fields")
    refused(basis_change(lambda n: n.update({f"{key}x": n.pop(key)})), "must have exactly the fields")


BASIS_TREES = [
    (lambda n: n.update(kind="convolution"), "must have exactly the fields"),
    (lambda n: n.update(coefficients=n["coefficients"]["codes"]), "must be a mapping"),
    (lambda n: n["coefficients"].update(extra=1), "must have exactly the fields"),
    (lambda n: n["coefficients"].update(shape=[8, 8]), "must be [outputs, channels, M]"),
    (lambda n: n["coefficients"].update(shape=[8, 8, 4.0]), "must be [outputs, channels, M]"),
    (lambda n: n["coefficients"].update(shape=[1 << 16, 1 << 16, 1 << 16]), "must be [outputs, channels, M]"),
    (lambda n: n["coefficients"].update(shape=[1 << 13, 1 << 13, 1]), "codes must be [16777216], not (64,)"),
    (lambda n: n["coefficients"].update(shape=[8, 8, 5]), "codes must be [80], not (64,)"),
    (lambda n: n["coefficients"].update(shape=[4, 8, 8]), "the number of basis kernels"),
    (lambda n: n["coefficients"].update(shape=[16, 4, 4]), "coefficients must be 8 (the input's channels)"),
    (lambda n: n["coefficients"].update(codes=n["basis"]), "coefficients.codes must have type |u1"),
    (lambda n: n.update(basis=n["coefficients"]["codes"]), "basis must not share an array"),
    (lambda n: n.update(format="basis:5@2:16"), "format must be 4 (the number of its basis kernels)"),
    (lambda n: n.update(format="basis:4@0.5"), "must name the pattern of its coefficients"),
    (lambda n: n.update(format="basis:4@1:16"), "must name the pattern of its coefficients"),
    (lambda n: n.update(format="dense"), "must be basis, basis:M, basis:M@density or basis:M@N:G"),
    (lambda n: n.update(pattern=None), "must name the pattern of its coefficients"),
    (lambda n: n.update(pattern="1:16", format="basis:4"), "at most 1 non-zeros in each block of 16 channels"),
    (lambda n: n.update(pattern="5:4"), "must be an N:M pattern"),
    (lambda n: n.update(intermediate_bits=7), "intermediate_bits must be an integer in 8..32, not 7"),
    (lambda n: n.update(intermediate_bits=33), "in 8..32"), (lambda n: n.update(intermediate_bits=True), "in 8..32"),
    (lambda n: n.update(dilation=[9, 9]), "must fit the padded input"),
    (lambda n: n.update(weight_scale=None), "must be used by a layer"),
]


@pytest.mark.parametrize("index", range(len(BASIS_TREES)))
def test_broken_basis_layer(index):
    change, text = BASIS_TREES[index]
    refused(basis_change(change), text)


def basis_array(name, array):
    """Package in which an array of the basis layer is another one, with the manifest made to agree."""
    tree = copy.deepcopy(BASIS_MANIFEST)
    tree["arrays"][name].update(dtype=array.dtype.str, shape=list(array.shape))
    return build(tree, BASIS_MEMBERS | {name: arrays.write_npy(array)})


@pytest.mark.parametrize("kind,array,text", [
    ("codes", np.full(64, 2, np.uint8), "must hold codes 0, 1 and 3"),
    ("codes", np.full(64, 0x80, np.uint8), "must hold codes 0, 1 and 3"),
    ("codes", np.full(64, 0x55, np.uint8), "at most 2 non-zeros in each block of 16 channels"),
    ("codes", np.zeros(63, np.uint8), "codes must be [64], not (63,)"), ("codes", np.zeros(64, np.int8), "type |u1"),
    ("codes", np.zeros((8, 8), np.uint8), "codes must be [64], not (8, 8)"),
    ("basis", np.zeros((5, 3, 3), np.int8), "the number of basis kernels"),
    ("basis", np.zeros((4, 9), np.int8), "basis must be [M, kernel_h, kernel_w] of legal size"),
    ("basis", np.zeros((4, 3, 3), np.uint8), "type |i1"),
    ("basis", np.zeros((4, 9, 99), np.int8), "must fit the padded input"),
    ("basis", np.zeros((4, 1, 2000), np.int8), "basis must be at most 1024 x 1024"),
    ("weight_scale", np.zeros(8), "must be finite and above 0"), ("weight_scale", np.ones(9), "float64 of shape (8,)"),
])
def test_broken_array_of_a_basis_layer(kind, array, text):
    refused(basis_array(f"l{BASIS_AT}_{kind}.npy", array), text)


def test_coefficients_with_filling_bits():
    """63 coefficients: the last two bits of the last byte are filling."""
    codes = packing.pack_ternary(np.zeros((3, 7, 3), np.int8))
    assert packing.unpack_ternary(codes, [3, 7, 3]).shape == (3, 7, 3)
    codes[-1] = 0x40
    with pytest.raises(InputError, match="zeros behind the last"):
        packing.unpack_ternary(codes, [3, 7, 3])


@pytest.mark.parametrize("part", range(4))
def test_bit_flips_never_change_a_basis_network(part):
    rng, caught, whole = np.random.default_rng([6, part]), 0, package.pack(BASIS)[0]
    for _ in range(40):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        try:
            same_network(package.unpack(bytes(data)), BASIS)
        except InputError as error:
            caught += 1
            assert "\n" not in str(error)
    assert caught >= 20


def test_truncated_basis_package():
    whole = package.pack(BASIS)[0]
    for length in range(3, len(whole), 211):
        refused(whole[:length])
