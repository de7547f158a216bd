"""Image data sets in the files their authors publish, from a path that the user gives; nothing is downloaded.

=============  =======================================================================================================
kind           forms of ``path``
=============  =======================================================================================================
cifar10        binary version (data_batch_1.bin … data_batch_5.bin, test_batch.bin): folder or .tar.gz; PNG files
               ``<split>/<class>/<name>.png``: folder, .tar.gz, or a folder with ``*<split>.tar.gz``
cifar100       binary version (train.bin, test.bin; the fine labels are used); PNG files as above
mnist,         idx: folder with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte,
fashion_mnist  t10k-labels-idx1-ubyte, each plain or .gz
=============  =======================================================================================================

The "python version" of CIFAR is a pickle, which can run code when it is read; it is refused. Archives are read in one
pass without being unpacked to disk. Every count and size is known in advance and checked before memory is allocated.
PNG images are in the order of class and file name, classes in alphabetical order, which is that of the binary labels.

Sources: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009 (binary layout:
https://www.cs.toronto.edu/~kriz/cifar.html); LeCun, Cortes, Burges, MNIST (idx); Xiao, Rasul, Vollgraf,
"Fashion-MNIST", arXiv 1708.07747.
"""
from dataclasses import dataclass
from functools import partial
import gzip
from hashlib import sha256
import io
import os
from pathlib import Path
import struct
import tarfile
import tempfile
import warnings
import zlib

import numpy as np
from PIL import Image

from compress import arrays
from spec.errors import InputError
from spec.strict_yaml import read_regular_file

