"""The package: a compressed network in one file.

A ZIP archive whose members are stored (not compressed) without gaps: ``manifest.json`` first, then one ``.npy`` file
for each array. The manifest is JSON:

- ``format`` ``"summand-package"``, ``version`` 1, ``digest``: sha256 (hexadecimal) of the canonical JSON (sorted keys,
  no spaces) of the manifest without ``digest``; as ``arrays`` holds the sha256 of every member, it covers everything.
- ``arrays``: by member name its ``dtype``, ``shape`` and ``sha256`` (of the .npy file's bytes).
- ``network``: ``name``, ``input``, ``output``, ``tensors`` (a list), ``layers`` (a list in execution order, with
  ``kind`` ``convolution``, ``basis``, ``pool`` or ``add``; fields as in `compress.network`, arrays by member name), and
  ``provenance``.

A term of a convolution is ``pattern`` and ``values`` (int8 [outputs, kernel_h, kernel_w, channels / groups]), or,
packed as the hardware reads it, ``pattern``, ``channels``, ``slots`` and ``index`` (see `compress.packing`).

A basis layer has ``basis`` (int8 [M, kernel_h, kernel_w]), ``coefficients`` (``shape`` [outputs, channels, M] and
``codes``, see `compress.packing.pack_ternary`), ``intermediate_bits``, and ``pattern`` (text) or null.

Two saves of one network are byte-identical. There is no pickle, and no path is taken from the file.
"""
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
import io
import json
import math
import os
from pathlib import Path
import re
from secrets import token_hex
import struct
from typing import NamedTuple
import zipfile

import numpy as np

from compress import arrays, packing, validate
from compress.network import Add, BasisConvolution, Convolution, Network, Pool, Requantization, Tensor, Term
from spec.config import Pattern
from spec.errors import InputError
from spec.strict_yaml import read_regular_file

FORMAT, VERSION = "summand-package", 1
MANIFEST = "manifest.json"
MAX_FILE_BYTES = 1 << 30
MAX_MANIFEST_BYTES = 16 << 20
MAX_MEMBERS = 4096
_MEMBER = re.compile(r"[a-z0-9_.]{1,60}\.npy", re.ASCII)
#: dtype of each kind of array.
_TYPES = {"bias": "<i4", "multiplier": "<u2", "shift": "|u1", "weight_scale": "<f8", "values": "|i1", "slots": "|i1",
          "index": "|u1", "basis": "|i1", "codes": "|u1"}
_END = struct.Struct("<4s4H2LH")
_LOCAL = struct.Struct("<4s5H3L2H")
_EPOCH = (1980, 1, 1, 0, 0, 0)


# -- writing -----------------------------------------------------------------------------------------------------------
def save(network, path, *, packed=False):
    """Write ``network`` to ``path`` (beside it first, then renamed, so that no half-written package ever exists).

    ``packed``: sparse terms as slots and indices (`compress.packing`) instead of whole tensors.
    Returns: the package's digest.
    Raises: InputError for a network that breaks a rule, or a path that cannot be written.
    """
    validate.network(network)
    data, digest = pack(network, packed=packed)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, ValueError) as error:
        with suppress(OSError):         # below something that is no folder, even removing fails
            temporary.unlink()
        raise InputError(f"must be writable ({getattr(error, 'strerror', error)})", source=path) from error
    return digest


