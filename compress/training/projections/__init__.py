"""Projections by the name that recipes use; one module for each format. Nothing here needs PyTorch."""
from difflib import get_close_matches
from importlib import import_module

from compress.training.fields import construct
from spec.errors import InputError

#: recipe name -> (module, class).
PROJECTIONS = {
    "tensor_train": ("tensor_train", "TensorTrain"),
    "tucker": ("tucker", "Tucker"),
    "svd": ("svd", "SVD"),
    "nm": ("nm", "NM"),
    "pattern": ("pattern", "KernelPattern"),
    "channel": ("channel", "Channel"),
    "diagonal": ("diagonal", "Diagonal"),
    "unified": ("unified", "Unified"),
    "basis": ("basis", "Basis"),
}


def build(options, *, field="projection"):
    """Projection of a recipe's mapping ``{kind: name, option: value, …}``. Raises: InputError."""
    if not isinstance(options, dict) or "kind" not in options:
        raise InputError("must be a mapping with kind", field=field, value=options)
    kind = options["kind"]
    if kind not in tuple(PROJECTIONS):                           # a list or mapping cannot be looked up in a dict
        near = get_close_matches(str(kind), PROJECTIONS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"must be one of {', '.join(PROJECTIONS)}{hint}", field=f"{field}.kind", value=kind)
    module, name = PROJECTIONS[kind]
    cls = getattr(import_module(f"compress.training.projections.{module}"), name)
    return construct(cls, {k: v for k, v in options.items() if k != "kind"}, field=field)
