"""What the mutation campaigns run: a component in a small configuration and the cocotb tests that must notice.

The checks are the regular tests themselves, so a mutant that survives here survives `make test` on that configuration.
"""
from dataclasses import dataclass, replace

from hw.basis.multiply import BasisMultiply
from hw.basis.series import SeriesStage
from hw.bus.read import ReadMaster
from hw.bus.write import WriteMaster
from hw.control.command import CommandProcessor
from hw.requantize import Requantizer
from hw.structured.mac_unit import MacUnit
from spec.config import load

TINY = load("tiny")
#: A whole vector of extremes leaves 18 bits: with 32 no test of bearable length would reach an end.
NARROW = replace(TINY, structured=replace(TINY.structured, accumulator_bits=18))

BASIS = load("tiny_basis")
#: Few slices, two beats per tile, and IR that saturates.
SERIES = replace(BASIS, structured=None, bus=replace(BASIS.bus, data_bits=32),
                 basis=replace(BASIS.basis, blocks=2, slices=2, multipliers=3, intermediate_bits=9,
                               accumulator_depth=256))


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """A component (a class with the one argument ``config``), its configuration, modules with cocotb tests."""

    component: type
    modules: tuple[str, ...]
    config: object = TINY

    def build(self):
        """The component."""
        return self.component(config=self.config)


CAMPAIGNS = {
    "mac_unit": Campaign(component=MacUnit, config=NARROW, modules=("sim_tests.hw.tb_mac_unit",)),
    "requantize": Campaign(component=Requantizer, modules=("sim_tests.hw.tb_requantize",)),
    "read_master": Campaign(component=ReadMaster, modules=tuple(
        f"sim_tests.hw.bus.{name}" for name in ("tb_read_faults", "tb_anywhere", "tb_read"))),
    "write_master": Campaign(component=WriteMaster, modules=tuple(
        f"sim_tests.hw.bus.{name}" for name in ("tb_write_faults", "tb_anywhere", "tb_write"))),
    "series_stage": Campaign(component=SeriesStage, config=SERIES, modules=("sim_tests.hw.tb_basis_series",)),
    "basis_multiply": Campaign(component=BasisMultiply, config=SERIES, modules=("sim_tests.hw.tb_basis_multiply",)),
    "command": Campaign(component=CommandProcessor, modules=("sim_tests.hw.tb_command",)),
}
