"""RegisterFile: the table of `spec.registers` in hardware."""
from hw.bus.registers import RegisterFile
import pytest
from sim_tests.lib.simulate import run_cocotb

from spec.config import load


@pytest.mark.parametrize("preset", ["tiny"])
def test_register_file(preset, tmp_path):
    config = load(preset)
    run_cocotb(RegisterFile(config=config), "register_file", "sim_tests.hw.bus.tb_registers", 19, tmp_path, config)
