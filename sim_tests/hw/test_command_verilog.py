"""The command processor in Verilator: its checks are also those of the mutation campaign (sim_tests/soak).

One beat per instruction, several, and a beat as wide as one. Further scenarios are in test_command.py.
"""
from hw.control.command import CommandProcessor
import pytest
from sim_tests.hw.configs import CONFIGS
from sim_tests.lib.simulate import run_cocotb


@pytest.mark.parametrize("name", ["tiny", "bus32", "bus256"])
def test_command_processor(name, tmp_path, seed):
    run_cocotb(CommandProcessor(config=CONFIGS[name]), f"command_{name}", "sim_tests.hw.tb_command", 30, tmp_path,
               CONFIGS[name], seed=seed)
