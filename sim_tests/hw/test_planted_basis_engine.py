"""The checks of the basis engine can fail: each planted fault is seen; none in the good design, after every error."""

from dataclasses import replace
import importlib
import json

import numpy as np
import pytest

from golden.machine import Machine
from sim_tests.golden.test_machine_basis import PROGRAM, one_pass, series
from sim_tests.hw.basis_programs import RandomPasses
from sim_tests.hw.harness import run_machine
from sim_tests.hw.planted import Fault, Planted, planted
from sim_tests.hw.test_basis_errors import image
from sim_tests.lib.simulate import run_cocotb
from spec.config import load
from spec.isa import Mode
from spec.registers import Error

#: Both engines; IR of 9 bits and accumulators of 18, so that both are left.
TINY = load("tiny_basis")
CONFIG = replace(TINY, basis=replace(TINY.basis, intermediate_bits=9),
                 structured=replace(TINY.structured, accumulator_bits=18))
SERIES, STREAMER, BLOCK = "hw.basis.series", "hw.basis.streamer", "hw.basis.block"
MULTIPLY, LOADER, ENGINE, JOB = "hw.basis.multiply", "hw.basis.loader", "hw.basis.engine", "hw.basis.job"
UNIT = "hw.execute"
VALUE, REFUSED, COUNT = {"memory"}, {"error"}, {"counters"}
#: A fault of control may end in wrong values, in none, or in an error.
ANY = {"memory", "end", "error", "counters"}

