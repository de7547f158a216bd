"""cocotb tests of ReadMaster against the fastest and against lying memories, and of ``stop``."""
import cocotb
import numpy as np

from hw.bus.read import CLIENTS, ReadMaster
from sim_tests.hw.bus.common import (
    BASE, PAGE_BYTES, RAM_BYTES, WINDOW_BYTES, bursts_of, error_word, request_word, requests)
from sim_tests.lib.faulty_axi import ReadSlave
from sim_tests.lib.scoreboard import Scoreboard
from sim_tests.lib.simulate import config_of_run
from sim_tests.lib.streams import Sink, Source, Tap, exchange, start
from spec.registers import Error

AR = ("id", "addr", "len")
WHERE = ("first", "middle", "last")


class Bench:
    """A memory, both clients, and the data that must come: ``want`` per client."""

    def __init__(self, dut, plans, *, idle=0.0, stall=0.0, **slave):
        self.dut, self.config = dut, config_of_run()
        self.rng = np.random.default_rng(cocotb.RANDOM_SEED)
        self.beat_bytes = self.config.bus.data_bits // 8
        self.memory = self.rng.bytes(RAM_BYTES)
        self.slave = ReadSlave(dut, self.memory, self.beat_bytes, **slave)
        self.plans = {name: plans.get(name, []) for name in CLIENTS}
        self.sources = [Source(dut, f"{n}_request", [request_word(*r) for r in self.plans[n]], idle=idle)
                        for n in CLIENTS]
        self.sinks = [Sink(dut, f"{n}_data", stall=stall) for n in CLIENTS]
        self.ends = [Tap(dut, "m_axi__ar", AR), *self.sources, *self.sinks, self.slave]
        self.want = {n: [self.word(BASE + offset + b * self.beat_bytes) for offset, beats in self.plans[n]
                         for b in range(beats)] for n in CLIENTS}

    def word(self, address):
        return int.from_bytes(self.memory[address:address + self.beat_bytes], "little")

    async def run(self, **options):
        """Reset and run; returns what each port gave as lists of (cycle, word)."""
        await start(self.dut, self.ends, stop=0, memory_base=BASE, memory_bytes=WINDOW_BYTES)
        out = {f"{n}_data": [] for n in CLIENTS} | {"m_axi__ar": [], **{f"{n}_request": [] for n in CLIENTS}}
        async for cycle, port, word in exchange(self.dut, self.ends, rng=self.rng, **options):
            out.setdefault(port, []).append((cycle, word))
        return out

    def error(self):
        return int(self.dut.error.value)


@cocotb.test(timeout_time=5, timeout_unit="ms")
@cocotb.parametrize(idle=[0.0, 0.5], stall=[0.0, 0.6], pause=[0.0, 0.5], latency=[1, 20])
async def interleaved_answers_reach_their_clients(dut, idle, stall, pause, latency):
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    plans = {"load": requests(config, rng, 5), "fetch": requests(config, rng, 5)[::-1]}
    bench = Bench(dut, plans, idle=idle, stall=stall, pause=pause, latency=latency, interleave=True)
    out = await bench.run()
    for name in CLIENTS:
        board = Scoreboard(name)
        board.expect(*bench.want[name])
        for _, word in out[f"{name}_data"]:
            board.observe(word)
        board.close(sum(n for _, n in plans[name]))
    assert bench.error() == 0 and dut.idle.value == 1


