"""Pruning masks in the format of the Deep Learning Matrix Collection (.smtx): patterns of real networks, no values.

Three lines of text: ``nrows, ncols, nnz``; nrows + 1 row offsets; nnz column indices. A convolution is the matrix
[outputs, kernel_h * kernel_w * inputs], input channel fastest, which is the order of our kernels. (No description says
so, the masks do: neighbouring taps of one channel are kept together far more often than by chance, and these are
``inputs`` columns apart.) A collection is a folder of such files or a .tar.xz, .tar.gz or .tar archive of them.

Source: T. Gale et al., "Sparse GPU Kernels for Deep Learning", arXiv 2006.10901.
"""
from dataclasses import dataclass
import lzma
from pathlib import Path
import re
import tarfile
import zlib

import numpy as np

from spec.errors import InputError
from spec.strict_yaml import read_regular_file

SUFFIX = ".smtx"
MAX_ARCHIVE_BYTES = 1 << 30
#: Of one mask's text, and of all masks of a collection.
MAX_TEXT_BYTES, MAX_TOTAL_BYTES = 1 << 27, 1 << 31
MAX_MASKS = 4096
#: Rows * columns of one mask.
MAX_ELEMENTS = 1 << 27
_HEADER = re.compile(rb"\s*(\d{1,9})\s*,\s*(\d{1,9})\s*,\s*(\d{1,9})\s*")
#: What a damaged archive raises.
_DAMAGED = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, ValueError)


@dataclass(frozen=True, kw_only=True, eq=False)
class Mask:
    """Pattern of one matrix: ``offsets`` int64 [rows + 1], ``indices`` int64 [nnz], each row's columns distinct."""

    name: str
    rows: int
    columns: int
    offsets: np.ndarray
    indices: np.ndarray

    @property
    def density(self):
        """Share of the elements that are kept."""
        return len(self.indices) / (self.rows * self.columns)

    def to_dense(self):
        """bool [rows, columns]."""
        dense = np.zeros((self.rows, self.columns), bool)
        dense[np.repeat(np.arange(self.rows), np.diff(self.offsets)), self.indices] = True
        return dense


def parse(data, *, name="mask"):
    """Mask of the bytes of a .smtx file; every size is checked before an array of it is made.

    Raises: InputError naming the line.
    """
    lines = data.split(b"\n", 3)
    lines += [b""] * (4 - len(lines))
    header = _HEADER.fullmatch(lines[0])
    if header is None:
        raise InputError("must be `nrows, ncols, nnz`", field="line 1", value=lines[0][:40])
    rows, columns, nonzeros = map(int, header.groups())
    if not rows or not columns or rows * columns > MAX_ELEMENTS:
        raise InputError(f"must have 1..{MAX_ELEMENTS} elements", field="line 1", value=(rows, columns))
    if nonzeros > rows * columns:
        raise InputError(f"must have at most {rows * columns} non-zeros", field="line 1", value=nonzeros)
    if lines[3].strip():
        raise InputError("must be the last line", field="line 3")
    offsets = _numbers(lines[1], rows + 1, "line 2")
    if offsets[0] != 0 or offsets[-1] != nonzeros or (np.diff(offsets) < 0).any():
        raise InputError(f"must rise from 0 to {nonzeros}", field="line 2")
    indices = _numbers(lines[2], nonzeros, "line 3")
    if nonzeros and (indices.min() < 0 or indices.max() >= columns):
        raise InputError(f"must be columns in 0..{columns - 1}", field="line 3", value=int(indices.max()))
    mask = Mask(name=name, rows=rows, columns=columns, offsets=offsets, indices=indices)
    if np.count_nonzero(mask.to_dense()) != nonzeros:
        raise InputError("must name each column of a row once", field="line 3")
    return mask


def _numbers(line, count, where):
    """int64 [count] of a line of numbers."""
    if line.translate(None, b"0123456789 \t\r"):
        raise InputError("must be whole numbers", field=where)
    if len(line) > 10 * (count + 1):                        # at most nine digits each
        raise InputError(f"must be {count} numbers of at most nine digits", field=where)
    values = np.fromstring(line, np.int64, sep=" ") if line.strip() else np.zeros(0, np.int64)
    if len(values) != count:
        raise InputError(f"must be {count} numbers", field=where, value=len(values))
    return values


def load(path):
    """Yields the Mask of every .smtx file of a folder or tar archive, in order of their names in the folder, in file
    order in an archive; ``name`` is the file's name without suffix.

    Raises: InputError naming archive, file and line.
    """
    found, total = set(), 0
    for name, size, read in _folder(Path(path)) if Path(path).is_dir() else _archive(Path(path)):
        total += size
        if size > MAX_TEXT_BYTES or total > MAX_TOTAL_BYTES or len(found) == MAX_MASKS:
            raise InputError(f"must be at most {MAX_MASKS} masks of {MAX_TEXT_BYTES} bytes, {MAX_TOTAL_BYTES} together",
                             source=path, field=name)
        stem = name.rpartition("/")[2].removesuffix(SUFFIX)
        if stem in found:
            raise InputError("must be there once", source=path, field=name)
        found.add(stem)
        data = read()
        try:
            yield parse(data, name=stem)
        except InputError as error:
            raise error.inside(name).within(path) from None
    if not found:
        raise InputError(f"must hold files *{SUFFIX}", source=path)


def _folder(path):
    """(name, bytes, reader) of the masks of a folder."""
    for file in sorted(path.rglob(f"*{SUFFIX}")):
        yield (file.relative_to(path).as_posix(), file.stat().st_size,
               lambda file=file: read_regular_file(file, max_bytes=MAX_TEXT_BYTES))


def _archive(path):
    """(name, bytes, reader) of the masks of a tar archive; other members are passed over unread."""
    if not path.is_file():
        raise InputError("must be a folder or a tar archive", source=path)
    if path.stat().st_size > MAX_ARCHIVE_BYTES:
        raise InputError(f"must be at most {MAX_ARCHIVE_BYTES} bytes", source=path, value=path.stat().st_size)
    def read(member):
        try:
            return archive.extractfile(member).read()
        except _DAMAGED as error:
            raise _damaged(path, error) from None

    try:
        with tarfile.open(path) as archive:
            passed = 0
            for member in archive:
                if member.isreg() and member.name.endswith(SUFFIX):
                    yield member.name, member.size, lambda member=member: read(member)
                    continue
                passed += member.size
                if passed > MAX_TOTAL_BYTES:
                    raise InputError("holds too much beside masks", source=path, field=member.name)
    except InputError:
        raise
    except _DAMAGED as error:
        raise _damaged(path, error) from None


def _damaged(path, error):
    return InputError(f"must be an undamaged tar archive ({type(error).__name__})", source=path)