def pack(network, *, packed=False):
    """(bytes of the package, digest) of a network; ``packed`` as for `save`."""
    members = {}

    def member(index, kind, array, number=""):
        name = f"l{index}_{kind}{number}.npy"
        members[name] = (arrays.write_npy(array), array)
        return name

    layers = [_layer_tree(layer, lambda kind, array, number="", i=i: member(i, kind, array, number), packed)
              for i, layer in enumerate(network.layers)]
    tensors = [{"name": t.name, "height": t.height, "width": t.width, "channels": t.channels, "scale": t.scale,
                "zero_point": t.zero_point} for t in network.tensors.values()]
    manifest = {
        "format": FORMAT, "version": VERSION,
        "arrays": {name: {"dtype": array.dtype.newbyteorder("<").str, "shape": list(array.shape),
                          "sha256": sha256(data).hexdigest()} for name, (data, array) in members.items()},
        "network": {"name": network.name, "input": network.input, "output": network.output, "tensors": tensors,
                    "layers": layers, "provenance": network.provenance},
    }
    if len(members) > MAX_MEMBERS:
        raise InputError(f"must have at most {MAX_MEMBERS} arrays", field="package", value=len(members))
    try:
        manifest["digest"] = _digest(manifest)
        text = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InputError(f"must be plain JSON values ({error})", field="provenance or metrics") from None
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, data in ((MANIFEST, text), *((n, d) for n, (d, _) in members.items())):
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data)
    return stream.getvalue(), manifest["digest"]


