"""The streamer of the basis engine: every word of every pixel, errors of addresses, stalls, cycles."""

import numpy as np
import pytest

from hw.basis.block import direct_width
from hw.basis.streamer import BasisStreamer
from sim_tests.hw.basis_jobs import JOB, completed, kernel_rows, random_fields
from sim_tests.hw.test_basis_programs import CONFIGS
from sim_tests.hw.tb_basis_series import pattern_words
from sim_tests.lib.pysim import simulate
from spec.derive import Sizes, ceil_div
from spec.isa import Mode
from spec.registers import Error


def random_job(config, rng, mode):
    """A pass somewhere in the scratchpad, with gaps between pixels and rows."""
    b, z = config.basis, Sizes(config)
    while True:
        f = random_fields(config, rng, mode)
        f |= {"groups": int(rng.integers(1, 2 * b.stream_groups + 2)), "zero_point": int(rng.choice([-128, 127, 0, 5])),
              "coefficient_half": int(rng.integers(2)), "channel": int(rng.integers(b.group)),
              "terms": int(rng.integers(1, 4)), "n_log2": rng.integers(b.group.bit_length(), size=4).tolist()}
        series = b.coefficients == "series" and mode is Mode.DECOMPOSED
        words = len(pattern_words(config, f["groups"], [1 << n for n in f["n_log2"][:f["terms"]]])) if series \
            else ceil_div(f["groups"], b.stream_groups)
        if words > b.coefficient_rows:
            continue
        col_step = f["groups"] + int(rng.integers(3))
        row_step = f["in_cols"] * col_step + int(rng.integers(4))
        units = z.activation_blocks // z.group_blocks
        used = 1 if mode is Mode.DENSE else f["groups"]
        room = units - (f["in_rows"] - 1) * row_step - (f["streamed"] - 1) * col_step - used
        if room >= 0:
            base = room if rng.random() < 0.2 else int(rng.integers(room + 1))
            return f | {"base": base * z.group_blocks, "row_step": row_step * z.group_blocks,
                        "col_step": col_step * z.group_blocks}


def expected(config, f, pad):
    """[(port, value)] of a pass: fields of words, channels of direct ones; pad [units, group] is the scratchpad."""
    b, z, out = config.basis, Sizes(config), []
    width = direct_width(config)
    for y in range(f["in_rows"]):
        if not kernel_rows(f, y):
            continue
        for x in range(f["streamed"]):
            first = (f["base"] + y * f["row_step"] + x * f["col_step"]) // z.group_blocks
            groups = pad[first:first + (1 if f["mode"] == Mode.DENSE else f["groups"])] - f["zero_point"]
            if f["mode"] == Mode.DENSE:
                channels = groups[0, f["channel"]:].tolist()
                out.append(("direct", channels + [0] * (width - len(channels))))
            elif f["mode"] == Mode.POINTWISE:
                out += [("direct", group.tolist() + [0] * (width - b.group)) for group in groups]
            else:
                series = b.coefficients == "series"
                order = pattern_words(config, f["groups"], [1 << n for n in f["n_log2"][:f["terms"]]]) if series else \
                    [(None, g) for g in range(0, f["groups"], b.stream_groups)]
                for n, (n_log2, at) in enumerate(order):
                    out.append(("words", {"word": groups[at:at + b.stream_groups].tolist(), "row": n, "n_log2": n_log2,
                                          "half": f["coefficient_half"], "last": n == len(order) - 1}))
    return out


