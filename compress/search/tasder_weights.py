"""TASDER-W: chooses a series for every layer so that accuracy stays above a share of the original (no training).

Layer-wise, greedy (arXiv 2403.07953, section 4.2; open points decided here): all (layer, series) pairs sorted by the
share of non-zeros that they drop, a count, are applied in that order; the longest prefix that keeps the accuracy is
found by bisection over its length, then a short linear walk, as accuracy is only nearly monotone. Network-wise: one
series everywhere, exhaustive. Accuracy is judged on a split that is not the reported test set; that is the caller's
duty. The first convolution has few input channels and stays dense unless asked for.
"""
from dataclasses import dataclass

import numpy as np

from compress import cost, methods
from compress.search.series import (GOAL, WALK, candidates, check_goal, longest_prefix, reachable, totals,
                                    weight_rows)
from spec.errors import InputError

#: What becomes of the first convolution.
FIRST = ("dense", "search")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One (layer, series) pair: dropped share of non-zeros, cycles of the layer under it."""

    layer: str
    method: methods.Method
    dropped: float
    cycles: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """Outcome of a search. ``rows``: the table, `series.Row` per layer; ``facts``: plain values for provenance, the
    table among them."""

    recipe: methods.Recipe
    accuracy: float
    rows: list
    facts: dict


def first_convolution(graph):
    """Name of the convolution with a kernel above 1x1 that reads the network's input, or None."""
    return next((n.name for n in graph.convolutions if n.input == graph.input and n.weights.shape[1:3] != (1, 1)), None)


def choices(quantizer, config, *, fixed=(), first="dense"):
    """Pairs worth trying, in the order of the search: dropped share, then density, then layer order.

    Left out: layers in ``fixed``, the first convolution unless ``first`` is ``search``, depthwise layers, layers with
    fewer than M input channels per group (the first convolution excepted if it is searched), and series that do not
    lower the padded cycle count of the layer.
    """
    pairs, graph = [], quantizer.graph
    entry = first_convolution(graph)
    for order, node in enumerate(graph.convolutions):
        if node.name in fixed or node.name == entry and first == "dense":
            continue
        shape = graph.shapes[node.output]
        dense = cost.layer_cycles(node, shape, (), config)
        for method in candidates(config):
            cycles = cost.layer_cycles(node, shape, method.patterns, config)
            if node.name != entry and methods.kept_dense(node, method) or cycles >= dense:
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


def search(quantizer, config, evaluate, *, reference, goal=GOAL, mode="layer", first="dense", fixed=None,
           progress=None):
    """Sparsest recipe whose accuracy is at least ``goal * reference``.

    Args:
        quantizer: `compress.quantize.Quantizer` of the network.
        config: Config whose patterns and padding decide the candidates.
        evaluate: callback Network -> accuracy, on a split that is not the reported one.
        reference: accuracy of the original (float) network on the same split.
        mode: ``layer`` (greedy) or ``network`` (one series for all layers, exhaustive).
        first: ``dense`` or ``search``, what becomes of the first convolution.
        fixed: methods by layer that the search must not touch.
        progress: called with ("search", fraction).
    Returns: Result. Raises: InputError for a bad goal, mode or first, or if the dense int8 network misses the goal.
    """
    check_goal(goal)
    if mode not in ("layer", "network"):
        raise InputError("must be layer or network", field="search", value=mode)
    if first not in FIRST:
        raise InputError("must be dense or search", field="first", value=first)
    fixed, least, seen = dict(fixed or {}), goal * reference, {}
    pairs = choices(quantizer, config, fixed=fixed, first=first)
    planned = max(1, int(np.ceil(np.log2(len(pairs) + 2))) + WALK + 1 if mode == "layer" else len(candidates(config)))

    def score(chosen):
        key = tuple(sorted((n, str(m)) for n, m in chosen.items()))
        if key not in seen:
            seen[key] = evaluate(quantizer.network(_recipe(chosen, fixed)))
            if progress:
                progress("search", min(1.0, len(seen) / planned))
        return seen[key]

    dense = score({})
    reachable(dense, least, goal)
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
    recipe = _recipe(chosen, fixed)
    rows = weight_rows(quantizer.network(recipe), config)
    facts = {"mode": mode, "first": first, "goal": goal, "reference_accuracy": reference, "dense_accuracy": dense,
             "accuracy": score(chosen), "evaluations": len(seen), "pairs": len(pairs),
             "candidates": [str(m) for m in candidates(config)], "config_digest": config.digest,
             "totals": totals(rows), "table": [r.to_dict() for r in rows]}
    return Result(recipe=recipe, accuracy=score(chosen), rows=rows, facts=facts)


def _recipe(chosen, fixed):
    return methods.Recipe(default=methods.parse("dense"), layers=chosen | fixed)
