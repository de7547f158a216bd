"""cocotb tests of the requantiser."""
import itertools

import cocotb
from cocotb.triggers import ClockCycles, FallingEdge
import numpy as np

from golden.requantize import requantize
from hw.requantize import Requantizer
from sim_tests.lib.scoreboard import Scoreboard
from sim_tests.lib.simulate import config_of_run
from sim_tests.lib.streams import Sink, Source, exchange, start
from spec.config import IntSpec
from spec.derive import FRACTION_BITS, Sizes
from spec.formats import BIT, Field, Record, column_parameters

INT8 = IntSpec(8)
ACCUMULATORS = (0, 1, -1, 2, 8191, 8192, -8192, -8193, 24576)
BIASES = (-2**31, 2**31 - 1, 0, -1)
MULTIPLIERS = (65535, 0, 1, 16384, 8192, 32768)
SHIFTS = (0, 31, 1, 17)


def reference(acc, residual, group):
    """docs/numerics.md in Python integers, one pixel."""
    out = []
    for a, r, (bias, multiplier, shift) in zip(acc, residual, group["parameters"]):
        u = ((a + bias) * multiplier) >> shift
        v = (r - group["residual_zero_point"]) * group["residual_multiplier"] if group["residual_enable"] else 0
        out.append(min(max(((u + v + 2**13) >> 14) + group["zero_point"], group["low"]), group["high"]))
    return out


def groups(config, rng, count):
    """Groups of pixels under one setting: every combination of extremes, then around the clamps, then anything."""
    columns, accumulator = config.structured.columns, Sizes(config).accumulator
    edges = [accumulator.lo, accumulator.hi, *(a for a in ACCUMULATORS if accumulator.lo <= a <= accumulator.hi)]
    corners = list(itertools.product(BIASES, MULTIPLIERS, SHIFTS))
    rng.shuffle(corners)
    for at in range(0, min(len(corners), count * columns), columns):
        chosen = (corners * 2)[at:at + columns]
        yield setting(rng, chosen, extreme=True), [([a] * columns, [r] * columns) for a, r in
                                                   zip(edges, itertools.cycle((-128, 127, 0)))]
    for n in range(count):
        yield nearest(rng, columns, accumulator, tie=n % 2 == 0)
        if n % 2:  # scales about 1, sums about the int8 range: the clamps and the ties decide
            parameters = [(int(rng.integers(-64, 65)), int(rng.choice([16384, 8192, 24576, 65535])),
                           int(rng.integers(0, 3))) for _ in range(columns)]
            accs = rng.integers(-400, 400, (8, columns))
        else:
            parameters = [(int(rng.integers(-2**31, 2**31)) >> int(rng.integers(0, 31)),
                           int(rng.integers(0, 65536)), int(rng.integers(0, 32))) for _ in range(columns)]
            accs = rng.integers(accumulator.lo, accumulator.hi + 1, (8, columns)) >> rng.integers(0, 31, (8, columns))
        yield setting(rng, parameters), [(a, rng.integers(-128, 128, columns).tolist()) for a in accs.tolist()]


def nearest(rng, columns, accumulator, *, tie):
    """Pixels where one unit of ``A * multiplier`` decides: at a tie of the rounding, or at a clamp and beside it."""
    chosen = setting(rng, [(0, 0, 0)] * columns)
    residuals = rng.integers(-128, 128, (8, columns)).tolist()
    accs = np.zeros((8, columns), int)
    for column in range(columns):
        # Half of them without shift: then the lowest bits of the product decide too.
        shift = int(rng.integers(0, min(12, accumulator.bits - 18) + 1)) if tie and rng.random() < 0.5 else 0
        multiplier = 2 * int(rng.integers(0, 60)) + 1 if tie else 16384
        chosen["parameters"][column] = (int(rng.integers(-500, 500)), multiplier, shift)
        period = 1 << FRACTION_BITS + shift
        for n, residual in enumerate(residuals):
            v = (residual[column] - chosen["residual_zero_point"]) * chosen["residual_multiplier"]
            v *= chosen["residual_enable"]
            if tie:     # u + v + half is a multiple of 2**14; or the product is one less
                product = (-v - (1 << FRACTION_BITS - 1)) % (1 << FRACTION_BITS) << shift
                sum_ = (product - n % 2) * pow(multiplier, -1, period) % period
                sum_ -= period if sum_ >= period // 2 else 0
            else:
                clamp = chosen["low"] if n % 2 else chosen["high"]
                sum_ = clamp - chosen["zero_point"] + int(rng.integers(-1, 2))
                sum_ -= v + (1 << FRACTION_BITS - 1) >> FRACTION_BITS
            accs[n, column] = min(max(sum_ - chosen["parameters"][column][0], accumulator.lo), accumulator.hi)
    return chosen, list(zip(accs.tolist(), residuals))


def setting(rng, parameters, *, extreme=False):
    low, high = sorted(rng.integers(-128, 128, 2).tolist()) if rng.random() < 0.5 else (-128, 127)
    return {"parameters": [tuple(map(int, p)) for p in parameters],
            "zero_point": int(rng.choice([-128, 127, 0, int(rng.integers(-128, 128))])), "low": low, "high": high,
            "residual_enable": int(rng.integers(0, 2)),
            "residual_zero_point": int(rng.choice([-128, 127])) if extreme else int(rng.integers(-128, 128)),
            "residual_multiplier": int(rng.choice([65535, 16384, 0, int(rng.integers(0, 65536))]))}


