"""WriteMaster: built once per configuration, run against memory models."""
from hw.bus.write import WriteMaster
import pytest
from sim_tests.lib.simulate import run_cocotb

from spec.config import load


@pytest.mark.parametrize("preset", ["tiny"])
def test_write_master(preset, tmp_path):
    config = load(preset)
    run_cocotb(WriteMaster(config=config), "write_master", "sim_tests.hw.bus.tb_write", 17, tmp_path, config)
