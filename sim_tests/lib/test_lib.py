"""The bench helpers: they build, they run, and they fail when they should."""
from amaranth.hdl import Module
from amaranth.lib import stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out
import pytest

from sim_tests.lib.scoreboard import Scoreboard
from sim_tests.lib.simulate import run_cocotb


class Queue(wiring.Component):
    i: In(stream.Signature(8))
    o: Out(stream.Signature(8))

    def elaborate(self, platform):
        m = Module()
        m.submodules.fifo = fifo = SyncFIFOBuffered(width=8, depth=8)
        m.d.comb += [fifo.w_data.eq(self.i.payload), fifo.w_en.eq(self.i.valid), self.i.ready.eq(fifo.w_rdy),
                     self.o.payload.eq(fifo.r_data), self.o.valid.eq(fifo.r_rdy), fifo.r_en.eq(self.o.ready)]
        return m


def test_run_cocotb_runs_the_planned_tests(tmp_path):
    run_cocotb(Queue(), "lib_queue", "sim_tests.lib.tb_self", 6, tmp_path)


def test_run_cocotb_refuses_another_count(tmp_path):
    with pytest.raises(AssertionError, match="planned"):
        run_cocotb(Queue(), "lib_queue", "sim_tests.lib.tb_self", 6, tmp_path, test_filter="no_such_test")


def test_scoreboard_sees_wrong_extra_missing_and_none():
    board = Scoreboard()
    board.expect(1)
    board.observe(1)
    board.close(1)
    with pytest.raises(AssertionError, match="extra 1"):
        board.observe(1)
    board.expect(2, 4)
    with pytest.raises(AssertionError, match="2 items missing, first 2"):
        board.close(2)
    with pytest.raises(AssertionError, match="got 3, expected 2"):
        board.observe(3)
    for count in (0, 4):
        with pytest.raises(AssertionError, match="compared 0 items"):
            Scoreboard().close(count)
