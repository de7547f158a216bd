"""Values of a recipe: YAML scalars arrive as text (`spec.strict_yaml`), Python callers pass numbers; both are checked.

Each function returns the value in its type or raises InputError naming field, rule and value.
"""
from difflib import get_close_matches
from importlib import import_module
import inspect
import math
from pathlib import Path

from spec.errors import InputError


def number(value, field, *, low=-math.inf, high=math.inf, above=None, below=None):
    """A finite float in ``low..high``; ``above`` and ``below`` exclude their limit."""
    try:
        odd = isinstance(value, bool) or isinstance(value, str) and ("_" in value or not value.isascii())
        result = math.nan if odd else float(value)               # float() takes 1_0 and digits of other scripts
    except (TypeError, ValueError):
        result = math.nan
    limits = (("at least", low if low > -math.inf else None), ("above", above),
              ("at most", high if high < math.inf else None), ("below", below))
    rules = [f"{word} {limit:g}" for word, limit in limits if limit is not None]
    if not (math.isfinite(result) and low <= result <= high and (above is None or result > above)
            and (below is None or result < below)):
        raise InputError(f"must be a number{' ' if rules else ''}{', '.join(rules)}", field=field, value=value)
    return result


def whole(value, field, *, low=0, high=1 << 31):
    """An int in ``low..high``."""
    text = str(value).strip()
    digits = text.removeprefix("-")
    if isinstance(value, (bool, float)) or not digits.isdecimal() or not text.isascii() or len(text) > 20 or \
            not low <= int(text) <= high:
        raise InputError(f"must be a whole number in {low}..{high}", field=field, value=value)
    return int(text)


def flag(value, field):
    """A bool: true or false."""
    if isinstance(value, bool):
        return value
    if str(value) not in ("true", "false"):
        raise InputError("must be true or false", field=field, value=value)
    return value == "true"


def choice(value, field, known):
    """One of the words ``known``."""
    if value not in tuple(known):                            # a list or mapping cannot be looked up in a dict
        near = get_close_matches(str(value), known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"must be one of {', '.join(known)}{hint}", field=field, value=value)
    return value


def path(value, field):
    """The name of a file or folder, as text."""
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        raise InputError("must be a path", field=field, value=value)
    return str(value)


def wholes(value, field, *, low=0, high=1 << 31, length=None):
    """A tuple of ints, each in ``low..high``."""
    if not isinstance(value, (list, tuple)) or length is not None and len(value) != length:
        count = "" if length is None else f"{length} "
        raise InputError(f"must be a list of {count}whole numbers", field=field, value=value)
    return tuple(whole(v, f"{field}[{n}]", low=low, high=high) for n, v in enumerate(value))


def construct(cls, options, *, field=""):
    """``cls(**options)`` with the keys checked against its keyword arguments; ``field``: where the options stand.

    Raises: InputError for a key that is not one of them, or one without default that is missing.
    """
    known = {n: p for n, p in inspect.signature(cls.__init__).parameters.items() if p.kind is p.KEYWORD_ONLY}
    try:
        for key in options:
            if key not in known:
                near = get_close_matches(str(key), known, n=1)
                hint = f" (did you mean {near[0]}?)" if near else f"; known: {', '.join(known) or 'none'}"
                raise InputError(f"is not a known field{hint}", field=key)
        for key, parameter in known.items():
            if parameter.default is parameter.empty and key not in options:
                raise InputError("must be given", field=key)
        return cls(**options)
    except InputError as error:
        raise (error.inside(field) if field else error) from None


def build(options, known, package, *, field):
    """Object of a mapping ``{kind: name, option: value, …}``.

    Args: known: {name: (module in ``package``, class)}; the module is imported when it is asked for.
    Raises: InputError for another kind, and as `construct`.
    """
    if not isinstance(options, dict) or "kind" not in options:
        raise InputError("must be a mapping with kind", field=field, value=options)
    module, name = known[choice(options["kind"], f"{field}.kind", known)]
    cls = getattr(import_module(f"{package}.{module}"), name)
    return construct(cls, {k: v for k, v in options.items() if k != "kind"}, field=field)
