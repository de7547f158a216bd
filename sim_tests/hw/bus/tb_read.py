"""cocotb tests of ReadMaster against cocotbext-axi's memory."""
import cocotb
from cocotbext.axi import AxiRamRead, AxiReadBus
import numpy as np

from hw.bus.read import CLIENTS
from sim_tests.hw.bus.common import BASE, RAM_BYTES, WINDOW_BYTES, bursts_of, error_word, pauses, request_word, requests
from sim_tests.lib.scoreboard import Scoreboard
from sim_tests.lib.simulate import config_of_run
from sim_tests.lib.streams import Sink, Source, Tap, exchange, start
from spec.registers import Error

AR = ("id", "addr", "len", "size", "burst", "lock", "cache", "prot")


def memory(dut, rng, pause=0.0):
    ram = AxiRamRead(AxiReadBus.from_prefix(dut, "m_axi", bus_separator="__"), dut.clk, dut.rst, size=RAM_BYTES)
    ram.write(0, rng.bytes(RAM_BYTES))
    if pause:
        for n, channel in enumerate((ram.ar_channel, ram.r_channel)):
            channel.set_pause_generator(pauses(pause, int(rng.integers(1 << 30)) + n))
    return ram


def ends_of(dut, plans, *, idle=0.0, stall=0.0):
    ends = [Tap(dut, "m_axi__ar", AR)]
    for name in CLIENTS:
        words = [request_word(*r) for r in plans[name]]
        ends += [Source(dut, f"{name}_request", words, idle=idle), Sink(dut, f"{name}_data", stall=stall)]
    return ends


async def begin(dut, ends, **inputs):
    await start(dut, ends, **{"stop": 0, "memory_base": BASE, "memory_bytes": WINDOW_BYTES, **inputs})


@cocotb.test(timeout_time=5, timeout_unit="ms")
@cocotb.parametrize(idle=[0.0, 0.5], stall=[0.0, 0.4, 0.9], pause=[0.0, 0.5])
async def delivers_what_memory_holds(dut, idle, stall, pause):
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    beat_bytes = config.bus.data_bits // 8
    ram = memory(dut, rng, pause)
    plans = {"load": requests(config, rng, 10), "fetch": requests(config, rng, 10)[::-1]}
    ends = ends_of(dut, plans, idle=idle, stall=stall)
    boards = {}
    for number, name in enumerate(CLIENTS):
        boards[f"{name}_data"], boards[number] = Scoreboard(f"{name} data"), Scoreboard(f"{name} burst")
        for offset, beats in plans[name]:
            for b in range(beats):
                where = BASE + offset + b * beat_bytes
                boards[f"{name}_data"].expect(int.from_bytes(ram.read(where, beat_bytes), "little"))
            boards[number].expect(*bursts_of(offset, beats, config))
    await begin(dut, ends)
    beats = in_flight = most = 0
    async for _, port, word in exchange(dut, ends, rng=rng, watch=("beat",)):
        if port == "m_axi__ar":
            assert (word["size"], word["burst"], word["lock"], word["prot"]) == \
                (beat_bytes.bit_length() - 1, 1, 0, 0)
            boards[word["id"]].observe((word["addr"] - BASE, word["len"] + 1))
        elif port == "beat":
            beats += 1
        elif port in boards:
            boards[port].observe(word)
        in_flight = boards[0].passed + boards[1].passed
        most = max(most, in_flight)
    for number, name in enumerate(CLIENTS):
        boards[f"{name}_data"].close(sum(n for _, n in plans[name]))
        boards[number].close(sum(len(bursts_of(*r, config)) for r in plans[name]))
    assert beats == sum(n for plan in plans.values() for _, n in plan)
    assert dut.idle.value == 1 and dut.error.value == 0


@cocotb.test(timeout_time=1, timeout_unit="ms")
@cocotb.parametrize(offset_beats_length=[(-1, 1), (0, 0), (-2, 3), ("end", 1), ("far", 1), (0, "window+1")],
                    client=list(CLIENTS))
async def refuses_what_leaves_the_window(dut, offset_beats_length, client):
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    beat_bytes = config.bus.data_bits // 8
    window = WINDOW_BYTES // beat_bytes
    first, beats = offset_beats_length
    first = {"end": window, "far": (1 << 40) // beat_bytes - 1}.get(first, first)
    first, beats = first % window if first == -1 and beats == 3 else first, window + 1 if beats == "window+1" else beats
    if first == -1:
        first, beats = window - 1, 2
    elif first == -2:
        first = window - 2
    memory(dut, rng)
    ends = ends_of(dut, {"load": [], "fetch": [], client: [(first * beat_bytes, beats)]})
    await begin(dut, ends)
    seen = [port async for _, port, _ in exchange(dut, ends, rng=rng)]
    assert seen == [f"{client}_request"]
    assert int(dut.error.value) == error_word(Error.MEMORY_RANGE, first * beat_bytes)
    assert dut.idle.value == 1


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def refuses_a_misaligned_offset(dut):
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    for low in (1, config.bus.data_bits // 16, config.bus.data_bits // 8 - 1):
        memory(dut, rng)
        ends = ends_of(dut, {"load": [(0x100 + low, 1)], "fetch": []})
        await begin(dut, ends)
        assert [port async for _, port, _ in exchange(dut, ends, rng=rng, drain=20)] == ["load_request"]
        assert int(dut.error.value) == error_word(Error.MEMORY_RANGE, 0x100 + low)


@cocotb.test(timeout_time=1, timeout_unit="ms")
@cocotb.parametrize(client=list(CLIENTS), split=[False, True])
async def one_beat_per_cycle(dut, client, split):
    """N beats take N cycles from the first to the last, in long requests and in requests of one beat each."""
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    beat_bytes, beats = config.bus.data_bits // 8, 200
    memory(dut, rng)
    plan = [(n * beat_bytes, 1) for n in range(beats)] if split else [(0, beats)]
    ends = ends_of(dut, {"load": [], "fetch": [], client: plan})
    await begin(dut, ends)
    times = {}
    async for cycle, port, _ in exchange(dut, ends, rng=rng):
        times.setdefault(port, []).append(cycle)
    data, ar = times[f"{client}_data"], times["m_axi__ar"]
    assert len(data) == beats
    assert ar[0] - times[f"{client}_request"][0] == 2
    if split:  # the memory model starts a burst every second cycle, and limits it
        assert data[-1] - data[0] <= 3 * beats
    else:
        bursts = len(ar)
        assert data[-1] - data[0] <= beats - 1 + 2 * bursts
