"""cocotb tests of the store unit, with models of everything around it."""
from collections import deque
from dataclasses import dataclass, field

import cocotb
import numpy as np

from golden.requantize import requantize
from hw.control.store import StoreUnit
from sim_tests.hw.tb_requantize import reset
from sim_tests.lib.scoreboard import Scoreboard
from sim_tests.lib.simulate import config_of_run
from sim_tests.lib.streams import Sink, Source, exchange, start
from spec.derive import Sizes
from spec.formats import Field, Record, column_parameters, unsigned
from spec.isa import INSTRUCTIONS, Opcode
from spec.registers import Error

STORE = Record("store", INSTRUCTIONS[Opcode.STORE].fields[1:-1])
REQUEST = Record("request", (Field("offset", unsigned(40), None, ""), Field("beats", unsigned(20), None, "")))
WATCH = ("take_load", "take_execute", "push_load", "push_execute", "acc_en", "parameter_en", "residual_en", "error",
         "waiting", "reading", "idle")


@dataclass
class Job:
    """One STORE with the data it works on."""

    fields: dict
    acc: np.ndarray | None  # [depth, columns]; None: what the bank already holds
    parameters: dict
    residual: np.ndarray  # [pixels, columns]
    expected: np.ndarray = None
    requests: list = field(default_factory=list)
    beats: list = field(default_factory=list)


def instruction(**fields):
    return {f.name: 0 for f in STORE.fields} | {"rows": 1, "cols": 1, "row_stride": 1, "low": -128, "high": 127,
                                                "wait_execute": 1, "push_execute": 1, "push_load": 1} | fields


