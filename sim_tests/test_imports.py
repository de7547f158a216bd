"""Who may import whom: the folders' directions, checked on the source."""
import ast
from pathlib import Path
import sys

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "spec": set(), "golden": {"spec"}, "compress": {"spec", "golden"}, "lowering": {"spec", "golden", "compress"},
    "hw": {"spec"}, "gen": {"spec", "hw"}}
OURS = {*ALLOWED, "sim_tests", "scripts"}
THIRD_PARTY = {"spec": {"yaml", "pydantic"}, "golden": {"numpy"}, "hw": {"amaranth"}}


def imports(path):
    """Top-level packages that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("folder", ALLOWED)
def test_directions(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        wrong = {name for name in imports(path) if name in OURS - {folder} and name not in ALLOWED[folder]}
        assert not wrong, f"{path.relative_to(ROOT)} must not import {sorted(wrong)}"


@pytest.mark.parametrize("folder", THIRD_PARTY)
def test_third_party(folder):
    for path in (ROOT / folder).rglob("*.py"):
        extra = set(imports(path)) - OURS - set(sys.stdlib_module_names) - THIRD_PARTY[folder]
        assert not extra, f"{path.relative_to(ROOT)} must not import {sorted(extra)}"


def test_torch_only_in_training():
    for folder in ALLOWED:
        for path in (ROOT / folder).rglob("*.py"):
            if "training" not in path.parts:
                assert "torch" not in set(imports(path)), f"{path.relative_to(ROOT)} must not import torch"
