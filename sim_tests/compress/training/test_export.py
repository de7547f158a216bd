"""PyTorch to ONNX: ONNX Runtime computes what PyTorch does, nodes are called like modules, the importer reads CNNs."""
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

import onnx  # noqa: E402 (they follow the skip)
from onnx import numpy_helper  # noqa: E402
import onnxruntime  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402

from compress import demo, engine, flow, onnx_import  # noqa: E402
from compress import graph as graphs  # noqa: E402
from compress.training import digits, export, networks, parametrizations, weights  # noqa: E402
from compress.training.networks import lstm, mlperf_tiny, resnet, transformer, vgg  # noqa: E402
from spec.errors import InputError  # noqa: E402

torch.set_num_threads(1)
MODELS = Path(__file__).resolve().parents[3] / "models"
#: Every network of the zoo, those that would take long in a smaller form: name -> (module, shape of the input).
ZOO = {name: (lambda name=name: networks.build(name), None) for name in networks.NETWORKS} | {
    "resnet32": (lambda: resnet.CifarResNet(blocks=5), (3, 8, 8)), "resnet56": (lambda: resnet.CifarResNet(blocks=9),
                                                                                (3, 8, 8)),
    "resnet18_cifar": (lambda: resnet.ResNet18(classes=10, small=True, width=8), (3, 8, 8)),
    "resnet18": (lambda: resnet.ResNet18(classes=10, width=8), (3, 32, 32)),
    "vgg16": (lambda: vgg.VGG16(width=0.25), None),
    "vit": (lambda: transformer.VisionTransformer(width=24, depth=2), None),
    "ds_cnn": (lambda: mlperf_tiny.DSCNN(width=16), None),
    "lstm": (lambda: lstm.LSTMClassifier(rows=9, columns=5, hidden=6), None)}
#: Networks with operators beyond the importer's.
BEYOND = ("vit", "lstm")


def settled(model, seed=1):
    """Evaluation mode, with statistics and scales of batch normalisation that are not those of the start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.copy_(torch.randn(m.num_features, generator=generator) / 4)
                m.running_var.copy_(torch.rand(m.num_features, generator=generator) + 0.5)
                m.weight.copy_(torch.rand(m.num_features, generator=generator) / 2 + 0.5)
                m.bias.copy_(torch.randn(m.num_features, generator=generator) / 4)
    return model.eval()


def run(proto, x):
    """Output of ONNX Runtime on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, {"image": x})[0]


