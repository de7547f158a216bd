"""The load unit against a plain model: which words go where, in which order of tokens, at which rate."""

import itertools

import cocotb
import numpy as np

from sim_tests.lib.simulate import config_of_run
from sim_tests.lib.streams import Sink, Source, exchange, start
from spec.derive import Sizes
from spec.isa import INSTRUCTIONS, LinearTarget, Opcode, TileTarget, encode
from spec.registers import Error

MEMORY_BYTES = 1 << 15
WRITES = ("tile_en", "weight_en", "step_en", "parameter_en", "residual_en")
WATCH = (*WRITES, "push_execute", "push_store", "take_execute", "take_store", "writing", "busy", "error")
INPUTS = dict(available_execute=0, available_store=0, data__valid=0, data__payload=0)


class Model:
    """The scratchpads as byte arrays; ``run`` applies an instruction."""

    def __init__(self, config, memory):
        self.config, self.memory, z = config, memory, Sizes(config)
        self.sizes = z
        self.activation = np.zeros((z.activation_blocks, config.structured.block), np.uint8)
        self.weight = np.zeros((z.weight_beats, z.beat_bytes), np.uint8)
        self.step = np.zeros((config.memory.step_entries, 16), np.uint8)
        self.parameter = np.zeros((z.parameter_words, z.beat_bytes), np.uint8)
        self.residual = np.zeros((z.residual_units, z.unit_bytes), np.uint8)

    def run(self, op, f):
        z, f = self.sizes, {field.name: 0 for field in INSTRUCTIONS[op].fields} | f
        if op is Opcode.LOAD_TILE:
            for p, r, c in itertools.product(range(f["planes"]), range(f["rows"]), range(f["cols"])):
                at = f["address"] + (p * f["plane_stride"] + r * f["row_stride"] + c) * z.unit_bytes
                to = f["base"] + p * f["plane_step"] + r * f["row_step"] + c * f["col_step"]
                unit = self.memory[at : at + z.unit_bytes]
                if f["target"] == TileTarget.RESIDUAL:
                    self.residual[to] = unit
                else:
                    self.activation[to : to + z.group_blocks] = unit.reshape(z.group_blocks, -1)
        elif op is Opcode.LOAD_LINEAR:
            data = self.memory[f["address"] : f["address"] + f["beats"] * z.beat_bytes]
            if f["target"] == LinearTarget.STEP:
                data = data.reshape(-1, z.step_beats * z.beat_bytes)[:, :16]
                self.step[f["base"] : f["base"] + len(data)] = data
            else:
                table = self.weight if f["target"] == LinearTarget.WEIGHT else self.parameter
                table[f["base"] : f["base"] + f["beats"]] = data.reshape(-1, z.beat_bytes)
        else:
            for r in range(f["rows"]):
                at = f["base"] + r * f["row_step"]
                self.activation[at : at + f["blocks"]] = f["value"] & 0xFF


class Copy:
    """The scratchpads as the device writes them."""

    def __init__(self, dut, model):
        self.dut, self.model = dut, model
        self.memories = {
            name: np.zeros_like(getattr(model, name))
            for name in ("activation", "weight", "step", "parameter", "residual")
        }

    def sample(self, port):
        dut, z = self.dut, self.model.sizes
        if port == "tile_en":
            row, mask, word = int(dut.tile_row.value), int(dut.tile_mask.value), int(dut.tile_data.value)
            block = self.model.config.structured.block
            assert mask, "a write that writes nothing"
            for b in range(z.banks):
                if mask >> b & 1:
                    self.memories["activation"][row * z.banks + b] = list(
                        (word >> 8 * block * b & (1 << 8 * block) - 1).to_bytes(block, "little")
                    )
            return
        name = port.removesuffix("_en")
        data = {"step": "step_data", "residual": "residual_data"}.get(name, "linear_data")
        target = self.memories[name]
        word = int(getattr(dut, data).value).to_bytes(target.shape[1], "little")
        target[int(getattr(dut, f"{name}_address").value)] = list(word)


