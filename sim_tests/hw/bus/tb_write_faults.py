"""cocotb tests of WriteMaster against the fastest and against lying memories, and of ``stop``."""
import cocotb
import numpy as np

from sim_tests.hw.bus.common import BASE, PAGE_BYTES, RAM_BYTES, WINDOW_BYTES, bursts_of, error_word, requests
from sim_tests.hw.bus.tb_write import begin, beats_for, ends_of, write_into
from sim_tests.lib.faulty_axi import WriteSlave
from sim_tests.lib.simulate import config_of_run
from sim_tests.lib.streams import Source, exchange
from spec.registers import Error


class Bench:
    """A memory, the requests with their beats, and what memory must hold in the end."""

    def __init__(self, dut, plan, *, idle=0.0, full=False, **slave):
        self.dut, self.config, self.plan = dut, config_of_run(), plan
        self.rng = np.random.default_rng(cocotb.RANDOM_SEED)
        self.beat_bytes = self.config.bus.data_bits // 8
        self.before = self.rng.bytes(RAM_BYTES)
        self.memory = bytearray(self.before)
        self.beats = beats_for(plan, self.config, self.rng, full=full)
        self.want = bytearray(self.before)
        write_into(self.want, plan, self.beats, self.config)
        self.slave = WriteSlave(dut, self.memory, self.beat_bytes, **slave)
        self.ends = [*ends_of(dut, plan, self.beats, self.config, idle=idle), self.slave]
        self.requests, self.data = (e for e in self.ends if isinstance(e, Source))

    async def run(self, **options):
        """Reset and run; returns what each port gave as lists of (cycle, word)."""
        await begin(self.dut, self.ends)
        out = {p: [] for p in ("m_axi__aw", "m_axi__w", "request", "data", "done", "beat")}
        async for cycle, port, word in exchange(self.dut, self.ends, rng=self.rng, watch=("done", "beat"), **options):
            out[port].append((cycle, word))
        return out

    def error(self):
        return int(self.dut.error.value)


@cocotb.test(timeout_time=5, timeout_unit="ms")
@cocotb.parametrize(idle=[0.0, 0.5], pause=[0.0, 0.5, 0.9])
async def memory_holds_what_was_written(dut, idle, pause):
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    plan = requests(config, rng, 5)
    bench = Bench(dut, plan, idle=idle, pause=pause)
    out = await bench.run()
    assert bench.memory == bench.want
    assert [(a - BASE, n) for a, n in bench.slave.bursts] == [b for r in plan for b in bursts_of(*r, config)]
    assert len(out["done"]) == len(plan) and len(out["beat"]) == len(bench.beats)
    assert bench.error() == 0 and dut.idle.value == 1


