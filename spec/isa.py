"""The instruction set: one table that the command processor decodes, `lowering` packs and the manual prints.

A program is a sequence of 256-bit instructions in memory (each begins on a bus beat). The command processor fetches
them in order and hands each to one of three units that run in parallel, each in order:

* **load**: memory to scratchpads (``LOAD_TILE``, ``LOAD_LINEAR``) and constant fill (``FILL``);
* **execute**: the structured engine (``EXECUTE``) or the basis engine (``EXECUTE_BASIS``), whichever the config has;
* **store**: accumulators through the requantiser to memory (``STORE``).

``HEADER``, ``BARRIER`` and ``END`` are done by the command processor itself.

Dependencies are explicit. For each ordered pair of units there is a token counter. An instruction waits, before it
begins, for one token from each unit named by its ``wait_*`` bits, and when it has ended gives one token to each unit
named by its ``push_*`` bits. Bits that name the instruction's own unit must be 0. A program is correct if, run one
instruction after the other in program order, no wait ever fails; then it cannot deadlock.

When an instruction has "ended": LOAD and FILL, the last word is in its scratchpad; EXECUTE, the last accumulator is
written (the scratchpads and weights it read may be overwritten); STORE gives ``push_execute`` when the accumulator
bank has been read and ``push_load`` when memory has acknowledged the last write.
What can be judged from the instruction alone (reserved bits, own-unit tokens, counts of 0, rows * cols, ranges of the
step table and of the parameter memory, alignment of addresses) is judged before it is dispatched: ILLEGAL_FIELD, and
nothing of it happens. Addresses of scratchpads are judged as they are used.

A STORE waits for its load token before it reads its parameters, and for its execute token before it reads
accumulators.

Addresses in instructions are byte offsets from register MEMORY_BASE and must lie inside MEMORY_BYTES. Activations lie
in memory as NCHWc: [channel group][row][column][channel in group]; a **unit** is one pixel of one channel group
(``columns`` bytes), and addresses of units are multiples of it.
"""
from enum import IntEnum

from spec.derive import INSTRUCTION_BITS
from spec.formats import BIT, Field, Record, unsigned
from spec.config import IntSpec


class Opcode(IntEnum):
    """Operation codes; 0 is illegal, so that empty memory is not a program."""

    HEADER = 1
    LOAD_TILE = 2
    LOAD_LINEAR = 3
    FILL = 4
    EXECUTE = 5
    STORE = 6
    BARRIER = 7
    END = 8
    EXECUTE_BASIS = 9


class Unit(IntEnum):
    """Who runs an instruction."""

    LOAD = 0
    EXECUTE = 1
    STORE = 2
    CONTROL = 3


class TileTarget(IntEnum):
    """Destination of LOAD_TILE."""

    ACTIVATION = 0
    RESIDUAL = 1


class LinearTarget(IntEnum):
    """Destination of LOAD_LINEAR."""

    WEIGHT = 0
    STEP = 1
    PARAMETER = 2


class Mode(IntEnum):
    """What the basis engine's multipliers work on."""

    #: IR of the coefficient stage, taps of the basis kernels.
    DECOMPOSED = 0
    #: Activations of ``slices`` channels, taps of a dense kernel.
    DENSE = 1
    #: Activations of one channel group per cycle, 1 x 1 weights.
    POINTWISE = 2


#: Terms of an N:M series of coefficients in one EXECUTE_BASIS.
SERIES_TERMS = 4


class Operation(IntEnum):
    """How EXECUTE combines a column sum with its accumulator."""

    ADD = 0
    MAX = 1


UNIT_OF = {
    Opcode.HEADER: Unit.CONTROL, Opcode.LOAD_TILE: Unit.LOAD, Opcode.LOAD_LINEAR: Unit.LOAD, Opcode.FILL: Unit.LOAD,
    Opcode.EXECUTE: Unit.EXECUTE, Opcode.EXECUTE_BASIS: Unit.EXECUTE, Opcode.STORE: Unit.STORE,
    Opcode.BARRIER: Unit.CONTROL, Opcode.END: Unit.CONTROL,
}

