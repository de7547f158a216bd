"""`summand train` from recipe to package: what the report says is what the files do."""
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

from compress import demo, engine, package  # noqa: E402
from compress.network import Convolution  # noqa: E402
from scripts import summand  # noqa: E402

RECIPE = """
network: digits
data: {kind: digits}
precision: float32
seed: 5
stages:
  - {name: dense, epochs: 3, batch: 64, optimizer: {rate: 0.1, weight_decay: 0.0005}}
  - {name: sparse, epochs: 2, batch: 64, optimizer: {rate: 0.02}, techniques: [{kind: sr_ste, pattern: "1:4"}]}
package: {method: nm:1:4, layers: {fc: dense}, integer: {epochs: 1, batch: 64, optimizer: {rate: 0.001}}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    assert summand.main(["train", str(folder / "recipe.yaml"), "--out", str(folder / "out")]) == 0
    return folder


def test_the_package_has_the_accuracy_of_the_report(finished):
    report = json.loads((finished / "out" / "report.json").read_text())
    network = package.load(finished / "out" / "model.summand")
    x, labels = demo.digits("heldout")
    found = engine.accuracy(network, x.transpose(0, 2, 3, 1), labels)
    assert report["accuracy"]["golden"] == found == report["accuracy"]["integer_trained"] > 0.8
    assert network.provenance["accuracy"] == report["accuracy"]
    assert network.provenance["training"]["recipe_digest"] == report["recipe_digest"]
    assert report["recipe"] == RECIPE and report["epochs"] == 6
    assert report["package_bytes"] == (finished / "out" / "model.summand").stat().st_size


def test_the_layers_have_the_formats_of_the_recipe(finished):
    layers = {layer.name: layer for layer in package.load(finished / "out" / "model.summand").layers
              if isinstance(layer, Convolution)}
    assert {n: layer.format for n, layer in layers.items()} == {
        "conv1": "dense", "block_a": "nm:1:4", "block_b": "nm:1:4", "conv2": "nm:1:4", "fc": "dense"}
    for name in ("block_a", "block_b", "conv2"):
        blocks = layers[name].effective_weights().reshape(-1, 4)
        assert (np.count_nonzero(blocks, axis=1) <= 1).all() and np.count_nonzero(blocks) > len(blocks) / 2


def test_the_onnx_file_is_the_float_network(finished):
    report = json.loads((finished / "out" / "report.json").read_text())
    x, labels = demo.digits("heldout")
    logits = engine.run_onnx(finished / "out" / "model.onnx", x)
    assert float((logits.argmax(1) == labels).mean()) == report["accuracy"]["float"]


def test_a_finished_run_is_not_trained_again(finished):
    before = {p.name: p.read_bytes() for p in (finished / "out").iterdir()}
    assert summand.main(["train", str(finished / "recipe.yaml"), "--out", str(finished / "out")]) == 0
    after = {p.name: p.read_bytes() for p in (finished / "out").iterdir()}
    assert before.keys() == after.keys()
    for name in ("model.summand", "model.onnx", "accuracy.svg", "log.json", "checkpoint.pt"):
        assert before[name] == after[name], name


def test_another_package_needs_no_new_training(finished, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    other = RECIPE.replace("method: nm:1:4, ", "method: dense, ").replace("epochs: 1, batch", "epochs: 2, batch")
    recipe.write_text(other, encoding="utf-8")
    assert summand.main(["train", str(recipe), "--out", str(finished / "out")]) == 0
    rows = json.loads((finished / "out" / "log.json").read_text())
    assert [r["stage"] for r in rows] == ["dense"] * 4 + ["sparse"] * 3 + ["integer"] * 2
    assert json.loads((finished / "out" / "report.json").read_text())["layers"]["block_a"]["format"] == "dense"


def test_bad_input_is_one_line(finished, tmp_path, capsys):
    cases = [([str(tmp_path / "none.yaml")], "none.yaml"),
             ([str(finished / "recipe.yaml"), "--weights", str(tmp_path / "none.pt")], "none.pt")]
    recipe = tmp_path / "other.yaml"
    recipe.write_text(RECIPE.replace("seed: 5", "seed: 6"))
    cases.append(([str(recipe)], "checkpoint of another recipe"))
    for arguments, message in cases:
        out = finished / "out" if message.startswith("checkpoint") else tmp_path / "out"
        assert summand.main(["train", *arguments, "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and "Traceback" not in error
