"""Random networks on random configurations under random memory: RTL against the golden machine, byte for byte.

``python -m sim_tests.soak.networks --seed S [--networks N] [--config NAME]``. The seed decides everything. One
configuration is built; every network runs on it with its own latency, pauses and batch, starting from random memory
contents, and all of the memory afterwards must equal the machine's.
"""
import argparse
from dataclasses import replace
import os
import sys

import numpy as np

from compress.network import Network
from golden.machine import Machine
from lowering import lower
from sim_tests.bench.cosim import prepare
from sim_tests.bench.simulation import SimulationError, simulate
from sim_tests.lowering.networks import expected
from sim_tests.lowering.random_layers import random_network
from sim_tests.soak import PYTHON
from spec.config import Config, MemoryConfig, Pattern, StructuredConfig, load, presets
from spec.errors import InputError


def random_config(rng):
    """A small configuration, drawn until it is a legal one."""
    while True:
        def pick(*values):
            return values[int(rng.integers(len(values)))]      # noqa: B023 (used within this round only)
        block = pick(4, 4, 8)
        sparse = [Pattern(n, block) for n in (1, 2, 4) if n < block and rng.random() < 0.7]
        try:
            return Config(
                name="random",
                structured=StructuredConfig(
                    columns=block * pick(1, 2), slots=block * pick(1, 1, 2), block=block,
                    patterns=(*sparse, Pattern(block, block)), taps=pick(1, 2, 4), stream_blocks=pick(0, 0, 1, 2),
                    activation_bits=8, weight_bits=8, accumulator_depth=pick(4, 16, 32)),
                memory=MemoryConfig(activation_bytes=pick(2048, 4096, 16384), weight_bytes=pick(1024, 4096),
                                    residual_bytes=pick(64, 256, 1024), step_entries=pick(16, 32, 128),
                                    parameter_groups=pick(2, 4, 8)),
                bus=replace(load("tiny").bus, data_bits=pick(64, 128, 256), burst_beats=pick(1, 4, 8, 16),
                            address_bits=pick(32, 40), outstanding_reads=pick(1, 2, 5),
                            outstanding_writes=pick(1, 2, 5)),
                control=replace(load("tiny").control, queue_depth=pick(2, 4, 8), fetch_depth=pick(2, 4, 8)))
        except InputError:
            continue


def merged(parts):
    """One network of several independent ones: their layers run one after the other in one program."""
    layers, tensors = [], {}
    for n, part in enumerate(parts):
        def named(name, n=n):
            return None if name is None else f"{name}{n}"
        tensors |= {named(key): replace(t, name=named(key)) for key, t in part.tensors.items()}
        layers += [replace(layer, name=named(layer.name), input=named(layer.input), output=named(layer.output),
                           residual=named(layer.residual)) for layer in part.layers]
    return Network(name="random", input=layers[0].input, output=layers[-1].output, tensors=tensors,
                   layers=tuple(layers))


def one(simulator, config, rng):
    """Runs one random network; returns (elements compared, cycles), or None where the configuration refuses it."""
    count = int(rng.integers(1, 4))
    network = merged([random_network(rng, config.structured.block, largest=9)[0] for _ in range(count)])
    batch = int(rng.choice([1, 1, 2, 3]))
    try:
        lowered = lower(network, config, batch=batch)
    except InputError:
        return None
    memory = lowered.new_memory()
    memory[lowered.image.size:] = rng.integers(0, 256, memory.size - lowered.image.size)
    values = {}
    for name in lowered.inputs:
        values[name] = rng.integers(-128, 128, (batch, *network.tensors[name].shape)).astype(np.int8)
        lowered.write_tensor(memory, name, values[name])
    want = memory.copy()
    Machine(config, want).run(lowered.program_offset, lowered.instruction_count)
    result = simulate(simulator, memory, program=lowered.program_offset, count=lowered.instruction_count,
                      latency=int(rng.choice([1, 2, 7, 40, 300])), write_latency=int(rng.choice([1, 5, 90])),
                      stall=float(rng.choice([0.0, 0.0, 0.3, 0.7, 0.95])), seed=int(rng.integers(1 << 31))).check()
    wrong = np.flatnonzero(result.memory[:want.size] != want)
    assert wrong.size == 0, f"{wrong.size} of {want.size} bytes differ from the machine's, first at {wrong[0]:#x}"
    elements = 0
    for layer in network.layers:
        values[layer.output] = expected(layer, values, network.tensors)
        np.testing.assert_array_equal(lowered.read_tensor(result.memory, layer.output), values[layer.output],
                                      err_msg=f"layer {layer.name}")
        elements += values[layer.output].size
    return elements, result.cycles


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m sim_tests.soak.networks", description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--networks", type=int, default=40)
    parser.add_argument("--only", type=int, help="number of the one network to run")
    parser.add_argument("--config", choices=presets(), help="instead of a random one")
    args = parser.parse_args(argv)
    os.nice(10)
    config = load(args.config) if args.config else random_config(np.random.default_rng([args.seed]))
    simulator = prepare(config)
    ran = refused = elements = cycles = failed = 0
    for n in [args.only] if args.only is not None else range(args.networks):
        try:
            result = one(simulator, config, np.random.default_rng([args.seed, n]))
        except (AssertionError, SimulationError) as error:
            failed += 1
            again = f"--seed {args.seed} --only {n}" + (f" --config {args.config}" if args.config else "")
            print(f"network {n}: {error}\n  repeat with: {PYTHON} -m sim_tests.soak.networks {again}", flush=True)
            continue
        if result is None:
            refused += 1
        else:
            ran, elements, cycles = ran + 1, elements + result[0], cycles + result[1]
    print(f"networks, seed {args.seed}, {config.name} {config.digest}: {ran} equal, {failed} different, {refused} "
          f"refused by the configuration, {elements} elements, {cycles} cycles")
    return int(failed > 0 or ran == 0)


if __name__ == "__main__":
    sys.exit(main())