_HEAD = (
    Field("opcode", unsigned(4), None, "Operation, see Opcode."),
    Field("wait_load", BIT, None, "Take a token from the load unit before beginning."),
    Field("wait_execute", BIT, None, "Take a token from the execute unit before beginning."),
    Field("wait_store", BIT, None, "Take a token from the store unit before beginning."),
    Field("push_load", BIT, None, "Give the load unit a token when ended."),
    Field("push_execute", BIT, None, "Give the execute unit a token when ended."),
    Field("push_store", BIT, None, "Give the store unit a token when ended."),
)

_BODY = {
    Opcode.HEADER: (
        Field("digest", unsigned(48), None, "Config digest the program was lowered for; another one is an error."),
        Field("version", unsigned(8), None, "Version of this instruction set, 1."),
    ),
    Opcode.LOAD_TILE: (
        Field("target", unsigned(2), None, "See TileTarget."),
        Field("address", unsigned(40), None, "Byte offset of the first unit."),
        Field("planes", unsigned(10), None, "Channel groups, outermost loop; at least 1."),
        Field("rows", unsigned(12), None, "Rows per plane; at least 1."),
        Field("cols", unsigned(14), None, "Units per row, innermost loop; at least 1."),
        Field("plane_stride", unsigned(28), None, "Units in memory from one plane to the next."),
        Field("row_stride", unsigned(20), None, "Units in memory from one row to the next."),
        Field("base", unsigned(16), None, "First destination address: block (activation; this and the steps are "
              "multiples of a unit's blocks) or unit (residual)."),
        Field("plane_step", unsigned(16), None, "Destination step between planes (same unit as base)."),
        Field("row_step", unsigned(16), None, "Destination step between rows."),
        Field("col_step", unsigned(16), None, "Destination step between units of a row."),
    ),
    Opcode.LOAD_LINEAR: (
        Field("target", unsigned(2), None, "See LinearTarget."),
        Field("address", unsigned(40), None, "Byte offset, a multiple of the beat."),
        Field("beats", unsigned(16), None, "Beats to copy; at least 1."),
        Field("base", unsigned(16), None, "First destination: beat (weight, parameter) or entry (step)."),
    ),
    Opcode.FILL: (
        Field("value", IntSpec(8), None, "Byte written to every element (the input's zero point)."),
        Field("rows", unsigned(12), None, "Rows; at least 1."),
        Field("blocks", unsigned(16), None, "Consecutive activation blocks filled in each row; at least 1."),
        Field("base", unsigned(16), None, "First block."),
        Field("row_step", unsigned(16), None, "Blocks from one row to the next."),
    ),
    Opcode.EXECUTE: (
        Field("base", unsigned(16), None, "Block address of the first output pixel's window origin."),
        Field("rows", unsigned(12), None, "Output rows; at least 1."),
        Field("cols", unsigned(12), None, "Output columns; at least 1; rows * cols <= accumulator_depth."),
        Field("row_step", unsigned(16), None, "Blocks between the windows of output rows."),
        Field("col_step", unsigned(16), None, "Blocks between the windows of output columns."),
        Field("weight", unsigned(16), None, "First beat of the first weight tile in the weight buffer."),
        Field("step", unsigned(12), None, "First entry in the step table."),
        Field("steps", unsigned(12), None, "Entries; at least 1. The weight tiles of steps lie one after the other."),
        Field("bank", BIT, None, "Accumulator bank."),
        Field("accumulate", BIT, None, "1: add to what the bank holds; 0: the first step sets it."),
        Field("operation", unsigned(2), None, "See Operation."),
    ),
    Opcode.EXECUTE_BASIS: (
        Field("mode", unsigned(2), None, "See Mode."),
        Field("base", unsigned(16), None, "Block address of input pixel (0, 0); a multiple of a unit's blocks."),
        Field("row_step", unsigned(16), None, "Blocks between rows of input pixels; a multiple of a unit's blocks."),
        Field("col_step", unsigned(16), None, "Blocks between input pixels of a row; a multiple of a unit's blocks."),
        Field("in_rows", unsigned(12), None, "Input rows that lie in the scratchpad; at least 1."),
        Field("in_cols", unsigned(12), None, "Input columns that lie in the scratchpad; at least 1."),
        Field("out_rows", unsigned(12), None, "Output rows; at least 1."),
        Field("out_cols", unsigned(12), None, "Output columns; at least 1; rows * cols <= accumulator depth."),
        Field("pad_top", unsigned(4), None, "Rows of zeros above input row 0."),
        Field("pad_left", unsigned(4), None, "Columns of zeros left of input column 0."),
        Field("kernel_rows", unsigned(4), None, "1..8."),
        Field("kernel_cols", unsigned(4), None, "At least 1; (kernel_cols - 1) * dilation_cols + 1 <= window."),
        Field("stride_rows_log2", unsigned(2), None, "log2 of the stride of output rows."),
        Field("stride_cols_log2", unsigned(2), None, "log2 of the stride of output columns."),
        Field("dilation_rows", unsigned(3), None, "Rows between kernel rows; at least 1."),
        Field("dilation_cols", unsigned(3), None, "Columns between kernel columns; at least 1."),
        Field("groups", unsigned(8), None, "Channel groups of a pixel that are read; at least 1."),
        Field("terms", unsigned(3), None, "Terms of the coefficient series, 1..4 (series, DECOMPOSED)."),
        Field("n_log2", unsigned(3), SERIES_TERMS, "log2 of N of each term N:group."),
        Field("channel", unsigned(4), None, "DENSE: first channel of the group that slice 0 takes."),
        Field("weight", unsigned(16), None, "First beat in the weight buffer: taps, then coefficients."),
        Field("taps", unsigned(8), None, "Rows of taps to load; 0 keeps those of the EXECUTE_BASIS before."),
        Field("coefficients", unsigned(16), None, "Beats of coefficients to load; 0 keeps those before."),
        Field("zero_point", IntSpec(8), None, "Subtracted from every activation."),
        Field("bank", BIT, None, "Accumulator bank."),
        Field("accumulate", BIT, None, "1: add to what the bank holds; 0: the first contribution sets it."),
        Field("operation", unsigned(2), None, "See Operation."),
    ),
    Opcode.STORE: (
        Field("address", unsigned(40), None, "Byte offset of the first unit."),
        Field("rows", unsigned(12), None, "Output rows; at least 1."),
        Field("cols", unsigned(12), None, "Output columns; at least 1; rows * cols <= accumulator_depth."),
        Field("row_stride", unsigned(20), None, "Units in memory from one row to the next."),
        Field("bank", BIT, None, "Accumulator bank."),
        Field("parameter", unsigned(16), None, "First beat of the channel group's parameters."),
        Field("zero_point", IntSpec(8), None, "Output zero point."),
        Field("low", IntSpec(8), None, "Lower clamp."),
        Field("high", IntSpec(8), None, "Upper clamp; at least low."),
        Field("residual", BIT, None, "1: add a residual operand before rounding."),
        Field("residual_base", unsigned(16), None, "First unit in the residual buffer; pixels follow one another."),
        Field("residual_zero_point", IntSpec(8), None, "Zero point of the residual operand."),
        Field("residual_multiplier", unsigned(16), None, "Residual scale ratio times 2**14."),
    ),
    Opcode.BARRIER: (
        Field("mark", unsigned(16), None, "Number reported in register MARK once all units are idle."),
    ),
    Opcode.END: (),
}


#: Most kernel rows of EXECUTE_BASIS.
MAX_KERNEL_ROWS = 8


def instruction(opcode):
    """Record of an instruction, 256 bits with a reserved field that must be 0."""
    fields = (*_HEAD, *_BODY[opcode])
    spare = INSTRUCTION_BITS - sum(f.bits for f in fields)
    return Record(opcode.name.lower(), (*fields, Field("reserved", unsigned(spare), None, "Must be 0.")))


INSTRUCTIONS = {opcode: instruction(opcode) for opcode in Opcode}
#: Version in HEADER.
VERSION = 1


def encode(opcode, **fields):
    """256-bit word of an instruction; fields left out are 0. Raises InputError for unknown or unfitting fields."""
    record = INSTRUCTIONS[opcode]
    values = {f.name: 0 if f.count is None else [0] * f.count for f in record.fields} | {"opcode": int(opcode)} | fields
    return record.pack(**values)


def decode(word):
    """(Opcode, fields) of a 256-bit word; (None, {}) for an unknown operation code."""
    code = word & 0xF
    if code not in Opcode.__members__.values():
        return None, {}
    return Opcode(code), INSTRUCTIONS[Opcode(code)].unpack(word)