#: ``check``: kinds of difference, see tb_basis_planted; one of them must see the fault.
FAULTS = (
    # series: wrong sign, a lost carry, wrong group of a lane for N = 2, no new sum, saturation at the wrong bit
    Fault(SERIES, "negative.replicate(sizes.operand.bits)", "0", VALUE),
    Fault(SERIES, "nonzero & negative", "0 if lane == 0 else nonzero & negative", VALUE),
    Fault(SERIES, "word.word_select(group, operand)", "word.word_select(group ^ (log2 == 1), operand)", VALUE),
    Fault(SERIES, "Mux(self.first, 0, total)", "total", ANY),
    Fault(SERIES, "value[bits - 1:]", "value[bits:]", ANY),
    Fault(SERIES, "Mux(value[-1], low, high)", "high", VALUE),
    Fault(SERIES, "Cat(self.i.payload.row, self.i.payload.half)", "Cat(self.i.payload.row, ~self.i.payload.half)",
          VALUE),
    Fault(SERIES, "valid2 & last2", "valid2", ANY),
    # streamer: no zero point, wrong pixel, wrong bank, wrong end of the scratchpad, wrong part of a word
    Fault(STREAMER, "current[g][8 * c:8 * c + 8].as_signed() - about1.zero_point",
          "current[g][8 * c:8 * c + 8].as_signed()", VALUE),
    Fault(STREAMER, "address + x.col_step", "address + x.col_step + 1", ANY),
    Fault(STREAMER, "within < start", "within <= start", VALUE),
    Fault(STREAMER, "(address >> per_group) + used > sizes.activation_blocks // sizes.group_blocks",
          "(address >> per_group) + used > sizes.activation_blocks // sizes.group_blocks + 1", REFUSED),
    Fault(STREAMER, "part + 1 == about2.groups", "part + 1 == b.stream_groups", ANY),
    # geometry: a row too many, rows between those of a stride
    Fault(JOB, "(at >> x.stride_rows_log2) < x.out_rows", "(at >> x.stride_rows_log2) <= x.out_rows", ANY),
    Fault(JOB, "(at & ((1 << x.stride_rows_log2) - 1)[:8]).any()", "0", ANY),
    # block: padding, sums over several micro-steps, places of a pointwise group
    Fault(BLOCK, "Mux(self.enable[i], chosen, 0)", "chosen", VALUE),
    Fault(BLOCK, "Mux(self.keep, kept, 0)", "0", VALUE),
    Fault(BLOCK, "self.direct[at]", "self.direct[at ^ 1]", VALUE),
    # multipliers: place in the window, padding, first contribution with dilation, taps, tokens, counts, stride
    Fault(MULTIPLY, "back[:4] * x.dilation_cols + ahead", "back[:4] * x.dilation_cols + ahead + 1", VALUE),
    Fault(MULTIPLY, "position < live", "1", VALUE),
    Fault(MULTIPLY, "row < x.dilation_rows", "row < 1", ANY),
    Fault(MULTIPLY, "job.tap_half << b.tap_rows.bit_length() - 1", "(1 ^ job.tap_half) << b.tap_rows.bit_length() - 1",
          ANY),
    Fault(MULTIPLY, "self.i.payload.execute.wait_store & ~self.available_store", "0", ANY),
    Fault(MULTIPLY, "self.intermediate.payload.saturated", "0", COUNT),
    Fault(MULTIPLY, "Mux(pointwise, 1, 1 << x.stride_cols_log2)", "1", ANY),
    # loader: taps that are in use, the end of the weight buffer, a rule of a field
    Fault(LOADER, "~self.tap_use.bit_select(job.tap_half, 1)", "1", ANY),
    Fault(LOADER, "end > sizes.weight_beats", "end > sizes.weight_beats + 1", REFUSED),
    Fault(LOADER, "x.pad_left >= span", "x.pad_left > span", REFUSED),
    # engine and unit: tokens, overflow, who is at work
    Fault(ENGINE, "self.i.payload.wait_load & ~self.available_load", "0", ANY),
    Fault("hw.accumulators", "update & outside.any()", "0", REFUSED),
    Fault(UNIT, "~others[0]", "1", ANY),
    Fault(UNIT, "last == n", "1", ANY),
)
#: Faults that only time tells, or only a rare program: found by the tests of the multipliers alone.
ALONE = (
    Fault(MULTIPLY, "stores[-1]", "stores[-2]", "every_update/idle=0.0"),
    Fault(MULTIPLY, "loads[-1]", "loads[-2]", "every_update/idle=0.0"),
    Fault(MULTIPLY, "row_done & (x.out_cols == 1)", "0", "narrow_outputs"),
    Fault(MULTIPLY, "b.window - job.span", "0", "full_rate"),
    Fault(MULTIPLY, "chunk + 1 == Mux(pointwise, x.groups, job.chunks)", "1", "every_update/idle=0.0"),
)
#: Errors of EXECUTE_BASIS: fields of a pass, code.
ERRORS = {
    "static": ({"mode": 3}, Error.ILLEGAL_FIELD),
    "field": ({"pad_left": 1}, Error.ILLEGAL_FIELD),
    "weights": ({"weight": 128 - 4}, Error.SCRATCHPAD_RANGE),
    "pixels": ({"base": 512 - 4}, Error.STREAM_ADDRESS),
    "far pixels": ({"row_step": 65535}, Error.STREAM_ADDRESS),
    "no token": ({"wait_load": 1}, Error.WATCHDOG),
}


def overflow_program():
    """Two slices, IR at its end times taps of 127, added ten times: more than 18 bits hold."""
    program = one_pass(CONFIG, x=np.full((2, 2, 1, 4), 127, np.int8), zero_point=-128)
    taps = np.zeros((1, 4, 2, 3), np.int8)
    taps[..., 0] = 127
    loaded = program.weights(taps) | series((1,))
    for _ in range(3):
        program.execute(base=0, row_step=3, col_step=1, in_rows=2, in_cols=2, out_rows=2, out_cols=2, groups=1,
                        zero_point=-128, accumulate=1, **loaded)
        loaded = series((1,))
    return program


