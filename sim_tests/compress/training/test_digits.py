"""The committed demo network is what its provenance says; training itself needs PyTorch and is only run where it is."""
import importlib.util
import json
from pathlib import Path
import subprocess
import sys

import numpy as np
import onnx
import pytest

from compress import demo, engine

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "models" / "digits.onnx"
FACTS = json.loads((ROOT / "models" / "digits.json").read_text(encoding="utf-8"))


def test_provenance_matches_the_file():
    assert MODEL.stat().st_size == FACTS["onnx_bytes"] < 400_000
    onnx.checker.check_model(onnx.load(MODEL), full_check=True)
    assert FACTS["split"] == demo.definition() and FACTS["command"].startswith("python -m compress.training.digits")
    assert {"python", "torch", "numpy", "onnx", "scikit-learn"} <= FACTS["versions"].keys()


@pytest.mark.parametrize("split", ["validation", "heldout"])
def test_stated_accuracy_is_onnx_runtimes(split):
    x, labels = demo.digits(split)
    got = float((engine.run_onnx(MODEL, x).argmax(axis=1) == labels).mean())
    assert got == pytest.approx(FACTS["float_accuracy"][split], abs=1.01 / len(labels)) and got > 0.97


def test_half_of_the_weights_matter_little():
    """The second training stage left small weights outside the 2:4 view."""
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(MODEL).graph.initializer}
    for name in ("block_a", "block_b", "conv2"):
        blocks = np.sort(np.abs(np.moveaxis(weights[f"{name}.weight"], 1, -1)).reshape(-1, 4), axis=1)
        assert blocks[:, :2].sum() < 0.15 * blocks.sum(), name


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch (extra train) is not installed")
def test_training_writes_both_files(tmp_path):
    subprocess.run([sys.executable, "-m", "compress.training.digits", "--out", tmp_path, "--epochs", "1",
                    "--sparse-epochs", "1"], check=True, cwd=ROOT, timeout=300)
    assert (tmp_path / "digits.onnx").exists() and json.loads((tmp_path / "digits.json").read_text())["seed"] == 7
