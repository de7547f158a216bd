"""Inside the simulator: every mutant against every cocotb test of the given modules until one test objects.

cocotb's regression manager runs the tests, one after another in one process, each with its own tasks, seed and time
limit, exactly as in an ordinary run. Only two things are changed: its list is filled as verdicts come in, and verdicts
go to a file instead of an XML report (these are names of cocotb 2.1 that it does not promise to keep).

Environment: SUMMAND_MUTANTS names a JSON file: ``mutants`` (numbers), ``modules``, ``inputs`` (ports that traffic
before the reset drives at random), ``seed``, ``verdicts`` (file of JSON lines that this module appends to and, after
a crash, reads again), ``budget`` (seconds of tests after which a mutant is left open;
0: all tests), ``seconds`` (wall time after which a test without end takes the process down).
"""
import faulthandler
import functools
import importlib
import json
import logging
import os
from pathlib import Path
import time

import cocotb
from cocotb import regression
from cocotb._decorators import Test, TestGenerator
from cocotb.triggers import SimTimeoutError, Timer
from cocotb.utils import get_sim_time
import numpy as np


class Session:
    """Chooses the next (mutant, test) and keeps the verdicts."""

    def __init__(self, plan):
        self.plan, self.file = plan, Path(plan["verdicts"])
        self.tests = {t.fullname: t for name in plan["modules"] for g in vars(importlib.import_module(name)).values()
                      if isinstance(g, TestGenerator) and g.module == name for t in g.generate_tests()}
        #: Simulated ns and wall seconds that a test takes on the good design; mutants that it killed.
        self.takes, self.wall, self.kills = {}, {}, dict.fromkeys(self.tests, 0)
        self.done, self.passed = set(), {}
        for line in self.file.read_text().splitlines():
            self.note(json.loads(line))
        self.todo = [k for k in plan["mutants"] if k not in self.done]

    def note(self, record):
        """Bookkeeping of one line of the file."""
        kind, k, test = record["kind"], record["mutant"], record.get("test")
        if kind == "passed":
            self.passed.setdefault(k, set()).add(test)
            if k == 0:
                self.takes[test], self.wall[test] = record["ns"], record["seconds"]
        elif kind == "killed" or kind == "survived" or kind == "open" and self.plan["budget"]:
            self.done.add(k)
            if test:
                self.kills[test] += 1

    def write(self, **record):
        with self.file.open("a") as file:   # closed every time: the process may break off
            file.write(json.dumps(record) + "\n")
        self.note(record)

    def next(self):
        """The next test to run, or None. The good design comes first; then the test that kills most per second."""
        while self.todo:
            k = self.todo[0]
            left = [t for t in self.tests if t not in self.passed.get(k, ())]
            if k in self.done:
                self.todo.pop(0)
            elif not left:
                self.write(kind="survived", mutant=k)
            elif k and self.plan["budget"] and sum(self.wall[t] for t in self.passed.get(k, ())) > self.plan["budget"]:
                self.write(kind="open", mutant=k)
            else:
                name = left[0] if k == 0 else max(
                    left, key=lambda t: (self.kills[t] + 0.5) / (self.wall[t] + 0.003))
                return k, self.tests[name]
        return None

    def wrapped(self, k, test):
        """The test with the mutant chosen, traffic before its reset, and a limit from the good design."""
        limit = (3 * self.takes[test.fullname] + 20_000, "ns") if k else test.timeout

        @functools.wraps(test.func)
        async def run(dut, **kwargs):
            self.began = time.monotonic(), round(get_sim_time("ns"))
            dut.mutsel.value = k
            await dirty(dut, self.plan["inputs"], np.random.default_rng([self.plan["seed"], k]))
            await test.func(dut, **kwargs)

        self.current = k, test.fullname
        self.write(kind="begun", mutant=k, test=test.fullname)
        faulthandler.dump_traceback_later(self.plan["seconds"], exit=True)
        return Test(func=run, args=(), kwargs=test.kwargs, name=test.name, module=test.module, doc=None, timeout=limit,
                    expect_fail=False, expect_error=(), skip=False, stage=0)

    def score(self, error, *_):
        """Called by the regression manager when a test has ended; fills its list again."""
        faulthandler.cancel_dump_traceback_later()
        manager = regression._manager_inst
        if self.current is not None:
            k, test = self.current
            if error is None:
                seconds, ns = time.monotonic() - self.began[0], round(get_sim_time("ns")) - self.began[1]
                self.write(kind="passed", mutant=k, test=test, ns=ns, seconds=seconds)
            else:
                how = "hang" if isinstance(error, SimTimeoutError) else type(error).__name__
                self.write(kind="killed", mutant=k, test=test, how=how, why=str(error)[:300])
        if 0 in self.done and self.passed.get(0, set()) != self.tests.keys():
            return              # the good design was refused: nothing else means anything
        chosen = self.next()
        if chosen:
            manager._test_queue.append(self.wrapped(*chosen))


async def dirty(dut, inputs, rng):
    """Random traffic on every input, without reset, so that the state before the test's reset is any."""
    dut.rst.value = 0
    widths = [(getattr(dut, name), len(getattr(dut, name))) for name in inputs]
    for _ in range(24):
        for port, width in widths:
            port.value = int.from_bytes(rng.bytes(width // 8 + 1), "little") % (1 << width)
        for level in (0, 1):
            dut.clk.value = level
            await Timer(5, "ns")


@cocotb.test()
async def begin(dut):
    """Takes the regression over."""
    logging.getLogger().setLevel(logging.CRITICAL)
    plan = json.loads(Path(os.environ["SUMMAND_MUTANTS"]).read_text())
    Path(plan["verdicts"]).touch()
    session = Session(plan)
    session.current = None
    regression._manager_inst._score_test = session.score