def drive(dut, config, group):
    record = Record("parameters", column_parameters().fields[:3])
    words = [record.pack(bias=b, multiplier=m, shift=s) for b, m, s in group["parameters"]]
    dut.parameters.value = sum(word << record.bits * n for n, word in enumerate(words))
    for name in ("zero_point", "low", "high", "residual_zero_point"):
        getattr(dut, name).value = group[name] & 255
    for name in ("residual_enable", "residual_multiplier"):
        getattr(dut, name).value = group[name]


async def reset(dut, ends=(), **inputs):
    """`sim_tests.lib.streams.start` in mid-test: everything goes on as it is driven while the clock runs."""
    dut.rst.value = 1
    await ClockCycles(dut.clk, 1)
    await FallingEdge(dut.clk)
    for end in ends:
        if isinstance(end, Source):
            end.valid.value = 0
    for name, value in inputs.items():
        getattr(dut, name).value = value
    dut.rst.value = 0


async def run(dut, *, idle, stall, count, begin=start):
    """Change the setting at the first edge at which `settled` allows it; return (took, gave, compared)."""
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    columns, accumulator = config.structured.columns, Sizes(config).accumulator
    taken = Record("i", (Field("acc", accumulator, columns, ""), Field("residual", INT8, columns, ""),
                         Field("last", BIT, None, "")))
    given = Record("o", (Field("data", INT8, columns, ""), Field("last", BIT, None, "")))
    todo = list(groups(config, rng, count))
    planned = sum(len(pixels) for _, pixels in todo)
    source, sink = Source(dut, "i", idle=idle), Sink(dut, "o", stall=stall)
    board, oracle, took, gave = Scoreboard("pixel"), Scoreboard("golden"), [], []
    state = {"group": None, "settled": 0}
    await begin(dut, (source, sink))

    def next_group(cycle):
        if todo and not source.words and state["settled"] == cycle - 1:
            state["group"], pixels = todo.pop(0)
            drive(dut, config, state["group"])
            source.words.extend(taken.pack(acc=a, residual=r, last=int(rng.integers(2))) for a, r in pixels)

    state["settled"] = -1
    async for cycle, port, word in exchange(dut, (source, sink), rng=rng, watch=("settled",), on_cycle=next_group,
                                            until=lambda: not todo):
        if port == "settled":
            state["settled"] = cycle
        elif port == "i":
            took.append(cycle)
            pixel, group = taken.unpack(word), state["group"]
            board.expect({"data": reference(pixel["acc"], pixel["residual"], group), "last": pixel["last"]})
            bias, multiplier, shift = zip(*group["parameters"])
            oracle.expect(requantize(
                np.array([pixel["acc"]]), bias=np.array(bias), multiplier=np.array(multiplier), shift=np.array(shift),
                zero_point=group["zero_point"], low=group["low"], high=group["high"],
                residual=np.array([pixel["residual"]]) if group["residual_enable"] else None,
                residual_zero_point=group["residual_zero_point"],
                residual_multiplier=group["residual_multiplier"])[0].tolist())
        else:
            gave.append(cycle)
            board.observe(given.unpack(word))
            oracle.observe(given.unpack(word)["data"])
    board.close(planned)
    oracle.close(planned)
    return took, gave


@cocotb.test(timeout_time=2, timeout_unit="ms")
@cocotb.parametrize(idle=[0.0, 0.4], stall=[0.0, 0.4, 0.9])
async def matches_reference(dut, idle, stall):
    await run(dut, idle=idle, stall=stall, count=8 if stall > 0.5 else 24)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def meets_rate_and_latency(dut):
    took, gave = await run(dut, idle=0.0, stall=0.0, count=4)
    assert [b - a for a, b in zip(took, gave)] == [Requantizer.latency] * len(took)
    # Inside a group one pixel per cycle; between groups the pixels ahead leave the three stages that read the setting.
    gaps = [b - a for a, b in itertools.pairwise(took)]
    assert set(gaps) == {1, Requantizer.latency} and gaps.count(Requantizer.latency) < len(gaps) // 4, gaps


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def reset_in_mid_flight_leaves_nothing(dut):
    """After traffic that is cut off by reset, nothing of it comes out."""
    source = Source(dut, "i", [(1 << len(dut.i__payload)) - 1] * 3)
    await start(dut, (source, Sink(dut, "o")))
    taken = [port async for _, port, _ in exchange(dut, (source,), rng=np.random.default_rng(1), drain=8)]
    assert taken == ["i"] * 3 and dut.o__valid.value == 1 and dut.settled.value == 0
    await run(dut, idle=0.0, stall=0.0, count=2, begin=reset)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def settled_does_not_wait_for_the_output(dut):
    """The pixel that waits at the output needs no setting any more; the one behind it does."""
    for pixels in range(1, 4):
        source = Source(dut, "i", [0] * pixels)
        await (reset if pixels > 1 else start)(dut, (source, Sink(dut, "o")))
        seen = [port async for _, port, _ in exchange(dut, (source,), rng=np.random.default_rng(1), drain=20,
                                                      watch=("settled",))]
        assert seen.count("i") == pixels
        assert dut.o__valid.value == 1 and int(dut.settled.value) == (pixels == 1)
