"""The loader of the basis engine: every beat to its place, halves, waits, legality of every field, cycles."""

from amaranth.hdl import Module, ResetInserter, Signal
import pytest

from golden.coefficients import map_words, series_words
from hw.basis.loader import BasisLoader
from sim_tests.hw.basis_jobs import JOB, ONE, completed, random_fields
from sim_tests.hw.test_basis_programs import CONFIGS
from sim_tests.lib.pysim import simulate
from spec.derive import Sizes, ceil_div
from spec.formats import Record
from spec.isa import INSTRUCTIONS, Mode, Opcode
from spec.registers import Error

EXECUTE = Record("execute", INSTRUCTIONS[Opcode.EXECUTE_BASIS].fields[1:-1])
_NAMES = {f.name for f in EXECUTE.fields}


def word_of(fields):
    """Bits of an instruction as the loader takes it."""
    return EXECUTE.pack(**{k: v for k, v in (ONE | fields).items() if k in _NAMES})


def random_instruction(config, rng):
    """A legal instruction with or without taps and coefficients."""
    b, z = config.basis, Sizes(config)
    mode = Mode(int(rng.integers(3)))
    f = random_fields(config, rng, mode)
    rows = f["groups"] if mode is Mode.POINTWISE else f["kernel_rows"] * f["chunks"]
    f["taps"] = int(rng.choice([0, rows, min(rows + 1, b.tap_rows)]))
    if mode is Mode.DECOMPOSED:
        series = b.coefficients == "series"
        while True:
            f["groups"] = int(rng.integers(1, z.coefficient_groups + 1))
            terms = [int(n) for n in 1 << rng.integers(0, b.group.bit_length(), int(rng.integers(1, 5)))]
            words = series_words(f["groups"], terms, config) if series else map_words(f["groups"], config)
            if words <= b.coefficient_rows:
                break
        beats = words * z.series_tile_beats if series else int(rng.integers(1, 9))
        f |= {"terms": len(terms), "coefficients": int(rng.choice([0, beats])),
              "n_log2": [n.bit_length() - 1 for n in terms] + [7] * (4 - len(terms))}
    used = f["taps"] * z.tap_row_beats + f["coefficients"]
    if used > z.weight_beats:
        return random_instruction(config, rng)
    return f | {"weight": int(rng.choice([0, z.weight_beats - used, rng.integers(z.weight_beats - used + 1)]))}


