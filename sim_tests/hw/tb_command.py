"""cocotb tests of the command processor: fetch, rules of every instruction, order, barriers, errors, restart."""
from collections import deque

import cocotb
from cocotb.triggers import FallingEdge, ReadOnly
import numpy as np

from sim_tests.hw.tb_requantize import reset
from sim_tests.lib.scoreboard import Scoreboard
from sim_tests.lib.simulate import config_of_run
from sim_tests.lib.streams import Sink, Source, exchange, start
from spec.derive import INSTRUCTION_BITS, Sizes
from spec.isa import INSTRUCTIONS, UNIT_OF, VERSION, LinearTarget, Opcode, Unit, encode
from spec.registers import Error

UNITS = ("load", "execute", "store")
WATCH = ("mark_valid", "done", "issued")
#: Operations of the configurations under test, which have no basis engine: to them EXECUTE_BASIS (9) is unknown. Its
#: rules are tested in test_command.py.
OPCODES = tuple(op for op in Opcode if op != Opcode.EXECUTE_BASIS)
INPUTS = {"start": 0, "program": 0, "count": 0, "quiet": 1}


class Rules:
    """What spec.isa says about fields, written once more as ranges: the model that instructions are drawn from."""

    def __init__(self, config):
        self.config, self.sizes = config, Sizes(config)

    def header(self, **fields):
        return encode(Opcode.HEADER, **{"digest": self.sizes.digest_value, "version": VERSION} | fields)

    def any(self, op, rng):
        """Fields of a legal instruction, every field over its whole range, its ends more often."""
        z, s = self.sizes, self.config.structured
        f = {}
        for field in INSTRUCTIONS[op].fields[1:-1]:
            lo, hi = field.elem.lo, field.elem.hi
            f[field.name] = int(rng.choice([lo, hi, int(rng.integers(lo, hi, endpoint=True))], p=[.2, .2, .6]))
        unit = UNIT_OF[op]
        for name in UNITS if unit == Unit.CONTROL else UNITS[unit:unit + 1]:
            f[f"wait_{name}"] = f[f"push_{name}"] = 0
        for name in ("planes", "rows", "cols", "beats", "blocks", "steps"):
            if name in f:
                f[name] = max(1, f[name])
        if op in (Opcode.EXECUTE, Opcode.STORE):
            depth = s.accumulator_depth
            f["rows"] = int(rng.integers(1, depth, endpoint=True))
            f["cols"] = int(rng.integers(1, depth // f["rows"], endpoint=True))
        if op in (Opcode.LOAD_TILE, Opcode.STORE):
            f["address"] -= f["address"] % z.unit_bytes
        if op == Opcode.HEADER:
            f |= {"digest": z.digest_value, "version": VERSION}
        elif op == Opcode.LOAD_TILE:
            f["target"] = int(rng.integers(0, 2))
        elif op == Opcode.LOAD_LINEAR:
            f["address"] -= f["address"] % z.beat_bytes
            f["target"] = int(rng.integers(0, 3))
            if f["target"] == LinearTarget.STEP:
                f["beats"] = max(z.step_beats, f["beats"] - f["beats"] % z.step_beats)
        elif op == Opcode.EXECUTE:
            f["operation"] = int(rng.integers(0, 2))
            f["steps"] = int(rng.integers(1, self.config.memory.step_entries, endpoint=True))
            f["step"] = int(rng.integers(0, self.config.memory.step_entries - f["steps"], endpoint=True))
        elif op == Opcode.STORE:
            f["low"], f["high"] = sorted((f["low"], f["high"]))
            f["parameter"] = int(rng.integers(0, z.parameter_words - z.parameter_beats, endpoint=True))
        return f

    def edges(self, op):
        """Changes of fields that stay just legal."""
        z, depth, entries = self.sizes, self.config.structured.accumulator_depth, self.config.memory.step_entries
        if op == Opcode.LOAD_TILE:
            sizes, lowest = (("planes", 10), ("rows", 12), ("cols", 14)), z.unit_bytes.bit_length() - 1
            return [{name: 1 << k} for name, bits in sizes for k in range(bits)] + \
                [{"target": t} for t in (0, 1)] + [{"address": 1 << k} for k in range(lowest, 40)]
        if op == Opcode.LOAD_LINEAR:
            steps = z.step_beats.bit_length() - 1
            return [{"target": 0, "beats": 1 << k} for k in range(16)] + [{"target": 2, "beats": 1}] + \
                [{"target": 1, "beats": 1 << k} for k in range(steps, 16)] + \
                [{"address": 1 << k} for k in range(z.beat_bytes.bit_length() - 1, 40)]
        if op == Opcode.FILL:
            return [{"rows": 1 << k} for k in range(12)] + [{"blocks": 1 << k} for k in range(16)]
        if op == Opcode.BARRIER:
            return [{"mark": 1 << k} for k in range(16)] + [{"mark": 0xFFFF ^ 1 << k} for k in range(16)]
        pixels = [{"rows": depth >> k, "cols": 1 << k} for k in range(depth.bit_length())] + [
            {"rows": 1 << k, "cols": 1} for k in range(depth.bit_length())] + [{"rows": 1, "cols": 1}]
        if op == Opcode.EXECUTE:
            return pixels + [{"step": 0, "steps": entries}, {"step": entries - 1, "steps": 1}, {"operation": 1}] + \
                [{"step": 0, "steps": 1 << k} for k in range(entries.bit_length())] + \
                [{"step": entries - (1 << k), "steps": 1 << k} for k in range(entries.bit_length())]
        if op == Opcode.STORE:
            last = z.parameter_words - z.parameter_beats
            return pixels + [{"low": v, "high": v} for v in (-128, -1, 0, 1, 127)] + [{"low": -1, "high": 0}] + \
                [{"parameter": p} for p in (0, last)] + [{"low": -128, "high": 127}] + \
                [{"address": 1 << k} for k in range(z.unit_bytes.bit_length() - 1, 40)]
        return []

    def broken(self, op):
        """Changes of fields of a legal instruction, each of which breaks exactly one rule."""
        z, s, entries = self.sizes, self.config.structured, self.config.memory.step_entries
        depth = s.accumulator_depth
        unit = UNIT_OF[op]
        own = UNITS if unit == Unit.CONTROL else UNITS[unit:unit + 1]
        out = [{f"{what}_{name}": 1} for what in ("wait", "push") for name in own]
        out += [{"reserved": 1 << k} for k in range(INSTRUCTIONS[op].fields[-1].elem.bits)]
        pixels = [{"rows": 0}, {"cols": 0}, {"rows": depth + 1, "cols": 1}, {"rows": 1, "cols": depth + 1},
                  {"rows": 4095, "cols": 4095}, {"rows": 2048, "cols": 2048}]
        pixels += [{"rows": 1 << k, "cols": 1} for k in range(depth.bit_length(), 12)]
        pixels += [{"rows": 1, "cols": 1 << k} for k in range(depth.bit_length(), 12)]
        pixels += [{"rows": 1 << k, "cols": 2 * depth >> k} for k in range(1, depth.bit_length())]
        misaligned = [{"address": 1 << k} for k in range(z.unit_bytes.bit_length() - 1)]
        if op == Opcode.HEADER:
            out += [{"version": VERSION ^ 1 << k} for k in range(8)]
        elif op == Opcode.LOAD_TILE:
            out += [{"target": 2}, {"target": 3}, {"planes": 0}, {"rows": 0}, {"cols": 0}, *misaligned]
        elif op == Opcode.LOAD_LINEAR:
            out += [{"target": 3}, {"beats": 0}, *({"address": 1 << k} for k in range(z.beat_bytes.bit_length() - 1))]
            out += [{"target": 1, "beats": z.step_beats + (1 << k)} for k in range(z.step_beats.bit_length() - 1)]
        elif op == Opcode.FILL:
            out += [{"rows": 0}, {"blocks": 0}]
        elif op == Opcode.EXECUTE:
            out += [*pixels, {"steps": 0}, {"operation": 2}, {"operation": 3}, {"step": 1, "steps": entries},
                    {"step": entries, "steps": 1}, {"step": 4095, "steps": 4095}, {"step": 2048, "steps": 2048}]
            out += [{"step": 0, "steps": entries + (1 << k)} for k in range(12) if entries + (1 << k) < 4096]
            out += [{"step": 1 << k, "steps": 1} for k in range(entries.bit_length() - 1, 12)]
        elif op == Opcode.STORE:
            over = z.parameter_words - z.parameter_beats + 1
            out += [*pixels, *misaligned, {"low": 1, "high": 0}, {"low": 0, "high": -1}, {"low": 127, "high": -128},
                    {"low": -127, "high": -128}, {"low": 127, "high": 126}, {"parameter": over}, {"parameter": 65535}]
            out += [{"parameter": 1 << k} for k in range(over.bit_length(), 16)]
        return out


class World:
    """Memory, three units and the caller; the program counter of a model that knows what must come out next.

    ``stall``: of the units; ``idle``: of the data; ``latency``: of memory; ``busy``: most cycles a unit works.
    """

    def __init__(self, dut, program, *, at=64, count=None, rng, idle=0.0, stall=0.0, latency=3, busy=6):
        self.dut, self.rng, self.at, self.program = dut, rng, at, program
        self.config = config_of_run()
        self.sizes = Sizes(self.config)
        self.count = len(program) if count is None else count
        self.instruction_bytes = self.sizes.instruction_beats * self.sizes.beat_bytes
        self.data = Source(dut, "data", idle=idle)
        self.units = [Sink(dut, u, stall=stall) for u in UNITS]
        self.request = Sink(dut, "request", stall=idle)
        self.ends = [self.data, self.request, *self.units]
        self.latency, self.busy = latency, busy
        self.boards = {u: Scoreboard(u) for u in UNITS}
        self.planned = dict.fromkeys(UNITS, 0)
        for word in program:
            unit = UNIT_OF.get(word & 15)
            if unit is not None and unit != Unit.CONTROL:
                self.boards[UNITS[unit]].expect(word)
                self.planned[UNITS[unit]] += 1
        #: (instructions before it that go to units, number) of each barrier.
        self.barriers, before = deque(), 0
        for word in program:
            if word & 15 == Opcode.BARRIER:
                self.barriers.append((before, word >> 10 & 0xFFFF))
            before += UNIT_OF.get(word & 15, Unit.CONTROL) != Unit.CONTROL
        self.handed, self.asked, self.issued, self.done = 0, 0, [], None
        self.due, self.free, self.marks, self.requests = deque(), dict.fromkeys(UNITS, (-9, -9)), [], []
        self.starts, self.cycle = {1}, 0

    def drive(self, cycle):
        dut, self.cycle = self.dut, cycle
        assert not self.data.offering, "a beat that was asked for finds no room"
        dut.start.value = int(cycle in self.starts)
        if cycle == 1:
            dut.program.value, dut.count.value = self.at, self.count
        elif cycle > 1:         # sampled with start, later they may be anything
            dut.program.value, dut.count.value = int(self.rng.integers(1 << 40)), int(self.rng.integers(1 << 32))
        # A unit may show one cycle late that it is busy.
        self.quiet = all(cycle > end or cycle == taken + 1 for taken, end in self.free.values())
        if self.marks:
            assert int(dut.mark.value) == self.marks[-1], f"cycle {cycle}: MARK"
        dut.quiet.value = int(self.quiet)
        while self.due and self.due[0][0] <= cycle:
            self.data.words.append(self.due.popleft()[1])

    def take(self, cycle, port, word):
        if port == "request":
            offset, beats = word & (1 << 40) - 1, word >> 40
            z, chunk = self.sizes, self.config.control.fetch_depth // 2
            amount = min(chunk, self.count - self.asked)
            assert (offset, beats) == (self.at + self.asked * self.instruction_bytes, amount * z.instruction_beats)
            assert amount > 0
            bus = self.config.bus.data_bits
            for n in range(self.asked, self.asked + amount):
                value = self.program[n] if n < len(self.program) else 0
                value |= int(self.rng.integers(1 << 60)) << INSTRUCTION_BITS if bus > INSTRUCTION_BITS else 0
                for b in range(z.instruction_beats):
                    self.due.append((cycle + self.latency, value >> b * bus & (1 << bus) - 1))
            self.asked += amount
            self.requests.append(cycle)
            assert self.asked - len(self.issued) <= self.config.control.fetch_depth + 2, "more asked for than fits"
        elif port in UNITS:
            self.boards[port].observe(word)
            self.handed += 1
            self.free[port] = cycle, cycle + 1 + int(self.rng.integers(1, self.busy, endpoint=True))
        elif port == "mark_valid":
            before, number = self.barriers.popleft()
            assert (self.handed, int(self.dut.mark_number.value)) == (before, number), f"cycle {cycle}"
            assert all(cycle > end for _, end in self.free.values()), f"cycle {cycle}: a unit is busy"
            self.marks.append(number)
        elif port == "issued":
            self.issued.append(cycle)
        elif port == "done":
            assert self.done is None and self.handed == sum(self.planned.values()), f"cycle {cycle}"
            assert all(cycle > end for _, end in self.free.values()), f"cycle {cycle}: a unit is busy"
            assert not self.due and not self.data.words, f"cycle {cycle}: beats are on their way"
            self.done = cycle

    async def run(self, *, begin=start, drain=40, limit=100_000):
        if begin is not None:
            await begin(self.dut, self.ends, **INPUTS)
        async for cycle, port, word in exchange(self.dut, self.ends, rng=self.rng, watch=WATCH, on_cycle=self.drive,
                                                drain=drain, limit=limit, until=lambda: self.finished):
            self.take(cycle, port, word)
        return self

    @property
    def finished(self):
        return self.done is not None or bool(self.dut.error.value)

    def close(self):
        """A program that ended well."""
        dut = self.dut
        for unit, board in self.boards.items():
            if self.planned[unit]:
                board.close(self.planned[unit])
        assert not self.barriers and self.done is not None
        assert int(dut.error.value) == 0 and int(dut.running.value) == 0
        assert len(self.program) <= self.asked <= self.count and len(self.issued) == len(self.program)
        if self.marks:
            assert int(dut.mark.value) == self.marks[-1]
        return self


def random_program(rules, rng, count):
    """HEADER, anything legal, END."""
    ops = [op for op in OPCODES if op != Opcode.END]
    chance = np.array([.3 if op in (Opcode.HEADER, Opcode.BARRIER) else 1 for op in ops])
    chosen = rng.choice(ops, count, p=chance / chance.sum())
    return [rules.header(), *(encode(Opcode(op), **rules.any(Opcode(op), rng)) for op in chosen), encode(Opcode.END)]


@cocotb.test(timeout_time=5, timeout_unit="ms")
@cocotb.parametrize(idle=[0.0, 0.6], stall=[0.0, 0.5, 0.93])
async def runs_programs_in_order(dut, idle, stall):
    """Two programs, the second without reset; each unit gets its instructions in order, barriers and END wait."""
    rng, rules = np.random.default_rng(cocotb.RANDOM_SEED), Rules(config_of_run())
    for n in range(2):
        world = World(dut, random_program(rules, rng, 24), at=64 + 4096 * n, rng=rng, idle=idle, stall=stall,
                      latency=int(rng.integers(1, 12)), busy=int(rng.choice([1, 6, 30])))
        world.starts |= set(rng.integers(2, 60, 5).tolist())      # start while running is ignored
        (await world.run(begin=None if n else start)).close()


@cocotb.test(timeout_time=5, timeout_unit="ms")
@cocotb.parametrize(kind=["load", "execute", "store"])
async def one_slow_unit_stops_only_what_is_behind(dut, kind):
    """A unit that takes nothing: its queue fills, then the program stands; nothing is lost when it goes on."""
    rng, config = np.random.default_rng(cocotb.RANDOM_SEED), config_of_run()
    rules, op = Rules(config), {"load": Opcode.FILL, "execute": Opcode.EXECUTE, "store": Opcode.STORE}[kind]
    others = [o for o in (Opcode.FILL, Opcode.EXECUTE, Opcode.STORE) if o != op]
    depth = config.control.queue_depth
    program = [rules.header(), *(encode(o, **rules.any(o, rng)) for o in [op] * depth + others + [op] + others),
               encode(Opcode.END)]
    world = World(dut, program, rng=rng, busy=1)
    slow = world.units[UNITS.index(kind)]
    slow.stall = 1.0
    seen = {}

    def drive(cycle, drive=world.drive):
        drive(cycle)
        if cycle == 150:
            seen["handed"], seen["issued"] = world.handed, len(world.issued)
            slow.stall = 0.0

    world.drive = drive
    (await world.run()).close()
    assert seen == {"handed": len(others), "issued": 1 + depth + len(others)}, "the queue holds queue_depth"


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def empty_and_longest_fetches(dut):
    """Programs of every length up to two queues: the last request is shorter; nothing beyond the end is asked for."""
    rng, config = np.random.default_rng(cocotb.RANDOM_SEED), config_of_run()
    rules = Rules(config)
    for length in range(2 * config.control.fetch_depth + 2):
        program = random_program(rules, rng, length)
        (await World(dut, program, rng=rng).run(begin=reset if length else start)).close()


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def what_is_fetched_beyond_the_end_is_thrown_away(dut):
    """PROGRAM_COUNT may be larger than the program, by any bit of it; the next program begins with its own words."""
    rng, rules = np.random.default_rng(cocotb.RANDOM_SEED), Rules(config_of_run())
    counts = [*range(2, 12), *(1 << k for k in range(4, 32)), *rng.integers(11, 1 << 32, 30).tolist()]
    for n, count in enumerate(counts):
        program = random_program(rules, rng, int(rng.integers(0, min(count - 1, 9))))
        world = World(dut, program, rng=rng, count=count, busy=1, latency=int(rng.integers(1, 9)),
                      idle=float(rng.choice([0, .5, .93])))
        (await world.run(begin=None if n else start, drain=20)).close()


@cocotb.test(timeout_time=5, timeout_unit="ms")
@cocotb.parametrize(kind=["load", "execute", "store"])
async def barriers_see_what_is_queued(dut, kind):
    """Units are idle but take nothing for a while: BARRIER and END wait for what lies in the queues, however much."""
    rng, config = np.random.default_rng(cocotb.RANDOM_SEED), config_of_run()
    rules, op = Rules(config), {"load": Opcode.FILL, "execute": Opcode.EXECUTE, "store": Opcode.STORE}[kind]
    for count in range(config.control.queue_depth + 1):
        for last in (Opcode.BARRIER, Opcode.END):
            program = [rules.header(), *(encode(op, **rules.any(op, rng)) for _ in range(count))]
            program += [encode(last, **rules.any(last, rng))] + [encode(Opcode.END)] * (last == Opcode.BARRIER)
            world = World(dut, program, rng=rng, busy=1, latency=1)
            slow = world.units[UNITS.index(kind)]
            slow.stall = 1.0

            def drive(cycle, drive=world.drive, slow=slow):
                drive(cycle)
                slow.stall = float(cycle < 60)

            world.drive = drive
            (await world.run(begin=reset if count or last == Opcode.END else start, drain=10)).close()


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def meets_its_rate(dut):
    """As fast as beats come: an instruction per ``instruction_beats`` cycles, two at least."""
    rng, config = np.random.default_rng(cocotb.RANDOM_SEED), config_of_run()
    rules, count = Rules(config), 40
    program = [rules.header(), *(encode(Opcode.FILL, **rules.any(Opcode.FILL, rng)) for _ in range(count)),
               encode(Opcode.END)]
    world = World(dut, program, rng=rng, latency=1, busy=1)
    (await world.run()).close()
    gap = max(2, Sizes(config).instruction_beats)
    took = world.issued[count] - world.issued[0]
    dut._log.info("%d cycles for %d instructions", took, count)
    assert took <= gap * count + 2, f"{took} cycles for {count} instructions"


@cocotb.test(timeout_time=20, timeout_unit="ms")
async def every_field_at_its_edge_is_legal(dut):
    rng, rules = np.random.default_rng(cocotb.RANDOM_SEED), Rules(config_of_run())
    program = [rules.header()]
    for op in (o for o in OPCODES if o != Opcode.END):
        program += [encode(op, **rules.any(op, rng) | change) for change in rules.edges(op)]
    program.append(encode(Opcode.END))
    (await World(dut, program, rng=rng, busy=1, latency=1).run()).close()


async def attempt(dut, program, *, rng, first, at=0, begin=True):
    """Runs a short program without stalls; returns (error word, instructions handed out, done, issued)."""
    config = config_of_run()
    bus, beats = config.bus.data_bits, Sizes(config).instruction_beats
    if begin:
        await (start if first else reset)(dut, (), **INPUTS, data__valid=0, load__ready=1, execute__ready=1,
                                          store__ready=1, request__ready=1)
    dut.program.value, dut.count.value, dut.start.value = at, len(program), 1
    words = deque(word >> b * bus & (1 << bus) - 1 for word in program for b in range(beats))
    handed, asked, done, issued, quiet, budget = [], 0, False, 0, 0, 0
    while quiet < 12:
        await FallingEdge(dut.clk)
        dut.start.value = 0 if budget else 1
        offer = bool(words) and asked > 0
        dut.data__valid.value, dut.data__payload.value = int(offer), words[0] if offer else int(rng.integers(1 << 30))
        await ReadOnly()
        quiet, budget = quiet + 1, budget + 1
        assert budget < 60 + 20 * len(program), "no end"
        if dut.request__valid.value:
            asked += int(dut.request__payload.value) >> 40
            quiet = 0
        for unit in UNITS:
            if getattr(dut, f"{unit}__valid").value:
                handed.append(int(getattr(dut, f"{unit}__payload").value))
        if offer and dut.data__ready.value:
            words.popleft()
            asked -= 1
            quiet = 0
        done |= bool(dut.done.value)
        issued += int(dut.issued.value)
    await FallingEdge(dut.clk)
    return int(dut.error.value), handed, done, issued


def error_word(code, address):
    return 1 | int(code) << 1 | address << 9


async def refused(dut, program, code, number, *, rng, first):
    """The instruction ``number`` stops the program with ``code``; only those before it are handed out."""
    at = int(rng.integers(1 << 36)) * 8
    error, handed, done, issued = await attempt(dut, program, rng=rng, first=first, at=at)
    bytes_each = Sizes(config_of_run()).instruction_beats * config_of_run().bus.data_bits // 8
    name = f"{program[number]:#x}" if number < len(program) else "the end"
    assert error == error_word(code, at + number * bytes_each), f"error {error:#x} for {name}"
    want = [w for w in program[:number] if UNIT_OF.get(w & 15, Unit.CONTROL) != Unit.CONTROL]
    assert handed == want and issued == number and not done, name


@cocotb.test(timeout_time=20, timeout_unit="ms")
@cocotb.parametrize(op=[int(op) for op in OPCODES])
async def every_broken_rule_is_refused(dut, op):
    rng, rules = np.random.default_rng(cocotb.RANDOM_SEED), Rules(config_of_run())
    op = Opcode(op)
    for n, change in enumerate(rules.broken(op)):
        # the change alone decides: other fields are legal and, every other time, as small as can be
        fields = rules.any(op, rng)
        if "address" in change:
            fields["address"] = 0
        spare = change.pop("reserved", 0)
        word = encode(op, **fields | change) | spare << INSTRUCTIONS[op].offset("reserved")
        program = [rules.header(), word, encode(Opcode.END)]
        await refused(dut, program, Error.ILLEGAL_FIELD, 1, rng=rng, first=n == 0)


@cocotb.test(timeout_time=20, timeout_unit="ms")
async def other_programs_are_refused(dut):
    """Unknown operations; another digest, first or later, in each bit; no HEADER; no END; nothing at all."""
    rng, rules = np.random.default_rng(cocotb.RANDOM_SEED), Rules(config_of_run())
    fill, end = encode(Opcode.FILL, **rules.any(Opcode.FILL, rng)), encode(Opcode.END)
    cases = [([rules.header(), fill, code | fill & ~15, end], Error.ILLEGAL_OPCODE, 2) for code in (0, *range(9, 16))]
    cases += [([code], Error.ILLEGAL_OPCODE, 0) for code in (0, 9, 15)]
    for k in range(48):
        other = rules.header(digest=rules.sizes.digest_value ^ 1 << k)
        cases += [([other, end], Error.DIGEST_MISMATCH, 0)]
        cases += [([rules.header(), fill, other, end], Error.DIGEST_MISMATCH, 2)]
    others = [op for op in OPCODES if op != Opcode.HEADER]
    cases += [([encode(op, **rules.any(op, rng)), end], Error.DIGEST_MISMATCH, 0) for op in others]
    masked = rules.header() & ~15 | Opcode.FILL     # carries the digest, but is no HEADER
    cases += [([masked, end], Error.DIGEST_MISMATCH, 0)]
    cases += [([rules.header()], Error.PROGRAM_END, 1), ([rules.header(), fill, fill], Error.PROGRAM_END, 3),
              ([], Error.PROGRAM_END, 0)]
    for n, (program, code, number) in enumerate(cases):
        await refused(dut, program, code, number, rng=rng, first=n == 0)


@cocotb.test(timeout_time=5, timeout_unit="ms")
@cocotb.parametrize(idle=[0.0, 0.5], stall=[0.0, 0.9])
async def the_first_error_stays(dut, idle, stall):
    """What was queued before goes out, nothing more is fetched or issued, a new start changes nothing."""
    rng, rules = np.random.default_rng(cocotb.RANDOM_SEED), Rules(config_of_run())
    for n in range(4):
        good = [w for w in random_program(rules, rng, 12)[:-1] if w & 15 not in (Opcode.BARRIER,)]
        bad = encode(Opcode.FILL, **rules.any(Opcode.FILL, rng) | {"rows": 0})
        rest = [encode(Opcode.FILL, **rules.any(Opcode.FILL, rng)) for _ in range(20)]
        world = World(dut, good, rng=rng, idle=idle, stall=stall, at=1 << 20)
        world.program = [*good, bad, *rest]
        world.count = len(world.program)
        world.starts |= set(range(150, 400, 17))
        world.request.check_stable = False      # an error withdraws a request, as it does with the bus masters
        await world.run(begin=reset if n else start, drain=300)
        want = error_word(Error.ILLEGAL_FIELD, world.at + len(good) * world.instruction_bytes)
        assert int(dut.error.value) == want and world.done is None
        for unit, board in world.boards.items():
            assert board.passed == world.planned[unit], unit
        assert len(world.issued) == len(good) and world.asked < world.count


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def reset_in_mid_program_leaves_nothing(dut):
    """Cut off at any moment, the next program runs as after power-up."""
    rng, rules = np.random.default_rng(cocotb.RANDOM_SEED), Rules(config_of_run())
    for n in range(12):
        world = World(dut, random_program(rules, rng, 30), rng=rng, idle=0.3, stall=0.6)
        enough = int(rng.integers(5, 120))
        await (reset if n else start)(dut, world.ends, **INPUTS)
        async for cycle, port, word in exchange(dut, world.ends, rng=rng, watch=WATCH, on_cycle=world.drive, drain=0,
                                                until=lambda world=world, enough=enough: world.cycle >= enough):
            world.take(cycle, port, word)
        (await World(dut, random_program(rules, rng, 6), rng=rng).run(begin=reset)).close()
