"""cocotb tests of the bench helpers themselves, on a queue of eight bytes."""
import cocotb
import numpy as np

from sim_tests.lib.scoreboard import Scoreboard
from sim_tests.lib.simulate import config_of_run
from sim_tests.lib.streams import Sink, Source, exchange, start


@cocotb.test(timeout_time=1, timeout_unit="ms")
@cocotb.parametrize(idle=[0.0, 0.4], stall=[0.0, 0.4, 0.95])
async def a_queue_keeps_order(dut, idle, stall):
    assert config_of_run().name == "nm256"
    rng, board, timing = np.random.default_rng(cocotb.RANDOM_SEED), Scoreboard(), {"i": [], "o": []}
    words = rng.integers(0, 256, 100).tolist()
    ends = Source(dut, "i", words, idle=idle), Sink(dut, "o", stall=stall)
    await start(dut, ends)
    async for cycle, port, word in exchange(dut, ends, rng=rng):
        timing[port].append(cycle)
        (board.expect if port == "i" else board.observe)(word)
    board.close(100)
    if idle == stall == 0.0:
        assert timing["o"][-1] - timing["o"][0] == 99
