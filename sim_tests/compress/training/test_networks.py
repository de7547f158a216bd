"""The networks: published parameter counts and names, forward formulas against other implementations."""
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

from torch import nn  # noqa: E402 (they follow the skip)
from torch.nn import functional  # noqa: E402

from compress.training import networks  # noqa: E402
from compress.training.networks import lstm, mlperf_tiny, resnet, transformer  # noqa: E402
from compress.training.technique import default_layers, weighted_layers  # noqa: E402
from spec.errors import InputError  # noqa: E402

torch.set_num_threads(1)
#: (name, classes) -> parameters. CIFAR ResNets: He et al., table 6 (.27M, .46M, .85M), exactly as published weights;
#: ResNet-18: torchvision's documentation; its CIFAR form and VGG-16: kuangliu/pytorch-cifar; MLPerf Tiny: Keras'
#: trainable parameters; digits: models/digits.json; the transformer and the LSTM: by hand.
PARAMETERS = {("digits", 10): 38_122, ("resnet20", 10): 269_722, ("resnet32", 10): 464_154,
              ("resnet56", 10): 853_018, ("resnet18", 1000): 11_689_512, ("resnet18_cifar", 10): 11_173_962,
              ("vgg16", 10): 14_728_266, ("resnet8", 10): 78_666 - 2 * 240, ("ds_cnn", 12): 23_756,
              ("vit", 10): 3 * 16 * 192 + 192 + 64 * 192 + 6 * (4 * 192 + 12 * 192 ** 2 + 9 * 192) + 2 * 192 + 1930,
              ("lstm", 10): 4 * 128 * (28 + 128 + 1) + 1290}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name,classes", PARAMETERS)
def test_published_parameter_counts(name, classes):
    with torch.device("meta"):
        model = networks.build(name, classes)
        assert parameters(model) == PARAMETERS[name, classes]
        assert model(torch.zeros(2, *model.input_shape)).shape == (2, classes)


#: (name, classes) -> multiplications of convolutions and matrices for one image. By hand for ResNet-20: 442,368 in the
#: first convolution, 2,359,296 in each of the other 18, half of it in the two of stride 2, then 640. The others agree
#: with published millions: 69, 126, 1,814 (torchvision), 556 and 313 (kuangliu), 12.5 and 2.7 (MLPerf Tiny).
MACS = {("resnet20", 10): 442_368 + 18 * 2_359_296 - 2 * 1_179_648 + 640, ("resnet32", 10): 68_862_592,
        ("resnet56", 10): 125_485_696, ("resnet18", 1000): 1_814_073_344, ("resnet18_cifar", 10): 555_422_720,
        ("vgg16", 10): 313_201_664, ("resnet8", 10): 12_501_632, ("ds_cnn", 12): 2_656_768}


def macs(model):
    """Counted by hooks, on an input of the network's size."""
    total = []

    def count(layer, inputs, output):
        outputs = output.shape[1:].numel() if isinstance(layer, nn.Conv2d) else layer.out_features
        total.append(outputs * layer.weight[0].numel())

    for layer in weighted_layers(model).values():
        layer.register_forward_hook(count)
    model(torch.zeros(1, *model.input_shape, device="meta"))
    return sum(total)


@pytest.mark.parametrize("name,classes", MACS)
def test_multiplications(name, classes):
    with torch.device("meta"):
        assert macs(networks.build(name, classes)) == MACS[name, classes]


def test_every_network_is_here():
    assert {name for name, _ in PARAMETERS} == set(networks.NETWORKS)
    for name in networks.NETWORKS:
        with torch.device("meta"):
            model = networks.build(name, 7)
        *_, last = weighted_layers(model).values()
        assert isinstance(last, nn.Linear) and last.out_features == 7


def test_keras_counts_statistics_too():
    """MLPerf Tiny's ResNet-8 has 78,666 parameters, of which 4 per normalised channel; DS-CNN 24,908."""
    for name, classes, total in (("resnet8", 10, 78_666), ("ds_cnn", 12, 24_908)):
        state = networks.build(name, classes).state_dict()
        assert sum(v.numel() for k, v in state.items() if "num_batches" not in k) == total
    assert mlperf_tiny.ResNet8(width=40).block3.conv2.weight.shape == (160, 160, 3, 3)


