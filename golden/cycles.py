"""The cycle model: when each unit begins and ends each instruction, from the program alone.

An event simulation at the grain of instructions (EXECUTE: of steps), in program order; a correct program depends on
earlier instructions only, so one pass settles every time but the sharing of the read bus, which takes `_PASSES`.

* Fetch: ``instruction_beats`` per instruction, at most ``fetch_depth`` ahead of dispatch, latency pipelined.
* Dispatch: in order, one per cycle, while the unit's queue (``queue_depth``) has room. BARRIER waits until all units
  are idle.
* Load: addresses run ahead of data, so the latency of memory shows only if nothing was outstanding. LOAD_LINEAR takes
  one beat per cycle, LOAD_TILE one unit per cycle, FILL one row of banks per cycle. With ``outstanding_reads`` bursts
  (each within one row) under way, none begins sooner than ``(latency + its length) / outstanding_reads`` after the one
  before. An instruction fetched meanwhile takes its beats from the load.
* Execute: a step streams its pixels, one per cycle, once its tile is in; the next tile (also the next EXECUTE's) loads
  meanwhile and takes ``tile_beats(n) + tile_overhead`` cycles, none if held. So a long row of equal steps takes
  ``max(pixels, tile_beats(n) + tile_overhead)`` each.
* Store: ``parameter_beats + parameter_overhead``, then a pixel per cycle, the pipeline, the latency of the write. The
  next STORE begins when the accumulators have been read.

Every constant that depends on how the RTL is built stands in `CONSTANTS`, to be calibrated against it.
"""
from collections import defaultdict, deque
from dataclasses import dataclass

import numpy as np

from spec import isa
from spec.derive import STEP_BITS, Sizes, ceil_div
from spec.formats import step_entry
from spec.isa import LinearTarget, Opcode, Unit
from spec.registers import COUNTERS

#: Cycles of the implementation, beside what follows from sizes and from the latency of memory.
CONSTANTS = {
    "start": 4,                 # from the start bit to the first fetch address
    "fetch": 2,                 # from an instruction's last beat to its dispatch
    "dispatch": 2,              # from dispatch to the unit's first action
    "read": 4,                  # from a read address in the unit to the first word in a scratchpad, less the latency
    "tile_overhead": 5,         # tile transfer beside its beats
    "execute_drain": 8,         # from the last pixel of a stream to the last accumulator written
    "parameter_overhead": 3,    # parameter transfer beside its beats
    "store_pipeline": 6,        # from an accumulator read to its byte on the write bus
    "token": 1,                 # from the end of an instruction to its token being seen
    "end": 2,                   # from the last unit idle to the interrupt
}
_PASSES = 3
_UNITS = (Unit.LOAD, Unit.EXECUTE, Unit.STORE)