SPLITS = ("train", "test")
#: Largest compressed file, and most bytes that one archive may unpack to (CIFAR: 185 MB).
MAX_FILE_BYTES = 512 << 20
#: Largest PNG file; a 32 x 32 RGB image has 3 KiB.
MAX_PNG_BYTES = 64 << 10
#: Most members of an archive, most entries of a folder.
MAX_MEMBERS = 1 << 18
#: What reading a damaged archive, gzip stream or PNG file can raise.
_DAMAGED = (OSError, EOFError, zlib.error, tarfile.TarError, struct.error, SyntaxError, ValueError, OverflowError,
            IndexError, KeyError, MemoryError, Image.DecompressionBombError, Warning)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A data set: ``shape`` [H, W, C] of an image, ``classes``, images per ``split``."""

    shape: tuple
    classes: int
    train: int
    test: int
    #: Binary files of each split (CIFAR), label bytes before an image, and which of them is the label.
    binary: dict | None = None
    label_bytes: int = 1
    #: Class names in label order, where PNG folders are compared with them.
    names: tuple = ()


KINDS = {
    "cifar10": Kind(shape=(32, 32, 3), classes=10, train=50_000, test=10_000, binary={
        "train": tuple(f"data_batch_{n}.bin" for n in range(1, 6)), "test": ("test_batch.bin",)},
        names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")),
    "cifar100": Kind(shape=(32, 32, 3), classes=100, train=50_000, test=10_000, label_bytes=2, binary={
        "train": ("train.bin",), "test": ("test.bin",)}),
    "mnist": Kind(shape=(28, 28, 1), classes=10, train=60_000, test=10_000),
    "fashion_mnist": Kind(shape=(28, 28, 1), classes=10, train=60_000, test=10_000),
}
#: (mean, standard deviation) of each channel of the training images, scaled to 0..1.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
}
#: Files of the pickled version of both CIFAR sets.
_PICKLES = {*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta", "train", "test", "meta"}
_REFUSAL = "must not be the python version (a pickle, which can run code): fetch the binary version " \
           "(cifar-10-binary.tar.gz or cifar-100-binary.tar.gz)"


def load(kind, path, split="train", *, cache=None):
    """One split of a data set.

    Args:
        kind: name in `KINDS`. path: see the table above. split: ``train`` or ``test``.
        cache: folder for decoded PNG archives (.npz, keyed by the archive's path, size and modification time; written
            whole or not at all; damaged ones are made anew), or None for none.
    Returns: (images uint8 [N, H, W, C], labels int64 [N] in 0..classes-1), in a fixed order.
    Raises: InputError for an unknown name and for missing, damaged, incomplete or oversized files.
    """
    if kind not in KINDS:
        raise InputError(f"must be one of {', '.join(KINDS)}", field="kind", value=kind)
    if split not in SPLITS:
        raise InputError(f"must be one of {', '.join(SPLITS)}", field="split", value=split)
    path, spec = Path(path), KINDS[kind]
    if not path.exists():
        raise InputError("must exist", source=path)
    try:
        if spec.binary is None:
            return _idx(spec, path, split)
        if not path.is_dir():
            return _cached(kind, spec, path, split, cache)
        return _cifar_folder(kind, spec, path, split, cache)
    except InputError as error:
        raise error.within(path) from None
    except OSError as error:
        raise InputError(f"must be readable ({error.strerror})", source=path) from None


def normalize(images, statistics):
    """``(images / 255 - mean) / standard deviation`` per channel.

    Args: images: uint8 [..., C]; statistics: (mean [C], standard deviation [C]) as in `STATISTICS`.
    Returns: float32 of the same shape.
    """
    mean, deviation = (np.asarray(v, np.float32) for v in statistics)
    return (images.astype(np.float32) / np.float32(255) - mean) / deviation


def load_source(text, *, raw=False, statistics=None):
    """``KIND:PATH[:SPLIT]`` (split ``test`` unless given), normalised by ``statistics`` (`STATISTICS` unless given).

    The first image of every class comes first, then the second of every class …, so that any number of images is a fair
    sample, also of sets that are stored class by class.

    Returns: ({"x": float32 [N, C, H, W], or with ``raw`` uint8 [N, H, W, C] as stored, "labels": int64 [N]}, where the
    data came from). Raises: InputError.
    """
    kind, _, rest = str(text).partition(":")
    path, _, split = rest.rpartition(":")
    if split not in SPLITS:
        path, split = rest, "test"
    images, labels = load(kind, path, split)
    order = in_turns(labels)
    images, labels = images[order], labels[order]
    x = images if raw else normalize(images, statistics or STATISTICS[kind]).transpose(0, 3, 1, 2)
    return {"x": x, "labels": labels}, f"{kind} {split} ({Path(path).name})"


def in_turns(labels):
    """Indices that take the classes in turns, each class in its order.

    >>> in_turns(np.array([0, 0, 0, 1, 1])).tolist()
    [0, 3, 1, 4, 2]
    """
    rank = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        rank[own] = np.arange(len(own))
    return np.lexsort((labels, rank))


def is_source(text):
    """Whether ``text`` begins like the argument of `load_source`."""
    return str(text).partition(":")[0] in KINDS and ":" in str(text)


# -- CIFAR: binary and PNG files ---------------------------------------------------------------------------------------
class _Records:
    """Collects the records of the binary version; `finish` checks that all are there."""

    def __init__(self, spec, split):
        self.spec, self.names, self.parts = spec, spec.binary[split], {}
        count = getattr(spec, split)
        self.each = count // len(self.names)
        self.size = self.each * (spec.label_bytes + int(np.prod(spec.shape)))

    def add(self, name, size, read):
        """Take file ``name`` of ``size`` bytes; ``read()`` gives them."""
        if size != self.size:
            raise InputError(f"must have {self.size} bytes ({self.each} records)", field=name, value=size)
        if name in self.parts:
            raise InputError("must be there once", field=name)
        data = np.frombuffer(read(), np.uint8)
        if len(data) != size:
            raise InputError(f"must have {size} bytes", field=name, value=len(data))
        self.parts[name] = data.reshape(self.each, -1)

    def finish(self):
        for name in self.names:
            if name not in self.parts:
                raise InputError("must be there", field=name)
        table = np.concatenate([self.parts[name] for name in self.names])
        height, width, channels = self.spec.shape
        labels = table[:, self.spec.label_bytes - 1].astype(np.int64)    # CIFAR-100: coarse, then fine
        _check_labels(labels, self.spec.classes)
        pixels = table[:, self.spec.label_bytes:].reshape(-1, channels, height, width)
        return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), labels


class _Pictures:
    """Collects PNG files of one split; `finish` checks that all are there and puts them in order."""

    def __init__(self, spec, split):
        self.spec, self.split, self.count = spec, split, getattr(spec, split)
        self.images, self.keys, self.seen = None, [], set()

    def add(self, folder, name, size, read):
        """Take image ``name`` of class ``folder``."""
        where = f"{self.split}/{folder}/{name}"
        if self.spec.names and folder not in self.spec.names:
            raise InputError(f"class must be one of {', '.join(self.spec.names)}", field=where)
        if size > MAX_PNG_BYTES:
            raise InputError(f"must have at most {MAX_PNG_BYTES} bytes", field=where, value=size)
        if (folder, name) in self.seen or len(self.keys) == self.count:
            raise InputError(f"must be one of {self.count} different images", field=where)
        if self.images is None:
            self.images = np.empty((self.count, *self.spec.shape), np.uint8)
        height, width, _ = self.spec.shape
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with Image.open(io.BytesIO(read()), formats=["PNG"]) as image:
                    if image.size != (width, height) or image.mode != "RGB":
                        raise InputError(f"must be a {width} x {height} RGB image", field=where,
                                         value=f"{image.size[0]} x {image.size[1]} {image.mode}")
                    self.images[len(self.keys)] = np.asarray(image)
        except InputError:
            raise
        except _DAMAGED as error:
            raise InputError(f"must be an undamaged PNG file ({type(error).__name__})", field=where) from None
        self.seen.add((folder, name))
        self.keys.append((folder, name))

    def finish(self):
        classes = sorted({folder for folder, _ in self.keys})
        if len(self.keys) != self.count or len(classes) != self.spec.classes:
            raise InputError(f"must hold {self.count} images in {self.spec.classes} classes", field=self.split,
                             value=f"{len(self.keys)} in {len(classes)}")
        order = sorted(range(self.count), key=self.keys.__getitem__)
        number = {name: n for n, name in enumerate(classes)}
        return self.images[order], np.array([number[self.keys[n][0]] for n in order], np.int64)


def _cifar_folder(kind, spec, path, split, cache):
    """Whatever form of a CIFAR set lies in folder ``path``."""
    inner = [path, *sorted(p for p in path.glob("cifar-*-batches-bin") if p.is_dir()),
             *sorted(p for p in path.glob("cifar-*-binary") if p.is_dir())]
    for folder in inner:
        if any((folder / name).exists() for name in spec.binary[split]):
            records = _Records(spec, split)
            for name in records.names:
                if (folder / name).exists():
                    records.add(name, (folder / name).stat().st_size,
                                partial(read_regular_file, folder / name, max_bytes=records.size))
            return records.finish()
    if (path / split).is_dir():
        return _png_folder(spec, path / split, split)
    archives = sorted(p for p in path.glob("*.tar.gz") if split in p.name and kind in p.name.replace("-", ""))
    archives = archives or sorted(p for p in path.glob("cifar*-binary.tar.gz") if kind in p.name.replace("-", ""))
    if len(archives) == 1:
        return _cached(kind, spec, archives[0], split, cache)
    if len(archives) > 1:
        raise InputError(f"must hold one archive of the {split} images", value=[p.name for p in archives])
    if any((path / name).is_file() for name in _PICKLES) or any(path.glob("cifar-*-python*")):
        raise InputError(_REFUSAL)
    raise InputError(f"must hold {spec.binary[split][0]}, {split}/<class>/*.png or *{kind}*{split}*.tar.gz")


def _png_folder(spec, path, split):
    pictures = _Pictures(spec, split)
    for folder in sorted(p for p in path.iterdir() if p.is_dir()):
        for number, file in enumerate(sorted(folder.glob("*.png"))):
            if number == MAX_MEMBERS:
                raise InputError(f"must have at most {MAX_MEMBERS} files", field=folder.name)
            pictures.add(folder.name, file.name, file.stat().st_size,
                         partial(read_regular_file, file, max_bytes=MAX_PNG_BYTES))
    return pictures.finish()


class _Limited(io.RawIOBase):
    """An unpacked stream that ends in an error beyond `MAX_FILE_BYTES`."""

    def __init__(self, stream):
        self.stream, self.left = stream, MAX_FILE_BYTES

    def read(self, size=-1):
        if size < 0 or size > self.left:
            raise InputError(f"must unpack to at most {MAX_FILE_BYTES} bytes")
        data = self.stream.read(size)
        self.left -= len(data)
        return data


def _member(archive, member):
    """Bytes of a member of a tar file."""
    return archive.extractfile(member).read()


def _archive(spec, path, split):
    """(images, labels, whether they were PNG files) of a .tar.gz file of either form, in one pass."""
    records, pictures, pickled = _Records(spec, split), _Pictures(spec, split), False
    try:
        with gzip.open(path) as packed, tarfile.open(fileobj=_Limited(packed), mode="r|") as archive:
            for number, member in enumerate(archive):
                if number == MAX_MEMBERS:
                    raise InputError(f"must have at most {MAX_MEMBERS} members")
                parts, read = Path(member.name).parts, partial(_member, archive, member)
                if not member.isreg() or not parts:
                    continue
                if parts[-1] in records.names:
                    records.add(parts[-1], member.size, read)
                elif parts[-1].endswith(".png") and len(parts) >= 3 and parts[-3] == split:
                    pictures.add(parts[-2], parts[-1], member.size, read)
                pickled |= parts[-1] in _PICKLES
            while archive.fileobj.read(1 << 16):         # gzip compares its checksum at the end of the stream
                pass
    except InputError:
        raise
    except _DAMAGED as error:
        raise InputError(f"must be an undamaged .tar.gz file ({type(error).__name__})") from None
    if records.parts:
        return *records.finish(), False
    if pictures.keys:
        return *pictures.finish(), True
    if pickled:
        raise InputError(_REFUSAL)
    raise InputError(f"must hold {records.names[0]} or {split}/<class>/*.png")


def _cached(kind, spec, path, split, cache):
    """`_archive` through the cache."""
    if not path.is_file():
        raise InputError("must be a folder or a regular file")
    info = path.stat()
    if info.st_size > MAX_FILE_BYTES:
        raise InputError(f"must have at most {MAX_FILE_BYTES} bytes", value=info.st_size)
    if cache is None:
        return _archive(spec, path, split)[:2]
    identity = f"{kind} {split} {path.resolve()} {info.st_size} {info.st_mtime_ns}"
    stored = Path(cache) / f"{kind}-{split}-{sha256(identity.encode()).hexdigest()[:16]}.npz"
    if stored.exists():
        try:
            found = arrays.load_data(stored)
            images, labels = found["x"], found["labels"]
            if images.dtype == np.uint8 and images.shape == (getattr(spec, split), *spec.shape) and \
                    labels.dtype == np.int64 and labels.shape == (len(images),):
                _check_labels(labels, spec.classes)
                return images, labels
        except (InputError, KeyError):
            pass                            # damaged: made anew below
    images, labels, decoded = _archive(spec, path, split)
    if decoded:
        _store(stored, images, labels)
    return images, labels


def _store(path, images, labels):
    """Write the cache file beside its place, then move it there: another process never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, x=images, labels=labels)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


