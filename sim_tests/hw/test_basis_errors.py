"""Each error of EXECUTE_BASIS on the whole accelerator: the machine's code and a clean end."""

import numpy as np
import pytest

from sim_tests.golden.test_machine_basis import AT_EXECUTION, PROGRAM, STATIC, Program, one_pass
from sim_tests.hw.harness import run_machine, simulator_of, verdict
from sim_tests.hw.test_basis_programs import CONFIGS
from sim_tests.bench.simulation import simulate
from spec.isa import Mode, Opcode, encode
from spec.registers import Error

#: Addresses at and beyond the ends of scratchpad and weight buffer.
RANGES = [{"weight": w, "coefficients": 0} for w in (125, 126, 127, 128, 65535)] + [
    {"base": b} for b in (508, 509, 511, 512, 65535)] + [
    # (a row that nobody needs takes a cycle without progress: 4000 would wake the harness's watchdog)
    {"row_step": 510}, {"row_step": 511}, {"row_step": 65535}, {"col_step": 65535}, {"in_rows": 2000},
    {"in_cols": 4000}, {"base": 3}, {"row_step": 3}, {"col_step": 3}, {"col_step": 1, "base": 1},
    {"row_step": 0, "col_step": 0}]
#: What only the machine sees (code NONE): the accelerator ends somehow.
UNSEEN = [{"load_taps": False}, {"load_coefficients": False}, {"kernel_rows": 2}, {"accumulate": 1}, {"in_rows": 1},
          {"mode": Mode.DENSE}, {"in_cols": 3, "stride_cols_log2": 1}, {"groups": 2}]


def image(program):
    """(memory, instructions) of a hand-made program."""
    memory, stride = program.memory.copy(), program.sizes.instruction_beats * program.sizes.beat_bytes
    words = [*program.words, encode(Opcode.END)]
    for n, word in enumerate(words):
        at = PROGRAM + n * stride
        memory[at:at + 32] = np.frombuffer(word.to_bytes(32, "little"), np.uint8)
    return memory, len(words)


def cases():
    """Fields of a pass that are wrong, or at an edge."""
    fields = [dict(f) for f, _ in STATIC + AT_EXECUTION] + RANGES + UNSEEN
    return fields + [f | {"wait_load": 1} for f, _ in STATIC[:4] + AT_EXECUTION[:4]] + [
        {"reserved": 1}, {"wait_execute": 1}, {"push_execute": 1}, {"mode": 3, "push_store": 1}]


@pytest.mark.parametrize("name", CONFIGS)
def test_errors(name):
    """Same code, or the same memory where a case is legal in this configuration."""
    config, seen = CONFIGS[name], {}
    simulator = simulator_of(config)
    for number, fields in enumerate(cases()):
        memory, count = image(one_pass(config, **fields))
        says = run_machine(config, memory, PROGRAM, count)
        code = says[0] if isinstance(says, tuple) else None
        got = verdict(simulator, config, memory, PROGRAM, count, number, f"{name} {fields}")
        if code is Error.NONE:
            assert got.startswith("not checkable"), f"{fields}: {got}"
        else:
            assert got == ("same memory" if code is None else "same error"), f"{fields}: {got}"
        seen[code] = seen.get(code, 0) + 1
    assert {None, Error.NONE, Error.ILLEGAL_FIELD, Error.SCRATCHPAD_RANGE, Error.STREAM_ADDRESS,
            Error.WATCHDOG} <= seen.keys(), seen
    assert seen[Error.ILLEGAL_FIELD] >= 20


def test_error_address_is_the_instruction():
    """A static error names its instruction; one at execution, which has none, says 0."""
    config = CONFIGS["tiny_basis"]
    for fields, static in (({"mode": 3}, True), ({"pad_top": 1}, False), ({"base": 511}, False)):
        program = one_pass(config, **fields)
        memory, count = image(program)
        run = simulate(simulator_of(config), memory, program=PROGRAM, count=count, latency=7, stall=0.2)
        assert run.error in (Error.ILLEGAL_FIELD, Error.STREAM_ADDRESS) and run.finished
        at = PROGRAM + (count - 2) * program.sizes.instruction_beats * program.sizes.beat_bytes
        assert run.registers["ERROR_ADDRESS_LOW"] == (at if static else 0)


def test_overflow_of_32_bits():
    """Without the structured engine: as many passes of the largest sum as fit, and one more."""
    config = CONFIGS["tiny_maps"]
    b = config.basis
    most = 255 * 128 * b.tap_rows * b.group
    for passes, code in (((1 << 31) // most, None), ((1 << 31) // most + 1, Error.ACCUMULATOR_OVERFLOW)):
        program = Program(config)
        program.memory = np.concatenate([program.memory, np.zeros(passes * 32, np.uint8)])
        fields = program.image(np.full((1, 1, b.tap_rows, b.group), 127, np.int8)) | {
            "out_rows": 1, "out_cols": 1, "mode": Mode.POINTWISE, "zero_point": -128, "kernel_rows": 1,
            "kernel_cols": 1, "dilation_rows": 1, "dilation_cols": 1}
        loaded = program.weights(np.full((b.tap_rows, b.blocks, b.slices, b.multipliers), -128, np.int8))
        program.add(Opcode.BARRIER)
        for n in range(passes):
            program.add(Opcode.EXECUTE_BASIS, **fields | (loaded if n == 0 else {"accumulate": 1}))
        memory, count = image(program)
        says = run_machine(config, memory, PROGRAM, count)
        assert (says[0] if isinstance(says, tuple) else None) is code
        assert verdict(simulator_of(config), config, memory, PROGRAM, count, 0, f"{passes} passes") == (
            "same memory" if code is None else "same error")