@dataclass(frozen=True, kw_only=True)
class Event:
    """One instruction: when its unit began it (tokens taken) and when it had ended, in cycles from start."""

    pc: int
    opcode: Opcode
    unit: Unit
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What `predict` returns.

    cycles: from start to the interrupt. counters: the counter registers of `spec.registers.COUNTERS` by name, in the
    same units. events: one `Event` per instruction. marks: [(mark, cycle)] of the BARRIERs.
    """

    cycles: int
    counters: dict
    events: tuple
    marks: tuple

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
    return [int.from_bytes(data[at:at + isa.INSTRUCTION_BITS // 8].tobytes(), "little")
            for at in range(offset, offset + count * stride, stride)]


def predict(config, program_words, memory, *, memory_latency_cycles=16, constants=CONSTANTS):
    """Cycles of a program.

    Args:
        config: `spec.config.Config`. program_words: 256-bit words, HEADER to END (see `program_words`).
        memory: the memory image (bytes or uint8 array): step entries decide how long an EXECUTE takes.
        memory_latency_cycles: from a read address on the bus to its first beat, and from the last write beat to its
            response. constants: as `CONSTANTS`.
    Returns: `Prediction`.
    Raises: ValueError for a program that is not one: unknown operation, a wait without token, no END.
    """
    program = [isa.decode(word) for word in program_words]
    for pc, (opcode, _) in enumerate(program):
        if opcode is None:
            raise ValueError(f"Instruction {pc} must have a known operation code")
    if Opcode.END not in [opcode for opcode, _ in program]:
        raise ValueError("Program must end with END")
    memory, fetches = np.frombuffer(memory, np.uint8), ()
    for _ in range(_PASSES):
        run = _Run(config, memory, memory_latency_cycles, constants, fetches)
        result = run.simulate(program)
        fetches = run.fetches
    return result


class _Run:
    """One pass; ``fetches`` are the sorted fetch times of the pass before."""

    def __init__(self, config, memory, latency, constants, fetches):
        self.config, self.sizes, self.memory = config, Sizes(config), memory
        self.latency, self.k = latency, constants
        self.before = np.array(fetches, np.int64)
        self.fetches, self.events, self.marks = [], [], []
        self.count = defaultdict(int)
        self.tokens = defaultdict(deque)
        self.table = {}
        self.issue = self.data = 0                               # load unit: next address, end of its data
        self.tile = self.stream_begin = self.stream_end = 0      # execute unit
        self.store_free = self.write_end = 0                     # store unit

    def simulate(self, program):
        """All instructions up to END."""
        z, control, k = self.sizes, self.config.control, self.k
        dispatched, begun, fetch = [], {u: [] for u in _UNITS}, k["start"] - 1
        for pc, (opcode, f) in enumerate(program):
            room = dispatched[pc - control.fetch_depth] if pc >= control.fetch_depth else 0
            fetch = max(fetch + z.instruction_beats, room)
            self.fetches.append(fetch + self.latency)
            self.count["READ_BEATS"] += z.instruction_beats
            at = max(fetch + self.latency + k["fetch"], dispatched[-1] + 1 if dispatched else 0)
            unit = isa.UNIT_OF[opcode]
            if unit is Unit.CONTROL:
                if opcode is not Opcode.HEADER:
                    at = max(at, self.data, self.stream_end + (k["execute_drain"] if self.stream_end else 0),
                             self.write_end)
                begin, end = at, at
                if opcode is Opcode.BARRIER:
                    self.marks.append((f["mark"], at))
            else:
                earlier = begun[unit]
                if len(earlier) >= control.queue_depth:
                    at = max(at, earlier[-control.queue_depth])
                self.count["INSTRUCTIONS"] += 1
                ready = at + k["dispatch"]
                step = {Unit.LOAD: self._load, Unit.EXECUTE: self._execute, Unit.STORE: self._store}[unit]
                begin, end = step(pc, opcode, f, ready)
                earlier.append(begin)
            dispatched.append(at)
            self.events.append(Event(pc=pc, opcode=opcode, unit=unit, begin=int(begin), end=int(end)))
            if opcode is Opcode.END:
                break
        cycles = int(self.events[-1].end + k["end"])
        busy = sum(self.count[name] for name in ("EXECUTE_ISSUE", "EXECUTE_WAIT_LOAD", "EXECUTE_WAIT_STORE",
                                                 "EXECUTE_WAIT_WEIGHTS"))
        self.count["CYCLES"], self.count["EXECUTE_IDLE"] = cycles, cycles - busy
        counters = {name: int(self.count[name]) for name, _ in COUNTERS}
        return Prediction(cycles=cycles, counters=counters, events=tuple(self.events), marks=tuple(self.marks))

    # -- tokens --------------------------------------------------------------------------------------------------------
    def _token(self, pc, giver, taker, f):
        """Time at which the token that ``f`` waits for is there; 0 without a wait."""
        if not f[f"wait_{giver.name.lower()}"]:
            return 0
        if not self.tokens[giver, taker]:
            raise ValueError(f"Instruction {pc} must not wait for a token that nobody gave "
                             f"({giver.name.lower()} to {taker.name.lower()})")
        return self.tokens[giver, taker].popleft()

    def _give(self, unit, f, times):
        for taker, at in times.items():
            if f[f"push_{taker.name.lower()}"]:
                self.tokens[unit, taker].append(at + self.k["token"])

    # -- units: each returns (begin, end) -----------------------------------------------------------------------------
    def _load(self, pc, opcode, f, ready):
        z, bus = self.sizes, self.config.bus
        ready = max(ready, self.issue)
        begin = max(ready, self._token(pc, Unit.EXECUTE, Unit.LOAD, f), self._token(pc, Unit.STORE, Unit.LOAD, f))
        self.count["LOAD_WAIT_TOKEN"] += begin - ready
        if opcode is Opcode.FILL:
            cycles = f["rows"] * ceil_div(f["blocks"], z.banks)
            first, self.issue = max(begin, self.data), begin + 1
        else:
            round_trip = self.latency + self.k["read"]
            if opcode is Opcode.LOAD_LINEAR:
                cycles, beats = f["beats"], f["beats"]
                bursts = ceil_div(beats, bus.burst_beats)
                cycles = self._pieces(cycles, bursts, min(beats, bus.burst_beats), round_trip)
                if f["target"] == LinearTarget.STEP:
                    self._note_steps(f)
            else:
                rows, longest = f["planes"] * f["rows"], bus.burst_beats * z.units_per_beat
                beats, bursts = self._tile_beats(f), rows * ceil_div(f["cols"], longest)
                cycles = self._pieces(rows * f["cols"], bursts, min(f["cols"], longest), round_trip)
            first = max(begin + round_trip, self.data)
            self.issue = begin + bursts
            self.count["READ_BEATS"] += beats
            # Instructions fetched while the data run take their beats from them.
            stolen = np.searchsorted(self.before, first + cycles) - np.searchsorted(self.before, first)
            cycles += int(stolen) * z.instruction_beats
        self.count["LOAD_BUSY"] += cycles
        self.data = first + cycles
        self._give(Unit.LOAD, f, {Unit.EXECUTE: self.data, Unit.STORE: self.data})
        return begin, self.data

    def _pieces(self, cycles, bursts, each, round_trip):
        """Cycles of data in ``bursts`` of ``each`` cycles, of which ``outstanding_reads`` are under way at a time."""
        period = ceil_div(round_trip + each, self.config.bus.outstanding_reads)
        return max(cycles, (bursts - 1) * period + each)

    def _tile_beats(self, f):
        """Beats that the rows of a LOAD_TILE touch."""
        z = self.sizes
        at = (f["address"] + z.unit_bytes * (np.arange(f["planes"])[:, None] * f["plane_stride"]
                                             + np.arange(f["rows"]) * f["row_stride"])) % z.beat_bytes
        return int((-(-(at + f["cols"] * z.unit_bytes) // z.beat_bytes)).sum())

    def _note_steps(self, f):
        z, record = self.sizes, step_entry(self.config.structured.taps)
        stride = z.step_beats * z.beat_bytes
        for n in range(f["beats"] // z.step_beats):
            at = f["address"] + n * stride
            entry = record.unpack(int.from_bytes(self.memory[at:at + STEP_BITS // 8].tobytes(), "little"))
            self.table[f["base"] + n] = None if entry["hold"] else z.tile_beats(1 << entry["n_log2"])

    def _execute(self, pc, opcode, f, ready):
        k, pixels = self.k, f["rows"] * f["cols"]
        load, store = self._token(pc, Unit.LOAD, Unit.EXECUTE, f), self._token(pc, Unit.STORE, Unit.EXECUTE, f)
        begin = max(ready, load, store)
        idle_from = max(ready, self.stream_end)
        waited = max(0, begin - idle_from)
        self.count["EXECUTE_WAIT_LOAD" if load >= store else "EXECUTE_WAIT_STORE"] += waited
        for step in range(f["step"], f["step"] + f["steps"]):
            if step not in self.table:
                raise ValueError(f"Instruction {pc} must not use step entry {step}, which was not loaded")
            if (beats := self.table[step]) is not None:          # loads into the shadow, free once the step before runs
                self.tile = max(self.tile, self.stream_begin, begin) + beats + k["tile_overhead"]
            free = max(self.stream_end, begin)
            self.stream_begin = free if beats is None else max(free, self.tile)
            self.count["EXECUTE_WAIT_WEIGHTS"] += self.stream_begin - free
            self.stream_end = self.stream_begin + pixels
        self.count["EXECUTE_ISSUE"] += pixels * f["steps"]
        end = self.stream_end + k["execute_drain"]
        self._give(Unit.EXECUTE, f, {Unit.LOAD: end, Unit.STORE: end})
        return begin, end

    def _store(self, pc, opcode, f, ready):
        z, k, pixels = self.sizes, self.k, f["rows"] * f["cols"]
        ready = max(ready, self.store_free)
        loaded = max(ready, self._token(pc, Unit.LOAD, Unit.STORE, f))
        parameters = loaded + z.parameter_beats + k["parameter_overhead"]
        token = self._token(pc, Unit.EXECUTE, Unit.STORE, f)
        first = max(parameters, token)
        self.count["STORE_WAIT_TOKEN"] += loaded - ready + first - parameters
        self.count["STORE_BUSY"] += pixels
        at = (f["address"] + z.unit_bytes * np.arange(f["rows"]) * f["row_stride"]) % z.beat_bytes
        self.count["WRITE_BEATS"] += int((-(-(at + f["cols"] * z.unit_bytes) // z.beat_bytes)).sum())
        self.store_free = first + pixels
        self.write_end = self.store_free + k["store_pipeline"] + self.latency
        self._give(Unit.STORE, f, {Unit.EXECUTE: self.store_free, Unit.LOAD: self.write_end})
        return loaded, self.write_end
