"""Random programs of the basis engine on the whole accelerator against the machine: memory, counters, errors."""

from dataclasses import replace
import os

import numpy as np
import pytest

from sim_tests.hw.basis_programs import RandomPasses
from sim_tests.hw.harness import simulator_of, verdict
from spec.config import BasisConfig, MemoryConfig, load
from spec.isa import Mode, Opcode

TINY, MAPS = load("tiny_basis"), load("tiny_maps")


def _bus(config, data_bits, burst_beats):
    return replace(config, bus=replace(config.bus, data_bits=data_bits, burst_beats=burst_beats))


#: Name -> Config.
CONFIGS = {
    "tiny_basis": TINY,
    "tiny_maps": MAPS,
    # a unit is two blocks of the scratchpad; maps beside the structured engine; one multiplier per slice, a window of
    # one kernel row's reach; accumulators that a few passes leave; IR of 9 bits
    "halves": replace(
        _bus(TINY, 128, 4), name="halves",
        structured=replace(TINY.structured, columns=8, slots=8, accumulator_bits=18),
        basis=BasisConfig(group=8, blocks=8, slices=8, multipliers=1, coefficients="maps", lanes=8, stream_groups=2,
                          look_aside=3, intermediate_bits=9, fifo_depth=3, window=3, tap_rows=16, coefficient_rows=4,
                          accumulator_depth=16),
        memory=replace(TINY.memory, activation_bytes=4096, weight_bytes=4096)),
    # 5 of 16 channels, one channel group per word, one beat per instruction; IR of 8 bits
    "wide": replace(
        _bus(MAPS, 256, 2), name="wide",
        basis=BasisConfig(group=16, blocks=5, slices=3, multipliers=6, coefficients="series", lanes=16, stream_groups=1,
                          intermediate_bits=8, fifo_depth=5, window=15, tap_rows=8, coefficient_rows=8,
                          accumulator_depth=64),
        memory=MemoryConfig(activation_bytes=16384, weight_bytes=8192, residual_bytes=256, step_entries=16,
                            parameter_groups=4)),
    # one slice, five multipliers, a bus of one unit; words of eight groups, more than one pass may add up in 2 rows
    "bus32": replace(
        _bus(MAPS, 32, 8), name="bus32",
        basis=BasisConfig(group=4, blocks=2, slices=1, multipliers=5, coefficients="series", lanes=4, stream_groups=8,
                          intermediate_bits=10, fifo_depth=2, window=5, tap_rows=4, coefficient_rows=2,
                          accumulator_depth=4)),
}
#: Programs of each configuration; a soak takes more.
PROGRAMS = 400 if os.environ.get("SUMMAND_SOAK") else 30
#: Where the time of the execute unit goes.
STATES = ("EXECUTE_ISSUE", "EXECUTE_WAIT_LOAD", "EXECUTE_WAIT_STORE", "EXECUTE_WAIT_WEIGHTS",
          "EXECUTE_WAIT_COEFFICIENTS", "EXECUTE_IDLE")


def look(machine, run):
    """Counters against the machine's counts."""
    r = run.registers
    assert r["SATURATIONS"] == machine.counts["saturations"]
    assert r["EXECUTE_ISSUE"] == machine.counts["pixel_steps"]
    assert sum(r[name] for name in STATES) == r["CYCLES"]


def check(name, program, number, what, *, outcome="same memory"):
    """One program under the latency and the stalls of its number."""
    config = CONFIGS[name]
    latency, stall = (1, 3, 20, 100)[number % 4], (0.0, 0.2, 0.6)[number % 3]
    got = verdict(simulator_of(config), config, program.memory, program.program, program.count, number,
                  f"{name} {what}:\n" + "\n".join(program.summary), latency=latency, stall=stall, inspect=look)
    assert got in (outcome if isinstance(outcome, tuple) else (outcome,)), f"{name} {what}: {got}"
    return got


@pytest.mark.parametrize("name", CONFIGS)
def test_random_programs(name, rng):
    """All modes, geometries and densities; EXECUTE and EXECUTE_BASIS in one sum where both engines are there."""
    config = CONFIGS[name]
    # accumulators of 18 bits are left now and then
    narrow = config.structured is not None and config.structured.accumulator_bits < 32
    outcomes = []
    for number in range(PROGRAMS):
        seed = int(rng.integers(1 << 32))
        program = RandomPasses(config, np.random.default_rng(seed), groups=2 if narrow else 6,
                               structured=(0, 0.5)[number % 2] if config.structured is not None else 0)
        outcomes.append(check(name, program, number, f"seed {seed}",
                              outcome=("same memory", "same error") if narrow else "same memory"))
    assert ("same error" in outcomes) == narrow and outcomes.count("same memory") > PROGRAMS // 4, outcomes


@pytest.mark.parametrize("density", [0, "one", 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_densities(name, density, rng):
    """No coefficient, a single one, all (of one sign in each pass): values at both ends, so that IR saturates."""
    for number in range(max(4, PROGRAMS // 10)):
        program = RandomPasses(CONFIGS[name], rng, groups=3, modes=(Mode.DECOMPOSED,), density=density,
                               extreme=1 if density == 1 else 0.5)
        check(name, program, number, f"density {density}", outcome=("same memory", "same error"))


@pytest.mark.parametrize("mode", Mode)
def test_one_pixel_high_or_wide(mode, rng):
    """Sums of one row, one column, one pixel: an output is added to as soon as the accumulators allow."""
    for name in ("tiny_basis", "bus32"):
        for number in range(max(4, PROGRAMS // 10)):
            program = RandomPasses(CONFIGS[name], rng, groups=5, modes=(mode,), depth=1 + number % 2)
            check(name, program, number, f"{mode.name} depth {1 + number % 2}")


def test_programs_reach_what_they_should(rng):
    """The stimulus itself: kept taps, kept coefficients, all modes, both engines in one sum, saturation both ways."""
    seen = {"taps alone": 0, "coefficients alone": 0, "nothing loaded": 0, "both engines": 0, "added": 0}
    modes = set()
    for _ in range(80):
        program = RandomPasses(TINY, rng, structured=0.3)
        code = program.code.instructions
        for before, entry in zip(code, code[1:]):
            if entry["opcode"] is not Opcode.EXECUTE_BASIS:
                continue
            modes.add(entry["mode"])
            taps, coefficients = entry.get("taps", 0), entry.get("coefficients", 0)
            decomposed = entry["mode"] is Mode.DECOMPOSED
            seen["taps alone"] += decomposed and taps > 0 and not coefficients
            seen["coefficients alone"] += coefficients > 0 and not taps
            seen["nothing loaded"] += decomposed and not taps and not coefficients
            seen["both engines"] += before["opcode"] is Opcode.EXECUTE
            seen["added"] += entry["accumulate"]
    assert modes == set(Mode) and all(n >= 5 for n in seen.values()), seen
