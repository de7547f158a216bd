"""Runs the prepared jobs with each planted fault on, a soft reset after each job; writes down which check saw it."""

import json
import os

import cocotb
from cocotb.triggers import ClockCycles, RisingEdge
import numpy as np

from sim_tests.lib.host import Host
from spec.registers import Error

LIMIT = 12_000


async def seen_by(host, jobs, name):
    """What is wrong with one job, or None."""
    before, want = jobs[f"{name}.before"], Error(int(jobs[f"{name}.error"]))
    program, count = (int(v) for v in jobs[f"{name}.program"])
    host.memory_bytes = before.size
    host.ram.write(host.base, before.tobytes())
    await host.write("WATCHDOG_CYCLES", 1500)
    await host.begin(program, count)
    try:
        code, counters = await host.wait(LIMIT)
    except AssertionError:
        return "end"
    finally:
        await host.soft_reset()
    if code is not want:
        return "error"
    if code is not Error.NONE:
        return None
    if (np.frombuffer(host.ram.read(host.base, before.size), np.uint8) != jobs[f"{name}.after"]).any():
        return "memory"
    saturations, issue = (int(v) for v in jobs[f"{name}.counts"])
    states = sum(v for key, v in counters.items() if key.startswith("EXECUTE_"))
    good = (counters["SATURATIONS"], counters["EXECUTE_ISSUE"], states) == (saturations, issue, counters["CYCLES"])
    return None if good else "counters"


@cocotb.test()
async def each_fault(dut):
    jobs = np.load(os.environ["SUMMAND_JOBS"])
    names = json.loads(os.environ["SUMMAND_ORDER"])
    size = max(jobs[f"{n}.before"].size for n in names)
    host = Host(dut, memory_bytes=size, stall=0.1, rng=np.random.default_rng(cocotb.RANDOM_SEED))
    dut.fault.value = 0
    await host.start_clock()
    seen = {}
    for fault in range(int(os.environ["SUMMAND_FAULTS"]) + 1):
        dut.fault.value = fault
        for n in names:
            found = await seen_by(host, jobs, n)
            if found:
                break
        seen[fault] = f"{n}: {found}" if found else None
        # whatever the fault left behind in memories that reset does not clear is rewritten by the next program
        dut.fault.value = 0
        dut.rst.value = 1
        for _ in range(3):
            await RisingEdge(dut.clk)
        dut.rst.value = 0
        await ClockCycles(dut.clk, 4)
    with open(os.environ["SUMMAND_RESULT"], "w") as file:
        json.dump(seen, file)
