"""The basis engine's part of `make bench`: decomposed convolutions against the dense mode of the structured array.

Coefficients are synthetic, of the stated density; half of the activations are at the zero point. Both engines have the
same bus, memories and memory latency; the cycles of the dense array are scaled to the basis engine's number of
multipliers (as if it scaled perfectly, which favours it).
"""

from dataclasses import replace

import numpy as np

from compress.network import BasisConvolution, Convolution, Network, Requantization, Tensor, Term
from golden.basis import encoded_bits
from golden.coefficients import cheapest_series, pack_maps, pack_series
from sim_tests.bench.cosim import cosimulate
from spec import config as configs
from spec.config import Pattern

LATENCY_CYCLES = 16
#: Basis kernels of every decomposed layer.
COUNT = 6
#: Layers: (input size, input channels, outputs, kernel, stride, how many such layers). Decomposed are those of 3 x 3
#: with more than 3 input channels.
RESNET18 = (
    (32, 3, 64, 3, 1, 1),
    (32, 64, 64, 3, 1, 4),
    (32, 64, 128, 3, 2, 1),
    (16, 128, 128, 3, 1, 3),
    (16, 128, 256, 3, 2, 1),
    (8, 256, 256, 3, 1, 3),
    (8, 256, 512, 3, 2, 1),
    (4, 512, 512, 3, 1, 3),
    (32, 64, 128, 1, 2, 1),
    (16, 128, 256, 1, 2, 1),
    (8, 256, 512, 1, 2, 1),
    (1, 512, 10, 1, 1, 1),
)
VGG16 = (
    (32, 3, 64, 3, 1, 1),
    (32, 64, 64, 3, 1, 1),
    (16, 64, 128, 3, 1, 1),
    (16, 128, 128, 3, 1, 1),
    (8, 128, 256, 3, 1, 1),
    (8, 256, 256, 3, 1, 2),
    (4, 256, 512, 3, 1, 1),
    (4, 512, 512, 3, 1, 2),
    (2, 512, 512, 3, 1, 3),
    (1, 512, 10, 1, 1, 1),
)
NETWORKS = {"ResNet-18": RESNET18, "VGG-16": VGG16}
#: Presets measured, with the coefficients they get: density of irregular ones, or N of N:group. 1:16, 3:16 and
#: 4:16 have densities .0625, .1875 and .25; of normally distributed coefficients they keep as much energy as irregular
#: ones of .05, .17 and .23.
FORMS = {
    "maps288": {".05": 0.05, ".20": 0.20},
    "basis288": {"1:16": 1, "3:16": 3, "4:16": 4},
    "basis252": {"1:14": 1, "3:14": 3},
}
#: Speed-ups to reach: (network, preset, form) -> ratio.
TARGETS = {
    ("ResNet-18", "maps288", ".05"): 17.9,
    ("ResNet-18", "maps288", ".20"): 15.0,
    ("VGG-16", "maps288", ".05"): 20.0,
    ("ResNet-18", "basis288", "1:16"): 17.9,
    ("ResNet-18", "basis288", "3:16"): 15.0,
    ("ResNet-18", "basis288", "4:16"): 15.0,
    ("VGG-16", "basis288", "1:16"): 20.0,
    ("ResNet-18", "basis252", "1:14"): 17.9,
    ("ResNet-18", "basis252", "3:14"): 15.0,
    ("VGG-16", "basis252", "1:14"): 20.0,
}
MULTIPLIERS_BUSY_TARGET = 0.90
#: Bits of the coefficients in memory / bits of the plain two-level maps (`golden.basis.encoded_bits`).
ENCODING_TARGET = 1.15


def is_decomposed(layer):
    """Whether a layer of `NETWORKS` is a 3 x 3 convolution of more than 3 channels."""
    return layer[3] == 3 and layer[1] > 3


