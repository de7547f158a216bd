"""CIFAR ResNets from state dicts: the ONNX file computes what PyTorch's layers compute."""
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch (extra train) is not installed")

from compress import engine, flow, onnx_import  # noqa: E402 (they follow the skip)
from compress import graph as graphs  # noqa: E402
from compress.training import resnet_cifar  # noqa: E402
from spec.errors import InputError  # noqa: E402
from torch.nn import functional  # noqa: E402


def random_state(generator, *, blocks=1, classes=10):
    """A state dict with the names of a published one, of 2 + 6 * blocks layers."""
    state = {}

    def conv(key, norm, inputs, outputs):
        state[f"module.{key}.weight"] = torch.randn(outputs, inputs, 3, 3, generator=generator) / (3 * inputs ** 0.5)
        state[f"module.{norm}.weight"] = torch.rand(outputs, generator=generator) + 0.5
        state[f"module.{norm}.bias"] = torch.randn(outputs, generator=generator) / 4
        state[f"module.{norm}.running_mean"] = torch.randn(outputs, generator=generator) / 4
        state[f"module.{norm}.running_var"] = torch.rand(outputs, generator=generator) + 0.5

    conv("conv1", "bn1", 3, 16)
    inputs = 16
    for stage, width in enumerate(resnet_cifar.WIDTHS, 1):
        for number in range(blocks):
            conv(f"layer{stage}.{number}.conv1", f"layer{stage}.{number}.bn1", inputs, width)
            conv(f"layer{stage}.{number}.conv2", f"layer{stage}.{number}.bn2", width, width)
            inputs = width
    state["module.linear.weight"] = torch.randn(classes, 64, generator=generator)
    state["module.linear.bias"] = torch.randn(classes, generator=generator)
    return state


def forward(state, x):
    """The network in PyTorch, shortcut A as its authors wrote it: slicing and zero padding."""
    def stage(key, norm, x, stride=1):
        s = {p: state[f"module.{norm}.{p}"] for p in ("running_mean", "running_var", "weight", "bias")}
        y = functional.conv2d(x, state[f"module.{key}.weight"], stride=stride, padding=1)
        return functional.batch_norm(y, s["running_mean"], s["running_var"], s["weight"], s["bias"], eps=1e-5)

    x = torch.relu(stage("conv1", "bn1", x))
    for number, width in enumerate(resnet_cifar.WIDTHS, 1):
        prefix = f"layer{number}.0"
        stride = 1 if x.shape[1] == width else 2
        y = torch.relu(stage(f"{prefix}.conv1", f"{prefix}.bn1", x, stride))
        y = stage(f"{prefix}.conv2", f"{prefix}.bn2", y)
        if stride == 2:
            pad = (width - x.shape[1]) // 2
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad))
        x = torch.relu(y + x)
    return functional.linear(x.mean(dim=(2, 3)), state["module.linear.weight"], state["module.linear.bias"])


def test_onnx_equals_pytorch(tmp_path):
    state = random_state(torch.Generator().manual_seed(5))
    torch.save({"state_dict": state}, tmp_path / "resnet8.th")
    resnet_cifar.main([str(tmp_path / "resnet8.th"), "--out", str(tmp_path / "resnet8.onnx")])
    x = np.random.default_rng(1).normal(size=(2, 3, 32, 32)).astype(np.float32)
    want = forward(state, torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(engine.run_onnx(tmp_path / "resnet8.onnx", x), want, rtol=1e-3, atol=1e-3)
    graph = onnx_import.load(tmp_path / "resnet8.onnx")
    np.testing.assert_allclose(graphs.forward(graph, x.transpose(0, 2, 3, 1))[:, 0, 0], want, rtol=1e-3, atol=1e-3)
    np.save(tmp_path / "x.npy", x)
    network = flow.compress_model(tmp_path / "resnet8.onnx", "nm:2:4", calibration=tmp_path / "x.npy")
    assert sum(layer.residual is not None for layer in network.layers) == 3


def test_damaged_file_is_refused(tmp_path):
    (tmp_path / "x.th").write_bytes(b"not a state dict")
    with pytest.raises(InputError, match="x.th: must be a PyTorch state dict"):
        resnet_cifar.load_state(tmp_path / "x.th")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "y.th")
    with pytest.raises(InputError, match="y.th: must hold a CIFAR ResNet"):
        resnet_cifar.load_state(tmp_path / "y.th")
