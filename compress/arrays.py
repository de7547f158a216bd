"""NumPy array files read without trust: header first, every size checked before anything is allocated.

NumPy itself allocates what a header promises, accepts bodies longer than the shape, and falls back to pickle for object
arrays; none of that happens here.
"""
import io
import math
import struct
from tokenize import TokenError
import warnings
import zipfile
import zlib

import numpy as np
from numpy.lib import format as npy

from spec.errors import InputError
from spec.strict_yaml import read_regular_file

MAX_FILE_BYTES = 1 << 30
MAX_RANK = 5
MAX_DIM = 1 << 20
MAX_ELEMENTS = 1 << 31
#: Types that calibration data and labels may have; packages allow fewer.
DATA_TYPES = tuple(np.dtype(t).str for t in ("<f4", "<f8", "|u1", "|i1", "<i2", "<u2", "<i4", "<i8"))
#: What parsing a damaged header can raise inside NumPy.
_HEADER_ERRORS = (ValueError, TypeError, OverflowError, MemoryError, EOFError, RecursionError, SyntaxError, KeyError,
                  UnicodeDecodeError, TokenError)
#: What reading a damaged archive can raise inside zipfile.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, EOFError, OSError, RuntimeError,
              ValueError, OverflowError)


def read_header(data, *, where, types=DATA_TYPES):
    """(dtype, shape, bytes of the header) of the start of a .npy file.

    Raises: InputError for another version, type, rank (1..5), dimension (1..2**20), size, or Fortran order.
    """
    stream = io.BytesIO(data[:1 << 16])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            version = npy.read_magic(stream)
            if version != (1, 0):
                raise InputError("must be .npy format version 1.0", field=where, value=version)
            shape, fortran, dtype = npy.read_array_header_1_0(stream)
    except InputError:
        raise
    except (*_HEADER_ERRORS, Warning) as error:
        raise InputError(f"must be a .npy array ({type(error).__name__} in its header)", field=where) from None
    if dtype.hasobject or dtype.fields is not None or dtype.subdtype is not None or dtype.str not in types:
        raise InputError(f"must be of type {', '.join(sorted(set(types)))}", field=where, value=str(dtype)[:40])
    if fortran:
        raise InputError("must be in C order", field=where)
    if not 1 <= len(shape) <= MAX_RANK or any(type(d) is not int or not 1 <= d <= MAX_DIM for d in shape):
        raise InputError(f"must have 1..{MAX_RANK} dimensions in 1..{MAX_DIM}", field=where, value=shape)
    if math.prod(shape) > MAX_ELEMENTS:
        raise InputError(f"must have at most {MAX_ELEMENTS} elements", field=where, value=shape)
    return dtype, shape, stream.tell()


def read_npy(data, *, where, types=DATA_TYPES):
    """Array of the bytes of a .npy file whose body is exactly as long as its header says; a copy, writable.

    Raises: InputError; floats must be finite.
    """
    dtype, shape, start = read_header(data, where=where, types=types)
    want = math.prod(shape) * dtype.itemsize
    if len(data) - start != want:
        raise InputError(f"must have a body of {want} bytes for shape {shape}", field=where, value=len(data) - start)
    array = np.frombuffer(data, dtype, offset=start).reshape(shape).copy()
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError("must be finite (NaN or infinity found)", field=where)
    return array


def write_npy(array):
    """Bytes of a .npy file, version 1.0, C order, little-endian."""
    array = np.asarray(array)
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    stream = io.BytesIO()
    npy.write_array(stream, array, version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def load_data(path):
    """Arrays of a data file: ``{"x": …}`` of a .npy file, ``x`` and optionally ``labels`` of a .npz file.

    Raises: InputError for anything else, naming the file.
    """
    data = read_regular_file(path, max_bytes=MAX_FILE_BYTES)
    try:
        if data[:6] == b"\x93NUMPY":
            return {"x": read_npy(data, where="x")}
        if data[:4] != b"PK\x03\x04":
            raise InputError("must be a .npy or .npz file")
        return _load_npz(data)
    except InputError as error:
        raise error.within(path) from None


def _load_npz(data):
    arrays = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if len(members) > 16:
                raise InputError("must have at most 16 members", value=len(members))
            budget = MAX_FILE_BYTES
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name not in ("x", "labels") or name in arrays or name == member.filename:
                    raise InputError("must be x.npy or labels.npy, once each", field="member", value=member.filename)
                if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise InputError("must be stored or deflated, not encrypted", field=member.filename)
                if member.file_size > budget or member.file_size > 1100 * member.compress_size + 4096:
                    raise InputError("unpacks to too many bytes", field=member.filename, value=member.file_size)
                budget -= member.file_size
                with archive.open(member) as stream:
                    body = stream.read(member.file_size + 1)
                arrays[name] = read_npy(body, where=name)
    except InputError:
        raise
    except ZIP_ERRORS as error:
        raise InputError(f"must be an undamaged .npz file ({type(error).__name__})") from None
    if "x" not in arrays:
        raise InputError("must hold an array named x")
    return arrays
