"""ReadMaster: built once per configuration, run against cocotbext-axi's memory, and fast, mixed and lying ones."""
from hw.bus.read import ReadMaster
import pytest
from sim_tests.hw.bus.common import CONFIGS, OFTEN
from sim_tests.lib.simulate import run_cocotb


@pytest.mark.parametrize("bench, tests, name", [
    *(("tb_read", 32, name) for name in ("tiny", "wide")), *(("tb_read_faults", 103, name) for name in OFTEN),
    *(("tb_anywhere", 12, name) for name in OFTEN)])
def test_read_master(bench, tests, name, tmp_path):
    config = CONFIGS[name]
    run_cocotb(ReadMaster(config=config), "read_master", f"sim_tests.hw.bus.{bench}", tests, tmp_path, config)
