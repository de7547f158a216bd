"""Weights from files into a network: PyTorch state dicts, safetensors, ONNX initialisers. No code in a file is run.

======================  ============================================================================================
suffix                  contents
======================  ============================================================================================
.th .pt .pth            state dict, also nested under ``state_dict``; read with ``weights_only=True``
.safetensors            tensors by name
.onnx                   initialisers by name, as `compress.training.export` writes them
======================  ============================================================================================

A prefix ``module.`` is dropped (nn.DataParallel wrote it). Every tensor of the network must be there with its shape, no
other may be; only ``num_batches_tracked`` may be missing, which does not change what a network computes.
"""
from pathlib import Path
import pickle       # for its exception alone
import struct
import warnings
import zipfile

from google.protobuf.message import DecodeError
import onnx
from onnx import TensorProto, numpy_helper
import safetensors
import safetensors.torch
import torch

from compress.training.networks.resnet import PadShortcut
from spec.errors import InputError
from spec.strict_yaml import read_regular_file

MAX_FILE_BYTES = 2 << 30
#: What the readers raise for files that are not what they should be.
DAMAGED = (OSError, RuntimeError, ValueError, TypeError, EOFError, KeyError, IndexError, AttributeError, OverflowError,
            MemoryError, AssertionError, ImportError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile,
            safetensors.SafetensorError, DecodeError)


def load(model, path):
    """Fill ``model`` with the weights of a file.

    Returns: the model. Raises: InputError naming file and tensor, for damaged files, missing, additional and mis-shaped
    tensors, wrong types, NaN and infinity; the model is then unchanged.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise InputError(f"must end in {', '.join(READERS)}", source=path)
    try:
        _check(found := READERS[path.suffix](path, model), model)
    except InputError as error:
        raise error.within(path) from None
    model.load_state_dict(found, strict=False)
    return model


def _check(found, model):
    """``found`` is what ``model`` needs, no more, no less."""
    wanted = model.state_dict()
    for name, own in wanted.items():
        if name not in found:
            if name.endswith("num_batches_tracked"):
                continue
            near = next((key for key in found if key not in wanted), None)
            raise InputError("must be there" + (f" (but {near!r} is, which does not belong)" if near else ""),
                             field=f"tensor {name!r}")
        value, field = found[name], f"tensor {name!r}"
        if tuple(value.shape) != tuple(own.shape):
            raise InputError(f"must have shape {list(own.shape)}", field=field, value=list(value.shape))
        if value.layout != torch.strided or value.is_quantized or \
                value.is_floating_point() != own.is_floating_point() or value.is_complex():
            kind = "floating-point" if own.is_floating_point() else "integer"
            raise InputError(f"must be a dense {kind} tensor", field=field, value=f"{value.dtype}, {value.layout}")
        if not torch.isfinite(value.to(own.dtype)).all():
            raise InputError("must be finite (NaN or infinity found)", field=field)
    for name in found:
        if name not in wanted:
            raise InputError("does not belong to this network", field=f"tensor {name!r}")


def _size(path):
    """Checks that ``path`` is a regular file of bounded size."""
    try:
        regular, size = path.is_file(), path.stat().st_size
    except OSError as error:
        raise InputError(f"must be readable ({error.strerror})") from None
    if not regular or size > MAX_FILE_BYTES:
        raise InputError(f"must be a regular file of at most {MAX_FILE_BYTES} bytes")


def _plain(state):
    """Tensors of a state dict without the prefix ``module.``."""
    found = {}
    for name, value in state.items():
        name = str(name).removeprefix("module.")
        if not isinstance(value, torch.Tensor):
            raise InputError("must be a tensor", field=f"tensor {name!r}", value=type(value).__name__)
        if name in found:
            raise InputError("must be there once", field=f"tensor {name!r}")
        found[name] = value.detach()
    return found


def _state_dict(path, model):
    _size(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                      # advice on old formats
            raw = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise InputError(f"must be a PyTorch state dict ({type(error).__name__})") from None
    if isinstance(raw, dict) and isinstance(raw.get("state_dict"), dict):
        raw = raw["state_dict"]
    if not isinstance(raw, dict):
        raise InputError("must be a PyTorch state dict", value=type(raw).__name__)
    return _plain(raw)


def _safetensors(path, model):
    _size(path)
    try:
        return _plain(safetensors.torch.load_file(path))
    except DAMAGED as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"must be an undamaged safetensors file ({type(error).__name__})") from None


def _onnx(path, model):
    """Initialisers of floating type; those that stand for option-A shortcuts are no parameters."""
    data, proto = read_regular_file(path, max_bytes=MAX_FILE_BYTES), onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DAMAGED as error:
        raise InputError(f"must be an ONNX model ({type(error).__name__})") from None
    wanted = model.state_dict()
    fixed = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, PadShortcut)}
    found = {}
    for tensor in proto.graph.initializer:
        field = f"tensor {tensor.name[:64]!r}"
        if tensor.name in fixed or tensor.data_type not in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16):
            continue
        if tensor.name not in wanted:
            raise InputError("does not belong to this network", field=field)
        if tensor.name in found:
            raise InputError("must be there once", field=field)
        if list(tensor.dims) != list(wanted[tensor.name].shape):       # before anything of this size is allocated
            raise InputError(f"must have shape {list(wanted[tensor.name].shape)}", field=field, value=list(tensor.dims))
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise InputError("must lie inside the file", field=field)
        try:
            found[tensor.name] = torch.from_numpy(numpy_helper.to_array(tensor).copy())
        except DAMAGED as error:
            raise InputError(f"must hold the elements of its shape ({type(error).__name__})", field=field) from None
    return found


#: suffix -> function(path, model) -> {name: tensor}.
READERS = {".th": _state_dict, ".pt": _state_dict, ".pth": _state_dict, ".safetensors": _safetensors, ".onnx": _onnx}
