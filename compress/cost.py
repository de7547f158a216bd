"""Padded cycle counts of one layer: an engine's own steps, without memory, fill or drain.

Structured array: ``cycles = ceil(K / columns) * pixels * sum over terms of fetches`` (reference on TASD, section 7.4;
own model). Basis engine: docs/basis.md, "Cycles", for whole layers cut into strips that fit an accumulator bank.
"""
import numpy as np

from compress import basis as bases
from golden.coefficients import cheapest_series, series_words
from spec.config import Config
from spec.derive import Sizes, ceil_div
from spec.errors import InputError
from spec.isa import MAX_KERNEL_ROWS


def block_pattern(pattern, block):
    """N of a pattern N:m as the array runs it, (N * M / m):M. Raises: InputError unless m divides M = ``block``."""
    if block % pattern.m:
        raise InputError(f"must have M that divides the block ({block})", field="pattern", value=str(pattern))
    return pattern.n * block // pattern.m


def parts(n, supported):
    """Fewest supported N that sum to ``n``, largest first; None if there are none.

    Args: n: 1..M; supported: the N of the configuration's patterns.
    """
    best = {0: ()}
    for total in range(1, n + 1):
        options = [(*best[total - s], s) for s in supported if s <= total and total - s in best]
        if options:
            best[total] = max((tuple(sorted(o, reverse=True)) for o in options), key=lambda o: (-len(o), o))
    return best.get(n)


