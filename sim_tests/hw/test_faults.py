"""The whole accelerator on a faulty bus, and resets in every phase."""
import numpy as np

from golden.machine import Machine
from hw.top import Accelerator
from sim_tests.hw.programs import LittleProgram
from sim_tests.lib.simulate import run_cocotb
from spec.config import load


def test_bus_faults_and_resets(tmp_path, rng, seed):
    config = load("tiny")
    little = LittleProgram(config, rng)
    after = little.memory.copy()
    Machine(config, after).run(little.program, little.count)
    np.savez(tmp_path / "job.npz", before=little.memory, after=after, program=np.array([little.program, little.count]))
    # the build is that of test_top
    run_cocotb(Accelerator(config=config), "summand_tiny", "sim_tests.hw.tb_faults", 11, tmp_path, config, seed=seed,
               env={"SUMMAND_JOBS": str(tmp_path / "job.npz")}, flags=("-Wno-CASEINCOMPLETE",))
