"""golden.cycles against the RTL: every counter, every BARRIER of random programs and layers, to the cycle."""
import os

import pytest

from golden import basis_cycles, cycles
from hw.basis.map_decoder import MapDecoder
from hw.basis.maps import MapStage
from hw.basis.multiply import BasisMultiply
from hw.basis.series import SeriesStage
from hw.basis.streamer import BasisStreamer
from hw.bus.burst import RegisterSlice
from hw.bus.read import ReadMaster
from hw.control.store import StoreUnit
from hw.requantize import Requantizer
from hw.structured.engine import StructuredEngine
from hw.structured.weight_loader import WeightLoader
from sim_tests.hw.configs import TINY
from sim_tests.soak.cycles import differences, measure, points, simulator
from spec.config import load

#: Programs and layers compared on each configuration; `make soak` compares more with each of its seeds.
POINTS = 100 if os.environ.get("SUMMAND_SOAK") else 24
CONFIGS = {config.name: config for config in (TINY, load("tiny_basis"), load("tiny_maps"))}
COMMON = [(cycles, name) for name in ("SPLIT", "ADDRESS", "DATA", "SIZE", "LOAD_TOKEN", "REQUANTIZE", "WRITE_DATA",
                                      "STORE_TOKEN", "INTERRUPT")]
STRUCTURED = [(cycles, name) for name in ("STEP_TABLE", "STEP_SWAP", "STEP_OFFER", "EXECUTE_LATENCY")]
BASIS = [(basis_cycles, name) for name in ("LOADER_CHECK", "LOADER_LOAD", "STREAM", "MULTIPLY_LATENCY")]
#: Constants of the model that decide about the cycles of a configuration.
CONSTANTS = {
    "tiny": COMMON + STRUCTURED, "tiny_basis": COMMON + STRUCTURED + BASIS + [(basis_cycles, "SERIES_STAGE")],
    "tiny_maps": COMMON + BASIS + [(basis_cycles, n) for n in ("MAP_LANES", "MAP_ADD", "MAP_SUM", "MAP_OUTPUT")]}


def test_constants_are_those_the_hardware_documents():
    assert StructuredEngine.latency == cycles.EXECUTE_LATENCY
    assert WeightLoader.overhead == cycles.STEP_SWAP + cycles.STEP_OFFER - 1
    assert Requantizer.latency == StoreUnit.turnaround == cycles.REQUANTIZE
    assert StoreUnit.latency == cycles.REQUANTIZE + 3
    assert RegisterSlice.latency == ReadMaster.data_latency == cycles.DATA
    assert BasisStreamer.latency == basis_cycles.STREAM and SeriesStage.latency == basis_cycles.SERIES_STAGE
    assert MapStage.latency == sum(getattr(basis_cycles, name) for _, name in CONSTANTS["tiny_maps"][-4:])
    assert MapDecoder.fifo_beats == basis_cycles.DECODER_BEATS
    assert BasisMultiply.latency == basis_cycles.MULTIPLY_LATENCY


@pytest.fixture(scope="module", params=CONFIGS)
def built(request):
    """(configuration, executable)"""
    return CONFIGS[request.param], simulator(CONFIGS[request.param])


@pytest.fixture
def measured(built, seed):
    """[(configuration, point, what the RTL did)]"""
    config, executable = built
    return [(config, point, measure(executable, point)) for _, point in points(config, seed, POINTS)]


def test_model_equals_hardware_to_the_cycle(measured):
    assert len(measured) == POINTS
    for config, point, run in measured:
        wrong = differences(config, point, run)
        assert not wrong, (config.name, point.what, point.latency, point.write_latency, wrong)


def test_comparison_sees_one_cycle(measured, monkeypatch):
    """The check itself: every constant of the model, off by one, shows within these points."""
    for module, name in CONSTANTS[measured[0][0].name]:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, getattr(module, name) + 1)
            assert any(differences(*one) for one in measured), name
