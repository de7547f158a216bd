"""The bench itself, on a design whose every byte and cycle is known."""

import numpy as np
import pytest

from gen import emit
from sim_tests.bench import build
from sim_tests.bench.simulation import SimulationError, simulate
from sim_tests.bench_tests.copier import Copier
from spec import config
from spec.errors import InputError
from spec.registers import Error

CONFIG = config.load("tiny")
BEAT = CONFIG.bus.data_bits // 8
COUNT = 21


def simulator(**kwargs):
    waves = kwargs.pop("waves", False)
    text = emit.to_verilog(Copier(config=CONFIG, **kwargs), emit.top_name(CONFIG))
    return build.simulator(text, emit.header_text(CONFIG), emit.top_name(CONFIG), waves=waves)


@pytest.fixture(scope="module")
def copier():
    return simulator()


def image(rng):
    return rng.integers(0, 256, 4096, dtype=np.uint8)


def run(copier, memory, **kwargs):
    return simulate(copier, memory, program=2048, count=COUNT, **kwargs)


def expected(memory, count=COUNT):
    want = memory.copy()
    want[2048 : 2048 + count * BEAT] = memory[: count * BEAT] + np.uint8(1)
    return want


@pytest.mark.parametrize("latency", [1, 5, 16, 100])
def test_latency_is_what_was_asked(copier, rng, latency):
    memory = image(rng)
    got = run(copier, memory, latency=latency).check()
    assert np.array_equal(got.memory, expected(memory))
    # One beat: read address taken, `latency` later the data, a cycle to write, `latency` later the response.
    per_beat = 1 + latency + 1 + latency
    assert got.registers["CYCLES"] == COUNT * per_beat + 1
    assert got.read_beats == got.write_beats == COUNT == got.registers["READ_BEATS"] == got.registers["WRITE_BEATS"]


def test_write_latency_of_its_own(copier, rng):
    short, long = (run(copier, image(rng), latency=4, write_latency=w).check().cycles for w in (4, 9))
    assert long - short == COUNT * 5


def test_marks_split_the_run(copier, rng):
    got = run(copier, image(rng), latency=7).check()
    assert [m["mark"] for m in got.marks] == [1, 2]
    assert (
        [m["read_beats"] for m in got.marks]
        == [COUNT // 2, COUNT - COUNT // 2]
        == [m["write_beats"] for m in got.marks]
    )
    reading, writing = (sum(m["execute"][state] for m in got.marks) for state in (1, 3))
    assert writing == COUNT * 8 and reading == COUNT * 8
    assert sum(sum(m["execute"]) for m in got.marks) == got.marks[-1]["cycle"]


def test_cycles_reach_from_start_to_interrupt(copier, rng):
    got = run(copier, image(rng), latency=3).check()
    # Start acts two cycles after the write was taken (address and data held, then the pulse), the interrupt comes one
    # register after the end.
    assert 0 < got.cycles - got.registers["CYCLES"] <= 6


@pytest.mark.parametrize("stall", [0.1, 0.5, 0.9])
def test_stalls_change_cycles_not_bytes(copier, rng, stall):
    memory = image(rng)
    base = run(copier, memory).check()
    got = [run(copier, memory, stall=stall, seed=seed).check() for seed in (1, 1, 2)]
    assert all(np.array_equal(g.memory, expected(memory)) for g in got)
    assert got[0].cycles == got[1].cycles != got[2].cycles
    assert all(g.cycles > base.cycles for g in got)


@pytest.mark.parametrize(
    ("offset", "code", "done"),
    [(0, Error.BUS_READ, 0), (5 * BEAT + 3, Error.BUS_READ, 5), (2048 + 7 * BEAT, Error.BUS_WRITE, 7)],
)
def test_injected_error_reaches_the_design(copier, rng, offset, code, done):
    memory = image(rng)
    got = run(copier, memory, error_offset=offset)
    assert got.finished and got.error is code
    assert np.array_equal(got.memory, expected(memory, done))
    with pytest.raises(SimulationError, match=f"stopped with {code.name}"):
        got.check()


def test_a_withdrawn_offer_is_seen(rng):
    got = run(simulator(hold_write=False), image(rng), stall=0.5)
    with pytest.raises(SimulationError, match="broke a bus rule: cycle [0-9]+: W was withdrawn before it was taken"):
        got.check()


def test_leaving_the_memory_is_seen(copier, rng):
    got = simulate(copier, image(rng), program=4096 - BEAT, count=2)
    with pytest.raises(SimulationError, match="AW burst leaves the memory"):
        got.check()


def test_a_run_without_end_is_given_up(copier, rng):
    got = run(copier, image(rng), limit=100)
    assert not got.finished
    with pytest.raises(SimulationError, match="no interrupt within 1[0-9][0-9] cycles"):
        got.check()


def test_wrong_build_is_refused(rng):
    other = config.load("nm64")
    text = emit.to_verilog(Copier(config=CONFIG), emit.top_name(CONFIG))
    header = emit.header_text(CONFIG).replace(CONFIG.digest, other.digest)
    with pytest.raises(SimulationError, match="digest register is not that of the build"):
        run(build.simulator(text, header, emit.top_name(CONFIG)), image(rng))


def test_waves_are_written(tmp_path, rng):
    file = tmp_path / "run.fst"
    run(simulator(waves=True), image(rng), waves=file).check()
    assert file.stat().st_size > 1000


@pytest.mark.parametrize(("field", "value"), [("stall", 1.0), ("stall", -0.1), ("latency", 0)])
def test_argument_out_of_range(copier, rng, field, value):
    with pytest.raises(InputError, match=f"{field} must be in"):
        run(copier, image(rng), **{field: value})
