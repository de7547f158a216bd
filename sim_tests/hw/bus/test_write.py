"""WriteMaster: built once per configuration, run against cocotbext-axi's memory, and against fast and lying ones."""
from hw.bus.write import WriteMaster
import pytest
from sim_tests.hw.bus.common import CONFIGS
from sim_tests.lib.simulate import run_cocotb


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("bench, tests", [("tb_write", 19), ("tb_write_faults", 68)])
def test_write_master(name, bench, tests, tmp_path):
    config = CONFIGS[name]
    run_cocotb(WriteMaster(config=config), "write_master", f"sim_tests.hw.bus.{bench}", tests, tmp_path, config)