def jobs(rng):
    """Name -> (image, program, count, error, image after, (saturations, micro-steps)); good ones, then errors."""
    kinds = {"decomposed": {"modes": (Mode.DECOMPOSED,)}, "dense": {"modes": (Mode.DENSE,)},
             "pointwise": {"modes": (Mode.POINTWISE,)}, "both": {"structured": 0.5}, "one pixel": {"depth": 1},
             "ends": {"extreme": 1, "modes": (Mode.DECOMPOSED,)}, "all": {"groups": 6}}
    out = {}
    for name, options in kinds.items():
        while True:
            program = RandomPasses(CONFIG, rng, **{"groups": 4} | options)
            machine = run_machine(CONFIG, program.memory, program.program, program.count)
            if isinstance(machine, Machine) and (name != "ends" or machine.counts["saturations"] > 20):
                break
        out[name] = (program.memory, program.program, program.count, Error.NONE, machine.memory,
                     (machine.counts["saturations"], machine.counts["pixel_steps"]))
    programs = {name: (one_pass(CONFIG, **fields), code) for name, (fields, code) in ERRORS.items()}
    programs["overflow"] = overflow_program(), Error.ACCUMULATOR_OVERFLOW
    for name, (program, code) in programs.items():
        memory, count = image(program)
        says = run_machine(CONFIG, memory, PROGRAM, count)
        assert isinstance(says, tuple) and says[0] is code, f"{name}: {says}"
        out[name] = memory, PROGRAM, count, code, memory, (0, 0)
    return out


def test_each_planted_fault_is_seen(tmp_path, rng, seed):
    """Fault 0 runs everything: each error ends cleanly, and after its soft reset the next program runs well."""
    arrays, every = {}, jobs(rng)
    for name, (before, program, count, code, after, counts) in every.items():
        arrays |= {f"{name}.before": before, f"{name}.after": after, f"{name}.program": np.array([program, count]),
                   f"{name}.error": np.array(int(code)), f"{name}.counts": np.array(counts)}
    np.savez(tmp_path / "jobs.npz", **arrays)
    good = [n for n, job in every.items() if job[3] is Error.NONE]
    bad = [n for n in every if n not in good]
    # each error is followed by a good program
    order = [*good[:1], *(n for k, name in enumerate(bad) for n in (name, good[(k + 1) % len(good)])), *good]
    result = tmp_path / "seen.json"
    with planted(FAULTS) as top:
        run_cocotb(Planted(accelerator=top.Accelerator(config=CONFIG)), "planted_basis",
                   "sim_tests.hw.tb_basis_planted", 1, tmp_path, CONFIG, seed=seed, flags=("-Wno-UNSIGNED",),
                   env={"SUMMAND_JOBS": str(tmp_path / "jobs.npz"), "SUMMAND_ORDER": json.dumps(order),
                        "SUMMAND_FAULTS": str(len(FAULTS)), "SUMMAND_RESULT": str(result)})
    seen = json.loads(result.read_text())
    assert seen.pop("0") is None, f"the good design fails: {json.loads(result.read_text())['0']}"
    wrong = [f"{n}: {f.module}: {f.good} -> {f.bad}: seen by {seen[str(n)]}, not {sorted(f.check)}"
             for n, f in enumerate(FAULTS, 1) if seen[str(n)] is None or seen[str(n)].split(": ")[1] not in f.check]
    assert not wrong, "planted faults:\n" + "\n".join(wrong)


@pytest.mark.parametrize("number", range(len(ALONE) + 1))
def test_faults_of_the_multipliers_alone(number, tmp_path, seed):
    """The named test of tb_basis_multiply fails on the planted design; 0: all of them pass."""
    names = [ALONE[number - 1].check] if number else sorted({fault.check for fault in ALONE})
    with planted(ALONE):
        multiply = importlib.import_module(MULTIPLY)
        component = Planted(accelerator=multiply.BasisMultiply(config=TINY))

        def run():
            run_cocotb(component, "planted_multiply", "sim_tests.hw.tb_basis_multiply", len(names), tmp_path, TINY,
                       seed=seed, env={"SUMMAND_FAULT": str(number)}, test_filter=f"({'|'.join(names)})$")

        if number:
            with pytest.raises((AssertionError, SystemExit)):
                run()
        else:
            run()