class Memory:
    """Takes requests and feeds their beats, in order, into the data source."""

    def __init__(self, dut, model, *, idle, stall):
        self.model, self.requests = model, []
        self.source, self.sink = Source(dut, "data", idle=idle), Sink(dut, "request", stall=stall)

    def request(self, word):
        z = self.model.sizes
        offset, beats = word & (1 << 40) - 1, word >> 40
        assert offset % z.beat_bytes == 0 and beats > 0
        assert offset + beats * z.beat_bytes <= len(self.model.memory), (
            f"request {offset:#x}, {beats} beats, leaves memory"
        )
        self.requests.append((offset, beats))
        for n in range(beats):
            at = offset + n * z.beat_bytes
            self.source.words.append(int.from_bytes(self.model.memory[at : at + z.beat_bytes].tobytes(), "little"))


def random_tile(config, rng, target=None):
    """A LOAD_TILE of any loop shape inside memory and scratchpad; no place is written twice."""
    z = Sizes(config)
    target = int(rng.integers(2)) if target is None else target
    space, unit = (z.residual_units, 1) if target == TileTarget.RESIDUAL else (z.activation_blocks, z.group_blocks)
    while True:
        planes, rows, cols = (int(v) for v in rng.choice([1, 1, 2, 3, 5, 8], 3))
        row_stride = cols if rng.random() < 0.5 else cols + int(rng.integers(0, 7))
        plane_stride = rows * row_stride + int(rng.integers(0, 9)) if rng.random() < 0.8 else int(rng.integers(0, 40))
        col_step = unit * int(rng.integers(1, 3))
        row_step = col_step * cols + unit * int(rng.integers(3))
        plane_step = row_step * rows + unit * int(rng.integers(3))
        if rng.random() < 0.3:  # channel groups of a pixel side by side
            plane_step, col_step = unit, planes * unit
            row_step = col_step * cols
        span = (planes - 1) * plane_step + (rows - 1) * row_step + (cols - 1) * col_step + unit
        reach = ((planes - 1) * plane_stride + (rows - 1) * row_stride + cols) * z.unit_bytes
        if span <= space and reach <= MEMORY_BYTES:
            break
    last = (space - span) // unit
    base = unit * (last if rng.random() < 0.2 else int(rng.integers(last + 1)))
    address = int(rng.integers((MEMORY_BYTES - reach) // z.unit_bytes + 1)) * z.unit_bytes
    return Opcode.LOAD_TILE, dict(
        target=target,
        address=address,
        planes=planes,
        rows=rows,
        cols=cols,
        plane_stride=plane_stride,
        row_stride=row_stride,
        base=base,
        plane_step=plane_step,
        row_step=row_step,
        col_step=col_step,
    )


def random_linear(config, rng):
    z, target = Sizes(config), int(rng.integers(3))
    grain = z.step_beats if target == LinearTarget.STEP else 1
    space = (z.weight_beats, config.memory.step_entries, z.parameter_words)[target]
    count = int(rng.integers(1, min(space, 20) + 1))
    base = space - count if rng.random() < 0.2 else int(rng.integers(space - count + 1))
    address = int(rng.integers((MEMORY_BYTES - count * grain * z.beat_bytes) // z.beat_bytes + 1)) * z.beat_bytes
    return Opcode.LOAD_LINEAR, dict(target=target, address=address, beats=count * grain, base=base)


def random_fill(config, rng):
    z = Sizes(config)
    rows, blocks = int(rng.integers(1, 6)), int(rng.integers(1, 4 * z.banks + 2))
    row_step = blocks + int(rng.integers(0, 5))
    span = (rows - 1) * row_step + blocks
    base = z.activation_blocks - span if rng.random() < 0.2 else int(rng.integers(z.activation_blocks - span + 1))
    return Opcode.FILL, dict(value=int(rng.integers(-128, 128)), rows=rows, blocks=blocks, base=base, row_step=row_step)


class Bench:
    def __init__(self, dut, *, idle=0.0, stall=0.0, instruction_idle=0.0):
        self.dut, self.config = dut, config_of_run()
        self.rng = np.random.default_rng(cocotb.RANDOM_SEED)
        self.model = Model(self.config, self.rng.integers(0, 256, MEMORY_BYTES).astype(np.uint8))
        self.copy, self.memory = Copy(dut, self.model), Memory(dut, self.model, idle=idle, stall=stall)
        self.instructions = Source(dut, "i", idle=instruction_idle)
        self.tokens, self.chance, self.seen = {"execute": 0, "store": 0}, 0.0, {}

    async def reset(self):
        await start(self.dut, [self.instructions, self.memory.sink, self.memory.source], **INPUTS)

    def _give(self, cycle):
        for unit in self.tokens:
            self.tokens[unit] += self.rng.random() < self.chance
            getattr(self.dut, f"available_{unit}").value = int(self.tokens[unit] > 0)

    async def run(self, plan, **options):
        """Run instructions; returns cycles (and words, for requests) per signal."""
        self.instructions.words.extend(encode(op, **f) for op, f in plan)
        self.seen = seen = {name: [] for name in (*WATCH, "i", "request", "data")}
        ends = [self.instructions, self.memory.sink, self.memory.source]
        async for cycle, port, word in exchange(
            self.dut,
            ends,
            rng=self.rng,
            watch=WATCH,
            on_cycle=self._give,
            **{"drain": 30, "until": lambda: not self.dut.busy.value} | options,
        ):
            seen[port].append(cycle)
            if port in WRITES:
                self.copy.sample(port)
            elif port == "request":
                self.memory.request(word)
            elif port in ("take_execute", "take_store"):
                unit = port.removeprefix("take_")
                assert self.tokens[unit], "took a token that is not there"
                self.tokens[unit] -= 1
        return seen

    def compare(self, label):
        for name, got in self.copy.memories.items():
            want = getattr(self.model, name)
            wrong = np.argwhere(got != want)
            assert not len(wrong), (
                f"{label}: {name} {wrong[0].tolist()}: {got[tuple(wrong[0])]}, "
                f"expected {want[tuple(wrong[0])]}, and {len(wrong) - 1} more"
            )


@cocotb.test(timeout_time=20, timeout_unit="ms")
@cocotb.parametrize(idle=[0.0, 0.5], stall=[0.0, 0.7], tokens=[0.05, 0.5])
async def random_loads(dut, idle, stall, tokens):
    bench = Bench(dut, idle=idle, stall=stall, instruction_idle=idle)
    bench.chance = tokens
    await bench.reset()
    for number in range(12):
        plan = []
        for _ in range(int(bench.rng.integers(1, 9))):
            op, f = (random_tile, random_tile, random_linear, random_fill)[bench.rng.integers(4)](
                bench.config, bench.rng
            )
            f |= {
                k: int(bench.rng.random() < 0.4) for k in ("wait_execute", "wait_store", "push_execute", "push_store")
            }
            plan.append((op, f))
            bench.model.run(op, f)
        seen = await bench.run(plan)
        label = f"plan {number}: {plan}"
        bench.compare(label)
        for unit in ("execute", "store"):
            assert len(seen[f"take_{unit}"]) == sum(f[f"wait_{unit}"] for _, f in plan), label
            assert len(seen[f"push_{unit}"]) == sum(f[f"push_{unit}"] for _, f in plan), label
        assert not seen["error"] and not bench.memory.source.words, label
        pushes = [c for u in ("execute", "store") for c in seen[f"push_{u}"]]
        if pushes:
            assert max(pushes) <= max(seen["writing"]) + 1
        gaps = [b - a for a, b in zip(seen["busy"], seen["busy"][1:])]
        if idle == 0.0:  # BARRIER looks at two cycles in a row
            assert max(gaps) <= 2, f"{label}: not busy for {max(gaps) - 1} cycles though instructions are inside"


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def tokens_follow_the_last_write(dut):
    """Each kind pushes one cycle behind its last write, not earlier; the wait comes before the request."""
    bench = Bench(dut)
    await bench.reset()
    for op, f in (
        random_tile(bench.config, bench.rng),
        random_linear(bench.config, bench.rng),
        random_fill(bench.config, bench.rng),
    ):
        for unit in ("execute", "store"):
            bench.instructions.words.clear()

            async def later(cycles):
                for _ in range(cycles):
                    await cocotb.triggers.FallingEdge(dut.clk)
                bench.tokens[unit] += 1

            task = cocotb.start_soon(later(20))
            fields = f | {f"wait_{unit}": 1, f"push_{unit}": 1}
            bench.model.run(op, fields)
            seen = await bench.run([(op, fields)])
            await task
            assert seen[f"take_{unit}"][0] >= 18 and seen["i"] == seen[f"take_{unit}"]
            assert all(c > seen["i"][0] for c in seen["request"])
            assert seen[f"push_{unit}"] == [seen["writing"][-1] + 1]
            bench.compare(f"{op.name}")


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def throughput(dut):
    """One unit, one beat, one scratchpad row per cycle; further instructions follow without waiting for memory."""
    bench = Bench(dut)
    z = bench.model.sizes
    await bench.reset()
    per_beat, unit = z.units_per_beat, z.unit_bytes
    cols = min(32, z.residual_units // 2) // per_beat * per_beat
    tile = dict(target=TileTarget.RESIDUAL, planes=1, rows=2, cols=cols, row_stride=cols, row_step=cols, col_step=1)
    fill = dict(value=3, rows=1, blocks=z.banks * 16, base=0)
    beats = min(16, z.weight_beats)
    linear = dict(target=LinearTarget.WEIGHT, beats=beats, base=0)
    for (op, f), cycles, asked in (
        ((Opcode.LOAD_TILE, tile), 2 * cols, 1),
        ((Opcode.FILL, fill), 16, 0),
        ((Opcode.LOAD_LINEAR, linear), beats, 1),
        ((Opcode.LOAD_TILE, tile | {"row_stride": cols + per_beat}), 2 * cols, 2),
    ):
        bench.model.run(op, f)
        seen = await bench.run([(op, f)])
        assert len(seen["writing"]) == cycles == seen["writing"][-1] - seen["writing"][0] + 1, f"{op.name}: {f}"
        assert len(seen["request"]) == asked, f"{op.name}: {f}"
        bench.compare(op.name)
    assert bench.memory.requests[0] == (0, 2 * cols // per_beat), "rows without gaps are one request"
    # between instructions the write half loses one cycle, whatever memory's latency
    seen = await bench.run([(Opcode.LOAD_LINEAR, linear)] * 6)
    bench.model.run(Opcode.LOAD_LINEAR, linear)
    assert seen["writing"][-1] - seen["writing"][0] + 1 == 6 * beats + 5
    # a row that begins in the middle of a beat costs nothing but its own units
    if per_beat > 1:
        f = tile | {"address": unit, "rows": 3, "cols": 3, "row_stride": 3 + per_beat, "row_step": 3}
        bench.model.run(Opcode.LOAD_TILE, f)
        seen = await bench.run([(Opcode.LOAD_TILE, f)])
        assert seen["writing"][-1] - seen["writing"][0] + 1 == 9
        bench.compare("middle of a beat")


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def long_merged_tiles_are_split(dut):
    """rows * cols may pass what the beat count of one request holds: then rows are requested one by one."""
    bench = Bench(dut)
    z = bench.model.sizes
    await bench.reset()
    f = dict(
        target=TileTarget.RESIDUAL,
        planes=1,
        rows=4095,
        cols=(1 << 14) - z.units_per_beat,
        row_stride=(1 << 14) - z.units_per_beat,
    )
    bench.instructions.words.append(encode(Opcode.LOAD_TILE, **f))
    asked = []
    async for _, port, word in exchange(
        dut, [bench.instructions, bench.memory.sink], rng=bench.rng, drain=0, until=lambda: len(asked) >= 3
    ):
        if port == "request":
            asked.append((word & (1 << 40) - 1, word >> 40))
    row = f["cols"] * z.unit_bytes
    assert [offset for offset, _ in asked[:3]] == [
        0,
        row // z.beat_bytes * z.beat_bytes,
        2 * row // z.beat_bytes * z.beat_bytes,
    ]
    assert all(row <= beats * z.beat_bytes <= row + 2 * z.beat_bytes for _, beats in asked)


def range_errors(config):
    """Instructions whose last (or only) write is out of range, and twins that just fit: name -> (op, bad, good)."""
    z = Sizes(config)
    tile = dict(target=TileTarget.ACTIVATION, planes=1, rows=1, cols=1)
    blocks, group = z.activation_blocks, z.group_blocks
    cases = {
        "tile column": (
            Opcode.LOAD_TILE,
            tile | {"cols": 2, "col_step": group},
            {"base": blocks - group},
            {"base": blocks - 2 * group},
        ),
        "tile row": (
            Opcode.LOAD_TILE,
            tile | {"rows": 2, "row_step": group, "row_stride": 5},
            {"base": blocks - group},
            {"base": blocks - 2 * group},
        ),
        "tile plane": (
            Opcode.LOAD_TILE,
            tile | {"planes": 2, "plane_step": group, "plane_stride": 5},
            {"base": blocks - group},
            {"base": blocks - 2 * group},
        ),
        "tile far": (Opcode.LOAD_TILE, tile | {"planes": 3, "plane_stride": 1}, {"plane_step": 65536 - group}, {}),
        "residual": (
            Opcode.LOAD_TILE,
            tile | {"target": TileTarget.RESIDUAL, "cols": 2, "col_step": 1},
            {"base": z.residual_units - 1},
            {"base": z.residual_units - 2},
        ),
        "fill": (
            Opcode.FILL,
            dict(value=1, rows=1, blocks=z.banks + 1),
            {"base": blocks - z.banks},
            {"base": blocks - z.banks - 1},
        ),
        "fill row": (Opcode.FILL, dict(value=1, rows=2, blocks=1), {"row_step": blocks}, {"row_step": blocks - 1}),
        "weight": (
            Opcode.LOAD_LINEAR,
            dict(target=0, beats=2),
            {"base": z.weight_beats - 1},
            {"base": z.weight_beats - 2},
        ),
        "step": (
            Opcode.LOAD_LINEAR,
            dict(target=1, beats=2 * z.step_beats),
            {"base": config.memory.step_entries - 1},
            {"base": config.memory.step_entries - 2},
        ),
        "parameter": (
            Opcode.LOAD_LINEAR,
            dict(target=2, beats=2),
            {"base": z.parameter_words - 1},
            {"base": z.parameter_words - 2},
        ),
    }
    if group > 1:
        cases["tile misaligned"] = Opcode.LOAD_TILE, tile, {"base": 1}, {"base": group}
    return cases


@cocotb.test(timeout_time=10, timeout_unit="ms")
async def scratchpad_range(dut):
    """One place too far is an error and stops the unit; the last place is none."""
    for name, (op, common, bad, good) in range_errors(config_of_run()).items():
        bench = Bench(dut)
        await bench.reset()
        bench.model.run(op, common | good)
        seen = await bench.run([(op, common | good)])
        assert not seen["error"], f"{name}: refused though it fits"
        bench.compare(name)
        bench = Bench(dut)
        await bench.reset()
        seen = await bench.run([(op, common | bad | {"push_store": 1})])
        assert seen["error"] and int(dut.error.value) == 1 | Error.SCRATCHPAD_RANGE << 1, f"{name}: not seen"
        dut.i__valid.value, dut.request__ready.value = 1, 1
        dut.i__payload.value = encode(Opcode.FILL, value=1, rows=1, blocks=1)
        for _ in range(20):
            await cocotb.triggers.FallingEdge(dut.clk)
            assert not dut.tile_en.value, f"{name}: the unit goes on"
