"""Co-simulation: a compressed network on the generated RTL, every element compared with the golden model, and figures.

One run is ``batch`` images through one program, from the start register to the interrupt. Cycles and bytes in a report
are those of the first run; elements and mismatches are counted over all runs.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import sha256
import json
import math
import threading
import time

import numpy as np

from compress import engine
from compress.network import BasisConvolution, Convolution, Term
from gen import emit
from golden import cycles
from golden.machine import Machine
from lowering.basis import uses_basis
from lowering.lower import lower
from sim_tests.bench import build
from sim_tests.bench.simulation import SimulationError, simulate
from spec.config import Pattern
from spec.errors import InputError

REPORT_VERSION = 1
#: State numbers of the trace output ``execute``.
EXECUTE_STATES = ("idle", "issue", "wait_load", "wait_store", "wait_weights", "wait_coefficients")


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """Figures of one layer; cycles, MACs and bytes of the first run."""

    name: str
    op: str
    format: str
    #: Multiplications of the dense layer; 0 for pooling and addition.
    macs_dense: int
    #: Multipliers of the engine that ran the layer.
    multipliers: int
    #: Multiplications that they performed (cycles in which they worked x multipliers).
    macs_executed: int
    #: Of these, with a non-zero stored weight; the rest are idle slots.
    macs_nonzero: int
    cycles: int
    #: Of the cycle model; None where there is none.
    cycles_predicted: int | None
    #: Cycles of the same layer run dense on the same RTL; None where it was not measured.
    cycles_dense: int | None
    utilization: float
    utilization_nonzero: float
    dram_bytes_read: int
    dram_bytes_written: int
    #: Output elements compared, and how many differ, over all runs.
    elements: int
    mismatches: int
    first_mismatch: str | None
    #: Signal to quantisation noise against the float network; None without one.
    sqnr_db: float | None
    #: Cycles of the execute unit by cause.
    execute_cycles: dict


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a co-simulation found."""

    network: str
    config_name: str
    config_digest: str
    images: int
    batch: int
    layers: tuple[LayerReport, ...]
    #: Bytes outside the outputs (weights, program, inputs) that changed, and padding channels that differ.
    stray_bytes: int
    cycles: int
    counters: dict
    wall_seconds: float
    simulated_cycles_per_second: float
    memory: dict
    #: Output of the network or of the last layer, int8 [images, height, width, channels], as the RTL computed it.
    output: np.ndarray = field(repr=False)
    versions: dict = field(default_factory=dict)
    accuracy: dict = field(default_factory=dict)
    notes: tuple = ()

    @property
    def bit_exact(self):
        """Whether every element of every layer and run is equal, and nothing else was written."""
        return (
            bool(self.layers)
            and not self.stray_bytes
            and all(r.elements > 0 and r.mismatches == 0 for r in self.layers)
        )

    def totals(self):
        """Sums over the layers, and what follows from them."""

        def total(name):
            values = [getattr(r, name) for r in self.layers]
            return None if None in values else sum(values)

        names = (
            "macs_dense",
            "macs_executed",
            "macs_nonzero",
            "cycles",
            "cycles_predicted",
            "cycles_dense",
            "dram_bytes_read",
            "dram_bytes_written",
            "elements",
            "mismatches",
        )
        out = {name: total(name) for name in names}
        possible = sum(r.multipliers * r.cycles for r in self.layers)
        out["utilization"] = out["macs_executed"] / possible
        out["utilization_nonzero"] = out["macs_nonzero"] / possible
        out["speedup_vs_dense"] = out["cycles_dense"] / out["cycles"] if out["cycles_dense"] else None
        out["cycles_with_start_and_end"] = self.cycles
        return out

    def to_dict(self):
        """Plain JSON values, the report's file form."""
        return {
            "report_version": REPORT_VERSION,
            "network": self.network,
            "config_name": self.config_name,
            "config_digest": self.config_digest,
            "bit_exact": self.bit_exact,
            "images": self.images,
            "batch": self.batch,
            "wall_seconds": self.wall_seconds,
            "simulated_cycles_per_second": self.simulated_cycles_per_second,
            "layers": [vars(r) for r in self.layers],
            "totals": self.totals(),
            "stray_bytes": self.stray_bytes,
            "counters": self.counters,
            "memory": self.memory,
            "accuracy": self.accuracy,
            "versions": self.versions,
            "notes": list(self.notes),
        }


