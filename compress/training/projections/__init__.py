"""Projections by the name that recipes use; one module for each format. Nothing here needs PyTorch."""
from compress.training import fields

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
    return fields.build(options, PROJECTIONS, __name__, field=field)