@cocotb.test(timeout_time=1, timeout_unit="ms")
@cocotb.parametrize(form=["one_request", "single_beats"])
async def one_beat_per_cycle(dut, form):
    """N beats take N cycles; with enough outstanding bursts also in requests of one beat each, one AW per cycle."""
    config, count = config_of_run(), 200
    plan = [(0, count)] if form == "one_request" else [(n * config.bus.data_bits // 8, 1) for n in range(count)]
    bench = Bench(dut, plan)
    out = await bench.run()
    aw, w, ask, done = (np.array([c for c, _ in out[p]]) for p in ("m_axi__aw", "m_axi__w", "request", "done"))
    assert bench.memory == bench.want and len(w) == count and len(done) == len(plan)
    assert aw[0] - ask[0] == 2 and w[0] - aw[0] == 1
    assert done[-1] - w[-1] == 2, "B one cycle after the last beat, done one cycle after B"
    limit, trip = config.bus.outstanding_writes, 4
    if limit * (1 if form == "single_beats" else config.bus.burst_beats) >= trip:
        assert w[-1] - w[0] == count - 1
    else:
        assert w[-1] - w[0] <= -(-count // limit) * trip
    if form == "single_beats" and limit >= trip:
        assert aw[-1] - aw[0] == count - 1 and done[-1] - done[0] == count - 1


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def addresses_run_ahead_up_to_the_limit(dut):
    """Without data, as many addresses go out as may be outstanding, and no beat."""
    config = config_of_run()
    bench = Bench(dut, [(0, config.bus.burst_beats * 20)])
    bench.data.words.clear()
    out = await bench.run(drain=50)
    assert len(out["m_axi__aw"]) == config.bus.outstanding_writes and not out["m_axi__w"]
    assert dut.idle.value == 0 and bench.error() == 0


@cocotb.test(timeout_time=1, timeout_unit="ms")
@cocotb.parametrize(order=["data_first", "address_first"])
async def address_and_data_do_not_wait_for_each_other(dut, order):
    bench = Bench(dut, [(0, 1)])
    second = "accept_addresses" if order == "data_first" else "accept_data"
    setattr(bench.slave, second, False)

    def control(cycle):
        if cycle == 30:
            setattr(bench.slave, second, True)

    out = await bench.run(on_cycle=control)
    early, late = ("m_axi__w", "m_axi__aw") if order == "data_first" else ("m_axi__aw", "m_axi__w")
    assert out[early][0][0] < 10 and out[late][0][0] == 30 and bench.memory == bench.want
    assert len(out["done"]) == 1


def plan_of_four(config):
    """Four requests; the third has two bursts where the page edge cuts it. Returns plan, bursts."""
    beat_bytes = config.bus.data_bits // 8
    count = min(3, config.bus.burst_beats)
    plan = [(0, count), (64 * beat_bytes, count), (PAGE_BYTES - beat_bytes, 2), (128 * beat_bytes, count)]
    return plan, [b for r in plan for b in bursts_of(*r, config)]


def owner(plan, config, number):
    """Index of the request to which burst ``number`` belongs."""
    return [k for k, r in enumerate(plan) for _ in bursts_of(*r, config)][number]


@cocotb.test(timeout_time=1, timeout_unit="ms")
@cocotb.parametrize(resp=[1, 2, 3], which=["first", "cut", "last"], pause=[0.0, 0.6])
async def error_answer(dut, resp, which, pause):
    plan, bursts = plan_of_four(config_of_run())
    number = {"first": 0, "cut": len(bursts) // 2, "last": len(bursts) - 1}[which]
    bench = Bench(dut, plan, pause=pause, fault=lambda n: [(0, resp if n == number else 0)])
    out = await bench.run()
    assert bench.error() == error_word(Error.BUS_WRITE, bursts[number][0])
    assert len(out["done"]) == owner(plan, bench.config, number), "requests before the bad one are done, no other"
    assert dut.idle.value == 1 and len(out["request"]) == len(plan) and len(out["data"]) == len(bench.beats)
    for offset, count in bursts[:number]:  # what was acknowledged is in memory
        at = slice(BASE + offset, BASE + offset + count * bench.beat_bytes)
        assert bench.memory[at] == bench.want[at]


@cocotb.test(timeout_time=1, timeout_unit="ms")
@cocotb.parametrize(number=[0, 1], resp=[0, 2])
async def answer_nobody_asked_for(dut, number, resp):
    bench = Bench(dut, [], unsolicited={5: [(number, resp)]})
    out = await bench.run()
    assert bench.error() == error_word(Error.BUS_PROTOCOL, 0) and dut.idle.value == 1
    assert not out["done"] and not out["m_axi__aw"]


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def answer_after_the_last(dut):
    """One answer too many, when everything is acknowledged."""
    plan, bursts = plan_of_four(config_of_run())
    bench = Bench(dut, plan, fault=lambda n: [(0, 0)] * (1 + (n == len(bursts) - 1)))
    out = await bench.run()
    assert bench.error() == error_word(Error.BUS_PROTOCOL, 0) and dut.idle.value == 1
    assert bench.memory == bench.want and out["done"]


@cocotb.test(timeout_time=1, timeout_unit="ms")
@cocotb.parametrize(resp=[0, 2])
async def answer_with_a_wrong_id(dut, resp):
    plan, bursts = plan_of_four(config_of_run())
    bench = Bench(dut, plan, fault=lambda n: [(int(n == 1), resp if n == 1 else 0)])
    out = await bench.run()
    assert bench.error() == error_word(Error.BUS_PROTOCOL, bursts[1][0])
    assert len(out["done"]) == 1 and dut.idle.value == 1


@cocotb.test(timeout_time=1, timeout_unit="ms")
@cocotb.parametrize(withheld=["data", "nothing"])
async def answer_before_the_data(dut, withheld):
    """B comes with the address: before the last beat was taken."""
    bench = Bench(dut, [(256, 4)], early=0)
    bench.slave.accept_data = withheld != "data"

    def control(cycle):
        if cycle == 40:
            bench.slave.accept_data = True

    out = await bench.run(on_cycle=control)
    assert bench.error() == error_word(Error.BUS_PROTOCOL, 256)
    assert not out["done"] and dut.idle.value == 1
    assert len(out["m_axi__w"]) == sum(n for _, n in bench.slave.bursts), "the beats owed are sent all the same"


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def never_answered(dut):
    bench = Bench(dut, [(0, 1)], fault=lambda n: [])

    def control(cycle):
        if cycle == 50:
            dut.stop.value = 1

    out = await bench.run(on_cycle=control)
    assert not out["done"] and dut.idle.value == 0 and bench.error() == 0


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def first_error_stays_and_stops(dut):
    plan, bursts = plan_of_four(config_of_run())
    bench = Bench(dut, plan, fault=lambda n: [(0, 3)], unsolicited={200: [(0, 0)]})

    def later(cycle):
        if cycle == 150:
            bench.requests.words.append(WINDOW_BYTES | 1 << 40)

    out = await bench.run(on_cycle=later, drain=250)
    assert bench.error() == error_word(Error.BUS_WRITE, bursts[0][0])
    assert len(out["request"]) == len(plan) + 1 and not out["done"] and dut.idle.value == 1


@cocotb.test(timeout_time=5, timeout_unit="ms")
@cocotb.parametrize(at=[0, 1, 2, 3, 5, 12, 31], pause=[0.0, 0.6], idle=[0.0, 0.6])
async def stop_then_idle_then_go_on(dut, at, pause, idle):
    """No AW begins after stop, beats owed come without byte enables, idle comes; then new requests work."""
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    plan = requests(config, rng, 0)
    bench = Bench(dut, plan, pause=pause, idle=idle, full=True)
    state = {"begun": None}
    fresh = [(PAGE_BYTES - 2 * bench.beat_bytes, 5)]
    fresh_beats = beats_for(fresh, config, rng)

    def control(cycle):
        if cycle == at:
            state["asserted"] = len(bench.slave.bursts) + int(dut.m_axi__awvalid.value)
            state["sent"] = len(bench.slave.strobes) + len(bench.slave.beats) + int(dut.m_axi__wvalid.value)
            dut.stop.value = 1
        if at < cycle and state["begun"] is None and not bench.requests.words and not bench.data.words and \
                int(dut.idle.value):
            state["begun"] = cycle
            assert len(bench.slave.bursts) == state["asserted"], "an AW began after stop"
            assert sum(n for _, n in bench.slave.bursts) == len(bench.slave.strobes)
            assert not any(bench.slave.strobes[state["sent"]:]), "a byte was enabled after stop"
            got = bench.memory[:]  # beats sent before stop are there, nothing else
            want, left = bytearray(bench.before), state["sent"]
            beats = bench.beats[:left] + [(0, 0)] * (len(bench.beats) - left)
            write_into(want, plan, beats, config)
            assert got == want
            dut.stop.value = 0
            state["want"] = want
            write_into(want, fresh, fresh_beats, config)
            bench.requests.words.extend(o | n << 40 for o, n in fresh)
            bench.data.words.extend(d | s << config.bus.data_bits for d, s in fresh_beats)

    out = await bench.run(on_cycle=control, until=lambda: state["begun"] is not None, limit=50_000)
    assert bench.memory == state["want"] and bench.error() == 0 and dut.idle.value == 1
    assert len([c for c, _ in out["done"] if c >= state["begun"]]) == 1
    assert not [c for c, _ in out["done"] if at < c < state["begun"]], "done while stopped"
    assert bench.memory[:BASE] == bench.before[:BASE], "below the window"
    assert bench.memory[BASE + WINDOW_BYTES:] == bench.before[BASE + WINDOW_BYTES:], "above the window"