def _digest(manifest):
    tree = {k: v for k, v in manifest.items() if k != "digest"}
    return sha256(json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def _term_tree(term, number, member, packed):
    if not packed or term.dense:
        return {"pattern": str(term.pattern), "values": member("values", term.values, number)}
    slots, index = packing.pack_term(term.values, term.pattern)
    return {"pattern": str(term.pattern), "channels": int(term.values.shape[3]),
            "slots": member("slots", slots, number), "index": member("index", index, number)}


def _layer_tree(layer, member, packed):
    r = layer.requantization
    tree = {
        "name": layer.name, "input": layer.input, "output": layer.output, "residual": layer.residual,
        "requantization": {
            **{part: member(part, getattr(r, part)) for part in ("bias", "multiplier", "shift")},
            **{part: getattr(r, part) for part in
               ("zero_point", "low", "high", "residual_zero_point", "residual_multiplier")}},
    }
    if isinstance(layer, Convolution):
        scale = layer.weight_scale
        return tree | {
            "kind": "convolution",
            "terms": [_term_tree(t, n, member, packed) for n, t in enumerate(layer.terms)],
            "stride": list(layer.stride), "pads": list(layer.pads), "dilation": list(layer.dilation),
            "groups": layer.groups, "format": layer.format, "metrics": layer.metrics,
            "weight_scale": None if scale is None else member("weight_scale", scale)}
    if isinstance(layer, BasisConvolution):
        scale, pattern = layer.weight_scale, layer.pattern
        return tree | {
            "kind": "basis", "basis": member("basis", layer.basis),
            "coefficients": {"shape": list(layer.coefficients.shape),
                             "codes": member("codes", packing.pack_ternary(layer.coefficients))},
            "intermediate_bits": layer.intermediate_bits, "pattern": None if pattern is None else str(pattern),
            "stride": list(layer.stride), "pads": list(layer.pads), "dilation": list(layer.dilation),
            "format": layer.format, "metrics": layer.metrics,
            "weight_scale": None if scale is None else member("weight_scale", scale)}
    if isinstance(layer, Pool):
        return tree | {"kind": "pool", "pool": layer.kind, "window": list(layer.window), "stride": list(layer.stride),
                       "pads": list(layer.pads)}
    return tree | {"kind": "add"}


# -- reading -----------------------------------------------------------------------------------------------------------
def load(path):
    """Read a package; every size and rule is checked before the first array is read.

    Returns: Network. Raises: InputError naming the file, the field, the rule and the value.
    """
    data = read_regular_file(path, max_bytes=MAX_FILE_BYTES)
    try:
        return unpack(data)
    except InputError as error:
        raise error.within(path) from None


def digest(path):
    """The digest of a package, after all checks of `load`."""
    data = read_regular_file(path, max_bytes=MAX_FILE_BYTES)
    try:
        unpack(data)
        return _manifest(_members(data)[MANIFEST])["digest"]
    except InputError as error:
        raise error.within(path) from None


def unpack(data):
    """Network of the bytes of a package; see `load`."""
    members = _members(data)
    manifest = _manifest(members.pop(MANIFEST))
    table = _object(manifest["arrays"], None, "arrays")
    if odd := sorted(members.keys() ^ table.keys()):
        raise InputError("must list exactly the members of the archive", field="arrays", value=odd[:4])
    promised = {}
    for name, entry in table.items():
        where = f"arrays.{name}"
        entry = _object(entry, ("dtype", "shape", "sha256"), where)
        dtype, shape, _ = arrays.read_header(members[name], where=where, types=tuple(_TYPES.values()))
        said = (entry["dtype"], entry["shape"])
        if said != (dtype.str, list(shape)) or any(type(d) is not int for d in entry["shape"]):
            raise InputError(f"must say {dtype.str} {list(shape)} like the array's header", field=where, value=said)
        promised[name] = (dtype, shape)
    used = []

    def placeholder(name, kind, where):
        if not isinstance(name, str) or name not in promised:
            raise InputError("must name a member of the archive", field=where, value=name)
        if name in used:
            raise InputError("must not share an array", field=where, value=name)
        used.append(name)
        dtype, shape = promised[name]
        if dtype.str != _TYPES[kind]:
            raise InputError(f"must have type {_TYPES[kind]}", field=where, value=dtype.str)
        return np.broadcast_to(np.zeros((), dtype), shape)              # a shape without memory

    def outlined(check):
        return lambda *args: np.broadcast_to(np.zeros((), np.int8), check(*args))

    outline = _Expand(outlined(packing.check_shapes), outlined(packing.check_ternary))
    validate.structure(_network(manifest["network"], placeholder, outline))
    if unused := sorted(promised.keys() - set(used)):
        raise InputError("must be used by a layer", field=f"arrays.{unused[0]}")
    loaded = {}
    for name, entry in table.items():
        if sha256(members[name]).hexdigest() != entry["sha256"]:
            raise InputError("must have the sha256 that the manifest gives", field=f"arrays.{name}")
        loaded[name] = arrays.read_npy(members[name], where=f"arrays.{name}", types=tuple(_TYPES.values()))
    network = _network(manifest["network"], lambda name, kind, where: loaded[name],
                       _Expand(packing.unpack_term, packing.unpack_ternary))
    validate.contents(network)
    return network


def _members(data):
    """Name -> bytes of an archive that holds nothing but stored members, one after the other."""
    if len(data) < _END.size:
        raise InputError("must be a ZIP archive (too short)")
    sign, disk, start_disk, here, total, size, start, comment = _END.unpack(data[-_END.size:])
    if sign != b"PK\x05\x06" or comment or disk or start_disk or here != total:
        raise InputError("must be a ZIP archive in one part that ends without a comment")
    if not 1 <= total <= MAX_MEMBERS + 1 or start + size + _END.size != len(data) or size > total * 256:
        raise InputError(f"must be a ZIP archive of 1..{MAX_MEMBERS + 1} members without other bytes", value=total)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos, at, found = archive.infolist(), 0, {}
            if len(infos) != total:
                raise InputError(f"must list {total} members", field="archive", value=len(infos))
            for info in infos:
                name = info.filename
                if name != MANIFEST and not _MEMBER.fullmatch(name) or name in found:
                    raise InputError("must be manifest.json or [a-z0-9_.].npy, once each", field="member", value=name)
                if info.compress_type != zipfile.ZIP_STORED or info.flag_bits or info.extra or info.comment \
                        or info.compress_size != info.file_size:
                    raise InputError("must be stored: no compression, encryption, flags or extra fields",
                                     field=f"member {name!r}")
                local = data[at:at + _LOCAL.size]
                if info.header_offset != at or len(local) < _LOCAL.size or _LOCAL.unpack(local)[-1]:
                    raise InputError("must follow the member before it without a gap", field=f"member {name!r}")
                at += _LOCAL.size + len(name) + info.file_size
                if at > start:
                    raise InputError("must lie inside the archive", field=f"member {name!r}", value=info.file_size)
                found[name] = info
            if at != start or infos[0].filename != MANIFEST or infos[0].file_size > MAX_MANIFEST_BYTES:
                raise InputError(f"must begin with {MANIFEST} of at most {MAX_MANIFEST_BYTES} bytes, and have no gap",
                                 field="archive", value=infos[0].filename)
            return {name: archive.read(info) for name, info in found.items()}
    except InputError:
        raise
    except arrays.ZIP_ERRORS as error:
        raise InputError(f"must be an undamaged ZIP archive ({type(error).__name__}: {error})") from None


def _manifest(data):
    def pairs(items):
        tree = dict(items)
        if len(tree) != len(items):
            raise InputError("must not repeat a key", field=MANIFEST)
        return tree

    def constant(text):
        raise InputError("must not hold NaN or infinity", field=MANIFEST, value=text)

    try:
        tree = json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"must be JSON ({type(error).__name__})", field=MANIFEST) from None
    _object(tree, None, MANIFEST)
    if tree.get("format") != FORMAT:
        raise InputError(f"must be {FORMAT!r}", field="format", value=tree.get("format"))
    if type(tree.get("version")) is not int or tree["version"] != VERSION:
        raise InputError(f"must be {VERSION}", field="version", value=tree.get("version"))
    _object(tree, ("format", "version", "digest", "arrays", "network"), MANIFEST)
    try:
        right = _digest(tree)
    except (ValueError, RecursionError) as error:         # 1e999 parses to infinity, a lone surrogate has no UTF-8
        raise InputError(f"must hold finite numbers and valid text ({type(error).__name__})", field=MANIFEST) from None
    if tree["digest"] != right:
        raise InputError("must be the digest of the content", field="digest", value=tree["digest"])
    return tree


