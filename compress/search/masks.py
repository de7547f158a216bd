"""A series per layer for the pruning masks of a real network, without data: real masks, synthetic values.

The masks say where the weights are, not what they are: values are drawn from a seeded normal distribution, so dropped
non-zeros are those of the real network, dropped magnitudes are not. A layer takes the sparsest series that drops at
most a given share of its non-zeros (a count, as `tasder_weights` sorts by) and lowers its padded cycles, else it stays
dense. Beside it stands what independent zeros of the same density would lose (`golden.structured.expected_dropped`).
"""
from math import prod
import re
from types import SimpleNamespace
from zlib import crc32

import numpy as np

from compress import cost
from compress.search.series import candidates, layer_macs
from golden.structured import expected_dropped
from spec import config as configs
from spec.errors import InputError

#: Share of a layer's non-zeros that its series may drop.
BOUND = 0.01
#: Said with every result.
NOTE = "real masks, synthetic values"
_BOTTLENECK = re.compile(r"bottleneck_(1|2|3|projection)_block_group(_projection_block_group)?([1-4])(_\d+)?(_\d+)?")


def geometry(name):
    """(kernel, output pixels) of a layer of the collection's ResNet-50; others count as matrices with one pixel.

    The stride of a group is in its first 3x3 convolution, so the 1x1 before it still works at the size of the group
    before.

    >>> geometry("initial_conv"), geometry("bottleneck_2_block_group3_1_1"), geometry("final_dense")
    (((7, 7), 12544), ((3, 3), 196), ((1, 1), 1))
    >>> geometry("bottleneck_1_block_group_projection_block_group3")
    ((1, 1), 784)
    """
    if name == "initial_conv":
        return (7, 7), 112 * 112
    match = _BOTTLENECK.fullmatch(name)
    if match is None:
        return (1, 1), 1
    position, projection, group = match[1], match[2], int(match[3])
    size = 112 >> group
    if position == "1" and projection and group > 1:
        size *= 2
    return (3, 3) if position == "2" else (1, 1), size * size


def _kernel(mask, seed):
    """(synthetic weights float32 [K, taps, C], kernel, pixels) of a mask."""
    kernel, pixels = geometry(mask.name)
    taps = prod(kernel)
    if mask.columns % taps:
        raise InputError(f"must have columns for {kernel[0]}x{kernel[1]} taps", field=mask.name, value=mask.columns)
    values = np.random.default_rng([seed, crc32(mask.name.encode())]).standard_normal(
        (mask.rows, mask.columns), dtype=np.float32)
    return np.where(mask.to_dense(), values, 0).reshape(mask.rows, taps, -1), kernel, pixels


def by_rank(weights, block):
    """(non-zeros, sums of magnitudes) [block] by place in their block of channels, largest magnitude first.

    A view that keeps N drops the places N and above; so one sort serves every series of that block.

    Args: weights: real [K, taps, C]; a last block that is shorter counts as padded with zeros.
    """
    magnitude = np.abs(weights)
    short = -magnitude.shape[-1] % block
    if short:
        magnitude = np.pad(magnitude, ((0, 0), (0, 0), (0, short)))
    ordered = np.sort(magnitude.reshape(-1, block), axis=1)[:, ::-1]
    return np.count_nonzero(ordered, axis=0), ordered.sum(axis=0, dtype=np.float64)


