# amaranth: UnusedElaboratable=no
"""The requantiser: bit-exact, one pixel per cycle, no width too narrow and none too wide."""
import dataclasses

import pytest

from hw.requantize import Requantizer, widths
from sim_tests.lib.simulate import run_cocotb
from spec.config import IntSpec, load


@pytest.mark.parametrize(("preset", "accumulator_bits"), [("tiny", 32), ("tiny", 20), ("nm64", 32)])
def test_matches_reference(preset, accumulator_bits, tmp_path, seed):
    config = load(preset)
    config = dataclasses.replace(
        config, structured=dataclasses.replace(config.structured, accumulator_bits=accumulator_bits))
    run_cocotb(Requantizer(config=config), f"requantizer_{preset}_{accumulator_bits}", "sim_tests.hw.tb_requantize", 9,
               tmp_path, config, seed=seed)


def test_widths_are_those_of_the_contract():
    shapes = widths(IntSpec(32))
    assert {name: shape.width for name, shape in shapes.items()} == \
        {"A": 33, "product": 49, "u": 49, "r": 9, "v": 25, "t": 35, "y": 35}
    assert all(shape.signed for shape in shapes.values())


@pytest.mark.parametrize("bits", [16, 20, 31, 32])
def test_widths_are_reached_at_the_extremes(bits):
    """The extreme inputs fit each shape, and none of the widest would do with one bit less."""
    accumulator = IntSpec(bits)
    shapes = widths(accumulator)
    lows, highs = {}, {}
    for ends, acc, bias, residual, zero in ((lows, accumulator.lo, -2**31, -128, 127),
                                            (highs, accumulator.hi, 2**31 - 1, 127, -128)):
        ends["A"] = acc + bias
        ends["product"] = ends["u"] = ends["A"] * 65535
        ends["r"] = residual - zero
        ends["v"] = ends["r"] * 65535
        ends["t"] = (ends["u"] + ends["v"] + 2**13) >> 14
        ends["y"] = ends["t"] + (-128 if ends is lows else 127)
    for name, shape in shapes.items():
        spec, narrower = IntSpec(shape.width), IntSpec(shape.width - 1)
        assert spec.lo <= lows[name] <= highs[name] <= spec.hi, name
        assert lows[name] < narrower.lo or highs[name] > narrower.hi, f"{name} is wider than its proof"


def test_refuses_what_is_no_config():
    with pytest.raises(TypeError, match="Requantizer configuration must be a Config, not 3"):
        Requantizer(config=3)
