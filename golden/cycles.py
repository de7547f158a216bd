"""The cycle model: every cycle of a program, from its instructions, the memory image and the latency of memory alone.

It gives the hardware's own numbers: all counters of `spec.registers.COUNTERS` and the time of every BARRIER, to the
cycle. sim_tests/golden/test_cycles_rtl.py and sim_tests/soak/cycles.py compare it with the RTL.

**Time** is counted from the cycle in which the bus takes the write that starts the program (0).

**Memory** as in sim_tests/bench/harness.cpp without random stalls: addresses are taken at once; bursts answer in order,
each not before ``latency`` cycles after its address, one beat per cycle, without gaps; a write is acknowledged
``latency`` cycles after its last beat.

**How it works.** Every unit of the hardware does one thing after another, so the time of each event is the largest of a
few earlier times plus constants: a network of queues whose only choice is at the read address bus, where a fetch goes
before a load. So each unit runs as far as the times it needs are known; then the next burst is issued, whoever of fetch
and load is first, which makes further times known. The grain is the instruction, the burst, and in an EXECUTE the run
of equal steps; within these, closed forms.

* **Fetch**: requests of half the fetch queue as soon as as many places are free; an instruction reaches the queue with
  its last beat.
* **Command**: takes an instruction out of the queue, checks it in the next cycle, hands it over as soon as its unit's
  queue has room: two cycles each. BARRIER and END wait for two cycles in a row without work anywhere.
* **Load, addresses**: takes an instruction (tokens, room behind), a cycle to size it, then a request per cycle, as fast
  as bursts are issued. **Load, data**: takes the next instruction the cycle after the last, then a unit (LOAD_TILE), a
  beat (LOAD_LINEAR) or a row of banks (FILL) per cycle.
* **Read bus**: one burst per cycle, ``outstanding_reads`` from issue to the last beat's use; a beat that is not used
  stops those behind it, two cycles later.
* **Execute**: a step is offered ``n + 1`` cycles after its n beats of weights can begin: 3 cycles after the step
  before began, and 4 after the last tile was swapped in. It takes a cycle per pixel. (The second cycle of a single
  pixel hides behind the table read, as no step follows another within less than 3.)
* **Execute**, basis engine: see `golden.basis_cycles`. An engine begins when the other has nothing left to do.
* **Store**: parameters are read ahead; a run begins when the one before has left the requantiser. A pixel per cycle
  through a pipeline that stops as a whole while a beat waits for its burst to be issued; a burst per cycle is issued,
  ``outstanding_writes`` from issue to acknowledgement.

**Limits**: programs without errors, in which tokens and barriers order what depends on each other (`golden.machine`
finds both kinds of fault); step tables and map coefficients that the program does not make itself; no random memory
stalls; no watchdog.
"""
from collections import deque
from dataclasses import dataclass

import numpy as np

from golden.basis_cycles import BasisEngine, Geometry, segment_words
from spec import isa
from spec.derive import INSTRUCTION_BITS, STEP_BITS, Sizes
from spec.formats import step_entry
from spec.isa import LinearTarget, Opcode, Unit
from spec.registers import COUNTERS

#: From the start register's write to the cycle in which the units see the start (one: the write acts).
BEGIN = 1
#: From a request to its first burst on offer (register of the splitter), and from there to its address on the bus.
SPLIT, ADDRESS = 1, 1
#: From a beat on the bus to the unit that uses it (register slice).
DATA = 1
#: From a load's acceptance to its first request: a cycle to size it.
SIZE = 2
#: Rows of a tile that follow one another are one request, unless there are both so many rows and so many columns.
MERGE_ROWS, MERGE_COLS = 64, 256
#: Instructions between the two halves of the load unit.
LOAD_PENDING = 4
#: From the last word written by a load to its token being there: one register, one in the token counter.
LOAD_TOKEN = 2
#: From the acceptance of a step to the first weight beat of the next: table read, entry, first beat.
STEP_TABLE = 3
#: From the acceptance of a step to the shadow weights being free again: issue, address, scratchpad, swap.
STEP_SWAP = 4
#: From the last weight beat's read to the step's offer: one cycle until it has arrived.
STEP_OFFER = 2
#: From the issue of a pixel to its accumulator: address, scratchpad, array, accumulator, token.
EXECUTE_LATENCY = 7
#: Stages of the requantiser; pixels in it, and the two before it (the accumulator's register), move together.
REQUANTIZE = 4
#: From the last used beat on the write bus's input to the bus, and from a response to the token it causes.
WRITE_DATA, STORE_TOKEN = 1, 2
#: From END to the interrupt (event, status register).
INTERRUPT = 1

_NEVER = 1 << 62
_PAGE_BYTES = 4096
_UNITS = (Unit.LOAD, Unit.EXECUTE, Unit.STORE)
_NAMES = {unit: unit.name.lower() for unit in _UNITS}
#: Places of fields in the instruction words: {opcode: [(name, lowest bit, mask)]}; all used ones are unsigned.
_FIELDS = {op: [(f.name, record.offset(f.name), (1 << f.bits) - 1) for f in record.fields if f.name != "reserved"]
           for op, record in isa.INSTRUCTIONS.items()}