def same(model, shape, *, count=3, imported=True):
    """Checks ONNX Runtime, and the importer's graph, against PyTorch; returns (ONNX model, graph)."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    proto = export.to_onnx(model, shape=shape)
    x = np.random.default_rng(4).normal(size=(count, *shape)).astype(np.float32)
    with torch.no_grad():
        want = model(torch.from_numpy(x)).numpy()
    scale = np.abs(want).max()
    np.testing.assert_allclose(run(proto, x), want, rtol=1e-4, atol=1e-5 * scale)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    if not imported:
        return proto, None
    graph = onnx_import.parse(proto.SerializeToString())
    got = graphs.forward(graph, x[:1].transpose(0, 2, 3, 1))
    np.testing.assert_allclose(graphs.to_nchw(got).reshape(want[:1].shape), want[:1], rtol=1e-4, atol=1e-5 * scale)
    return proto, graph


def kinds(proto):
    return [n.op_type for n in proto.graph.node]


def pads(proto):
    """{node: its pads} of all convolutions."""
    return {n.name: list(next(a.ints for a in n.attribute if a.name == "pads")) for n in proto.graph.node
            if n.op_type == "Conv" and any(a.name == "pads" for a in n.attribute)}


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name):
    build, shape = ZOO[name]
    torch.manual_seed(7)                                     # layers initialise themselves from PyTorch's generator
    model = settled(build())
    proto, _ = same(model, shape or model.input_shape, imported=name not in BEYOND)
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and name != "lstm"}
    assert layers <= {n.name for n in proto.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")}
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms == {n.name for n in proto.graph.node if n.op_type == "BatchNormalization"}
    assert proto.opset_import[0].version >= 17 and [o.name for o in proto.graph.output] == ["logits"]


def option_a(state, x):
    """A CIFAR ResNet of 8 layers as its authors wrote it, from the state dict alone: slices and zero padding."""
    def stage(key, norm, x, stride=1):
        s = {p: state[f"{norm}.{p}"] for p in ("running_mean", "running_var", "weight", "bias")}
        y = functional.conv2d(x, state[f"{key}.weight"], stride=stride, padding=1)
        return functional.batch_norm(y, s["running_mean"], s["running_var"], s["weight"], s["bias"], eps=1e-5)

    x = torch.relu(stage("conv1", "bn1", x))
    for number, width in enumerate((16, 32, 64), 1):
        prefix = f"layer{number}.0"
        stride = 1 if x.shape[1] == width else 2
        y = torch.relu(stage(f"{prefix}.conv1", f"{prefix}.bn1", x, stride))
        y = stage(f"{prefix}.conv2", f"{prefix}.bn2", y)
        if stride == 2:
            pad = (width - x.shape[1]) // 2
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad))
        x = torch.relu(y + x)
    return functional.linear(x.mean(dim=(2, 3)), state["linear.weight"], state["linear.bias"])


def test_cifar_resnet_through_the_flow(tmp_path):
    model = settled(resnet.CifarResNet(blocks=1))
    proto = export.to_onnx(model, name="resnet8")
    (tmp_path / "resnet8.onnx").write_bytes(proto.SerializeToString())
    x = np.random.default_rng(1).normal(size=(2, 3, 32, 32)).astype(np.float32)
    want = option_a(model.state_dict(), torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run(proto, x), want, rtol=1e-4, atol=1e-4)
    assert {"layer2.0.shortcut", "layer3.0.shortcut"} < {n.name for n in proto.graph.node}
    np.save(tmp_path / "x.npy", x)
    network = flow.compress_model(tmp_path / "resnet8.onnx", "nm:2:4", calibration=tmp_path / "x.npy")
    assert sum(layer.residual is not None for layer in network.layers) == 3


def test_same_padding_joins_its_convolution():
    proto, _ = same(settled(mlperf_tiny.ResNet8()), (3, 32, 32), count=1)
    assert "Pad" not in kinds(proto)
    assert pads(proto)["block2.conv1"] == [0, 0, 1, 1] and pads(proto)["block1.conv1"] == [1, 1, 1, 1]
    proto = export.to_onnx(mlperf_tiny.DSCNN())
    assert "Pad" not in kinds(proto) and pads(proto)["conv1"] == [4, 1, 5, 1]


FORMS = {
    "tt": lambda shape: parametrizations.TensorTrain(shape=shape, ranks=[1, 6, 5, 1]),
    "tucker": lambda shape: parametrizations.Tucker2(shape=shape, ranks=[6, 5]),
    "svd": lambda shape: parametrizations.LowRank(shape=shape, rank=5),
    "spatial": lambda shape: parametrizations.LowRank(shape=shape, rank=5, form="spatial"),
}
STAGES = {"tt": 3, "tucker": 3, "svd": 2, "spatial": 2}


@pytest.mark.parametrize("form", FORMS)
def test_factored_layers_become_chains(form):
    """The second convolution is padded by itself, the first one before it, unevenly."""
    model = settled(mlperf_tiny.ResNet8(width=8))
    for conv in (model.block2.conv1, model.block2.conv2):
        parametrize.register_parametrization(conv, "weight", FORMS[form](tuple(conv.weight.shape)), unsafe=True)
    proto, graph = same(model, (3, 32, 32))
    names = {n.name for n in proto.graph.node if n.op_type == "Conv"}
    for layer in ("block2.conv1", "block2.conv2"):
        assert {n for n in names if n.startswith(layer)} == {f"{layer}.{k + 1}" for k in range(STAGES[form])}
    assert "Pad" not in kinds(proto)
    assert {f"block2_conv1_{k + 1}" for k in range(STAGES[form])} < {n.name for n in graph.nodes}
    given = {i.name for i in proto.graph.initializer}
    assert f"block2.conv1.{STAGES[form]}.bias" in given and "block2.conv1.1.bias" not in given


def test_factored_lstm_and_linear():
    model = lstm.LSTMClassifier(rows=4, columns=6, hidden=5)
    for layer, ranks in ((model.lstm.input, [1, 3, 1]), (model.lstm.recurrent, [1, 2, 1]), (model.linear, [1, 4, 1])):
        shape = tuple(layer.weight.shape)
        parametrize.register_parametrization(layer, "weight", parametrizations.TensorTrain(shape=shape, ranks=ranks),
                                             unsafe=True)
    proto, _ = same(model.eval(), (1, 4, 6), imported=False)
    assert {"lstm", "linear.1", "linear.2"} < {n.name for n in proto.graph.node}


class Net(nn.Module):
    """A network of one function of (modules, x)."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def conv(inputs=2, outputs=4, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, **options)