def dense_version(network):
    """The same network with every weight series as one dense term: the baseline of ``speedup_vs_dense``."""

    def dense(layer):
        if not isinstance(layer, (BasisConvolution, Convolution)):
            return layer
        # A series of int8 terms may sum to more than int8; the baseline's cycles do not depend on the values.
        values = np.clip(layer.effective_weights(), -128, 127).astype(np.int8)
        terms = (Term(pattern=Pattern(1, 1), values=values),)
        if isinstance(layer, Convolution):
            return replace(layer, terms=terms, format="dense")
        return Convolution(name=layer.name, input=layer.input, output=layer.output, residual=layer.residual,
                           requantization=layer.requantization, terms=terms, stride=layer.stride, pads=layer.pads,
                           dilation=layer.dilation)

    return replace(network, layers=tuple(dense(layer) for layer in network.layers))


def is_dense(network, names=None):
    """Whether every weight tensor (of the named layers) is one dense term."""
    return all(
        isinstance(layer, Convolution) and len(layer.terms) == 1 and layer.terms[0].dense
        for layer in network.layers
        if isinstance(layer, (BasisConvolution, Convolution)) and (names is None or layer.name in names)
    )


class _Compared:
    """Element comparison of one layer over all runs."""

    def __init__(self):
        self.elements, self.mismatches, self.first = 0, 0, None

    def add(self, got, want, first_image):
        if got.shape != want.shape:
            raise SimulationError(f"output has shape {got.shape}, expected {want.shape}")
        self.elements += want.size
        wrong = np.argwhere(got != want)
        self.mismatches += len(wrong)
        if len(wrong) and self.first is None:
            at = tuple(int(n) for n in wrong[0])
            self.first = (
                f"image {first_image + at[0]}, row {at[1]}, column {at[2]}, channel {at[3]}: "
                f"got {got[at]}, expected {want[at]}"
            )


def _nonzero_macs(layer, config, tensors, batch):
    """Products with a non-zero stored weight; of a decomposed layer those with the basis, the only ones it has.

    The basis engine leaves out kernel rows beside the image, the structured engine multiplies them with padding.
    """
    if isinstance(layer, BasisConvolution):
        per_row = np.count_nonzero(layer.basis, axis=(0, 2)) * layer.outputs
    elif isinstance(layer, Convolution):
        per_row = sum(np.count_nonzero(t.values, axis=(0, 2, 3)) for t in layer.terms)
    else:
        return 0
    source, out = tensors[layer.input], tensors[layer.output]
    rows = np.full(len(per_row), out.height)
    if uses_basis(layer, config):
        top = np.arange(out.height) * layer.stride[0] - layer.pads[0]
        at = top[:, None] + np.arange(len(per_row)) * layer.dilation[0]
        rows = ((at >= 0) & (at < source.height)).sum(axis=0)
    return int((per_row * rows).sum()) * out.width * batch


def _sqnr_db(real, quantized, tensor):
    """10 log10 of signal power over error power; None where the signal is all zero, 999 where there is no error."""
    error = float(np.square(tensor.scale * (quantized.astype(np.float64) - tensor.zero_point) - real).sum())
    signal = float(np.square(np.asarray(real, np.float64)).sum())
    if not signal:
        return None
    return round(10 * math.log10(signal / error), 2) if error else 999.0


def _outside(lowered, before, after):
    """Bytes outside the output tensors that a run changed."""
    changed = before != after
    for name in lowered.outputs:
        place = lowered.tensors[name]
        changed[place.offset : place.offset + place.bytes] = False
    return int(np.count_nonzero(changed))


def _predictions(lowered, latency, machine):
    """Cycles of each layer from the cycle model; ``machine`` ran the program: it knows what cycles owe to the data."""
    memory = lowered.new_memory()
    words = cycles.program_words(lowered.config, memory, lowered.program_offset, lowered.instruction_count)
    predicted = cycles.predict(
        lowered.config, words, memory, memory_latency_cycles=latency, program_offset=lowered.program_offset,
        word_cycles=machine.basis_word_cycles, saturations=machine.counts["saturations"])
    return _differences(end for _, end in predicted.marks)