async def run(ctx, unit, config, todo, rng, *, idle=0.0, stall=0.0, use=0.0, late=0):
    """Feed instructions; returns {"i", "taps", "start", "load", "o": [(cycle, value)]} and the error code.

    ``use``: chance per cycle that a half is in use; ``late``: most cycles from the last beat to ``loaded``.
    """
    z = Sizes(config)
    memory = [int.from_bytes(rng.bytes(z.beat_bytes), "little") for _ in range(z.weight_beats)]
    seen = {name: [] for name in ("i", "taps", "start", "load", "o")}
    at, offering, offered, quiet, loaded, remaining = 0, False, None, 0, 0, 0
    ctx.set(unit.loaded, 1)
    while quiet < 12:
        cycle = seen["cycle"] = seen.get("cycle", -1) + 1
        assert cycle < 20_000, "no end"
        offering = at < len(todo) and (offering or rng.random() >= idle)
        ctx.set(unit.i.valid, int(offering))
        ctx.set(unit.i.payload.as_value(), word_of(todo[at]) if offering else int(rng.integers(1 << 62)))
        ctx.set(unit.o.ready, int(rng.random() >= stall))
        ctx.set(unit.load.ready, int(rng.random() >= stall))
        tap_use, coefficient_use = (int(rng.random() < use) | int(rng.random() < use) << 1 for _ in range(2))
        ctx.set(unit.tap_use, tap_use)
        ctx.set(unit.coefficient_use, coefficient_use)
        ctx.set(unit.loaded, int(not remaining and loaded <= 0))
        loaded -= not remaining
        quiet = 0 if ctx.get(unit.busy) and not ctx.get(unit.error.valid) else quiet + 1
        assert ctx.get(unit.busy) or not (ctx.get(unit.weight_en) or ctx.get(unit.tap_en) or ctx.get(unit.load.valid))
        if took := offering and ctx.get(unit.i.ready):
            seen["i"].append((cycle, at))
            quiet = 0
        if ctx.get(unit.tap_en):
            seen["taps"].append((cycle, (ctx.get(unit.tap_row), ctx.get(unit.tap_beat), ctx.get(unit.weight_data))))
        if ctx.get(unit.load_start):
            half = ctx.get(unit.load_half)
            assert not coefficient_use >> half & 1, "loads a half in use"
            remaining = todo[at - 1]["coefficients"]
            loaded = int(rng.integers(late + 1))
            seen["start"].append((cycle, (half, ctx.get(unit.load_groups))))
        if ctx.get(unit.load.valid) and ctx.get(unit.load.ready):
            seen["load"].append((cycle, ctx.get(unit.load.payload)))
            remaining -= 1
        word = ctx.get(unit.o.payload.as_value()) if ctx.get(unit.o.valid) else None
        assert offered in (None, word), "a stalled offer changed"
        offered = None if ctx.get(unit.o.ready) else word
        if word is not None and ctx.get(unit.o.ready):
            seen["o"].append((cycle, JOB.unpack(word)))
        reading, where = ctx.get(unit.weight_en), ctx.get(unit.weight_address)
        await ctx.tick()
        if took:
            at, offering = at + 1, False
        if reading:
            ctx.set(unit.weight_data, memory[where])
    code = ctx.get(unit.error.code) if ctx.get(unit.error.valid) else None
    return seen, code, memory


@pytest.mark.parametrize("idle, stall, use, late", [(0, 0, 0, 0), (0.5, 0.5, 0.3, 5), (0, 0.9, 0, 0), (0, 0, 0.95, 0)])
@pytest.mark.parametrize("name", ["tiny_basis", "tiny_maps", "bus32"])
def test_beats_halves_and_jobs(name, idle, stall, use, late, rng):
    config, unit = CONFIGS[name], BasisLoader(config=CONFIGS[name])
    b, z = config.basis, Sizes(config)
    todo = [random_instruction(config, rng) for _ in range(25)]

    async def bench(ctx):
        seen, code, memory = await run(ctx, unit, config, todo, rng, idle=idle, stall=stall, use=use, late=late)
        assert code is None
        halves, want = [0, 0], {"taps": [], "start": [], "load": [], "o": []}
        for f in todo:
            at = f["weight"]
            halves[0] ^= f["taps"] > 0
            halves[1] ^= f["coefficients"] > 0
            for row in range(f["taps"]):
                for beat in range(z.tap_row_beats):
                    want["taps"].append((row + halves[0] * b.tap_rows, beat, memory[at]))
                    at += 1
            if f["coefficients"]:
                want["start"].append((halves[1], f["groups"]))
                want["load"] += memory[at:at + f["coefficients"]]
            want["o"].append(completed(config, f) | {"tap_half": int(halves[0]), "coefficient_half": int(halves[1])})
        for port, values in want.items():
            got = [value for _, value in seen[port]]
            wrong = next((pair for pair in zip(got, values) if pair[0] != pair[1]), (len(got), len(values)))
            assert got == values, f"{port}: {wrong}"
        if not (idle or stall or use):
            for (begin, n), (end, _) in zip(seen["i"], seen["o"]):
                taps, beats = todo[n]["taps"] * z.tap_row_beats, todo[n]["coefficients"]
                cycles = 2 + (taps + 3 if taps else 0) + (beats + 3 if beats else 0)
                assert end - begin == cycles, f"{end - begin} cycles for {taps} + {beats} beats"

    simulate(unit, bench)


