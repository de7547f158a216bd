"""Method strings, and what a method does to one layer's quantised weights.

`dense`, `nm:2:4`, `tasd:4:8+1:8` (any number of terms, mixed M), `basis:6@0.1` and the like (ternary coefficients, see
`compress.basis`), and two that are searched, `tasder` (`compress.search.tasder_weights`) and `basis-mix`
(`compress.search.mix`). Views are taken along the input channels of one kernel tap, chosen by the magnitude of the
float weight; ties take the lowest channel. Within an output channel all weights share one scale, so this is also the
order of the int8 magnitudes.
"""
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

import numpy as np

from compress import basis as bases
from compress.network import Term
from golden import structured
from spec import strict_yaml
from spec.config import Pattern
from spec.errors import InputError

MAX_TERMS = 8
#: Pattern of a dense term: every element is its own block, so it fits every configuration.
DENSE = Pattern(1, 1)


@dataclass(frozen=True)
class Method:
    """One parsed method. ``patterns`` is empty for ``dense``, ``tasder`` and basis methods, which have ``basis``."""

    text: str
    patterns: tuple[Pattern, ...] = ()
    basis: bases.BasisMethod | None = None

    @property
    def searched(self):
        """Whether `compress.search.tasder_weights` or `compress.search.mix` has to choose."""
        return self.text == "tasder" or self.mixed

    @property
    def mixed(self):
        """Whether it is ``basis-mix``."""
        return self.basis is not None and self.basis.error is not None

    @property
    def block(self):
        """Largest M of the patterns; 1 for dense."""
        return max((p.m for p in self.patterns), default=1)

    @property
    def density(self):
        """sum N/M over the terms: the fraction of dense multiplications that remains (1 for dense)."""
        return sum(p.density for p in self.patterns) if self.patterns else 1.0

    def __str__(self):
        return self.text


def parse(text, *, field="method"):
    """Method of a string. Raises: InputError for an unknown method or a bad pattern.

    >>> parse("tasd:4:8+1:8").density
    0.625
    """
    text = str(text).strip()
    if (basis := bases.parse(text, field=field)) is not None:
        return Method(str(basis), basis=basis)
    kind, _, rest = text.partition(":")
    if text == "tasder-a":
        raise InputError("tasder-a makes no package, as no engine runs series of activations yet; `summand search "
                         "--operand activations` reports what it would give", field=field)
    if text in ("dense", "tasder"):
        return Method(text)
    if kind not in ("nm", "tasd") or not rest:
        near = get_close_matches(kind, ("dense", "nm", "tasd", "tasder", "svd", "tucker", "tt", *bases.KINDS), n=1)
        hint = f" (did you mean {near[0]}?)" if near and near[0] != kind else ""
        raise InputError("must be dense, nm:N:M, tasd:N:M+N:M…, tasder, svd:F, tucker:F, tt:F, basis:M or "
                         f"basis-mix{hint}", field=field, value=text)
    patterns = tuple(Pattern.parse(p, field=field) for p in rest.split("+"))
    if kind == "nm" and len(patterns) != 1:
        raise InputError("nm must have one pattern; a sum is written tasd:N:M+N:M", field=field, value=text)
    if len(patterns) > MAX_TERMS:
        raise InputError(f"must have at most {MAX_TERMS} terms", field=field, value=text)
    return Method(f"{kind}:{'+'.join(map(str, patterns))}", patterns)


def basis_method(mixed):
    """The basis method among whose layers ``basis-mix`` chooses."""
    basis = replace(mixed.basis, error=None)
    return Method(str(basis), basis=basis)


