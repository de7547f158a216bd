"""The cycle model against the RTL: random programs and random layers, every counter and every BARRIER to the cycle.

    python -m sim_tests.soak.cycles [CONFIG ...] [--points 2000] [--variants 2] [--seed 1] [--number N]

CONFIG is a name of `sim_tests.hw.configs.CONFIGS` or of `WIDE`, a preset, or ``variant-SEED-N``, a random one; without
any, `DEFAULT`. ``--variants`` adds random configurations (each a Verilator build). ``--number``: one point only.
Each difference prints the command that repeats it; exit status 1 if there is any.
"""
import argparse
from dataclasses import dataclass, replace
import os
import re
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
from sim_tests.soak import networks
from spec.config import BusConfig, ControlConfig, load
from spec.derive import Sizes
from spec.errors import InputError
from spec.formats import step_entry
from spec.isa import LinearTarget, Opcode, TileTarget, Unit, encode

LATENCIES = (1, 2, 3, 5, 8, 13, 16, 24, 40, 60, 100, 200)
#: Places in the memory of random programs: step tables, the program, what STORE writes.
TABLE, PROGRAM, SPACE, BYTES = 0, 0x8000, 0x14000, 0x30000
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
    """Instructions that keep every rule of the hardware, in any order, with tokens that never fail in program order.

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
            held, ns = rng.random(), rng.permutation([p.n for p in s.patterns])
            ns = ns[:int(rng.integers(1, len(ns) + 1))]
            table = [(int(rng.choice(ns)).bit_length() - 1, int(rng.random() < held * held))
                     for _ in range(self.entries)]
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
        long = rng.random() < 0.02                  # just so many rows and columns that they are no longer one request
        if long:
            planes, rows, cols = 1, int(rng.integers(63, 65)), int(rng.integers(255, 257))
        steps = [int(rng.integers(0, max(1, (blocks // grain - 1) // (4 * max(n, 1)) + 1))) * grain
                 for n in (planes, rows, cols)]
        last = sum(step * (n - 1) for step, n in zip(steps, (planes, rows, cols)))
        if last >= blocks:
            return
        row_stride = cols if long or rng.random() < 0.4 else int(rng.integers(0, 2 * cols + 2))
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
        beats = self._pick(1, min(words, (BYTES - SPACE) // z.beat_bytes - 1))
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
    """A point of one to three lowered random layers; None if the configuration does not support one."""
    rng = np.random.default_rng([seed, number, 1])
    try:
        parts = [random_network(rng, config.structured.block)[0] for _ in range(int(rng.integers(1, 4)))]
        network = networks.merged(parts)
        lowered = lower(network, config, batch=int(rng.integers(1, 4)))
    except InputError:
        return None
    return Point(what=f"layer {seed}/{number}", memory=lowered.new_memory(), program=lowered.program_offset,
                 count=lowered.instruction_count, **_latencies(rng))


def measure(executable, point):
    """The RTL's `Run` of a point."""
    return simulate(executable, point.memory, program=point.program, count=point.count, latency=point.latency,
                    write_latency=point.write_latency, limit=20_000_000).check()


def differences(config, point, run):
    """{what: (predicted, measured)} where the model and the RTL differ.

    Compared: cycles, every counter register, and per BARRIER its number, its cycle, the beats and execute states since
    the one before.
    """
    words = program_words(config, point.memory, point.program, point.count)
    got = predict(config, words, point.memory, memory_latency_cycles=point.latency,
                  write_latency_cycles=point.write_latency, program_offset=point.program)
    pairs = {"cycles": (got.cycles, run.cycles)}
    pairs |= {name: (value, run.registers[name]) for name, value in got.counters.items()}
    pairs["marks"] = (
        [(b.mark, b.cycle, b.read_beats, b.write_beats, *b.execute) for b in got.segments],
        [(b["mark"], b["cycle"], b["read_beats"], b["write_beats"], *b["execute"][:5]) for b in run.marks])
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def point(config, seed, number):
    """Point ``number`` of a seed: three random programs for every random layer; None where there is none."""
    return layer_point(config, seed, number) if number % 4 == 3 else program_point(config, seed, number)


