"""cocotb tests of ReadMaster against cocotbext-axi's memory."""
import cocotb
from cocotbext.axi import AxiRamRead, AxiReadBus
import numpy as np

from hw.bus.read import CLIENTS
from sim_tests.hw.bus.common import (
    BAD_REQUESTS, BASE, PAGE_BYTES, RAM_BYTES, WINDOW_BYTES, bursts_of, error_word, pauses, request_word, requests)
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
    beats = 0
    async for _, port, word in exchange(dut, ends, rng=rng, watch=("beat",)):
        if port == "m_axi__ar":
            assert (word["size"], word["burst"], word["lock"], word["prot"]) == \
                (beat_bytes.bit_length() - 1, 1, 0, 0)
            boards[word["id"]].observe((word["addr"] - BASE, word["len"] + 1))
        elif port == "beat":
            beats += 1
        elif port in boards:
            boards[port].observe(word)
    for number, name in enumerate(CLIENTS):
        boards[f"{name}_data"].close(sum(n for _, n in plans[name]))
        boards[number].close(sum(len(bursts_of(*r, config)) for r in plans[name]))
    assert beats == sum(n for plan in plans.values() for _, n in plan)
    assert dut.idle.value == 1 and dut.error.value == 0


@cocotb.test(timeout_time=1, timeout_unit="ms")
@cocotb.parametrize(case=list(BAD_REQUESTS), client=list(CLIENTS))
async def refuses_what_leaves_the_window(dut, case, client):
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    offset, beats = BAD_REQUESTS[case](config.bus.data_bits // 8)
    memory(dut, rng)
    ends = ends_of(dut, {"load": [], "fetch": [], client: [(offset, beats), (0, 4)]})
    await begin(dut, ends)
    seen = [port async for _, port, _ in exchange(dut, ends, rng=rng)]
    assert seen == [f"{client}_request"] * 2, "both requests are taken, nothing goes out"
    assert int(dut.error.value) == error_word(Error.MEMORY_RANGE, offset)
    assert dut.idle.value == 1


@cocotb.test(timeout_time=1, timeout_unit="ms")
@cocotb.parametrize(client=list(CLIENTS))
async def refuses_a_burst_beyond_the_address_bus(dut, client):
    """The base leaves one page before the end of the address bus: what would wrap around is not issued."""
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    beat_bytes, top = config.bus.data_bits // 8, 1 << config.bus.address_bits
    plan = [(PAGE_BYTES - 2 * beat_bytes, 4)]
    ends = [Tap(dut, "m_axi__ar", AR), Source(dut, f"{client}_request", [request_word(*r) for r in plan])]
    await begin(dut, ends, memory_base=top - PAGE_BYTES, m_axi__arready=1, m_axi__rvalid=0)
    seen = [word["addr"] async for _, port, word in exchange(dut, ends, rng=rng) if port == "m_axi__ar"]
    assert seen == [top - 2 * beat_bytes]
    assert int(dut.error.value) == error_word(Error.MEMORY_RANGE, PAGE_BYTES)