def coefficients(rng, *, channels, outputs, form, group):
    """int8 [outputs, channels, COUNT]: random signs at random places of density ``form``, or ``form`` in each group."""
    shape = (outputs, COUNT, channels)
    signs = rng.choice([-1, 1], shape)
    if isinstance(form, int):
        width = -(-channels // group) * group
        places = rng.random((outputs, COUNT, width // group, group))
        keep = (np.argsort(np.argsort(places, axis=-1), axis=-1) < form).reshape(outputs, COUNT, width)[..., :channels]
    else:
        keep = rng.random(shape) < form
    return (signs * keep).transpose(0, 2, 1).astype(np.int8)


def network(rng, layer, *, form=None, group=16):
    """A network of one convolution: decomposed with coefficients of ``form``, or dense."""
    size, channels, outputs, kernel, stride, _ = layer
    pad = kernel // 2
    out = (size + 2 * pad - kernel) // stride + 1
    common = {
        "name": "conv",
        "input": "x",
        "output": "y",
        "stride": (stride, stride),
        "pads": (pad,) * 4,
        "requantization": Requantization(
            bias=rng.integers(-1000, 1000, outputs).astype(np.int32),
            multiplier=np.full(outputs, 40000, np.uint16),
            shift=np.full(outputs, 8, np.uint8),
            zero_point=-3,
        ),
    }
    if form is None:
        weights = rng.integers(-127, 128, (outputs, kernel, kernel, channels)).astype(np.int8)
        made = Convolution(terms=(Term(pattern=Pattern(1, 1), values=weights),), **common)
    else:
        made = BasisConvolution(
            basis=rng.integers(-127, 128, (COUNT, kernel, kernel)).astype(np.int8),
            coefficients=coefficients(rng, channels=channels, outputs=outputs, form=form, group=group),
            format=f"basis:{COUNT}",
            **common,
        )
    tensors = {
        "x": Tensor(name="x", height=size, width=size, channels=channels, scale=0.02, zero_point=-128),
        "y": Tensor(name="y", height=out, width=out, channels=outputs, scale=0.05, zero_point=-3),
    }
    return Network(name=f"conv{size}x{channels}", input="x", output="y", tensors=tensors, layers=(made,))


def image(rng, layer):
    """int8 activations behind a ReLU: half of them at the zero point."""
    size, channels = layer[:2]
    x = rng.integers(-128, 128, (1, size, size, channels))
    x[rng.random(x.shape) < 0.5] = -128
    return x.astype(np.int8)


def baseline(config):
    """nm256 with the bus and the memories of ``config``."""
    bits = config.bus.data_bits
    return replace(configs.load("nm256"), name=f"nm256_bus{bits}", bus=config.bus, memory=config.memory)


def measure(config, net, x):
    """(cycles, cycles in which the multipliers worked, saturations, bit-exact) of one image on the RTL."""
    report = cosimulate(net, config, x, latency=LATENCY_CYCLES, compare_dense=False)
    return report.cycles, report.counters["EXECUTE_ISSUE"], report.counters["SATURATIONS"], report.bit_exact


def encoding(config, form):
    """(bits of the coefficients of ResNet-18's decomposed layers in the accelerator's memory, zeros for outputs that do
    not fill the blocks included; the same over the bits of two-level maps of these coefficients without padding)."""
    b, used, plain = config.basis, 0, 0
    rng = np.random.default_rng(1)
    for layer in filter(is_decomposed, RESNET18):
        channels, outputs, count = layer[1], layer[2], layer[5]
        values = coefficients(rng, channels=channels, outputs=outputs, form=form, group=b.blocks)
        plain += count * encoded_bits(values)
        groups, passes = -(-channels // b.blocks), -(-outputs // b.blocks)
        placed = np.zeros((passes * b.blocks, COUNT, groups, b.group), np.int8)
        wide = np.zeros((outputs, COUNT, groups * b.blocks), np.int8)
        wide[..., :channels] = values.transpose(0, 2, 1)
        placed[:outputs, ..., : b.blocks] = wide.reshape(outputs, COUNT, groups, b.blocks)
        for part in placed.reshape(passes, b.blocks, COUNT, groups, b.group):
            if b.coefficients == "maps":
                packed = pack_maps(part, config)
            else:
                packed = pack_series(part, config, cheapest_series(form, groups, config))
            used += count * 8 * len(packed)
    return used, used / plain


def compare(row, rng, facts):
    """Speed-ups of `NETWORKS` on every preset of `FORMS`. ``row``: writes one figure with its target."""
    dense_cycles = {}
    for preset, forms in FORMS.items():
        config = configs.load(preset)
        plain = baseline(config)
        scale = plain.multipliers / config.multipliers
        for form, value in forms.items():
            bits, ratio = encoding(config, value)
            row(
                f"{preset} {form}: coefficients / two-level maps",
                round(ratio, 3),
                ENCODING_TARGET,
                ratio <= ENCODING_TARGET,
                f"{bits / 1e6:.2f} Mbit",
            )
            for name, layers in NETWORKS.items():
                if (name, preset, form) not in TARGETS:
                    continue
                sums, exact, details = {"dense": [0, 0], "basis": [0, 0]}, True, []
                for layer in layers:
                    key = (plain.digest, layer[:5])
                    x = image(rng, layer)
                    if key not in dense_cycles:
                        dense_cycles[key] = measure(plain, network(rng, layer), x)
                    d_cycles, _, _, d_exact = dense_cycles[key]
                    use = value if is_decomposed(layer) else None
                    cycles, busy, saturated, b_exact = measure(
                        config, network(rng, layer, form=use, group=min(config.basis.group, config.basis.blocks)), x
                    )
                    exact &= d_exact and b_exact
                    for which, spent in (("dense", d_cycles), ("basis", cycles)):
                        sums[which][0] += layer[5] * spent * is_decomposed(layer)
                        sums[which][1] += layer[5] * spent
                    details.append(
                        {
                            "layer": layer,
                            "dense_cycles": d_cycles,
                            "cycles": cycles,
                            "multipliers_busy": round(busy / cycles, 4),
                            "saturations": saturated,
                        }
                    )
                facts[f"{name} {preset} {form}"] = details
                target = TARGETS[name, preset, form]
                ratio, whole = (scale * sums["dense"][k] / sums["basis"][k] for k in range(2))
                row(
                    f"{name} 3x3, {preset} {form}: dense / basis cycles",
                    round(ratio, 2),
                    target,
                    ratio >= target,
                    f"{sums['basis'][0]:,} cyc",
                    exact,
                )
                row(
                    f"{name} all layers, {preset} {form}: dense / basis",
                    round(whole, 2),
                    None,
                    True,
                    f"{sums['basis'][1]:,} cyc",
                    exact,
                )
                wide = [d for d in details if is_decomposed(d["layer"]) and d["layer"][1] >= 128]
                if form in (".05", "1:16", "1:14"):
                    worst = min(d["multipliers_busy"] for d in wide)
                    row(
                        f"{name} {preset} {form}: multipliers busy, worst C >= 128",
                        round(worst, 3),
                        MULTIPLIERS_BUSY_TARGET,
                        worst >= MULTIPLIERS_BUSY_TARGET,
                        "ratio",
                        exact,
                    )
