"""VGG-16 for 32x32 images.

Source: Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015, table 1 D,
with batch normalisation and one classifier layer in place of three, the usual form on CIFAR (Li et al., "Pruning
Filters for Efficient ConvNets", ICLR 2017, section 4.1).
"""
from torch import nn

#: Output channels of the 13 convolutions; 0 is 2x2 max pooling.
LAYERS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


class VGG16(nn.Module):
    """13 convolutions 3x3 in ``features`` (numbered as in torchvision's ``vgg16_bn``), then ``classifier``.

    ``width`` scales all channels, for small trials.
    """

    input_shape = (3, 32, 32)

    def __init__(self, *, classes=10, width=1.0):
        super().__init__()
        layers, inputs = [], 3
        for channels in LAYERS:
            if not channels:
                layers.append(nn.MaxPool2d(2))
                continue
            outputs = max(1, round(width * channels))
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(m.bias)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))