# -- idx ---------------------------------------------------------------------------------------------------------------
def _idx(spec, path, split):
    if not path.is_dir():
        raise InputError("must be a folder with idx files")
    count, stem = getattr(spec, split), {"train": "train", "test": "t10k"}[split]
    labels = _idx_file(path, f"{stem}-labels-idx1-ubyte", (count,)).astype(np.int64)
    _check_labels(labels, spec.classes)
    return _idx_file(path, f"{stem}-images-idx3-ubyte", (count, *spec.shape[:2]))[..., None], labels


def _idx_file(folder, name, shape):
    """uint8 array of an idx file: two zero bytes, type 8, number of dimensions, dimensions (big-endian), elements."""
    plain, packed = folder / name, folder / f"{name}.gz"
    size = 4 + 4 * len(shape) + int(np.prod(shape))
    if plain.exists():
        have = plain.stat().st_size
        if have != size:
            raise InputError(f"must have {size} bytes", field=name, value=have)
        data = read_regular_file(plain, max_bytes=size)
    elif packed.exists():
        try:
            with gzip.open(io.BytesIO(read_regular_file(packed, max_bytes=MAX_FILE_BYTES))) as stream:
                data = stream.read(size + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"must be an undamaged gzip file ({type(error).__name__})", field=packed.name) from None
        if len(data) != size:
            rule = f"must unpack to {size} bytes"
            raise InputError(rule, field=packed.name, value="more" if len(data) > size else len(data))
    else:
        raise InputError("must be there, plain or .gz", field=name)
    head = struct.unpack(f">I{len(shape)}I", data[:4 + 4 * len(shape)])
    if head != (0x800 | len(shape), *shape):
        raise InputError(f"must be an idx file of bytes [{', '.join(map(str, shape))}]", field=name,
                         value=[hex(head[0]), *head[1:]])
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy()


def _check_labels(labels, classes):
    wrong = labels[(labels < 0) | (labels >= classes)]
    if wrong.size:
        raise InputError(f"labels must be in 0..{classes - 1}", value=int(wrong[0]))
