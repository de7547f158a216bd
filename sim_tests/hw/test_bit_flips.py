"""Every single-bit flip of a valid program: the machine's result, or an error from both; never a hang or stray write.

Where the machine cannot tell (it reports what hardware cannot see: unordered or never written data) the accelerator
must still end and keep the rules of the bus.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sim_tests.hw.harness import machine_says, simulator_of, verdict
from sim_tests.hw.programs import LittleProgram
from spec import isa
from spec.config import load

TINY = load("tiny")


@pytest.fixture(scope="module")
def simulator():
    return simulator_of(TINY)


def test_good_program(simulator, rng):
    little = LittleProgram(TINY, rng)
    want = machine_says(TINY, little.memory, little.program, little.count)
    assert isinstance(want, np.ndarray), want
    for at, size in little.outputs:
        assert np.count_nonzero(want[at : at + size + 8]) > size // 2, "the program computes something"
    for seed in range(4):
        assert verdict(simulator, TINY, little.memory, little.program, little.count, seed, "good") == "same memory"


def field_of(word, bit):
    """Name of the field that holds a bit."""
    opcode, _ = isa.decode(word)
    record, at = isa.INSTRUCTIONS[opcode], 0
    for field in record.fields:
        at += field.bits
        if bit < at:
            return f"{opcode.name}.{field.name}"
    raise AssertionError("an instruction has 256 bits")


def test_single_bit_flips(simulator, rng):
    little = LittleProgram(TINY, rng)
    seed = int(rng.integers(1000))

    def one(job):
        number, bit = job
        words = list(little.words)
        words[number] ^= 1 << bit
        name = f"instruction {number}, bit {bit} ({field_of(little.words[number], bit)})"
        return verdict(
            simulator, TINY, little.with_words(words), little.program, little.count, seed + number + bit, name
        )

    jobs = [(number, bit) for number in range(little.count) for bit in range(isa.INSTRUCTION_BITS)]
    with ThreadPoolExecutor(2) as pool:
        outcomes = Counter(pool.map(one, jobs))
    print(dict(outcomes))
    assert sum(outcomes.values()) == len(jobs)
    assert outcomes["same memory"] > 200 and outcomes["same error"] > 1000 and outcomes["not checkable: ends"] > 50


def test_step_table_flips(simulator, rng):
    """The same for every bit of the step table, in memory."""
    little = LittleProgram(TINY, rng)
    at, size = little.steps
    seed = int(rng.integers(1000))

    def one(bit):
        memory = little.memory.copy()
        memory[at + bit // 8] ^= 1 << bit % 8
        return verdict(simulator, TINY, memory, little.program, little.count, seed + bit, f"step table, bit {bit}")

    with ThreadPoolExecutor(2) as pool:
        outcomes = Counter(pool.map(one, range(8 * size)))
    print(dict(outcomes))
    assert sum(outcomes.values()) == 8 * size
    assert outcomes["same error"] > 50 and outcomes["same memory"] > 20