@cocotb.test(timeout_time=1, timeout_unit="ms")
@cocotb.parametrize(client=list(CLIENTS), form=["one_request", "single_beats"])
async def one_beat_per_cycle(dut, client, form):
    """N beats take N cycles; with enough outstanding bursts also in requests of one beat each, one AR per cycle."""
    config, beats = config_of_run(), 200
    plan = [(0, beats)] if form == "one_request" else [(n * config.bus.data_bits // 8, 1) for n in range(beats)]
    bench = Bench(dut, {client: plan})
    out = await bench.run(watch=("beat",))
    data, ar, ask = (np.array([c for c, _ in out[p]]) for p in (f"{client}_data", "m_axi__ar", f"{client}_request"))
    assert [w for _, w in out[f"{client}_data"]] == bench.want[client]
    assert ar[0] - ask[0] == 2 and data[0] - ar[0] == 1 + ReadMaster.data_latency
    assert len(out["beat"]) == beats
    trip = 4  # cycles from issuing a burst of one beat until its place is free again, with this memory
    limit = config.bus.outstanding_reads
    if limit * (1 if form == "single_beats" else config.bus.burst_beats) >= trip:
        assert data[-1] - data[0] == beats - 1
    else:
        assert data[-1] - data[0] <= -(-beats // limit) * trip
    if form == "single_beats" and limit >= trip:
        assert ar[-1] - ar[0] == beats - 1


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def never_more_in_flight_than_configured(dut):
    config = config_of_run()
    plan = [(k * config.bus.data_bits // 8, 1) for k in range(20)]
    bench = Bench(dut, {"load": plan, "fetch": plan}, fault=lambda number, beats: [])  # accepted, never answered

    def give_up(cycle):
        if cycle == 100:  # the sources would keep the run alive for ever
            for source in bench.sources:
                source.words.clear()
                source.offering = False

    out = await bench.run(drain=50, on_cycle=give_up)
    assert len(out["m_axi__ar"]) == config.bus.outstanding_reads
    assert all(word["id"] == 1 for _, word in out["m_axi__ar"][1:]), "fetch has priority"
    assert dut.idle.value == 0 and bench.error() == 0 and dut.m_axi__arvalid.value == 0


def position(where, beats):
    return {"first": 0, "middle": len(beats) // 2, "last": len(beats) - 1}[where]


def plan_of_three(config):
    """Three bursts of four beats (or fewer, where bursts are shorter); the second one will be bad."""
    count, beat_bytes = min(4, config.bus.burst_beats), config.bus.data_bits // 8
    return count, [(n * 64 * beat_bytes, count) for n in range(1, 4)]


async def second_burst_bad(dut, client, damage, code, delivered, *, stall=0.0, known=True, idle=True):
    """Runs three requests with ``damage`` done to the beats of the second; checks code, address, data and idle."""
    count, plan = plan_of_three(config_of_run())
    bench = Bench(dut, {client: plan}, stall=stall,
                  fault=lambda number, beats: damage(beats) if number == 1 else beats)
    for sink in bench.sinks:
        sink.check_stable = False  # an error withdraws offers
    out = await bench.run()
    assert bench.error() == error_word(code, plan[1][0] if known else 0)
    got = [w for _, w in out[f"{client}_data"]]
    want = bench.want[client][:count + delivered]
    assert got == want if stall == 0.0 else got == want[:len(got)] and len(got) >= count + delivered - 1
    assert not [w for n in CLIENTS if n != client for w in out[f"{n}_data"]]
    assert int(dut.idle.value) == idle


@cocotb.test(timeout_time=1, timeout_unit="ms")
@cocotb.parametrize(client=list(CLIENTS), where=WHERE, resp=[1, 2, 3], stall=[0.0, 0.7])
async def error_answer(dut, client, where, resp, stall):
    count, _ = plan_of_three(config_of_run())

    def damage(beats):
        beats[position(where, beats)]["resp"] = resp
        return beats

    at = position(where, [None] * count)
    await second_burst_bad(dut, client, damage, Error.BUS_READ, at, stall=stall)


@cocotb.test(timeout_time=1, timeout_unit="ms")
@cocotb.parametrize(client=list(CLIENTS), kind=["early", "early_and_cut", "missing", "late"])
async def wrong_last(dut, client, kind):
    count, _ = plan_of_three(config_of_run())
    if count == 1 and kind.startswith("early"):
        kind = "missing"  # nothing comes before the last beat of a burst of one

    def damage(beats):
        if kind == "missing":
            beats[-1]["last"] = 0
        elif kind == "late":
            beats[-1]["last"] = 0
            beats.append(dict(beats[-1], last=1))
        else:
            beats[0]["last"] = 1
            if kind == "early_and_cut":
                del beats[1:]
        return beats

    await second_burst_bad(dut, client, damage, Error.BUS_PROTOCOL, 0 if kind.startswith("early") else count - 1)


@cocotb.test(timeout_time=1, timeout_unit="ms")
@cocotb.parametrize(client=list(CLIENTS), where=["first", "middle"])
async def wrong_id(dut, client, where):
    count, _ = plan_of_three(config_of_run())

    def damage(beats):
        beats[position(where, beats)]["id"] ^= 1
        return beats

    await second_burst_bad(dut, client, damage, Error.BUS_PROTOCOL, position(where, [None] * count), known=False,
                           idle=count > 1)  # a beat that carries RLAST to the wrong ID leaves its burst open


@cocotb.test(timeout_time=1, timeout_unit="ms")
@cocotb.parametrize(number=[0, 1], resp=[0, 2])
async def beat_nobody_asked_for(dut, number, resp):
    bench = Bench(dut, {}, unsolicited={5: [{"id": number, "data": 1, "resp": resp, "last": 1}]})
    out = await bench.run()
    assert bench.error() == error_word(Error.BUS_PROTOCOL, 0)
    assert not any(out.values()) and dut.idle.value == 1


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def first_error_stays_and_stops(dut):
    """A second error changes nothing, and nothing is issued after the first one."""
    count, plan = plan_of_three(config_of_run())
    bench = Bench(dut, {"load": plan}, unsolicited={60: [{"id": 1, "data": 1, "resp": 0, "last": 1}]},
                  fault=lambda number, beats: [dict(b, resp=2) for b in beats])

    def later(cycle):
        if cycle == 40:
            bench.sources[1].words.append(request_word(0, 1))
            bench.sources[0].words.append(request_word(WINDOW_BYTES, 1))

    out = await bench.run(on_cycle=later, drain=50)
    assert bench.error() == error_word(Error.BUS_READ, plan[0][0])
    assert all(c < 40 for c, _ in out["m_axi__ar"]) and not out["load_data"] and not out["fetch_data"]
    assert len(out["load_request"]) == 4 and len(out["fetch_request"]) == 1, "requests are swallowed"
    assert dut.idle.value == 1


@cocotb.test(timeout_time=5, timeout_unit="ms")
@cocotb.parametrize(at=[0, 1, 2, 3, 5, 12, 31], pause=[0.0, 0.6], stall=[0.0, 0.6])
async def stop_then_idle_then_go_on(dut, at, pause, stall):
    """No AR begins after stop, no data pass, idle comes; after stop falls, new requests work: nothing is left over."""
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    beat_bytes, again = config.bus.data_bits // 8, 100 + at
    plans = {"load": requests(config, rng, 0), "fetch": requests(config, rng, 0)[::-1]}
    bench = Bench(dut, plans, pause=pause, stall=stall, latency=5, interleave=True)
    state = {"asserted": None, "begun": False, "idle": False}
    fresh = {"load": (3 * beat_bytes, 5), "fetch": (2 * PAGE_BYTES - 2 * beat_bytes, 4)}
    for sink in bench.sinks:
        sink.check_stable = False

    def control(cycle):
        if cycle == at:
            state["asserted"] = len(bench.slave.bursts) + int(dut.m_axi__arvalid.value)
            dut.stop.value = 1
        if at < cycle and not state["begun"]:
            if int(dut.idle.value) and cycle >= again and not any(s.words for s in bench.sources):
                assert len(bench.slave.bursts) == state["asserted"], "an AR began after stop"
                state["begun"], state["cycle"] = True, cycle
                state["bursts"] = len(bench.slave.bursts)
                dut.stop.value = 0
                for source, name in zip(bench.sources, CLIENTS, strict=True):
                    source.words.append(request_word(*fresh[name]))

    out = await bench.run(on_cycle=control, until=lambda: state["begun"], limit=50_000)
    assert bench.error() == 0 and dut.idle.value == 1
    for number, name in enumerate(CLIENTS):
        got = out[f"{name}_data"]
        before = [w for c, w in got if c < at]
        assert not [c for c, _ in got if at <= c < state["cycle"]], "data passed while stopped"
        assert before == bench.want[name][:len(before)]
        offset, beats = fresh[name]
        assert [w for c, w in got if c >= state["cycle"]] == \
            [bench.word(BASE + offset + n * beat_bytes) for n in range(beats)]
        asked = [(a - BASE, n) for i, a, n in bench.slave.bursts[state["bursts"]:] if i == number]
        assert asked == bursts_of(offset, beats, config)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def asserted_address_stays_through_stop(dut):
    """ARREADY withheld: the address stays asserted through stop, is taken late, its data are dropped, then idle."""
    bench = Bench(dut, {"load": [(0, 3)]})
    bench.slave.accept_addresses = False

    def control(cycle):
        if cycle == 20:
            assert dut.m_axi__arvalid.value == 1
            dut.stop.value = 1
        if cycle == 60:
            assert dut.m_axi__arvalid.value == 1 and dut.idle.value == 0
            bench.slave.accept_addresses = True

    out = await bench.run(on_cycle=control)
    assert len(out["m_axi__ar"]) == 1 and not out["load_data"] and dut.idle.value == 1 and bench.error() == 0
