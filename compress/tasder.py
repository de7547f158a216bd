"""TASDER-W: chooses a series for every layer so that accuracy stays above a share of the original (no training).

Layer-wise, greedy (arXiv 2403.07953; open points decided here): all (layer, series) pairs sorted by the share of
non-zeros that they drop are applied in that order; the longest prefix that keeps the accuracy is found by bisection
over its length, then a short linear walk, as accuracy is only nearly monotone. Network-wise: one series everywhere,
exhaustive. Accuracy is judged on a split that is not the reported test set; that is the caller's duty.
"""
from dataclasses import dataclass

import numpy as np

from compress import cost, methods
from spec.config import Pattern
from spec.errors import InputError

#: Share of the original accuracy that must remain (the MLPerf rule).
GOAL = 0.99
#: Prefix lengths looked at one by one beyond the one that bisection found.
WALK = 4


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One (layer, series) pair: dropped share of non-zeros, cycles of the layer under it."""

    layer: str
    method: methods.Method
    dropped: float
    cycles: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """Outcome of a search. ``facts`` are plain values for provenance."""

    recipe: methods.Recipe
    accuracy: float
    facts: dict


def candidates(config):
    """Series that a configuration can run, densest last: every total N < M that is a sum of supported N, with the
    fewest terms, at most ``config.structured.terms`` of them (same-M terms equal the view of their sum)."""
    array = config.structured
    if array is None:
        raise InputError("must be there for a search of series", field="structured", value="none")
    found = []
    for total in range(1, array.block):
        chosen = cost.parts(total, [p.n for p in array.patterns if p.n < array.block])
        if chosen and len(chosen) <= array.terms:
            found.append(methods.series([Pattern(n, array.block) for n in chosen]))
    return tuple(found)


def choices(quantizer, config, *, fixed=()):
    """Pairs worth trying, in the order of section 5: dropped share, then density, then layer order.

    Left out: layers in ``fixed``, depthwise layers, layers with fewer than M input channels per group (the first layer
    of most networks), and series that do not lower the padded cycle count of the layer.
    """
    pairs = []
    for order, node in enumerate(quantizer.graph.convolutions):
        if node.name in fixed:
            continue
        shape = quantizer.graph.shapes[node.output]
        dense = cost.layer_cycles(node, shape, (), config)
        for method in candidates(config):
            cycles = cost.layer_cycles(node, shape, method.patterns, config)
            if methods.kept_dense(node, method) or cycles >= dense:
                continue
            dropped = quantizer.layer(node, method).metrics["dropped_nonzeros"]
            pairs.append((dropped, method.density, order,
                          Choice(layer=node.name, method=method, dropped=dropped, cycles=cycles)))
    return tuple(p[-1] for p in sorted(pairs, key=lambda p: p[:3]))


def assignment(pairs, length):
    """Methods by layer after the first ``length`` pairs: a later pair replaces an earlier one only if it is sparser."""
    chosen = {}
    for pair in pairs[:length]:
        if pair.layer not in chosen or pair.method.density < chosen[pair.layer].density:
            chosen[pair.layer] = pair.method
    return chosen


def longest_prefix(count, good, *, walk=WALK):
    """Longest good prefix length in 0..count by bisection, then a linear walk over up to ``walk`` longer ones.

    Args: good: callback on a length; 0 counts as good without asking.
    Returns: the largest length that was seen to be good.

    >>> longest_prefix(10, lambda n: n <= 6)
    6
    """
    low, high = 0, count + 1                              # low is good, high is bad (or past the end)
    while high - low > 1:
        middle = (low + high) // 2
        if good(middle):
            low = middle
        else:
            high = middle
    best = low
    for length in range(low + 1, min(count, low + walk) + 1):   # a bad neighbour need not be the end
        if good(length):
            best = length
    return best


def search(quantizer, config, evaluate, *, reference, goal=GOAL, mode="layer", fixed=None, progress=None):
    """Sparsest recipe whose accuracy is at least ``goal * reference``.

    Args:
        quantizer: `compress.quantize.Quantizer` of the network.
        config: Config whose patterns and padding decide the candidates.
        evaluate: callback Network -> accuracy, on a split that is not the reported one.
        reference: accuracy of the original (float) network on the same split.
        mode: ``layer`` (greedy) or ``network`` (one series for all layers, exhaustive).
        fixed: methods by layer that the search must not touch.
        progress: called with ("search", fraction).
    Returns: Result. Raises: InputError for a bad goal or mode, or if the dense int8 network misses the goal already.
    """
    if not isinstance(goal, (int, float)) or not 0 < goal <= 1:
        raise InputError("must be above 0 and at most 1", field="goal", value=goal)
    if mode not in ("layer", "network"):
        raise InputError("must be layer or network", field="search", value=mode)
    fixed, least, seen = dict(fixed or {}), goal * reference, {}
    pairs = choices(quantizer, config, fixed=fixed)
    planned = max(1, int(np.ceil(np.log2(len(pairs) + 2))) + WALK + 1 if mode == "layer" else len(candidates(config)))

    def score(chosen):
        key = tuple(sorted((n, str(m)) for n, m in chosen.items()))
        if key not in seen:
            seen[key] = evaluate(quantizer.network(_recipe(chosen, fixed)))
            if progress:
                progress("search", min(1.0, len(seen) / planned))
        return seen[key]

    dense = score({})
    if dense < least:
        raise InputError(f"must be reachable: the dense int8 network has {dense:.4f}, needed are {least:.4f}",
                         field="goal", value=goal)
    if mode == "layer":
        length = longest_prefix(len(pairs), lambda n: score(assignment(pairs, n)) >= least)
        chosen = assignment(pairs, length)
    else:
        chosen = {}
        for method in candidates(config):                 # sparsest first
            trial = {p.layer: p.method for p in pairs if p.method == method}
            if trial and score(trial) >= least:
                chosen = trial
                break
    facts = {"mode": mode, "goal": goal, "reference_accuracy": reference, "dense_accuracy": dense,
             "accuracy": score(chosen), "evaluations": len(seen), "pairs": len(pairs),
             "candidates": [str(m) for m in candidates(config)], "config_digest": config.digest}
    return Result(recipe=_recipe(chosen, fixed), accuracy=score(chosen), facts=facts)


def _recipe(chosen, fixed):
    return methods.Recipe(default=methods.parse("dense"), layers=chosen | fixed)
