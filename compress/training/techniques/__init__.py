"""The techniques by the name that recipes use; each module says what its own compute and where they come from."""
from compress.training import fields

#: recipe name -> (module, class).
TECHNIQUES = {
    "admm": ("admm", "ADMM"),
    "factorize": ("factorize", "Factorize"),
    "basis": ("basis", "Basis"),
    "ternary": ("ternary", "Ternary"),
    "shrink": ("shrink", "Shrink"),
    "sr_ste": ("sr_ste", "SRSTE"),
    "prune": ("prune", "Prune"),
    "hoyer": ("hoyer", "Hoyer"),
    "reweighted": ("reweighted", "Reweighted"),
    "svd_training": ("svd_training", "SVDTraining"),
    "lines": ("lines", "Lines"),
    "collaborative": ("collaborative", "Collaborative"),
    "constant_fan_in": ("constant_fan_in", "ConstantFanIn"),
}


def build(options, *, field="technique"):
    """Technique of a recipe's mapping ``{kind: name, option: value, …}``. Raises: InputError."""
    return fields.build(options, TECHNIQUES, __name__, field=field)
