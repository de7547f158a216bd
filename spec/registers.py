"""The register map of the AXI4-Lite port: one table for RTL, drivers, C header and manual. 32-bit words."""
from enum import IntEnum
from typing import NamedTuple

#: Value of register ID ("SUM1").
MAGIC = 0x53554D31
#: Value of register VERSION: 16-bit major, 16-bit minor.
INTERFACE_VERSION = 0x0001_0000
#: Bytes of the register window; accesses beyond it or to holes answer SLVERR.
WINDOW_BYTES = 256


class Access(IntEnum):
    """Who may change a register."""

    READ_ONLY = 0
    READ_WRITE = 1
    #: Writing 1 to a bit triggers an action; reads as 0.
    TRIGGER = 2
    #: Writing 1 to a bit clears it; an event in the same cycle wins.
    CLEAR = 3


class Register(NamedTuple):
    """One 32-bit register."""

    name: str
    offset: int
    access: Access
    bits: int
    doc: str


class Error(IntEnum):
    """Codes of register ERROR_CODE. The first error stays until soft reset."""

    NONE = 0
    ILLEGAL_OPCODE = 1
    ILLEGAL_FIELD = 2
    MEMORY_RANGE = 3
    SCRATCHPAD_RANGE = 4
    BUS_READ = 5
    BUS_WRITE = 6
    BUS_PROTOCOL = 7
    STREAM_ADDRESS = 8
    ACCUMULATOR_OVERFLOW = 9
    TOKEN_OVERFLOW = 10
    WATCHDOG = 11
    PROGRAM_END = 12
    DIGEST_MISMATCH = 13


ERROR_DOC = {
    Error.NONE: "No error.",
    Error.ILLEGAL_OPCODE: "Unknown operation code; ERROR_ADDRESS is the instruction's offset.",
    Error.ILLEGAL_FIELD: "A field breaks its rule; ERROR_ADDRESS is the instruction's offset.",
    Error.MEMORY_RANGE: "A transfer leaves MEMORY_BYTES or is misaligned; ERROR_ADDRESS is its offset.",
    Error.SCRATCHPAD_RANGE: "A scratchpad, buffer or table address is out of range.",
    Error.BUS_READ: "Memory answered a read with SLVERR or DECERR; ERROR_ADDRESS is the burst's offset.",
    Error.BUS_WRITE: "Memory answered a write with an error; ERROR_ADDRESS is the burst's offset.",
    Error.BUS_PROTOCOL: "RLAST early, late, or a response that nobody asked for.",
    Error.STREAM_ADDRESS: "A stream fetch is misaligned, out of range, or meets itself in a bank.",
    Error.ACCUMULATOR_OVERFLOW: "A sum left the accumulator's format.",
    Error.TOKEN_OVERFLOW: "A token counter passed its range.",
    Error.WATCHDOG: "No unit made progress for WATCHDOG_CYCLES cycles.",
    Error.PROGRAM_END: "The program ran past PROGRAM_COUNT without END.",
    Error.DIGEST_MISMATCH: "The program does not begin with a HEADER for this configuration.",
}

_RO, _RW = Access.READ_ONLY, Access.READ_WRITE

#: Counters: cleared by start, counting while busy. Per unit, cycles are attributed to exactly one cause.
COUNTERS = (
    ("CYCLES", "Cycles from start to the interrupt."),
    ("EXECUTE_ISSUE", "Cycles in which the array took a pixel, or the basis engine's multipliers worked."),
    ("EXECUTE_WAIT_LOAD", "Cycles in which the next EXECUTE waited for a token of the load unit."),
    ("EXECUTE_WAIT_STORE", "Cycles in which the next EXECUTE waited for a token of the store unit."),
    ("EXECUTE_WAIT_WEIGHTS", "Cycles in which the next weight tile was not yet in the array."),
    ("EXECUTE_IDLE", "Cycles without an EXECUTE to run (instruction fetch, drain, other units)."),
    ("LOAD_BUSY", "Cycles in which the load unit wrote a scratchpad."),
    ("LOAD_WAIT_TOKEN", "Cycles in which the load unit waited for a token."),
    ("STORE_BUSY", "Cycles in which the store unit read a pixel of accumulators."),
    ("STORE_WAIT_TOKEN", "Cycles in which the store unit waited for a token."),
    ("READ_BEATS", "Beats read from memory, instructions included."),
    ("WRITE_BEATS", "Beats written to memory."),
    ("INSTRUCTIONS", "Instructions handed to the units."),
    ("EXECUTE_WAIT_COEFFICIENTS", "Cycles in which the basis engine's multipliers waited for its coefficient stage."),
    ("SATURATIONS", "Intermediates (one per slice and pixel) that the basis engine saturated."),
)

REGISTERS = (
    Register("ID", 0x00, _RO, 32, "The constant 0x53554D31."),
    Register("VERSION", 0x04, _RO, 32, "Interface version: major in the upper, minor in the lower half."),
    Register("DIGEST_LOW", 0x08, _RO, 32, "Lower 32 bits of the config digest."),
    Register("DIGEST_HIGH", 0x0C, _RO, 16, "Upper 16 bits of the config digest."),
    Register("CONTROL", 0x10, Access.TRIGGER, 2, "Bit 0 start (ignored while busy or in error), bit 1 soft reset."),
    Register("STATUS", 0x14, _RO, 4, "Bit 0 busy, bit 1 done, bit 2 error, bit 3 soft reset in progress."),
    Register("IRQ_STATUS", 0x18, Access.CLEAR, 2, "Bit 0 done, bit 1 error."),
    Register("IRQ_ENABLE", 0x1C, _RW, 2, "Interrupt output = any bit of IRQ_STATUS & IRQ_ENABLE."),
    Register("ERROR_CODE", 0x20, _RO, 8, "First error since reset, see the error table."),
    Register("ERROR_ADDRESS_LOW", 0x24, _RO, 32, "Memory offset that belongs to the error; 0 where none does."),
    Register("ERROR_ADDRESS_HIGH", 0x28, _RO, 8, "Upper bits of it."),
    Register("MARK", 0x2C, _RO, 16, "Number of the last BARRIER passed."),
    Register("MEMORY_BASE_LOW", 0x30, _RW, 32, "Bus address of offset 0; a multiple of 4096."),
    Register("MEMORY_BASE_HIGH", 0x34, _RW, 8, "Upper bits of it."),
    Register("MEMORY_BYTES_LOW", 0x38, _RW, 32, "Bytes the accelerator may touch from MEMORY_BASE on."),
    Register("MEMORY_BYTES_HIGH", 0x3C, _RW, 9, "Upper bits of it."),
    Register("PROGRAM_LOW", 0x40, _RW, 32, "Offset of the program, a multiple of the beat."),
    Register("PROGRAM_HIGH", 0x44, _RW, 8, "Upper bits of it."),
    Register("PROGRAM_COUNT", 0x48, _RW, 32, "Instructions in the program."),
    Register("WATCHDOG_CYCLES", 0x4C, _RW, 32, "Cycles without progress that raise an error; 0 switches it off."),
    *(Register(name, 0x80 + 4 * n, _RO, 32, doc) for n, (name, doc) in enumerate(COUNTERS)),
)

BY_NAME = {r.name: r for r in REGISTERS}