#: Fields of EXECUTE_BASIS that its geometry comes from.
_GEOMETRY = ("mode", "in_rows", "in_cols", "out_rows", "out_cols", "pad_top", "pad_left", "kernel_rows", "kernel_cols",
             "stride_rows_log2", "stride_cols_log2", "dilation_rows", "dilation_cols", "groups", "terms", "n_log2")
_EXECUTE_STATES = ("EXECUTE_IDLE", "EXECUTE_ISSUE", "EXECUTE_WAIT_LOAD", "EXECUTE_WAIT_STORE", "EXECUTE_WAIT_WEIGHTS",
                   "EXECUTE_WAIT_COEFFICIENTS")


@dataclass(frozen=True, kw_only=True)
class Event:
    """One instruction: when its unit took it (tokens included) and when it had ended, in cycles from start.

    Control instructions: both are the cycle in which it left the command processor.
    """

    pc: int
    opcode: Opcode
    unit: Unit
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Segment:
    """What happened up to a BARRIER since the one before (or start): why those cycles were spent.

    ``execute``: cycles by state: idle, issue, wait for load, wait for store, wait for weights, wait for coefficients
    (the order of the port ``trace_execute``). ``load_busy`` and ``store_busy``: cycles of the other units' work in the
    same time.
    """

    mark: int
    cycle: int
    read_beats: int
    write_beats: int
    execute: tuple
    load_busy: int
    store_busy: int


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What `predict` returns.

    cycles: from the write of the start register to the interrupt (the counter CYCLES is two less, it begins one cycle
    after the start and ends with END). counters: the counter registers of `spec.registers.COUNTERS` by name.
    events: one `Event` per instruction. marks: ((mark, cycle), ...) of the BARRIERs. segments: one `Segment` for each.
    """

    cycles: int
    counters: dict
    events: tuple
    marks: tuple
    segments: tuple

    @property
    def utilization(self):
        """Issue cycles of the array as a fraction of all cycles: executed / possible multiplications."""
        return self.counters["EXECUTE_ISSUE"] / self.cycles if self.cycles else 0.0


def program_words(config, memory, offset, count):
    """The ``count`` instruction words of a program in a memory image. Raises ValueError if it leaves the image."""
    sizes, data = Sizes(config), np.frombuffer(memory, np.uint8)
    stride = sizes.instruction_beats * sizes.beat_bytes
    if offset < 0 or offset + count * stride > len(data):
        raise ValueError(f"The program must lie in memory ({len(data)} bytes)")
    return [int.from_bytes(data[at:at + INSTRUCTION_BITS // 8].tobytes(), "little")
            for at in range(offset, offset + count * stride, stride)]


def predict(config, program_words, memory, *, memory_latency_cycles=16, write_latency_cycles=None, program_offset=None,
            word_cycles=None, saturations=0):
    """Cycles of a program.

    Args:
        config: `spec.config.Config`. program_words: 256-bit words, HEADER to END (see `program_words`).
        memory: the memory image (bytes or uint8 array): step entries decide how long an EXECUTE takes.
        memory_latency_cycles: from a read address on the bus to its first beat, at least 1. write_latency_cycles: from
            the last write beat to its response; like the other unless given.
        program_offset: bytes, a multiple of the beat: where the program lies, for a burst ends at 4 KiB. None: where
            the image holds these words, 0 if it does not.
        word_cycles: maps only, {instruction number: cycles of each stream word [rows, columns, words]} as
            `golden.machine.Machine` records them, for they depend on the data. An instruction that is not in it, or
            None: each word takes one cycle, and what is predicted is a lower bound.
        saturations: what the counter SATURATIONS is going to show; it depends on the data alone.
    Returns: `Prediction`.
    Raises: ValueError for a latency below 1 and for a program that is not one: unknown operation, a wait without token,
        no END, a step that no instruction loads or whose pattern the configuration does not have.
    """
    write_latency = memory_latency_cycles if write_latency_cycles is None else write_latency_cycles
    if min(memory_latency_cycles, write_latency) < 1:
        raise ValueError(f"Memory latency must be at least 1 cycle, not {min(memory_latency_cycles, write_latency)}")
    memory = np.frombuffer(memory, np.uint8)
    words = [int(word) for word in program_words]
    program = _Program(config, words, memory)
    for i in program.instructions:
        i.word_cycles = (word_cycles or {}).get(i.pc)
    if program_offset is None:
        program_offset = _find(Sizes(config), words, memory)
    return _Run(config, program, program_offset, memory_latency_cycles, write_latency).simulate(saturations)


def _find(sizes, words, memory):
    """Byte offset of the words in a memory image; 0 if they are not there."""
    stride = sizes.instruction_beats * sizes.beat_bytes
    wanted = b"".join(word.to_bytes(stride, "little") for word in words)
    data, at = memory.tobytes(), -1
    while (at := data.find(wanted, at + 1)) >= 0:
        if at % sizes.beat_bytes == 0:
            return at
    return 0


class _Instruction:
    """One instruction as the units see it."""

    __slots__ = ("pc", "opcode", "unit", "f", "waits", "pushes", "bursts", "last_request", "cycles", "beats", "groups",
                 "geometry", "segments", "word_cycles", "begin", "end", "ready")

    def __init__(self, pc, opcode, f):
        self.pc, self.opcode, self.unit, self.f = pc, opcode, isa.UNIT_OF[opcode], f
        #: Load: [(beats, units of the first beat, units of the others, units of the last)], the first burst of the last
        #: request, cycles of writing, beats read. Execute: [(steps, tile beats or -1 for held)].
        self.bursts, self.last_request, self.cycles, self.beats, self.groups = (), 0, 0, 0, ()
        #: EXECUTE_BASIS: see `golden.basis_cycles`.
        self.geometry = self.segments = self.word_cycles = None
        self.begin = self.end = self.ready = 0


class _Program:
    """Instructions with everything that does not depend on time."""

    def __init__(self, config, words, memory):
        self.config, self.sizes, self.memory = config, Sizes(config), memory
        z = self.sizes
        structured, maps = config.structured, config.basis is not None and config.basis.coefficients == "maps"
        if structured is not None:
            self.record = step_entry(structured.taps)
            self.patterns = {p.n.bit_length() - 1: z.tile_beats(p.n) for p in structured.patterns}
        #: Maps: the weight buffer as it stands now, for their segments decide how long a load takes.
        self.weights = np.zeros((z.weight_beats, z.beat_bytes), np.uint8) if maps else None
        self._geometries = {}
        #: Tile beats of each entry of the step table as it stands now; -1 held, -2 unknown pattern, -3 not loaded.
        self.table = np.full(config.memory.step_entries, -3, np.int64)
        self.instructions, tokens, self._groups = [], {(a, b): 0 for a in _UNITS for b in _UNITS}, {}
        for pc, word in enumerate(words):
            code = word & 0xF
            if code not in _FIELDS:
                raise ValueError(f"Instruction {pc} must have a known operation code")
            opcode = Opcode(code)
            if opcode is Opcode.EXECUTE and structured is None or \
                    opcode is Opcode.EXECUTE_BASIS and config.basis is None:
                raise ValueError(f"Instruction {pc} must not be {opcode.name}, for which there is no engine")
            i = _Instruction(pc, opcode, {name: word >> at & mask for name, at, mask in _FIELDS[opcode]})
            self._check_tokens(i, tokens)
            self.instructions.append(i)
            if opcode is Opcode.LOAD_TILE:
                self._tile(i)
            elif opcode is Opcode.LOAD_LINEAR:
                self._linear(i)
            elif opcode is Opcode.FILL:
                rows = (i.f["base"] + np.arange(i.f["rows"]) * i.f["row_step"]) % z.banks
                i.cycles = int((-(-(rows + i.f["blocks"]) // z.banks)).sum())
            elif opcode is Opcode.EXECUTE:
                i.groups = self._steps(i)
            elif opcode is Opcode.EXECUTE_BASIS:
                self._basis(i)
            elif opcode is Opcode.END:
                break
        if not self.instructions or self.instructions[-1].opcode is not Opcode.END:
            raise ValueError("Program must end with END")
        #: The hardware fetches what lies behind END, too.
        self.count = len(words)

    @staticmethod
    def _check_tokens(i, tokens):
        i.waits, i.pushes = [], []
        for unit in _UNITS:
            if i.f[f"wait_{_NAMES[unit]}"]:
                if not tokens[unit, i.unit]:
                    raise ValueError(f"Instruction {i.pc} must not wait for a token that nobody gave "
                                     f"({_NAMES[unit]} to {i.unit.name.lower()})")
                tokens[unit, i.unit] -= 1
                i.waits.append(unit)
        for unit in _UNITS:
            if i.f[f"push_{_NAMES[unit]}"]:
                tokens[i.unit, unit] += 1
                i.pushes.append(unit)

    def pieces(self, beat, beats):
        """Lengths of the bursts of a request: ``burst_beats``, and none crosses a page."""
        longest, page = self.config.bus.burst_beats, _PAGE_BYTES // self.sizes.beat_bytes
        out = []
        while beats > 0:
            n = min(longest, page - beat % page, beats)
            out.append(n)
            beat, beats = beat + n, beats - n
        return out

    def _tile(self, i):
        """A request per row, per plane where rows follow one another."""
        f, z = i.f, self.sizes
        per, longest, page = z.units_per_beat, self.config.bus.burst_beats, _PAGE_BYTES // z.beat_bytes
        together = f["row_stride"] == f["cols"] and (f["rows"] < MERGE_ROWS or f["cols"] < MERGE_COLS)
        rows, units = (1, f["rows"] * f["cols"]) if together else (f["rows"], f["cols"])
        starts = (f["address"] // z.unit_bytes + np.arange(f["planes"])[:, None] * f["plane_stride"]
                  + np.arange(rows) * f["row_stride"]).reshape(-1)
        first, end = starts // per, (starts + units - 1) // per + 1
        beats, bursts = end - first, []
        # requests of one burst, the usual case, without a loop over bursts
        simple = (beats <= longest) & (first % page + beats <= page)
        for start, at, n, whole in zip(starts.tolist(), first.tolist(), beats.tolist(), simple.tolist()):
            i.last_request = len(bursts)
            head = min(per - start % per, units)
            tail = (start + units - 1) % per + 1 if n > 1 else head
            if whole:
                bursts.append((n, head, units - head, tail))
                continue
            parts = self.pieces(at, n)
            for k, part in enumerate(parts):
                own = head if k == 0 else per
                last = tail if k == len(parts) - 1 else per
                bursts.append((part, own, (part - 2) * per + last, last) if part > 1 else
                              (1, tail if k and k == len(parts) - 1 else own, 0, last))
        i.bursts, i.cycles, i.beats = bursts, len(starts) * units, int(beats.sum())

    def _linear(self, i):
        f, z = i.f, self.sizes
        i.bursts = [(n, 1, n - 1, 1) for n in self.pieces(f["address"] // z.beat_bytes, f["beats"])]
        i.cycles = i.beats = f["beats"]
        if f["target"] == LinearTarget.STEP:
            self._note_steps(i)
        elif f["target"] == LinearTarget.WEIGHT and self.weights is not None:
            count = min(f["beats"], z.weight_beats - f["base"])
            data = self.memory[f["address"]:f["address"] + count * z.beat_bytes].reshape(-1, z.beat_bytes)
            self.weights[f["base"]:f["base"] + len(data)] = data

    def _basis(self, i):
        """Geometry of a pass, once for all that are alike; with maps how long its segments are."""
        f = i.f
        key = tuple(f[name] for name in _GEOMETRY)
        if key not in self._geometries:
            self._geometries[key] = Geometry(self.config, f)
        i.geometry = self._geometries[key]
        if self.weights is not None and f["coefficients"]:
            first = f["weight"] + f["taps"] * self.sizes.tap_row_beats
            i.segments = segment_words(self.weights[first:first + f["coefficients"]], self.config)

    def _note_steps(self, i):
        f, z, record = i.f, self.sizes, self.record
        count, stride = f["beats"] // z.step_beats, z.step_beats * z.beat_bytes
        if f["base"] + count > len(self.table) or f["address"] + count * stride > len(self.memory):
            raise ValueError(f"Instruction {i.pc} must load step entries inside the table and the memory image")
        raw = self.memory[f["address"]:f["address"] + count * stride].reshape(count, stride)[:, :STEP_BITS // 8]
        low, high = raw[:, :8].copy().view("<u8")[:, 0], raw[:, 8:].copy().view("<u8")[:, 0]

        def bits(name, width):
            at = record.offset(name)
            whole = low >> np.uint64(at) if at < 64 else high >> np.uint64(at - 64)
            if at < 64 < at + width:
                whole = whole | high << np.uint64(64 - at)
            return (whole & np.uint64((1 << width) - 1)).astype(np.int64)
        n_log2, hold = bits("n_log2", 3), bits("hold", 1)
        beats = np.full(8, -2, np.int64)
        for n, value in self.patterns.items():
            beats[n] = value
        self.table[f["base"]:f["base"] + count] = np.where((hold == 1) & (beats[n_log2] > 0), -1, beats[n_log2])

    def _steps(self, i):
        """Run lengths of equal steps."""
        first, count = i.f["step"], i.f["steps"]
        tiles = self.table[first:first + count]
        if len(tiles) < count or (bad := np.flatnonzero(tiles < -1)).size:
            step = first + (int(bad[0]) if len(tiles) == count else len(tiles))
            why = "whose pattern is not supported" if step < len(self.table) and self.table[step] == -2 else \
                "which was not loaded"
            raise ValueError(f"Instruction {i.pc} must not use step entry {step}, {why}")
        key = tiles.tobytes()
        if key not in self._groups:
            cuts = [0, *(np.flatnonzero(np.diff(tiles)) + 1).tolist(), count]
            self._groups[key] = [(b - a, int(tiles[a])) for a, b in zip(cuts, cuts[1:])]
        return self._groups[key]


class _Queue:
    """Times of a queue of ``depth`` places: written, shown to the reader, taken.

    The hardware's queue has an output register: it holds one of the places, and a word takes a cycle into it. With two
    places there is no register (a word is shown in the cycle after it was written, and its place is free the cycle
    after it was taken).
    """

    def __init__(self, depth):
        self.depth, self.written, self.moved, self.taken = depth, [], [], []

    def _move(self):
        """When words enter the output register (without one: the later of written and the word before taken)."""
        moved, taken, written = self.moved, self.taken, self.written
        n = len(moved)
        while n < len(written) and n <= len(taken):
            at = written[n] + (self.depth > 2)
            if n and taken[n - 1] > at:
                at = taken[n - 1]
            moved.append(at)
            n += 1

    def room(self):
        """First cycle in which the next word may be written; None if that is not known yet."""
        n = len(self.written)
        if self.depth == 2:
            if n < 2:
                return 0
            return self.taken[n - 2] + 1 if len(self.taken) > n - 2 else None
        n -= self.depth - 1
        if n < 0:
            return 0
        if len(self.moved) <= n:
            self._move()
        return self.moved[n] + 1 if len(self.moved) > n else None

    def shown(self):
        """First cycle in which the next word can be taken; None if that is not known yet."""
        n = len(self.taken)
        if len(self.moved) <= n:
            self._move()
        return self.moved[n] + 1 if len(self.moved) > n else None


class _Run:
    """One run of a program: the state of every unit, as times."""

    def __init__(self, config, program, program_offset, latency, write_latency):
        self.config, self.sizes, self.program = config, program.sizes, program
        self.latency, self.write_latency = latency, write_latency
        z, bus, control = program.sizes, config.bus, config.control
        self.instructions = program.instructions
        self.queues = [_Queue(control.queue_depth) for _ in _UNITS]
        self.by_unit = [[i for i in program.instructions if i.unit is unit] for unit in _UNITS]
        #: Tokens: times at which they are there, and how many were taken.
        self.tokens = {(a, b): [] for a in _UNITS for b in _UNITS}
        self.spent = {(a, b): 0 for a in _UNITS for b in _UNITS}
        self.count = dict.fromkeys((name for name, _ in COUNTERS), 0)
        # fetch
        self.fetched = _Queue(control.fetch_depth)
        self.chunk = control.fetch_depth // 2
        self.to_request, self.granted, self.grant = program.count, 0, BEGIN
        self.fetch_beat, self.fetch_bursts = program_offset // z.beat_bytes, deque()
        self.fetch_valid, self.fetch_issue, self.fetch_part = _NEVER, 0, 0
        self.fetch_log = []                             # (first beat's time, second's, first used, beats) of each burst
        # command
        self.pc, self.taking, self.left, self.done = 0, None, BEGIN, None
        self.snapshots = []
        # read bus
        self.issue, self.finish = 0, deque([0] * bus.outstanding_reads, bus.outstanding_reads)
        self.beat, self.used, self.used_before = 0, 0, 0
        # load
        self.pending = _Queue(LOAD_PENDING)
        self.load_next = self.load_writes = 0           # next instruction of the address and of the data half
        self.sends = deque()                            # instructions with bursts to issue: [instruction, next burst]
        self.address_free, self.load_issue, self.load_end, self.load_sent = 0, 0, 0, 0
        # execute
        self.execute_next, self.loader_free, self.shadow_free = 0, 0, 0
        self.step_begin = self.step_end = self.issue_end = self.execute_end = 0
        self.structured_end = self.basis_end = 0        # when an engine had nothing left to do
        self.basis = None if config.basis is None else BasisEngine(
            config, waiting=self._store_token, finish=self._end_execute, count=self.count)
        # store
        self.store_next, self.store_free, self.store_start, self.store_read = 0, 0, 0, 0
        self.store_settled, self.store_out, self.store_beat, self.store_end = 0, 0, 0, 0
        self.address_write, self.request_end = 0, 0
        self.acknowledged = []
        self.store_pending = 1 << (bus.outstanding_writes - 1).bit_length() + 1
        self.responses = deque([0] * bus.outstanding_writes, bus.outstanding_writes)

    # -- the whole -----------------------------------------------------------------------------------------------------
    def simulate(self, saturations):
        """Issue burst after burst until END."""
        self._settle()
        while self.done is None:
            slot = max(self.issue, self.finish[0]) + 1
            load = self._load_valid()
            if self.fetch_valid is not _NEVER and max(self.fetch_valid, slot) <= max(load, slot):
                self._issue_fetch(max(self.fetch_valid, slot))
            elif load is not _NEVER:
                self._issue_loads()
            else:
                raise ValueError(f"Instruction {self.pc} must not wait for what never happens (deadlock)")
            self._settle()
        self._discard()
        self.count["SATURATIONS"] = saturations
        return self._result()

    def _settle(self):
        """Every unit as far as times are known."""
        moved = True
        while moved and self.done is None:
            moved = self._command()
            if self.done is not None:
                return
            moved |= self._fetch()
            moved |= self._load_addresses()
            moved |= self._load_data()
            moved |= self._execute()
            moved |= self._store()

    def _waiting(self, i):
        """Times of the tokens that an instruction waits for, {giver: time}; None if one is not known yet."""
        out = {}
        for giver in i.waits:
            given, n = self.tokens[giver, i.unit], self.spent[giver, i.unit]
            if len(given) <= n:
                return None
            out[giver] = given[n]
        return out

    # -- fetch and command ---------------------------------------------------------------------------------------------
    def _fetch(self):
        """The next request, when the one before is split and there is room for its instructions."""
        if self.fetch_bursts or not self.to_request:
            return False
        amount = min(self.to_request, self.chunk)
        over = self.granted + amount - self.config.control.fetch_depth
        at = max(self.grant + 1, self.fetch_issue)
        if over > 0:
            if len(self.fetched.taken) < over:
                return False
            at = max(at, self.fetched.taken[over - 1] + 1)
        beats = amount * self.sizes.instruction_beats
        self.fetch_bursts.extend(self.program.pieces(self.fetch_beat, beats))
        self.fetch_beat += beats
        self.grant, self.granted, self.to_request = at, self.granted + amount, self.to_request - amount
        self.fetch_valid = at + SPLIT
        return True

    def _discard(self):
        """END waits for what was requested behind it and throws it away; so far ``done``: when all else is over."""
        end = self.done
        if not self.to_request and self.granted == self.pc:
            return
        at = end + 1 if not self.to_request else end + 2        # the cycle after, no more is going to be requested
        while True:
            while self.fetch_bursts:
                self._issue_fetch(max(self.fetch_valid, self.issue + 1, self.finish[0] + 1))
            # a request that is on offer as END begins to wait is still granted, later ones are not
            over = self.granted + min(self.to_request, self.chunk) - self.config.control.fetch_depth
            if not self.to_request or self.grant > end or over > len(self.fetched.taken):
                break
            self._fetch()
        while len(self.fetched.taken) < self.granted:
            taken = max(self.fetched.shown(), end + 1, self.fetched.taken[-1] + 1)
            self.fetched.taken.append(taken)
            at = max(at, taken + 1)
        self.done = at
        self.instructions[-1].begin = self.instructions[-1].end = at

    def _issue_fetch(self, at):
        beats, each = self.fetch_bursts.popleft(), self.sizes.instruction_beats
        before = self.used
        first, used = self._beats(at, beats, 1, beats - 1, 1, 0, 1)
        self.fetch_log.append((first, max(first, before) + 1, used, beats))
        part = self.fetch_part
        self.fetched.written.extend(range(used + each - 1 - part, used + beats, each))
        self.fetch_part = (part + beats) % each
        self.fetch_issue = at
        self.fetch_valid = at + 1 if self.fetch_bursts else _NEVER

    def _beats(self, at, beats, head, rest, tail, ready, per):
        """Issue one burst at a cycle; the cycles of its first beat on the bus and of the end of that beat's use.

        The register slice holds two beats: a beat is on the bus when the one two before it has been used.
        """
        used = self.used
        first = max(self.beat + 1, at + ADDRESS + self.latency, self.used_before + 1)
        use = max(first + DATA, used + 1, ready) + head - 1
        if beats == 1:
            self.beat, self.used_before, self.used = first, used, use
        else:
            self.used = use + rest
            self.used_before = self.used - tail
            self.beat = max(first, used) + 1 if beats == 2 else self.used_before - per + 1
        self.issue = at
        self.finish.append(self.used)
        return first, use

    def _command(self):
        moved, instructions, queue = False, self.instructions, self.fetched
        while self.done is None:
            i = instructions[self.pc]
            if self.taking is None:
                at = queue.shown()
                if at is None:
                    return moved
                self.taking = at = max(at, self.left + 1)
                queue.taken.append(at)
                moved = True
            at = self.taking + 1
            if i.unit is Unit.CONTROL:
                if i.opcode is not Opcode.HEADER:
                    if not (self.load_writes == len(self.queues[0].written) and not self.sends
                            and self.execute_next == len(self.queues[1].written)
                            and not (self.basis and self.basis.busy())
                            and self.store_next == len(self.queues[2].written)):
                        return moved
                    at = max(at, self.load_end + 2, self.load_sent + 2, self.execute_end + 1, self.store_end + 1)
                    if i.opcode is Opcode.BARRIER:
                        self.snapshots.append((i.f["mark"], at, dict(self.count)))
                    else:
                        self.done = at
                i.begin = i.end = at
            else:
                room = self.queues[i.unit].room()
                if room is None:
                    return moved
                at = max(at, room)
                self.queues[i.unit].written.append(at)
            self.left, self.taking = at, None
            self.pc += 1
            moved = True
        return moved

    # -- load ----------------------------------------------------------------------------------------------------------
    def _load_addresses(self):
        """Take instructions: tokens, a place in the queue between the halves."""
        moved, queue, own = False, self.queues[Unit.LOAD], self.by_unit[Unit.LOAD]
        while self.load_next < len(own):
            if self.address_free is None and not self._sent():
                return moved
            shown = queue.shown()
            if shown is None:
                return moved
            i = own[self.load_next]
            tokens, room = self._waiting(i), self.pending.room()
            if tokens is None or room is None:
                return moved
            token = max(tokens.values(), default=0)
            self.count["LOAD_WAIT_TOKEN"] += max(0, token - shown)
            i.begin = at = max(shown, self.address_free, token, room)
            for giver in i.waits:
                self.spent[giver, i.unit] += 1
            queue.taken.append(at)
            self.pending.written.append(at)
            self.load_next += 1
            if i.opcode is Opcode.FILL:
                self.address_free = at + 1
            else:
                self.address_free = None
                self.sends.append([i, 0])
            moved = True
        if self.address_free is None:
            self._sent()
        return moved

    def _sent(self):
        """When the address half is free again: its last request goes as the last burst before it is issued."""
        i, n = self.sends[-1]
        if len(self.sends) > 1 or n < i.last_request:
            return False
        self.load_sent = max(i.begin + SIZE, self.load_issue)
        self.address_free = self.load_sent + 1
        return True

    def _load_data(self):
        """Begin the next instruction of the data half; FILL ends without the bus."""
        moved, own = False, self.by_unit[Unit.LOAD]
        while self.load_writes < self.load_next:
            i = own[self.load_writes]
            if len(self.pending.taken) == self.load_writes:
                at = max(self.pending.shown(), self.load_end + 1)
                self.pending.taken.append(at)
                i.ready = at + 1
                moved = True
            if i.opcode is not Opcode.FILL:
                return moved
            self._end_load(i, i.ready + i.cycles - 1)
        return moved

    def _end_load(self, i, at):
        i.end = self.load_end = at
        self.load_writes += 1
        self.count["LOAD_BUSY"] += i.cycles
        self.count["READ_BEATS"] += i.beats
        for taker in i.pushes:
            self.tokens[Unit.LOAD, taker].append(at + LOAD_TOKEN)

    def _load_valid(self):
        """When the load's next burst is on offer."""
        return max(self.sends[0][0].begin + SIZE + SPLIT, self.load_issue + 1) if self.sends else _NEVER

    def _issue_loads(self):
        """Bursts of the first instruction, up to where other units may learn something or a fetch comes first."""
        send = self.sends[0]
        i, n = send
        per = 1 if i.opcode is Opcode.LOAD_LINEAR else self.sizes.units_per_beat
        begin, ready, fetch, bursts, finish = i.begin + SIZE + SPLIT, i.ready, self.fetch_valid, i.bursts, self.finish
        stop = i.last_request if n < i.last_request else len(bursts)
        while n < stop:
            slot = max(self.issue, finish[0]) + 1
            at = max(begin, self.load_issue + 1, slot)
            if fetch <= at:
                break
            beats, head, rest, tail = bursts[n]
            self._beats(at, beats, head, rest, tail, ready, per)
            self.load_issue = at
            n += 1
        send[1] = n
        if n == len(bursts):
            self.sends.popleft()
            self._end_load(i, self.used)

    # -- execute -------------------------------------------------------------------------------------------------------
    def _execute(self):
        basis, queue, own = self.basis, self.queues[Unit.EXECUTE], self.by_unit[Unit.EXECUTE]
        moved = basis is not None and basis.advance()
        while self.execute_next < len(own):
            shown = queue.shown()
            if shown is None:
                return moved
            i = own[self.execute_next]
            if i.geometry is not None:
                if not self._accept_basis(i, shown):
                    return moved
                self.execute_next += 1
                basis.advance()
                moved = True
                continue
            # an engine begins when the other has ended
            if basis is not None and basis.busy():
                return moved
            tokens = self._waiting(i)
            if tokens is None:
                return moved
            for giver in i.waits:
                self.spent[giver, i.unit] += 1
            shown = max(shown, self.basis_end)
            self._run_steps(i, shown, tokens.get(Unit.LOAD, 0), tokens.get(Unit.STORE, 0))
            queue.taken.append(i.begin)
            self.execute_next += 1
            moved = True
        return moved

    def _accept_basis(self, i, shown):
        """A pass enters the basis engine; False if it is not known when. The engine takes the store unit's token."""
        free, token = self.basis.loader_free(), 0
        if free is None:
            return False
        if Unit.LOAD in i.waits:
            given, n = self.tokens[Unit.LOAD, Unit.EXECUTE], self.spent[Unit.LOAD, Unit.EXECUTE]
            if len(given) <= n:
                return False
            token = given[n]
            self.spent[Unit.LOAD, Unit.EXECUTE] += 1
        shown = max(shown, free, self.structured_end)
        i.begin = max(shown, token)
        self.queues[Unit.EXECUTE].taken.append(i.begin)
        self.basis.accept(i, shown=shown, begin=i.begin, word_cycles=i.word_cycles)
        return True

    def _store_token(self, i):
        """When the token of the store unit for the next pass is there: 0 without one, None if that is not known."""
        if Unit.STORE not in i.waits:
            return 0
        given, n = self.tokens[Unit.STORE, Unit.EXECUTE], self.spent[Unit.STORE, Unit.EXECUTE]
        if len(given) <= n:
            return None
        self.spent[Unit.STORE, Unit.EXECUTE] += 1
        return given[n]

    def _end_execute(self, i, at):
        i.end = self.execute_end = self.basis_end = at
        for taker in i.pushes:
            self.tokens[Unit.EXECUTE, taker].append(at)

    def _run_steps(self, i, shown, load, store):
        count, pixels = self.count, i.f["rows"] * i.f["cols"]
        ready = max(shown, self.loader_free)
        i.begin = begin = max(ready, load, store)
        idle = max(ready, self.issue_end + 1)           # until then the EXECUTE before still streams
        count["EXECUTE_WAIT_LOAD"] += max(0, load - idle)
        count["EXECUTE_WAIT_STORE"] += max(0, store - max(idle, load))
        at, end, free = begin, self.step_end, self.shadow_free
        for steps, beats in i.groups:
            if beats < 0:
                offer = at + STEP_TABLE
                at = offer if offer > end else end
                at += (steps - 1) * max(pixels, STEP_TABLE)
            else:
                offer = max(at + STEP_TABLE, free) + beats + STEP_OFFER - 1
                at = offer if offer > end else end
                at += (steps - 1) * max(pixels, STEP_SWAP + beats + STEP_OFFER - 1)
                free = at + STEP_SWAP
            end = at + pixels
        steps = i.f["steps"]
        count["EXECUTE_ISSUE"] += pixels * steps
        count["EXECUTE_WAIT_WEIGHTS"] += at - begin - pixels * (steps - 1) - max(0, self.issue_end - begin)
        self.loader_free, self.step_end, self.shadow_free, self.issue_end = at + 1, end, free, at + pixels
        i.end = self.execute_end = self.structured_end = self.issue_end + EXECUTE_LATENCY
        for taker in i.pushes:
            self.tokens[Unit.EXECUTE, taker].append(self.execute_end)

    # -- store ---------------------------------------------------------------------------------------------------------
    def _store(self):
        moved, queue, own = False, self.queues[Unit.STORE], self.by_unit[Unit.STORE]
        while self.store_next < len(own):
            i = own[self.store_next]
            if len(queue.taken) == self.store_next:     # taken before its tokens are there
                shown = queue.shown()
                if shown is None:
                    return moved
                i.begin = max(shown, self.store_start + 1)
                queue.taken.append(i.begin)
                moved = True
            tokens = self._waiting(i)
            if tokens is None:
                return moved
            for giver in i.waits:
                self.spent[giver, i.unit] += 1
            self._run_store(i, tokens.get(Unit.LOAD, 0), tokens.get(Unit.EXECUTE, 0))
            self.store_next += 1
            moved = True
        return moved

    def _run_store(self, i, load, execute):
        f, z, count = i.f, self.sizes, self.count
        rows, cols, pixels = f["rows"], f["cols"], f["rows"] * f["cols"]
        if f["row_stride"] == cols:
            rows, cols = 1, pixels
        # prepare: check, load token, parameters; what is waited for counts while no pixels are read
        check = i.begin + 1
        loaded = max(check, load)
        prepared = loaded + z.parameter_beats + 1
        idle = self.store_read + 1
        count["STORE_WAIT_TOKEN"] += max(0, load - max(check, idle)) + max(0, execute - max(prepared, idle))
        n = len(self.acknowledged) - self.store_pending
        start = max(prepared, idle, execute, self.request_end + 1, self.store_settled,
                    self.acknowledged[n] + 1 if n >= 0 else 0)
        flow = max(start + 2, self.store_out)           # the first pixel enters the requantiser
        self.store_start = start
        last, beats = self._write(f["address"] // z.unit_bytes, rows, cols, f["row_stride"], start, flow + REQUANTIZE)
        count["STORE_BUSY"] += pixels
        count["WRITE_BEATS"] += beats

        def left(pixel):
            """When a pixel left the requantiser for its beat."""
            for first, head, at, out in reversed(last):
                if pixel >= first:
                    return at + pixel - first if pixel < first + head else out + pixel - first - head
            raise AssertionError("a pixel before the first burst")

        def entered(pixel):
            """When a pixel entered the requantiser: as one left, once it was full."""
            return flow + pixel if pixel < REQUANTIZE else left(pixel - REQUANTIZE)
        self.store_read = entered(pixels - 2) if pixels > 1 else start + 1
        self.store_settled = entered(pixels + 2)
        self.store_out = left(pixels - 1)
        acknowledged = self.responses[-1] + STORE_TOKEN - 1
        self.acknowledged.append(acknowledged)
        i.end = self.store_end = acknowledged + 1
        for taker in i.pushes:
            self.tokens[Unit.STORE, taker].append(
                self.store_end if taker is Unit.LOAD else entered(pixels - 1) + 1)

    def _write(self, unit, rows, cols, row_stride, start, first):
        """Requests, bursts, beats and responses of one STORE.

        Args: unit: address of the first. first: cycle in which the first pixel can leave the requantiser.
        Returns: the last bursts, each (first pixel, pixels in its first beat, when the first of them left, when that
        beat was taken); beats.
        """
        z, bus, responses = self.sizes, self.config.bus, self.responses
        per, longest, page = z.units_per_beat, bus.burst_beats, _PAGE_BYTES // z.beat_bytes
        delay = WRITE_DATA + self.write_latency
        issue, taken, total, pixel = self.address_write, self.store_beat, 0, 0
        free, last = max(first, taken), deque(maxlen=REQUANTIZE + 3)
        request = start
        for row in range(rows):
            at = unit + row * row_stride
            beat, end = at // per, (at + cols - 1) // per + 1
            head, tail = min(per - at % per, cols), (at + cols - 1) % per + 1
            request = max(start + 1, issue)             # the splitter takes a request as the last burst is issued
            total += end - beat
            begin = beat
            while beat < end:
                n = min(longest, page - beat % page, end - beat)
                issue = max(issue, request, responses[0]) + 1
                own = head if beat == begin else tail if beat + 1 == end else per
                # the first pixel of a beat leaves as the beat before is taken, the beat goes a cycle after its last
                out = max(free + own, issue + 1)
                last.append((pixel, own, free, out))
                free = out if n == 1 else out + (n - 2) * per + (tail if beat + n == end else per)
                pixel += own if n == 1 else own + free - out
                responses.append(free + delay)
                beat += n
        self.request_end, self.address_write, self.store_beat = request, issue, free
        return last, total

    # -- result --------------------------------------------------------------------------------------------------------
    def _fetched_until(self, cycle):
        """Beats of instructions that were on the bus up to a cycle."""
        total = 0
        for first, second, used, beats in self.fetch_log:
            total += (first <= cycle) + (beats > 1 and second <= cycle) + min(max(cycle - used, 0), max(beats - 2, 0))
        return total

    def _result(self):
        count, events = self.count, tuple(
            Event(pc=i.pc, opcode=i.opcode, unit=i.unit, begin=i.begin, end=i.end) for i in self.instructions)
        fetched = self._fetched_until(self.done)
        segments, before, since = [], dict.fromkeys(count, 0), 0
        for mark, at, after in self.snapshots:
            after["READ_BEATS"] += self._fetched_until(at)
            new = {name: after[name] - before[name] for name in count}
            new["EXECUTE_IDLE"] = at - since - sum(new[name] for name in _EXECUTE_STATES[1:])
            segments.append(Segment(mark=mark, cycle=at, read_beats=new["READ_BEATS"], write_beats=new["WRITE_BEATS"],
                                    execute=tuple(new[name] for name in _EXECUTE_STATES), load_busy=new["LOAD_BUSY"],
                                    store_busy=new["STORE_BUSY"]))
            before, since = after, at
        count["READ_BEATS"] += fetched
        count["CYCLES"] = self.done - BEGIN
        count["INSTRUCTIONS"] = len(self.instructions)
        count["EXECUTE_IDLE"] = count["CYCLES"] - sum(count[name] for name in _EXECUTE_STATES[1:])
        return Prediction(cycles=self.done + INTERRUPT, counters=count, events=events,
                          marks=tuple((s.mark, s.cycle) for s in segments), segments=tuple(segments))
