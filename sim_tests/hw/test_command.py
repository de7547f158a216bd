"""The command processor: every rule of every field, header, fetch, dispatch, BARRIER, END, errors, starts."""

from collections import deque
import itertools

import pytest

from hw.control.command import CommandProcessor, InstructionCheck
from hw.control.tokens import UNITS
from sim_tests.hw.configs import CONFIGS
from sim_tests.lib.pysim import simulate
from spec.config import load
from spec.derive import Sizes
from spec.isa import INSTRUCTIONS, UNIT_OF, VERSION, Mode, Opcode, Unit, encode
from spec.registers import Error


#: Also those with a basis engine.
ALL = CONFIGS | {name: load(name) for name in ("tiny_basis", "tiny_maps")}
#: Fields of EXECUTE_BASIS that must not be 0.
POSITIVE = (
    "in_rows",
    "in_cols",
    "kernel_rows",
    "kernel_cols",
    "dilation_rows",
    "dilation_cols",
    "groups",
)


# -- the check ---------------------------------------------------------------------------------------------------------


def base_fields(config):
    """A legal instruction of each kind that the configuration has."""
    z = Sizes(config)
    all_kinds = {
        Opcode.HEADER: dict(digest=z.digest_value, version=VERSION),
        Opcode.LOAD_TILE: dict(planes=1, rows=1, cols=1, address=64),
        Opcode.LOAD_LINEAR: dict(beats=z.step_beats, address=64),
        Opcode.FILL: dict(rows=1, blocks=1),
        Opcode.EXECUTE: dict(rows=1, cols=1, steps=1),
        Opcode.EXECUTE_BASIS: dict.fromkeys(POSITIVE, 1) | {"out_rows": 1, "out_cols": 1, "terms": 1},
        Opcode.STORE: dict(rows=1, cols=1, address=64),
        Opcode.BARRIER: {},
        Opcode.END: {},
    }
    missing = {Opcode.EXECUTE: config.structured is None, Opcode.EXECUTE_BASIS: config.basis is None}
    return {op: fields for op, fields in all_kinds.items() if not missing.get(op)}


