"""The load unit: 1, 2 and 4 units per beat, channel groups of several blocks, one bank."""

import pytest

from hw.control.load import LoadUnit
from sim_tests.hw.configs import CONFIGS
from sim_tests.lib.simulate import run_cocotb


@pytest.mark.parametrize("name", ["bus32", "tiny", "bus128", "groups", "dense"])
def test_load_unit(name, tmp_path, seed):
    run_cocotb(
        LoadUnit(config=CONFIGS[name]), f"load_{name}", "sim_tests.hw.tb_load", 12, tmp_path, CONFIGS[name], seed=seed
    )