def report(masks, config, *, bound=BOUND, first="dense", seed=0, progress=None):
    """Series per layer and per network for the masks of a collection.

    Args:
        masks: iterable of `compress.dlmc.Mask`; config: Config, preset name or file.
        bound: share of its non-zeros that a layer may lose, 0..1. first: ``dense``, or ``search`` to let layers with
            fewer than M input channels take a series too. seed: of the values.
        progress: called with (step, None, layer).
    Returns: dict of plain values: note, bound, seed; ``layers``: per layer shape, density, method, pattern_density,
    dropped_nonzeros, dropped_uniform, dropped_magnitude, macs, macs_executed, cycles_padded, cycles_dense;
    ``networks``: per series dropped_nonzeros, dropped_uniform and dropped_magnitude if all layers but those too narrow
    took it; ``totals``.
    Raises: InputError.
    """
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not 0 <= bound <= 1:
        raise InputError("must be in 0..1", field="bound", value=bound)
    if first not in ("dense", "search"):
        raise InputError("must be dense or search", field="first", value=first)
    config = config if isinstance(config, configs.Config) else configs.load(config)
    series = candidates(config)
    block = config.structured.block
    totals_of = {str(m): np.zeros(4) for m in series}              # dropped, expected, magnitude lost, and all of it
    layers, kept_nonzeros = [], 0
    for mask in masks:
        if progress:
            progress("series", None, mask.name)
        weights, kernel, pixels = _kernel(mask, seed)
        depth = weights.shape[2]
        counts, sums = by_rank(weights, block)
        nonzeros = int(counts.sum())
        node = SimpleNamespace(weights=weights.reshape(mask.rows, *kernel, depth), groups=1)
        dense = cost.layer_cycles(node, (pixels, 1), (), config)
        row = {"layer": mask.name, "shape": [mask.rows, *kernel, depth], "density": mask.density, "method": "dense",
               "pattern_density": 1.0, "dropped_nonzeros": 0.0, "dropped_uniform": 0.0, "dropped_magnitude": 0.0,
               "cycles_padded": dense, "cycles_dense": dense, "macs": layer_macs(node.weights, (pixels, 1)),
               "macs_executed": layer_macs(node.weights, (pixels, 1))}
        narrow = depth < block
        kept_nonzeros += 0 if narrow else nonzeros
        for method in reversed(series):                            # densest first: a sparser one that fits replaces it
            n = sum(p.n for p in method.patterns)
            dropped = int(counts[n:].sum())
            figures = {"dropped_nonzeros": dropped / max(1, nonzeros),
                       "dropped_uniform": _expected(n, block, depth, mask.density),
                       "dropped_magnitude": float(sums[n:].sum() / sums.sum()) if nonzeros else 0.0}
            if not narrow:
                totals_of[str(method)] += (dropped, figures["dropped_uniform"] * nonzeros, sums[n:].sum(), sums.sum())
            cycles = cost.layer_cycles(node, (pixels, 1), method.patterns, config)
            if figures["dropped_nonzeros"] <= bound and cycles < row["cycles_padded"] and \
                    (first == "search" or not narrow):
                row |= figures | {"method": str(method), "pattern_density": method.density, "cycles_padded": cycles,
                                  "macs_executed": layer_macs(node.weights, (pixels, 1), method.patterns)}
        layers.append(row)
    networks = [{"method": name, "pattern_density": m.density, "dropped_nonzeros": float(t[0] / max(1, kept_nonzeros)),
                 "dropped_uniform": float(t[1] / max(1, kept_nonzeros)),
                 "dropped_magnitude": float(t[2] / t[3]) if t[3] else 0.0}
                for m, (name, t) in zip(series, totals_of.items())]
    sums = {key: sum(row[key] for row in layers) for key in ("macs", "macs_executed", "cycles_padded", "cycles_dense")}
    elements = sum(prod(row["shape"]) for row in layers)
    density = sum(row["density"] * prod(row["shape"]) for row in layers) / elements
    return {"note": NOTE, "bound": bound, "first": first, "seed": seed, "config": config.name,
            "config_digest": config.digest, "layers": layers, "networks": networks,
            "totals": sums | {"density": density, "macs_saved": 1 - sums["macs_executed"] / sums["macs"],
                              "cycles_saved": 1 - sums["cycles_padded"] / sums["cycles_dense"]}}


def _expected(n, block, depth, density):
    """`expected_dropped` over whole blocks and the shorter last one, by their shares of the channels."""
    whole, rest = divmod(depth, block)
    lost = whole * block * expected_dropped((n, block), density)
    if rest > n:
        lost += rest * expected_dropped((n, rest), density)
    return lost / depth
