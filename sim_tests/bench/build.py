"""RTL text and Verilator executables, each made once per digest of everything that goes into it.

Both live under ``build/`` (or the folder that SUMMAND_BUILD names), outside git. Two processes that want the same
build wait for each other; an interrupted build leaves nothing that looks finished.
"""

from contextlib import contextmanager
import fcntl
from hashlib import sha256
import importlib.metadata
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys

from gen import emit
from gen.lint import WAIVERS
from gen.tools import find, version
from spec.errors import InputError

ROOT = Path(__file__).resolve().parent.parent.parent
HARNESS = Path(__file__).with_name("harness.cpp")
#: Our own lz4.h and zlib.h: Verilator's FST writer wants these libraries, which a fresh system lacks.
CODECS = Path(__file__).with_name("codecs")

#: no assertions, no timing, two-state start values without randomness.
VERILATOR_FLAGS = (
    "--cc",
    "--exe",
    "--prefix",
    "Vdut",
    "-O3",
    "--x-assign",
    "fast",
    "--x-initial",
    "fast",
    "--noassert",
    "--no-timing",
    "--output-split",
    "20000",
)
#: The wheel's variables for precompiled headers are empty, so they are given here.
MAKE_FLAGS = (
    "-j2",
    "OPT_FAST=-O2",
    "OPT_SLOW=-O0",
    "OPT_GLOBAL=-O2",
    "CFG_CXXFLAGS_PCH_I=-include",
    "CFG_GCH_IF_CLANG=",
    f"PYTHON3={sys.executable}",
)


class BuildError(Exception):
    """Verilator or the compiler refused generated sources: a fault of this project or of the tool chain."""


def build_root():
    """Folder of everything generated. Raises: InputError if it cannot be made."""
    root = Path(os.environ.get("SUMMAND_BUILD") or ROOT / "build")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"must be a writable folder ({error.strerror})", field="SUMMAND_BUILD", value=str(root)
        ) from error
    return root


@contextmanager
def locked(path):
    """Exclusive lock between processes on the file ``path``, which is made if need be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(
            f"must be writable ({error.strerror})", field="build folder", value=str(path.parent)
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _digest(*parts):
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def sources_digest(*packages):
    """Digest of all Python sources of some of this project's packages."""
    files = sorted(p for name in packages for p in (ROOT / name).rglob("*.py"))
    return _digest([(str(p.relative_to(ROOT)), p.read_text()) for p in files])


def rtl(config, *, progress=None):
    """Verilog text of ``config``, generated once per configuration and state of the generator's sources."""
    key = _digest(config.to_dict(), sources_digest("spec", "hw", "gen"), emit.versions())
    path = build_root() / "rtl-cache" / f"{emit.top_name(config)}_{key}.v"
    with locked(path.with_suffix(".lock")):
        if not path.exists():
            if progress:
                progress(f"generating the RTL of {config.name}", None)
            emit.write_files({path.name: emit.rtl_text(config)}, path.parent)
        return path.read_text()


def _run(command, folder, log, *, progress, message):
    """Run a command with its output in a log; progress is the count of compiled files where the log shows them."""
    with open(log, "a") as out:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        while True:
            try:
                code = process.wait(timeout=0.3)
                break
            except subprocess.TimeoutExpired:
                if progress:
                    planned = len(list(Path(folder).glob("*.cpp")))
                    progress(message, len(list(Path(folder).glob("*.o"))) / planned if planned else None)
            except BaseException:
                process.terminate()
                process.wait()
                raise
    if code:
        words = Path(log).read_text()
        wrong = [
            line for line in words.splitlines() if re.search(r"%?(Error|Warning-|error:)", line)
        ] or words.splitlines()[-5:]
        raise BuildError(f"{Path(command[0]).name} failed ({log}):\n" + "\n".join(wrong[:10]))


def simulator(text, header, top, *, waves=False, progress=None):
    """Executable of Verilog ``text`` (top module ``top``) with the harness, built once per digest.

    Args:
        text: Verilog. header: the C header of the same configuration (`gen.emit.header_text`).
        waves: with FST tracing, a separate and slower build.
        progress: called with (message, fraction or None) while it lasts.
    Raises: ToolMissing if Verilator, a C++ compiler, make or perl is not there; BuildError with the tool's words.
    """
    flags = [*VERILATOR_FLAGS, *(f"-Wno-{w}" for w in WAIVERS), *(("--trace-fst",) if waves else ())]
    codecs = [p.read_text() for p in sorted(CODECS.glob("*.h"))] if waves else []
    digest = _digest(text, header, HARNESS.read_text(), codecs, flags, MAKE_FLAGS, top)
    folder = build_root() / "cosim" / f"{top}_{digest}"
    program = folder / "simulator"
    with locked(folder.with_name(folder.name + ".lock")):
        if program.exists():
            return program
        tools = {name: find(name) for name in ("verilator", "g++", "make", "perl")}
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "obj").mkdir(parents=True)
        (folder / f"{top}.v").write_text(text)
        (folder / "summand_config.h").write_text(header)
        log = folder / "build.log"
        defines = "-DSUMMAND_HEADER='\"../summand_config.h\"' -std=gnu++17" + (f" -I{CODECS}" if waves else "")
        _run(
            [
                tools["verilator"],
                *flags,
                "--top-module",
                top,
                "-Mdir",
                "obj",
                "-CFLAGS",
                defines,
                "-o",
                "simulator",
                f"{top}.v",
                str(HARNESS),
            ],
            folder,
            log,
            progress=progress,
            message=f"verilating {top}",
        )
        _run(
            [tools["make"], "-f", "Vdut.mk", *MAKE_FLAGS, "LDLIBS="],
            folder / "obj",
            log,
            progress=progress,
            message=f"compiling {top} (once per digest)",
        )
        os.replace(folder / "obj" / "simulator", program)
        shutil.rmtree(folder / "obj")
    return program


def verilator_version():
    """Version of the simulator."""
    try:
        return importlib.metadata.version("verilator")
    except importlib.metadata.PackageNotFoundError:
        return version("verilator")