async def run(ctx, unit, config, jobs, pad, rng, *, idle=0.0, stall=0.0, cycles=20_000):
    """Offer the jobs; returns ({port: [(cycle, value)]}, cycles with reads, error). An offer must stay."""
    b, z = config.basis, Sizes(config)
    rows = pad.astype(np.int8).reshape(-1, z.banks, z.block)
    seen, reads, uses = {"i": [], "words": [], "direct": []}, [], []
    at, offering, held, quiet = 0, False, {}, 0
    for cycle in range(cycles):
        offering = at < len(jobs) and (offering or rng.random() >= idle)
        ctx.set(unit.i.valid, offering)
        ctx.set(unit.i.payload.as_value(), JOB.pack(**jobs[at]) if offering else int(rng.integers(1 << 62)))
        for port in (unit.words, unit.direct):
            ctx.set(port.ready, int(rng.random() >= stall))
        taken = offering and ctx.get(unit.i.ready)
        quiet += 1
        for name, port in (("words", unit.words), ("direct", unit.direct)):
            value = ctx.get(port.payload.as_value()) if ctx.get(port.valid) else None
            assert held.get(name) in (None, value), f"cycle {cycle}: stalled offer on {name} changed"
            held[name] = None if ctx.get(port.ready) else value
            if value is not None:
                quiet = 0
            if value is None or not ctx.get(port.ready):
                continue
            if name == "direct":
                seen[name].append((cycle, [ctx.get(port.payload[k]) for k in range(direct_width(config))]))
            else:
                p = port.payload
                word = [[ctx.get(p.word[g * b.group + c]) for c in range(b.group)] for g in range(b.stream_groups)]
                seen[name].append((cycle, {"word": word} | {k: ctx.get(getattr(p, k)) for k in (
                    "row", "n_log2", "half", "last")}))
        uses.append(ctx.get(unit.coefficient_use))
        busy, error = ctx.get(unit.busy), ctx.get(unit.error.valid)
        reading = ctx.get(unit.read_en)
        where = [ctx.get(unit.read_row[k]) for k in range(z.banks)] if reading else None
        if taken:
            seen["i"].append((cycle, None))
            at, offering, quiet = at + 1, False, 0
        await ctx.tick()
        if reading:
            reads.append(cycle)
            for k in range(z.banks):
                ctx.set(unit.read_data[k], int.from_bytes(rows[where[k] % len(rows), k].tobytes(), "little"))
        if quiet > 8 and (not busy or error) and at == len(jobs):
            break
    else:
        raise AssertionError("no end")
    code = ctx.get(unit.error.code) if ctx.get(unit.error.valid) else None
    return seen, reads, code, uses


def compare(config, jobs, pad, seen):
    """Every element of every word, in order per port."""
    want = [item for f in jobs for item in expected(config, f, pad)]
    for name in ("words", "direct"):
        ours = [value for port, value in want if port == name]
        got = [value for _, value in seen[name]]
        assert len(got) == len(ours), f"{name}: {len(got)}, expected {len(ours)}"
        for n, (a, w) in enumerate(zip(got, ours)):
            if name == "words":     # groups beyond the pixel's are anything; maps have no pattern
                a = a | {"word": a["word"][:len(w["word"])], "n_log2": a["n_log2"] if w["n_log2"] is not None else None}
            assert a == w, f"{name} {n}: {a}, expected {w}"


