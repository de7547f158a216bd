"""ReadMaster: built once per configuration, run against cocotbext-axi's memory, and fast, mixed and lying ones."""
from hw.bus.read import ReadMaster
import pytest
from sim_tests.hw.bus.common import CONFIGS
from sim_tests.lib.simulate import run_cocotb


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("bench, tests", [("tb_read", 32), ("tb_read_faults", 119)])
def test_read_master(name, bench, tests, tmp_path):
    config = CONFIGS[name]
    run_cocotb(ReadMaster(config=config), "read_master", f"sim_tests.hw.bus.{bench}", tests, tmp_path, config)
