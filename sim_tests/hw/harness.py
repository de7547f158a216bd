"""The whole accelerator in the C++ bench against the machine: one program, one verdict."""

import numpy as np

from gen import emit
from golden.machine import Machine, MachineError
from sim_tests.bench import build
from sim_tests.bench.simulation import simulate
from spec.registers import Error

#: Enough for every instruction to make progress, short enough to bark soon.
WATCHDOG = 3000
LIMIT = 3_000_000


def simulator_of(config):
    """Executable for a configuration, built once."""
    return build.simulator(build.rtl(config), emit.header_text(config), emit.top_name(config))


def machine_says(config, memory, program, count):
    """(Error, address), or the memory after a good run."""
    says = run_machine(config, memory, program, count)
    return says.memory if isinstance(says, Machine) else says


def run_machine(config, memory, program, count):
    """(Error, address), or the machine after a good run."""
    machine = Machine(config, memory.copy())
    try:
        machine.run(program, count)
    except MachineError as error:
        return error.code, error.address
    return machine


def verdict(simulator, config, memory, program, count, seed, name, *, latency=None, stall=None,
            inspect=None):
    """Run on both and compare; returns the kind of outcome. Raises AssertionError where they part.

    Both end well: the memories are equal. The machine reports an error that hardware has: so does the accelerator, with
    its interrupt. The machine reports what hardware cannot see (code NONE): the accelerator ends somehow. Always: an
    end, no broken rule of the bus, no access outside the window. After a good run ``inspect`` gets the machine and the
    accelerator's `Run` and may object.
    """
    want = run_machine(config, memory, program, count)
    run = simulate(
        simulator,
        memory,
        program=program,
        count=count,
        watchdog=WATCHDOG,
        limit=LIMIT,
        seed=seed + 1,
        latency=1 + seed % 7 if latency is None else latency,
        stall=(0.0, 0.3)[seed % 2] if stall is None else stall,
    )
    assert run.finished, f"{name}: hangs"
    assert not run.protocol, f"{name}: {run.protocol}"
    status = run.registers["STATUS"]
    assert status == (0b0100 if run.error else 0b0010), f"{name}: STATUS {status:#x} with {run.error.name}"
    if isinstance(want, Machine):
        assert run.error is Error.NONE, f"{name}: {run.error.name}, but the machine runs it"
        wrong = np.flatnonzero(run.memory != want.memory)
        assert not len(wrong), f"{name}: {len(wrong)} bytes differ from the machine's, first at {wrong[0]:#x}"
        if inspect is not None:
            inspect(want, run)
        return "same memory"
    code, _ = want
    if code is Error.NONE:
        return "not checkable: error" if run.error else "not checkable: ends"
    assert run.error is not Error.NONE, f"{name}: ends well, but the machine says {code.name}"
    return "same error" if run.error is code else f"machine {code.name}, accelerator {run.error.name}"
