"""ReadMaster: built once per configuration, run against memory models."""
from hw.bus.read import ReadMaster
import pytest
from sim_tests.lib.simulate import run_cocotb

from spec.config import load


@pytest.mark.parametrize("preset", ["tiny"])
def test_read_master(preset, tmp_path):
    config = load(preset)
    run_cocotb(ReadMaster(config=config), "read_master", "sim_tests.hw.bus.tb_read", 29, tmp_path, config)
