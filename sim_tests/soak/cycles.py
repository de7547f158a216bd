"""The cycle model against the RTL: random programs and random layers, every counter and every BARRIER to the cycle.

Both engines: a configuration with a basis engine gets its instructions among the others, and also programs of
`sim_tests.hw.basis_programs` and decomposed layers, whose data matter where coefficients are maps.

    python -m sim_tests.soak.cycles [CONFIG ...] [--points 2000] [--variants 2] [--seed 1] [--number N]

CONFIG is a name of `sim_tests.hw.configs.CONFIGS`, `WIDE` or `BASIS`, a preset, or ``variant-SEED-N`` or
``basis-SEED-N``, a random one; without any, `DEFAULT`. ``--variants`` adds random configurations (each a Verilator
build), every second one with a basis engine. ``--number``: one point only.
Each difference prints the command that repeats it; exit status 1 if there is any.
"""
import argparse
from dataclasses import dataclass, field, replace
import os
import re
import sys
import time

import numpy as np

from gen import emit
from golden.coefficients import map_words, pack_maps, series_words
from golden.cycles import predict, program_words
from golden.machine import Machine
from lowering.lower import lower
from sim_tests.bench import build
from sim_tests.bench.simulation import simulate
from sim_tests.hw.basis_programs import RandomPasses
from sim_tests.hw.configs import CONFIGS
from sim_tests.lowering.random_layers import random_basis_network, random_network
from sim_tests.soak import networks
from spec.config import BusConfig, ControlConfig, load
from spec.derive import Sizes, ceil_div
from spec.errors import InputError
from spec.formats import step_entry
from spec.isa import SERIES_TERMS, LinearTarget, Mode, Opcode, TileTarget, Unit, encode

LATENCIES = (1, 2, 3, 5, 8, 13, 16, 24, 40, 60, 100, 200)
#: Places in the memory of random programs: step tables, map coefficients, the program, what STORE writes.
TABLE, MAPS, PROGRAM, SPACE, BYTES = 0, 0x4000, 0x8000, 0x14000, 0x30000
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
    #: Of the basis engine, from the golden machine: see `golden.cycles.predict`.
    word_cycles: dict = field(default_factory=dict)
    saturations: int = 0


def simulator(config):
    """Built simulator of a configuration."""
    return build.simulator(build.rtl(config), emit.header_text(config), emit.top_name(config))


