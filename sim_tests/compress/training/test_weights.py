"""Weights from files: the same from every form, and nothing that does not fit gets in."""

import os

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="needs the extra `train` (safetensors)")

import onnx  # noqa: E402 (they follow the skip)
from onnx import helper, numpy_helper  # noqa: E402
from torch import nn  # noqa: E402

from compress import data  # noqa: E402
from compress.training import networks, weights  # noqa: E402
from compress.training.networks.resnet import PadShortcut  # noqa: E402
from sim_tests.real_data import real_data  # noqa: E402
from spec.errors import InputError  # noqa: E402

torch.set_num_threads(1)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.shortcut, self.fc = PadShortcut(2, 4, 2), nn.Linear(4, 3)


def state(seed=1):
    """Random values for every tensor of `Small`."""
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.rand(v.shape, generator=generator) if v.is_floating_point() else torch.tensor(7)
            for k, v in Small().state_dict().items()}


def onnx_file(tensors, path):
    graph = helper.make_graph([], "g", [], [], [numpy_helper.from_array(v.numpy(), k) for k, v in tensors.items()])
    path.write_bytes(helper.make_model(graph).SerializeToString())


WRITERS = {".pt": torch.save, ".pth": lambda s, p: torch.save({"state_dict": s, "epoch": 3}, p),
           ".th": lambda s, p: torch.save({"state_dict": {f"module.{k}": v for k, v in s.items()}}, p,
                                          _use_new_zipfile_serialization=False),
           ".safetensors": safetensors_torch.save_file, ".onnx": onnx_file}


@pytest.mark.parametrize("suffix", weights.READERS)
def test_every_form_gives_every_tensor(tmp_path, suffix):
    want = state()
    WRITERS[suffix](want, tmp_path / f"w{suffix}")
    model = Small()
    assert weights.load(model, tmp_path / f"w{suffix}") is model
    for name, value in model.state_dict().items():
        if not (suffix == ".onnx" and name.endswith("num_batches_tracked")):
            assert torch.equal(value, want[name]), name


def test_statistics_of_how_many_batches_may_miss_and_types_widen(tmp_path):
    want = {k: v.double() for k, v in state().items() if "num_batches" not in k}
    torch.save(want, tmp_path / "w.pt")
    got = weights.load(Small(), tmp_path / "w.pt").state_dict()
    assert all(got[k].dtype == torch.float32 and torch.equal(got[k], v.float()) for k, v in want.items())


def test_onnx_shortcut_is_no_parameter(tmp_path):
    others = {"shortcut.weight": torch.zeros(4, 2, 1, 1), "shape": torch.tensor([1, 2])}
    onnx_file(state() | others, tmp_path / "w.onnx")
    assert torch.equal(weights.load(Small(), tmp_path / "w.onnx").fc.bias, state()["fc.bias"])


CHANGES = {
    "missing": (lambda s: s.pop("fc.bias"), "tensor 'fc.bias' must be there"),
    "renamed": (lambda s: s.update({"linear.bias": s.pop("fc.bias")}),
                "tensor ('fc.bias' must be there .but 'linear.bias' is|'linear.bias' does not belong)"),
    "additional": (lambda s: s.update(other=torch.zeros(2)), "tensor 'other' does not belong to this network"),
    "shape": (lambda s: s.update({"conv.weight": torch.zeros(4, 2, 3)}),
              r"tensor 'conv.weight' must have shape \[4, 2, 3, 3\], not \[4, 2, 3\]"),
    "nan": (lambda s: s["norm.bias"].__setitem__(1, np.nan), "tensor 'norm.bias' must be finite"),
    "infinity": (lambda s: s["fc.weight"].__setitem__((0, 0), np.inf), "tensor 'fc.weight' must be finite"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".onnx"])