def scratchpad(config, rng):
    """Activations [units, group], ends among them."""
    z = Sizes(config)
    pad = rng.integers(-128, 128, (z.activation_blocks // z.group_blocks, z.columns))
    return np.where(rng.random(pad.shape) < 0.2, rng.choice([-128, 127], pad.shape), pad)


@pytest.mark.parametrize("idle, stall", [(0.0, 0.0), (0.5, 0.5), (0.0, 0.9)])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_word(name, idle, stall, rng):
    config, unit = CONFIGS[name], BasisStreamer(config=CONFIGS[name])
    pad = scratchpad(config, rng)
    jobs = [random_job(config, rng, Mode(n % 3)) for n in rng.permutation(6 if stall > 0.8 else 9)]

    async def bench(ctx):
        seen, _, code, uses = await run(ctx, unit, config, jobs, pad, rng, idle=idle, stall=stall)
        assert code is None
        compare(config, jobs, pad, seen)
        # a half is in use from a pass's entry to the transfer of its last word
        at, want = 0, [0] * len(uses)
        for (begin, _), f in zip(seen["i"], jobs):
            count = sum(port == "words" for port, _ in expected(config, f, pad))
            if f["mode"] == Mode.DECOMPOSED and count:
                for cycle in range(begin + 1, seen["words"][at + count - 1][0] + 1):
                    want[cycle] |= 1 << f["coefficient_half"]
            at += count
        for cycle, (u, w) in enumerate(zip(uses, want)):
            assert u & w == w, f"cycle {cycle}: a half that is in use is not said to be"
        assert uses[-1] == 0

    simulate(unit, bench)


@pytest.mark.parametrize("name", ["tiny_basis", "tiny_maps", "wide"])
def test_rate_and_latency(name, rng):
    """A word per cycle; a row that is not needed takes one; the first word `latency` cycles after its read."""
    config, unit = CONFIGS[name], BasisStreamer(config=CONFIGS[name])
    pad = scratchpad(config, rng)
    jobs = [random_job(config, rng, Mode.DECOMPOSED) for _ in range(12)]

    async def bench(ctx):
        seen, reads, code, _ = await run(ctx, unit, config, jobs, pad, rng)
        assert code is None
        assert [c for c, _ in seen["words"]] == [c + BasisStreamer.latency for c in reads]
        begins = [c for c, _ in seen["i"]]
        for n, f in enumerate(jobs):
            words = len(expected(config, f, pad))
            skipped = sum(not kernel_rows(f, y) for y in range(f["in_rows"]))
            end = begins[n + 1] if n + 1 < len(jobs) else None
            # a pass enters in the last cycle of the one before
            assert end is None or end - begins[n] == words + skipped, f"pass {n}"

    simulate(unit, bench)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("name", ["tiny_basis", "halves", "wide"])
def test_addresses(name, mode, rng):
    """The last unit is legal, the one behind it is STREAM_ADDRESS, as is one that is not at a unit; then it stops."""
    config, z = CONFIGS[name], Sizes(CONFIGS[name])
    pad = scratchpad(config, rng)
    step = z.group_blocks
    groups = 1 if mode is Mode.DENSE else 2
    plain = {"mode": int(mode), "groups": groups, "in_rows": 2, "in_cols": 2, "out_rows": 2, "out_cols": 2, "terms": 1,
             "zero_point": 3}
    last = z.activation_blocks - groups * step          # of a pixel
    cases = {
        "last": ({"base": last - 5 * step, "row_step": 3 * step, "col_step": 2 * step}, None),
        "pixel beyond": ({"base": last - 4 * step, "row_step": 3 * step, "col_step": 2 * step}, 3),
        "row beyond": ({"base": last - step, "row_step": 2 * step, "col_step": step}, 2),
        "first beyond": ({"base": last + step}, 0),
        "far": ({"base": 65536 - step, "row_step": 65536 - step, "col_step": 65536 - step}, 0),
        "row that nobody needs beyond": ({"base": last, "in_rows": 9, "row_step": step, "out_rows": 1,
                                          "out_cols": 1, "in_cols": 1}, None)}
    if mode is Mode.POINTWISE:
        del cases["row that nobody needs beyond"]
    if step > 1:
        cases |= {"base": ({"base": 1}, 0), "col_step": ({"col_step": 1}, 1), "row_step": ({"row_step": 3}, 2)}
    for label, (fields, pixels) in cases.items():
        f, unit = completed(config, plain | fields), BasisStreamer(config=config)

        async def bench(ctx, f=f, unit=unit, label=label, pixels=pixels):
            seen, _, code, _ = await run(ctx, unit, config, [f], pad, rng)
            assert code == (None if pixels is None else Error.STREAM_ADDRESS), label
            whole = expected(config, f, pad) if pixels is None else None
            if whole is not None:
                compare(config, [f], pad, seen)
            else:
                each = len(expected(config, completed(config, f | {
                    "base": 0, "row_step": 0, "col_step": 0, "in_rows": 1, "in_cols": 1, "out_rows": 1,
                    "out_cols": 1}), pad))
                given = len(seen["words"]) + len(seen["direct"])
                assert given == pixels * each, f"{label}: {given} words"
                ctx.set(unit.i.valid, 1)
                for _ in range(6):
                    assert not ctx.get(unit.i.ready), f"{label}: goes on"
                    await ctx.tick()

        simulate(unit, bench)
