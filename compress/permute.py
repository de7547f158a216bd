"""Exact channel permutation: reorders input channels so that an N:M method keeps more magnitude.

Channels may be reordered wherever every layer that touches the tensor follows: the layer that makes it permutes its
outputs, every reader its inputs. Tensors joined by a residual sum, a pool or a depthwise layer share one order and are
permuted together; the network's input and output, and both sides of a grouped convolution, keep theirs. Integer sums do
not depend on order, so the int8 network computes the same numbers before pruning.
"""
from dataclasses import replace

import numpy as np

from compress.graph import Conv
from compress.methods import kept_dense
from golden import structured
from spec.errors import InputError

#: Exchanges tried for each set of tensors, per channel.
TRIES = 40


def channel_sets(graph):
    """Sets of tensors whose channels can only be reordered together, without those that must keep their order."""
    parent = {t: t for t in graph.shapes}

    def find(t):
        while parent[t] != t:
            t = parent[t]
        return t

    pinned = {graph.input, graph.output}
    for node in graph.nodes:
        if node.residual is not None:
            parent[find(node.residual)] = find(node.output)
        if not isinstance(node, Conv):
            parent[find(node.input)] = find(node.output)
        elif node.groups > 1:
            if node.depthwise and node.weights.shape[0] == node.groups:
                parent[find(node.input)] = find(node.output)
            else:
                pinned |= {node.input, node.output}
    sets = {}
    for t in graph.shapes:
        sets.setdefault(find(t), []).append(t)
    return tuple(tuple(s) for s in sets.values() if not pinned & set(s))


def reorder(graph, tensors, order):
    """The same network with the channels of ``tensors`` (one of `channel_sets`) in ``order``: new channel i is old
    channel ``order[i]``."""
    tensors, order = set(tensors), np.asarray(order)
    nodes = []
    for node in graph.nodes:
        if isinstance(node, Conv):
            weights, bias = node.weights, node.bias
            if node.input in tensors and node.groups == 1:
                weights = weights[..., order]
            if node.output in tensors:
                weights, bias = weights[order], bias[order]
            node = replace(node, weights=np.ascontiguousarray(weights), bias=np.ascontiguousarray(bias))
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


def kept_magnitude(magnitudes, patterns):
    """Sum that a series keeps of non-negative ``magnitudes`` [..., channels]."""
    return float(sum(t.sum() for t in structured.tasd_series(magnitudes, patterns)[0]))


def find_order(magnitudes, method, *, rng, tries=TRIES):
    """Channel order that keeps more magnitude: seeded hill climbing over exchanges of two channels.

    Args: magnitudes: non-negative float [rows, channels] of all layers that read the channels; method: Method.
    Returns: (order, share kept before, share kept after).
    """
    rows, channels = magnitudes.shape
    width, small = method.block, min(p.m for p in method.patterns)
    if any(width % p.m for p in method.patterns):
        raise InputError("must have M that divide the largest M to permute channels", field="method", value=str(method))
    order, total = np.arange(channels), float(magnitudes.sum())
    short = -channels % width
    padded = np.pad(magnitudes, ((0, 0), (0, short)))
    places = np.arange(channels + short)                      # position -> channel; padding stays at the end
    scores = np.array([kept_magnitude(padded[:, at:at + width], method.patterns)
                       for at in range(0, channels + short, width)])
    before = scores.sum()
    if channels <= small or total == 0:
        return order, 1.0, 1.0
    for _ in range(tries * channels):
        a, b = rng.integers(0, channels, 2)
        if a // small == b // small:
            continue
        places[[a, b]] = places[[b, a]]
        touched = sorted({a // width, b // width})
        new = [kept_magnitude(padded[:, places[t * width:(t + 1) * width]], method.patterns) for t in touched]
        if sum(new) > scores[touched].sum():
            scores[touched] = new
        else:
            places[[a, b]] = places[[b, a]]
    return places[:channels], float(before / total), float(scores.sum() / total)


def permute(graph, method, *, rng, tries=TRIES, progress=None):
    """Reorder every set of channels for ``method``.

    Returns: (graph, facts): facts hold, per set, its tensors and the share of magnitude kept before and after.
    Raises: InputError for a method without patterns.
    """
    if not method.patterns:
        raise InputError("must have patterns to permute channels for", field="method", value=str(method))
    facts, sets = [], channel_sets(graph)
    for number, tensors in enumerate(sets):
        readers = [n for n in graph.convolutions if n.input in tensors and n.groups == 1 and not kept_dense(n, method)]
        if readers:
            rows = np.concatenate([np.abs(n.weights).reshape(-1, n.weights.shape[3]) for n in readers])
            order, before, after = find_order(rows.astype(np.float64), method, rng=rng, tries=tries)
            graph = reorder(graph, tensors, order)
            facts.append({"tensors": list(tensors), "kept_before": before, "kept_after": after})
        if progress:
            progress("permute", (number + 1) / len(sets))
    return graph, {"method": str(method), "sets": facts}
