"""The multipliers of the basis engine, as Verilog with shared modules."""

import pytest

from gen.emit import to_verilog
from hw.basis.multiply import BasisMultiply
from sim_tests.hw.test_basis_programs import CONFIGS
from sim_tests.lib.simulate import run_cocotb


@pytest.mark.parametrize("name", ["tiny_basis", "tiny_maps", "bus32"])
def test_basis_multiply(name, tmp_path, seed):
    config = CONFIGS[name]
    run_cocotb(to_verilog(BasisMultiply(config=config), "basis_multiply"), "basis_multiply",
               "sim_tests.hw.tb_basis_multiply", 8, tmp_path, config, seed=seed)
