"""The machine: executes programs on a memory image, bit for bit what the hardware does, one instruction at a time.

Written from spec/isa.py, spec/formats.py, spec/derive.py, spec/registers.py, docs/numerics.md and docs/basis.md alone.

**Faults of programs.** Beside the errors that the hardware reports (codes of `spec.registers.Error`) the machine finds
three kinds of fault that hardware cannot see and that show a mistake of the lowering; they carry ``Error.NONE``:

* *never written*: a slot with non-zero weight reads an activation block, or an instruction reads a weight beat, step
  entry, parameter beat, residual unit or accumulator, that nobody wrote since the machine was made. (Hardware would
  compute with whatever lies there.)
* *not as loaded*: an EXECUTE_BASIS whose taps or coefficients are not those of docs/basis.md (another length, bits set
  that must be 0), or that works with kept ones which no pass has loaded for as many rows, groups and terms; outputs
  that no kernel row reaches.
* *not ordered*: two units touch the same place, at least one of them writes, and neither tokens nor a barrier put one
  before the other, so that the outcome would depend on timing.

**How the order check works.** Four clocks tick: instructions of the load unit (L), of the execute unit (E), and for the
store unit two, because a STORE ends twice: its accumulator reads (A) and all it does (F). Each unit keeps a vector: the
latest tick of every clock known to be over. A token carries the vector of its giver: LOAD and EXECUTE include their own
tick; STORE includes its A tick in a token for execute, and A and F ticks in a token for load (memory acknowledged the
writes). Taking a token joins the vectors. A STORE's parameter reads come after its load token only, everything else
after both tokens. A BARRIER joins everything. Every place has one writing and one reading unit (for example weights: L
writes, E reads) and remembers the last tick of each: a read is wrong if the last write's tick is not yet in the
reader's vector, a write is wrong if the last read's tick is not in the writer's. The grain is the exact one: activation
block, beat, entry, unit of memory; an accumulator bank counts as one. So a program in which every conflict is ordered
by tokens raises no alarm, whatever its timing.
"""
from collections import Counter, OrderedDict, deque
from functools import lru_cache

import numpy as np

from golden.coefficients import map_words, series_words, unpack_maps, unpack_series, unpack_taps
from golden.concentration import pixel_word_cycles
from golden.requantize import requantize
from golden.tiles import spread, unpack_tiles
from spec import isa
from spec.derive import PARAMETER_BITS, STEP_BITS, TOKEN_BITS, Sizes, ceil_div
from spec.formats import column_parameters, step_entry
from spec.isa import LinearTarget, Mode, Opcode, Operation, TileTarget, Unit
from spec.registers import Error

_L, _E, _A, _F = range(4)
_UNITS = (Unit.LOAD, Unit.EXECUTE, Unit.STORE)
#: Sums below this are exact in float32, in any order.
_FLOAT32_EXACT = 1 << 24
#: Decoded tile sets kept for reuse by the next output tile.
_TILE_SETS = 32


class MachineError(Exception):
    """A program or its data broke a rule.

    Attributes: code: `spec.registers.Error`; NONE for faults that hardware does not report (see the module).
    address: byte offset that belongs to the error, the register ERROR_ADDRESS (memory errors: the first transfer that
    is wrong; others: the instruction). pc: number of the instruction. text: what happened.
    """

    def __init__(self, code, address, pc, text):
        self.code, self.address, self.pc, self.text = Error(code), int(address), int(pc), text
        super().__init__(f"instruction {pc}, offset {address:#x}: {self.code.name}: {text}")


class _Place:
    """Ticks of the last write and read of every piece of a memory; tick 0 stands for never."""

    def __init__(self, name, count, writer, reader):
        self.name, self.writer, self.reader = name, writer, reader
        self.written, self.read = np.zeros(count, np.int32), np.zeros(count, np.int32)


@lru_cache(maxsize=65536)
def _unpack_step(word, taps):
    entry = step_entry(taps).unpack(word)
    return (*entry["offset"], *entry["enable"], entry["n_log2"], entry["segments_log2"], entry["hold"])


