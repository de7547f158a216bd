"""The whole coefficient stage for maps, as Verilog with shared modules."""

import re

import pytest

from gen.emit import to_verilog
from golden.coefficients import pack_maps
from golden.concentration import pixel_word_cycles
from hw.basis.maps import MapStage
from sim_tests.hw.basis_reference import CONFIGS, pack, random_activations, random_coefficients, rows, word_cycles
from sim_tests.lib.simulate import run_cocotb
from spec.config import load


@pytest.mark.parametrize("name", ["tiny", "plain", "group16", "long"])
def test_map_stage(name, tmp_path, seed):
    config = CONFIGS[name]
    run_cocotb(to_verilog(MapStage(config=config), "map_stage"), "map_stage", "sim_tests.hw.tb_map_stage", 9, tmp_path,
               config, seed=seed)


@pytest.mark.parametrize("name", CONFIGS)
def test_reference_agrees_with_golden(name, rng):
    """Two independent writers of one format, two of one rule."""
    config = CONFIGS[name]
    b = config.basis
    for density in (0, 0.2, 0.7, 1):
        groups = int(rng.integers(1, 2 * b.stream_groups + 1))
        coefficients = random_coefficients(rng, (b.blocks, b.slices, groups, b.group), density)
        beats = b"".join(v.to_bytes(config.bus.data_bits // 8, "little") for v in pack(config, coefficients))
        assert beats == pack_maps(coefficients, config)
        pixel = random_activations(rng, (groups, b.group), 0.7)
        every = coefficients.reshape(-1, groups, b.group)
        got = [word_cycles(config, c, a) for c, a in zip(rows(config, every), rows(config, pixel[None])[:, 0])]
        assert got == pixel_word_cycles(
            (pixel != 0)[None], coefficients, stream_groups=b.stream_groups, look_aside=b.look_aside)[0].tolist()


def test_equal_parts_are_written_once():
    text = to_verilog(MapStage(config=load("maps288")), "map_stage")
    for module in ("summand_map_slice", "summand_concentrator", "summand_map_decoder", "summand_ram"):
        assert text.count(f"\nmodule {module}") + text.startswith(f"module {module}") == 1, module
    assert len(re.findall(r"^  summand_map_slice ", text, re.MULTILINE)) == 96 and len(text) < 2_000_000
