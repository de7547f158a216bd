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
