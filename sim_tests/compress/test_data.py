"""Data sets: each published form gives the images that were written, and nothing damaged gets through."""
from dataclasses import replace
import gzip
import io
import os
import struct
import tarfile

import numpy as np
from PIL import Image
import pytest

from compress import arrays, data, flow, graph
from compress.network import Network, Tensor
from sim_tests.real_data import real_data
from spec.errors import InputError

REAL = data.KINDS
NAMES = REAL["cifar10"].names
#: Images of each split of the small data sets that stand in for the real ones.
COUNT = {"train": 20, "test": 10}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Every data set has 20 + 10 images here; tests of the real ones put `REAL` back."""
    monkeypatch.setattr(data, "KINDS", {k: replace(v, **COUNT) for k, v in REAL.items()})


def cifar(split, classes=10, seed=0):
    """(images, labels), every class equally often, in the order of class."""
    rng, count = np.random.default_rng(seed), COUNT[split]
    return rng.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8), np.arange(count) * classes // count


def png(image, **options):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", **options)
    return stream.getvalue()


def png_files(split, x, labels):
    """{path: bytes}; names count down within a class, so that order is not that of writing."""
    return {f"{split}/{NAMES[n]}/{9999 - i}.png": png(image) for i, (image, n) in enumerate(zip(x, labels))}


def png_order(x, labels):
    """What the reader makes of `png_files`."""
    order = sorted(range(len(x)), key=lambda i: (labels[i], str(9999 - i)))
    return x[order], labels[order]


def binary(x, labels, coarse=None):
    """Records of the binary version: label bytes, then the channels' planes."""
    head = labels[:, None] if coarse is None else np.stack([coarse, labels], 1)
    return np.concatenate([head.astype(np.uint8), x.transpose(0, 3, 1, 2).reshape(len(x), -1)], 1).tobytes()


def write(folder, files):
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    return folder


