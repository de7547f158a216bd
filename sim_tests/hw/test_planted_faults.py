"""The suite can fail: each planted fault must be seen by the check that its row names, and the good design by none.

A burst across 4 KiB is not among them: cocotbext-axi itself ends the whole run at the first one.
"""

import json

import numpy as np

from golden.machine import Machine, MachineError
from sim_tests.hw.planted import Fault, Planted, planted
from sim_tests.hw.programs import LittleProgram
from sim_tests.lib.simulate import run_cocotb
from spec.config import load
from spec.derive import Sizes
from spec.isa import VERSION, Opcode, encode
from spec.registers import Error

#: Check names are "job: kind of difference", see `jobs` and tb_planted.
FAULTS = (
    Fault("hw.accumulators", "old[col] + given.sums[col]", "old[col] - given.sums[col]", "a: memory"),
    Fault(
        "hw.accumulators",
        "Mux(given.sums[col] > old[col], given.sums[col], old[col])",
        "given.sums[col]",
        "a: memory",
    ),
    Fault("hw.structured.pe", "selected * value", "selected * value + 1", "a: memory"),
    Fault("hw.structured.pe", "self.block[index]", "self.block[index ^ 1]", "a: memory"),
    Fault("hw.structured.array", "self.stream[position]", "self.stream[position - 1]", "a: memory"),
    Fault("hw.structured.array", "self.swap & self.en", "0", "a: memory"),
    Fault("hw.structured.array", "self.n_log2 == sizes.index_bits", "0", "a: memory"),
    Fault("hw.structured.array", "self.load_index << self.load_word", "0", "a: memory"),
    Fault("hw.structured.streamer", "address + step.entry.offset[j]", "address", "a: error"),
    Fault(
        "hw.structured.streamer", "fresh & ~step.entry.hold & self.issue", "~step.entry.hold & self.issue", "a: memory"
    ),
    Fault(
        "hw.structured.streamer",
        "(segment[j] >= sizes.activation_blocks)",
        "(segment[j] > sizes.activation_blocks)",
        "b: error",
    ),
    Fault("hw.structured.streamer", "(segment[j] & inside).any()", "0", "c: error"),
    Fault("hw.requantize", "(u + v_late + HALF)", "(u + v_late)", "a: memory"),
    Fault("hw.requantize", "product >> parameters.shift", "product >> parameters.shift[:2]", "a: memory"),
    Fault("hw.bus.burst", "rest.end > self.memory_bytes", "0", "d: error"),
    Fault("hw.control.load", "address >= sizes.residual_units", "address > sizes.residual_units", "e: error"),
    Fault("hw.control.load", "head.wait_store & ~self.available_store", "0", "a: error"),
    Fault("hw.control.load", "ended & tile.push_store", "0", "a: error"),
    Fault("hw.control.tokens", "push & ~take & (count == (1 << TOKEN_BITS) - 1)", "0", "g: error"),
    Fault("hw.control.command", "~Cat(*broken).any()", "1", "h: error"),
    Fault("hw.control.supervisor", "found.valid | expired", "found.valid", "f: end"),
)


def jobs(config, rng):
    """Name -> (image, program, count, error): a good program and one for each kind of refusal."""
    little, z = LittleProgram(config, rng, start=4056), Sizes(config)
    out = {"a": (little.memory, little.program, little.count)}
    header, end = encode(Opcode.HEADER, digest=z.digest_value, version=VERSION), encode(Opcode.END)

    def job(name, *words, keep=0):
        words = [*little.words[:keep], *words, end] if keep else [header, *words, end]
        words += [end] * (little.count - len(words))
        out[name] = little.with_words(words), little.program, len(words)

    # a dense step with offset 8
    base = dict(rows=1, cols=1, step=4, steps=1, weight=5, wait_load=1)
    job("b", encode(Opcode.EXECUTE, base=z.activation_blocks - 8, **base), keep=7)
    job(
        "c",
        encode(Opcode.EXECUTE, **base | {"base": 1, "step": 6, "weight": 5 + z.tile_beats(2) + z.tile_beats(4)}),
        keep=7,
    )
    job("d", encode(Opcode.LOAD_LINEAR, beats=1, address=len(little.memory)))
    job("e", encode(Opcode.LOAD_TILE, target=1, planes=1, rows=1, cols=1, base=z.residual_units))
    job("f", encode(Opcode.FILL, rows=1, blocks=1, wait_store=1))
    job("h", encode(Opcode.FILL, rows=0, blocks=1))
    many = [header, *[encode(Opcode.FILL, rows=1, blocks=1, push_store=1)] * 256, end]
    image = np.frombuffer(b"".join(w.to_bytes(32, "little") for w in many), np.uint8)
    out["g"] = image, 0, len(many)
    return out


def test_each_planted_fault_is_seen(tmp_path, rng, seed):
    config, arrays = load("tiny"), {}
    for name, (image, program, count) in jobs(config, rng).items():
        after, code = image.copy(), Error.NONE
        try:
            Machine(config, after).run(program, count)
        except MachineError as error:
            code = error.code
        assert (code is Error.NONE) == (name == "a"), f"job {name}: {code.name}"
        arrays |= {
            f"{name}.before": image,
            f"{name}.after": after,
            f"{name}.program": np.array([program, count]),
            f"{name}.error": np.array(int(code)),
        }
    np.savez(tmp_path / "jobs.npz", **arrays)
    with planted(FAULTS) as top:
        component = Planted(accelerator=top.Accelerator(config=config))
        result = tmp_path / "seen.json"
        run_cocotb(
            component,
            "planted",
            "sim_tests.hw.tb_planted",
            1,
            tmp_path,
            config,
            seed=seed,
            env={
                "SUMMAND_JOBS": str(tmp_path / "jobs.npz"),
                "SUMMAND_FAULTS": str(len(FAULTS)),
                "SUMMAND_RESULT": str(result),
            },
            flags=("-Wno-CASEINCOMPLETE",),
        )
    seen = json.loads(result.read_text())
    assert seen.pop("0") is None, "the good design fails"
    wrong = {
        f"{n}: {f.module}: {f.good} -> {f.bad}": (seen[str(n)], f.check)
        for n, f in enumerate(FAULTS, 1)
        if seen[str(n)] != f.check
    }
    assert not wrong, "planted fault: (seen by, expected): " + "; ".join(f"{k}: {v}" for k, v in wrong.items())