#: function of (modules, x), modules, operators that it becomes.
FUNCTIONS = {
    "pad joins": (lambda m, x: m.a(functional.pad(x, (1, 2, 2, 0))), {"a": conv(padding=0)}, ["Conv"]),
    "pads add up": (lambda m, x: m.a(functional.pad(functional.pad(x, (0, 1)), (1, 0, 0, 1))),
                    {"a": conv(kernel=5, padding=2)}, ["Conv"]),
    "wide pad": (lambda m, x: m.a(functional.pad(x, (3, 0))), {"a": conv()}, ["Pad", "Conv"]),
    "pad before 1x1": (lambda m, x: m.a(functional.pad(x, (1, 1, 1, 1))), {"a": conv(kernel=1)}, ["Pad", "Conv"]),
    "pad through 1x1": (lambda m, x: m.b(m.a(functional.pad(x, (0, 1, 2, 0)))),
                        {"a": conv(kernel=1, bias=False), "b": conv(4, 3)}, ["Conv", "Conv"]),
    "pad before stride": (lambda m, x: m.a(functional.pad(x, (1, 1, 1, 1))),
                          {"a": conv(kernel=1, bias=False, stride=2)}, ["Pad", "Conv"]),
    "pad before pooling": (lambda m, x: functional.max_pool2d(functional.pad(m.a(x), (0, 1, 0, 1)), 2), {"a": conv()},
                           ["Conv", "Pad", "MaxPool"]),
    "pad at the end": (lambda m, x: functional.pad(m.a(x), (0, 1)), {"a": conv()}, ["Conv", "Pad"]),
    "dilation and groups": (lambda m, x: m.a(x), {"a": conv(groups=2, dilation=2, padding=(1, 2), stride=(2, 1))},
                            ["Conv"]),
    "same": (lambda m, x: m.a(x), {"a": conv(kernel=(3, 5), padding="same", dilation=2)}, ["Conv"]),
    "functional conv": (lambda m, x: functional.conv2d(x, m.a.weight, m.a.bias, 2, 1), {"a": conv()}, ["Conv"]),
    "functional linear": (lambda m, x: functional.linear(x.flatten(1), m.a.weight), {"a": nn.Linear(128, 3)},
                          ["Flatten", "Gemm"]),
    "relu6": (lambda m, x: functional.relu6(m.b(8 * m.a(x))), {"a": conv(), "b": nn.ReLU6()},
              ["Conv", "Mul", "Clip", "Clip"]),
    "methods": (lambda m, x: m.a(x).relu().view(x.size(0), -1), {"a": conv()}, ["Conv", "Relu", "Flatten"]),
    "reshape": (lambda m, x: m.a(x).reshape(x.size(0), 2, x.size(2) - 6 + 70), {"a": conv()}, None),
    "modules": (lambda m, x: m.f(m.e(m.d(m.c(m.b(m.a(x)))))),
                {"a": conv(), "b": nn.MaxPool2d(2, padding=1), "c": nn.AvgPool2d(2, 1, padding=1), "d": nn.Identity(),
                 "e": nn.AdaptiveAvgPool2d(1), "f": nn.Flatten()},
                ["Conv", "MaxPool", "AveragePool", "GlobalAveragePool", "Flatten"]),
    "average without padding": (lambda m, x: functional.avg_pool2d(m.a(x), 3, 2, 1, count_include_pad=False),
                                {"a": conv()}, ["Conv", "AveragePool"]),
    "ceiling": (lambda m, x: functional.max_pool2d(m.a(x), 4, 3, ceil_mode=True), {"a": conv()}, ["Conv", "MaxPool"]),
    "shared module": (lambda m, x: m.r(m.b(m.r(m.b(m.a(x))))), {"a": conv(), "b": conv(4, 4), "r": nn.ReLU()},
                      ["Conv", "Conv", "Relu", "Conv", "Relu"]),
    "in place": (lambda m, x: functional.relu_(m.a(x)), {"a": conv()}, ["Conv", "Relu"]),
    "mean": (lambda m, x: m.a(x).mean((-1, -2), keepdim=True), {"a": conv()}, ["Conv", "GlobalAveragePool"]),
    "other mean": (lambda m, x: m.a(x).mean(1), {"a": conv()}, ["Conv", "ReduceMean"]),
    "softmax": (lambda m, x: m.s(functional.softmax(m.a(x).flatten(1), dim=-1)), {"a": conv(), "s": nn.Softmax(1)},
                ["Conv", "Flatten", "Softmax", "Softmax"]),
    "gelu and division": (lambda m, x: m.g(m.a(x)) / 3, {"a": conv(), "g": nn.GELU()},
                          ["Conv", "Div", "Erf", "Mul", "Add", "Mul", "Div"]),
    "index": (lambda m, x: m.a(x)[:, 1], {"a": conv()}, ["Conv", "Gather"]),
    "norms": (lambda m, x: m.n(m.a(x)), {"a": nn.BatchNorm2d(2, affine=False, eps=1e-3),
                                         "n": nn.LayerNorm([8, 8], elementwise_affine=False)},
              ["BatchNormalization", "LayerNormalization"]),
    "dropout": (lambda m, x: functional.dropout(m.d(m.a(x)), 0.5, m.training).contiguous(),
                {"a": conv(), "d": nn.Dropout(0.3)}, ["Conv"]),
    "no bias": (lambda m, x: m.a(x.flatten(2)), {"a": nn.Linear(64, 3, bias=False)},
                ["Reshape", "Transpose", "MatMul"]),
}


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n != "reshape"])
def test_operations(name):
    function, modules, wanted = FUNCTIONS[name]
    proto, _ = same(Net(function, **modules).eval(), (2, 8, 8), imported=False)
    assert kinds(proto) == wanted
    assert len({n.name for n in proto.graph.node}) == len(proto.graph.node)


