"""Every single-bit flip of a valid program: the machine's result, or an error from both; never a hang, never a stray write.

Where the machine cannot tell (it reports what hardware cannot see: unordered or never written data) the accelerator
must still end and keep the rules of the bus.
"""
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gen import emit
from golden.machine import Machine, MachineError
from sim_tests.bench import build
from sim_tests.bench.simulation import simulate
from sim_tests.hw.programs import LittleProgram
from spec import isa
from spec.config import load
from spec.registers import Error

TINY = load("tiny")
#: Enough for the longest legal instruction of a flipped program to make progress, short enough to bark soon.
WATCHDOG = 3000
LIMIT = 3_000_000


@pytest.fixture(scope="module")
def simulator():
    text = build.rtl(TINY)
    return build.simulator(text, emit.header_text(TINY), emit.top_name(TINY))


def machine_says(memory, program, count):
    """(Error, address) or the memory after a good run."""
    memory = memory.copy()
    try:
        Machine(TINY, memory).run(program, count)
    except MachineError as error:
        return error.code, error.address
    return memory


def verdict(simulator, memory, program, count, seed, name):
    """Compare one run with the machine; returns the kind of outcome."""
    want = machine_says(memory, program, count)
    run = simulate(simulator, memory, program=program, count=count, watchdog=WATCHDOG, limit=LIMIT,
                   latency=1 + seed % 7, stall=(0.0, 0.3)[seed % 2], seed=seed + 1)
    assert run.finished, f"{name}: hangs"
    assert not run.protocol, f"{name}: {run.protocol}"
    status = run.registers["STATUS"]
    assert status == (0b0100 if run.error else 0b0010), f"{name}: STATUS {status:#x} with {run.error.name}"
    if isinstance(want, np.ndarray):
        assert run.error is Error.NONE, f"{name}: {run.error.name}, but the machine runs it"
        wrong = np.flatnonzero(run.memory != want)
        assert not len(wrong), f"{name}: {len(wrong)} bytes differ from the machine's, first at {wrong[0]:#x}"
        return "same memory"
    code, _ = want
    if code is Error.NONE:
        return "not checkable: error" if run.error else "not checkable: ends"
    assert run.error is not Error.NONE, f"{name}: ends well, but the machine says {code.name}"
    return "same error" if run.error is code else f"machine {code.name}, accelerator {run.error.name}"


def test_good_program(simulator, rng):
    little = LittleProgram(TINY, rng)
    want = machine_says(little.memory, little.program, little.count)
    assert isinstance(want, np.ndarray), want
    for at, size in little.outputs:
        assert np.count_nonzero(want[at:at + size + 8]) > size // 2, "the program computes something"
    for seed in range(4):
        assert verdict(simulator, little.memory, little.program, little.count, seed, "good") == "same memory"


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
        return verdict(simulator, little.with_words(words), little.program, little.count, seed + number + bit, name)

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
        return verdict(simulator, memory, little.program, little.count, seed + bit, f"step table, bit {bit}")

    with ThreadPoolExecutor(2) as pool:
        outcomes = Counter(pool.map(one, range(8 * size)))
    print(dict(outcomes))
    assert sum(outcomes.values()) == 8 * size
    assert outcomes["same error"] > 50 and outcomes["same memory"] > 20