class Machine:
    """One accelerator and its memory.

    Args:
        config: `spec.config.Config`.
        memory: bytearray or uint8 array; offset 0 is what register MEMORY_BASE points to, its length is MEMORY_BYTES.
            The machine reads and writes it in place.
        hazards: check that conflicting accesses are ordered (see the module).
        record_cycles: fill ``basis_word_cycles``.

    Attributes:
        memory: uint8 view of the memory. mark: number of the last BARRIER passed.
        counts: `collections.Counter` of ``macs`` (products of a non-zero stored weight and a pixel, operation ADD
            only), ``pixel_steps`` (pixels streamed past a tile = issue cycles of the array), ``bytes_read`` and
            ``bytes_written`` (data), ``bytes_instructions``, and one entry per opcode name. EXECUTE_BASIS counts its
            micro-steps as ``pixel_steps``, products of a non-zero tap and a pixel as ``macs`` (ADD only), non-zero
            coefficients times streamed pixels as ``adds``, and clamped intermediates as ``saturations``.
        basis_word_cycles: with ``record_cycles`` and maps, {instruction number: int64 [streamed input rows, columns,
            words]}: cycles of each stream word of each DECOMPOSED pass of the last `run`, in the order of the stream.
    Raises: TypeError for other memories.
    """

    def __init__(self, config, memory, *, hazards=True, record_cycles=False):
        if isinstance(memory, bytearray):
            memory = np.frombuffer(memory, np.uint8)
        good = isinstance(memory, np.ndarray) and memory.dtype == np.uint8 and memory.ndim == 1
        if not good or not memory.flags.writeable:
            raise TypeError(f"memory must be a bytearray or a writable uint8 vector, not {type(memory).__name__}")
        self.config, self.sizes, self.memory, self.hazards = config, Sizes(config), memory, hazards
        z, self.record_cycles = self.sizes, record_cycles
        self.mark, self.counts, self.basis_word_cycles = 0, Counter(), {}
        #: Operand values; float32, in which they are exact, so that EXECUTE need not convert what it gathers.
        self._activation = np.zeros((z.activation_blocks, z.block), np.float32)
        self._weight = np.zeros((z.weight_beats, z.beat_bytes), np.uint8)
        fields = 0 if config.structured is None else 2 * config.structured.taps + 3
        self._steps = np.zeros((config.memory.step_entries, fields), np.int64)
        self._parameter = np.zeros((z.parameter_words, z.beat_bytes), np.uint8)
        self._residual = np.zeros((z.residual_units, z.columns), np.int8)
        self._accumulator = np.zeros((2, z.accumulator_depth, z.columns), np.int64)
        #: Pixels of each bank that hold a sum.
        self._filled = [0, 0]
        self._places = {
            "activation": _Place("activation block", z.activation_blocks, _L, _E),
            "weight": _Place("weight beat", z.weight_beats, _L, _E),
            "step": _Place("step entry", config.memory.step_entries, _L, _E),
            "parameter": _Place("parameter beat", z.parameter_words, _L, _F),
            "residual": _Place("residual unit", z.residual_units, _L, _F),
            "accumulator": _Place("accumulator bank", 2, _E, _A),
            "memory": _Place("memory unit", -(-len(memory) // z.unit_bytes), _F, _L),
        }
        self._clock = np.zeros(4, np.int64)
        self._vector = {u: np.zeros(4, np.int64) for u in _UNITS}
        self._tokens = {(a, b): deque() for a in _UNITS for b in _UNITS if a != b}
        self._tile_sets = OrderedDict()
        self._held = self._early = None
        #: What the basis engine keeps: taps int8 [rows, ..]; (coefficients, groups, terms).
        self._taps = self._coefficients = None
        self._program = (0, 0)
        self._pc = self._at = 0

    # -- what a debugger and the tests look at -------------------------------------------------------------------------
    @property
    def activation(self):
        """int8 [blocks, block]: operand values in the activation scratchpad."""
        return self._activation.astype(np.int8)

    @property
    def accumulator(self):
        """int64 [2, accumulator_depth, columns]: a copy of both banks."""
        return self._accumulator.copy()

    @property
    def tokens(self):
        """Number of tokens waiting: {(giver, taker): count}."""
        return {pair: len(waiting) for pair, waiting in self._tokens.items()}

    # -- running -------------------------------------------------------------------------------------------------------
    def run(self, program_offset, count):
        """Execute a program from the beginning; scratchpads and counts stay from run to run, tokens do not.

        Args: program_offset: bytes, a multiple of the beat. count: instructions, register PROGRAM_COUNT.
        Raises: MachineError.
        """
        stride = self.sizes.instruction_beats * self.sizes.beat_bytes
        self._program = (program_offset, program_offset + count * stride)
        for waiting in self._tokens.values():
            waiting.clear()
        self.basis_word_cycles.clear()
        self._join_all()
        for self._pc in range(count):
            self._at = program_offset + self._pc * stride
            if program_offset % self.sizes.beat_bytes or self._at < 0 or self._at + stride > len(self.memory):
                self._fail(Error.MEMORY_RANGE, f"the instruction must lie in memory ({len(self.memory)} bytes), "
                           "on a beat")
            word = int.from_bytes(self.memory[self._at:self._at + isa.INSTRUCTION_BITS // 8].tobytes(), "little")
            self.counts["bytes_instructions"] += stride
            if self._instruction(word):
                return
        self._pc, self._at = count, program_offset + count * stride
        self._fail(Error.PROGRAM_END, f"no END among {count} instructions")

    def _fail(self, code, text, address=None):
        raise MachineError(code, self._at if address is None else address, self._pc, text)

    def _require(self, good, text, code=Error.ILLEGAL_FIELD):
        if not good:
            self._fail(code, text)

    def _instruction(self, word):
        """Execute one word; returns whether it was END."""
        opcode, f = isa.decode(word)
        if opcode is None:
            self._fail(Error.ILLEGAL_OPCODE, f"operation code {word & 15} is unknown")
        engine = {Opcode.EXECUTE: "structured", Opcode.EXECUTE_BASIS: "basis"}.get(opcode)
        if engine is not None and getattr(self.config, engine) is None:
            self._fail(Error.ILLEGAL_OPCODE, f"operation code {word & 15} is unknown without a {engine} engine")
        self._require(f["reserved"] == 0, "reserved bits must be 0")
        unit = isa.UNIT_OF[opcode]
        own = _UNITS if unit is Unit.CONTROL else (unit,)
        for other in own:
            self._require(not f[f"wait_{other.name.lower()}"] and not f[f"push_{other.name.lower()}"],
                          f"{opcode.name} must not exchange tokens with the {other.name.lower()} unit")
        if unit is Unit.CONTROL:
            self._require(f.get("version", isa.VERSION) == isa.VERSION, f"version must be {isa.VERSION}")
            self._require_header(opcode)
            self.counts[opcode.name] += 1
            if opcode is not Opcode.END:
                self._control(opcode, f)
            return opcode is Opcode.END
        check, act = {
            Opcode.LOAD_TILE: (self._check_load_tile, self._load_tile),
            Opcode.LOAD_LINEAR: (self._check_load_linear, self._load_linear),
            Opcode.FILL: (self._check_fill, self._fill),
            Opcode.EXECUTE: (self._check_execute, self._execute),
            Opcode.EXECUTE_BASIS: (self._check_execute_basis, self._execute_basis),
            Opcode.STORE: (self._check_store, self._store)}[opcode]
        check(f)
        self._require_header(opcode)
        self.counts[opcode.name] += 1
        self._wait(unit, f)
        act(f)
        self._push(unit, f)
        return False

    def _require_header(self, opcode):
        """The first instruction must be HEADER; the command processor looks at its fields before that."""
        self._require(self._pc or opcode is Opcode.HEADER, f"a program must begin with HEADER, not {opcode.name}",
                      Error.DIGEST_MISMATCH)

    def _require_aligned(self, f, size):
        self._require(f["address"] % size == 0, f"address must be a multiple of {size}")

    def _control(self, opcode, f):
        if opcode is Opcode.HEADER:
            self._require(f["digest"] == self.sizes.digest_value, f"the program is for config {f['digest']:012x}, not "
                          f"{self.config.digest}", Error.DIGEST_MISMATCH)
        else:
            self._join_all()
            self.mark = f["mark"]

    # -- tokens and order ----------------------------------------------------------------------------------------------
    def _join_all(self):
        for vector in self._vector.values():
            vector[:] = self._clock

    def _wait(self, unit, f):
        """Take the tokens; ``_early`` is the vector before the execute token, on which parameter reads may rely."""
        vector = self._vector[unit]
        for giver in _UNITS:
            if f[f"wait_{giver.name.lower()}"]:
                waiting = self._tokens[giver, unit]
                if not waiting:
                    self._fail(Error.WATCHDOG, f"no token from {giver.name.lower()} to {unit.name.lower()}: "
                               "waits for ever")
                np.maximum(vector, waiting.popleft(), out=vector)
            if giver is Unit.LOAD:
                self._early = vector.copy()
        for clock in ((_A, _F) if unit is Unit.STORE else (_L,) if unit is Unit.LOAD else (_E,)):
            self._clock[clock] += 1

    def _push(self, unit, f):
        for taker in _UNITS:
            if not f[f"push_{taker.name.lower()}"]:
                continue
            known = self._vector[unit].copy()
            store = (_A,) if taker is Unit.EXECUTE else (_A, _F)
            over = {Unit.LOAD: (_L,), Unit.EXECUTE: (_E,), Unit.STORE: store}[unit]
            for clock in over:
                known[clock] = self._clock[clock]
            waiting = self._tokens[unit, taker]
            waiting.append(known)
            if len(waiting) >> TOKEN_BITS:
                self._fail(Error.TOKEN_OVERFLOW, f"more than {(1 << TOKEN_BITS) - 1} tokens from "
                           f"{unit.name.lower()} to {taker.name.lower()}")

    def _reads(self, name, where, vector, *, known=True):
        """Note a read of pieces ``where`` of a place; ``known``: they must have been written."""
        place = self._places[name]
        written = place.written[where]
        if known and (written == 0).any():
            first = np.asarray(where).ravel()[np.argmax(written == 0)] if not isinstance(where, slice) else \
                where.start + int(np.argmax(written == 0))
            self._fail(Error.NONE, f"{place.name} {first} is read but was never written")
        if self.hazards:
            if written.size and written.max() > vector[place.writer]:
                self._fail(Error.NONE, f"reading {place.name}: no token or barrier orders it after its last write")
            place.read[where] = self._clock[place.reader]

    def _writes(self, name, where, vector):
        """Note a write of pieces ``where`` of a place."""
        place = self._places[name]
        if self.hazards and (read := place.read[where]).size and read.max() > vector[place.reader]:
            self._fail(Error.NONE, f"writing {place.name}: no token or barrier orders it after its last read")
        place.written[where] = self._clock[place.writer]

    # -- load unit -----------------------------------------------------------------------------------------------------
    def _grid(self, base, *loops):
        """Addresses ``base + sum index * step`` of nested loops (count, step), int64 with one axis per loop."""
        out = np.int64(base)
        for count, step in loops:
            out = out[..., None] + np.arange(count, dtype=np.int64) * step
        return out

    def _units(self, units):
        """Refuse memory units out of range, naming the first in loop order."""
        bad = (units + 1) * self.sizes.unit_bytes > len(self.memory)
        if bad.any():
            at = int(units[bad][0]) * self.sizes.unit_bytes
            self._fail(Error.MEMORY_RANGE, f"a transfer at {at:#x} leaves memory ({len(self.memory)} bytes)", at)

    def _range(self, name, first, last, count):
        if first < 0 or last >= count:
            self._fail(Error.SCRATCHPAD_RANGE, f"{name} {last} is out of range (0..{count - 1})")

    def _as_units(self):
        unit = self.sizes.unit_bytes
        return self.memory[:len(self.memory) // unit * unit].reshape(-1, unit)

    def _operands(self, data):
        """Activation operands as float32: the low bits of each byte, sign-extended."""
        spare = np.int8(8 - self.sizes.activation.bits)
        return (data.view(np.int8) << spare >> spare).astype(np.float32)

    def _check_load_tile(self, f):
        self._require(f["target"] in TileTarget.__members__.values(), f"target {f['target']} is unknown")
        for name in ("planes", "rows", "cols"):
            self._require(f[name], f"{name} must be at least 1")
        self._require_aligned(f, self.sizes.unit_bytes)

    def _load_tile(self, f):
        z = self.sizes
        units = self._grid(f["address"] // z.unit_bytes, (f["planes"], f["plane_stride"]), (f["rows"], f["row_stride"]),
                           (f["cols"], 1)).ravel()
        self._units(units)
        target = self._grid(f["base"], (f["planes"], f["plane_step"]), (f["rows"], f["row_step"]),
                            (f["cols"], f["col_step"])).ravel()
        vector = self._vector[Unit.LOAD]
        self._reads("memory", units, vector, known=False)
        data = self._as_units()[units]
        self.counts["bytes_read"] += data.size
        if f["target"] == TileTarget.RESIDUAL:
            self._range("residual unit", target.min(), target.max(), z.residual_units)
            self._writes("residual", target, vector)
            self._residual[target] = data.view(np.int8)
        else:
            if (target % z.group_blocks).any():
                self._fail(Error.SCRATCHPAD_RANGE,
                           f"activation blocks of a unit must begin at a multiple of {z.group_blocks}")
            target = target[:, None] + np.arange(z.group_blocks)
            self._range("activation block", target.min(), target.max(), z.activation_blocks)
            self._writes("activation", target, vector)
            self._activation[target] = self._operands(data).reshape(-1, z.group_blocks, z.block)

    def _check_load_linear(self, f):
        self._require(f["target"] in LinearTarget.__members__.values(), f"target {f['target']} is unknown")
        self._require(f["beats"], "beats must be at least 1")
        if f["target"] == LinearTarget.STEP:
            self._require(self.config.structured is not None, "target STEP needs a structured engine")
            whole = self.sizes.step_beats
            self._require(f["beats"] % whole == 0, f"beats must be whole entries of {whole}")
        self._require_aligned(f, self.sizes.beat_bytes)

    def _load_linear(self, f):
        z, at, size = self.sizes, f["address"], f["beats"] * self.sizes.beat_bytes
        if at + size > len(self.memory):
            self._fail(Error.MEMORY_RANGE, f"the transfer of {size} bytes leaves memory ({len(self.memory)} bytes)", at)
        name, table, count = {
            LinearTarget.WEIGHT: ("weight", self._weight, f["beats"]),
            LinearTarget.STEP: ("step", self._steps, f["beats"] // z.step_beats),
            LinearTarget.PARAMETER: ("parameter", self._parameter, f["beats"])}[LinearTarget(f["target"])]
        self._range(self._places[name].name, f["base"], f["base"] + count - 1, len(table))
        vector, where = self._vector[Unit.LOAD], slice(f["base"], f["base"] + count)
        self._reads("memory", slice(at // z.unit_bytes, (at + size) // z.unit_bytes), vector, known=False)
        self._writes(name, where, vector)
        data = self.memory[at:at + size].reshape(count, -1)
        self.counts["bytes_read"] += size
        if name == "step":
            taps = self.config.structured.taps
            words = (int.from_bytes(row[:STEP_BITS // 8].tobytes(), "little") for row in data)
            table[where] = [_unpack_step(word, taps) for word in words]
        else:
            table[where] = data

    def _check_fill(self, f):
        for name in ("rows", "blocks"):
            self._require(f[name], f"{name} must be at least 1")

    def _fill(self, f):
        where = self._grid(f["base"], (f["rows"], f["row_step"]), (f["blocks"], 1)).ravel()
        self._range("activation block", where.min(), where.max(), self.sizes.activation_blocks)
        self._writes("activation", where, self._vector[Unit.LOAD])
        self._activation[where] = self._operands(np.array([f["value"]], np.int8))

    # -- execute unit --------------------------------------------------------------------------------------------------
    def _check_pixels(self, f, rows="rows", cols="cols"):
        for name in (rows, cols):
            self._require(f[name], f"{name} must be at least 1")
        depth = self.sizes.accumulator_depth
        self._require(f[rows] * f[cols] <= depth, f"{rows} * {cols} must be at most {depth}")

    def _check_execute(self, f):
        self._check_pixels(f)
        self._require(f["steps"], "steps must be at least 1")
        self._require(f["step"] + f["steps"] <= len(self._steps),
                      f"steps must end within the {len(self._steps)} entries")
        self._require(f["operation"] in Operation.__members__.values(), f"operation {f['operation']} is unknown")

    def _step_fields(self, f):
        """The step entries of an EXECUTE as named int64 columns, checked."""
        s, z, vector = self.config.structured, self.sizes, self._vector[Unit.EXECUTE]
        where = slice(f["step"], f["step"] + f["steps"])
        self._reads("step", where, vector)
        rows, taps = self._steps[where], s.taps
        offset, enable, (n_log2, segments_log2, hold) = rows[:, :taps], rows[:, taps:2 * taps], rows[:, 2 * taps:].T
        known = np.isin(1 << n_log2, [p.n for p in s.patterns])
        self._require(known.all(), f"step {np.argmin(known)} must name a supported pattern, not n_log2 "
                      f"{n_log2[np.argmin(known)]}")
        length = np.array([z.fetch_blocks(1 << n) for n in n_log2.tolist()]) >> segments_log2
        good = (1 << segments_log2 <= taps) & (length >= 1)
        self._require(good.all(), f"step {np.argmin(good)} has more segments than the fetch")
        return offset, enable.astype(bool), 1 << n_log2, segments_log2, hold.astype(bool), length

    def _tiles(self, f, n, hold):
        """Tiles of an EXECUTE: {N: (matrices, non-zeros per tile, largest absolute column sum per tile)} and each
        step's place in its matrices."""
        z, s, vector = self.sizes, self.config.structured, self._vector[Unit.EXECUTE]
        loaded = [v for v, held in zip(n.tolist(), hold.tolist()) if not held]
        total = sum(z.tile_beats(v) for v in loaded)
        if loaded:
            self._range("weight beat", f["weight"], f["weight"] + total - 1, z.weight_beats)
            self._reads("weight", slice(f["weight"], f["weight"] + total), vector)
        data = self._weight[f["weight"]:f["weight"] + total]
        key = (tuple(loaded), data.tobytes())
        sets = self._tile_sets.pop(key, None)
        if sets is None:
            beats = np.array([z.tile_beats(v) for v in loaded], np.int64)
            start, sets, kinds = np.cumsum(beats) - beats, {}, np.array(loaded)
            for kind in sorted(set(loaded)):
                where = start[kinds == kind][:, None] + np.arange(z.tile_beats(kind))
                values, indices = unpack_tiles(data[where].tobytes(), self.config, kind)
                try:
                    dense = spread(values, indices, self.config, kind)
                except ValueError as error:
                    self._fail(Error.NONE, str(error))
                sets[kind] = (dense, np.count_nonzero(values, axis=(1, 2)), np.abs(dense).sum(axis=1).max(axis=1))
        self._tile_sets[key] = sets
        while len(self._tile_sets) > _TILE_SETS:
            self._tile_sets.popitem(last=False)
        place, count, now, extra = np.zeros(len(n), np.int64), Counter(), None, None
        for step, (kind, held) in enumerate(zip(n.tolist(), hold.tolist())):
            if not held:
                now = (kind, count[kind])
                count[kind] += 1
            elif now is None:                                    # the last tile of the EXECUTE before
                if self._held is None:
                    self._fail(Error.NONE, "hold without any tile before it")
                extra = now = (self._held[0], -1)
            if now[0] != kind:
                self._fail(Error.NONE, f"step {step} holds a tile of {now[0]}:{s.block} as {kind}:{s.block}")
            place[step] = now[1]
        if extra:                                                # append it, so that place -1 finds it
            kind, tile = self._held
            have = sets.get(kind)
            joined = tile if have is None else tuple(np.concatenate(pair) for pair in zip(have, tile))
            sets = sets | {kind: joined}
        self._held = (now[0], tuple(a[now[1]][None] for a in sets[now[0]]))
        return sets, place

    def _execute(self, f):
        s, z, vector = self.config.structured, self.sizes, self._vector[Unit.EXECUTE]
        bank, fmt = f["bank"], z.accumulator
        offset, enable, n, segments_log2, hold, length = self._step_fields(f)
        sets, place = self._tiles(f, n, hold)
        pixels = self._grid(f["base"], (f["rows"], f["row_step"]), (f["cols"], f["col_step"])).ravel()
        self._check_stream(pixels, offset, enable, segments_log2, length)
        self._writes("accumulator", [bank], vector)
        if f["accumulate"] and self._filled[bank] < len(pixels):
            self._fail(Error.NONE, f"accumulator bank {bank} is added to but was never written")
        before = self._accumulator[bank, :len(pixels)] if f["accumulate"] else None
        bound = 0 if before is None else int(np.abs(before).max())
        bound += sum(int(sets[k][2][place[n == k]].sum(dtype=np.float64)) for k in set(n.tolist())) * -z.activation.lo
        stepwise = f["operation"] == Operation.MAX or bound > fmt.hi
        sums = np.zeros((len(n), len(pixels), s.columns), np.int64) if stepwise else 0
        self.counts["pixel_steps"] += len(n) * len(pixels)
        for kind, segments in sorted(set(zip(n.tolist(), segments_log2.tolist()))):
            matrices, nonzeros, largest = sets[kind]
            (chosen,) = np.nonzero((n == kind) & (segments_log2 == segments))
            # As many steps at once as keep every float32 sum exact.
            worst = max(1.0, float(largest[place[chosen]].max()) * -z.activation.lo)
            at_once = max(1, int((_FLOAT32_EXACT - 1) // worst))
            for at in range(0, len(chosen), at_once):
                steps = chosen[at:at + at_once]
                tiles = matrices[place[steps]]
                fetch = self._gather(pixels, offset[steps, :1 << segments], enable[steps, :1 << segments],
                                     int(length[steps[0]]), tiles)
                if stepwise:
                    sums[steps] = np.matmul(fetch.swapaxes(0, 1), tiles)
                else:
                    sums = sums + (fetch.reshape(len(pixels), -1) @ tiles.reshape(-1, s.columns)).astype(np.int64)
            if f["operation"] == Operation.ADD:
                self.counts["macs"] += int(nonzeros[place[chosen]].sum()) * len(pixels)
        if stepwise:
            result = before
            for step in sums:
                result = step if result is None else np.maximum(result, step) if f["operation"] == Operation.MAX else \
                    result + step
                self._check_accumulators(result, fmt)
        else:
            result = sums if before is None else before + sums
            self._check_accumulators(result, fmt)
        self._accumulator[bank, :len(pixels)] = result
        # Sums of pixels beyond these belong to an earlier output tile.
        if not f["accumulate"]:
            self._filled[bank] = len(pixels)

    def _check_accumulators(self, values, fmt):
        if values.min() < fmt.lo or values.max() > fmt.hi:
            pixel, column = np.argwhere((values < fmt.lo) | (values > fmt.hi))[0]
            self._fail(Error.ACCUMULATOR_OVERFLOW, f"pixel {pixel}, column {column}: {values[pixel, column]} leaves "
                       f"{fmt.bits} bits")

    def _check_stream(self, pixels, offset, enable, segments_log2, length):
        """STREAM_ADDRESS: every enabled segment aligned, in range, and alone in its banks."""
        z = self.sizes
        enable = enable & (np.arange(enable.shape[1]) < 1 << segments_log2[:, None])
        last = int(pixels.max()) + np.where(enable, offset + length[:, None], 0).max(axis=1)
        good = last <= z.activation_blocks
        self._require(good.all(), f"step {np.argmin(good)} fetches block {last.max() - 1}, beyond "
                      f"{z.activation_blocks - 1}", Error.STREAM_ADDRESS)
        for size in set(length.tolist()):
            phases = np.unique(pixels % size)[:, None, None]
            odd = ((phases + offset) % size != 0) & enable & (length == size)[:, None]
            self._require(not odd.any(), f"step {np.argmax(odd.any(axis=(0, 2)))} fetches from an address that is no "
                          f"multiple of {size}", Error.STREAM_ADDRESS)
        # Segment addresses of one pixel differ by their offsets alone, and are multiples of the length: they meet in a
        # bank exactly if the offsets are equal modulo the banks.
        for a in range(enable.shape[1]):
            for b in range(a):
                meet = enable[:, a] & enable[:, b] & ((offset[:, a] - offset[:, b]) % z.banks == 0)
                self._require(not meet.any(), f"segments {b} and {a} of step {np.argmax(meet)} meet in a bank",
                              Error.STREAM_ADDRESS)

    def _gather(self, pixels, offset, enable, length, tiles):
        """Fetches of all pixels and steps, float32 [pixels, steps, fetch_blocks * block]."""
        steps, blocks = len(tiles), offset.shape[1] * length
        used = tiles.reshape(steps, blocks, -1).any(axis=2)                       # [steps, blocks]
        off = (offset[:, :, None] + np.arange(length)).reshape(steps, blocks)
        on = np.repeat(enable, length, axis=1)
        if (used & ~on).any():
            self._fail(Error.NONE, "a slot on a disabled segment holds a weight other than 0")
        where = pixels[:, None, None] + off
        self._reads("activation", where[:, used], self._vector[Unit.EXECUTE])
        where[:, ~on] = 0                                        # weights are 0 there: any value will do
        return np.take(self._activation, where.reshape(len(pixels), -1), axis=0).reshape(len(pixels), steps, -1)

    # -- execute unit: basis engine ------------------------------------------------------------------------------------
    def _check_execute_basis(self, f):
        self._require(f["mode"] in Mode.__members__.values(), f"mode {f['mode']} is unknown")
        for name in ("in_rows", "in_cols", "kernel_rows", "kernel_cols", "dilation_rows", "dilation_cols", "groups"):
            self._require(f[name], f"{name} must be at least 1")
        self._check_pixels(f, "out_rows", "out_cols")
        self._require(f["kernel_rows"] <= isa.MAX_KERNEL_ROWS, f"kernel_rows must be at most {isa.MAX_KERNEL_ROWS}")
        self._require(f["operation"] in Operation.__members__.values(), f"operation {f['operation']} is unknown")
        if f["mode"] == Mode.DECOMPOSED and self.config.basis.coefficients == "series":
            self._require(1 <= f["terms"] <= isa.SERIES_TERMS, f"terms must be in 1..{isa.SERIES_TERMS}")

    def _basis_terms(self, f):
        """N of the terms of a DECOMPOSED pass with a series, else ()."""
        series = f["mode"] == Mode.DECOMPOSED and self.config.basis.coefficients == "series"
        return tuple(1 << n for n in f["n_log2"][:f["terms"]]) if series else ()

    def _check_basis_fields(self, f):
        """ILLEGAL_FIELD: what the engine itself refuses. Returns the rows of taps that the pass uses."""
        b, z, terms = self.config.basis, self.sizes, self._basis_terms(f)
        reach = (f["kernel_cols"] - 1) * f["dilation_cols"] + 1
        self._require(reach <= b.window, f"kernel_cols reach over {reach} pixels, more than the window of {b.window}")
        self._require(f["pad_left"] < reach, f"pad_left must be below {reach}, the reach of the kernel's columns")
        self._require(f["pad_top"] <= (f["kernel_rows"] - 1) * f["dilation_rows"],
                      "pad_top must be below the reach of the kernel's rows")
        rows = f["groups"] if f["mode"] == Mode.POINTWISE else f["kernel_rows"] * ceil_div(f["kernel_cols"],
                                                                                          b.multipliers)
        self._require(rows <= b.tap_rows, f"the pass needs {rows} rows of taps, more than {b.tap_rows}")
        self._require(f["taps"] <= b.tap_rows, f"taps must be at most {b.tap_rows}")
        self._require(all(n <= b.group for n in terms), f"n_log2 must name N of at most {b.group}, not {terms}")
        if f["mode"] == Mode.DECOMPOSED:
            self._require(f["groups"] <= z.coefficient_groups, f"groups must be at most {z.coefficient_groups}")
            words = series_words(f["groups"], terms, self.config) if terms else map_words(f["groups"], self.config)
            self._require(words <= b.coefficient_rows, f"a pixel takes {words} stream words, more than "
                          f"{b.coefficient_rows} rows of coefficients")
        if f["mode"] == Mode.POINTWISE:
            plain = {"kernel_rows": 1, "kernel_cols": 1, "pad_top": 0, "pad_left": 0, "stride_rows_log2": 0,
                     "stride_cols_log2": 0, "out_rows": f["in_rows"], "out_cols": f["in_cols"]}
            for name, value in plain.items():
                self._require(f[name] == value, f"{name} must be {value} in mode POINTWISE, not {f[name]}")
        return rows

    def _load_basis(self, f, rows):
        """Load the taps and coefficients of a pass, or keep those before: (taps [rows, ..], coefficients or None)."""
        z, vector, terms = self.sizes, self._vector[Unit.EXECUTE], self._basis_terms(f)
        decomposed = f["mode"] == Mode.DECOMPOSED
        split = f["weight"] + f["taps"] * z.tap_row_beats
        if end := split + f["coefficients"] - f["weight"]:
            self._range("weight beat", f["weight"], f["weight"] + end - 1, z.weight_beats)
            self._reads("weight", slice(f["weight"], f["weight"] + end), vector)
        try:
            if f["taps"]:
                self._taps = unpack_taps(self._weight[f["weight"]:split].tobytes(), self.config)
            if f["coefficients"]:
                if not decomposed:
                    raise ValueError(f"coefficients must be loaded by a DECOMPOSED pass, not {Mode(f['mode']).name}")
                self._coefficients = self._decode(self._weight[split:split + f["coefficients"]].tobytes(), f["groups"],
                                                  terms)
        except ValueError as error:
            self._fail(Error.NONE, str(error))
        have = 0 if self._taps is None else len(self._taps)
        if have < rows:
            self._fail(Error.NONE, f"{rows} rows of taps are read but {have} were loaded")
        if not decomposed:
            return self._taps[:rows], None
        if self._coefficients is None:
            self._fail(Error.NONE, "coefficients are read but were never loaded")
        coefficients, *loaded = self._coefficients
        if loaded != [f["groups"], terms]:
            self._fail(Error.NONE, f"the coefficients kept are for (groups, terms) {tuple(loaded)}, not "
                       f"{(f['groups'], terms)}")
        return self._taps[:rows], coefficients

    def _decode(self, data, groups, terms):
        """(coefficients, groups, terms) from memory; decoded ones are kept, like tiles."""
        key = (data, groups, terms)
        coefficients = self._tile_sets.pop(key, None)
        if coefficients is None:
            coefficients = unpack_series(data, self.config, terms, groups) if terms else \
                unpack_maps(data, self.config, groups)
        self._tile_sets[key] = coefficients
        while len(self._tile_sets) > _TILE_SETS:
            self._tile_sets.popitem(last=False)
        return coefficients, groups, terms

    def _basis_pixels(self, f, needed):
        """Activations less the zero point of input rows ``needed``: float32 [pixels, groups read, group]."""
        z, groups = self.sizes, 1 if f["mode"] == Mode.DENSE else f["groups"]
        at = f["base"] + needed[:, None] * f["row_step"] + np.arange(f["streamed"]) * f["col_step"]
        last = int(at.max()) + groups * z.group_blocks - 1
        self._require(last < z.activation_blocks, f"the pass reads block {last}, beyond {z.activation_blocks - 1}",
                      Error.STREAM_ADDRESS)
        where = at.reshape(-1, 1) + np.arange(groups * z.group_blocks)
        self._reads("activation", where, self._vector[Unit.EXECUTE])
        return np.take(self._activation, where, axis=0).reshape(len(where), groups, -1) - np.float32(f["zero_point"])

    def _intermediates(self, f, pixels, coefficients):
        """IR of all slices, saturated: float32 [pixels, blocks * slices]."""
        fmt = self.sizes.intermediate
        if self.record_cycles and self.config.basis.coefficients == "maps":
            b = self.config.basis
            cycles = pixel_word_cycles(pixels != 0, coefficients, stream_groups=b.stream_groups,
                                       look_aside=b.look_aside)
            self.basis_word_cycles[self._pc] = cycles.reshape(-1, f["streamed"], cycles.shape[1])
        # Exact: at most 255 groups of 16 values of at most 255.
        matrix = coefficients.reshape(self.sizes.basis_slices, -1).T.astype(np.float32)
        sums = pixels.reshape(len(pixels), -1) @ matrix
        held = np.clip(sums, fmt.lo, fmt.hi)
        self.counts["saturations"] += int(np.count_nonzero(held != sums))
        self.counts["adds"] += int(np.count_nonzero(coefficients)) * len(pixels)
        return held

    def _execute_basis(self, f):
        b, z, bank, mode = self.config.basis, self.sizes, f["bank"], f["mode"]
        rows = self._check_basis_fields(f)
        # Columns behind the last that any output needs are not streamed.
        reach = (f["kernel_cols"] - 1) * f["dilation_cols"] + 1
        f = f | {"streamed": min(f["in_cols"], (f["out_cols"] - 1 << f["stride_cols_log2"]) + reach - f["pad_left"])}
        taps, coefficients = self._load_basis(f, rows)
        for name in ("base", "row_step", "col_step"):
            self._require(f[name] % z.group_blocks == 0, f"{name} must be a multiple of {z.group_blocks}, not "
                          f"{f[name]}", Error.STREAM_ADDRESS)
        # Input row of each output row and kernel row, and which of them are there.
        top = (np.arange(f["out_rows"]) << f["stride_rows_log2"]) - f["pad_top"]
        source = top[:, None] + np.arange(f["kernel_rows"]) * f["dilation_rows"]
        valid = (source >= 0) & (source < f["in_rows"])
        if not f["accumulate"] and not valid.any(axis=1).all():
            self._fail(Error.NONE, f"output row {np.argmin(valid.any(axis=1))} has no contribution")
        needed = np.unique(source[valid])
        self._writes("accumulator", [bank], self._vector[Unit.EXECUTE])
        count = f["out_rows"] * f["out_cols"]
        if f["accumulate"] and self._filled[bank] < count:
            self._fail(Error.NONE, f"accumulator bank {bank} is added to but was never written")
        if not needed.size:
            return
        pixels = self._basis_pixels(f, needed)
        steps = rows if mode == Mode.POINTWISE else rows // f["kernel_rows"]
        self.counts["pixel_steps"] += steps * int(valid.sum()) * f["out_cols"]
        if f["operation"] == Operation.ADD:
            per_row = np.count_nonzero(taps.reshape(1 if mode == Mode.POINTWISE else f["kernel_rows"], -1), axis=1)
            self.counts["macs"] += int((valid * per_row).sum()) * f["out_cols"]
        if mode == Mode.POINTWISE:
            products = self._pointwise(pixels, taps).reshape(len(needed), f["out_cols"], 1, b.blocks)
        else:
            if mode == Mode.DENSE:
                value = np.zeros((len(pixels), b.slices), np.float32)
                part = pixels[:, 0, f["channel"]:f["channel"] + b.slices]
                value[:, :part.shape[1]] = part
                value = np.broadcast_to(value[:, None], (len(pixels), b.blocks, b.slices))
            else:
                value = self._intermediates(f, pixels, coefficients)
            products = self._kernel_rows(f, value.reshape(len(needed), f["streamed"], b.blocks, b.slices), taps)
        place = np.searchsorted(needed, np.where(valid, source, needed[0]))
        self._contribute(f, products, source, valid, place)
        if not f["accumulate"]:
            self._filled[bank] = count

    def _pointwise(self, pixels, taps):
        """Sums over all groups and positions: float64 [pixels, blocks]; multipliers beyond a group get 0."""
        b = self.config.basis
        weight = taps.transpose(0, 2, 3, 1).reshape(len(taps), b.slices * b.multipliers, b.blocks)
        matrix = weight[:, :b.group].reshape(-1, b.blocks)
        return pixels.reshape(len(pixels), -1).astype(np.float64) @ matrix.astype(np.float64)

    def _kernel_rows(self, f, value, taps):
        """Sum over m and s of each kernel row on each input row: float64 [rows, out_cols, kernel_rows, blocks].

        ``value``: [rows, streamed columns, blocks, slices]; what lies left and right of it is 0.
        """
        b, kernel = self.config.basis, (f["kernel_rows"], f["kernel_cols"])
        line = taps.reshape(kernel[0], -1, b.blocks, b.slices, b.multipliers).transpose(2, 3, 0, 1, 4)
        line = line.reshape(b.blocks, b.slices, kernel[0], -1)
        if line[..., kernel[1]:].any():
            self._fail(Error.NONE, f"taps from column {kernel[1]} of a kernel row on must be 0")
        stride, used = 1 << f["stride_cols_log2"], line[..., :kernel[1]].any(axis=(0, 2, 3))
        line, value = line[:, used], value[..., used]             # slices without taps: nothing to multiply
        out = np.zeros((b.blocks, len(value) * f["out_cols"], kernel[0]))
        source = np.arange(f["out_cols"]) * stride - f["pad_left"]
        window = np.zeros((b.blocks, len(value), f["out_cols"], kernel[1], line.shape[1]))
        for s in range(kernel[1]):
            at = source + s * f["dilation_cols"]
            inside = (at >= 0) & (at < f["streamed"])
            window[:, :, inside, s] = value[:, at[inside]].transpose(2, 0, 1, 3)
        # Exact: basis_sum has far fewer than 53 bits.
        matrix = line[..., :kernel[1]].transpose(0, 3, 1, 2).reshape(b.blocks, -1, kernel[0]).astype(np.float64)
        np.matmul(window.reshape(b.blocks, len(value) * f["out_cols"], -1), matrix, out=out)
        return out.reshape(b.blocks, len(value), f["out_cols"], kernel[0]).transpose(1, 2, 3, 0)

    def _contribute(self, f, products, source, valid, place):
        """Bring the contributions into the accumulators, kernel row after kernel row.

        ``products``: [needed rows, out_cols, kernel_rows, blocks]; source, valid, place [out_rows, kernel_rows]: input
        row, whether it is there, its index among the needed rows. An output's contributions arrive by rising r.
        """
        z, fmt, shape = self.sizes, self.sizes.accumulator, (f["out_rows"], f["out_cols"])
        bank = self._accumulator[f["bank"], :shape[0] * shape[1]]
        now = bank.reshape(*shape, -1).copy() if f["accumulate"] else np.zeros((*shape, z.columns), np.int64)
        begun, bad = np.full(shape[0], bool(f["accumulate"])), []
        for r in range(f["kernel_rows"]):
            some = valid[:, r]
            term = np.zeros((int(some.sum()), shape[1], z.columns), np.int64)
            term[..., :products.shape[3]] = products[place[some, r], :, r]
            before, first = now[some], ~begun[some][:, None, None]
            joined = np.maximum(before, term) if f["operation"] == Operation.MAX else before + term
            now[some] = joined = np.where(first, term, joined)
            begun |= some
            if joined.size and (joined.min() < fmt.lo or joined.max() > fmt.hi):
                row, col, column = np.nonzero((joined < fmt.lo) | (joined > fmt.hi))
                pixel = np.nonzero(some)[0][row] * shape[1] + col
                bad += zip(source[some, r][row].tolist(), col.tolist(), [r] * len(row), column.tolist(),
                           pixel.tolist(), joined[row, col, column].tolist())
        if bad:                                                   # the first in the order of the hardware
            y, _, r, column, pixel, value = min(bad)
            self._fail(Error.ACCUMULATOR_OVERFLOW, f"pixel {pixel}, column {column}: {value} leaves {fmt.bits} bits "
                       f"with kernel row {r} on input row {y}")
        bank[:] = now.reshape(bank.shape)

    # -- store unit ----------------------------------------------------------------------------------------------------
    def _check_store(self, f):
        self._check_pixels(f)
        self._require(f["low"] <= f["high"], "low must be at most high")
        self._require_aligned(f, self.sizes.unit_bytes)
        self._require(f["parameter"] + self.sizes.parameter_beats <= self.sizes.parameter_words,
                      f"parameters must end within the {self.sizes.parameter_words} beats")

    def _store(self, f):
        z, vector, bank = self.sizes, self._vector[Unit.STORE], f["bank"]
        units = self._grid(f["address"] // z.unit_bytes, (f["rows"], f["row_stride"]), (f["cols"], 1)).ravel()
        self._units(units)
        where = slice(f["parameter"], f["parameter"] + z.parameter_beats)
        self._reads("parameter", where, self._early)
        words = self._parameter[where].ravel()[:z.columns * PARAMETER_BITS // 8].view("<u8")
        columns = [column_parameters().unpack(int(w)) for w in words]
        residual = None
        if f["residual"]:
            first, last = f["residual_base"], f["residual_base"] + len(units)
            self._range("residual unit", first, last - 1, z.residual_units)
            self._reads("residual", slice(first, last), vector)
            residual = self._residual[first:last]
        self._reads("accumulator", [bank], vector)
        if self._filled[bank] < len(units):
            self._fail(Error.NONE, f"accumulator bank {bank} holds {self._filled[bank]} pixels, "
                       f"{len(units)} are stored")
        if any(c["reserved"] for c in columns):
            self._fail(Error.NONE, "reserved bits of column parameters must be 0")
        out = requantize(
            self._accumulator[bank, :len(units)], residual=residual,
            **{name: np.array([c[name] for c in columns]) for name in ("bias", "multiplier", "shift")},
            **{name: f[name] for name in ("zero_point", "low", "high", "residual_zero_point", "residual_multiplier")})
        at = units * z.unit_bytes
        if ((at < self._program[1]) & (at + z.unit_bytes > self._program[0])).any():
            self._fail(Error.NONE, "the program is overwritten while it runs")
        self._writes("memory", units, vector)
        self._as_units()[units] = out.view(np.uint8)
        self.counts["bytes_written"] += out.size
