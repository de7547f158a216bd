"""The multipliers of the basis engine: every update of the accumulators in order, tokens, taps, and every cycle."""

import os

import cocotb
import numpy as np

from hw.basis.block import direct_width
from hw.basis.multiply import BasisMultiply
from sim_tests.hw.basis_jobs import JOB, completed, kernel_rows, micro_steps, random_pass, updates
from sim_tests.lib.simulate import config_of_run
from sim_tests.lib.streams import Source, exchange, start
from spec.config import IntSpec
from spec.derive import Sizes
from spec.formats import BIT, Field, Record, unsigned
from spec.isa import Mode

WATCHED = ("update", "issue", "take_store", "push_load", "push_store", "wait_store", "working", "done", "done_half",
           "saturated", "busy")


class Bench:
    """The device, its formats and the passes it was given."""

    def __init__(self, dut):
        self.dut, self.config = dut, config_of_run()
        self.rng = np.random.default_rng(cocotb.RANDOM_SEED)
        if "SUMMAND_FAULT" in os.environ:       # the planted design
            dut.fault.value = int(os.environ["SUMMAND_FAULT"])
        b, z = self.config.basis, Sizes(self.config)
        self.b, self.z = b, z
        self.update = Record("update", (
            Field("fetch", BIT, None, ""), Field("bank", BIT, None, ""),
            Field("address", unsigned((z.accumulator_depth - 1).bit_length()), None, ""), Field("init", BIT, None, ""),
            Field("operation", unsigned(2), None, ""), Field("sums", z.accumulator_input, z.columns, "")))
        self.intermediate = Record("ir", (
            Field("ir", z.intermediate, z.basis_slices, ""),
            Field("saturated", unsigned(z.basis_slices.bit_length()), None, "")))
        self.direct = Record("direct", (Field("value", IntSpec(z.operand.bits), direct_width(self.config), ""),))

    def tap_beats(self, one, half):
        """(row, beat, data) of all taps of a pass."""
        beats, size, out = self.z.tap_row_beats, self.z.beat_bytes, []
        for n, row in enumerate(one.taps.astype(np.int8)):
            data = row.tobytes().ljust(beats * size, b"\0")
            out += [(half * self.b.tap_rows + n, k, int.from_bytes(data[k * size:(k + 1) * size], "little"))
                    for k in range(beats)]
        return out

    def words(self, one):
        """(intermediates, direct words, saturations) of a pass."""
        values = one.values.reshape(-1, one.values.shape[-1]).tolist()
        if one.fields["mode"] != Mode.DECOMPOSED:
            return [], [self.direct.pack(value=v) for v in values], 0
        counts = self.rng.integers(self.z.basis_slices + 1, size=len(values)).tolist()
        return [self.intermediate.pack(ir=v, saturated=c) for v, c in zip(values, counts)], [], sum(counts)

    async def run(self, passes, *, idle=0.0, tokens=None, keep=0.0):
        """Passes one after another, taps loaded while the one before is at work; returns {signal: cycles}.

        Compares every update, tokens, saturations and what each cycle is for. ``tokens``: chance per cycle of a token
        of the store unit. ``keep``: chance that a pass finds its taps where the one before had them.
        """
        dut, rng = self.dut, self.rng
        job = Source(dut, "i", idle=idle)
        values, direct = Source(dut, "intermediate", idle=idle), Source(dut, "direct", idle=idle)
        state = {"next": 0, "half": 1, "taps": [], "users": [0, 0], "credit": 0, "saturated": 0}
        await start(dut, (job, values, direct), available_store=int(tokens is None), tap_en=0, stop=0)

        def drive(cycle):
            if tokens is not None:
                state["credit"] += rng.random() < tokens
                dut.available_store.value = int(state["credit"] > 0)
            dut.tap_en.value = int(bool(state["taps"]))
            row, beat, data = state["taps"].pop(0) if state["taps"] else (0, 0, int(rng.integers(1 << 30)))
            dut.tap_row.value, dut.tap_beat.value, dut.tap_data.value = row, beat, data
            if state["taps"]:
                return
            if "offer" in state:
                number, one = state.pop("offer")
                job.words.append(JOB.pack(**one.fields | {"tap_half": state["half"]}))
                ir, words, count = self.words(one)
                values.words.extend(ir)
                direct.words.extend(words)
                state["saturated"] += count
                state["users"][state["half"]] += 1
                state["halves"] = [*state.get("halves", []), state["half"]]
                state["next"] = number + 1
                return
            number = state["next"]
            if number == len(passes) or len(job.words) > 1:
                return
            one = passes[number]
            if number and one.taps is passes[number - 1].taps:
                state["offer"] = number, one
            elif not state["users"][1 - state["half"]]:
                state["half"] ^= 1
                state["offer"], state["taps"] = (number, one), self.tap_beats(one, state["half"])

        seen = {name: {} for name in ("i", *WATCHED)}
        halves = []
        async for cycle, port, value in exchange(
                dut, (job, values, direct), rng=rng, watch=WATCHED, on_cycle=drive, drain=12,
                until=lambda: state["next"] == len(passes) and not dut.busy.value):
            seen.setdefault(port, {})[cycle] = value
            if port == "take_store":
                assert tokens is None or state["credit"] > 0, "took a token that is not there"
                state["credit"] -= tokens is not None
            elif port == "done":
                halves.append(int(dut.done_half.value))
                state["users"][halves[-1]] -= 1
        assert halves == state["halves"], "tap halves in another order than the passes"
        self.check(passes, seen, state["saturated"])
        return seen

    def check(self, passes, seen, saturated):
        """Every update and every cycle."""
        want = [u for one in passes for u in updates(self.config, one)]
        words = {c: self.update.unpack(v) for c, v in seen["update"].items()}
        nothing = self.update.unpack(0)
        fetches = sorted(c for c, w in words.items() if w["fetch"])
        got = [{k: words[c][k] for k in ("bank", "address")} |
               {k: words.get(c + 1, nothing)[k] for k in ("init", "operation", "sums")} for c in fetches]
        for n, (a, w) in enumerate(zip(got, want)):
            assert a == w, f"update {n}: {a}, expected {w}"
        assert len(got) == len(want), f"{len(got)} updates, expected {len(want)}"
        for a, b in zip(fetches, fetches[1:]):
            same = all(words[a][k] == words[b][k] for k in ("bank", "address"))
            assert not (b == a + 1 and same), f"cycles {a}, {b}: two updates of one address"
        issue = sorted(seen["issue"])
        assert len(issue) == sum(micro_steps(one) for one in passes)
        # an update is fetched two cycles after its last micro-step, and given with that cycle's sum a cycle later
        each = [n for one in passes for n in [one.fields["groups"] if one.fields["mode"] == Mode.POINTWISE
                                              else one.fields["chunks"]] * len(updates(self.config, one))]
        ends = np.cumsum(each) - 1
        assert fetches == [issue[n] + BasisMultiply.latency - 2 for n in ends]
        assert len(seen["i"]) == len(seen["done"]) == len(passes)
        assert sum(seen["saturated"].values()) == saturated
        assert len(seen["take_store"]) == sum(one.fields["wait_store"] for one in passes)
        assert set(seen["take_store"]) <= set(seen["i"]), "a token is taken with its pass"
        for name in ("push_load", "push_store"):
            pushing = [c for c, one in zip(sorted(seen["done"]), passes) if one.fields[name]]
            # `done` comes with the last micro-step, if the last row has any
            assert sorted(seen[name]) == [c + BasisMultiply.latency for c in pushing], name
        taken, done = sorted(seen["i"]), sorted(seen["done"])
        for n, one in enumerate(passes):
            inside = [c for c in issue if taken[n] < c <= done[n]]
            assert len(inside) == micro_steps(one), f"pass {n}: {len(inside)} micro-steps"
            if inside and kernel_rows(one.fields, one.fields["in_rows"] - 1):
                assert inside[-1] == done[n], f"pass {n}: ends {done[n] - inside[-1]} cycles late"
        working = {c for a, b in zip(taken, done) for c in range(a + 1, b + 1)}
        assert set(seen["working"]) == working and set(issue) <= working
        assert not set(seen["wait_store"]) & working
        # a pass enters with the end of the one before: where that gives a token, the machine is busy until it is given
        busy = working | {c for d in done for c in range(d, d + BasisMultiply.latency + 1)}
        assert busy <= set(seen["busy"])


