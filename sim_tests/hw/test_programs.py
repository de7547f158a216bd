"""Programs on the whole accelerator against the machine: wrong ones, and random networks lowered to random configs."""

from dataclasses import replace
import os

import numpy as np
import pytest

from lowering import lower
from sim_tests.hw.configs import CONFIGS, TINY
from sim_tests.hw.harness import simulator_of, verdict
from sim_tests.hw.programs import LittleProgram
from sim_tests.lowering.random_layers import random_network
from spec.derive import TOKEN_BITS, Sizes
from spec.errors import InputError
from spec.isa import VERSION, Opcode, encode

LIMIT = (1 << TOKEN_BITS) - 1
HEADER = encode(Opcode.HEADER, digest=Sizes(TINY).digest_value, version=VERSION)
FILL = dict(rows=1, blocks=1)
END = encode(Opcode.END)


def wrong_programs():
    """Name -> (instructions, outcome)."""
    pushes = [encode(Opcode.FILL, **FILL, push_execute=1, push_store=n % 2) for n in range(LIMIT)]
    waiting = {
        "load for store": encode(Opcode.FILL, **FILL, wait_store=1),
        "load for execute": encode(Opcode.FILL, **FILL, wait_execute=1),
        "execute for load": encode(Opcode.EXECUTE, rows=1, cols=1, steps=1, wait_load=1),
        "store for execute": encode(Opcode.STORE, rows=1, cols=1, wait_execute=1),
        "store for load": encode(Opcode.STORE, rows=1, cols=1, wait_load=1),
    }
    cases = {
        "as many tokens as fit": ([*pushes, END], "same memory"),
        "one token too many": ([*pushes, encode(Opcode.FILL, **FILL, push_execute=1), END], "same error"),
        "nothing at all": ([END], "same memory"),
        "no END": ([encode(Opcode.FILL, **FILL)], "same error"),
        "barriers alone": ([encode(Opcode.BARRIER, mark=n) for n in range(9)] + [END], "same memory"),
    }
    for name, word in waiting.items():
        cases[f"deadlock: {name}"] = [word, END], "same error"
        cases[f"deadlock before BARRIER: {name}"] = [word, encode(Opcode.BARRIER), END], "same error"
        # the units work on while one waits for ever, so the watchdog barks when they are done
        cases[f"deadlock, then work: {name}"] = [word, *[encode(Opcode.FILL, **FILL)] * 20, END], "same error"
    return cases


@pytest.fixture(scope="module")
def tiny():
    return simulator_of(TINY)


@pytest.mark.parametrize("name", wrong_programs())
def test_wrong_programs(tiny, name):
    words, outcome = wrong_programs()[name]
    words = [HEADER, *words]
    memory = np.frombuffer(b"".join(w.to_bytes(32, "little") for w in words) + bytes(64), np.uint8)
    for seed in range(2):
        assert verdict(tiny, TINY, memory, 0, len(words), seed, name) == outcome


def test_memory_window(tiny, rng):
    """A program at the very end of memory runs; one beat less of memory is an error."""
    little = LittleProgram(TINY, rng)
    size = little.program + little.count * little.stride
    assert verdict(tiny, TINY, little.memory[:size], little.program, little.count, 0, "fits") == "same memory"
    assert (
        verdict(tiny, TINY, little.memory[: size - 8], little.program, little.count, 0, "one beat less") == "same error"
    )


#: Layers per configuration; a soak takes more.
LAYERS = 400 if os.environ.get("SUMMAND_SOAK") else 25


@pytest.mark.parametrize("name", ["tiny", "bus128", "groups", "block8"])
def test_random_layers(name, rng):
    """Layers of every kind, lowered; every byte of memory, under random latency and stalls."""
    config = CONFIGS[name]
    if name == "block8":  # its narrow accumulators are for other tests
        config = replace(config, structured=replace(config.structured, accumulator_bits=32))
    simulator, done = simulator_of(config), 0
    while done < LAYERS:
        network, what = random_network(rng, config.structured.block)
        try:
            lowered = lower(network, config, batch=int(rng.integers(1, 3)))
        except InputError:  # more than this configuration's buffers hold
            continue
        memory = lowered.new_memory()
        memory[lowered.image.size :] = rng.integers(0, 256, memory.size - lowered.image.size)
        for tensor in lowered.inputs:
            shape = (lowered.batch, *network.tensors[tensor].shape)
            lowered.write_tensor(memory, tensor, rng.integers(-128, 128, shape).astype(np.int8))
        stall, latency = (0.0, 0.2, 0.6)[done % 3], int(rng.choice([1, 3, 20, 200]))
        assert (
            verdict(
                simulator,
                config,
                memory,
                lowered.program_offset,
                lowered.instruction_count,
                done,
                f"{name} {what}",
                stall=stall,
                latency=latency,
            )
            == "same memory"
        ), what
        done += 1
