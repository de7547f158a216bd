"""Masks of the Deep Learning Matrix Collection: good files in folders and archives, and every refusal."""
import io
import tarfile

import numpy as np
import pytest

from compress import dlmc
from sim_tests.real_data import real_data
from spec.errors import InputError

GOOD = b"2, 4, 3\n0 1 3 \n3 2 0 \n"


def text(mask):
    """The bytes of a bool matrix."""
    rows = [np.flatnonzero(r) for r in mask]
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    lines = [f"{mask.shape[0]}, {mask.shape[1]}, {offsets[-1]}", " ".join(map(str, offsets)),
             " ".join(str(c) for r in rows for c in r)]
    return ("\n".join(lines) + "\n").encode()


def archive(path, files, mode="w:xz"):
    """A tar archive of {name: bytes}."""
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_a_mask_by_hand():
    mask = dlmc.parse(GOOD, name="m")
    assert (mask.name, mask.rows, mask.columns, mask.density) == ("m", 2, 4, 3 / 8)
    assert mask.to_dense().tolist() == [[False, False, False, True], [True, False, True, False]]
    for empty in (b"2, 3, 0\n0 0 0\n\n", b"1,1,0\r\n0 0\r\n"):
        assert not dlmc.parse(empty).to_dense().any()


def test_folders_and_archives(rng, tmp_path):
    masks = {f"layer{n}": rng.random((n + 1, 3 * n + 2)) < 0.4 for n in range(5)}
    files = {f"a/b/{name}.smtx": text(m) for name, m in masks.items()} | {"a/readme": b"other"}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    sources = [tmp_path / "a", archive(tmp_path / "m.tar.xz", files), archive(tmp_path / "m.tar.gz", files, "w:gz"),
               archive(tmp_path / "m.tar", files, "w")]
    for source in sources:
        got = {m.name: m.to_dense() for m in dlmc.load(source)}
        assert list(got) == list(masks) and all(np.array_equal(got[n], masks[n]) for n in masks)


@pytest.mark.parametrize("data,rule", [
    (b"", "line 1 must be `nrows, ncols, nnz`"), (b"2 4 3\n0 1 3\n3 2 0", "line 1 must be `nrows"),
    (b"-2, 4, 3\n0 1 3\n3 2 0", "line 1 must be `nrows"), (b"0, 4, 0\n0\n", "line 1 must have 1..134217728 elements"),
    (b"999999999, 999999999, 1\n0 1\n0", "line 1 must have 1..134217728 elements"),
    (b"2, 4, 9\n0 1 3\n3 2 0", "line 1 must have at most 8 non-zeros, not 9"),
    (b"2, 4, 3\n0 1\n3 2 0", "line 2 must be 3 numbers, not 2"),
    (b"2, 4, 3\n0 1 2\n3 2 0", "line 2 must rise from 0 to 3"), (b"2, 4, 3\n0 4 3\n3 2 0", "line 2 must rise from 0"),
    (b"2, 4, 3\n1 1 3\n3 2 0", "line 2 must rise from 0"), (b"2, 4, 3\n0 x 3\n3 2 0", "line 2 must be whole numbers"),
    (b"2, 4, 3\n0 1 3\n3 2 4", "line 3 must be columns in 0..3, not 4"),
    (b"2, 4, 3\n0 1 3\n3 -2 0", "line 3 must be whole numbers"), (b"2, 4, 3\n0 1 3\n3 2", "line 3 must be 3 numbers"),
    (b"2, 4, 3\n0 1 3", "line 3 must be 3 numbers, not 0"), (b"2, 4, 3\n0 1 3\n3 2 2", "line 3 must name each column"),
    (b"2, 4, 3\n0 1 3\n3 2 0\n7", "line 3 must be the last line"),
    (b"2, 4, 3\n0 1 3\n3 2 " + b"9" * 40, "line 3 must be 3 numbers of at most nine digits"),
    (b"2, 4, 3\n0 1 3\n3 2 99999999999", "line 3 must be columns in 0..3, not 99999999999")])
def test_refused_text(data, rule, tmp_path):
    with pytest.raises(InputError) as caught:
        dlmc.parse(data)
    assert str(caught.value).startswith(rule)
    path = archive(tmp_path / "m.tar", {"good.smtx": GOOD, "x/bad.smtx": data}, "w")
    with pytest.raises(InputError) as caught:
        list(dlmc.load(path))
    assert str(caught.value).startswith(f"{path}: x/bad.smtx.{rule}")


def test_refused_collections(tmp_path, monkeypatch):
    def refused(path):
        with pytest.raises(InputError) as caught:
            list(dlmc.load(path))
        return str(caught.value)

    assert refused(tmp_path / "gone.tar") == f"{tmp_path / 'gone.tar'}: must be a folder or a tar archive"
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty").endswith("must hold files *.smtx")
    (tmp_path / "text.tar").write_bytes(b"hello")
    assert "must be an undamaged tar archive (ReadError)" in refused(tmp_path / "text.tar")
    whole = archive(tmp_path / "w.tar.xz", {f"{n}.smtx": text(np.eye(40 + n, dtype=bool)) for n in range(9)})
    for cut in (40, 200, whole.stat().st_size - 40):
        (tmp_path / "cut.tar.xz").write_bytes(whole.read_bytes()[:cut])
        assert "must be an undamaged tar archive" in refused(tmp_path / "cut.tar.xz")
    twice = archive(tmp_path / "t.tar", {"a/m.smtx": GOOD, "b/m.smtx": GOOD}, "w")
    assert refused(twice) == f"{twice}: b/m.smtx must be there once"
    monkeypatch.setattr(dlmc, "MAX_MASKS", 1)
    two = archive(tmp_path / "n.tar", {"a.smtx": GOOD, "b.smtx": GOOD}, "w")
    assert "b.smtx must be at most 1 masks" in refused(two)
    monkeypatch.setattr(dlmc, "MAX_TEXT_BYTES", 10)
    assert "must be at most 1 masks of 10 bytes" in refused(archive(tmp_path / "s.tar", {"a.smtx": GOOD}, "w"))
    monkeypatch.setattr(dlmc, "MAX_TOTAL_BYTES", 30)
    other = archive(tmp_path / "o.tar", {"x": b"1" * 20, "y": b"2" * 20}, "w")
    assert "y holds too much beside masks" in refused(other)
    monkeypatch.setattr(dlmc, "MAX_ARCHIVE_BYTES", 100)
    assert "must be at most 100 bytes, not" in refused(whole)


@pytest.mark.parametrize("level,density", [("0.8", 0.2), ("0.9", 0.1)])
def test_masks_of_resnet50(level, density):
    masks = {m.name: m for m in dlmc.load(real_data("dlmc", f"rn50_magnitude_{level}.tar.xz"))}
    assert len(masks) == 54 and all(abs(m.density - density) < 0.001 for m in masks.values())
    # input channel fastest: neighbouring taps of a channel go together, and their columns are ``depth`` apart
    for name, depth in (("bottleneck_2_block_group1_1_1", 64), ("bottleneck_2_block_group4_1_1", 512),
                        ("initial_conv", 3)):
        kept = masks[name].to_dense().astype(float)
        together = {n: (kept[:, n:] * kept[:, :-n]).mean() for n in (1, depth - 1, depth, depth + 1)}
        assert together[depth] > 1.2 * max(v for n, v in together.items() if n != depth)
