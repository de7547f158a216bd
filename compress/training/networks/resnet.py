"""Residual networks. Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016."""
from torch import nn
from torch.nn import functional


def _norm_conv(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs)


class PadShortcut(nn.Module):
    """Option A (section 4.2): every ``stride``-th pixel, channels padded with zeros on both sides; no parameters."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.inputs, self.outputs, self.stride = inputs, outputs, stride
        self.before = (outputs - inputs) // 2

    def forward(self, x):
        x = x[:, :, ::self.stride, ::self.stride]
        return functional.pad(x, (0, 0, 0, 0, self.before, self.outputs - self.inputs - self.before))


class CifarBlock(nn.Module):
    """3x3 | 3x3 plus shortcut."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = _norm_conv(inputs, outputs, stride)
        self.conv2, self.bn2 = _norm_conv(outputs, outputs)
        self.shortcut = PadShortcut(inputs, outputs, stride) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x):
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """The 6n + 2 layer network for 32x32 images: widths 16, 32, 64, n = ``blocks`` per stage, option-A shortcuts."""

    input_shape = (3, 32, 32)

    def __init__(self, *, blocks, classes=10):
        super().__init__()
        self.conv1, self.bn1 = _norm_conv(3, 16)
        width = 16
        for stage, outputs in enumerate((16, 32, 64), 1):
            strides = [1 if outputs == width else 2] + [1] * (blocks - 1)
            inputs = [width] + [outputs] * (blocks - 1)
            setattr(self, f"layer{stage}", nn.Sequential(*(CifarBlock(i, outputs, s) for i, s in zip(inputs, strides))))
            width = outputs
        self.linear = nn.Linear(width, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


class BasicBlock(nn.Module):
    """3x3 | 3x3 plus shortcut; where size or width change, the shortcut is a 1x1 convolution (option B)."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = _norm_conv(inputs, outputs, stride)
        self.conv2, self.bn2 = _norm_conv(outputs, outputs)
        self.downsample = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False),
                                            nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet18(nn.Module):
    """Four stages of two `BasicBlock`, of ``width`` to 8 ``width`` channels (64). Parameter names are torchvision's.

    ``small``: for 32x32 images, a 3x3 convolution of stride 1 without max pooling at the start; otherwise the paper's
    (table 1) 7x7 convolution of stride 2 and 3x3 max pooling, for 224x224.
    """

    def __init__(self, *, classes=1000, small=False, width=64):
        super().__init__()
        self.small, self.input_shape = small, (3, 32, 32) if small else (3, 224, 224)
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False) if small else \
            nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        for stage in range(4):
            outputs = width << stage
            first = BasicBlock(inputs, outputs, 2 if stage else 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(first, BasicBlock(outputs, outputs, 1)))
            inputs = outputs
        self.fc = nn.Linear(inputs, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        if not self.small:
            x = functional.max_pool2d(x, 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean(dim=(2, 3)))