@pytest.mark.parametrize("which", ["taps", "coefficients"])
def test_waits_for_the_half(which, rng):
    """Nothing is written while the half to fill is in use; it begins as soon as it is free; ``stop`` withholds jobs."""
    config, unit = CONFIGS["tiny_basis"], BasisLoader(config=CONFIGS["tiny_basis"])
    z = Sizes(config)
    fields = {"terms": 1, which: 1 if which == "taps" else z.series_tile_beats}

    async def bench(ctx):
        ctx.set(unit.loaded, 1)
        ctx.set(unit.load.ready, 1)
        # the first load goes to half 1, as half 0 was the job's before
        port = unit.tap_use if which == "taps" else unit.coefficient_use
        ctx.set(port, 0b10)
        ctx.set(unit.i.payload.as_value(), word_of(fields))
        ctx.set(unit.i.valid, 1)
        await ctx.tick()
        ctx.set(unit.i.valid, 0)
        for _ in range(30):
            assert ctx.get(unit.busy) and not (ctx.get(unit.weight_en) or ctx.get(unit.load_start))
            await ctx.tick()
        ctx.set(port, 0b01)
        begun = ctx.get(unit.load_start)
        await ctx.tick()
        assert ctx.get(unit.weight_en) and begun == (which == "coefficients")
        ctx.set(unit.stop, 1)
        ctx.set(unit.o.ready, 1)
        for _ in range(30):
            assert not ctx.get(unit.o.valid)
            await ctx.tick()
        ctx.set(unit.stop, 0)
        assert ctx.get(unit.o.valid)

    simulate(unit, bench)


def legality(config):
    """(fields, Error or None): both sides of every rule that the loader judges."""
    b, z = config.basis, Sizes(config)
    series, point = b.coefficients == "series", {"mode": Mode.POINTWISE, "in_rows": 2, "in_cols": 3, "out_rows": 2,
                                                 "out_cols": 3}
    bad, dense = Error.ILLEGAL_FIELD, {"mode": Mode.DENSE}
    yield {"terms": 1}, None
    for mode in (Mode.DECOMPOSED, Mode.DENSE):
        one = {"mode": mode, "terms": 1}
        for kernel in range(1, 16):
            for dilation in (1, 2, 7):
                span, rows = (kernel - 1) * dilation + 1, ceil_div(kernel, b.multipliers)
                yield one | {"kernel_cols": kernel, "dilation_cols": dilation}, \
                    None if span <= b.window and rows <= b.tap_rows else bad
        for kernel, columns in ((8, 1), (8, b.multipliers), (8, b.multipliers + 1), (4, 1), (5, 1)):
            rows = kernel * ceil_div(columns, b.multipliers)
            yield one | {"kernel_rows": kernel, "kernel_cols": columns}, \
                None if rows <= b.tap_rows and columns <= b.window else bad
        for pad in range(16):
            yield one | {"pad_left": pad, "kernel_cols": 2, "dilation_cols": 2}, \
                None if pad <= 2 and b.window >= 3 and ceil_div(2, b.multipliers) <= b.tap_rows else bad
            yield one | {"pad_top": pad, "kernel_rows": 3, "dilation_rows": 2}, \
                None if pad <= 4 and b.tap_rows >= 3 else bad
    for taps in (b.tap_rows, b.tap_rows + 1, 255):
        fits = taps * z.tap_row_beats <= z.weight_beats
        yield dense | {"taps": taps}, bad if taps > b.tap_rows else None if fits else Error.SCRATCHPAD_RANGE
    for groups in (1, b.tap_rows, b.tap_rows + 1, 255):
        yield point | {"groups": groups}, None if groups <= b.tap_rows else bad
        yield dense | {"groups": groups}, None
    for name, value in (("kernel_rows", 2), ("kernel_cols", 2), ("stride_rows_log2", 1), ("stride_cols_log2", 1),
                        ("in_rows", 3), ("in_cols", 2), ("out_rows", 1), ("out_cols", 4), ("pad_top", 1),
                        ("pad_left", 1)):
        yield point | {name: value}, bad
    yield point | {"dilation_rows": 7, "dilation_cols": 7, "n_log2": [7] * 4, "terms": 0, "channel": 15}, None
    for groups in (1, z.coefficient_groups, z.coefficient_groups + 1, 255):
        for n_log2 in range(8) if series else (0, 7):
            n = 1 << n_log2
            words = map_words(groups, config) if not series else series_words(groups, [n], config) \
                if n <= b.group else None
            good = words is not None and words <= b.coefficient_rows and groups <= z.coefficient_groups
            one = {"terms": 1, "n_log2": [n_log2, 7, 7, 7], "groups": groups}
            yield one, None if good else bad
            if series and good:
                beats = words * z.series_tile_beats
                fits = beats <= z.weight_beats
                yield one | {"coefficients": beats}, None if fits else Error.SCRATCHPAD_RANGE
                for wrong in (beats - 1, beats + 1, 65535):
                    yield one | {"coefficients": wrong}, bad if wrong else None
    if series:
        for term in range(1, 4):
            logs = [0] * 4
            logs[term] = b.group.bit_length()
            yield {"terms": term + 1, "n_log2": logs}, bad
            yield {"terms": term, "n_log2": logs}, None if term <= b.coefficient_rows else bad
    used = z.tap_row_beats
    for weight in (z.weight_beats - used, z.weight_beats - used + 1, 65535):
        yield dense | {"taps": 1, "weight": weight}, None if weight + used <= z.weight_beats else Error.SCRATCHPAD_RANGE
    yield dense | {"weight": 65535}, None       # nothing is loaded
    if not series:
        for weight, beats in ((z.weight_beats - 3, 3), (z.weight_beats - 3, 4), (0, 65535)):
            yield {"weight": weight, "coefficients": beats}, \
                None if weight + beats <= z.weight_beats else Error.SCRATCHPAD_RANGE


