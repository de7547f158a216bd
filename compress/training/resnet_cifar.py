"""CIFAR ResNets (20, 32, 44, 56, 110 layers) from a published state dict to ONNX.

``python -m compress.training.resnet_cifar resnet20-12fca82f.th --out resnet20.onnx`` reads weights with the keys of He
et al.'s CIFAR networks (``conv1``, ``bn1``, ``layer1.0.conv1`` …, ``linear``; a prefix ``module.`` is dropped) without
running any code from the file (``weights_only=True``). The parameter-free shortcut (option A: every second pixel,
channels padded with zeros on both sides) becomes a 1x1 convolution of stride 2 with an identity in the middle, which is
the same function.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
"""
import argparse
from pathlib import Path
import pickle       # for its exception alone
import re
import zipfile

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
import torch

from spec.errors import InputError

#: What `torch.load` raises for files that are not what they should be.
DAMAGED = (OSError, RuntimeError, ValueError, EOFError, KeyError, AttributeError, pickle.UnpicklingError,
           zipfile.BadZipFile)
#: Channels of the three stages.
WIDTHS = (16, 32, 64)


def load_state(path):
    """{name: float32 array} of a state dict file. Raises InputError for anything else."""
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise InputError(f"must be a PyTorch state dict ({type(error).__name__})", source=path) from error
    raw = raw.get("state_dict", raw) if isinstance(raw, dict) else {}
    state = {name.removeprefix("module."): value.numpy() for name, value in raw.items()
             if isinstance(value, torch.Tensor)}
    if "conv1.weight" not in state or "linear.weight" not in state:
        raise InputError("must hold a CIFAR ResNet (conv1 … linear)", source=path)
    return state


def blocks_of(state):
    """[(stage, number)] in order."""
    found = {(int(m[1]), int(m[2])) for name in state if (m := re.match(r"layer([1-3])\.(\d+)\.conv1\.weight", name))}
    return sorted(found)


def to_onnx(state, name):
    """ONNX model of a state dict: image [N, 3, 32, 32], normalised as in training, to logits [N, classes]."""
    nodes, weights = [], []

    def constant(key, array):
        weights.append(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), key))
        return key

    def node(operator, key, *inputs, **attributes):
        nodes.append(helper.make_node(operator, inputs, [key], name=key, **attributes))
        return key

    def convolution(key, x, norm, *, stride=1):
        x = node("Conv", key, x, constant(f"{key}.weight", state[f"{key}.weight"]), kernel_shape=[3, 3],
                 strides=[stride] * 2, pads=[1] * 4)
        parts = (constant(f"{norm}.{p}", state[f"{norm}.{p}"])
                 for p in ("weight", "bias", "running_mean", "running_var"))
        return node("BatchNormalization", norm, x, *parts, epsilon=1e-5)

    x = node("Relu", "relu1", convolution("conv1", "image", "bn1"))
    for stage, number in blocks_of(state):
        prefix, width = f"layer{stage}.{number}", WIDTHS[stage - 1]
        inputs = state[f"{prefix}.conv1.weight"].shape[1]
        stride = 1 if inputs == width else 2
        y = node("Relu", f"{prefix}.relu1", convolution(f"{prefix}.conv1", x, f"{prefix}.bn1", stride=stride))
        y = convolution(f"{prefix}.conv2", y, f"{prefix}.bn2")
        if stride == 2:
            pick = np.zeros((width, inputs, 1, 1), np.float32)
            pick[np.arange(inputs) + (width - inputs) // 2, np.arange(inputs)] = 1
            x = node("Conv", f"{prefix}.shortcut", x, constant(f"{prefix}.shortcut.weight", pick), kernel_shape=[1, 1],
                     strides=[2, 2])
        x = node("Relu", f"{prefix}.relu2", node("Add", f"{prefix}.add", y, x))
    x = node("Flatten", "flatten", node("GlobalAveragePool", "average", x), axis=1)
    node("Gemm", "linear", x, constant("linear.weight", state["linear.weight"]),
         constant("linear.bias", state["linear.bias"]), transB=1)
    nodes[-1].output[0] = "logits"
    classes = len(state["linear.bias"])
    graph = helper.make_graph(
        nodes, name, [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8,
                              producer_name="summand compress.training.resnet_cifar")
    onnx.checker.check_model(model, full_check=True)
    return model


def main(arguments=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("state", type=Path, help="state dict file (.th, .pt)")
    parser.add_argument("--out", type=Path, required=True, help="ONNX file to write")
    options = parser.parse_args(arguments)
    try:
        model = to_onnx(load_state(options.state), options.state.stem)
        options.out.write_bytes(model.SerializeToString())
    except (InputError, OSError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
