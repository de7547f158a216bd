"""Networks as plain PyTorch modules; `build` makes one by name. Parameter names are those of published weights."""
from compress.training import fields
from compress.training.networks import lstm, mlperf_tiny, resnet, transformer, vgg
from compress.training.networks.digits import Digits

#: name -> function(classes) -> module with ``input_shape`` (channels, height, width).
NETWORKS = {
    "digits": lambda classes: Digits(classes=classes),
    "resnet20": lambda classes: resnet.CifarResNet(blocks=3, classes=classes),
    "resnet32": lambda classes: resnet.CifarResNet(blocks=5, classes=classes),
    "resnet56": lambda classes: resnet.CifarResNet(blocks=9, classes=classes),
    "resnet18_cifar": lambda classes: resnet.ResNet18(classes=classes, small=True),
    "resnet18": lambda classes: resnet.ResNet18(classes=classes),
    "vgg16": lambda classes: vgg.VGG16(classes=classes),
    "resnet8": lambda classes: mlperf_tiny.ResNet8(classes=classes),
    "ds_cnn": lambda classes: mlperf_tiny.DSCNN(classes=classes),
    "vit": lambda classes: transformer.VisionTransformer(classes=classes),
    "lstm": lambda classes: lstm.LSTMClassifier(classes=classes),
}


def build(name, classes=10, *, field="network"):
    """A freshly initialised network (PyTorch's own generator decides; seed it first).

    Raises: InputError for an unknown name.
    """
    return NETWORKS[fields.choice(name, field, NETWORKS)](classes)