@pytest.mark.parametrize("name", CONFIGS)
def test_legality(name, rng):
    """Each legal instruction is offered, each illegal one refused with its code; nothing comes after that."""
    config, counts = CONFIGS[name], {}
    unit = BasisLoader(config=config)

    async def bench(ctx):
        ctx.set(unit.loaded, 1)
        ctx.set(unit.load.ready, 1)
        for fields, want in legality(config):
            ctx.set(unit.i.payload.as_value(), word_of(fields))
            ctx.set(unit.i.valid, 1)
            ctx.set(unit.o.ready, 0)
            await ctx.tick()
            ctx.set(unit.i.payload.as_value(), word_of({}))
            cycles = 0
            while not ctx.get(unit.error.valid) and not ctx.get(unit.o.valid):
                await ctx.tick()
                cycles += 1
                assert cycles < 3000, f"{fields}: neither offered nor refused"
            got = ctx.get(unit.error.code) if ctx.get(unit.error.valid) else None
            assert got == want, f"{fields}: {got}, expected {want}"
            counts[want] = counts.get(want, 0) + 1
            if want is not None:
                assert cycles == 1, f"{fields}: refused after {cycles} cycles"
                for _ in range(4):
                    assert not ctx.get(unit.i.ready) and not ctx.get(unit.o.valid) and not ctx.get(unit.weight_en)
                    await ctx.tick()
            ctx.set(unit.i.valid, 0)
            ctx.set(unit.o.ready, 1)
            await ctx.tick()
            if want is not None:
                await reset(ctx)

    async def reset(ctx):
        ctx.set(reset_signal, 1)
        await ctx.tick()
        ctx.set(reset_signal, 0)

    reset_signal, top = Signal(), Module()
    top.submodules.unit = ResetInserter(reset_signal)(unit)
    simulate(top, bench)
    assert counts[None] > 20 and counts[Error.ILLEGAL_FIELD] > 20 and counts[Error.SCRATCHPAD_RANGE] >= 2, counts
