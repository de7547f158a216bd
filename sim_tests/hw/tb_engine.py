"""Random EXECUTE sequences on the structured engine: sums against NumPy, every issue cycle against a timing model."""

from dataclasses import dataclass

import cocotb
import numpy as np
from cocotb.triggers import FallingEdge

from golden.tiles import pack_tile
from hw.structured.engine import StructuredEngine
from hw.structured.streamer import Streamer
from hw.structured.weight_loader import WeightLoader
from sim_tests.lib.simulate import config_of_run
from sim_tests.lib.streams import Source, exchange, start
from spec.derive import Sizes
from spec.formats import Record, step_entry
from spec.isa import INSTRUCTIONS, Opcode, Operation
from spec.registers import Error

_RECORD = INSTRUCTIONS[Opcode.EXECUTE]
PAYLOAD = Record("execute", _RECORD.fields[1:-1])
IDLE_INPUTS = dict(
    available_load=0, available_store=0, acc_en=0, acc_bank=0, acc_address=0, pad_mask=0, weight_write=0, step_write=0
)
EXECUTE = {f.name: 0 for f in PAYLOAD.fields} | {"rows": 1, "cols": 1, "steps": 1}


@dataclass
class Step:
    """One step: entry fields, tile (None: hold) and what is needed to compute with it."""

    offset: list
    enable: list
    n: int
    segments_log2: int
    values: np.ndarray
    indices: np.ndarray
    hold: bool

    def entry(self, config):
        return step_entry(config.structured.taps).pack(
            offset=self.offset,
            enable=self.enable,
            n_log2=self.n.bit_length() - 1,
            segments_log2=self.segments_log2,
            hold=int(self.hold),
        )


