"""The soak tools themselves: faults are told apart from no-faults, and every failure prints what repeats it."""
from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
import pytest

from hw.bus.burst import RegisterSlice
from sim_tests.soak import PYTHON, mutate, networks, run


class Redundant(wiring.Component):
    """A register and a term that never matters."""

    def __init__(self):
        super().__init__({"a": In(4), "b": In(4), "o": Out(4)})

    def elaborate(self, platform):
        m = Module()
        m.d.sync += self.o.eq(self.a | (self.a & self.b))
        return m


def test_equal_mutants_are_found_and_others_are_not(tmp_path):
    mutants = mutate.netlist(Redundant(), "redundant", tmp_path, 40, 1)
    assert [m.number for m in mutants] == list(range(1, 41)) and "mutsel" in (tmp_path / "mutated.v").read_text()
    same = [m for m in mutants[:16] if mutate.equal(m, "redundant", tmp_path)]
    assert same, "a & b beside a never matters"
    assert all("&" not in str(m) and not (m.wire or "").startswith("o[") for m in same), "the output always matters"


def test_inputs_are_those_of_the_signature():
    assert mutate.inputs_of(RegisterSlice(shape=8)) == ["i__payload", "i__valid", "o__ready"]


def test_table_shows_rate_and_survivors():
    row = {"component": "x", "mutants": 10, "equal": 2, "real": 8, "killed": 6, "rate": .75, "seconds": 1.0,
           "survivors": [{"number": 3, "what": "const0 at y"}]}
    assert "75.0%" in mutate.show([row]) and "survivor 3: const0 at y" in mutate.show([row])


@pytest.mark.parametrize(("part", "text", "command"), [
    (lambda: run.tests(5, 2), "FAILED sim_tests/a.py::t[x] - oops\n1 failed",
     f"SUMMAND_SOAK=1 {PYTHON} -m pytest --seed 5 'sim_tests/a.py::t[x]'"),
    (lambda: run.tests(5, 2), "INTERNALERROR", f"SUMMAND_SOAK=1 {PYTHON} -m pytest -q -rfE -n 2 --seed 5"),
    (lambda: run.networks(5),
     f"network 3: bad\n  repeat with: {PYTHON} -m sim_tests.soak.networks --seed 5 --only 3\nend",
     f"{PYTHON} -m sim_tests.soak.networks --seed 5 --only 3"),
    (lambda: run.networks(5), "Traceback", f"{PYTHON} -m sim_tests.soak.networks --seed 5"),
    (lambda: run.mutants(5, 30), "rate", f"{PYTHON} -m sim_tests.soak.mutate --seed 5 --mutants 30 --least 90"),
])
def test_each_failure_has_a_command(part, text, command, monkeypatch):
    monkeypatch.setattr(run, "call", lambda words, log, *, soak=False: (1, text))
    assert part()[1] == [command]
    monkeypatch.setattr(run, "call", lambda words, log, *, soak=False: (0, "all good"))
    assert part()[1] == []


def test_random_configurations_are_legal_and_differ(rng):
    configs = [networks.random_config(rng) for _ in range(30)]
    assert len({c.digest for c in configs}) == 30
    assert {c.structured.block for c in configs} == {4, 8}


def test_refuses_unknown_campaigns(capsys):
    with pytest.raises(SystemExit):
        mutate.main(["nonsense"])
    assert "no campaign nonsense; known: mac_unit" in capsys.readouterr().err
