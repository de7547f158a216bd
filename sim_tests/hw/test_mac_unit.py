"""The N:M MAC unit alone."""

from dataclasses import replace

import pytest

from hw.structured.mac_unit import MacUnit
from sim_tests.lib.simulate import run_cocotb
from spec.config import Config, Pattern, StructuredConfig, load

CONFIGS = {
    "tiny": load("tiny"),
    # a narrow accumulator reaches both of its ends
    "narrow": replace(load("tiny"), structured=replace(load("tiny").structured, accumulator_bits=18)),
    # a port narrower than 1:8 asks for
    "throttled": replace(
        load("nm64"), structured=replace(load("nm64").structured, stream_blocks=4, accumulator_bits=20)
    ),
    "wide": Config(
        structured=StructuredConfig(
            columns=16,
            slots=16,
            block=16,
            patterns=(Pattern(1, 16), Pattern(2, 16), Pattern(4, 16), Pattern(8, 16), Pattern(16, 16)),
        )
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_mac_unit(name, tmp_path):
    run_cocotb(MacUnit(config=CONFIGS[name]), "mac_unit", "sim_tests.hw.tb_mac_unit", 6, tmp_path, CONFIGS[name])