def _object(value, keys, where):
    """``value`` if it is a mapping with exactly ``keys`` (None: any)."""
    if not isinstance(value, dict):
        raise InputError("must be a mapping", field=where, value=value)
    if keys is not None and value.keys() != set(keys):
        odd = sorted(value.keys() ^ set(keys))
        raise InputError(f"must have exactly the fields {', '.join(sorted(keys))}; missing or unknown: {odd[:4]}",
                         field=where)
    return value


def _list(value, where):
    if not isinstance(value, list):
        raise InputError("must be a list", field=where, value=value)
    return value


def _text(value, where, *, optional=False):
    if not isinstance(value, str) and not (optional and value is None):
        raise InputError("must be text", field=where, value=value)
    return value


class _Expand(NamedTuple):
    """What becomes of packed arrays: their values, or, as long as only the structure counts, their shapes."""

    term: Callable              # as packing.unpack_term
    ternary: Callable           # as packing.unpack_ternary


def _network(tree, array, expand):
    """Network of a manifest tree; ``array(member, kind, where)`` gives its arrays, ``expand`` (`_Expand`) the values of
    packed ones. Types are checked here, values by `compress.validate`."""
    tree = _object(tree, ("name", "input", "output", "tensors", "layers", "provenance"), "network")
    tensors = {}
    for n, item in enumerate(_list(tree["tensors"], "network.tensors")):
        where = f"network.tensors[{n}]"
        item = _object(item, ("name", "height", "width", "channels", "scale", "zero_point"), where)
        name = _text(item["name"], f"{where}.name")
        if name in tensors:
            raise InputError("must not be repeated", field=f"{where}.name", value=name)
        scale = item["scale"]
        if type(scale) not in (int, float) or not math.isfinite(scale):
            raise InputError("must be finite and above 0", field=f"{where}.scale", value=scale)
        tensors[name] = Tensor(**(item | {"scale": float(scale)}))
    layers = tuple(_layer(item, f"network.layers[{n}]", array, expand)
                   for n, item in enumerate(_list(tree["layers"], "network.layers")))
    return Network(name=_text(tree["name"], "network.name"), input=_text(tree["input"], "network.input"),
                   output=_text(tree["output"], "network.output"), tensors=tensors, layers=layers,
                   provenance=_object(tree["provenance"], None, "network.provenance"))


