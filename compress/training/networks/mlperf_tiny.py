"""ResNet-8 and DS-CNN as in MLPerf Tiny, with the padding of its TensorFlow models: "same", the odd pixel at the end.

Source: Banbury et al., "MLPerf Tiny Benchmark", NeurIPS 2021 Datasets and Benchmarks, section 4; the shapes are those
of the published TFLite files. DS-CNN: Zhang, Suda, Lai, Chandra, "Hello Edge: Keyword Spotting on Microcontrollers",
2017.
"""
from torch import nn
from torch.nn import functional

#: Of batch normalisation in Keras: epsilon, and the share of a new batch in the running statistics.
NORM = {"eps": 1e-3, "momentum": 0.01}


class SamePad(nn.Module):
    """Zeros around a map for a ``kernel`` of ``stride`` on a map of ``size``: ``ceil(size / stride)`` outputs."""

    def __init__(self, size, kernel, stride):
        super().__init__()
        total = [max(0, (-(-n // stride) - 1) * stride + k - n) for n, k in zip(size, kernel)]
        (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in total)
        self.pads = (left, right, top, bottom)

    def forward(self, x):
        return functional.pad(x, self.pads)


class TinyBlock(nn.Module):
    """3x3 | 3x3 plus shortcut, which is a 1x1 convolution without normalisation where the width changes."""

    def __init__(self, inputs, outputs, stride, size):
        super().__init__()
        self.pad = SamePad((size, size), (3, 3), stride)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride)
        self.bn1 = nn.BatchNorm2d(outputs, **NORM)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(outputs, **NORM)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride) if inputs != outputs else nn.Identity()

    def forward(self, x):
        y = functional.relu(self.bn1(self.conv1(self.pad(x))))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet8(nn.Module):
    """32x32 images: convolution and three blocks of ``width``, 2 ``width`` and 4 ``width`` channels (16; the "large"
    published one 40)."""

    input_shape = (3, 32, 32)

    def __init__(self, *, classes=10, width=16):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width, **NORM)
        self.block1 = TinyBlock(width, width, 1, 32)
        self.block2 = TinyBlock(width, 2 * width, 2, 32)
        self.block3 = TinyBlock(2 * width, 4 * width, 2, 16)
        self.linear = nn.Linear(4 * width, classes)
        _initialise(self)

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.block3(self.block2(self.block1(x)))
        return self.linear(x.mean(dim=(2, 3)))


class DSCNN(nn.Module):
    """Keyword spotting on 49 frames of 10 cepstral coefficients: 10x4 convolution of stride 2, then four times a
    depthwise 3x3 and a 1x1 convolution."""

    input_shape = (1, 49, 10)

    def __init__(self, *, classes=12, width=64):
        super().__init__()
        self.pad = SamePad((49, 10), (10, 4), 2)
        self.conv1, self.bn1 = nn.Conv2d(1, width, (10, 4), stride=2), nn.BatchNorm2d(width, **NORM)
        self.drop1 = nn.Dropout(0.2)
        self.blocks = nn.Sequential(*(nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width, **NORM), nn.ReLU(),
            nn.Conv2d(width, width, 1), nn.BatchNorm2d(width, **NORM), nn.ReLU()) for _ in range(4)))
        self.drop2 = nn.Dropout(0.4)
        self.linear = nn.Linear(width, classes)
        _initialise(self)

    def forward(self, x):
        x = self.drop1(functional.relu(self.bn1(self.conv1(self.pad(x)))))
        return self.linear(self.drop2(self.blocks(x)).mean(dim=(2, 3)))


def _initialise(model):
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
            nn.init.zeros_(m.bias)
