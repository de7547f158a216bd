"""One run of a built accelerator: memory image in, memory image, counters and cycles out."""

from dataclasses import dataclass
import json
from pathlib import Path
import subprocess
import tempfile

import numpy as np

from spec import registers
from spec.errors import InputError

#: Bus address at which the harness places the memory image; not 0, so that a forgotten base shows.
MEMORY_BASE = 0x1000_0000
#: Beyond this many cycles without end a run is given up.
CYCLE_LIMIT = 2_000_000_000


class SimulationError(Exception):
    """The run broke a rule of the bus, ended in an error, or did not end."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run gave. ``memory``: uint8 array after the run. ``cycles``: start register accepted to interrupt."""

    memory: np.ndarray
    finished: bool
    cycles: int
    #: Register name -> value after the run (status, error, counters).
    registers: dict
    #: One dict per BARRIER passed: mark, cycle, read_beats, write_beats, execute (cycles in each state since the last).
    marks: list
    read_beats: int
    write_beats: int
    protocol: str
    wall_seconds: float
    #: Time in the design alone; 0 unless profiled.
    eval_seconds: float
    simulated_cycles: int

    @property
    def error(self):
        """Error code the accelerator reports."""
        return registers.Error(self.registers["ERROR_CODE"])

    def check(self):
        """Raises SimulationError unless the program ran to its end without error and the bus rules were kept."""
        if self.protocol:
            raise SimulationError(f"the accelerator broke a bus rule: {self.protocol}")
        if not self.finished:
            raise SimulationError(f"no interrupt within {self.simulated_cycles} cycles")
        if self.error is not registers.Error.NONE:
            at = self.registers["ERROR_ADDRESS_LOW"] | self.registers["ERROR_ADDRESS_HIGH"] << 32
            raise SimulationError(
                f"the accelerator stopped with {self.error.name} at offset 0x{at:x} ({registers.ERROR_DOC[self.error]})"
            )
        return self


def simulate(
    simulator,
    memory,
    *,
    program,
    count,
    latency=16,
    write_latency=None,
    stall=0.0,
    seed=1,
    waves=None,
    limit=CYCLE_LIMIT,
    error_offset=None,
    watchdog=None,
    profile=False,
    progress=None,
):
    """Run ``count`` instructions at byte ``program`` of ``memory`` on a built ``simulator``.

    Args:
        memory: uint8 array, whole beats; it is not changed.
        latency: cycles from an accepted read address to its first beat; one beat per cycle then, bursts without gaps.
        write_latency: cycles from the last write beat to its response; like ``latency`` unless given.
        stall: chance per cycle and channel that the memory pauses, in 0..1 (1 excluded); drawn from ``seed``.
        waves: FST file to write; the simulator must have been built with waves.
        error_offset: bursts that touch this byte answer SLVERR.
        watchdog: value of the watchdog register; unset: the configuration's.
        profile: measure ``eval_seconds``.
        progress: called with (cycles so far, last mark).
    Raises: InputError for arguments out of range; SimulationError if the harness itself fails.
    """
    if not 0 <= stall < 1:
        raise InputError("must be in 0..1, 1 excluded", field="stall", value=stall)
    if not 1 <= latency <= 100_000:
        raise InputError("must be in 1..100000 cycles", field="latency", value=latency)
    with tempfile.TemporaryDirectory(prefix="summand-run-") as folder:
        image, dump = Path(folder, "memory.bin"), Path(folder, "after.bin")
        image.write_bytes(np.ascontiguousarray(memory, dtype=np.uint8).tobytes())
        options = {
            "memory": image,
            "dump": dump,
            "base": MEMORY_BASE,
            "program": program,
            "count": count,
            "latency": latency,
            "write-latency": latency if write_latency is None else write_latency,
            "stall": stall,
            "seed": seed,
            "limit": limit,
        }
        options |= {"waves": Path(waves).resolve()} if waves else {}
        options |= {"error-offset": error_offset} if error_offset is not None else {}
        options |= {"watchdog": watchdog} if watchdog is not None else {}
        options |= {"profile": 1} if profile else {}
        command = [str(simulator), *(word for key, value in options.items() for word in (f"--{key}", str(value)))]
        words = []
        with (
            open(Path(folder, "out"), "w") as out,
            subprocess.Popen(
                command, stdout=out, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
            ) as process,
        ):
            try:
                for line in process.stderr:
                    kind, _, rest = line.strip().partition(" ")
                    if kind == "progress":
                        if progress:
                            progress(*map(int, rest.split()))
                    else:
                        words.append(line.strip())
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise SimulationError(f"{Path(simulator).name} failed: {' '.join(words) or process.returncode}")
        out = json.loads(Path(folder, "out").read_text())
        after = np.frombuffer(dump.read_bytes(), dtype=np.uint8)
    names = (
        "finished",
        "cycles",
        "registers",
        "marks",
        "read_beats",
        "write_beats",
        "protocol",
        "wall_seconds",
        "eval_seconds",
        "simulated_cycles",
    )
    return Run(memory=after, **{name: out[name] for name in names})
