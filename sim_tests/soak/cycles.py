"""The cycle model against the RTL: random programs and random layers, every counter and every BARRIER to the cycle.

    python -m sim_tests.soak.cycles [CONFIG ...] [--points 2000] [--variants 2] [--seed 1]

CONFIG is a name of `sim_tests.hw.configs.CONFIGS` or a preset; without one, all that are small to build. ``--variants``
adds random configurations (each a Verilator build). Exit status 1 if any number differs.
"""
import argparse
from dataclasses import dataclass, replace
import os
import sys
import time

import numpy as np

from gen import emit
from golden.cycles import predict, program_words
from lowering.lower import lower
from sim_tests.bench import build
from sim_tests.bench.simulation import simulate
from sim_tests.hw.configs import CONFIGS
from sim_tests.lowering.random_layers import random_network
from spec.config import BusConfig, ControlConfig, load
from spec.derive import Sizes
from spec.errors import InputError
from spec.formats import step_entry
from spec.isa import LinearTarget, Opcode, TileTarget, Unit, encode

LATENCIES = (1, 2, 3, 5, 8, 13, 16, 24, 40, 60, 100, 200)
#: Places in the memory of random programs: step tables, the program, what STORE writes.
TABLE, PROGRAM, SPACE, BYTES = 0, 0x8000, 0x14000, 0x20000
_UNITS = (Unit.LOAD, Unit.EXECUTE, Unit.STORE)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One program to compare: ``memory`` is the image, ``program`` its offset in it, ``count`` its instructions."""

    what: str
    memory: np.ndarray
    program: int
    count: int
    latency: int
    write_latency: int


def simulator(config):
    """Built simulator of a configuration."""
    return build.simulator(build.rtl(config), emit.header_text(config), emit.top_name(config))


class RandomProgram:
    """Instructions that keep every rule of the hardware, in any order, with any tokens that never fail in program order.

    The memory holds zeros but for step tables, so that no sum overflows; the cycles do not depend on values.
    """

    def __init__(self, config, rng, *, length):
        self.config, self.sizes, self.rng = config, Sizes(config), rng
        self.tokens = {(a, b): 0 for a in _UNITS for b in _UNITS if a != b}
        self.words, self.memory = [], np.zeros(BYTES, np.uint8)
        #: Few or many pixels, and how often tokens are used: each program has its own character.
        self.pixels = int(rng.choice([1, 2, 4, config.structured.accumulator_depth]))
        self.token_chance, self.mix = float(rng.choice([0, 0.2, 0.5])), rng.dirichlet([1] * 5)
        self.small = bool(rng.integers(2))
        self._step_tables()
        self.add(Opcode.HEADER, digest=self.sizes.digest_value, version=1)
        self._load_steps()
        kinds = (self._tile, self._linear, self._fill, self._execute, self._store)
        for _ in range(length):
            chance = rng.random()
            if chance < 0.03:
                self.add(Opcode.BARRIER, mark=int(rng.integers(1 << 16)))
            elif chance < 0.05:
                self._load_steps()
            elif chance < 0.06:
                self.add(Opcode.HEADER, digest=self.sizes.digest_value, version=1)
            else:
                kinds[rng.choice(5, p=self.mix)]()
        self.add(Opcode.END)
        for _ in range(int(rng.integers(1, 20)) if rng.random() < 0.25 else 0):      # words behind END are fetched, too
            self.add(Opcode.END)
        stride = self.sizes.instruction_beats * self.sizes.beat_bytes
        room = (SPACE - PROGRAM) // self.sizes.beat_bytes - len(self.words) * self.sizes.instruction_beats
        self.program = PROGRAM + int(rng.integers(room)) * self.sizes.beat_bytes
        data = b"".join(word.to_bytes(stride, "little") for word in self.words)
        self.memory[self.program:self.program + len(data)] = np.frombuffer(data, np.uint8)

    def _pick(self, low, high):
        """Integer in low..high, often near the low end."""
        high = max(low, high)
        return int(min(high, low + (self.rng.geometric(0.4) - 1 if self.rng.random() < 0.6 else
                                    self.rng.integers(0, high - low + 1))))

    def add(self, opcode, unit=None, **fields):
        """Append an instruction with random tokens."""
        if unit is not None:
            for other in _UNITS:
                if other is not unit:
                    if self.tokens[other, unit] and self.rng.random() < 2 * self.token_chance:
                        fields[f"wait_{other.name.lower()}"] = 1
                        self.tokens[other, unit] -= 1
                    if self.tokens[unit, other] < 200 and self.rng.random() < self.token_chance:
                        fields[f"push_{other.name.lower()}"] = 1
                        self.tokens[unit, other] += 1
        self.words.append(encode(opcode, **{name: int(value) for name, value in fields.items()}))

    def _step_tables(self):
        z, s, rng = self.sizes, self.config.structured, self.rng
        self.entries, stride = self.config.memory.step_entries, z.step_beats * z.beat_bytes
        self.tables = []
        for number in range(2):
            held, ns = rng.random(), rng.permutation([p.n for p in s.patterns])[:int(rng.integers(1, len(s.patterns) + 1))]
            table = [(int(rng.choice(ns)).bit_length() - 1, int(rng.random() < held * held)) for _ in range(self.entries)]
            for n, (n_log2, hold) in enumerate(table):
                word = step_entry(s.taps).pack(offset=[0] * s.taps, enable=[1] + [0] * (s.taps - 1), n_log2=n_log2,
                                               segments_log2=0, hold=hold)
                at = TABLE + (number * self.entries + n) * stride
                self.memory[at:at + 16] = np.frombuffer(word.to_bytes(16, "little"), np.uint8)
            self.tables.append(table)

    def _load_steps(self):
        """A whole table, between barriers: steps must not change under an EXECUTE."""
        z, number = self.sizes, int(self.rng.integers(2))
        self.add(Opcode.BARRIER, mark=1)
        beats = self.entries * z.step_beats
        self.add(Opcode.LOAD_LINEAR, Unit.LOAD, target=LinearTarget.STEP, beats=beats,
                 address=TABLE + number * beats * z.beat_bytes)
        self.add(Opcode.BARRIER, mark=2)
        self.table = self.tables[number]

    def _tile(self):
        z, rng = self.sizes, self.rng
        residual = bool(rng.integers(2))
        grain, blocks = (1, z.residual_units) if residual else (z.group_blocks, z.activation_blocks)
        size = 6 if self.small else 40
        planes, rows, cols = self._pick(1, 4), self._pick(1, size), self._pick(1, size if rng.random() < 0.8 else 300)
        steps = [int(rng.integers(0, max(1, (blocks // grain - 1) // (4 * max(n, 1)) + 1))) * grain
                 for n in (planes, rows, cols)]
        last = sum(step * (n - 1) for step, n in zip(steps, (planes, rows, cols)))
        if last >= blocks:
            return
        row_stride = cols if rng.random() < 0.4 else int(rng.integers(0, 2 * cols + 2))
        plane_stride = int(rng.integers(0, 400))
        units = (planes - 1) * plane_stride + (rows - 1) * row_stride + cols
        room = (BYTES - SPACE) // z.unit_bytes - units
        if room < 1:
            return
        self.add(Opcode.LOAD_TILE, Unit.LOAD, target=TileTarget.RESIDUAL if residual else TileTarget.ACTIVATION,
                 address=SPACE + int(rng.integers(room)) * z.unit_bytes, planes=planes, rows=rows, cols=cols,
                 plane_stride=plane_stride, row_stride=row_stride, plane_step=steps[0], row_step=steps[1],
                 col_step=steps[2], base=int(rng.integers((blocks - 1 - last) // grain + 1)) * grain)

    def _linear(self):
        z, rng = self.sizes, self.rng
        target, words = (LinearTarget.WEIGHT, z.weight_beats) if rng.random() < 0.7 else \
            (LinearTarget.PARAMETER, z.parameter_words)
        beats = self._pick(1, words)
        address = SPACE + int(rng.integers((BYTES - SPACE) // z.beat_bytes - beats)) * z.beat_bytes
        self.add(Opcode.LOAD_LINEAR, Unit.LOAD, target=target, beats=beats, address=address,
                 base=int(rng.integers(words - beats + 1)))

    def _fill(self):
        blocks, rng = self.sizes.activation_blocks, self.rng
        rows, count = self._pick(1, 12), self._pick(1, 40)
        step = int(rng.integers(0, 20))
        room = blocks - (rows - 1) * step - count
        if room >= 0:
            self.add(Opcode.FILL, Unit.LOAD, rows=rows, blocks=count, row_step=step, base=int(rng.integers(room + 1)))

    def _shape(self):
        most = min(self.pixels, self.config.structured.accumulator_depth)
        rows = self._pick(1, most)
        return rows, self._pick(1, most // rows)

    def _execute(self):
        z, rng = self.sizes, self.rng
        rows, cols = self._shape()
        grain, step = z.banks, int(rng.integers(self.entries))
        steps, beats = 0, 0
        for n_log2, hold in self.table[step:step + self._pick(1, self.entries)]:
            own = 0 if hold else z.tile_beats(1 << n_log2)
            if beats + own > z.weight_beats:
                break
            steps, beats = steps + 1, beats + own
        if not steps:
            return
        row_step, col_step = int(rng.integers(2)) * grain, int(rng.integers(2)) * grain
        room = z.activation_blocks - (rows - 1) * row_step - (cols - 1) * col_step - grain
        if room < 0:
            return
        self.add(Opcode.EXECUTE, Unit.EXECUTE, rows=rows, cols=cols, row_step=row_step, col_step=col_step, step=step,
                 steps=steps, base=int(rng.integers(room // grain + 1)) * grain, bank=rng.integers(2),
                 weight=int(rng.integers(z.weight_beats - beats + 1)), accumulate=rng.integers(2),
                 operation=rng.integers(2))

    def _store(self):
        z, rng = self.sizes, self.rng
        rows, cols = self._shape()
        row_stride = cols if rng.random() < 0.4 else int(rng.integers(0, 2 * cols + 3))
        units = (rows - 1) * row_stride + cols
        residual = int(rows * cols <= z.residual_units and rng.random() < 0.3)
        address = SPACE + int(rng.integers((BYTES - SPACE) // z.unit_bytes - units)) * z.unit_bytes
        self.add(Opcode.STORE, Unit.STORE, address=address, rows=rows, cols=cols, row_stride=row_stride,
                 bank=rng.integers(2), parameter=int(rng.integers(z.parameter_words - z.parameter_beats + 1)),
                 low=-128, high=127, residual=residual,
                 residual_base=int(rng.integers(z.residual_units - rows * cols + 1)) if residual else 0)


def _latencies(rng):
    latency = int(rng.choice(LATENCIES))
    return {"latency": latency, "write_latency": latency if rng.random() < 0.5 else int(rng.choice(LATENCIES))}


def program_point(config, seed, number):
    """A point of random instructions."""
    rng = np.random.default_rng([seed, number])
    made = RandomProgram(config, rng, length=int(rng.choice([3, 12, 40, 150])))
    return Point(what=f"program {seed}/{number}", memory=made.memory, program=made.program, count=len(made.words),
                 **_latencies(rng))


def layer_point(config, seed, number):
    """A point of one lowered random layer; None if the configuration does not support it."""
    rng = np.random.default_rng([seed, number, 1])
    try:
        network, _ = random_network(rng, config.structured.block)
        lowered = lower(network, config, batch=int(rng.integers(1, 4)))
    except InputError:
        return None
    return Point(what=f"layer {seed}/{number}", memory=lowered.new_memory(), program=lowered.program_offset,
                 count=lowered.instruction_count, **_latencies(rng))


def differences(config, executable, point):
    """{what: (predicted, measured)} where the model and the RTL differ, and the cycles measured.

    Compared: cycles, every counter register, and per BARRIER its number, its cycle, the beats and execute states since
    the one before.
    """
    run = simulate(executable, point.memory, program=point.program, count=point.count, latency=point.latency,
                   write_latency=point.write_latency, limit=20_000_000).check()
    words = program_words(config, point.memory, point.program, point.count)
    got = predict(config, words, point.memory, memory_latency_cycles=point.latency,
                  write_latency_cycles=point.write_latency, program_offset=point.program)
    pairs = {"cycles": (got.cycles, run.cycles)}
    pairs |= {name: (value, run.registers[name]) for name, value in got.counters.items()}
    pairs["marks"] = ([(s.mark, s.cycle, s.read_beats, s.write_beats, *s.execute) for s in got.segments],
                      [(m["mark"], m["cycle"], m["read_beats"], m["write_beats"], *m["execute"][:5]) for m in run.marks])
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}, run.cycles


def points(config, seed, count):
    """``count`` points: three random programs for every random layer."""
    number = 0
    while count:
        point = layer_point(config, seed, number) if number % 4 == 3 else program_point(config, seed, number)
        number += 1
        if point is not None:
            count -= 1
            yield point


def random_config(rng):
    """A variant of tiny: bus, bursts, limits, queues, depths."""
    tiny, pick = CONFIGS["tiny"], lambda *values: int(rng.choice(values))
    bits = pick(32, 64, 256)
    return replace(
        tiny, structured=replace(tiny.structured, accumulator_depth=pick(4, 16, 64)),
        bus=BusConfig(data_bits=bits, burst_beats=pick(1, 2, 4, 16, 64, 4096 // (bits // 8) if bits > 64 else 256),
                      outstanding_reads=pick(1, 2, 3, 8, 16), outstanding_writes=pick(1, 2, 3, 8, 16)),
        control=ControlConfig(queue_depth=pick(2, 4, 8), fetch_depth=pick(2, 4, 8, 16), watchdog_cycles=1_000_000))


def soak(config, *, seed, count):
    """(points compared, [(point, differences)], cycles simulated) of one configuration."""
    executable, wrong, cycles = simulator(config), [], 0
    for point in points(config, seed, count):
        bad, spent = differences(config, executable, point)
        cycles += spent
        if bad:
            wrong.append((point, bad))
    return count, wrong, cycles


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m sim_tests.soak.cycles", description=__doc__.split("\n")[0])
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="names of test configurations or presets")
    parser.add_argument("--points", type=int, default=2000, help="over all configurations")
    parser.add_argument("--variants", type=int, default=0, help="random configurations beside them")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    os.nice(10)
    names = args.configs or (["tiny", "bus32", "bus256", "groups", "dense", "block8"] if not args.variants else [])
    configs = {name: CONFIGS.get(name) or load(name) for name in names}
    rng = np.random.default_rng(args.seed)
    configs |= {f"variant {n}": random_config(rng) for n in range(args.variants)}
    total = failed = 0
    for name, config in configs.items():
        began = time.monotonic()
        count, wrong, cycles = soak(config, seed=args.seed, count=-(-args.points // len(configs)))
        total, failed = total + count, failed + len(wrong)
        print(f"{name}: {count} points, {cycles} cycles, {len(wrong)} differ, {time.monotonic() - began:.0f} s", flush=True)
        if name.startswith("variant"):
            print(f"    {config.bus} {config.control} accumulator_depth={config.structured.accumulator_depth}")
        for point, bad in wrong[:5]:
            print(f"    {point.what}, latency {point.latency}, write latency {point.write_latency}: {bad}")
    print(f"{total} points, {failed} differ")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
