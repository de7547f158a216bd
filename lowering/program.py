"""Instruction emission with automatic dependencies.

`Program.emit` is told which words of which on-chip memory an instruction reads and writes. It remembers who touched
them last and turns each hazard between two units into one token: the producer pushes it, the consumer waits for it.
Units run in order, so a dependency on instruction k of a unit also covers all earlier ones; hence, for each ordered
pair of units, waits are on strictly rising producers, the n-th wait takes the n-th push, and every push is taken.
The program is therefore correct by construction as long as it is correct when run in program order.
"""
import numpy as np

from spec.derive import TOKEN_BITS, Sizes
from spec.isa import UNIT_OF, VERSION, Opcode, Unit, encode

_UNITS = (Unit.LOAD, Unit.EXECUTE, Unit.STORE)
_NAME = {Unit.LOAD: "load", Unit.EXECUTE: "execute", Unit.STORE: "store"}


class _Memory:
    """Last writer and last reader of each word, as positions in their unit's instruction sequence (-1: nobody)."""

    def __init__(self, words, writer_unit, reader_unit):
        self.writer_unit, self.reader_unit = writer_unit, reader_unit
        self.writer = np.full(words, -1, np.int64)
        self.reader = np.full(words, -1, np.int64)


class Program:
    """Instructions of one program, in order. Begins with HEADER; `finish` adds END and encodes."""

    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        self.instructions = []
        self._sequence = {u: [] for u in _UNITS}
        self._forget()
        self.emit(Opcode.HEADER, digest=sizes.digest_value, version=VERSION)

    def _forget(self):
        s = self.sizes
        self._memories = {
            "activation": _Memory(s.activation_blocks, Unit.LOAD, Unit.EXECUTE),
            "weight": _Memory(s.weight_beats, Unit.LOAD, Unit.EXECUTE),
            "step": _Memory(s.config.memory.step_entries, Unit.LOAD, Unit.EXECUTE),
            "residual": _Memory(s.residual_units, Unit.LOAD, Unit.STORE),
            "parameter": _Memory(s.parameter_words, Unit.LOAD, Unit.STORE),
            "bank": _Memory(2, Unit.EXECUTE, Unit.STORE),
        }
        #: (consumer, producer) -> highest producer position waited for.
        self._waited = {(c, p): -1 for c in _UNITS for p in _UNITS}

    def emit(self, opcode, *, reads=(), writes=(), **fields):
        """Append an instruction; ``reads`` and ``writes`` are (memory name, first word, words) that it touches.

        Ranges may cover more words than are touched: that costs waiting, never correctness.
        """
        entry = {"opcode": opcode, **fields}
        self.instructions.append(entry)
        unit = UNIT_OF[opcode]
        if unit not in _UNITS:
            return
        sequence = self._sequence[unit]
        position = len(sequence)
        sequence.append(entry)
        needed = dict.fromkeys(_UNITS, -1)
        for name, first, words in reads:
            memory, span = self._memories[name], self._span(name, first, words)
            needed[memory.writer_unit] = max(needed[memory.writer_unit], int(memory.writer[span].max()))
            memory.reader[span] = position
        for name, first, words in writes:
            memory, span = self._memories[name], self._span(name, first, words)
            needed[memory.reader_unit] = max(needed[memory.reader_unit], int(memory.reader[span].max()))
            memory.writer[span] = position
        for producer, index in needed.items():
            if producer != unit and index > self._waited[unit, producer]:
                self._waited[unit, producer] = index
                entry[f"wait_{_NAME[producer]}"] = 1
                self._sequence[producer][index][f"push_{_NAME[unit]}"] = 1

    def _span(self, name, first, words):
        size = self._memories[name].writer.size
        if words < 1 or first < 0 or first + words > size:
            raise RuntimeError(f"lowering left the {name} memory: {first} + {words} > {size}")
        return slice(first, first + words)

    def barrier(self, mark):
        """All units idle; nothing before it can be a hazard for anything after it."""
        self.emit(Opcode.BARRIER, mark=mark)
        self._forget()

    def finish(self, tensor_base):
        """Encode all as uint8 [instructions, instruction bytes]; tensor addresses are moved by ``tensor_base``."""
        self.emit(Opcode.END)
        self._check_tokens()
        stride = self.sizes.instruction_beats * self.sizes.beat_bytes
        out = np.zeros((len(self.instructions), stride), np.uint8)
        for row, entry in zip(out, self.instructions):
            fields = dict(entry)
            opcode = fields.pop("opcode")
            if opcode in (Opcode.LOAD_TILE, Opcode.STORE):
                fields["address"] += tensor_base
            values = {k: [int(x) for x in v] if isinstance(v, (list, tuple)) else int(v) for k, v in fields.items()}
            word = encode(opcode, **values).to_bytes(32, "little")
            row[:32] = np.frombuffer(word, np.uint8)
        return out

    def _check_tokens(self):
        """Counters never overflow: a unit runs ahead of another by at most a queue beyond program order."""
        limit = (1 << TOKEN_BITS) - 1 - self.sizes.config.control.queue_depth - 2
        count = {}
        for entry in self.instructions:
            unit = UNIT_OF[entry["opcode"]]
            for other in _UNITS:
                if entry.get(f"wait_{_NAME[other]}"):
                    count[other, unit] = count.get((other, unit), 0) - 1
                    if count[other, unit] < 0:
                        raise RuntimeError("lowering made a program that waits for a token nobody gave")
                if entry.get(f"push_{_NAME[other]}"):
                    count[unit, other] = count.get((unit, other), 0) + 1
                    if count[unit, other] > limit:
                        raise RuntimeError("lowering made a program that overflows a token counter")
        if any(count.values()):
            raise RuntimeError("lowering made a program that leaves tokens behind")