class RandomProgram:
    """Instructions that keep every rule of the hardware, in any order, with tokens that never fail in program order.

    The memory holds zeros but for step tables and map coefficients, so that no sum overflows and no activation meets a
    coefficient; the cycles do not depend on values.
    """

    def __init__(self, config, rng, *, length):
        self.config, self.sizes, self.rng = config, Sizes(config), rng
        self.tokens = {(a, b): 0 for a in _UNITS for b in _UNITS if a != b}
        self.words, self.memory = [], np.zeros(BYTES, np.uint8)
        #: Few or many pixels, and how often tokens are used: each program has its own character.
        self.pixels = int(rng.choice([1, 2, 4, self.sizes.accumulator_depth]))
        kinds = [self._tile, self._linear, self._fill, self._store]
        kinds[3:3] = [self._execute] * (config.structured is not None)
        kinds += [self._execute_basis] * (config.basis is not None)
        self.token_chance, self.mix = float(rng.choice([0, 0.2, 0.5])), rng.dirichlet([1] * len(kinds))
        self.small = bool(rng.integers(2))
        #: Beats of the weight buffer that LOAD_LINEAR may write; what lies behind holds map coefficients.
        self.weight_beats, self.maps = self.sizes.weight_beats, []
        if config.structured is not None:
            self._step_tables()
        self.add(Opcode.HEADER, digest=self.sizes.digest_value, version=1)
        if config.basis is not None and config.basis.coefficients == "maps":
            self._load_maps()
        self._load_steps()
        for _ in range(length):
            chance = rng.random()
            if chance < 0.03:
                self.add(Opcode.BARRIER, mark=int(rng.integers(1 << 16)))
            elif chance < 0.05:
                self._load_steps()
            elif chance < 0.06:
                self.add(Opcode.HEADER, digest=self.sizes.digest_value, version=1)
            else:
                kinds[rng.choice(len(kinds), p=self.mix)]()
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
        self.words.append(encode(opcode, **{name: value if isinstance(value, list) else int(value)
                                            for name, value in fields.items()}))

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
        if self.config.structured is None:
            return
        beats = self.entries * z.step_beats
        self.add(Opcode.LOAD_LINEAR, Unit.LOAD, target=LinearTarget.STEP, beats=beats,
                 address=TABLE + number * beats * z.beat_bytes)
        self.add(Opcode.BARRIER, mark=2)
        self.table = self.tables[number]

    def _load_maps(self):
        """Map coefficients of some numbers of channel groups at the end of the weight buffer, for good."""
        b, z, rng, blob = self.config.basis, self.sizes, self.rng, b""
        for groups in rng.permutation(np.arange(1, z.coefficient_groups + 1))[:4].tolist():
            shape = b.blocks, b.slices, groups, b.group
            signs = rng.choice([-1, 1], shape) * (rng.random(shape) < rng.choice([0, 0.1, 0.4, 1]))
            packed = bytes(pack_maps(signs.astype(np.int8), self.config))
            if len(blob) + len(packed) <= min(z.weight_beats * z.beat_bytes // 2, PROGRAM - MAPS):
                self.maps.append((groups, len(blob) // z.beat_bytes, len(packed) // z.beat_bytes))
                blob += packed
        if not self.maps:
            return
        beats = len(blob) // z.beat_bytes
        self.weight_beats -= beats
        self.maps = [(groups, self.weight_beats + at, count) for groups, at, count in self.maps]
        self.memory[MAPS:MAPS + len(blob)] = np.frombuffer(blob, np.uint8)
        self.add(Opcode.LOAD_LINEAR, target=LinearTarget.WEIGHT, beats=beats, address=MAPS, base=self.weight_beats)

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
        target, words = (LinearTarget.WEIGHT, self.weight_beats) if rng.random() < 0.7 else \
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
        most = min(self.pixels, self.sizes.accumulator_depth)
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

    def _basis_kernel(self):
        """Fields of a kernel that the window and the tap memory can hold."""
        b, rng = self.config.basis, self.rng
        dilation = int(rng.integers(1, 4))
        kernel_cols = int(rng.integers(1, min((b.window - 1) // dilation + 1, 15) + 1))
        kernel_rows = int(rng.integers(1, min(8, b.tap_rows // ceil_div(kernel_cols, b.multipliers)) + 1))
        dilation_rows = int(rng.integers(1, 4))
        return {"kernel_rows": kernel_rows, "kernel_cols": kernel_cols, "dilation_rows": dilation_rows,
                "dilation_cols": dilation, "stride_rows_log2": int(rng.choice([0, 0, 1, 2])),
                "stride_cols_log2": int(rng.choice([0, 0, 1, 2])),
                "pad_top": int(rng.integers(min((kernel_rows - 1) * dilation_rows, 15) + 1)),
                "pad_left": int(rng.integers((kernel_cols - 1) * dilation + 1))}

    def _basis_groups(self, mode):
        """(channel groups, fields of the terms, beats of coefficients or None where none fit)."""
        b, z, rng = self.config.basis, self.sizes, self.rng
        if mode is not Mode.DECOMPOSED:
            return self._pick(1, min(255, 3 * b.stream_groups)), {}, 0
        groups = self._pick(1, z.coefficient_groups)
        if b.coefficients == "maps":
            return groups, {}, 0 if map_words(groups, self.config) <= b.coefficient_rows else None
        terms = [1 << int(n) for n in rng.integers(0, b.group.bit_length(), int(rng.integers(1, SERIES_TERMS + 1)))]
        words = series_words(groups, terms, self.config)
        logs = [n.bit_length() - 1 for n in terms]
        return groups, {"terms": len(terms), "n_log2": logs + [0] * (SERIES_TERMS - len(logs))}, \
            words * z.series_tile_beats if words <= b.coefficient_rows else None

    def _execute_basis(self):
        b, z, rng = self.config.basis, self.sizes, self.rng
        mode = Mode(int(rng.integers(3)))
        rows, cols = self._shape()
        groups, fields, coefficients = self._basis_groups(mode)
        if coefficients is None:
            return
        taps = self._pick(1, b.tap_rows) if rng.random() < 0.5 else 0
        weight = None
        if mode is Mode.DECOMPOSED and self.maps and rng.random() < 0.5:
            groups, weight, coefficients = self.maps[int(rng.integers(len(self.maps)))]
            weight -= taps * z.tap_row_beats
            if weight < 0:
                return
        elif rng.random() < 0.5:
            coefficients = 0
        room = z.weight_beats - taps * z.tap_row_beats - coefficients
        if room < 0 or mode is Mode.POINTWISE and groups > b.tap_rows:
            return
        if mode is Mode.POINTWISE:
            fields |= {"kernel_rows": 1, "kernel_cols": 1, "dilation_rows": int(rng.integers(1, 8)),
                       "dilation_cols": int(rng.integers(1, 8))}
            in_rows, in_cols = rows, cols
        else:
            fields |= self._basis_kernel()
            in_rows, in_cols = self._pick(1, 12 if self.small else 30), self._pick(1, 12 if self.small else 60)
        units, used = z.activation_blocks // z.group_blocks, 1 if mode is Mode.DENSE else groups
        steps = [int(rng.integers(0, max(1, (units - used) // (2 * n)))) for n in (in_rows, in_cols)]
        left = units - used - sum(step * (n - 1) for step, n in zip(steps, (in_rows, in_cols)))
        if left < 0:
            return
        head = {"mode": mode, "in_rows": in_rows, "in_cols": in_cols, "out_rows": rows, "out_cols": cols,
                "groups": groups, "taps": taps, "coefficients": coefficients, "bank": rng.integers(2),
                "weight": int(rng.integers(room + 1)) if weight is None else weight,
                "base": int(rng.integers(left + 1)) * z.group_blocks, "row_step": steps[0] * z.group_blocks,
                "col_step": steps[1] * z.group_blocks, "accumulate": rng.integers(2), "operation": rng.integers(2),
                "channel": int(rng.integers(b.group)) if mode is Mode.DENSE else 0}
        self.add(Opcode.EXECUTE_BASIS, Unit.EXECUTE, **head, **fields)

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


def _with_data(config, memory, program, count):
    """What `predict` wants to know of the data, from a run of the golden machine on a copy of the memory."""
    machine = Machine(config, memory.copy(), record_cycles=True)
    machine.run(program, count)
    return {"word_cycles": dict(machine.basis_word_cycles), "saturations": machine.counts["saturations"]}


def passes_point(config, seed, number):
    """A point of passes of the basis engine with data."""
    rng = np.random.default_rng([seed, number, 2])
    depth = int(rng.integers(1, Sizes(config).accumulator_depth + 1))
    made = RandomPasses(config, rng, groups=int(rng.choice([1, 2, 4, 8])), depth=depth,
                        structured=0.3 if config.structured is not None else 0.0)
    return Point(what=f"passes {seed}/{number}", memory=made.memory, program=made.program, count=made.count,
                 **_latencies(rng), **_with_data(config, made.memory, made.program, made.count))


def _random_layer(rng, config):
    if config.basis is not None and rng.random() < 0.6:
        return random_basis_network(rng, config)[0]
    return random_network(rng, Sizes(config).block)[0]


def layer_point(config, seed, number):
    """A point of one to three lowered random layers; None if the configuration does not support one."""
    rng = np.random.default_rng([seed, number, 1])
    try:
        parts = [_random_layer(rng, config) for _ in range(int(rng.integers(1, 4)))]
        network = networks.merged(parts)
        batch = int(rng.integers(1, 4))
        lowered = lower(network, config, batch=batch)
    except InputError:
        return None
    memory, data = lowered.new_memory(), {}
    if config.basis is not None:
        for name in lowered.inputs:
            values = rng.integers(-128, 128, (batch, *network.tensors[name].shape)).astype(np.int8)
            lowered.write_tensor(memory, name, values)
        data = _with_data(config, memory, lowered.program_offset, lowered.instruction_count)
    return Point(what=f"layer {seed}/{number}", memory=memory, program=lowered.program_offset,
                 count=lowered.instruction_count, **_latencies(rng), **data)


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
                  write_latency_cycles=point.write_latency, program_offset=point.program,
                  word_cycles=point.word_cycles, saturations=point.saturations)
    pairs = {"cycles": (got.cycles, run.cycles)}
    pairs |= {name: (value, run.registers[name]) for name, value in got.counters.items()}
    pairs["marks"] = (
        [(b.mark, b.cycle, b.read_beats, b.write_beats, *b.execute) for b in got.segments],
        [(b["mark"], b["cycle"], b["read_beats"], b["write_beats"], *b["execute"][:6]) for b in run.marks])
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def point(config, seed, number):
    """Point ``number`` of a seed: three random programs for every random layer; None where there is none.

    With a basis engine one of the three is a program of its passes.
    """
    if number % 4 == 3:
        return layer_point(config, seed, number)
    if number % 4 == 1 and config.basis is not None:
        return passes_point(config, seed, number)
    return program_point(config, seed, number)


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


def random_basis_config(rng):
    """A variant of tiny_basis or tiny_maps, drawn until it is a legal one."""
    def pick(*values):
        return values[int(rng.integers(len(values)))]
    while True:
        base = load(pick("tiny_basis", "tiny_maps"))
        try:
            basis = replace(
                base.basis, slices=pick(1, 2, 3), multipliers=pick(1, 2, 3, 4), stream_groups=pick(1, 2, 4, 8),
                fifo_depth=pick(2, 2, 3, 4, 7, 16), window=pick(4, 5, 7, 15), coefficient_rows=pick(2, 4, 16),
                tap_rows=pick(4, 16, 32), look_aside=pick(0, 1, 2, 3), blocks=4 if base.structured else pick(2, 3, 4))
            memory = replace(base.memory, activation_bytes=pick(2048, 8192), weight_bytes=pick(1024, 4096))
            return replace(
                base, basis=basis, memory=memory, structured=base.structured if pick(True, False) else None,
                bus=BusConfig(data_bits=pick(32, 64, 128), burst_beats=pick(1, 4, 16), outstanding_reads=pick(1, 2, 8),
                              outstanding_writes=pick(1, 2, 8)),
                control=ControlConfig(queue_depth=pick(2, 4, 8), fetch_depth=pick(2, 4, 8), watchdog_cycles=1_000_000))
        except InputError:
            continue


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
_BASIS, _MAPS = load("tiny_basis"), load("tiny_maps")
#: Basis engines besides the presets: a queue with output register and a large window; no structured engine; maps whose
#: segments are longer than the queues of their decoders.
BASIS = {
    "basis_deep": replace(
        _BASIS, basis=replace(_BASIS.basis, fifo_depth=5, window=9, stream_groups=2, coefficient_rows=8)),
    "basis_alone": replace(_BASIS, structured=None, basis=replace(_BASIS.basis, fifo_depth=3, multipliers=4, slices=1)),
    "maps_long": replace(
        _MAPS, basis=replace(_MAPS.basis, slices=3, stream_groups=4, coefficient_rows=32, fifo_depth=4),
        memory=replace(_MAPS.memory, activation_bytes=8192, weight_bytes=4096),
        bus=replace(_MAPS.bus, data_bits=32))}
#: Configurations of a run without names.
DEFAULT = ("tiny", "bus32", "groups", "dense", "block8", "wide128", "wide256", "tiny_basis", "tiny_maps", "basis_deep",
           "basis_alone", "maps_long")


def configuration(name):
    """Config of a name. Raises InputError for an unknown one."""
    if match := re.fullmatch(r"(variant|basis)-(\d+)-(\d+)", name):
        draw = random_config if match[1] == "variant" else random_basis_config
        return draw(np.random.default_rng([int(match[2]), int(match[3])]))
    return CONFIGS.get(name) or WIDE.get(name) or BASIS.get(name) or load(name)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m sim_tests.soak.cycles", description=__doc__.split("\n")[0])
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--points", type=int, default=2000, help="over all configurations")
    parser.add_argument("--variants", type=int, default=0, help="random configurations besides")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--number", type=int, help="compare this point only")
    args = parser.parse_args(argv)
    os.nice(10)
    names = list(args.configs or DEFAULT)
    names += [f"{('variant', 'basis')[n % 2]}-{args.seed}-{n}" for n in range(args.variants)]
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