def rule_cases(config):
    """(opcode, fields, legal): each rule from both sides, and extremes of the fields that have none."""
    z = Sizes(config)
    base, depth, entries = base_fields(config), z.accumulator_depth, config.memory.step_entries
    for op, fields in base.items():
        yield op, fields, True
        own = UNITS if UNIT_OF[op] == Unit.CONTROL else UNITS[UNIT_OF[op] : UNIT_OF[op] + 1]
        for u, kind in itertools.product(UNITS, ("wait", "push")):
            yield op, fields | {f"{kind}_{u}": 1}, u not in own
        width = INSTRUCTIONS[op].fields[-1].bits
        for bit in {0, width // 2, width - 1}:
            yield op, fields | {"reserved": 1 << bit}, False
        ruled = {
            "digest",
            "version",
            "target",
            "address",
            "planes",
            "rows",
            "cols",
            "beats",
            "blocks",
            "steps",
            "step",
            "operation",
            "parameter",
            "low",
            "high",
            "opcode",
            "reserved",
            *POSITIVE,
            "out_rows",
            "out_cols",
            "mode",
            "terms",
            "n_log2",
            *(f"{k}_{u}" for k in ("wait", "push") for u in UNITS),
        }
        for f in INSTRUCTIONS[op].fields:
            if f.name not in ruled:
                for value in (f.elem.lo, f.elem.hi):
                    yield op, fields | {f.name: value}, True

    def of(op, **changes):
        return op, base[op] | changes

    for version in (0, 2, 255):
        yield *of(Opcode.HEADER, version=version), False
    yield *of(Opcode.HEADER, digest=0), True  # judged by the processor
    for name in ("planes", "rows", "cols"):
        yield *of(Opcode.LOAD_TILE, **{name: 0}), False
        yield *of(Opcode.LOAD_TILE, **{name: INSTRUCTIONS[Opcode.LOAD_TILE].fields[9].elem.hi & 1023}), True
    for target in range(4):
        yield *of(Opcode.LOAD_TILE, target=target), target < 2
        yield *of(Opcode.LOAD_LINEAR, target=target), target < 3 and (target != 1 or config.structured is not None)
    for op, grain in (
        (Opcode.LOAD_TILE, z.unit_bytes),
        (Opcode.STORE, z.unit_bytes),
        (Opcode.LOAD_LINEAR, z.beat_bytes),
    ):
        for offset in {1, grain // 2, grain - 1} - {0}:
            yield *of(op, address=64 + offset), False
        for address in (0, grain, (1 << 40) - grain):
            yield *of(op, address=address), True
    yield *of(Opcode.LOAD_LINEAR, beats=0), False
    for beats in range(1, 10):
        yield (
            *of(Opcode.LOAD_LINEAR, target=1, beats=beats),
            beats % z.step_beats == 0 and config.structured is not None,
        )
        yield *of(Opcode.LOAD_LINEAR, target=0, beats=beats), True
        yield *of(Opcode.LOAD_LINEAR, target=2, beats=beats), True
    yield *of(Opcode.FILL, rows=0), False
    yield *of(Opcode.FILL, blocks=0), False
    yield *of(Opcode.FILL, rows=4095, blocks=65535), True
    sizes = {Opcode.EXECUTE: ("rows", "cols"), Opcode.STORE: ("rows", "cols"),
             Opcode.EXECUTE_BASIS: ("out_rows", "out_cols")}
    for op in sizes.keys() & base.keys():
        for rows, cols in (
            (0, 1),
            (1, 0),
            (0, 0),
            (1, depth),
            (depth, 1),
            (1, depth + 1),
            (depth + 1, 1),
            (2, depth // 2),
            (2, depth // 2 + 1),
            (4095, 4095),
            (2048, 2048),
            (4095, 0),
            (64, 64),
        ):
            yield *of(op, **dict(zip(sizes[op], (rows, cols)))), 0 < rows * cols <= depth
    for step, steps in (
        (0, 0),
        (0, entries),
        (0, entries + 1),
        (entries - 1, 1),
        (entries - 1, 2),
        (entries, 1),
        (entries, 0),
        (4095, 4095),
        (4095, 1),
        (1, 4095),
    ):
        if max(step, steps) < 4096 and Opcode.EXECUTE in base:
            yield *of(Opcode.EXECUTE, step=step, steps=steps), steps > 0 and step + steps <= entries
    for operation in range(4):
        for op in {Opcode.EXECUTE, Opcode.EXECUTE_BASIS} & base.keys():
            yield *of(op, operation=operation), operation < 2
    if Opcode.EXECUTE_BASIS in base:
        yield from basis_cases(config, base[Opcode.EXECUTE_BASIS])
    last = z.parameter_words - z.parameter_beats
    for parameter in (last, last + 1, 65535):
        yield *of(Opcode.STORE, parameter=parameter), parameter <= last
    for low, high in itertools.product((-128, -1, 0, 1, 127), repeat=2):
        yield *of(Opcode.STORE, low=low, high=high), low <= high


def basis_cases(config, base):
    """Rules of EXECUTE_BASIS alone."""
    op, series = Opcode.EXECUTE_BASIS, config.basis.coefficients == "series"
    for name in POSITIVE:
        field = next(f for f in INSTRUCTIONS[op].fields if f.name == name)
        most = 8 if name == "kernel_rows" else field.elem.hi
        yield op, base | {name: 0}, False
        for value in (1, 2, most, field.elem.hi):
            yield op, base | {name: value}, value <= most
    for mode, terms in itertools.product(range(4), range(8)):
        counts = mode == Mode.DECOMPOSED and series
        yield op, base | {"mode": mode, "terms": terms}, mode < 3 and (not counts or 1 <= terms <= 4)
    for logs in ([7] * 4, [0] * 4):  # judged by the engine
        yield op, base | {"n_log2": logs}, True


@pytest.mark.parametrize("name", ["tiny", "bus32", "bus256", "block8", "groups", "tiny_basis", "tiny_maps"])
def test_every_rule(name):
    config = ALL[name]
    known = base_fields(config)
    check = InstructionCheck(config=config)

    async def bench(ctx):
        verdicts = set()
        for op, fields, legal in rule_cases(config):
            ctx.set(check.word, encode(op, **fields))
            assert ctx.get(check.known)
            assert ctx.get(check.legal) == legal, f"{op.name} {fields}"
            verdicts.add((op, legal))
        assert verdicts == set(itertools.product(known, (True, False)))
        for code in range(16):
            ctx.set(check.word, code)
            assert ctx.get(check.known) == (code in known)

    simulate(check, bench, clocked=False)


# -- the processor ---------------------------------------------------------------------------------------------------


class Bench:
    """Memory, units and a host around the processor, cycle by cycle."""

    def __init__(self, config, rng, *, idle=0.0, stall=0.0, latency=1):
        self.config, self.sizes, self.rng = config, Sizes(config), rng
        self.idle, self.stall, self.latency = idle, stall, latency
        self.stride = self.sizes.instruction_beats * self.sizes.beat_bytes
        self.memory, self.beats = {}, deque()
        self.got = {u: [] for u in UNITS}
        self.marks, self.done, self.requests, self.cycle, self.issued = [], 0, [], 0, 0
        self.running_for = dict.fromkeys(UNITS, 0)  # cycles until the unit is idle again
        self.shown = dict.fromkeys(UNITS)

    def place(self, offset, words):
        bus = self.config.bus.data_bits
        for n, word in enumerate(words):
            for k in range(self.sizes.instruction_beats):
                self.memory[offset + n * self.stride + k * self.sizes.beat_bytes] = word >> bus * k & (1 << bus) - 1

    async def step(self, ctx, dut, *, start=None):
        """One cycle. ``start``: (program, count)."""
        rng = self.rng
        ctx.set(dut.start, start is not None)
        if start:
            ctx.set(dut.program, start[0])
            ctx.set(dut.count, start[1])
        offer = bool(self.beats) and self.beats[0][0] <= self.cycle and rng.random() >= self.idle
        ctx.set(dut.data.valid, offer)
        ctx.set(dut.data.payload, self.beats[0][1] if offer else 0)
        ctx.set(dut.request.ready, rng.random() >= self.stall)
        for u in UNITS:
            ctx.set(getattr(dut, u).ready, self.running_for[u] == 0 and rng.random() >= self.stall)
        busy = any(self.running_for.values())
        ctx.set(dut.quiet, not busy)
        # everything in this cycle is settled now
        if offer and ctx.get(dut.data.ready):
            self.beats.popleft()
        if ctx.get(dut.request.valid) and ctx.get(dut.request.ready):
            offset, count = ctx.get(dut.request.payload.offset), ctx.get(dut.request.payload.beats)
            self.requests.append((offset, count))
            assert count <= self.config.control.fetch_depth // 2 * self.sizes.instruction_beats
            for k in range(count):
                self.beats.append((self.cycle + self.latency, self.memory.get(offset + k * self.sizes.beat_bytes, 0)))
        for u in UNITS:
            port = getattr(dut, u)
            word = ctx.get(port.payload) if ctx.get(port.valid) else None
            assert self.shown[u] in (None, word), "an offer changed"
            self.shown[u] = word
            self.running_for[u] = max(self.running_for[u] - 1, 0)
            if word is not None and ctx.get(port.ready):
                self.shown[u] = None
                self.got[u].append(word)
                # a unit shows the instruction it took in the cycle after, not in this one
                self.running_for[u] = int(rng.integers(1, 12))
        if ctx.get(dut.mark_valid):
            assert not busy and not any(self.shown.values()), "BARRIER does not wait"
            self.marks.append((ctx.get(dut.mark_number), sum(map(len, self.got.values()))))
        self.issued += ctx.get(dut.issued)
        if ctx.get(dut.done):
            assert not busy and not any(self.shown.values()), "END does not wait"
            self.done += 1
        await ctx.tick()
        self.cycle += 1

    async def run(self, ctx, dut, program, count, *, limit=4000):
        """Start and wait for END or an error; returns (code, address) or None."""
        await self.step(ctx, dut, start=(program, count))
        before = self.done
        for _ in range(limit):
            await self.step(ctx, dut)
            if ctx.get(dut.error.valid):
                return Error(ctx.get(dut.error.code)), ctx.get(dut.error.address)
            if self.done > before:
                return None
        raise AssertionError("neither END nor an error")


def simulate_with(config, rng, script, **options):
    dut, bench = CommandProcessor(config=config), Bench(config, rng, **options)

    async def main(ctx):
        await script(ctx, dut, bench)

    simulate(dut, main)
    return bench


def random_program(config, rng, length):
    base = base_fields(config)
    words, want, marks = [encode(Opcode.HEADER, **base[Opcode.HEADER])], {u: [] for u in UNITS}, []
    for n in range(length):
        op = Opcode(rng.choice([o for o in base if o is not Opcode.END]))
        fields = dict(base[op])
        if op is Opcode.BARRIER:
            fields["mark"] = int(rng.integers(1 << 16))
            marks.append((fields["mark"], sum(map(len, want.values()))))
        words.append(encode(op, **fields) if op is not Opcode.FILL else encode(op, **fields | {"base": n}))
        if UNIT_OF[op] != Unit.CONTROL:
            want[UNITS[UNIT_OF[op]]].append(words[-1])
    return [*words, encode(Opcode.END)], want, marks


@pytest.mark.parametrize("name", ["tiny", "bus32", "bus256", "tiny_basis"])
@pytest.mark.parametrize("idle, stall, latency", [(0, 0, 1), (0.5, 0.5, 30), (0, 0.9, 1)])
def test_random_programs(name, idle, stall, latency, rng):
    """Order per unit, BARRIER behind everything before it, END last; several starts, programs at several places."""
    config = ALL[name]

    async def script(ctx, dut, bench):
        for number, length in enumerate((0, 1, 25, 40)):
            words, want, marks = random_program(config, rng, length)
            offset = 0x10000 * number + 64
            bench.place(offset, words)
            bench.got, bench.marks, bench.issued, bench.requests = {u: [] for u in UNITS}, [], 0, []
            assert await bench.run(ctx, dut, offset, len(words)) is None
            assert bench.got == want and bench.marks == marks and bench.issued == len(words)
            if marks:
                assert ctx.get(dut.mark) == marks[-1][0]
            fetched = sum(n for _, n in bench.requests)
            assert fetched == len(words) * bench.sizes.instruction_beats and not ctx.get(dut.running)
            for _ in range(20):
                await bench.step(ctx, dut)
            assert bench.got == want

    simulate_with(config, rng, script, idle=idle, stall=stall, latency=latency)


@pytest.mark.parametrize("latency", [1, 5, 40])
def test_end_before_the_last_instruction(latency, rng):
    """What was fetched beyond END does not run, neither now nor at the next start."""
    config = CONFIGS["tiny"]

    async def script(ctx, dut, bench):
        base = base_fields(config)
        fill = encode(Opcode.FILL, rows=1, blocks=1, base=9)
        header = encode(Opcode.HEADER, **base[Opcode.HEADER])
        for tail in range(12):
            bench.place(0, [header, encode(Opcode.END), *[fill] * tail])
            bench.place(0x1000, [header, encode(Opcode.BARRIER, mark=tail), encode(Opcode.END)])
            bench.marks = []
            assert await bench.run(ctx, dut, 0, 2 + tail) is None
            assert not ctx.get(dut.running)
            assert await bench.run(ctx, dut, 0x1000, 3) is None
            assert bench.marks == [(tail, 0)]
        assert bench.got == {u: [] for u in UNITS}

    simulate_with(config, rng, script, latency=latency)


def refusals(config):
    """Name -> (words, count or None, code, number of the instruction)."""
    z, base = Sizes(config), base_fields(config)
    header, end = encode(Opcode.HEADER, **base[Opcode.HEADER]), encode(Opcode.END)
    fill = encode(Opcode.FILL, rows=1, blocks=1)
    other = encode(Opcode.HEADER, digest=z.digest_value ^ 1 << 47, version=VERSION)
    return {
        "empty memory": ([0, end], None, Error.ILLEGAL_OPCODE, 0),
        "no header": ([fill, end], None, Error.DIGEST_MISMATCH, 0),
        "END alone": ([end], None, Error.DIGEST_MISMATCH, 0),
        "another digest": ([other, end], None, Error.DIGEST_MISMATCH, 0),
        "another digest, lowest bit": (
            [encode(Opcode.HEADER, digest=z.digest_value ^ 1, version=VERSION), end],
            None,
            Error.DIGEST_MISMATCH,
            0,
        ),
        "another version": (
            [encode(Opcode.HEADER, digest=z.digest_value, version=VERSION + 1), end],
            None,
            Error.ILLEGAL_FIELD,
            0,
        ),
        "a second header of another digest": ([header, fill, other, end], None, Error.DIGEST_MISMATCH, 2),
        "unknown operation": ([header, fill, 15, end], None, Error.ILLEGAL_OPCODE, 2),
        "illegal field": (
            [header, fill, fill, encode(Opcode.FILL, rows=0, blocks=1), end],
            None,
            Error.ILLEGAL_FIELD,
            3,
        ),
        "no END": ([header, fill, fill], None, Error.PROGRAM_END, 3),
        "END beyond the count": ([header, fill, end], 2, Error.PROGRAM_END, 2),
        "no instruction": ([header, end], 0, Error.PROGRAM_END, 0),
    }


@pytest.mark.parametrize("name", ["tiny", "bus256"])
@pytest.mark.parametrize("what", refusals(CONFIGS["tiny"]))
def test_refusals(name, what, rng):
    """Code and offset; instructions before it reach their units, none behind it."""
    config = ALL[name]
    words, count, code, number = refusals(config)[what]

    async def script(ctx, dut, bench):
        offset = 0x20_0000_0040
        bench.place(offset, words)
        assert await bench.run(ctx, dut, offset, len(words) if count is None else count) == (
            code,
            offset + number * bench.stride,
        )
        for _ in range(60):
            await bench.step(ctx, dut)
        assert ctx.get(dut.error.valid) and ctx.get(dut.error.code) == code and bench.done == 0
        assert sum(map(len, bench.got.values())) <= sum(w & 15 == Opcode.FILL for w in words[:number])

    simulate_with(config, rng, script)


def test_rate_and_back_pressure(rng):
    """One instruction per two cycles; a full queue of one unit stops the fetch at its bound, and nothing is lost."""
    config = CONFIGS["bus256"]

    async def script(ctx, dut, bench):
        words = [
            encode(Opcode.HEADER, **base_fields(config)[Opcode.HEADER]),
            *[encode(Opcode.FILL, rows=1, blocks=1, base=n) for n in range(60)],
            encode(Opcode.END),
        ]
        bench.place(0, words)
        bench.running_for["load"] = 150
        await bench.step(ctx, dut, start=(0, len(words)))
        for _ in range(140):
            await bench.step(ctx, dut)
            bench.running_for["load"] = max(bench.running_for["load"], 20)
        inside = config.control.queue_depth + 1 + config.control.fetch_depth
        asked = sum(n for _, n in bench.requests) // bench.sizes.instruction_beats
        assert inside - 3 <= asked <= inside + 2, f"{asked} instructions asked for, {inside} places"
        bench.rng = type("Always", (), {"random": lambda self: 1.0, "integers": lambda self, a, b: 1})()
        first = None
        while not bench.done:
            issued = bench.issued
            await bench.step(ctx, dut)
            if bench.issued > issued and len(bench.got["load"]) >= 20:
                first = first or (bench.cycle, issued)
                last = bench.cycle, issued
        assert [w >> 10 for w in bench.got["load"]] == [w >> 10 for w in words[1:-1]]
        assert first and last[0] - first[0] <= 2 * (last[1] - first[1]) + 8

    simulate_with(config, rng, script)


def test_start_while_running_is_ignored(rng):
    config = CONFIGS["tiny"]

    async def script(ctx, dut, bench):
        words, want, _ = random_program(config, rng, 20)
        bench.place(0, words)
        bench.place(0x4000, [0] * 4)
        await bench.step(ctx, dut, start=(0, len(words)))
        for n in range(3000):
            await bench.step(
                ctx, dut, start=(0x4000, 4) if n % 3 == 0 and not bench.done and ctx.get(dut.running) else None
            )
            if bench.done:
                break
        assert bench.done == 1 and bench.got == want and not ctx.get(dut.error.valid)

    simulate_with(config, rng, script)
