# amaranth: UnusedElaboratable=no
"""The store unit: results, packing, tokens, errors and timing, for beats of 1 to 16 units."""
import dataclasses

import pytest

from hw.control.store import StoreUnit
from sim_tests.lib.simulate import run_cocotb
from spec.config import load


@pytest.mark.parametrize("data_bits", [32, 64, 128, 512])
def test_store_unit(data_bits, tmp_path, seed):
    """1, 2, 4, 16 units per beat; 8, 4, 2, 1 beats of parameters, the last half filled."""
    config = load("tiny")
    config = dataclasses.replace(config, bus=dataclasses.replace(config.bus, data_bits=data_bits))
    run_cocotb(StoreUnit(config=config), f"store_{data_bits}", "sim_tests.hw.tb_store", 17, tmp_path, config, seed=seed)


def test_refuses_what_is_no_config():
    with pytest.raises(TypeError, match="StoreUnit configuration must be a Config, not 3"):
        StoreUnit(config=3)
