"""TASDER-A: chooses a series for the input of every convolution from the sparsity of its activations (no training).

Calibration measures S(l), the share of zeros in the input of layer l, per image. Where no ReLU made the tensor its
pseudo-sparsity counts instead, ``1 - pseudo_density``. One global alpha decides: layer l takes the sparsest series
whose approximated sparsity H_j = 1 - sum N/M lies below ``S(l) + alpha`` (strictly); dense, H = 0, where none does.
Alpha is the largest of a grid whose accuracy passes. Weights stay dense: a workload skips on one operand only.

Integers: the series is taken of ``q - zero_point``, as that is proportional to the real value, and what it drops
becomes the zero point. The magnitude |q - zero_point| is at most 255, unsigned 8 bits: q + 128 for a ReLU tensor (zero
point -128), 128 for q = -128 at zero point 0. Blocks run along the channels of one pixel, ties take the lowest.

No engine takes series of activations at run time yet, so the outcome is a report, not a package: choices, accuracy in
golden integers, cycles of a model (`compress.cost.activation_cycles`).

Source: arXiv 2403.07953, section 4.3; grid, strictness at rounding, mean over images and pseudo-density's share are
decided here.
"""
from dataclasses import asdict, dataclass

import numpy as np

from compress import cost, engine, methods
from compress import graph as graphs
from compress.search.series import (GOAL, Row, candidates, check_goal, layer_macs, longest_prefix, reachable, totals)
from golden.structured import pseudo_density, series_view

#: Values of alpha, from the least to the largest.
ALPHAS = tuple(n / 100 for n in range(-10, 31))
#: Share of the magnitudes that pseudo-density keeps.
SHARE = 0.99
#: S + alpha closer to H_j than this counts as equal.
_ROUNDING = 1e-9
#: Images on which dropped shares and output errors are measured.
_IMAGES = 32


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """S(l) of one tensor over the calibration images: mean, least, 1st percentile. ``pseudo``: by pseudo-density."""

    mean: float
    least: float
    percentile_1: float
    pseudo: bool


@dataclass(frozen=True, kw_only=True)
class Result:
    """Outcome of a search. ``chosen``: series by layer, dense layers left out; ``alpha``: None if no alpha passed;
    ``rows``: the table, `series.Row` per layer; ``facts``: plain values, the table among them."""

    chosen: dict
    alpha: float | None
    accuracy: float
    rows: list
    facts: dict


def rectified(graph, tensor):
    """Whether a ReLU (or another clamp at or above 0) made a tensor, or a max pooling of one."""
    node = graph.producer(tensor)
    if node is None:
        return False
    if node.low is not None and node.low >= 0:
        return True
    return isinstance(node, graphs.Pool) and node.kind == "max" and rectified(graph, node.input)


def calibrate(graph, network, x, *, batch=64, progress=None):
    """`Sparsity` of every tensor that a convolution reads, in golden integers.

    Args: graph: the float graph of ``network``, a dense integer Network; x: float [N, H, W, C]; progress: called with a
    fraction. A zero is an element equal to the zero point.
    """
    read = {n.input: rectified(graph, n.input) for n in graph.convolutions}
    seen = {name: [] for name in read}
    for at in range(0, len(x), batch):
        values = engine.run(network, engine.quantize_input(network, x[at:at + batch]), keep=True)
        for name, zeros in read.items():
            zero_point = network.tensors[name].zero_point
            for image in values[name].astype(np.int16) - zero_point:
                seen[name].append(float((image == 0).mean()) if zeros else 1 - pseudo_density(image, SHARE))
        if progress:
            progress(min(1.0, (at + batch) / len(x)))
    return {name: Sparsity(mean=float(np.mean(s)), least=min(s), percentile_1=float(np.percentile(s, 1)),
                           pseudo=not read[name]) for name, s in seen.items()}


def rule(sparsity, alpha, series):
    """The sparsest of ``series`` (methods) whose ``1 - density`` is strictly below ``sparsity + alpha``; None: dense.

    >>> eighths = [methods.parse(f"nm:{n}:8") for n in range(1, 8)]
    >>> [str(rule(s, a, eighths)) for s, a in ((0.52, 0), (0.52, 0.15), (0.35, 0.15))]
    ['nm:4:8', 'nm:3:8', 'nm:5:8']
    """
    below = [m for m in series if sparsity + alpha - (1 - m.density) > _ROUNDING]
    return min(below, key=lambda m: m.density, default=None)


def layer_candidates(graph, config):
    """{layer: series worth taking of its input}: those that lower the modelled cycles.

    None for depthwise layers, fewer than M channels per group, and groups that cut blocks.
    """
    found = {}
    for node in graph.convolutions:
        shape, depth = graph.shapes[node.output], node.weights.shape[3]
        dense = cost.activation_cycles(node, shape, (), config)
        found[node.name] = [
            m for m in candidates(config)
            if not methods.kept_dense(node, m) and (node.groups == 1 or depth % m.block == 0)
            and cost.activation_cycles(node, shape, m.patterns, config) < dense]
    return found


