"""Seeded random layers of every kind, for the fuzz test."""
from sim_tests.lowering.networks import add, basis_convolution, convolution, network, pool

_KINDS = ("convolution", "convolution", "convolution", "grouped", "depthwise", "full", "pool", "add")


def _integers(rng, lo, hi, count):
    return tuple(int(v) for v in rng.integers(lo, hi + 1, count))


def _patterns(rng, block):
    choices = [[f"{block}:{block}"], ["1:4"], ["2:4"], ["3:4"], ["1:2"], ["2:4", "1:4"], ["1:1"]]
    if block == 8:
        choices += [["3:8"], ["5:8", "1:8"], ["1:8"], ["4:8", "1:8"], ["6:8", "1:8"]]
    return choices[rng.integers(len(choices))]


def random_network(rng, block, *, largest=12):
    """(network of one random layer, what it is)."""
    kind = str(rng.choice(_KINDS))
    size, (channels, outputs) = _integers(rng, 1, largest, 2), _integers(rng, 1, 40, 2)
    kernel, stride, dilation = _integers(rng, 1, 4, 2), _integers(rng, 1, 3, 2), _integers(rng, 1, 2, 2)
    pads, patterns, groups = _integers(rng, 0, 3, 4), _patterns(rng, block), 1
    if kind == "add":
        layer, out = add(rng, size=size, channels=channels)
    elif kind == "pool":
        kernel = tuple(min(k, s) for k, s in zip(kernel, size))
        pads = tuple(min(p, kernel[i % 2] - 1) for i, p in enumerate(pads))
        layer, out = pool(rng, size=size, channels=channels, kind=str(rng.choice(["max", "average"])), window=kernel,
                          stride=stride, pads=pads)
    else:
        if kind == "grouped":
            groups, per_in, per_out = int(rng.integers(2, 6)), *_integers(rng, 1, 11, 2)
            channels, outputs = groups * per_in, groups * per_out
        elif kind == "depthwise":
            groups, outputs, patterns = channels, channels * int(rng.integers(1, 3)), [f"{block}:{block}"]
        elif kind == "full":
            kernel, pads, stride, dilation = size, (0, 0, 0, 0), (1, 1), (1, 1)
        pads = list(pads)
        for a in (0, 1):
            pads[a] += max(0, (kernel[a] - 1) * dilation[a] + 1 - size[a] - pads[a] - pads[a + 2])
        layer, out = convolution(rng, size=size, channels=channels, outputs=outputs, kernel=kernel, patterns=patterns,
                                 stride=stride, pads=tuple(pads), dilation=dilation, groups=groups,
                                 residual=bool(rng.integers(2)))
    what = kind, size, channels, outputs, kernel, stride, pads, dilation, groups
    return network(size, channels, [layer], [out]), what


def random_basis_network(rng, config, *, largest=13):
    """(network of one random basis convolution that fits the basis engine's kernels and channels, what it is)."""
    b = config.basis
    size, (channels, outputs) = _integers(rng, 1, largest, 2), _integers(rng, 1, 24, 2)
    dilation = _integers(rng, 1, 2, 2)
    kernel = int(rng.integers(1, 6)), int(rng.integers(1, (min(b.window, 7) - 1) // dilation[1] + 2))
    stride = tuple(int(s) for s in rng.choice([1, 2, 4], 2))
    pads, count = list(_integers(rng, 0, 3, 4)), int(rng.integers(1, 2 * b.slices))
    for a in (0, 1):
        pads[a] += max(0, (kernel[a] - 1) * dilation[a] + 1 - size[a] - pads[a] - pads[a + 2])
    density = float(rng.choice([0, 0.1, 0.3, 1])) if b.coefficients == "maps" or b.coefficient_rows > 4 else 0.1
    layer, out = basis_convolution(rng, size=size, channels=channels, outputs=outputs, count=count, kernel=kernel,
                                   stride=stride, pads=tuple(pads), dilation=dilation, density=density,
                                   intermediate_bits=b.intermediate_bits, residual=bool(rng.integers(2)))
    return network(size, channels, [layer], [out]), (size, channels, outputs, count, kernel, stride, pads, dilation)
