"""Padded cycle count of one layer on the structured array: the array's steps alone, no memory, fill or drain.

Source: reference on TASD, section 7.4 (own model): ``cycles = ceil(K / columns) * pixels * sum over terms of fetches``.
"""
from spec.config import Config
from spec.derive import Sizes, ceil_div
from spec.errors import InputError


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
    sizes, array = Sizes(config), config.structured
    supported = [p.n for p in array.patterns]
    outputs, rows, columns, depth = node.weights.shape
    runs = []
    for p in patterns:
        chosen = parts(block_pattern(p, array.block), supported)
        if chosen is None:
            raise InputError(f"must be a sum of {', '.join(map(str, array.patterns))}", field="pattern", value=str(p))
        runs += chosen
    steps = sum(fetches(sizes, n, rows * columns, depth) for n in runs or [array.block])
    return ceil_div(outputs // node.groups, array.columns) * node.groups * shape[0] * shape[1] * steps