def series(patterns):
    """Method of a list of patterns: ``nm`` for one, ``tasd`` for more, ``dense`` for none."""
    patterns = tuple(Pattern(*p) for p in patterns)
    if not patterns:
        return Method("dense")
    return parse(f"{'nm' if len(patterns) == 1 else 'tasd'}:{'+'.join(map(str, patterns))}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A default method and exceptions by layer name. A layer named here gets its method even where the default would
    leave it dense (depthwise layers, fewer input channels than M)."""

    default: Method
    layers: dict[str, Method] = field(default_factory=dict)

    def method(self, name):
        """(method, whether it was asked for by name) of a layer."""
        return (self.layers[name], True) if name in self.layers else (self.default, False)

    def check(self, names):
        """Raises InputError if an exception names no layer of ``names``."""
        for name in self.layers:
            if name not in names:
                near = get_close_matches(name, names, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise InputError(f"is not a layer with weights{hint}; layers: {', '.join(names)}",
                                 field=f"layers.{name}")

    def to_dict(self):
        """Plain values for provenance."""
        return {"method": str(self.default), "layers": {n: str(m) for n, m in self.layers.items()}}


def from_tree(tree):
    """Recipe of plain values: ``{"method": text}`` and, optionally, ``"layers": {name: text, …}``.

    Raises: InputError naming the field.
    """
    for key in tree:
        if key not in ("method", "layers"):
            raise InputError("is not a known field; known: layers, method", field=key)
    layers = tree.get("layers", {})
    if not isinstance(layers, dict):
        raise InputError("must be a mapping of layer names to methods", field="layers", value=layers)
    for name, text in layers.items():
        method = parse(_text(text, f"layers.{name}"), field=f"layers.{name}")
        if method.searched:
            kind = "basis-mix" if method.mixed else "tasder"
            raise InputError(f"must not be {kind}: the search covers the whole network", field=f"layers.{name}")
    if "method" not in tree:
        raise InputError("must be given", field="method")
    return Recipe(default=parse(_text(tree["method"], "method")), layers={n: parse(t) for n, t in layers.items()})


def load_recipe(path):
    """Recipe from a YAML file, see `from_tree`. Raises: InputError naming file and field."""
    tree = strict_yaml.load(path)
    try:
        return from_tree(tree)
    except InputError as error:
        raise error.within(path) from None


def _text(value, where):
    if not isinstance(value, str):
        raise InputError("must be a method, as text", field=where, value=value)
    return value


def recipe(method):
    """Recipe of a method string, a Method, a Recipe, or the path of a recipe file (.yaml, .yml)."""
    if isinstance(method, Recipe):
        return method
    if isinstance(method, Method):
        return Recipe(default=method)
    if str(method).endswith((".yaml", ".yml")):
        return load_recipe(method)
    return Recipe(default=parse(method))


def kept_dense(node, method):
    """Why a layer stays dense under a default ``method``, or None: depthwise, or fewer input channels than M."""
    if not method.patterns:
        return None
    if node.depthwise:
        return "depthwise"
    if node.weights.shape[3] < method.block:
        return f"{node.weights.shape[3]} input channels, fewer than M = {method.block}"
    return None


def decompose(values, magnitudes, method):
    """Terms of quantised weights.

    Args:
        values: int8 [K, R, S, C]; magnitudes: float array of the same shape that orders them (normally the weights).
    Returns: tuple of Term whose values sum to ``values`` wherever a term keeps them, each element in one term at most.
    """
    if not method.patterns:
        return (Term(pattern=DENSE, values=values),)
    chosen, _ = structured.tasd_series(np.abs(magnitudes), method.patterns)
    return tuple(Term(pattern=p, values=np.where(c != 0, values, 0).astype(np.int8))
                 for p, c in zip(method.patterns, chosen))


def weight_bits(terms):
    """Storage of a series without padding to tiles: per slot 8 value bits and, unless dense, log2(M) index bits."""
    total = 0
    for t in terms:
        outputs, rows, columns, depth = t.values.shape
        if t.dense:
            total += 8 * t.values.size
        else:
            slots = -(-depth // t.pattern.m) * t.pattern.n * outputs * rows * columns
            total += slots * (8 + (t.pattern.m - 1).bit_length())
    return total


def weight_metrics(values, scale, terms):
    """Figures of a decomposition that need no data (plain numbers).

    dropped_nonzeros: share of the non-zero int8 weights in no term; dropped_magnitude: share of sum |scale * w|;
    density: kept non-zeros / elements; pattern_density: sum N/M; bits: see `weight_bits`.
    """
    kept = sum(t.values.astype(np.int32) for t in terms)
    magnitude = np.abs(values.astype(np.float64)) * scale[:, None, None, None]
    lost = np.abs(values.astype(np.float64) - kept) * scale[:, None, None, None]
    nonzeros = int(np.count_nonzero(values))
    return {
        "nonzeros": int(np.count_nonzero(kept)),
        "dropped_nonzeros": (nonzeros - int(np.count_nonzero(kept))) / max(1, nonzeros),
        "dropped_magnitude": float(lost.sum() / magnitude.sum()) if nonzeros else 0.0,
        "density": int(np.count_nonzero(kept)) / values.size,
        "pattern_density": float(sum(t.pattern.density for t in terms)),
        "bits": weight_bits(terms),
        "dense_bits": 8 * values.size,
    }
