"""`make bench`: the figures that the README quotes, measured on the RTL, beside their targets.

Convolutions have seeded random weights and data and are compared element by element like any co-simulation; cycles
reach from the start of the program to the interrupt, all operands fetched from a memory of 16 cycles latency.
"""

import argparse
import json
from pathlib import Path
import shutil
import sys
import time

import numpy as np

from compress.network import Convolution, Network, Requantization, Tensor, Term
from gen import emit, synth
from golden.structured import tasd_series
from lowering.lower import lower
from sim_tests.bench import build, decomposed, decomposition
from sim_tests.bench.cosim import cosimulate, prepare
from sim_tests.bench.simulation import simulate
from spec import config as configs
from spec.config import Pattern

LATENCY_CYCLES = 16
SERIES = {"dense": (), "2:4": ("2:4",), "1:4": ("1:4",), "4:8+1:8": ("4:8", "1:8")}
#: Cycles that the convolution 8 x 8 x 64 -> 64, 3 x 3, pad 1 must not exceed, by preset and format.
TARGETS = {
    "nm64": {"dense": 38294, "2:4": 19900, "1:4": 10300, "4:8+1:8": 24800},
    "nm256": {"dense": 9695, "2:4": 5087, "1:4": 2700, "4:8+1:8": 6300},
}
#: 3 x 3 convolutions of ResNet-18 at ImageNet size: name -> (input size, input channels, outputs, stride).
RESNET18 = {
    "56x56x64": (56, 64, 64, 1),
    "56x56x64/2 -> 128": (56, 64, 128, 2),
    "28x28x128": (28, 128, 128, 1),
    "28x28x128/2 -> 256": (28, 128, 256, 2),
    "14x14x256": (14, 256, 256, 1),
    "14x14x256/2 -> 512": (14, 256, 512, 2),
    "7x7x512": (7, 512, 512, 1),
}
UTILIZATION_TARGET, SPEED_TARGET, AREA_TARGET = 0.95, 0.5, 1.20


def convolution(rng, *, size, channels, outputs, stride=1, kernel=3, patterns=()):
    """A network of one padded convolution with full-range random weights cut to a series of patterns."""
    weights = rng.integers(-127, 128, (outputs, kernel, kernel, channels))
    chosen = tuple(map(Pattern.parse, patterns))
    if chosen:
        values, _ = tasd_series(weights, chosen)
        terms = tuple(Term(pattern=p, values=np.asarray(v).astype(np.int8)) for p, v in zip(chosen, values))
    else:
        terms = (Term(pattern=Pattern(1, 1), values=weights.astype(np.int8)),)
    pad = kernel // 2
    out = (size + 2 * pad - kernel) // stride + 1
    layer = Convolution(
        name="conv",
        input="x",
        output="y",
        terms=terms,
        stride=(stride, stride),
        pads=(pad,) * 4,
        format="+".join(patterns) or "dense",
        requantization=Requantization(
            bias=rng.integers(-1000, 1000, outputs).astype(np.int32),
            multiplier=np.full(outputs, 40000, np.uint16),
            shift=np.full(outputs, 12, np.uint8),
            zero_point=-3,
        ),
    )
    tensors = {
        "x": Tensor(name="x", height=size, width=size, channels=channels, scale=0.02, zero_point=5),
        "y": Tensor(name="y", height=out, width=out, channels=outputs, scale=0.05, zero_point=-3),
    }
    return Network(name=f"conv{size}x{channels}", input="x", output="y", tensors=tensors, layers=(layer,))


def measure(config, network, rng):
    """(cycles from start to interrupt, layer report, bit_exact) of one random image."""
    t = network.tensors[network.input]
    x = rng.integers(-128, 128, (1, *t.shape), np.int8)
    report = cosimulate(network, config, x, latency=LATENCY_CYCLES, compare_dense=False)
    return report.cycles, report.layers[0], report.bit_exact


def _row(rows, name, value, target, good, unit, exact=True):
    """Note and print a figure; ``target`` None: one without a target, which is only wrong if the run is not exact."""
    good = good and exact
    rows.append({"name": name, "value": value, "target": target, "reached": good, "unit": unit, "bit_exact": exact})
    shown = f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"
    verdict = "reached" if good else "NOT REACHED"
    judged = f"target {target!s:>10}  {verdict}" if target is not None else "" if exact else "NOT EXACT"
    print(f"{name:<56} {shown:>14} {unit:<12} {judged}", flush=True)


def small_convolutions(rows, rng):
    """The convolution 8 x 8 x 64 -> 64."""
    for preset, targets in TARGETS.items():
        config = configs.load(preset)
        for form, target in targets.items():
            cycles, _, exact = measure(
                config, convolution(rng, size=8, channels=64, outputs=64, patterns=SERIES[form]), rng
            )
            _row(rows, f"8x8x64->64 3x3 {form} on {preset}", cycles, target, cycles <= target, "cycles", exact)


