"""WriteMaster: built once per configuration, run against cocotbext-axi's memory, and against fast and lying ones."""
from hw.bus.write import WriteMaster
import pytest
from sim_tests.hw.bus.common import CONFIGS, OFTEN
from sim_tests.lib.simulate import run_cocotb


@pytest.mark.parametrize("bench, tests, name", [
    *(("tb_write", 19, name) for name in ("tiny", "wide")), *(("tb_write_faults", 68, name) for name in OFTEN),
    *(("tb_anywhere", 12, name) for name in OFTEN)])
def test_write_master(bench, tests, name, tmp_path):
    config = CONFIGS[name]
    run_cocotb(WriteMaster(config=config), "write_master", f"sim_tests.hw.bus.{bench}", tests, tmp_path, config)