class Bench:
    """The device with NumPy copies of its memories."""

    def __init__(self, dut):
        self.dut, self.config = dut, config_of_run()
        self.s, self.sizes = self.config.structured, Sizes(self.config)
        self.rng = np.random.default_rng(cocotb.RANDOM_SEED)
        self.acc = np.zeros((2, self.s.accumulator_depth, self.s.columns), np.int64)
        self.tile = None  # what the array holds

    async def begin(self):
        await start(self.dut, [Source(self.dut, "i")], **IDLE_INPUTS)
        z = self.sizes
        self.pad = self.rng.integers(z.activation.lo, z.activation.hi + 1, (z.activation_blocks, self.s.block))
        self.pad[self.rng.random(z.activation_blocks) < 0.1] = z.activation.lo
        rows = self.pad.astype(np.int8).reshape(-1, z.banks * self.s.block)
        self.dut.pad_mask.value = (1 << z.banks) - 1
        for n, row in enumerate(rows):
            self.dut.pad_row.value, self.dut.pad_data.value = n, int.from_bytes(row.tobytes(), "little")
            await FallingEdge(self.dut.clk)
        self.dut.pad_mask.value = 0
        # accumulators keep what the test before left
        bits, self.dut.acc_en.value = z.accumulator.bits, 1
        for bank, address in np.ndindex(2, self.s.accumulator_depth):
            self.dut.acc_bank.value, self.dut.acc_address.value = bank, address
            await FallingEdge(self.dut.clk)
            words = [int(self.dut.acc_data.value) >> bits * c & (1 << bits) - 1 for c in range(self.s.columns)]
            self.acc[bank, address] = [w - (w >> bits - 1 << bits) for w in words]
        self.dut.acc_en.value = 0

    async def write_steps(self, at, steps):
        """Entries into the step table, wrapping never."""
        self.dut.step_write.value = 1
        for n, step in enumerate(steps):
            self.dut.step_at.value = at + n
            self.dut.step_word.value = step if isinstance(step, int) else step.entry(self.config)
            await FallingEdge(self.dut.clk)
        self.dut.step_write.value = 0

    async def write_tiles(self, at, steps):
        """The tiles of all steps that do not hold, from beat ``at`` on."""
        self.dut.weight_write.value = 1
        for step in steps:
            if step.hold:
                continue
            data = pack_tile(step.values, None if step.n == self.s.block else step.indices, self.config, step.n)
            for k in range(0, len(data), self.sizes.beat_bytes):
                self.dut.weight_at.value = at
                self.dut.weight_word.value = int.from_bytes(data[k : k + self.sizes.beat_bytes], "little")
                at += 1
                await FallingEdge(self.dut.clk)
        self.dut.weight_write.value = 0

    def random_step(self, alignment, spread, before):
        """A legal step for pixels at addresses = ``alignment`` (residue modulo the banks), up to ``spread`` beyond."""
        s, z, rng = self.s, self.sizes, self.rng
        hold = before is not None and rng.random() < 0.3
        n = before.n if hold else int(rng.choice([p.n for p in s.patterns]))
        blocks = z.fetch_blocks(n)
        most = min(blocks, s.taps).bit_length() - 1
        segments_log2 = before.segments_log2 if hold else int(rng.integers(most + 1))
        count, length = 1 << segments_log2, blocks >> segments_log2
        room = (z.activation_blocks - alignment - spread) // z.banks - 2
        lanes = rng.permutation(z.banks // length)[:count]
        offset = [int(length * lane + z.banks * rng.integers(room) + -alignment % length) for lane in lanes]
        offset += rng.integers(0, 1 << 16, s.taps - count).tolist()
        on = (rng.random(s.taps) < 0.8).astype(int)
        if hold:
            on |= np.array(before.enable)
        on = [int(e) for e in on]
        shape = s.slots, s.columns
        if hold:
            values, indices = before.values, before.indices
        else:
            values = rng.integers(z.weight.lo, z.weight.hi + 1, shape)
            if rng.random() < 0.2:
                values = np.full(shape, z.weight.lo)
            segment = np.arange(s.slots) // n // length
            for slot in range(s.slots):
                if slot // n >= blocks or not on[segment[slot]]:
                    values[slot] = 0
            dense = n == s.block
            indices = (
                np.broadcast_to((np.arange(s.slots) % s.block)[:, None], shape)
                if dense
                else rng.integers(0, s.block, shape)
            )
        return Step(offset, on, n, segments_log2, values, indices, hold)

    def random_execute(self, step_at, weight_at, *, pixels=None):
        """Fields and steps of one EXECUTE that fits the tables."""
        s, z, rng = self.s, self.sizes, self.rng
        count_steps = int(rng.integers(1, 6))
        rows, cols = pixels or rng.choice(
            [
                (1, 1),
                (1, 2),
                (2, 1),
                (1, 3),
                (2, 2),
                (3, 2),
                (3, 4),
                (1, s.accumulator_depth),
                (s.accumulator_depth, 1),
                (2, 5),
            ]
        )
        row_step, col_step = (
            int(rng.integers(1 + min(4, z.activation_blocks // 4 // z.banks // (int(count) + 1)))) * z.banks
            for count in (rows, cols)
        )
        if rng.random() < 0.3:
            row_step = col_step = 0
        base = int(rng.integers(z.banks * 3))
        spread = (int(rows) - 1) * row_step + (int(cols) - 1) * col_step
        before, steps, beats = self.tile, [], 0
        for _ in range(count_steps):
            step = self.random_step(base, spread, before)
            size = 0 if step.hold else z.tile_beats(step.n)
            if weight_at + beats + size > z.weight_beats or step_at + len(steps) >= self.config.memory.step_entries:
                break
            beats += size
            steps.append(step)
            before = step
        fields = EXECUTE | {
            "base": base,
            "rows": int(rows),
            "cols": int(cols),
            "row_step": row_step,
            "col_step": col_step,
            "weight": weight_at,
            "step": step_at,
            "steps": len(steps),
            "bank": int(rng.integers(2)),
            "accumulate": int(rng.integers(2)),
            "operation": int(rng.choice([Operation.ADD, Operation.ADD, Operation.MAX])),
            "push_load": int(rng.integers(2)),
            "push_store": int(rng.integers(2)),
        }
        if steps:
            self.tile = steps[-1]
        return fields, steps, beats

    def apply(self, fields, steps):
        """The same in NumPy: scratchpad to accumulators. Sums stay far inside the format here."""
        for number, step in enumerate(steps):
            length = self.sizes.fetch_blocks(step.n) >> step.segments_log2
            for row in range(fields["rows"]):
                for col in range(fields["cols"]):
                    address = fields["base"] + row * fields["row_step"] + col * fields["col_step"]
                    sums = np.zeros(self.s.columns, np.int64)
                    for slot in range(self.s.slots):
                        segment, place = divmod(slot // step.n, length)
                        if segment < 1 << step.segments_log2 and step.enable[segment]:
                            block = self.pad[address + step.offset[segment] + place]
                            sums += step.values[slot] * block[step.indices[slot]]
                    pixel = row * fields["cols"] + col
                    old = self.acc[fields["bank"], pixel]
                    if number == 0 and not fields["accumulate"]:
                        new = sums
                    elif fields["operation"] == Operation.MAX:
                        new = np.maximum(old, sums)
                    else:
                        new = old + sums
                    self.acc[fields["bank"], pixel] = new

    async def check_accumulators(self, label):
        mask, bits = (1 << self.sizes.accumulator.bits) - 1, self.sizes.accumulator.bits
        self.dut.acc_en.value = 1
        for bank in range(2):
            for address in range(self.s.accumulator_depth):
                self.dut.acc_bank.value, self.dut.acc_address.value = bank, address
                await FallingEdge(self.dut.clk)
                word = int(self.dut.acc_data.value)
                want = sum((int(v) & mask) << bits * c for c, v in enumerate(self.acc[bank, address]))
                assert word == want, f"{label}: bank {bank}, pixel {address}: {word:x}, expected {want:x}"
        self.dut.acc_en.value = 0


def issue_cycles(executes, first):
    """When each pixel is issued if EXECUTEs always wait at ``i``; ``first`` is the cycle of the first pixel.

    A step's weights are ready `WeightLoader.overhead` + tile beats cycles after the step before was taken; a step
    that holds needs no tile; a single pixel takes two cycles.
    """
    accepted, swapped, out, busy_until = first - 1, -100, [], first - 1
    begun = False
    for fields, steps, tile_beats in executes:
        for number, step in enumerate(steps):
            if begun:
                entry = accepted + (2 if number else 3)  # a new EXECUTE passes the loader's idle state
                if step.hold:
                    ready = entry + 1
                else:
                    # the shadow is free 4 cycles after the step that swapped was taken
                    ready = max(entry + 1, swapped + 4) + tile_beats[number] + 1
                accepted = max(ready, busy_until)
            begun = True
            if not step.hold:
                swapped = accepted
            pixels = fields["rows"] * fields["cols"]
            out += [accepted + 1 + k for k in range(pixels)]
            busy_until = accepted + max(pixels, 2)
    return out


async def run(bench, executes, *, idle=0.0, tokens=0.0):
    """Feed EXECUTEs; returns lists of cycles per watched signal."""
    source = Source(bench.dut, "i", [PAYLOAD.pack(**f) for f, *_ in executes], idle=idle)
    seen = {
        name: []
        for name in (
            "i",
            "issue",
            "push_load",
            "push_store",
            "take_load",
            "take_store",
            "wait_load",
            "wait_store",
            "wait_weights",
            "busy",
            "error",
        )
    }
    waiting = {"load": 0, "store": 0}

    def give(cycle):
        for unit in waiting:
            waiting[unit] += bench.rng.random() < tokens
            getattr(bench.dut, f"available_{unit}").value = int(waiting[unit] > 0)

    async for cycle, port, _ in exchange(
        bench.dut,
        [source],
        rng=bench.rng,
        drain=12,
        watch=list(seen)[1:],
        until=lambda: not bench.dut.busy.value,
        on_cycle=give if tokens else None,
    ):
        seen[port].append(cycle)
        if port in ("take_load", "take_store"):
            unit = port.removeprefix("take_")
            assert waiting[unit], "took a token that is not there"
            waiting[unit] -= 1
    return seen


async def random_sequence(bench, *, pixels=None):
    executes, step_at, weight_at = [], 0, 0
    for _ in range(int(bench.rng.integers(2, 7))):
        fields, steps, beats = bench.random_execute(step_at, weight_at, pixels=pixels)
        if not steps:
            break
        await bench.write_steps(step_at, steps)
        await bench.write_tiles(weight_at, steps)
        sizes = [0 if s.hold else bench.sizes.tile_beats(s.n) for s in steps]
        executes.append((fields, steps, sizes))
        step_at, weight_at = step_at + len(steps), weight_at + beats
    return executes


def expected_pushes(executes, issue):
    """Cycles of push_load and push_store: `StructuredEngine.latency` - 1 after the last pixel's issue."""
    at, out = 0, {"push_load": [], "push_store": []}
    for fields, steps, _ in executes:
        at += fields["rows"] * fields["cols"] * len(steps)
        for name in out:
            if fields[name]:
                out[name].append(issue[at - 1] + StructuredEngine.latency - 1)
    return out


@cocotb.test(timeout_time=20, timeout_unit="ms")
@cocotb.parametrize(single=[False, True])
async def sums_and_every_cycle(dut, single):
    """Results, and with all EXECUTEs waiting every issue cycle, exactly as `issue_cycles` says."""
    bench = Bench(dut)
    await bench.begin()
    for number in range(30 if single else 60):
        executes = await random_sequence(bench, pixels=(1, 1) if single else None)
        for fields, steps, _ in executes:
            bench.apply(fields, steps)
        seen = await run(bench, executes)
        label = f"sequence {number}"
        want = issue_cycles(executes, seen["issue"][0])
        assert seen["issue"] == want, f"{label}: {seen['issue']} not {want}"
        first = 3 + (executes[0][2][0] + 1 if not executes[0][1][0].hold else 0)
        assert seen["issue"][0] - seen["i"][0] == first + 1, label
        for name, cycles in expected_pushes(executes, want).items():
            assert seen[name] == cycles, f"{label}: {name}"
        busy = seen["busy"]
        assert busy == list(range(busy[0], busy[-1] + 1)) and busy[0] == seen["i"][0], f"{label}: busy has gaps"
        assert busy[-1] == seen["issue"][-1] + StructuredEngine.latency - 1, label
        causes = sorted(seen["issue"] + seen["wait_weights"])
        assert causes == list(range(seen["i"][0] + 1, seen["issue"][-1] + 1)), f"{label}: {causes}"
        await bench.check_accumulators(label)


@cocotb.test(timeout_time=20, timeout_unit="ms")
@cocotb.parametrize(idle=[0.0, 0.8], tokens=[0.03, 0.3])
async def tokens_gate_each_execute(dut, idle, tokens):
    bench = Bench(dut)
    await bench.begin()
    for number in range(20):
        executes = await random_sequence(bench)
        for fields, steps, _ in executes:
            fields["wait_load"], fields["wait_store"] = (int(v) for v in bench.rng.integers(2, size=2))
            bench.apply(fields, steps)
        seen = await run(bench, executes, idle=idle, tokens=tokens)
        for unit in ("load", "store"):
            assert len(seen[f"take_{unit}"]) == sum(f[f"wait_{unit}"] for f, *_ in executes)
            assert set(seen[f"take_{unit}"]) <= set(seen["i"]), "a token is taken with its instruction"
            assert len(seen[f"push_{unit}"]) == sum(f[f"push_{unit}"] for f, *_ in executes)
        assert len(seen["issue"]) == sum(f["rows"] * f["cols"] * f["steps"] for f, *_ in executes)
        states = [c for name in ("issue", "wait_weights", "wait_load", "wait_store") for c in seen[name]]
        assert len(states) == len(set(states)), "a cycle with two causes"
        await bench.check_accumulators(f"sequence {number}")


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def full_rate_and_latency(dut):
    """Steps of tile beats + overhead pixels follow without a lost cycle, one pixel less loses one; data latency."""
    bench = Bench(dut)
    await bench.begin()
    n = bench.s.patterns[0].n
    need = bench.sizes.tile_beats(n) + WeightLoader.overhead
    for pixels, lost in ((need, 0), (need - 1, 1), (need - 2, 2)):
        if pixels > bench.s.accumulator_depth or 3 * bench.sizes.tile_beats(n) > bench.sizes.weight_beats:
            continue
        step = Step(
            [0] * bench.s.taps,
            [0] * bench.s.taps,
            n,
            0,
            np.zeros((bench.s.slots, bench.s.columns), np.int64),
            np.zeros((bench.s.slots, bench.s.columns), np.int64),
            False,
        )
        await bench.write_steps(0, [step] * 3)
        await bench.write_tiles(0, [step] * 3)
        one = EXECUTE | {"cols": pixels, "steps": 3}
        seen = await run(bench, [(one, [step] * 3, None), (one, [step] * 3, None)])
        assert len(seen["issue"]) == 6 * pixels
        assert seen["issue"][-1] - seen["issue"][0] == 6 * pixels - 1 + 5 * lost, f"{pixels} pixels"
        assert len([c for c in seen["wait_weights"] if c > seen["issue"][0]]) == 5 * lost
    # latency: hold the store port on the accumulator while it changes
    step = bench.random_step(0, 0, None)
    step.enable = [1] * bench.s.taps
    step.values = np.ones((bench.s.slots, bench.s.columns), np.int64)
    step.values[step.n * bench.sizes.fetch_blocks(step.n) :] = 0
    await bench.write_steps(0, [step])
    await bench.write_tiles(0, [step])
    dut.acc_en.value, dut.acc_bank.value, dut.acc_address.value = 1, 1, 0
    fields = EXECUTE | {"bank": 1}
    await FallingEdge(dut.clk)
    before, shown = int(dut.acc_data.value), []

    def look(cycle):
        if int(dut.acc_data.value) != before:
            shown.append(cycle)

    source, issued = Source(dut, "i", [PAYLOAD.pack(**fields)]), []
    async for cycle, port, _ in exchange(
        dut, [source], rng=bench.rng, drain=12, watch=["issue"], on_cycle=look, until=lambda: not dut.busy.value
    ):
        issued += [cycle] if port == "issue" else []
    bench.apply(fields, [step])
    assert bench.acc[1, 0].any() and shown[0] - issued[0] == StructuredEngine.latency
    assert Streamer.latency == 2


def errors(bench):
    """Cases that must stop the engine: name -> (code, fields, entry or Step)."""
    s, z = bench.s, bench.sizes
    taps, dense = s.taps, s.block.bit_length() - 1

    def entry(**fields):
        return step_entry(taps).pack(
            **{"offset": [0] * taps, "enable": [1] + [0] * (taps - 1), "n_log2": dense, "segments_log2": 0, "hold": 0}
            | fields
        )

    last = z.activation_blocks
    small = s.patterns[0].n.bit_length() - 1
    length = z.fetch_blocks(s.patterns[0].n)
    dense_length = z.fetch_blocks(s.block)
    cases = {
        "beyond the scratchpad": (Error.STREAM_ADDRESS, {"base": last}, entry()),
        "last pixel beyond": (
            Error.STREAM_ADDRESS,
            {"base": last - dense_length, "cols": 2, "col_step": dense_length},
            entry(),
        ),
        "last row beyond": (Error.STREAM_ADDRESS, {"base": 0, "rows": 2, "row_step": last}, entry()),
        "far": (Error.STREAM_ADDRESS, {"base": 65535, "rows": 2, "row_step": 65535}, entry(offset=[65535] * taps)),
        "weights beyond the buffer": (
            Error.SCRATCHPAD_RANGE,
            {"weight": z.weight_beats - z.tile_beats(s.block) + 1},
            entry(),
        ),
        "weights far beyond": (Error.SCRATCHPAD_RANGE, {"weight": 65535}, entry()),
    }
    if length > 1:
        cases["misaligned"] = (Error.STREAM_ADDRESS, {"base": length - 1}, entry(n_log2=small))
        cases["misaligned second pixel"] = (Error.STREAM_ADDRESS, {"cols": 2, "col_step": 1}, entry(n_log2=small))
    if taps > 1 and length > 1:
        both = [1, 1] + [0] * (taps - 2)
        cases["same bank"] = (
            Error.STREAM_ADDRESS,
            {},
            entry(n_log2=small, segments_log2=1, enable=both, offset=[0, z.banks] + [0] * (taps - 2)),
        )
        cases["second segment beyond"] = (
            Error.STREAM_ADDRESS,
            {},
            entry(n_log2=small, segments_log2=1, enable=both, offset=[0, last + length // 2] + [0] * (taps - 2)),
        )
    for n_log2 in range(8):
        known = n_log2 in [p.n.bit_length() - 1 for p in s.patterns]
        most = min(z.fetch_blocks(1 << n_log2), taps).bit_length() - 1 if known else -1
        for segments_log2 in range(4):
            if segments_log2 > most:
                cases[f"n_log2 {n_log2}, segments_log2 {segments_log2}"] = (
                    Error.ILLEGAL_FIELD,
                    {},
                    entry(n_log2=n_log2, segments_log2=segments_log2, hold=n_log2 & 1),
                )
    return cases


@cocotb.test(timeout_time=20, timeout_unit="ms")
async def illegal_steps(dut):
    """Each is reported with its code, the engine stops, and no further EXECUTE is accepted."""
    bench = Bench(dut)
    bench.rng = np.random.default_rng(1)
    for name, (code, fields, entry) in errors(bench).items():
        await start(dut, [Source(dut, "i")], **IDLE_INPUTS)
        await bench.write_steps(3, [entry])
        source = Source(dut, "i", [PAYLOAD.pack(**EXECUTE | {"step": 3, "push_store": 1} | fields)])
        raised = None
        async for _, port, word in exchange(dut, [source], rng=bench.rng, drain=80, watch=["error"]):
            if port == "error":
                raised = raised or word
                assert word == raised, f"{name}: the first error stays"
        assert raised is not None, f"{name}: not seen"
        assert raised == 1 | code << 1, f"{name}: {raised:#x}, expected {code.name}"
        if code is not Error.STREAM_ADDRESS:  # (a wrong address does not stop its own step)
            dut.i__valid.value = 1
            for _ in range(20):
                await FallingEdge(dut.clk)
                assert not dut.i__ready.value, f"{name}: goes on"


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def legal_at_the_edges(dut):
    """The last block, the last weight beat and the last entry are still inside."""
    bench = Bench(dut)
    await bench.begin()
    s, z = bench.s, bench.sizes
    step = bench.random_step(0, 0, None)
    length = z.fetch_blocks(s.block)
    step = Step(
        [0] * s.taps,
        [1] + [0] * (s.taps - 1),
        s.block,
        0,
        bench.rng.integers(1, 9, (s.slots, s.columns)),
        np.broadcast_to((np.arange(s.slots) % s.block)[:, None], (s.slots, s.columns)),
        False,
    )
    at, weight = bench.config.memory.step_entries - 1, z.weight_beats - z.tile_beats(s.block)
    await bench.write_steps(at, [step])
    await bench.write_tiles(weight, [step])
    fields = EXECUTE | {
        "base": z.activation_blocks - 3 * length,
        "cols": 3,
        "col_step": length,
        "step": at,
        "weight": weight,
    }
    bench.apply(fields, [step])
    await run(bench, [(fields, [step], None)])
    assert int(dut.error.value) == 0
    await bench.check_accumulators("edges")


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def overflow_is_reported(dut):
    """More and more of the largest product: an error exactly when the sum leaves the format."""
    bench = Bench(dut)
    s, z = bench.s, bench.sizes
    if z.accumulator.bits > 20:
        return
    await bench.begin()
    bench.pad[:] = z.activation.lo
    dut.pad_mask.value = (1 << z.banks) - 1
    dut.pad_row.value = 0
    dut.pad_data.value = int.from_bytes(bench.pad[: z.banks].astype(np.int8).tobytes(), "little")
    await FallingEdge(dut.clk)
    dut.pad_mask.value = 0
    step = Step(
        [0] * s.taps,
        [1] + [0] * (s.taps - 1),
        s.block,
        0,
        np.full((s.slots, s.columns), z.weight.lo),
        np.broadcast_to((np.arange(s.slots) % s.block)[:, None], (s.slots, s.columns)),
        False,
    )
    hold = Step(step.offset, step.enable, s.block, 0, step.values, step.indices, True)
    per_step = s.slots * z.activation.lo * z.weight.lo
    fits = z.accumulator.hi // per_step
    assert fits + 1 <= bench.config.memory.step_entries
    await bench.write_steps(0, [step] + [hold] * fits)
    await bench.write_tiles(0, [step])
    for steps in (fits, fits + 1):
        seen = await run(bench, [(EXECUTE | {"steps": steps}, None, None)])
        assert bool(seen["error"]) == (steps > fits)
    assert int(dut.error.value) == 1 | Error.ACCUMULATOR_OVERFLOW << 1