def points(config, seed, count):
    """(number, point) for the first ``count`` points of a seed."""
    number = 0
    while count:
        if (made := point(config, seed, number)) is not None:
            count -= 1
            yield number, made
        number += 1


def random_config(rng):
    """Bus, bursts, limits, queues, depths: a variant of tiny, or of more kinds (`sim_tests.soak.networks`)."""
    if rng.integers(2):
        return networks.random_config(rng)
    tiny, pick = CONFIGS["tiny"], lambda *values: int(rng.choice(values))
    bits = pick(32, 64)
    return replace(
        tiny, structured=replace(tiny.structured, accumulator_depth=pick(4, 16, 64), taps=pick(1, 2)),
        bus=BusConfig(data_bits=bits, burst_beats=pick(1, 2, 4, 16, 64, 256),
                      outstanding_reads=pick(1, 2, 3, 8, 16), outstanding_writes=pick(1, 2, 3, 8, 16)),
        control=ControlConfig(queue_depth=pick(2, 4, 8), fetch_depth=pick(2, 4, 8, 16), watchdog_cycles=1_000_000))


def _wide(bits, columns, slots, **control):
    tiny = CONFIGS["tiny"]
    return replace(
        tiny, structured=replace(tiny.structured, columns=columns, slots=slots),
        memory=replace(tiny.memory, activation_bytes=8192, weight_bytes=4096, residual_bytes=1024),
        bus=BusConfig(data_bits=bits, burst_beats=4096 // (bits // 8), outstanding_reads=3, outstanding_writes=3),
        control=ControlConfig(watchdog_cycles=1_000_000, **control))


#: Buses as wide as an instruction, and wider.
WIDE = {"wide128": _wide(128, 8, 4, queue_depth=2, fetch_depth=2),
        "wide256": _wide(256, 8, 8, queue_depth=8, fetch_depth=16),
        "wide512": _wide(512, 16, 8, queue_depth=4, fetch_depth=8)}
#: Configurations of a run without names.
DEFAULT = ("tiny", "bus32", "groups", "dense", "block8", "wide128", "wide256")


def configuration(name):
    """Config of a name. Raises InputError for an unknown one."""
    if match := re.fullmatch(r"variant-(\d+)-(\d+)", name):
        return random_config(np.random.default_rng([int(match[1]), int(match[2])]))
    return CONFIGS.get(name) or WIDE.get(name) or load(name)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m sim_tests.soak.cycles", description=__doc__.split("\n")[0])
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--points", type=int, default=2000, help="over all configurations")
    parser.add_argument("--variants", type=int, default=0, help="random configurations besides")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--number", type=int, help="compare this point only")
    args = parser.parse_args(argv)
    os.nice(10)
    names = [*(args.configs or DEFAULT), *(f"variant-{args.seed}-{n}" for n in range(args.variants))]
    total = failed = 0
    for name in names:
        config, began, cycles, wrong = configuration(name), time.monotonic(), 0, 0
        executable, each = simulator(config), -(-args.points // len(names))
        chosen = points(config, args.seed, each) if args.number is None else \
            [(args.number, point(config, args.seed, args.number))]
        for number, made in chosen:
            run = measure(executable, made)
            total, cycles = total + 1, cycles + run.cycles
            if bad := differences(config, made, run):
                wrong += 1
                print(f"    {made.what}, latency {made.latency}, write latency {made.write_latency}: {bad}\n"
                      f"    repeat with: python -m sim_tests.soak.cycles {name} --seed {args.seed} --number {number}")
        failed += wrong
        print(f"{name}: {cycles} cycles, {wrong} points differ, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{total} points of cycle predictions compared with the RTL, {failed} differ")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
