"""golden.cycles against the RTL of tiny: every counter, every BARRIER of random programs and layers, to the cycle."""
import os

import pytest

from golden import cycles
from hw.bus.burst import RegisterSlice
from hw.bus.read import ReadMaster
from hw.control.store import StoreUnit
from hw.requantize import Requantizer
from hw.structured.engine import StructuredEngine
from hw.structured.weight_loader import WeightLoader
from sim_tests.hw.configs import TINY
from sim_tests.soak.cycles import differences, measure, points, simulator

#: Programs and layers compared; `make soak` compares more with each of its seeds.
POINTS = 100 if os.environ.get("SUMMAND_SOAK") else 24


def test_constants_are_those_the_hardware_documents():
    assert StructuredEngine.latency == cycles.EXECUTE_LATENCY
    assert WeightLoader.overhead == cycles.STEP_SWAP + cycles.STEP_OFFER - 1
    assert Requantizer.latency == StoreUnit.turnaround == cycles.REQUANTIZE
    assert StoreUnit.latency == cycles.REQUANTIZE + 3
    assert RegisterSlice.latency == ReadMaster.data_latency == cycles.DATA


@pytest.fixture(scope="module")
def executable():
    return simulator(TINY)


@pytest.fixture
def measured(executable, seed):
    """[(point, what the RTL did)]"""
    return [(point, measure(executable, point)) for _, point in points(TINY, seed, POINTS)]


def test_model_equals_hardware_to_the_cycle(measured):
    assert len(measured) == POINTS
    for point, run in measured:
        wrong = differences(TINY, point, run)
        assert not wrong, (point.what, point.latency, point.write_latency, wrong)


def test_comparison_sees_one_cycle(measured, monkeypatch):
    """The check itself: every constant of the model, off by one, shows within these points."""
    for name in ("SPLIT", "ADDRESS", "DATA", "SIZE", "LOAD_TOKEN", "STEP_TABLE", "STEP_SWAP", "STEP_OFFER",
                 "EXECUTE_LATENCY", "REQUANTIZE", "WRITE_DATA", "STORE_TOKEN", "INTERRUPT"):
        with monkeypatch.context() as patch:
            patch.setattr(cycles, name, getattr(cycles, name) + 1)
            assert any(differences(TINY, point, run) for point, run in measured), name