def tar(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return path


def binary_files():
    x, labels = cifar("train")
    parts = {f"data_batch_{n + 1}.bin": binary(x[4 * n:4 * n + 4], labels[4 * n:4 * n + 4]) for n in range(5)}
    return parts | {"test_batch.bin": binary(*cifar("test", seed=1))}


def same(got, want):
    images, labels = got
    assert images.dtype == np.uint8 and labels.dtype == np.int64 and images.flags.c_contiguous
    assert np.array_equal(images, want[0]) and np.array_equal(labels, want[1])


def test_binary_version(tmp_path):
    """The layout is also checked by hand: label, then 1024 red bytes row by row, green, blue."""
    files = binary_files()
    folder = write(tmp_path / "plain", files)
    same(data.load("cifar10", folder), cifar("train"))
    same(data.load("cifar10", folder, "test"), cifar("test", seed=1))
    inner = {f"cifar-10-batches-bin/{name}": body for name, body in files.items()}
    same(data.load("cifar10", write(tmp_path / "inner", inner)), cifar("train"))
    same(data.load("cifar10", tar(tmp_path / "cifar-10-binary.tar.gz", inner), "test"), cifar("test", seed=1))
    same(data.load("cifar10", tmp_path, "test"), cifar("test", seed=1))
    record, image = files["test_batch.bin"][:3073], cifar("test", seed=1)[0][0]
    assert record[1 + 1024 + 32 * 3 + 5] == image[3, 5, 1]


def test_cifar100_takes_the_fine_label(tmp_path):
    x, labels = cifar("test", 100)
    write(tmp_path, {"test.bin": binary(x, labels, coarse=np.arange(10))})
    same(data.load("cifar100", tmp_path, "test"), (x, labels))


def test_png_forms(tmp_path):
    want = {s: png_order(*cifar(s)) for s in data.SPLITS}
    files = {k: v for s in data.SPLITS for k, v in png_files(s, *cifar(s)).items()}
    folder = write(tmp_path / "tree", files)
    both = tar(tmp_path / "both.tar.gz", {f"./root/{k}": v for k, v in files.items()} | {"README.md": b"x"})
    archives = tmp_path / "archives"
    archives.mkdir()
    for split in data.SPLITS:
        same(data.load("cifar10", folder, split), want[split])
        same(data.load("cifar10", both, split), want[split])
        tar(archives / f"cifar10_png_{split}.tar.gz", png_files(split, *cifar(split)))
        assert [NAMES.index(n) for n in sorted(NAMES)] == list(range(10))
    for split in data.SPLITS:
        same(data.load("cifar10", archives, split), want[split])


@pytest.mark.parametrize("kind", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("split,stem", [("train", "train"), ("test", "t10k")])
@pytest.mark.parametrize("packed", [False, True])
def test_idx(tmp_path, kind, split, stem, packed):
    count = COUNT[split]
    x, labels = np.random.default_rng(2).integers(0, 256, (count, 28, 28)).astype(np.uint8), np.arange(count) % 10
    files = {f"{stem}-images-idx3-ubyte": struct.pack(">4I", 0x803, count, 28, 28) + x.tobytes(),
             f"{stem}-labels-idx1-ubyte": struct.pack(">2I", 0x801, count) + labels.astype(np.uint8).tobytes()}
    if packed:
        files = {f"{name}.gz": gzip.compress(body) for name, body in files.items()}
    same(data.load(kind, write(tmp_path, files), split), (x[..., None], labels))


def test_cache_is_used_renewed_and_whole(tmp_path, monkeypatch):
    archive, cache = tar(tmp_path / "a.tar.gz", png_files("test", *cifar("test"))), tmp_path / "c" / "d"
    want = png_order(*cifar("test"))
    same(data.load("cifar10", archive, "test", cache=cache), want)
    (stored,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(data, "_archive", lambda *_: pytest.fail("decoded again"))
        same(data.load("cifar10", archive, "test", cache=cache), want)
    body = bytearray(stored.read_bytes())
    body[len(body) // 2] ^= 1
    other = io.BytesIO()
    np.savez(other, x=want[0][:3], labels=want[1][:3])
    for damaged in (bytes(body), body[:1000], b"", other.getvalue()):
        stored.write_bytes(damaged)
        same(data.load("cifar10", archive, "test", cache=cache), want)
        assert [p.name for p in cache.iterdir()] == [stored.name]
        assert np.array_equal(arrays.load_data(stored)["x"], want[0])
    tar(archive, png_files("test", *cifar("test", seed=9)))
    os.utime(archive, ns=(1, 1))
    same(data.load("cifar10", archive, "test", cache=cache), png_order(*cifar("test", seed=9)))


def test_normalize_and_source(tmp_path):
    write(tmp_path, binary_files())
    images, labels = cifar("test", seed=1)
    got, name = data.load_source(f"cifar10:{tmp_path}")
    mean, deviation = np.array([.4914, .4822, .4465]), np.array([.2470, .2435, .2616])
    order = data.in_turns(labels)
    labels = labels[order]
    want = ((images[order] / 255 - mean) / deviation).transpose(0, 3, 1, 2)
    assert got["x"].dtype == np.float32 and name == f"cifar10 test ({tmp_path.name})"
    np.testing.assert_allclose(got["x"], want, atol=1e-6)
    assert np.array_equal(got["labels"], labels)
    assert len(data.load_source(f"cifar10:{tmp_path}:train")[0]["x"]) == 20
    assert data.is_source("mnist:a") and not data.is_source("mnist") and not data.is_source("a/mnist:b")
    net = graph.Graph(name="n", input="x", output="x", shapes={"x": (32, 32, 3)}, nodes=())
    x, y, where = flow.load_samples(f"cifar10:{tmp_path}:test", net, limit=4)
    np.testing.assert_allclose(x, want.transpose(0, 2, 3, 1)[:4], atol=1e-6)
    assert np.array_equal(y, labels[:4]) and where == name
    with pytest.raises(InputError, match=r"must be \[N, 1, 8, 8\]"):
        flow.load_samples(f"cifar10:{tmp_path}", replace(net, shapes={"x": (8, 8, 1)}))


def test_classes_come_in_turns():
    labels = np.array([2, 2, 0, 0, 0, 1])
    assert data.in_turns(labels).tolist() == [2, 5, 0, 3, 1, 4]
    assert data.in_turns(np.tile(np.arange(10), 3)).tolist() == list(range(30))


def test_trained_packages_say_how_to_normalize(tmp_path):
    write(tmp_path, binary_files())
    images, labels = cifar("test", seed=1)
    order = data.in_turns(labels)

    def trained(**facts):
        tensor = Tensor(name="x", height=32, width=32, channels=3, scale=1.0, zero_point=0)
        return Network(name="n", input="x", output="x", tensors={"x": tensor}, layers=(),
                       provenance={"training": {"data": {"kind": "cifar10"} | facts}})

    x, y, _ = flow.load_samples(f"cifar10:{tmp_path}", trained(mean=[0.5, 0.25, 0], std=[1, 2, 4]))
    want = (images[order] / 255 - [0.5, 0.25, 0]) / [1, 2, 4]
    np.testing.assert_allclose(x, want, atol=1e-6)
    assert np.array_equal(y, labels[order])
    for facts, field in (({"mean": [0, 0], "std": [1, 1, 1]}, "mean"),
                         ({"mean": [0, 0, "a"], "std": [1, 1, 1]}, "mean"),
                         ({"mean": [0, 0, 0], "std": [1, 1, 0]}, "std"), ({"mean": [0, 0, 0]}, "std")):
        with pytest.raises(InputError, match=f"provenance.training.data.{field} must be 3 numbers"):
            flow.load_samples(f"cifar10:{tmp_path}", trained(**facts))


def damaged_png(change):
    files = png_files("test", *cifar("test"))
    change(files, next(iter(files)))
    return files


def put(files, name, body):
    files[name] = body


def move(files, name, new):
    files[new] = files.pop(name)


PIXELS = np.zeros((32, 32, 3), np.uint8)
PNG = {
    "cut": (lambda f, n: put(f, n, f[n][:200]), "test/airplane/9999.png must be an undamaged PNG file"),
    "flipped": (lambda f, n: put(f, n, f[n][:100] + b"\0\0" + f[n][102:]), "must be an undamaged PNG file"),
    "no png": (lambda f, n: put(f, n, b"GIF89a hello"), "must be an undamaged PNG file"),
    "small": (lambda f, n: put(f, n, png(PIXELS[:16])), "must be a 32 x 32 RGB image, not '32 x 16 RGB'"),
    "grey": (lambda f, n: put(f, n, png(PIXELS[..., 0])), "must be a 32 x 32 RGB image, not '32 x 32 L'"),
    "huge": (lambda f, n: put(f, n, bytes(1 << 17)), "must have at most 65536 bytes, not 131072"),
    "one less": (lambda f, n: f.pop(n), "test must hold 10 images in 10 classes, not '9 in 9'"),
    "one more": (lambda f, n: put(f, "test/ship/x.png", f[n]), "must be one of 10 different images"),
    "other class": (lambda f, n: move(f, n, "test/house/1.png"), "test/house/1.png class must be one of airplane"),
    "class twice": (lambda f, n: move(f, n, "test/ship/1.png"), "not '10 in 9'"),
    "nothing": (lambda f, n: f.clear(), "must hold (test_batch.bin or|10 images)"),
}


@pytest.mark.parametrize("name", PNG)
@pytest.mark.parametrize("form", ["archive", "folder"])
def test_bad_png(tmp_path, name, form):
    files = damaged_png(PNG[name][0])
    path = tar(tmp_path / "a.tar.gz", files) if form == "archive" else write(tmp_path, files)
    if form == "folder":
        (tmp_path / "test").mkdir(exist_ok=True)
    refused(path, "test", PNG[name][1])


def refused(path, split, text, kind="cifar10"):
    with pytest.raises(InputError, match=text) as caught:
        data.load(kind, path, split)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_binary(tmp_path):
    files = binary_files()
    first, third = files["data_batch_1.bin"], files["data_batch_3.bin"]
    for name, body, text in [
            ("data_batch_3.bin", third[:-1], r"data_batch_3.bin must have 12292 bytes \(4 records\), not 12291"),
            ("data_batch_3.bin", third[:-3073], "must have 12292 bytes"),
            ("data_batch_1.bin", b"\x0a" + first[1:], "labels must be in 0..9, not 10")]:
        refused(write(tmp_path, files | {name: body}), "train", text)
        refused(tar(tmp_path / "a.tar.gz", files | {name: body}), "train", text)
    (tmp_path / "data_batch_1.bin").unlink()
    refused(tmp_path, "train", "data_batch_1.bin must be there")
    refused(tar(tmp_path / "a.tar.gz", {"a/test_batch.bin": b""}), "test", "test_batch.bin must have 30730 bytes")
    body = files["test_batch.bin"]
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as archive:
        for folder in "ab":
            member = tarfile.TarInfo(f"{folder}/test_batch.bin")
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    refused(tmp_path / "b.tar.gz", "test", "test_batch.bin must be there once")


def test_pickles_are_refused_unread(tmp_path):
    text = r"python version \(a pickle.*fetch the binary version"
    refused(write(tmp_path / "f", {"data_batch_1": b"cos\nsystem\n"}), "train", text)
    refused(write(tmp_path / "g", {"cifar-100-python/train": b"x"}), "train", text, "cifar100")
    refused(tar(tmp_path / "cifar-10-python.tar.gz", {"cifar-10-batches-py/test_batch": b"x"}), "test", text)


def test_bad_archives(tmp_path, monkeypatch):
    whole = tar(tmp_path / "a.tar.gz", binary_files()).read_bytes()
    path = tmp_path / "b.tar.gz"
    rng, refusals = np.random.default_rng(0), 0
    for n in range(60):
        broken = bytearray(whole)
        if n % 2:
            del broken[rng.integers(len(broken)):]
        else:
            broken[rng.integers(len(broken))] ^= 1 << rng.integers(8)
        path.write_bytes(broken)
        try:
            same(data.load("cifar10", path, "test"), cifar("test", seed=1))
        except InputError as error:
            refusals += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refusals > 40
    for body in (b"", b"hello", gzip.compress(b"hello"), gzip.compress(bytes(100))):
        path.write_bytes(body)
        refused(path, "test", "must (be an undamaged .tar.gz file|hold test_batch.bin)")
    monkeypatch.setattr(data, "MAX_FILE_BYTES", len(whole) + 1)
    refused(tar(tmp_path / "c.tar.gz", {"zeros": bytes(1 << 22)}), "test", "must unpack to at most")
    monkeypatch.setattr(data, "MAX_FILE_BYTES", 1000)
    refused(tmp_path / "a.tar.gz", "test", "must have at most 1000 bytes")


def test_bad_idx(tmp_path):
    name, labels = "t10k-images-idx3-ubyte", struct.pack(">2I", 0x801, 10) + bytes(10)
    good = struct.pack(">4I", 0x803, 10, 28, 28) + bytes(7840)
    write(tmp_path, {"t10k-labels-idx1-ubyte": labels, name: good})
    assert data.load("mnist", tmp_path, "test")[0].shape == (10, 28, 28, 1)
    refused(tmp_path, "train", "train-labels-idx1-ubyte must be there, plain or .gz", "mnist")
    for body, text in [(good[:-1], f"{name} must have 7856 bytes, not 7855"), (b"", "must have 7856 bytes"),
                       (struct.pack(">4I", 0x803, 10, 14, 56) + bytes(7840), r"idx file of bytes \[10, 28, 28\]"),
                       (struct.pack(">4I", 0xD03, 10, 28, 28) + bytes(7840), "must be an idx file")]:
        (tmp_path / name).write_bytes(body)
        refused(tmp_path, "test", text, "mnist")
    (tmp_path / name).unlink()
    for body, text in [(gzip.compress(good)[:-20], "must be an undamaged gzip file"), (b"x", "undamaged gzip file"),
                       (gzip.compress(good + b"x"), "must unpack to 7856 bytes, not 'more'"),
                       (gzip.compress(good[:-1]), "must unpack to 7856 bytes, not 7855")]:
        (tmp_path / f"{name}.gz").write_bytes(body)
        refused(tmp_path, "test", text, "mnist")
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(labels[:-1] + b"\x0b")
    refused(tmp_path, "test", "labels must be in 0..9, not 11", "fashion_mnist")
    refused(tmp_path / "t10k-labels-idx1-ubyte", "test", "must be a folder with idx files", "mnist")


def test_bad_names(tmp_path):
    with pytest.raises(InputError, match="kind must be one of cifar10, cifar100, mnist, fashion_mnist, not 'svhn'"):
        data.load("svhn", tmp_path)
    with pytest.raises(InputError, match="split must be one of train, test, not 'validation'"):
        data.load("mnist", tmp_path, "validation")
    refused(tmp_path / "absent", "test", "must exist")
    refused(tmp_path, "test", r"must hold test_batch.bin, test/<class>/\*.png or \*cifar10\*test\*.tar.gz")
    for n in "ab":
        tar(tmp_path / f"cifar10{n}_test.tar.gz", {})
    refused(tmp_path, "test", "must hold one archive of the test images")
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "test", "must be a folder or a regular file")


def test_real_cifar10(monkeypatch):
    folder = real_data("cifar10")
    monkeypatch.setattr(data, "KINDS", REAL)
    images, labels = data.load("cifar10", folder, "test")
    assert images.shape == (10_000, 32, 32, 3) and np.array_equal(labels, np.arange(10_000) // 1000)
    mean = images.reshape(-1, 3).mean(0) / 255
    np.testing.assert_allclose(mean, data.STATISTICS["cifar10"][0], atol=0.004)


def test_real_fashion_mnist(monkeypatch):
    folder = real_data("fashion_mnist")
    monkeypatch.setattr(data, "KINDS", REAL)
    images, labels = data.load("fashion_mnist", folder, "test")
    assert images.shape == (10_000, 28, 28, 1) and np.bincount(labels).tolist() == [1000] * 10
    np.testing.assert_allclose(images.mean() / 255, data.STATISTICS["fashion_mnist"][0][0], atol=0.002)