def prepare(config, *, waves=False, progress=None):
    """Built simulator of ``config``: RTL generated and verilated, each once per digest."""
    text = build.rtl(config, progress=progress)
    return build.simulator(text, emit.header_text(config), emit.top_name(config), waves=waves, progress=progress)


def _cached_cycles(simulator, lowered, options, run):
    """Cycles per layer of a run whose values do not matter, from the cache under build/ if it has been run before."""
    key = sha256(lowered.image.tobytes() + json.dumps([str(simulator.parent.name), options], sort_keys=True).encode())
    path = build.build_root() / "dense-cache" / f"{key.hexdigest()[:24]}.json"
    if path.exists():
        return json.loads(path.read_text())
    measured = run()
    emit.write_files({path.name: json.dumps(measured)}, path.parent)
    return measured


def _differences(ends):
    ends = list(ends)
    return [end - start for start, end in zip([0, *ends], ends)]


def _layer_cycles(result):
    return _differences(m["cycle"] for m in result.marks)


def cosimulate(
    network,
    config,
    inputs,
    *,
    layers=None,
    batch=1,
    latency=16,
    stall=0.0,
    seed=1,
    waves=None,
    floats=None,
    compare_dense=True,
    workers=2,
    progress=None,
):
    """Run ``inputs`` through a network on the RTL of ``config`` and compare every element of every layer.

    Args:
        network: `compress.network.Network`. config: `spec.config.Config`.
        inputs: int8 [images, height, width, channels] of the network's input (`compress.engine.quantize_input`).
        layers: names of the layers to run, each from golden inputs where none of the others makes them; None for all.
        batch: images per run; the last run is filled up by repeating its last image.
        latency, stall, seed: of the memory, see `sim_tests.bench.simulation.simulate`.
        waves: FST file of the first run (a separate build).
        floats: tensor name -> float array [images, …] of the float network, for ``sqnr_db``.
        compare_dense: also measure the dense version of the layers on the same RTL.
        workers: simulator processes at a time.
        progress: called with (message, fraction or None).
    Returns: `Report`.
    Raises: InputError for bad input; SimulationError if a run breaks a bus rule, ends in an error or does not end;
        BuildError, ToolMissing.
    """
    if not len(inputs):
        raise InputError("must hold at least one image", field="input data")
    began = time.monotonic()
    tell = progress or (lambda message, fraction: None)
    tell("lowering", None)
    lowered = lower(network, config, batch=batch, layers=layers)     # before the build, which may take minutes
    simulator = prepare(config, waves=bool(waves), progress=progress)
    starts = list(range(0, len(inputs), batch))
    memory = {
        "latency_cycles": latency,
        "stall": stall,
        "seed": seed,
        "data_bits": config.bus.data_bits,
        "multipliers": config.multipliers,
        "bytes": lowered.memory_bytes,
    }
    compared = {info.name: _Compared() for info in lowered.layers}
    first, stray, outputs, done, lock = None, 0, {}, 0, threading.Lock()
    cycles_estimate = sum(info.macs_executed for info in lowered.layers) / config.multipliers * 1.1 + 1000

    def one(start):
        nonlocal first, stray, done
        chosen = inputs[start : start + batch]
        count = len(chosen)
        if count < batch:
            chosen = np.concatenate([chosen, np.repeat(chosen[-1:], batch - count, axis=0)])
        golden = engine.run(network, chosen, keep=True)
        before = lowered.new_memory()
        for name in lowered.inputs:
            lowered.write_tensor(before, name, golden[name])
        share = (
            (lambda c, mark: tell("simulating", min(0.99, (done + c / cycles_estimate) / len(starts))))
            if start == 0 or len(starts) > 1
            else None
        )
        result = simulate(
            simulator,
            before,
            program=lowered.program_offset,
            count=lowered.instruction_count,
            latency=latency,
            stall=stall,
            seed=seed + start,
            waves=waves if start == 0 else None,
            progress=share,
        ).check()
        marks = [m["mark"] for m in result.marks]
        if marks != [info.mark for info in lowered.layers]:
            raise SimulationError(f"layers ended in the order {marks}, expected {[i.mark for i in lowered.layers]}")
        want = None
        if start == 0:  # the machine also says what padding channels hold
            want = before.copy()
            machine = Machine(config, want, hazards=False, record_cycles=True)
            machine.run(lowered.program_offset, lowered.instruction_count)
        with lock:
            for info in lowered.layers:
                compared[info.name].add(
                    lowered.read_tensor(result.memory, info.output)[:count], golden[info.output][:count], start
                )
            stray += _outside(lowered, before, result.memory)
            if want is not None:
                stray += sum(
                    int(
                        np.count_nonzero(
                            lowered.read_tensor(result.memory, name, padded=True)
                            != lowered.read_tensor(want, name, padded=True)
                        )
                    )
                    for name in lowered.outputs
                ) - sum(c.mismatches for c in compared.values())
                first = result, golden, machine
            outputs[start] = lowered.read_tensor(result.memory, lowered.outputs[-1])[:count]
            done += 1
            tell("simulating", done / len(starts))
        return result.simulated_cycles, result.wall_seconds

    one_first = one(starts[0])
    with ThreadPoolExecutor(max_workers=workers) as pool:
        speeds = [one_first, *pool.map(one, starts[1:])]
    result, golden, machine = first

    spent = _layer_cycles(result)
    dense_cycles = [None] * len(spent)
    if compare_dense and is_dense(network, layers):
        dense_cycles = spent
    elif compare_dense:
        tell("simulating the dense version", None)
        dense = lower(dense_version(network), config, batch=batch, layers=layers)

        def run_dense():
            before = dense.new_memory()
            for name in dense.inputs:
                dense.write_tensor(before, name, golden[name])
            return _layer_cycles(
                simulate(
                    simulator,
                    before,
                    program=dense.program_offset,
                    count=dense.instruction_count,
                    latency=latency,
                    stall=stall,
                    seed=seed,
                    progress=lambda c, mark: tell("simulating the dense version", None),
                ).check()
            )

        dense_cycles = _cached_cycles(simulator, dense, [latency, stall, seed], run_dense)

    by_name = {layer.name: layer for layer in network.layers}
    beat_bytes = config.bus.data_bits // 8
    # The model knows a memory that never pauses.
    predictions = [None] * len(spent) if stall else _predictions(lowered, latency, machine)
    rows = []
    for info, mark, n, n_dense, predicted in zip(
        lowered.layers, result.marks, spent, dense_cycles, predictions
    ):
        c, nonzero = compared[info.name], _nonzero_macs(by_name[info.name], config, network.tensors, batch)
        executed = mark["execute"][1] * info.multipliers
        sqnr = None
        if floats and info.output in floats:
            sqnr = _sqnr_db(
                floats[info.output][:batch], golden[info.output][: len(inputs[:batch])], network.tensors[info.output]
            )
        rows.append(
            LayerReport(
                name=info.name,
                op=info.op,
                format=info.format,
                macs_dense=info.macs_dense,
                multipliers=info.multipliers,
                macs_executed=executed,
                macs_nonzero=nonzero,
                cycles=n,
                cycles_predicted=predicted,
                cycles_dense=n_dense,
                utilization=executed / (info.multipliers * n),
                utilization_nonzero=nonzero / (info.multipliers * n),
                dram_bytes_read=mark["read_beats"] * beat_bytes,
                dram_bytes_written=mark["write_beats"] * beat_bytes,
                elements=c.elements,
                mismatches=c.mismatches,
                first_mismatch=c.first,
                sqnr_db=sqnr,
                execute_cycles=dict(zip(EXECUTE_STATES, mark["execute"])),
            )
        )
    wall = sum(seconds for _, seconds in speeds)
    return Report(
        network=network.name,
        config_name=config.name,
        config_digest=config.digest,
        images=len(inputs),
        batch=batch,
        layers=tuple(rows),
        stray_bytes=stray,
        cycles=result.cycles,
        counters=result.registers,
        wall_seconds=time.monotonic() - began,
        simulated_cycles_per_second=sum(n for n, _ in speeds) / max(wall, 1e-9),
        memory=memory,
        output=np.concatenate([outputs[s] for s in starts]),
        versions=emit.versions() | {"verilator": build.verilator_version(), "numpy": np.__version__},
    )