def integer_reader(network, chosen):
    """``read`` of `compress.engine.run`: the input of each layer of ``chosen`` ({layer: method}) as its series."""
    def read(layer, x):
        if layer.name not in chosen:
            return x
        zero_point = np.int16(network.tensors[layer.input].zero_point)
        kept = series_view(x.astype(np.int16) - zero_point, chosen[layer.name].patterns)
        return (kept + zero_point).astype(np.int8)
    return read


def float_reader(chosen):
    """``read`` of `compress.graph.forward`, likewise; the series is taken of the float values."""
    return lambda node, x: series_view(x, chosen[node.name].patterns) if node.name in chosen else x


def search(quantizer, config, evaluate, *, reference, goal=GOAL, progress=None):
    """Series of activations whose accuracy is at least ``goal * reference``, by the largest alpha that passes.

    Args:
        quantizer: `compress.quantize.Quantizer`; its calibration data give S(l).
        config: Config whose patterns and padding decide the candidates.
        evaluate: callback {layer: method} -> accuracy of the dense integer network with these series of activations, on
            a split that is not the reported one.
        reference: accuracy of the original (float) network on that split.
        progress: called with (step, fraction).
    Returns: Result. Raises: InputError for a bad goal, or if the dense int8 network misses it.
    """
    check_goal(goal)
    graph, network, least, seen = quantizer.graph, quantizer.network("dense"), goal * reference, {}
    allowed = layer_candidates(graph, config)
    tell = (lambda f: progress("sparsity", f)) if progress else None
    sparsity = calibrate(graph, network, quantizer.calibration.x, progress=tell)

    def assignment(length):
        """Series under the ``length``-th alpha, counted from 1; none at 0."""
        if not length:
            return {}
        found = {n.name: rule(sparsity[n.input].mean, ALPHAS[length - 1], allowed[n.name]) for n in graph.convolutions}
        return {name: method for name, method in found.items() if method is not None}

    def score(chosen):
        key = tuple(sorted((n, str(m)) for n, m in chosen.items()))
        if key not in seen:
            seen[key] = evaluate(chosen)
            if progress:
                progress("search", min(1.0, len(seen) / 10))   # bisection of 41 values and the walk
        return seen[key]

    dense = score({})
    reachable(dense, least, goal)
    length = longest_prefix(len(ALPHAS), lambda n: score(assignment(n)) >= least)
    chosen, alpha = assignment(length), ALPHAS[length - 1] if length else None
    table = rows(quantizer, network, config, chosen)
    facts = {"operand": "activations", "goal": goal, "reference_accuracy": reference, "dense_accuracy": dense,
             "accuracy": score(chosen), "alpha": alpha, "evaluations": len(seen),
             "candidates": [str(m) for m in candidates(config)], "config_digest": config.digest,
             "pseudo_density_share": SHARE, "calibration_samples": len(quantizer.calibration.x),
             "sparsity": {n.name: asdict(sparsity[n.input]) for n in graph.convolutions},
             "totals": totals(table), "table": [r.to_dict() for r in table]}
    return Result(chosen=chosen, alpha=alpha, accuracy=score(chosen), rows=table, facts=facts)


def rows(quantizer, network, config, chosen):
    """A `series.Row` per convolution: shares of the activations that ``chosen`` drops, on calibration images."""
    graph, found = quantizer.graph, []
    images = quantizer.calibration.x[:_IMAGES]
    values = engine.run(network, engine.quantize_input(network, images), keep=True)
    layers = {layer.name: layer for layer in network.layers}
    for node in graph.convolutions:
        layer, shape, method = layers[node.name], graph.shapes[node.output], chosen.get(node.name)
        tensor, patterns = network.tensors[node.input], method.patterns if method else ()
        lost = {"dropped_nonzeros": 0.0, "dropped_magnitude": 0.0, "output_error": 0.0}
        if method:
            real = values[node.input].astype(np.int16) - np.int16(tensor.zero_point)
            gone = real - series_view(real, patterns)
            weights = layer.effective_weights() * layer.weight_scale[:, None, None, None]
            geometry = {"stride": node.stride, "pads": node.pads, "dilation": node.dilation, "groups": node.groups}
            whole, error = (float(np.linalg.norm(graphs.convolve(v.astype(np.float32), weights, **geometry)))
                            for v in (real, gone))
            lost = {"dropped_nonzeros": _share(np.count_nonzero(gone), np.count_nonzero(real)),
                    "dropped_magnitude": _share(np.abs(gone).sum(dtype=np.int64), np.abs(real).sum(dtype=np.int64)),
                    "output_error": _share(error, whole)}
        executed = layer_macs(node.weights, shape, patterns)
        found.append(Row(
            layer=node.name, method=str(method or "dense"), density=method.density if method else 1.0,
            macs=layer_macs(node.weights, shape), macs_executed=executed, cycles=cost.ideal_cycles(executed, config),
            cycles_padded=cost.activation_cycles(node, shape, patterns, config),
            cycles_dense=cost.activation_cycles(node, shape, (), config), **lost))
    return found


def _share(part, whole):
    return float(part / whole) if whole else 0.0