def resnet_convolutions(rows, rng, forms=("dense", "2:4")):
    """Utilization on ResNet-18's 3 x 3 convolutions with 256 multipliers."""
    config = configs.load("nm256")
    for name, (size, channels, outputs, stride) in RESNET18.items():
        for form in forms:
            net = convolution(rng, size=size, channels=channels, outputs=outputs, stride=stride, patterns=SERIES[form])
            cycles, layer, exact = measure(config, net, rng)
            needed = layer.macs_dense * (sum(Pattern.parse(p).density for p in SERIES[form]) or 1)
            used = needed / (config.structured.multipliers * cycles)
            _row(
                rows,
                f"ResNet-18 {name} {form}: utilization",
                round(used, 4),
                UTILIZATION_TARGET,
                used >= UTILIZATION_TARGET,
                f"{cycles} cyc",
                exact,
            )
            if name == "28x28x128" and form == "dense":
                ideal = layer.macs_dense // config.structured.multipliers
                _row(
                    rows,
                    "ResNet-18 28x28x128 dense: cycles / ideal",
                    round(cycles / ideal, 4),
                    1.03,
                    cycles <= 1.03 * ideal,
                    "ratio",
                    exact,
                )


def flow(rows, rng):
    """Times of generation and build, and the speed of the simulation against the design alone."""
    config = configs.load("nm256")
    began = time.monotonic()
    text = emit.rtl_text(config)
    _row(rows, "RTL of nm256", round(time.monotonic() - began, 2), 10, time.monotonic() - began <= 10, "s")
    stamp = f"// built for the bench at {time.time_ns()}\n"  # another digest: the build is really made
    began = time.monotonic()
    program = build.simulator(stamp + text, emit.header_text(config), emit.top_name(config))
    seconds = time.monotonic() - began
    shutil.rmtree(program.parent)
    _row(rows, "Verilator build of nm256", round(seconds, 1), 90, seconds <= 90, "s")

    net = convolution(rng, size=28, channels=128, outputs=128, patterns=SERIES["2:4"])
    lowered = lower(net, config)
    memory = lowered.new_memory()
    lowered.write_tensor(memory, "x", rng.integers(-128, 128, (1, *net.tensors["x"].shape), np.int8))
    job = {"program": lowered.program_offset, "count": lowered.instruction_count, "latency": LATENCY_CYCLES}
    plain = simulate(prepare(config), memory, **job).check()
    timed = simulate(prepare(config), memory, profile=True, **job).check()
    speed, bare = plain.simulated_cycles / plain.wall_seconds, timed.simulated_cycles / timed.eval_seconds
    _row(
        rows,
        "simulation speed / bare loop around the same model",
        round(speed / bare, 3),
        SPEED_TARGET,
        speed / bare >= SPEED_TARGET,
        f"{speed:,.0f}/s",
    )


def area(rows):
    """The element with N:M selection against the dense one, in generic gates."""
    result = synth.report(configs.load("nm256"))
    _row(
        rows,
        "N:8 element / dense element, Yosys cells",
        round(result["pe_ratio_cells"], 3),
        AREA_TARGET,
        result["pe_ratio_cells"] <= AREA_TARGET,
        "ratio",
    )
    return {key: result[key] for key in ("parts", "pe_ratio_equivalents")}


#: Parts of the bench by name.
PARTS = ("area", "small", "flow", "resnet", "basis", "decomposition")


def main(argv=None):
    """Run the bench; exit status 0 whatever the targets say, since figures are results, but 1 if a run is not exact."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--json", default="build/bench.json", metavar="F", help="file for the figures")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part (may be repeated)")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and data (1)")
    args = parser.parse_args(argv)
    rng, rows, parts = np.random.default_rng(args.seed), [], args.part or PARTS
    facts = {
        "seed": args.seed,
        "latency_cycles": LATENCY_CYCLES,
        "verilator": build.verilator_version(),
    } | emit.versions()
    if "area" in parts:
        facts["area"] = area(rows)
    if "small" in parts:
        small_convolutions(rows, rng)
    if "flow" in parts:
        flow(rows, rng)
    if "resnet" in parts:
        resnet_convolutions(rows, rng)
    if "basis" in parts:
        facts["basis"] = {}
        decomposed.compare(lambda *figure: _row(rows, *figure), rng, facts["basis"])
    if "decomposition" in parts:
        seconds = decomposition.seconds(decomposition.measure(decomposition.resnet18(), rng))
        target = decomposition.TARGET_SECONDS
        _row(rows, "TT-SVD and basis of all ResNet-18 layers, one core", seconds, target, seconds <= target, "s")
    path = Path(args.json)
    emit.write_files({path.name: json.dumps({"figures": rows, "facts": facts}, indent=1) + "\n"}, path.parent)
    judged = [r for r in rows if r["target"] is not None]
    print(f"{sum(r['reached'] for r in judged)} of {len(judged)} targets reached; figures in {path}")
    return int(not all(r["bit_exact"] for r in rows))


if __name__ == "__main__":
    sys.exit(main())
