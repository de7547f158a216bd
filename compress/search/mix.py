"""``basis-mix``: per layer a basis method, a series or dense, by predicted cycles and a bound on the layer's error.

For each layer the choices are dense, every series that the configuration's structured engine runs (`series.candidates`)
and the basis method, each where its engine exists and the layer allows it. Taken is the one with the fewest array
cycles (`compress.cost`; ties: the smaller error, then dense before series before basis) among those whose output error
on calibration data, ``||(W - W*) X|| / ||W X||`` against the dense int8 layer, is at most the bound. Dense has error 0,
so there always is one. Errors of several layers add up in the network: the accuracy is only measured, not searched for.
"""
from dataclasses import dataclass

from compress import basis as bases
from compress import cost, methods
from compress.network import BasisConvolution
from compress.search.series import candidates
from spec.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One method for one layer: array cycles, and relative output error."""

    method: methods.Method
    cycles: int
    error: float


def choices(quantizer, node, method, config):
    """Every `Choice` for a layer, dense first.

    Dense cycles are those of the structured engine where there is one, else of the basis engine.
    """
    source, shape = (quantizer.graph.shapes[t] for t in (node.input, node.output))
    if config.structured is not None:
        dense = cost.layer_cycles(node, shape, (), config)
    else:
        dense = cost.basis_dense_cycles(node, source, shape, config)
    found = [Choice(method=methods.parse("dense"), cycles=dense, error=0.0)]
    if config.structured is not None:
        for series in candidates(config):
            if not methods.kept_dense(node, series):
                layer = quantizer.layer(node, series)
                found.append(Choice(method=series, cycles=cost.layer_cycles(node, shape, series.patterns, config),
                                    error=layer.metrics["output_error"]))
    if config.basis is not None and not bases.kept_dense(node, source) and cost.basis_runs(node, config):
        layer = quantizer.layer(node, method)
        if isinstance(layer, BasisConvolution):
            cycles = cost.basis_cycles(node, source, shape, layer.coefficients, config)
            found.append(Choice(method=method, cycles=cycles, error=layer.metrics["output_error"]))
    return found


def search(quantizer, config, method, *, fixed=None, progress=None):
    """Recipe of a ``basis-mix`` method.

    Args:
        quantizer: `quantize.Quantizer` made with the same config; config: Config; method: Method, ``basis-mix``.
        fixed: methods by layer that stay. progress: called with ("choose", fraction).
    Returns: (Recipe, facts for the provenance: bound and, per layer, every choice with cycles and error).
    Raises: InputError for a method of another kind.
    """
    if not method.mixed:
        raise InputError("must be basis-mix", field="method", value=str(method))
    own = methods.basis_method(method)
    fixed, bound, chosen, facts = dict(fixed or {}), method.basis.error, {}, {}
    nodes = [n for n in quantizer.graph.convolutions if n.name not in fixed]
    for number, node in enumerate(nodes):
        found = choices(quantizer, node, own, config)
        best = min((c for c in found if c.error <= bound), key=lambda c: (c.cycles, c.error))
        chosen[node.name] = best.method
        facts[node.name] = {"method": str(best.method), "choices": [
            {"method": str(c.method), "cycles": c.cycles, "output_error": c.error} for c in found]}
        if progress:
            progress("choose", (number + 1) / len(nodes))
    recipe = methods.Recipe(default=methods.parse("dense"), layers=chosen | fixed)
    return recipe, {"bound": bound, "layers": facts, "config_digest": config.digest}