_COMMON = ("kind", "name", "input", "output", "residual", "requantization")
_FIELDS = {"convolution": ("terms", "stride", "pads", "dilation", "groups", "format", "metrics", "weight_scale"),
           "basis": ("basis", "coefficients", "intermediate_bits", "pattern", "stride", "pads", "dilation", "format",
                     "metrics", "weight_scale"),
           "pool": ("pool", "window", "stride", "pads"), "add": ()}
_NUMBERS = ("zero_point", "low", "high", "residual_zero_point", "residual_multiplier")


def _term(term, at, array, expand):
    term = _object(term, None, at)
    if "values" in term:
        _object(term, ("pattern", "values"), at)
    else:
        _object(term, ("pattern", "channels", "slots", "index"), at)
    pattern = Pattern.parse(_text(term["pattern"], f"{at}.pattern"), field=f"{at}.pattern")
    if "values" in term:
        return Term(pattern=pattern, values=array(term["values"], "values", f"{at}.values"))
    slots, index = (array(term[p], p, f"{at}.{p}") for p in ("slots", "index"))
    return Term(pattern=pattern, values=expand.term(slots, index, term["channels"], pattern, at))


def _layer(item, where, array, expand):
    kind = _object(item, None, where).get("kind")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise InputError("must be convolution, basis, pool or add", field=f"{where}.kind", value=kind)
    _object(item, (*_COMMON, *_FIELDS[kind]), where)
    r = _object(item["requantization"], ("bias", "multiplier", "shift", *_NUMBERS), f"{where}.requantization")
    shared = {
        "name": _text(item["name"], f"{where}.name"), "input": _text(item["input"], f"{where}.input"),
        "output": _text(item["output"], f"{where}.output"),
        "residual": _text(item["residual"], f"{where}.residual", optional=True),
        "requantization": Requantization(
            **{p: array(r[p], p, f"{where}.requantization.{p}") for p in ("bias", "multiplier", "shift")},
            **{p: r[p] for p in _NUMBERS}),
    }
    sizes = {p: tuple(_list(item[p], f"{where}.{p}")) for p in ("stride", "pads", "dilation", "window") if p in item}
    if kind == "add":
        return Add(**shared)
    if kind == "pool":
        return Pool(kind=_text(item["pool"], f"{where}.pool"), **sizes, **shared)
    if kind == "basis":
        return _basis_layer(item, where, array, expand, shared | sizes)
    terms = []
    for n, term in enumerate(_list(item["terms"], f"{where}.terms")):
        terms.append(_term(term, f"{where}.terms[{n}]", array, expand))
    if not terms:
        raise InputError("must have at least one term", field=f"{where}.terms")
    scale = item["weight_scale"]
    return Convolution(**shared, terms=tuple(terms), **sizes, groups=item["groups"],
                       weight_scale=None if scale is None else array(scale, "weight_scale", f"{where}.weight_scale"),
                       format=_text(item["format"], f"{where}.format"),
                       metrics=_object(item["metrics"], None, f"{where}.metrics"))


def _basis_layer(item, where, array, expand, shared):
    at = f"{where}.coefficients"
    held = _object(item["coefficients"], ("shape", "codes"), at)
    codes = array(held["codes"], "codes", f"{at}.codes")
    pattern, scale = item["pattern"], item["weight_scale"]
    if pattern is not None:
        pattern = Pattern.parse(_text(pattern, f"{where}.pattern"), field=f"{where}.pattern")
    return BasisConvolution(
        **shared, basis=array(item["basis"], "basis", f"{where}.basis"),
        coefficients=expand.ternary(codes, _list(held["shape"], f"{at}.shape"), at),
        intermediate_bits=item["intermediate_bits"], pattern=pattern,
        weight_scale=None if scale is None else array(scale, "weight_scale", f"{where}.weight_scale"),
        format=_text(item["format"], f"{where}.format"), metrics=_object(item["metrics"], None, f"{where}.metrics"))
