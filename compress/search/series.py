"""What the searches of a series per layer share: candidates, the search over a nearly monotone accuracy, the table.

Source: arXiv 2403.07953, sections 3 (series, density) and 4.1 (accuracy rule); open points are decided here.
"""
from dataclasses import asdict, dataclass
from types import SimpleNamespace

from compress import cost, methods
from compress.network import Convolution
from golden.convolution import output_size
from spec.config import Pattern
from spec.derive import ceil_div
from spec.errors import InputError

#: Share of the original accuracy that must remain (the MLPerf rule).
GOAL = 0.99
#: Lengths looked at one by one beyond the one that bisection found.
WALK = 4


def check_goal(goal):
    """Raises InputError unless 0 < ``goal`` <= 1."""
    if isinstance(goal, bool) or not isinstance(goal, (int, float)) or not 0 < goal <= 1:
        raise InputError("must be above 0 and at most 1", field="goal", value=goal)


def reachable(dense, least, goal):
    """Raises InputError if the dense int8 network (accuracy ``dense``) already misses ``least``."""
    if dense < least:
        raise InputError(f"must be reachable: the dense int8 network has {dense:.4f}, needed are {least:.4f}",
                         field="goal", value=goal)


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


# -- table -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Row:
    """One layer of a search's table; plain numbers.

    density: sum N/M of the series, 1 for dense. macs, macs_executed: multiplications of one image, dense and of the
    series' slots (`layer_macs`). dropped_nonzeros, dropped_magnitude: shares of the series' operand that are in no
    term. output_error: ``||(W - W*) X|| / ||W X||`` (weights) or ``||W (X - X*)|| / ||W X||`` (activations) on
    calibration data. cycles: executed multiplications over multipliers; cycles_padded: array cycles with every padding
    (`compress.cost`); cycles_dense: the latter of the dense layer.
    """

    layer: str
    method: str
    density: float
    macs: int
    macs_executed: int
    dropped_nonzeros: float
    dropped_magnitude: float
    output_error: float
    cycles: int
    cycles_padded: int
    cycles_dense: int

    def to_dict(self):
        """Plain values for JSON."""
        return asdict(self)


def layer_macs(weights, shape, patterns=()):
    """Multiplications of one image: ``outputs * pixels * taps * sum over terms of N ceil(depth / M)``, at most the
    dense ``outputs * pixels * taps * depth``.

    Args: weights: [K, R, S, C / groups]; shape: of the output, height first; patterns: series, empty for dense.
    """
    outputs, rows, columns, depth = weights.shape
    kept = min(depth, sum(p.n * ceil_div(depth, p.m) for p in patterns)) if patterns else depth
    return outputs * rows * columns * kept * shape[0] * shape[1]


def weight_rows(network, config):
    """A `Row` for each convolution of a network whose weights are series (`compress.network.Convolution`)."""
    rows = []
    for layer in network.layers:
        if not isinstance(layer, Convolution):
            continue
        source = network.tensors[layer.input]
        shape = output_size((source.height, source.width), layer.kernel, stride=layer.stride, pads=layer.pads,
                            dilation=layer.dilation)
        patterns = tuple(t.pattern for t in layer.terms if not t.dense)
        weights = layer.terms[0].values
        node = SimpleNamespace(weights=weights, groups=layer.groups)
        executed = layer_macs(weights, shape, patterns)
        rows.append(Row(
            layer=layer.name, method=layer.format, density=sum(p.density for p in patterns) if patterns else 1.0,
            macs=layer_macs(weights, shape), macs_executed=executed, cycles=cost.ideal_cycles(executed, config),
            cycles_padded=cost.layer_cycles(node, shape, patterns, config),
            cycles_dense=cost.layer_cycles(node, shape, (), config),
            **{key: layer.metrics[key] for key in ("dropped_nonzeros", "dropped_magnitude", "output_error")}))
    return rows


def totals(rows):
    """Sums of a table: ``macs``, ``macs_executed``, ``macs_saved`` (share), ``cycles``, ``cycles_padded``,
    ``cycles_dense`` and ``cycles_saved`` (share of the padded dense cycles)."""
    sums = {key: sum(getattr(r, key) for r in rows)
            for key in ("macs", "macs_executed", "cycles", "cycles_padded", "cycles_dense")}
    return sums | {"macs_saved": 1 - sums["macs_executed"] / max(1, sums["macs"]),
                   "cycles_saved": 1 - sums["cycles_padded"] / max(1, sums["cycles_dense"])}
