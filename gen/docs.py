"""The manual pages that are tables: instruction set and registers, from `spec.isa` and `spec.registers`."""

from pathlib import Path

from spec import formats, isa, registers

DOCS = Path(__file__).resolve().parent.parent / "docs"

_ACCESS = {
    registers.Access.READ_ONLY: "RO",
    registers.Access.READ_WRITE: "RW",
    registers.Access.TRIGGER: "W1T",
    registers.Access.CLEAR: "W1C",
}


def _table(head, rows):
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def _record_rows(record):
    for f in record.fields:
        low = record.offset(f.name)
        kind = ("s" if f.elem.signed else "u") + str(f.elem.bits) + (f" x {f.count}" if f.count else "")
        yield f"{low + f.bits - 1}:{low}", f"`{f.name}`", kind, f.doc


def registers_page(digest=None):
    """Text of the register manual; with a config digest where it lies beside generated RTL."""
    lines = ["# Registers", ""]
    if digest:
        lines += [f"Configuration digest: `{digest}`.", ""]
    lines += [
        f"AXI4-Lite slave, 32-bit words, a window of {registers.WINDOW_BYTES} bytes; accesses beyond it",
        "or to holes answer SLVERR.",
        "Access: RO read only, RW read and write, W1T writing 1 triggers (reads as 0), W1C writing 1 clears.",
        "Made by `make docs` from `spec/registers.py`.",
        "",
        *_table(
            ("offset", "name", "access", "bits", "meaning"),
            ((f"0x{r.offset:02X}", f"`{r.name}`", _ACCESS[r.access], r.bits, r.doc) for r in registers.REGISTERS),
        ),
        "",
        "Registers from 0x80 on are counters: cleared by start, counting while busy. Per unit, cycles are attributed",
        "to exactly one cause.",
        "",
        "## Error codes",
        "",
        "The first error stays in `ERROR_CODE` until soft reset.",
        "",
        *_table(
            ("code", "name", "meaning"), ((int(e), f"`{e.name}`", registers.ERROR_DOC[e]) for e in registers.Error)
        ),
        "",
    ]
    return "\n".join(lines)


def isa_page():
    """Text of the instruction set manual."""
    intro = isa.__doc__.strip().split("\n", 1)[1].strip().replace("``", "`")
    lines = [
        "# Instruction set",
        "",
        "Made by `make docs` from `spec/isa.py`.",
        "",
        intro,
        "",
        f"The version in HEADER is {isa.VERSION}. Bits are numbered from the lowest; `u8` is unsigned, `s8` two's",
        "complement.",
        "Reserved bits must be 0.",
    ]
    for opcode, record in isa.INSTRUCTIONS.items():
        lines += [
            "",
            f"## {opcode.name} ({int(opcode)})",
            "",
            f"Run by: {isa.UNIT_OF[opcode].name.lower()}.",
            "",
            *_table(("bits", "field", "format", "meaning"), _record_rows(record)),
        ]
    lines += ["", "## Values", ""]
    for kind in (isa.TileTarget, isa.LinearTarget, isa.Operation):
        lines.append(f"- {kind.__name__}: {', '.join(f'{v.name} = {int(v)}' for v in kind)}. {kind.__doc__}")
    for title, record in (
        ("Step table entry (taps = 4)", formats.step_entry(4)),
        ("Parameters of one output channel", formats.column_parameters()),
    ):
        lines += ["", f"## {title}", "", *_table(("bits", "field", "format", "meaning"), _record_rows(record))]
    return "\n".join(lines) + "\n"


#: File name in docs/ -> function that makes its text.
PAGES = {"isa.md": isa_page, "registers.md": registers_page}


def main():
    """Write the pages into docs/."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())


if __name__ == "__main__":
    main()
