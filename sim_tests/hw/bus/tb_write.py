"""cocotb tests of WriteMaster against cocotbext-axi's memory."""
import cocotb
from cocotbext.axi import AxiRamWrite, AxiWriteBus
import numpy as np

from sim_tests.hw.bus.common import (
    BAD_REQUESTS, BASE, PAGE_BYTES, RAM_BYTES, WINDOW_BYTES, bursts_of, error_word, pauses, request_word, requests)
from sim_tests.lib.scoreboard import Scoreboard
from sim_tests.lib.simulate import config_of_run
from sim_tests.lib.streams import Source, Tap, exchange, start
from spec.registers import Error

AW, W = ("id", "addr", "len", "size", "burst", "lock", "prot"), ("data", "strb", "last")


def memory(dut, rng, pause=0.0):
    ram = AxiRamWrite(AxiWriteBus.from_prefix(dut, "m_axi", bus_separator="__"), dut.clk, dut.rst, size=RAM_BYTES)
    ram.write(0, rng.bytes(RAM_BYTES))
    if pause:
        for n, channel in enumerate((ram.aw_channel, ram.w_channel, ram.b_channel)):
            channel.set_pause_generator(pauses(pause, int(rng.integers(1 << 30)) + n))
    return ram


def beats_for(plan, config, rng, *, full=False):
    """Random beats [(data, strb)] for a plan, mostly fully enabled."""
    beat_bytes = config.bus.data_bits // 8
    return [(int.from_bytes(rng.bytes(beat_bytes), "little"),
             (1 << beat_bytes) - 1 if full or rng.random() < 0.7 else int(rng.integers(1 << beat_bytes, dtype=np.uint64)
                                                                          if beat_bytes < 64 else 0))
            for _ in range(sum(n for _, n in plan))]


def ends_of(dut, plan, beats, config, *, idle=0.0):
    return [Tap(dut, "m_axi__aw", AW), Tap(dut, "m_axi__w", W),
            Source(dut, "request", [request_word(*r) for r in plan], idle=idle),
            Source(dut, "data", [d | s << config.bus.data_bits for d, s in beats], idle=idle)]


async def begin(dut, ends, **inputs):
    await start(dut, ends, **{"stop": 0, "memory_base": BASE, "memory_bytes": WINDOW_BYTES, **inputs})


def write_into(image, plan, beats, config):
    """The same writes on a bytearray."""
    beat_bytes, stream = config.bus.data_bits // 8, iter(beats)
    for offset, count in plan:
        for b in range(count):
            data, strb = next(stream)
            for lane in range(beat_bytes):
                if strb >> lane & 1:
                    image[BASE + offset + b * beat_bytes + lane] = data >> 8 * lane & 255


@cocotb.test(timeout_time=5, timeout_unit="ms")
@cocotb.parametrize(idle=[0.0, 0.5, 0.9], pause=[0.0, 0.4, 0.8])
async def memory_holds_what_was_written(dut, idle, pause):
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    beat_bytes = config.bus.data_bits // 8
    ram = memory(dut, rng, pause)
    plan = requests(config, rng, 10)
    beats = beats_for(plan, config, rng)
    want = bytearray(ram.read(0, RAM_BYTES))
    write_into(want, plan, beats, config)
    ends = ends_of(dut, plan, beats, config, idle=idle)
    addresses, lasts, done, pulses = Scoreboard("burst"), Scoreboard("last"), [], 0
    for r in plan:
        addresses.expect(*bursts_of(*r, config))
        for _, count in bursts_of(*r, config):
            lasts.expect(*[0] * (count - 1), 1)
    await begin(dut, ends)
    async for _, port, word in exchange(dut, ends, rng=rng, watch=("done", "beat"),
                                        until=lambda: len(done) >= len(plan)):
        if port == "m_axi__aw":
            assert (word["id"], word["size"], word["burst"], word["lock"]) == (0, beat_bytes.bit_length() - 1, 1, 0)
            addresses.observe((word["addr"] - BASE, word["len"] + 1))
        elif port == "m_axi__w":
            lasts.observe(word["last"])
        elif port == "done":
            done.append(lasts.passed)
        elif port == "beat":
            pulses += 1
    addresses.close(sum(len(bursts_of(*r, config)) for r in plan))
    lasts.close(len(beats))
    assert pulses == len(beats)
    ends_at = np.cumsum([n for _, n in plan]).tolist()  # a request is never done before its last beat was sent
    assert len(done) == len(plan) and all(sent >= end for sent, end in zip(done, ends_at, strict=True))
    assert ram.read(0, RAM_BYTES) == want
    assert dut.idle.value == 1 and dut.error.value == 0


@cocotb.test(timeout_time=1, timeout_unit="ms")
@cocotb.parametrize(case=list(BAD_REQUESTS))
async def refuses_what_leaves_the_window(dut, case):
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    bad = BAD_REQUESTS[case](config.bus.data_bits // 8)
    ram = memory(dut, rng)
    before = ram.read(0, RAM_BYTES)
    ends = ends_of(dut, [bad, (0, 4)], beats_for([(0, 6)], config, rng), config)
    await begin(dut, ends)
    seen = {port async for _, port, _ in exchange(dut, ends, rng=rng, watch=("done",))}
    assert seen == {"request", "data"}, "the request is taken, its data are swallowed, nothing goes out"
    assert int(dut.error.value) == error_word(Error.MEMORY_RANGE, bad[0])
    assert dut.idle.value == 1 and ram.read(0, RAM_BYTES) == before


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def refuses_a_burst_beyond_the_address_bus(dut):
    """The base leaves one page before the end of the address bus: what would wrap around is not issued."""
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    beat_bytes, top = config.bus.data_bits // 8, 1 << config.bus.address_bits
    plan = [(PAGE_BYTES - 2 * beat_bytes, 4)]
    ends = ends_of(dut, plan, beats_for(plan, config, rng), config)
    await begin(dut, ends, memory_base=top - PAGE_BYTES, m_axi__awready=1, m_axi__wready=1, m_axi__bvalid=0)
    seen = [word["addr"] async for _, port, word in exchange(dut, ends, rng=rng) if port == "m_axi__aw"]
    assert seen == [top - 2 * beat_bytes]
    assert int(dut.error.value) == error_word(Error.MEMORY_RANGE, PAGE_BYTES)
