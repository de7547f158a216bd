"""Tokens from hazards."""
import pytest

from lowering.program import Program
from spec.config import load
from spec.derive import Sizes
from spec.isa import LinearTarget, Opcode, Operation, decode


@pytest.fixture
def program():
    return Program(Sizes(load("tiny")))


def _load(program, first, beats):
    program.emit(Opcode.LOAD_LINEAR, writes=[("weight", first, beats)], target=LinearTarget.WEIGHT, address=0,
                 beats=beats, base=first)


def _execute(program, first, beats):
    program.emit(Opcode.EXECUTE, reads=[("weight", first, beats)], writes=[("bank", 0, 1)], rows=1, cols=1, steps=1,
                 weight=first, operation=Operation.ADD)


def _tokens(program):
    words = [decode(int.from_bytes(row[:32].tobytes(), "little")) for row in program.finish(0)]
    return [(op.name, {k for k, v in f.items() if v and k.startswith(("wait", "push"))}) for op, f in words]


def test_read_after_write_and_write_after_read(program):
    _load(program, 0, 4)
    _execute(program, 2, 4)
    _load(program, 4, 4)
    assert _tokens(program)[1:4] == [("LOAD_LINEAR", {"push_execute"}), ("EXECUTE", {"wait_load", "push_load"}),
                                     ("LOAD_LINEAR", {"wait_execute"})]


def test_a_later_wait_covers_earlier_producers(program):
    _load(program, 0, 4)
    _load(program, 4, 4)
    _execute(program, 4, 4)
    _execute(program, 0, 4)
    assert [t for _, t in _tokens(program)[1:5]] == [set(), {"push_execute"}, {"wait_load"}, set()]


def test_independent_places_exchange_nothing(program):
    _load(program, 0, 4)
    _execute(program, 8, 4)
    assert [t for _, t in _tokens(program)[1:3]] == [set(), set()]


def test_barrier_ends_all_hazards(program):
    _load(program, 0, 4)
    program.barrier(9)
    _execute(program, 0, 4)
    assert [t for _, t in _tokens(program)] == [set()] * 5


def test_leaving_a_memory_is_found(program):
    with pytest.raises(RuntimeError, match=r"lowering left the weight memory: 62 \+ 4 > 64"):
        _load(program, 62, 4)


def test_token_faults_are_found(program):
    program.emit(Opcode.EXECUTE, wait_load=1)
    with pytest.raises(RuntimeError, match="a token nobody gave"):
        program.finish(0)


def test_tokens_left_behind_are_found(program):
    program.emit(Opcode.EXECUTE, push_load=1)
    with pytest.raises(RuntimeError, match="leaves tokens behind"):
        program.finish(0)


def test_token_overflow_is_found(program):
    for _ in range(250):
        program.emit(Opcode.EXECUTE, push_load=1)
    with pytest.raises(RuntimeError, match="overflows a token counter"):
        program.finish(0)