def fetches(sizes, n, taps, depth):
    """Fewest array steps of one pixel for one term, with no block known to be empty and no bank conflict.

    Args: sizes: Sizes; n: of the pattern n:block; taps: kernel_h * kernel_w; depth: input channels per group.
    A step fetches ``Q = fetch_blocks(n)`` blocks as Q / L segments of L consecutive blocks, from at most
    ``config.structured.taps`` addresses; L is a power of two that divides the blocks of a pixel (channels padded to
    columns). Steps are ``ceil(taps * ceil(blocks / L) / (Q / L))`` for the best L. A narrow layer that offers no L for
    this pattern runs as a wider one.
    """
    array = sizes.config.structured
    blocks = ceil_div(depth, array.block)
    stored = ceil_div(depth, array.columns) * sizes.group_blocks
    best = taps * ceil_div(blocks, sizes.fetch_blocks(array.block))
    for wider in (p.n for p in array.patterns if p.n >= n):
        capacity, length = sizes.fetch_blocks(wider), 1
        while length <= capacity:
            if stored % length == 0 and capacity // length <= array.taps:
                best = min(best, ceil_div(taps * ceil_div(blocks, length), capacity // length))
            length *= 2
    return best


def _hardware_terms(pattern, array):
    """N of the terms that the array runs a pattern as. Raises: InputError."""
    chosen = parts(block_pattern(pattern, array.block), [p.n for p in array.patterns])
    if chosen is None:
        raise InputError(f"must be a sum of {', '.join(map(str, array.patterns))}", field="pattern", value=str(pattern))
    return chosen


def layer_cycles(node, shape, patterns, config):
    """Array cycles of a convolution under a series.

    Args:
        node: anything with weights [K, R, S, C / groups] (``compress.graph.Conv``) and ``groups``.
        shape: (height, width, channels) of its output; patterns: series, empty for dense; config: Config.
    Returns: ceil(outputs per group / columns) * groups * pixels * sum of fetches over the hardware terms.
    Raises: InputError for a pattern that the configuration cannot run.
    """
    if not isinstance(config, Config):
        raise TypeError(f"config must be a Config, not {config!r}")
    if config.structured is None:
        raise InputError("must be there for a structured layer", field="structured", value="none")
    sizes, array = Sizes(config), config.structured
    outputs, rows, columns, depth = node.weights.shape
    runs = [n for p in patterns for n in _hardware_terms(p, array)] or [array.block]
    steps = sum(fetches(sizes, n, rows * columns, depth) for n in runs)
    return ceil_div(outputs // node.groups, array.columns) * node.groups * shape[0] * shape[1] * steps


def activation_cycles(node, shape, patterns, config):
    """Array cycles of a convolution whose activations are a series: operands exchanged (reference, section 7.4).

    Columns hold pixels instead of outputs: ``cycles = ceil(pixels / columns) * outputs * sum over the hardware terms of
    ceil(taps * ceil(depth / block) / fetch_blocks(N))``. No engine here runs this yet, so addresses set no limit.
    Arguments and errors as `layer_cycles`.
    """
    if config.structured is None:
        raise InputError("must be there for a structured layer", field="structured", value="none")
    sizes, array = Sizes(config), config.structured
    outputs, rows, columns, depth = node.weights.shape
    runs = [n for p in patterns for n in _hardware_terms(p, array)] or [array.block]
    blocks = rows * columns * ceil_div(depth, array.block)
    return ceil_div(shape[0] * shape[1], array.columns) * outputs * \
        sum(ceil_div(blocks, sizes.fetch_blocks(n)) for n in runs)


def ideal_cycles(macs, config):
    """Cycles of ``macs`` multiplications on every multiplier of the structured array: ``ceil(macs / (columns *
    slots))``, nothing padded."""
    array = config.structured
    return ceil_div(macs, array.columns * array.slots)


# -- basis engine ------------------------------------------------------------------------------------------------------
def _engine(config):
    if not isinstance(config, Config):
        raise TypeError(f"config must be a Config, not {config!r}")
    if config.basis is None:
        raise InputError("must be there for a basis layer", field="basis", value="none")
    return config.basis


def basis_runs(node, config):
    """Whether the basis engine takes the geometry of a layer (anything with weights, stride, dilation, pads)."""
    engine, (rows, columns) = _engine(config), node.weights.shape[1:3]
    return all(s in (1, 2, 4, 8) for s in node.stride) and max(node.dilation) < 8 and max(node.pads) < 16 and \
        rows <= MAX_KERNEL_ROWS and (columns - 1) * node.dilation[1] + 1 <= engine.window


def _strips(node, source, shape, depth):
    """(pairs of output row and valid kernel row times output columns, input pixels) of each strip of whole output rows
    (parts of one row where a row has more than ``depth`` pixels)."""
    kernel = node.weights.shape[1:3]
    rows = max(1, depth // shape[1])
    for y in range(0, shape[0], rows):
        last_y = min(y + rows, shape[0]) - 1
        taps = sum(0 <= out * node.stride[0] + r * node.dilation[0] - node.pads[0] < source[0]
                   for out in range(y, last_y + 1) for r in range(kernel[0]))
        reach = _reach(y, last_y, 0, node, kernel, source)
        for x in range(0, shape[1], depth):
            last_x = min(x + depth, shape[1]) - 1
            yield taps * (last_x - x + 1), reach * _reach(x, last_x, 1, node, kernel, source)


def _reach(first, last, axis, node, kernel, source):
    """Input rows (or columns) inside the image that outputs first..last see."""
    low = first * node.stride[axis] - node.pads[axis]
    high = last * node.stride[axis] - node.pads[axis] + (kernel[axis] - 1) * node.dilation[axis]
    return max(0, min(high, source[axis] - 1) - max(low, 0) + 1)


def basis_cycles(node, source, shape, coefficients, config, *, active=1.0):
    """Cycles of a layer in mode DECOMPOSED.

    Args:
        node: anything with weights [K, R, S, C], stride, pads and dilation; source, shape: (height, width, channels) of
            its input and output; coefficients: int8 [K, C, M]; config: Config with a basis engine.
        active: maps only, share of activations that differ from the zero point.
    Returns: sum over tiles of outputs, passes of basis kernels and strips of the slower of both stages: ``J`` per
    (output pixel, valid kernel row), and the stream words of each input pixel. A word of a series takes one cycle; one
    of maps ``ceil(active * non-zeros / lanes)`` of its slice with the most, at least 1 (lanes always find work:
    optimistic).
    """
    engine, sizes = _engine(config), Sizes(config)
    placed = bases.positions(coefficients, sizes)
    used = np.count_nonzero(placed, axis=2)                                    # [K, groups, M]
    groups, count = used.shape[1:]
    steps = ceil_div(node.weights.shape[2], engine.multipliers)
    strips = list(_strips(node, source, shape, sizes.accumulator_depth))
    total = 0
    for part in range(0, count, engine.slices):
        for tile in range(0, len(used), engine.blocks):
            mine = used[tile:tile + engine.blocks, :, part:part + engine.slices]
            if engine.coefficients == "series":
                words = series_words(groups, cheapest_series(int(used.max()), groups, config), config)
            else:
                starts = np.arange(0, groups, engine.stream_groups)
                work = np.add.reduceat(mine, starts, axis=1).max(axis=(0, 2))
                words = int(np.maximum(1, np.ceil(active * work / engine.lanes)).sum())
            total += sum(max(steps * taps, words * pixels) for taps, pixels in strips)
    return total


def basis_dense_cycles(node, source, shape, config):
    """Cycles of a dense layer on the basis engine: mode POINTWISE for 1 x 1 kernels without padding, else DENSE.

    Arguments as `basis_cycles`. POINTWISE: ``groups`` per output pixel. DENSE: one pass for each ``slices`` channels of
    a channel group, ``J`` per (output pixel, valid kernel row) each. Groups of a grouped layer run one after the other.
    """
    engine, sizes = _engine(config), Sizes(config)
    outputs, rows, columns, depth = node.weights.shape
    tiles = ceil_div(outputs // node.groups, engine.blocks) * node.groups
    full, rest = divmod(depth, sizes.group_channels)
    if (rows, columns) == (1, 1) and not any(node.pads):
        return tiles * shape[0] * shape[1] * (full + bool(rest))
    passes = full * ceil_div(sizes.group_channels, engine.slices) + ceil_div(rest, engine.slices)
    steps = ceil_div(columns, engine.multipliers)
    return tiles * passes * steps * sum(taps for taps, _ in _strips(node, source, shape, sizes.accumulator_depth))