def test_resnet18_has_torchvision_names():
    with torch.device("meta"):
        names = [n for n in networks.build("resnet18", 1000).state_dict() if n.endswith(("weight", "bias"))]
    assert names[:6] == ["conv1.weight", "bn1.weight", "bn1.bias", "layer1.0.conv1.weight", "layer1.0.bn1.weight",
                         "layer1.0.bn1.bias"]
    assert {"layer2.0.downsample.0.weight", "layer4.0.downsample.1.bias", "layer4.1.bn2.weight", "fc.weight",
            "fc.bias"} < set(names) and len(names) == 62


def test_option_a_shortcut_by_hand():
    x = torch.arange(2 * 16.0).reshape(1, 2, 4, 4)
    y = resnet.PadShortcut(2, 4, 2)(x)
    assert y.shape == (1, 4, 2, 2) and not y[0, 0].any() and not y[0, 3].any()
    assert y[0, 1].tolist() == [[0, 2], [8, 10]] and y[0, 2].tolist() == [[16, 18], [24, 26]]


@pytest.mark.parametrize("size,kernel,stride,pads", [
    ((32, 32), (3, 3), 2, (0, 1, 0, 1)), ((32, 32), (3, 3), 1, (1, 1, 1, 1)), ((49, 10), (10, 4), 2, (1, 1, 4, 5)),
    ((8, 8), (1, 1), 2, (0, 0, 0, 0))])
def test_same_padding_is_tensorflows(size, kernel, stride, pads):
    """Left, right, top, bottom, worked by hand from TensorFlow's rule."""
    assert mlperf_tiny.SamePad(size, kernel, stride).pads == pads


def test_attention_is_pytorchs():
    generator = torch.Generator().manual_seed(1)
    model = transformer.Attention(5, 12, 3)
    x = torch.randn(2, 5, 12, generator=generator)
    other = nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        other.in_proj_weight.copy_(model.qkv.weight)
        other.in_proj_bias.copy_(model.qkv.bias)
        other.out_proj.weight.copy_(model.proj.weight)
        other.out_proj.bias.copy_(model.proj.bias)
    torch.testing.assert_close(model(x), other(x, x, x, need_weights=False)[0])


def test_lstm_is_pytorchs():
    model, other = lstm.LSTM(6, 5), nn.LSTM(6, 5, batch_first=True)
    with torch.no_grad():
        other.weight_ih_l0.copy_(model.input.weight)
        other.weight_hh_l0.copy_(model.recurrent.weight)
        other.bias_ih_l0.copy_(model.input.bias)
        other.bias_hh_l0.zero_()
    x = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model(x), other(x)[1][0][0])


def test_vision_transformer_sizes():
    model = transformer.VisionTransformer(classes=3, image=8, channels=1, patch=2, width=8, depth=1, heads=2)
    assert model.pos_embed.shape == (1, 16, 8) and model(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    x = torch.arange(64.0).reshape(1, 1, 8, 8)
    weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    token = (weight[:, 0] * x[0, 0, 2:4, 4:6]).sum(dim=(1, 2)) + bias
    torch.testing.assert_close(model.patch_embed(x)[0, 1 * 4 + 2], token)
    with pytest.raises(ValueError, match="Image and width must be multiples of patch and heads, not 9 of 2, 8 of 2"):
        transformer.VisionTransformer(image=9, patch=2, width=8, heads=2)


def test_residual_blocks_by_formula():
    block = resnet.BasicBlock(4, 8, 2).eval()
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(3))
    scale = (1 + 1e-5) ** -0.5                              # fresh statistics: mean 0, variance 1
    y = functional.relu(functional.conv2d(x, block.conv1.weight, stride=2, padding=1) * scale)
    y = functional.conv2d(y, block.conv2.weight, padding=1) * scale
    y = functional.relu(y + functional.conv2d(x, block.downsample[0].weight, stride=2) * scale)
    torch.testing.assert_close(block(x), y)


def test_layers_that_are_compressed():
    assert len(default_layers(networks.build("resnet20"))) == 18
    assert default_layers(networks.build("ds_cnn")) == []
    assert len(default_layers(networks.build("vgg16"))) == 12


def test_unknown_network():
    with pytest.raises(InputError, match=r"network must be one of .*did you mean resnet56\?\), not 'resnet5'"):
        networks.build("resnet5")