REFUSED = {
    "tensor's size in sums": (*FUNCTIONS["reshape"][:2], "cannot be traced|is not supported|must be"),
    "sigmoid": (lambda m, x: torch.sigmoid(m.a(x)), {"a": conv()}, "sigmoid of the network sigmoid is not supported"),
    "module": (lambda m, x: m.b(m.a(x)), {"a": conv(), "b": nn.Hardswish()},
               "b of the network Hardswish is not supported"),
    "tanh gelu": (lambda m, x: functional.gelu(m.a(x), approximate="tanh"), {"a": conv()}, "approximate GELU"),
    "alpha": (lambda m, x: torch.add(m.a(x), x.mean(), alpha=2), {"a": conv()}, "is not supported"),
    "circular": (lambda m, x: m.a(x), {"a": conv(padding=1, padding_mode="circular")},
                 "a of the network padding_mode circular is not supported"),
    "reflect": (lambda m, x: m.a(functional.pad(x, (1, 1, 1, 1), mode="reflect")), {"a": conv()},
                "pad must add zeros to height and width"),
    "channels padded": (lambda m, x: functional.pad(m.a(x), (0, 0, 0, 0, 1, 1)), {"a": conv()}, "pad must add zeros"),
    "active dropout": (lambda m, x: functional.dropout(m.a(x)), {"a": conv()}, "dropout must not be active"),
    "adaptive": (lambda m, x: functional.adaptive_avg_pool2d(m.a(x), 2), {"a": conv()}, "must be to 1 x 1"),
    "divisor": (lambda m, x: functional.avg_pool2d(m.a(x), 2, divisor_override=3), {"a": conv()},
                "divide by its window"),
    "even same": (lambda m, x: m.a(x), {"a": conv(kernel=2, padding="same")}, "'same' of an even kernel"),
    "slices": (lambda m, x: m.a(x)[:, :, ::2], {"a": conv()}, "an index must be one number on one axis"),
    "batch lost": (lambda m, x: m.a(x).flatten(0, 1), {"a": conv()}, "must keep the batch"),
    "batch moved": (lambda m, x: m.a(x).permute(1, 0, 2, 3).reshape(4, -1), {"a": conv()}, "must keep the batch"),
    "branch": (lambda m, x: m.a(x) if x.sum() > 0 else x, {"a": conv()}, r"network cannot be traced \(symbolically"),
    "two outputs": (lambda m, x: (m.a(x), x), {"a": conv()}, "network must end in one tensor that it computes"),
    "nothing": (lambda m, x: x, {"a": conv()}, "network must end in one tensor that it computes"),
    "no statistics": (lambda m, x: m.a(x), {"a": nn.BatchNorm2d(2, track_running_stats=False)}, "running statistics"),
    "wrong channels": (lambda m, x: m.a(x), {"a": conv(3)}, r"network cannot be traced \("),
    "computed weight": (lambda m, x: functional.conv2d(x, m.a.weight * 2), {"a": conv()}, "must have a parameter"),
    "computed matrix": (lambda m, x: functional.linear(x, m.a.weight * 2), {"a": nn.Linear(8, 8)}, "must have a param"),
    "indices": (lambda m, x: functional.max_pool2d(m.a(x), 2, return_indices=True)[0], {"a": conv()}, "not supported"),
    "shape": (lambda m, x: m.a(x).size(), {"a": conv()}, "size must be of one dimension"),
    "softmax type": (lambda m, x: functional.softmax(m.a(x), 1, dtype=torch.float64), {"a": conv()}, "another type"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    function, modules, text = REFUSED[name]
    with pytest.raises(InputError, match=text) as caught:
        export.to_onnx(Net(function, **modules), shape=(2, 8, 8))
    assert "\n" not in str(caught.value)


def test_weights_come_back_from_the_file(tmp_path):
    for name in ("resnet20", "resnet8"):
        model = settled(networks.build(name))
        (tmp_path / "w.onnx").write_bytes(export.to_onnx(model).SerializeToString())
        got = weights.load(networks.build(name), tmp_path / "w.onnx").state_dict()
        assert all(torch.equal(got[k], v) for k, v in model.state_dict().items() if "num_batches" not in k)


def test_same_network_same_bytes():
    model = settled(mlperf_tiny.ResNet8(width=4))
    assert export.to_onnx(model).SerializeToString() == export.to_onnx(model).SerializeToString()
    assert model.train() and export.to_onnx(model).SerializeToString() and model.training and model.bn1.training


def test_committed_digits_network():
    """The trainer's network with the weights of models/digits.onnx is the function of that file."""
    committed = onnx.load(MODELS / "digits.onnx").graph
    given = {i.name.replace("_bn.mean", "_bn.running_mean").replace("_bn.var", "_bn.running_var"):
             torch.tensor(numpy_helper.to_array(i)) for i in committed.initializer}
    x, _ = demo.digits("heldout")
    want = engine.run_onnx(MODELS / "digits.onnx", x)
    for model in (digits.Digits(), networks.build("digits")):
        model.load_state_dict(given, strict=False)
        proto = export.to_onnx(model, name="digits")
        np.testing.assert_allclose(run(proto, x), want, rtol=1e-5, atol=1e-5)
        convolutions = [n.name for n in proto.graph.node if n.op_type in ("Conv", "Gemm")]
        assert convolutions == ["conv1", "block_a", "block_b", "conv2", "fc"]


def test_command(tmp_path, capsys):
    model = settled(networks.build("resnet20", 7))
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.th")
    export.main(["resnet20", str(tmp_path / "w.th"), "--classes", "7", "--out", str(tmp_path / "w.onnx")])
    assert (tmp_path / "w.onnx").read_bytes() == export.to_onnx(model, name="resnet20").SerializeToString()
    for arguments, text in [
            (["resnet21", "w.th"], "network must be one of"),
            (["resnet20", str(tmp_path / "w.th")], "w.th: tensor 'linear.weight' must have shape [10, 64]")]:
        with pytest.raises(SystemExit) as caught:
            export.main([*arguments, "--out", str(tmp_path / "x.onnx")])
        message = capsys.readouterr().err
        assert caught.value.code == 2 and text in message and message.count("\n") == 1
    assert not (tmp_path / "x.onnx").exists()
