"""Runs prepared jobs (memory before, memory after, program) on the whole accelerator."""
import os

import cocotb
import numpy as np

from sim_tests.lib.host import Host
from spec.registers import Error


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.5])
async def memory_equals_machine(dut, stall):
    jobs = np.load(os.environ["SUMMAND_JOBS"])
    rng = np.random.default_rng(cocotb.RANDOM_SEED)
    names = sorted({k.split(".")[0] for k in jobs.files})
    assert names
    size = max(jobs[f"{n}.before"].size for n in names)
    host = Host(dut, memory_bytes=size, stall=stall, rng=rng)
    await host.start_clock()
    for n in names:
        before, after = jobs[f"{n}.before"], jobs[f"{n}.after"]
        program, count = (int(v) for v in jobs[f"{n}.program"])
        host.memory_bytes = before.size
        host.ram.write(host.base, before.tobytes())
        await host.begin(program, count)
        code, counters = await host.wait()
        assert code == Error.NONE, f"job {n}: {code.name}"
        got = np.frombuffer(host.ram.read(host.base, before.size), np.uint8)
        wrong = np.flatnonzero(got != after)
        dut._log.info("job %s: %s", n, counters)
        assert wrong.size == 0, f"job {n}: {wrong.size} of {after.size} bytes differ, first at {wrong[0]:#x}"
        states = [counters[f"EXECUTE_{s}"] for s in ("ISSUE", "WAIT_LOAD", "WAIT_STORE", "WAIT_WEIGHTS", "IDLE")]
        assert sum(states) == counters["CYCLES"], "cycles of the execute unit are not attributed to exactly one cause"