def some_passes(bench, count, *, modes=tuple(Mode), keep=0.2, **tokens):
    """Random passes; now and then one with the taps, hence the kernel, of the one before."""
    out = []
    for _ in range(count):
        rng = bench.rng
        kept = out[-1] if out and rng.random() < keep else None
        if kept is not None:
            fields = kept.fields | {"bank": int(rng.integers(2)), "accumulate": int(rng.integers(2))}
            one = random_pass(bench.config, rng, Mode(kept.fields["mode"]), fields=fields, taps=kept.taps)
        else:
            one = random_pass(bench.config, rng, modes[rng.integers(len(modes))])
        for name in ("push_load", "push_store"):
            one.fields[name] = int(rng.integers(2))
        one.fields["wait_store"] = int(rng.integers(2)) if tokens else 0
        out.append(one)
    return out


@cocotb.test(timeout_time=8, timeout_unit="ms")
@cocotb.parametrize(idle=[0.0, 0.5, 0.9])
async def every_update(dut, idle):
    bench = Bench(dut)
    await bench.run(some_passes(bench, 20 if idle > 0.8 else 40), idle=idle)


@cocotb.test(timeout_time=8, timeout_unit="ms")
@cocotb.parametrize(tokens=[0.02, 0.3])
async def tokens_gate_each_pass(dut, tokens):
    bench = Bench(dut)
    seen = await bench.run(some_passes(bench, 20, tokens=True), tokens=tokens)
    assert seen["wait_store"] or tokens > 0.1