def test_wrong_tensors(tmp_path, name, suffix):
    change, text = CHANGES[name]
    tensors = state()
    change(tensors)
    WRITERS[suffix](tensors, tmp_path / f"w{suffix}")
    refused(tmp_path / f"w{suffix}", text)


def refused(path, text):
    model = Small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match=text) as caught:
        weights.load(model, path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_wrong_types(tmp_path):
    for value, text in [(torch.zeros(3, dtype=torch.int8), "must be a dense floating-point tensor, not 'torch.int8"),
                        (torch.zeros(3).to_sparse(), "must be a dense floating-point tensor, not .*sparse"),
                        (torch.zeros(3, dtype=torch.complex64), "must be a dense floating-point tensor"),
                        (torch.full((3,), 1e300, dtype=torch.float64), "must be finite"),
                        ([0.0] * 3, "must be a tensor")]:
        torch.save(state() | {"fc.bias": value}, tmp_path / "w.pt")
        refused(tmp_path / "w.pt", f"tensor 'fc.bias' {text}")
    torch.save(state() | {"module.fc.bias": torch.zeros(3)}, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "tensor 'fc.bias' must be there once")
    torch.save([1, 2], tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "must be a PyTorch state dict, not 'list'")


class Harmful:
    """Would run code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Harmful()}, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", r"must be a PyTorch state dict \(UnpicklingError\)")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", weights.READERS)
def test_damaged_files(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    WRITERS[suffix](state(), path)
    whole, rng = path.read_bytes(), np.random.default_rng(3)
    for body in (b"", b"hello", b"\xff" * 100, *(whole[:n] for n in rng.integers(0, len(whole), 12))):
        path.write_bytes(body)
        refused(path, "must")
    for _ in range(40):
        broken = bytearray(whole)
        broken[rng.integers(len(broken))] ^= 1 << rng.integers(8)
        path.write_bytes(broken)
        try:
            weights.load(Small(), path)
        except InputError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)


def test_onnx_sizes_and_external_data(tmp_path):
    path, external = tmp_path / "w.onnx", onnx.TensorProto.EXTERNAL
    for change, text in [(lambda t: t.dims.__setitem__(0, 1 << 40), r"must have shape \[3\]"),
                         (lambda t: t.__setattr__("raw_data", t.raw_data[:-1]), "must hold the elements of its shape"),
                         (lambda t: t.__setattr__("data_location", external), "must lie inside the file")]:
        onnx_file(state(), path)
        model = onnx.load(path)
        change(next(t for t in model.graph.initializer if t.name == "fc.bias"))
        path.write_bytes(model.SerializeToString())
        refused(path, f"tensor 'fc.bias' {text}")


def test_files_that_are_none(tmp_path):
    refused(tmp_path / "w.h5", "must end in .th, .pt, .pth, .safetensors, .onnx")
    for suffix in weights.READERS:
        refused(tmp_path / f"absent{suffix}", "must be")
        (tmp_path / f"folder{suffix}").mkdir()
        refused(tmp_path / f"folder{suffix}", "must be a regular file")


@torch.no_grad()
def published_accuracy(name, file, images):
    """Share of right answers on every ``10000 / images``-th test image."""
    model = weights.load(networks.build(name), real_data("resnet_cifar10", file)).eval()
    pixels, labels = data.load("cifar10", real_data("cifar10"), "test")
    step = len(labels) // images
    x = data.normalize(pixels[::step], ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = torch.from_numpy(x).permute(0, 3, 1, 2)
    model = model.to(memory_format=torch.channels_last)
    right = sum((model(part).argmax(1).numpy() == target).sum()
                for part, target in zip(x.split(250), np.split(labels[::step], images // 250)))
    return float(right) / images


def test_published_resnet20_has_its_accuracy():
    """91.73 % on all 10,000 images; on 500 of them within three standard deviations."""
    assert abs(published_accuracy("resnet20", "resnet20-12fca82f.th", 500) - 0.9173) < 3 * (0.92 * 0.08 / 500) ** 0.5
