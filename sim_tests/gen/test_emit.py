"""Emission: deterministic, exact ports, every warning an error, nothing half-written."""

import json
import os
import re
import subprocess
import sys

from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
import pytest

from gen import docs, emit, tools
from gen.lint import LintError, verilator_lint, yosys_check
from hw.structured.column import Column
from spec import config, isa, registers
from spec.errors import InputError

TINY = config.load("tiny")


class Register(wiring.Component):
    """A register; ``fault`` plants one of the mistakes that emission must catch."""

    def __init__(self, fault=None):
        self.fault = fault
        super().__init__({"i": In(4), "o": Out(4)})

    def elaborate(self, platform):
        m = Module()
        m.d["snyc" if self.fault == "domain" else "sync"] += self.o.eq(self.i)
        if self.fault == "submodule":
            Register()  # built, never added
        if self.fault == "loop":
            loop = Signal()
            m.d.comb += loop.eq(~loop)
        return m


def test_ports_are_the_signature():
    text = emit.to_verilog(Register(), "thing")
    assert emit.verilog_ports(text, "thing") == {
        "clk": ("input", 1),
        "rst": ("input", 1),
        "i": ("input", 4),
        "o": ("output", 4),
    }


def test_a_misspelt_domain_is_refused():
    with pytest.raises(ValueError, match="Ports of thing must be its signature, clk and rst; snyc_clk is"):
        emit.to_verilog(Register("domain"), "thing")


def test_a_forgotten_submodule_is_refused():
    with pytest.raises(ValueError, match="Elaboration of thing must not warn, not: .*Register.*never used"):
        emit.to_verilog(Register("submodule"), "thing")


def test_shared_modules_are_written_once():
    text = emit.to_verilog(Column(config=TINY), "column")
    assert re.findall(r"^module (\w+)", text, re.MULTILINE).count("summand_pe") == 1
    assert len(re.findall(r"^  summand_pe ", text, re.MULTILINE)) == TINY.structured.slots


def test_same_bytes_for_any_hash_seed():
    code = (
        "from gen.emit import to_verilog; from hw.structured.column import Column; from spec import config; "
        "import hashlib; "
        "print(hashlib.sha256(to_verilog(Column(config=config.load('tiny')), 'c').encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2", "77")
    }
    assert len(digests) == 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("rtl")
    return out, emit.emit(TINY, out)


def test_files_carry_the_digest(tiny):
    out, paths = tiny
    assert (
        sorted(p.name for p in paths)
        == sorted(p.name for p in out.iterdir())
        == ["config.yaml", "metadata.json", "registers.md", "summand_tiny.h", "summand_tiny.v"]
    )
    for path in paths:
        assert TINY.digest in path.read_text(), path.name


def test_effective_configuration_reads_back(tiny):
    assert config.load(tiny[0] / "config.yaml") == TINY


@pytest.mark.parametrize("name", config.presets())
def test_effective_configuration_of_every_preset(name, tmp_path):
    one = config.load(name)
    path = tmp_path / "config.yaml"
    path.write_text(emit.yaml_text(one))
    assert config.load(path) == one


def test_metadata(tiny):
    tree = json.loads((tiny[0] / "metadata.json").read_text())
    assert tree["config_digest"] == TINY.digest and tree["top"] == "summand_tiny"
    ports = {p["name"]: (p["direction"], p["bits"]) for p in tree["ports"]}
    assert ports["m_axi__rdata"] == ("input", TINY.bus.data_bits) and ports["irq"] == ("output", 1)
    assert {r["name"]: r["offset"] for r in tree["registers"]} == {r.name: r.offset for r in registers.REGISTERS}


def test_whole_accelerator_lints(tiny):
    text = (tiny[0] / "summand_tiny.v").read_text()
    verilator_lint(text, "summand_tiny")
    yosys_check(text, "summand_tiny")


def test_lint_sees_a_fault():
    bad = "module thing(input a, output [1:0] b);\n  assign b[0] = a;\nendmodule\n"
    with pytest.raises(LintError, match="UNDRIVEN"):
        verilator_lint(bad, "thing")
    with pytest.raises(LintError, match="check -assert of thing"):
        yosys_check("module thing(input a, output b);\n wire c;\n assign b = a & c;\nendmodule\n", "thing")


def test_header_compiles_and_agrees_with_python(tiny, tmp_path):
    """A C program that packs a LOAD_LINEAR by the macros prints what `isa.encode` packs."""
    fields = {"target": 2, "address": 0x12_3456_7880, "beats": 77, "base": 9, "wait_store": 1}
    lines = [
        f"set(w, {v}ull, SUMMAND_LOAD_LINEAR_{k.upper()}_SHIFT, SUMMAND_LOAD_LINEAR_{k.upper()}_BITS);"
        for k, v in (fields | {"opcode": int(isa.Opcode.LOAD_LINEAR)}).items()
    ]
    (tmp_path / "t.c").write_text(
        '#include <stdio.h>\n#include "summand_tiny.h"\n'
        "static void set(unsigned char *w, unsigned long long v, int at, int bits)\n"
        "{ for (int n = 0; n < bits; n++) w[(at + n) / 8] |= (v >> n & 1) << (at + n) % 8; }\n"
        "int main(void) { unsigned char w[32] = {0};\n"
        + "\n".join(lines)
        + '\nfor (int n = 31; n >= 0; n--) printf("%02x", w[n]);\n'
        'printf(" %012llx %d\\n", SUMMAND_CONFIG_DIGEST, SUMMAND_REG_READ_BEATS == 0xA8); }\n'
    )
    subprocess.run(
        [tools.find("g++"), "-x", "c", "-Wall", "-Werror", f"-I{tiny[0]}", "-o", tmp_path / "t", tmp_path / "t.c"],
        check=True,
    )
    word, digest, offset = subprocess.run([tmp_path / "t"], capture_output=True, text=True, check=True).stdout.split()
    assert int(word, 16) == isa.encode(isa.Opcode.LOAD_LINEAR, **fields)
    assert digest == TINY.digest
    assert offset == str(int(registers.BY_NAME["READ_BEATS"].offset == 0xA8))


def test_output_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="output must be a writable folder"):
        emit.emit(TINY, tmp_path / "file" / "below")


def test_all_files_or_none(tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match="must be a writable folder"):
        emit.write_files({"a/x": "1"}, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]


@pytest.mark.parametrize("name", sorted(docs.PAGES))
def test_manual_pages_are_current(name):
    assert (docs.DOCS / name).read_text() == docs.PAGES[name](), "run `make docs`"


def test_register_page_has_every_register_and_error():
    page = docs.registers_page()
    for r in registers.REGISTERS:
        assert f"| 0x{r.offset:02X} | `{r.name}` |" in page
    for e in registers.Error:
        assert f"| {int(e)} | `{e.name}` |" in page
