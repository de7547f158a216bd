"""The structured engine with its memories."""

import pytest

from sim_tests.hw.configs import CONFIGS
from sim_tests.hw.engine_bench import EngineBench
from sim_tests.lib.simulate import run_cocotb


@pytest.mark.parametrize("name", ["tiny", "dense", "block8", "narrow"])
def test_engine(name, tmp_path, seed):
    run_cocotb(
        EngineBench(config=CONFIGS[name]),
        f"engine_{name}",
        "sim_tests.hw.tb_engine",
        10,
        tmp_path,
        CONFIGS[name],
        seed=seed,
    )
