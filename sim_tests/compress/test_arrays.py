"""Array files from outside: what is read, and what is refused before it can cost memory."""
import io
import os
import struct
import zipfile

import numpy as np
import pytest

from compress import arrays
from spec.errors import InputError


def npz(members, compression=zipfile.ZIP_DEFLATED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, body in members:
            archive.writestr(name, body)
    return stream.getvalue()


X = arrays.write_npy(np.zeros((2, 3), np.float32))


@pytest.mark.parametrize("dtype", arrays.DATA_TYPES)
def test_npy_round_trip(dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    data = arrays.write_npy(array.transpose(2, 0, 1))
    got = arrays.read_npy(data, where="x")
    assert got.dtype == array.dtype and np.array_equal(got, array.transpose(2, 0, 1)) and got.flags.writeable
    assert np.array_equal(np.load(io.BytesIO(data), allow_pickle=False), got)


def test_files_of_numpy_load(tmp_path):
    x, labels = np.random.default_rng(0).normal(0, 1, (4, 1, 2, 2)), np.arange(4)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "a.npz", x=x, labels=labels)
    np.savez_compressed(tmp_path / "b.npz", x=np.zeros((100, 3, 8, 8)), labels=np.zeros(100, int))
    assert np.array_equal(arrays.load_data(tmp_path / "x.npy")["x"], x)
    assert np.array_equal(arrays.load_data(tmp_path / "a.npz")["labels"], labels)
    assert arrays.load_data(tmp_path / "b.npz")["x"].shape == (100, 3, 8, 8)


BAD = {
    "empty": b"", "text": b"hello world, this is not an array", "magic only": b"\x93NUMPY",
    "cut": X[:-1], "long": X + b"x",
    "huge": b"\x93NUMPY\x01\x00" + struct.pack("<H", 70) +
            b"{'descr': '<f4', 'fortran_order': False, 'shape': (1048576, 1024)}".ljust(69) + b"\n" + b"x",
    "no x": npz([("labels.npy", X)]), "other member": npz([("x.npy", X), ("y.npy", X)]),
    "raw member": npz([("x", X)]), "path": npz([("../x.npy", X)]), "lzma": npz([("x.npy", X)], zipfile.ZIP_LZMA),
    "bomb": npz([("x.npy", b"\0" * (1 << 24))]), "empty archive": npz([]),
    "nan": arrays.write_npy(np.full(3, np.nan)),
    "many": npz([(f"x{n}.npy", b"") for n in range(20)]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_file(tmp_path, name):
    path = tmp_path / "bad.npz"
    path.write_bytes(BAD[name])
    with pytest.raises(InputError) as caught:
        arrays.load_data(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_objects_are_never_unpickled(tmp_path):
    np.save(tmp_path / "o.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(InputError, match="must be of type"):
        arrays.load_data(tmp_path / "o.npy")


def test_special_files(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "missing"):
        with pytest.raises(InputError, match="must be"):
            arrays.load_data(path)


def test_damaged_archives_never_escape(tmp_path):
    data, refused = npz([("x.npy", X), ("labels.npy", arrays.write_npy(np.arange(2)))]), 0
    path = tmp_path / "d.npz"
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= 0x41
        path.write_bytes(bytes(broken))
        try:
            got = arrays.load_data(path)
            assert got["x"].shape == (2, 3)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > len(data) // 2
