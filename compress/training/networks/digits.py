"""A small residual network for 8x8 images: seconds of training, all kinds of layers that matter."""
from torch import nn
from torch.nn import functional


class Digits(nn.Module):
    """1x8x8 -> conv 32 -> residual block 32 -> conv 64 stride 2 -> max pool -> global average -> classes.

    Most multiplications lie in the block at full size, as they lie in the large maps of larger networks.
    """

    input_shape = (1, 8, 8)

    def __init__(self, *, classes=10):
        super().__init__()
        for name, inputs, outputs, stride in (("conv1", 1, 32, 1), ("block_a", 32, 32, 1), ("block_b", 32, 32, 1),
                                              ("conv2", 32, 64, 2)):
            setattr(self, name, nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False))
            setattr(self, f"{name}_bn", nn.BatchNorm2d(outputs))
        self.fc = nn.Linear(64, classes)

    def forward(self, x):
        x = functional.relu(self.conv1_bn(self.conv1(x)))
        y = functional.relu(self.block_a_bn(self.block_a(x)))
        x = functional.relu(self.block_b_bn(self.block_b(y)) + x)
        x = functional.max_pool2d(functional.relu(self.conv2_bn(self.conv2(x))), 2)
        return self.fc(x.mean(dim=(2, 3)))
