"""A second, four-valued simulator: small blocks give under Icarus what they give under Verilator, from power-up on.

Skipped by name where ``iverilog`` is not installed; it is never required.
"""
import json
from pathlib import Path
import shutil

from cocotb_tools.check_results import get_results
from cocotb_tools.runner import get_runner
import pytest

from hw.bus.write import WriteMaster
from hw.requantize import Requantizer
from hw.structured.mac_unit import MacUnit
from sim_tests.lib.simulate import to_verilog
from spec.config import load

#: Component, module with its cocotb tests, filter, number of tests.
BLOCKS = {
    "mac_unit": (MacUnit, "sim_tests.hw.tb_mac_unit", None, 6),
    "requantize": (Requantizer, "sim_tests.hw.tb_requantize", "stall=0.4|settled|rate", 4),
    "write_master": (WriteMaster, "sim_tests.hw.bus.tb_write_faults", "idle=0.5/pause=0.5|per_cycle|error_answer", 21),
}


@pytest.mark.skipif(not shutil.which("iverilog"), reason="iverilog is not installed (optional second simulator)")
@pytest.mark.parametrize("name", BLOCKS)
def test_gives_the_same_under_icarus(name, tmp_path, seed):
    component, module, chosen, count = BLOCKS[name]
    config = load("tiny")
    (tmp_path / f"{name}.v").write_text(to_verilog(component(config=config), name))
    runner = get_runner("icarus")
    # With cocotb's -g2012 outputs that depend on state alone stay unknown (Icarus 11); the text is Verilog 2005.
    runner.build(sources=[tmp_path / f"{name}.v"], hdl_toplevel=name, build_dir=tmp_path / "build", always=True,
                 build_args=["-g2005"], timescale=("1ns", "1ps"), log_file=tmp_path / "build.log")
    results = runner.test(
        hdl_toplevel=name, hdl_toplevel_lang="verilog", test_module=module, seed=seed, build_dir=tmp_path / "build",
        test_dir=tmp_path, results_xml=str(tmp_path / "results.xml"), test_filter=chosen,
        extra_env={"SUMMAND_CONFIG": json.dumps(config.to_dict()), "COCOTB_ANSI_OUTPUT": "0",
                   "PYTHONWARNINGS": "error,ignore::DeprecationWarning"})
    assert get_results(Path(results)) == (count, 0)
