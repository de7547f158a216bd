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
    """Array steps of one pixel for one term.

    Args: sizes: Sizes; n: of the pattern n:block; taps: kernel_h * kernel_w; depth: input channels per group.
    A fetch covers ``fetch_blocks(n)`` blocks. Deep layers use several fetches per tap; where a tap is smaller than a
    fetch, up to ``config.structured.taps`` taps share one.
    """
    blocks, capacity = ceil_div(depth, sizes.config.structured.block), sizes.fetch_blocks(n)
    if blocks >= capacity:
        return taps * ceil_div(blocks, capacity)
    shared = min(sizes.config.structured.taps, capacity // blocks)
    return ceil_div(taps, shared)


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