def job(config, rng, number, *, acc=..., **fields):
    """A STORE with random data and the given fields, and what it must write."""
    sizes, s = Sizes(config), config.structured
    fields = instruction(parameter=number % config.memory.parameter_groups * sizes.parameter_beats,
                         residual_base=number % 4 * (sizes.residual_units // 4), **fields)
    columns, pixels = s.columns, fields["rows"] * fields["cols"]
    if acc is ... and number % 6 == 5:
        acc = rng.choice([-2**31, 2**31 - 1], (s.accumulator_depth, columns))
    elif acc is ...:
        acc = rng.integers(-2**31, 2**31, (s.accumulator_depth, columns)) >> rng.integers(0, 31, (1, columns))
    parameters = {"bias": rng.integers(-2**31, 2**31, columns) >> rng.integers(0, 31),
                  "multiplier": rng.integers(0, 65536, columns), "shift": rng.integers(0, 16, columns)}
    return Job(fields, acc, parameters, rng.integers(-128, 128, (pixels, columns)))


def complete(config, jobs):
    """Compute what the jobs must write, in order: the requests and the beats (strobes, bytes under them)."""
    sizes, banks = Sizes(config), [None, None]
    unit, beat = sizes.unit_bytes, sizes.beat_bytes
    for j in jobs:
        f = j.fields
        if j.acc is not None:
            banks[f["bank"]] = j.acc
        pixels = f["rows"] * f["cols"]
        out = requantize(banks[f["bank"]][:pixels], **j.parameters, zero_point=f["zero_point"], low=f["low"],
                         high=f["high"], residual=j.residual if f["residual"] else None,
                         residual_zero_point=f["residual_zero_point"], residual_multiplier=f["residual_multiplier"])
        rows = out.astype(np.uint8).reshape(f["rows"], f["cols"] * unit)
        if f["row_stride"] == f["cols"]:
            rows = rows.reshape(1, -1)
        for r, row in enumerate(rows):
            first = f["address"] + r * f["row_stride"] * unit
            begin, end = first // beat * beat, -(-(first + len(row)) // beat) * beat
            j.requests.append({"offset": begin, "beats": (end - begin) // beat})
            image = {first + n: int(v) for n, v in enumerate(row)}
            for at in range(begin, end, beat):
                j.beats.append({at + n: image[at + n] for n in range(beat) if at + n in image})
    return jobs


def random_jobs(config, rng, count):
    """Every shape of tile: single pixels, whole banks, rows merged or apart, beginning anywhere in a beat."""
    s, sizes = config.structured, Sizes(config)
    jobs = []
    for n in range(count):
        kind = n % 5
        cols = (1, s.accumulator_depth, *rng.integers(1, 8, 3).tolist())[kind]
        rows = int(rng.integers(1, s.accumulator_depth // cols + 1))
        stride = cols if rng.random() < 0.4 else int(rng.integers(cols, cols + 9))
        again = bool(jobs) and rng.random() < 0.2  # read the same bank once more: no token is passed in between
        if again:
            jobs[-1].fields["push_execute"] = 0
        low, high = sorted(rng.integers(-128, 128, 2).tolist()) if n % 2 else (-128, 127)
        jobs.append(job(
            config, rng, n, **({"acc": None} if again else {}), wait_execute=int(not again),
            bank=jobs[-1].fields["bank"] if again else int(rng.integers(2)), rows=rows, cols=cols, row_stride=stride,
            address=int(rng.integers(0, 1 << 34)) * sizes.unit_bytes, wait_load=int(rng.integers(2)),
            push_load=int(rng.integers(2)), zero_point=int(rng.integers(-128, 128)), low=low, high=high,
            residual=int(rng.integers(2)), residual_zero_point=int(rng.integers(-128, 128)),
            residual_multiplier=int(rng.integers(0, 65536))))
    jobs[-1].fields["push_execute"] = 1
    return complete(config, jobs)


class GatedSink(Sink):
    """The data side of a write master: takes beats only for requests it already has."""

    owed = 0

    def drive(self, rng):
        super().drive(rng)
        self.accept = self.accept and self.owed > 0
        self.ready.value = int(self.accept)


class World:
    """Memories, tokens and write master around the unit; every interface is checked while it runs."""

    def __init__(self, dut, jobs, *, idle=0.0, stall=0.0, token_delay=0, done_delay=0):
        self.dut, self.jobs, self.config = dut, jobs, config_of_run()
        self.sizes, self.rng = Sizes(self.config), np.random.default_rng(cocotb.RANDOM_SEED)
        self.token_delay, self.done_delay = token_delay, done_delay
        self.source = Source(dut, "i", [STORE.pack(**j.fields) for j in jobs], idle=idle)
        self.requests, self.data = Sink(dut, "request", stall=stall), GatedSink(dut, "data", stall=stall)
        depth, columns = self.config.structured.accumulator_depth, self.config.structured.columns
        self.banks = self.rng.integers(-2**31, 2**31, (2, depth, columns))
        self.parameters = [0] * self.sizes.parameter_words
        self.residuals = [0] * self.sizes.residual_units
        self.read = {}  # output register of each memory, driven in the next cycle
        self.tokens = {"load": 0, "execute": 0}
        self.load_given = self.execute_given = 0  # jobs whose tokens (or data, without token) were given
        self.owner = [None, None]  # job whose accumulators a bank holds until it is released
        self.open, self.answers = deque(), deque()  # requests with beats to come; cycles of done
        self.done_count = self.reads = self.released = 0
        self.requests_board, self.beats_board = Scoreboard("request"), Scoreboard("beat")
        self.reads_board, self.residual_board = Scoreboard("read"), Scoreboard("residual read")
        self.load_pushes, self.execute_pushes = deque(), deque()
        self.events = {name: [] for name in (*WATCH, "i", "request", "data", "valid")}
        requests = pixels = 0
        for j in jobs:
            f = j.fields
            requests, pixels = requests + len(j.requests), pixels + f["rows"] * f["cols"]
            self.requests_board.expect(*j.requests)
            self.beats_board.expect(*j.beats)
            self.reads_board.expect(*((f["bank"], n) for n in range(f["rows"] * f["cols"])))
            if f["residual"]:
                self.residual_board.expect(*(f["residual_base"] + n for n in range(f["rows"] * f["cols"])))
            if f["push_load"]:
                self.load_pushes.append(requests)
            if f["push_execute"]:
                self.execute_pushes.append((pixels, f["bank"]))
        self.planned = {"requests": requests, "pixels": pixels}

    def give_load(self):
        """Parameters and residuals of the next job; its token, if it waits for one."""
        j = self.jobs[self.load_given]
        record, columns = column_parameters(), self.config.structured.columns
        word = sum(record.pack(**{k: int(v[n]) for k, v in j.parameters.items()}, reserved=int(self.rng.integers(2048)))
                   << record.bits * n for n in range(columns))
        bits = self.config.bus.data_bits
        for n in range(self.sizes.parameter_beats):
            self.parameters[j.fields["parameter"] + n] = word >> bits * n & (1 << bits) - 1
        if j.fields["residual"]:
            for n, pixel in enumerate(j.residual):
                word = int.from_bytes(pixel.astype(np.uint8).tobytes(), "little")
                self.residuals[j.fields["residual_base"] + n] = word
        self.tokens["load"] += j.fields["wait_load"]
        self.load_given += 1

    def give_execute(self):
        """Accumulators of the next job, once its bank is released."""
        j = self.jobs[self.execute_given]
        if j.acc is not None:
            if self.owner[j.fields["bank"]]:
                return
            self.banks[j.fields["bank"]], self.owner[j.fields["bank"]] = j.acc, True
        self.tokens["execute"] += j.fields["wait_execute"]
        self.execute_given += 1

    def drive(self, cycle):
        dut, rng = self.dut, self.rng
        for name, value in self.read.items():
            getattr(dut, name).value = value
        self.read.clear()
        # A job's data come at the latest when the job before it has been taken; its slots are free by then.
        while self.load_given < len(self.jobs) and (
                self.source.taken > self.load_given - 1 if not self.jobs[self.load_given].fields["wait_load"]
                else self.source.taken > self.load_given - 2 and rng.random() * self.token_delay < 1):
            self.give_load()
        if self.execute_given < len(self.jobs) and rng.random() * self.token_delay < 1:
            self.give_execute()
        for name, count in self.tokens.items():
            getattr(dut, f"available_{name}").value = int(count > 0)
        self.answered = bool(self.answers) and self.answers[0] <= cycle
        if self.answered:
            self.answers.popleft()
            self.done_count += 1
        dut.done.value = int(self.answered)

    def event(self, cycle, port, word):
        dut = self.dut
        self.events[port].append(cycle)
        if port == "acc_en":
            bank, address = int(dut.acc_bank.value), int(dut.acc_address.value)
            self.reads_board.observe((bank, address))
            self.reads += 1
            bits = self.sizes.accumulator.bits
            self.read["acc_data"] = sum((int(v) & (1 << bits) - 1) << bits * n
                                        for n, v in enumerate(self.banks[bank, address]))
        elif port == "parameter_en":
            self.read["parameter_data"] = self.parameters[int(dut.parameter_address.value)]
        elif port == "residual_en":
            address = int(dut.residual_address.value)
            self.residual_board.observe(address)
            self.read["residual_data"] = self.residuals[address]
        elif port in ("take_load", "take_execute"):
            self.tokens[port[5:]] -= 1
            assert self.tokens[port[5:]] >= 0, f"cycle {cycle}: {port} without token"
        elif port == "push_execute":
            pixels, bank = self.execute_pushes.popleft()
            assert self.reads == pixels, f"cycle {cycle}: bank released after {self.reads} of {pixels} reads"
            self.owner[bank] = None
            self.banks[bank] = self.rng.integers(-2**31, 2**31, self.banks[bank].shape)
            self.read["acc_data"] = int.from_bytes(self.rng.bytes(8), "little")  # and its output register is not ours
        elif port == "push_load":
            want = self.load_pushes.popleft()
            assert self.answered and self.done_count == want, \
                f"cycle {cycle}: load token after {self.done_count} of {want} responses"
        elif port == "request":
            request = REQUEST.unpack(word)
            self.requests_board.observe(request)
            self.open.append([request["offset"], request["beats"]])
            self.data.owed += request["beats"]
        elif port == "data":
            beat, bits = self.sizes.beat_bytes, self.config.bus.data_bits
            self.data.owed -= 1
            at = self.open[0][0]
            self.beats_board.observe({at + n: word >> 8 * n & 255 for n in range(beat) if word >> bits + n & 1})
            self.open[0][0] += beat
            self.open[0][1] -= 1
            if not self.open[0][1]:
                self.open.popleft()
                last = self.answers[-1] if self.answers else 0
                self.answers.append(max(last + 1, cycle + 1 + int(self.rng.integers(0, self.done_delay + 1))))
        elif port == "idle":
            assert not self.open and not self.answers, f"cycle {cycle}: idle with requests unanswered"
        if port == "waiting":
            assert not dut.reading.value, f"cycle {cycle}: reading and waiting"

    async def run(self, *, drain=60, until=None, begin=start):
        ends = self.source, self.requests, self.data
        zeros = ("available_load", "available_execute", "acc_data", "parameter_data", "residual_data", "done")
        await begin(self.dut, ends, **dict.fromkeys(zeros, 0))
        async for cycle, port, word in exchange(
                self.dut, ends, rng=self.rng, watch=(*WATCH,), on_cycle=self.drive, drain=drain,
                until=until or (lambda: self.done_count == self.planned["requests"])):
            self.event(cycle, port, word)
        return self

    def close(self):
        self.requests_board.close(self.planned["requests"])
        self.beats_board.close(sum(len(j.beats) for j in self.jobs))
        self.reads_board.close(self.planned["pixels"])
        if any(j.fields["residual"] for j in self.jobs):
            self.residual_board.close(sum(len(j.residual) for j in self.jobs if j.fields["residual"]))
        assert not self.load_pushes and not self.execute_pushes, "tokens not given"
        assert not any(self.tokens.values()) and not self.events["error"], "tokens not taken, or an error"
        assert self.events["reading"] == self.events["acc_en"]
        assert self.dut.idle.value == 1 and self.dut.busy.value == 0


@cocotb.test(timeout_time=5, timeout_unit="ms")
@cocotb.parametrize(idle=[0.0, 0.4], stall=[0.0, 0.4, 0.9])
async def writes_what_golden_says(dut, idle, stall):
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    jobs = random_jobs(config, rng, 12 if stall > 0.5 else 40)
    world = await World(dut, jobs, idle=idle, stall=stall, token_delay=[0, 30][idle > 0],
                        done_delay=[0, 80][stall > 0]).run()
    world.close()


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def responses_may_be_late(dut):
    """Memory answers so late that the queue of unacknowledged instructions fills; everything still comes in order."""
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    world = await World(dut, random_jobs(config, rng, 30), done_delay=600).run(drain=10)
    world.close()


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def reset_in_mid_run_leaves_nothing(dut):
    """Cut off by reset at any moment, the unit then works as if fresh."""
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    for n in range(8):
        cut = World(dut, random_jobs(config, rng, 12), stall=0.3, done_delay=40)
        enough = int(rng.integers(1, 60))
        await cut.run(drain=0, until=lambda cut=cut, enough=enough: cut.reads >= enough, begin=reset if n else start)
        world = await World(dut, random_jobs(config, rng, 4)).run(begin=reset)
        world.close()


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def meets_rate_and_turnaround(dut):
    """Whole banks back to back, each merged into one request: a pixel per cycle, few cycles between instructions."""
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    depth, count = config.structured.accumulator_depth, 6
    world = await World(dut, complete(config, [
        job(config, rng, n, rows=4, cols=depth // 4, row_stride=depth // 4, bank=n % 2, residual=n & 1,
            address=4096 * n) for n in range(count)])).run()
    world.close()
    reads = world.events["reading"]
    for n in range(count):
        tile = reads[n * depth:(n + 1) * depth]
        assert tile == list(range(tile[0], tile[0] + depth)), "not a pixel per cycle"
        if n:
            assert tile[0] - reads[n * depth - 1] - 1 == StoreUnit.turnaround
    assert len(world.events["request"]) == count, "contiguous rows were not merged"


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def meets_latency(dut):
    """From the instruction to the execute token, and from there to the first beat (of one unit)."""
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    world = await World(dut, complete(config, [job(config, rng, 0)])).run()
    world.close()
    (asked,), (took,), (first,) = (world.events[name] for name in ("i", "take_execute", "data"))
    assert took - asked == Sizes(config).parameter_beats + 2
    assert first - took == StoreUnit.latency <= 8
    assert world.events["push_execute"] == [took + 2], "the bank is not released as soon as it is read"


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def waits_for_tokens(dut):
    """Without load token no parameter is read, without execute token no accumulator; `waiting` says so meanwhile."""
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    world = World(dut, complete(config, [job(config, rng, 0, wait_load=1)]))
    give_load, give_execute, at = world.give_load, world.give_execute, {"cycle": 0}
    world.give_load = lambda: None
    world.give_execute = lambda: None

    def drive(cycle):
        at["cycle"] = cycle
        if cycle in (50, 100):
            (give_load if cycle == 50 else give_execute)()
        held, world.load_given = world.load_given, len(world.jobs)  # the jobs' data come only from above
        World.drive(world, cycle)
        world.load_given = held

    world.drive = drive
    await world.run()
    world.close()
    assert world.events["take_load"] == [50] and world.events["take_execute"] == [100]
    assert world.events["parameter_en"][0] == 50 and world.events["acc_en"] == [101]
    prepared = 50 + Sizes(config).parameter_beats + 1
    asked = world.events["i"][0]
    assert world.events["waiting"] == [*range(asked + 1, 50), *range(prepared, 100)]


async def refuses(dut, code, fields):
    """A good STORE, a bad one, a good one: the first is completed, the second and third do nothing."""
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    good = complete(config, [job(config, rng, 0, rows=2, cols=3, row_stride=5, address=64)])
    world = World(dut, good)
    world.source.words.extend([STORE.pack(**instruction(wait_execute=0, **fields)), STORE.pack(**instruction())])
    await world.run(drain=0, until=lambda: len(world.events["error"]) > 60 and world.done_count >= 2)
    error = Record("error", (Field("valid", unsigned(1), None, ""), Field("code", unsigned(8), None, ""),
                             Field("address", unsigned(40), None, "")))
    assert error.unpack(int(dut.error.value)) == {"valid": 1, "code": code, "address": fields["address"]}
    return world


@cocotb.test(timeout_time=1, timeout_unit="ms")
@cocotb.parametrize(case=["residual", "parameter", "accumulator", "empty", "misaligned"])
async def refuses_what_is_out_of_range(dut, case):
    config = config_of_run()
    sizes, depth = Sizes(config), config.structured.accumulator_depth
    code = Error.SCRATCHPAD_RANGE
    fields = {
        "residual": {"residual": 1, "residual_base": sizes.residual_units - 3, "rows": 2, "cols": 2, "address": 1024},
        "parameter": {"parameter": sizes.parameter_words - sizes.parameter_beats + 1, "address": 2048},
        "accumulator": {"rows": 1, "cols": depth + 1, "address": 512},
        "empty": {"rows": 0, "cols": 1, "address": 256},
        "misaligned": {"address": 1024 + sizes.unit_bytes - 1},
    }[case]
    if case == "misaligned":
        code = Error.MEMORY_RANGE
    world = await refuses(dut, code, fields)
    world.requests_board.close(2)
    world.beats_board.close(sum(len(j.beats) for j in world.jobs))
    world.reads_board.close(6)
    assert world.source.taken == 2 and dut.idle.value == 1


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def refuses_rows_beyond_the_offset(dut):
    """A row that would wrap around 2**40 is an error, not a write to low memory."""
    config = config_of_run()
    unit, beat = Sizes(config).unit_bytes, Sizes(config).beat_bytes
    top = (1 << 40) - 2 * beat
    config_rng = np.random.default_rng(1)
    world = World(dut, complete(config, [job(config, config_rng, 0, rows=2, cols=1, row_stride=3 * beat // unit,
                                             address=top)]))
    world.requests_board._want.pop()
    await world.run(drain=0, until=lambda: len(world.events["error"]) > 60)
    assert int(dut.error.value) >> 1 & 255 == Error.MEMORY_RANGE
    assert int(dut.error.value) >> 9 == (top + 3 * beat) & (1 << 40) - 1
    world.requests_board.close(1)
    assert world.beats_board.passed == 1 and dut.idle.value == 1
