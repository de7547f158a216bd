"""The techniques by the name that recipes use; each module says what its own compute and where they come from."""
from difflib import get_close_matches
from importlib import import_module

from compress.training.fields import construct
from spec.errors import InputError

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
    if not isinstance(options, dict) or "kind" not in options:
        raise InputError("must be a mapping with kind", field=field, value=options)
    kind = options["kind"]
    if kind not in tuple(TECHNIQUES):                           # a list or mapping cannot be looked up in a dict
        near = get_close_matches(str(kind), TECHNIQUES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"must be one of {', '.join(TECHNIQUES)}{hint}", field=f"{field}.kind", value=kind)
    module, name = TECHNIQUES[kind]
    cls = getattr(import_module(f"compress.training.techniques.{module}"), name)
    return construct(cls, {k: v for k, v in options.items() if k != "kind"}, field=field)
