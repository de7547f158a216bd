"""Low-rank chains: a convolution becomes a chain of smaller ones before quantisation.

`svd:F` (1x1 and fully connected layers), `tucker:F` (Tucker-2) and `tt:F` (tensor train of order 3) write a kernel
[O, R, S, I] as ``1x1 (I -> r_in) | RxS (r_in -> r_out) | 1x1 (r_out -> O)``, or a matrix as ``I -> r -> O``, with ranks
such that a layer keeps at most 1/F of its parameters. The stages are ordinary layers from there on: quantised to 8 bits
each, run on the same array. Without training a factor of 2 or 3 costs much accuracy; the package says how much.

A layer stays whole, with the reason in the provenance, where it is grouped, where its ranks would fall below
`RANK_STEP`, or where the chain has no fewer multiplications.
"""
from dataclasses import dataclass, replace

import numpy as np

from compress import graph as graphs
from golden import tensor_train, tucker
from spec.errors import InputError

KINDS = ("svd", "tucker", "tt")
#: Ranks are rounded down to a multiple of it: channels are stored and computed in groups.
RANK_STEP = 8
MAX_FACTOR = 1000.0
#: Samples that decide the scaling of the intermediates.
SAMPLES = 32


@dataclass(frozen=True)
class Factorization:
    """A parsed method: kind and parameter reduction factor."""

    kind: str
    factor: float

    def __str__(self):
        return f"{self.kind}:{self.factor:g}"


def parse(text, *, field="method"):
    """Factorization of ``kind:F``; None if the text names another kind of method.

    Raises: InputError for a factor that is not a number above 1.

    >>> parse("tucker:3"), parse("nm:2:4")
    (Factorization(kind='tucker', factor=3.0), None)
    """
    kind, _, rest = str(text).strip().partition(":")
    if kind not in KINDS:
        return None
    try:
        factor = float(rest)
    except ValueError:
        factor = 0.0
    if not 1 < factor <= MAX_FACTOR:
        raise InputError(f"{kind} must be followed by a parameter reduction factor above 1, at most {MAX_FACTOR:g}",
                         field=field, value=str(text))
    return Factorization(kind, factor)


def _rounded(rank, most):
    return min(int(rank), most) // RANK_STEP * RANK_STEP


def matrix_rank(outputs, inputs, factor):
    """Rank of ``I -> r -> O``: the largest with r (I + O) <= O I / F, rounded down (`RANK_STEP`)."""
    return _rounded(outputs * inputs / (factor * (outputs + inputs)), min(outputs, inputs))


def kernel_ranks(outputs, taps, inputs, factor):
    """(r_out, r_in) of a three-stage chain: both the same share a of their modes, the largest with
    ``a I^2 + a^2 taps O I + a O^2 <= taps O I / F``, rounded down (`RANK_STEP`)."""
    quadratic, linear, constant = taps * outputs * inputs, inputs ** 2 + outputs ** 2, taps * outputs * inputs / factor
    share = (-linear + (linear ** 2 + 4 * quadratic * constant) ** 0.5) / (2 * quadratic)
    return _rounded(share * outputs, outputs), _rounded(share * inputs, inputs)


def _chain(node, method):
    """The chain of one convolution, or the reason why there is none."""
    outputs, r, s, inputs = node.weights.shape
    if node.groups > 1:
        return "grouped"
    geometry = {"stride": node.stride, "pads": node.pads, "dilation": node.dilation}
    weights = node.weights.astype(np.float64)
    if (r, s) == (1, 1):
        rank = matrix_rank(outputs, inputs, method.factor)
        if not rank:
            return "too small"
        chain = tucker.svd(weights[:, 0, 0, :], rank)
        # the first stage takes the stride and the pads, so that the second one has fewer pixels
        return replace(chain, stages=(replace(chain.stages[0], **geometry), chain.stages[1]))
    if method.kind == "svd":
        return "svd is for 1x1 and fully connected layers"
    r_out, r_in = kernel_ranks(outputs, r * s, inputs, method.factor)
    if not min(r_out, r_in):
        return "too small"
    if method.kind == "tucker":
        return tucker.tucker2(weights, (r_out, r_in), sweeps=2, **geometry)
    return tensor_train.tt_convolution(weights, (1, r_out, r_in, 1), **geometry).chain()


def _macs(shape, stages):
    """Multiplications of a chain for an input of ``shape`` (height, width, channels)."""
    total, (height, width) = 0, shape[:2]
    for st in stages:
        k, r, s, c = st.weights.shape
        top, left, bottom, right = st.pads
        height = graphs.output_size(height, r, st.stride[0], top, bottom, st.dilation[0])
        width = graphs.output_size(width, s, st.stride[1], left, right, st.dilation[1])
        total += height * width * k * r * s * c
    return total


def factorize(graph, method, x, *, progress=None):
    """Replace convolutions by chains.

    Args:
        graph: float graph. method: Factorization. x: calibration samples [N, H, W, C]; they decide, by powers of two,
            how the channels of the intermediates are scaled (the function does not change).
        progress: called with (step, fraction 0..1).
    Returns: (graph, facts); facts = {"kind", "factor", "layers": {name: ranks and error, or the reason for none}}; the
    nodes of a chain are ``layer.1``, ``layer.2`` …; the last one makes the layer's tensor, with its clamp and residual.
    """
    values = graphs.forward(graph, x[:SAMPLES], keep=True)
    nodes, shapes, facts = [], dict(graph.shapes), {}
    for done, node in enumerate(graph.nodes):
        if progress:
            progress(f"factorize {node.name}", done / len(graph.nodes))
        if not isinstance(node, graphs.Conv):
            nodes.append(node)
            continue
        chain = _chain(node, method)
        shape = graph.shapes[node.input]
        if not isinstance(chain, str):
            dense = _macs(shape, [node])
            chain = chain if _macs(shape, chain.stages) < dense else "no fewer multiplications"
        if isinstance(chain, str):
            facts[node.name] = {"kept": chain}
            nodes.append(node)
            continue
        facts[node.name] = {"ranks": [int(st.weights.shape[0]) for st in chain.stages[:-1]],
                            "relative_error": round(float(chain.meta["relative_error"]), 6)}
        chain = chain.equalized(values[node.input])
        tensor = node.input
        for number, st in enumerate(chain.stages, 1):
            last = number == len(chain.stages)
            outputs = st.weights.shape[0]
            part = graphs.Conv(
                name=f"{node.name}.{number}", input=tensor, output=node.output if last else f"{node.output}.{number}",
                residual=node.residual if last else None, low=node.low if last else None,
                high=node.high if last else None, weights=st.weights.astype(np.float32),
                bias=node.bias if last else np.zeros(outputs, np.float32), stride=st.stride, pads=st.pads,
                dilation=st.dilation, groups=st.groups)
            shapes[part.output] = graphs.node_shape(part, shapes[tensor])
            nodes.append(part)
            tensor = part.output
    chained = replace(graph, nodes=tuple(nodes), shapes=shapes)
    return chained, {"kind": method.kind, "factor": method.factor, "layers": facts}
