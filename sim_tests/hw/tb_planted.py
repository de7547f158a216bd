"""Runs the prepared jobs with each planted fault switched on; writes down which check saw it."""
import json
import os

import cocotb
import numpy as np

from sim_tests.lib.host import Host
from spec.registers import Error

LIMIT = 6000


@cocotb.test()
async def each_fault(dut):
    jobs = np.load(os.environ["SUMMAND_JOBS"])
    names = sorted({k.split(".")[0] for k in jobs.files})
    size = max(jobs[f"{n}.before"].size for n in names)
    host = Host(dut, memory_bytes=size, stall=0.2, rng=np.random.default_rng(cocotb.RANDOM_SEED))
    dut.fault.value = 0
    await host.start_clock()
    seen, crossings = {}, []

    async def watch():
        while True:
            await cocotb.triggers.FallingEdge(dut.clk)
            for channel in ("ar", "aw"):
                if getattr(dut, f"m_axi__{channel}valid").value:
                    at, length = (int(getattr(dut, f"m_axi__{channel}{f}").value) for f in ("addr", "len"))
                    beat = len(dut.m_axi__wdata) // 8
                    if at // 4096 != (at + (length + 1) * beat - 1) // 4096:
                        crossings.append(at)

    cocotb.start_soon(watch())
    for fault in range(int(os.environ["SUMMAND_FAULTS"]) + 1):
        dut.fault.value = fault
        found = None
        for n in names:
            before, want = jobs[f"{n}.before"], int(jobs[f"{n}.error"])
            program, count = (int(v) for v in jobs[f"{n}.program"])
            host.memory_bytes = before.size
            host.ram.write(host.base, before.tobytes())
            await host.write("WATCHDOG_CYCLES", 1500)
            await host.begin(program, count)
            try:
                code, _ = await host.wait(LIMIT)
            except AssertionError:
                found = f"{n}: end"
            else:
                got = np.frombuffer(host.ram.read(host.base, before.size), np.uint8)
                if crossings:
                    found = f"{n}: page"
                elif code != want:
                    found = f"{n}: error"
                elif code is Error.NONE and (got != jobs[f"{n}.after"]).any():
                    found = f"{n}: memory"
            crossings.clear()
            await host.soft_reset()
            if found:
                break
        seen[fault] = found
        # whatever the fault left behind in memories that reset does not clear is rewritten by the next program
        dut.fault.value = 0
        dut.rst.value = 1
        for _ in range(3):
            await cocotb.triggers.RisingEdge(dut.clk)
        dut.rst.value = 0
        await cocotb.triggers.ClockCycles(dut.clk, 4)
    with open(os.environ["SUMMAND_RESULT"], "w") as file:
        json.dump(seen, file)
