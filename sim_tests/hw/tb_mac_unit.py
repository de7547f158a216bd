"""The N:M MAC unit under the idle x stall grid, against arithmetic in Python integers."""

import itertools

import cocotb
import numpy as np

from hw.structured.mac_unit import MacUnit
from sim_tests.lib.scoreboard import Scoreboard
from sim_tests.lib.simulate import config_of_run
from sim_tests.lib.streams import Sink, Source, exchange, start
from spec.derive import Sizes
from spec.formats import mac_operand, mac_sum


def model(config, beats):
    """Sum and overflow of one message."""
    s, sizes = config.structured, Sizes(config)
    lo, hi = sizes.accumulator.lo, sizes.accumulator.hi
    total, overflow = 0, 0
    for beat in beats:
        n = 1 << beat["n_log2"]
        for slot in range(s.slots):
            position = slot // n
            index = slot % s.block if n == s.block else beat["index"][slot]
            if position < sizes.stream_blocks:
                total += beat["value"][slot] * beat["stream"][position * s.block + index]
        overflow |= not lo <= total <= hi
        if overflow:
            return {"sum": None, "overflow": 1}
    return {"sum": total, "overflow": 0}


def messages(config, rng, count):
    """Whole-vector extremes first, then random, sparse, one-hot; every pattern; series in one sum."""
    s, sizes = config.structured, Sizes(config)
    width, patterns = sizes.stream_blocks * s.block, [p.n.bit_length() - 1 for p in s.patterns]

    def beat(stream, value, n_log2, last):
        return {
            "stream": np.broadcast_to(stream, width).tolist(),
            "value": np.broadcast_to(value, s.slots).tolist(),
            "index": rng.integers(0, s.block, s.slots).tolist(),
            "n_log2": int(n_log2),
            "last": int(last),
        }

    for a, w, n in itertools.product((-128, 127), (-128, 127), patterns):
        yield [beat(a, w, n, 1)]
    for slot, n in itertools.product(range(s.slots), patterns):
        value = np.zeros(s.slots, int)
        value[slot] = 1
        yield [beat(np.arange(width) % 251 - 125, value, n, 1)]
    # beyond both ends of the accumulator, and exactly to them
    top = 1 << s.accumulator_bits - 1
    enough = top // (16384 * s.slots) + 1
    if enough <= 64:
        yield [beat(-128, -128, patterns[-1], k == enough - 1) for k in range(enough)]
        yield [beat(-128, 127, patterns[-1], k == enough) for k in range(enough + 1)]
        full, rest = divmod(top - 1, 127 * 127 * s.slots)
        exact = [beat(127, 127, patterns[-1], 0) for _ in range(full)]
        for step in (127 * 127, 127, 1):
            while rest >= step:
                value = np.zeros(s.slots, int)
                take = min(rest // step, s.slots)
                value[:take] = {127 * 127: 127, 127: 127, 1: 1}[step]
                exact.append(beat({127 * 127: 127, 127: 1, 1: 1}[step], value, patterns[-1], 0))
                rest -= take * step
        exact[-1]["last"] = 1
        yield exact
        yield [{**b, "last": 0} for b in exact] + [beat(1, np.eye(1, s.slots, dtype=int)[0], patterns[-1], 1)]
    for k in range(count):
        length = int(rng.integers(1, 6))
        yield [
            beat(
                rng.integers(-128, 128, width),
                rng.integers(-128, 128, s.slots) * (rng.random(s.slots) < (1, 0.3)[k % 2]),
                rng.choice(patterns),
                b == length - 1,
            )
            for b in range(length)
        ]


@cocotb.test(timeout_time=2, timeout_unit="ms")
@cocotb.parametrize(idle=[0.0, 0.4], stall=[0.0, 0.4, 0.95])
async def matches_arithmetic(dut, idle, stall):
    config = config_of_run()
    rng = np.random.default_rng(cocotb.RANDOM_SEED)
    operand, result, board = mac_operand(config), mac_sum(config), Scoreboard()
    work = list(messages(config, rng, 30 if stall > 0.5 else 80))
    beats = [b for message in work for b in message]
    source = Source(dut, "i", [operand.pack(**b) for b in beats], idle=idle)
    sink = Sink(dut, "o", stall=stall)
    await start(dut, [source, sink])
    message, took, gave = [], [], []
    async for cycle, port, word in exchange(dut, [source, sink], rng=rng):
        if port == "i":
            message.append(operand.unpack(word))
            if message[-1]["last"]:
                board.expect(model(config, message))
                message = []
                took.append(cycle)
        else:
            got = result.unpack(word)
            board.observe({"sum": None if got["overflow"] else got["sum"], "overflow": got["overflow"]})
            gave.append(cycle)
    board.close(len(work))
    if idle == stall == 0.0:
        assert [b - a for a, b in zip(took, gave)] == [MacUnit.latency] * len(work)
        assert source.taken == len(beats)
        assert took[-1] - took[0] == len(beats) - len(work[0]), "not one beat per cycle"
