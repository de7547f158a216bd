# amaranth: UnusedElaboratable=no
"""What the constructors of hw/bus refuse, names they derive, and that every preset converts without a warning."""
import re

from hw.bus.burst import BurstSplitter
from hw.bus.read import ReadMaster
from hw.bus.registers import RegisterFile, member_of
from hw.bus.write import WriteMaster
import pytest
from sim_tests.lib.simulate import to_verilog

from spec.config import load, presets
from spec.registers import REGISTERS, Access


@pytest.mark.parametrize("component", [ReadMaster, WriteMaster, RegisterFile])
def test_configuration_must_be_a_config(component):
    with pytest.raises(TypeError, match="Configuration must be a Config, not 3"):
        component(config=3)


def test_bus_configuration_must_be_a_bus_config():
    with pytest.raises(TypeError, match="Bus configuration must be a BusConfig, not 'x'"):
        BurstSplitter(bus="x")


def test_value_finds_members_by_register_name():
    file = RegisterFile(config=load("tiny"))
    for r in REGISTERS:
        held = r.access in (Access.READ_ONLY, Access.READ_WRITE) and r.name not in ("ID", "VERSION") and \
            not r.name.startswith("DIGEST")
        if held:
            assert file.value(r.name) is getattr(file, member_of(r.name)) and len(file.value(r.name)) == r.bits
        else:
            with pytest.raises(KeyError, match=re.escape(f"Register must have a value member, not {r.name!r}")):
                file.value(r.name)


@pytest.mark.parametrize("preset", presets())
@pytest.mark.parametrize("component", [ReadMaster, WriteMaster, RegisterFile])
def test_every_preset_converts(preset, component):
    text = to_verilog(component(config=load(preset)), "dut")
    top = text[text.index("\nmodule dut("):]
    top = top[:top.index("\nendmodule")]
    ports = set(re.findall(r"^  (?:input|output) (?:\[[0-9:]+\] )?(\w+);", top, re.MULTILINE))
    dut = component(config=load(preset))
    assert ports == {"__".join(map(str, path)) for path, _, _ in dut.signature.flatten(dut)} | {"clk", "rst"}