@cocotb.test(timeout_time=8, timeout_unit="ms")
async def narrow_outputs(dut):
    """One output column: kernel rows of one output follow one another in neighbouring rows."""
    bench = Bench(dut)
    passes = []
    for kernel, stride, dilation in ((2, 1, 1), (3, 1, 1), (4, 2, 1), (2, 0, 1), (3, 2, 2), (2, 1, 3), (1, 0, 1)):
        for mode in (Mode.DECOMPOSED, Mode.DENSE):
            f = completed(bench.config, {
                "mode": int(mode), "in_rows": 7, "in_cols": 1, "out_rows": min(4, bench.z.accumulator_depth),
                "kernel_rows": kernel, "stride_rows_log2": stride, "dilation_rows": dilation})
            if kernel * f["chunks"] <= bench.b.tap_rows:
                passes.append(random_pass(bench.config, bench.rng, mode, fields=f))
    await bench.run(passes)


@cocotb.test(timeout_time=8, timeout_unit="ms")
async def full_rate(dut):
    """No cycle without a micro-step between the first and the last one of a pass, where docs and window promise it."""
    bench, compared = Bench(dut), 0
    config, rng, b = bench.config, bench.rng, bench.b
    for mode in Mode:
        for kernel, pad, stride, rows, cols in ((3, 1, 0, 4, 4), (3, 1, 0, 3, 5), (1, 0, 0, 3, 3), (2, 1, 0, 4, 4),
                                                (3, 1, 1, 2, 3), (1, 0, 0, 8, 2), (1, 0, 0, 2, 2),
                                                (3, 1, 0, 2, 2)):
            if rows * cols > bench.z.accumulator_depth:
                continue
            f = {"mode": int(mode), "out_rows": rows, "out_cols": cols}
            if mode is Mode.POINTWISE:
                f |= {"in_rows": rows, "in_cols": cols, "groups": min(3, b.tap_rows)}
            else:
                size = ((rows - 1) << stride) + kernel - 2 * pad, ((cols - 1) << stride) + kernel - 2 * pad
                f |= {"in_rows": size[0], "in_cols": size[1], "kernel_rows": kernel, "kernel_cols": kernel,
                      "pad_top": pad, "pad_left": pad, "stride_rows_log2": stride, "stride_cols_log2": stride}
            f = completed(config, f)
            if f["span"] > b.window or kernel * f["chunks"] > b.tap_rows:
                continue
            one = random_pass(config, rng, mode, fields=f)
            seen = await bench.run([one, random_pass(config, rng, mode, fields=f, taps=one.taps)])
            issue, both = sorted(seen["issue"])[:micro_steps(one)], sorted(seen["issue"])
            assert both[len(issue)] - issue[-1] == 1 + f["reach"], f"{mode.name} {f}: a late second pass"
            first = issue[0] - sorted(seen["i"])[0]
            # one cycle to judge the row, in which the first value may come; then one value per cycle
            assert first == 1 + f["reach"], f"{mode.name} {f}: first micro-step after {first} cycles"
            steps = [f["chunks"] * len(kernel_rows(f, y)) for y in range(f["in_rows"])]
            ahead = b.window - f["span"] + 1 >= f["reach"]
            fed = mode is Mode.POINTWISE or ahead and all(
                n >= 1 << stride and n * cols >= ((cols - 1) << stride) + f["reach"] for n in steps)
            if fed:
                assert issue[-1] - issue[0] + 1 == len(issue), f"{mode.name} {f}: bubbles"
                compared += 1
    assert compared > 2


@cocotb.test(timeout_time=8, timeout_unit="ms")
async def stop_holds_everything(dut):
    """``stop``: no micro-step, no value, no pass is taken any more."""
    bench = Bench(dut)
    one = random_pass(bench.config, bench.rng, Mode.POINTWISE)
    job = Source(dut, "i", [JOB.pack(**one.fields)] * 3)
    direct = Source(dut, "direct", bench.words(one)[1] * 3)
    await start(dut, (job, direct, Source(dut, "intermediate")), available_store=1, tap_en=0, stop=1)
    state = {"cycle": 0}

    def drive(cycle):
        state["cycle"] = cycle
        dut.stop.value = int(cycle < 20 or cycle > 24)

    seen = []
    async for cycle, port, _ in exchange(dut, (job, direct), rng=bench.rng, watch=("issue",), on_cycle=drive,
                                         until=lambda: state["cycle"] > 60, drain=0):
        seen.append((cycle, port))
    assert all(20 <= cycle <= 24 for cycle, _ in seen), seen
    assert {port for _, port in seen} == {"i", "direct", "issue"}
