"""`summand train` with recipes, files and folders that do not fit: one line, status 2, before anything is trained."""
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

from compress import demo  # noqa: E402
from compress.training import log, networks, trainer  # noqa: E402
from scripts import summand  # noqa: E402
from spec.errors import InputError  # noqa: E402

HEAD = "network: digits\ndata: {kind: digits}\nprecision: float32\n"
FIRST = "  - {name: first, epochs: 1, optimizer: {rate: 0.05}}\n"
STAGES = "stages:\n" + FIRST
ADMM = "{{kind: admm, projection: {{{}}}}}"


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    whole = demo.digits
    monkeypatch.setattr(demo, "digits", lambda split: tuple(a[:96] for a in whole(split)))


def train(folder, text, *more, out="out"):
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return summand.main(["train", str(folder / "recipe.yaml"), "--out", str(folder / out), *more])


def refused(capsys, status, *words):
    """The one line of an error."""
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("…")]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("summand: "), lines
    for word in words:
        assert word in lines[0]
    return lines[0]


@pytest.mark.parametrize(("text", "words"), [
    (HEAD.replace("digits\n", "[digits]\n", 1) + STAGES, ("network must be one of", "['digits']")),
    (HEAD + STAGES + "weights: [a]\n", ("weights must be a path, not ['a']",)),
    (HEAD + STAGES + 'weights: "a\\0.pt"\n', ("weights must be a path",)),
    (HEAD.replace("{kind: digits}", "{kind: cifar10, path: [a]}") + STAGES, ("data.path must be a path, not ['a']",)),
    (HEAD.replace("{kind: digits}", "{kind: [mnist], path: a}") + STAGES, ("data.kind must be one of",)),
    (HEAD.replace("{kind: digits}", "{kind: digits, limit: 5}") + STAGES, ("data.limit must not be given",)),
    (HEAD + STAGES.replace("0.05", "1_0"), ("stages[0].optimizer.rate must be a number above 0", "'1_0'")),
    (HEAD + STAGES.replace("0.05", "\u0663"), ("stages[0].optimizer.rate must be a number",)),
    (HEAD + STAGES.replace("}}", "}, schedule: []}"), ("stages[0].schedule must be a mapping, not []",)),
    (HEAD + STAGES.replace("}}", "}, techniques: [{kind: [a]}]}"), ("techniques[0].kind must be one of",)),
    (HEAD + STAGES + "package: {observer: x}\n", ("package.observer must be one of minmax", "'x'")),
    (HEAD + STAGES + "package: {config: [a]}\n", ("package.config must be a path",)),
    (HEAD + STAGES + "package: {config: gone.yaml}\n", ("package.config must be a good configuration", "gone.yaml")),
    (HEAD + STAGES + 'package: {method: "basis:6@4:8", config: nm256}\n', ("package.pattern must have M = 16",)),
    (HEAD + STAGES + "package: {layers: {zzz: dense}}\n", ("package.layers.zzz is not a layer with weights",)),
    (HEAD + STAGES + "package: {integer: {name: first, epochs: 0}}\n", ("package.integer.name must not be given",)),
])
def test_fields(tmp_path, capsys, text, words):
    status = train(tmp_path, text)
    line = refused(capsys, status, *words)
    assert line.startswith(f"summand: {tmp_path / 'recipe.yaml'}: ")
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(("technique", "words"), [
    (ADMM.format("kind: [a]"), "techniques[0].projection.kind must be one of"),
    (ADMM.format("kind: tensor_train, ranks: []"), "techniques[0].layers.block_a.ranks must be positive integers"),
    (ADMM.format("kind: tensor_train, ranks: [1, 33, 33, 1]"), "ranks[1] must be at most 1 * 32 = 32"),
    (ADMM.format("kind: svd, rank: 33"), "layers.block_a.rank must be a whole number in 1..32, not 33"),
    (ADMM.format("kind: basis, count: 10"), "layers.block_a.count must be at most 9, not 10"),
    ('{kind: sr_ste, pattern: "8:64"}', "techniques[0].pattern must fit a layer"),
    ("{kind: sr_ste, decay: 1e300}", "techniques[0].decay must be a number at least 0, at most 1e+06"),
    ("{kind: sr_ste, layers: [zzz]}", "techniques[0].layers matches no layer with weights"),
    ("{kind: prune, sparsity: 0.5, groups: block, block: [33, 4]}", "block must be at most [32, 32]"),
    ("{kind: factorize, at: 1, projection: {kind: svd, rank: 4}}", "at must be at most 0 in a stage of 1 epochs"),
    (ADMM.format("kind: tensor_train, ranks: [1, 8, 8, 1]") + ", {kind: sr_ste}",
     "techniques[1] must not share layers with another technique"),
])
def test_techniques_of_a_later_stage(tmp_path, capsys, technique, words):
    later = f"  - {{name: later, epochs: 1, optimizer: {{rate: 0.05}}, techniques: [{technique}]}}\n"
    refused(capsys, train(tmp_path, HEAD + STAGES + later), str(tmp_path / "recipe.yaml"), words)
    assert not list((tmp_path / "out").glob("*"))                # the first stage has not been trained


def test_measuring_needs_an_epoch(tmp_path, capsys):
    stage = "stages: [{name: a, epochs: 0, techniques: [{kind: collaborative, ratio: 0.5}]}]\n"
    refused(capsys, train(tmp_path, HEAD + stage),
            "stage a: techniques[0].collaborative needs a stage of at least one epoch")


def test_what_only_training_can_tell_names_its_stage(tmp_path, capsys):
    stage = "stages: [{name: a, epochs: 0, techniques: [{kind: lines, strength: 0, threshold: 99, layers: [fc]}]}]\n"
    refused(capsys, train(tmp_path, HEAD + stage), "stage a: techniques[0].layers.fc drops every line of a layer")


def test_weights_that_diverge_in_the_last_step_are_no_result(tmp_path, capsys):
    stage = STAGES.replace("}}", "}, techniques: [{kind: hoyer, strength: 1e308}]}")
    refused(capsys, train(tmp_path, HEAD + stage), "stage first diverged in epoch 1")
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_teacher_of_other_images(tmp_path, capsys):
    torch.save(networks.build("resnet8", 10).state_dict(), tmp_path / "t.pt")
    stage = STAGES.replace("}}", "}, distill: {network: resnet8, weights: t.pt}}")
    refused(capsys, train(tmp_path, HEAD + stage), "distill.network needs images of (3, 32, 32)")


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_place_of_the_folder(tmp_path, capsys, place):
    (tmp_path / "file").write_text("", encoding="utf-8")
    refused(capsys, train(tmp_path, HEAD + STAGES, out=place), str(tmp_path / place), "must be a folder")


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    def write(part):
        part.write_text("half", encoding="utf-8")
        raise OSError(28, "No space left on device")

    (tmp_path / "log.csv").write_text("before", encoding="utf-8")
    with pytest.raises(InputError, match=r"log.csv: must be writable \(No space left on device\)"):
        log.replace(tmp_path / "log.csv", write)
    assert [(p.name, p.read_text(encoding="utf-8")) for p in tmp_path.iterdir()] == [("log.csv", "before")]


def test_checkpoints(tmp_path, capsys):
    """Damaged ones, and those of a run on other weights, are refused; the run before stays as it is."""
    assert train(tmp_path, HEAD + STAGES) == 0
    good = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    capsys.readouterr()
    damaged = [b"", b"abc", b"\x80\x04N."]
    damaged += [good | {key: value} for key in ("stage", "epoch", "rows", "phase", "generator", "torch_generator")
                for value in (None, "x", {"a": 1}, -1)]
    for content in damaged:
        if isinstance(content, bytes):
            (tmp_path / "out" / "checkpoint.pt").write_bytes(content)
        else:
            torch.save(content, tmp_path / "out" / "checkpoint.pt")
        refused(capsys, train(tmp_path, HEAD + STAGES), str(tmp_path / "out" / "checkpoint.pt"))
    torch.save(good, tmp_path / "out" / "checkpoint.pt")
    torch.save(networks.build("digits", 10).state_dict(), tmp_path / "other.pt")
    refused(capsys, train(tmp_path, HEAD + STAGES, "--weights", str(tmp_path / "other.pt")),
            "is a checkpoint of a run on other first weights or data")
    assert train(tmp_path, HEAD + STAGES) == 0


def test_a_package_made_later_is_that_of_a_run_in_one_go(tmp_path):
    package = "package: {integer: {epochs: 1, batch: 32, optimizer: {rate: 0.001}}}\n"
    assert train(tmp_path, HEAD + STAGES + package, out="whole") == 0
    assert train(tmp_path, HEAD + STAGES + package.replace("0.001", "0.002"), out="later") == 0
    assert train(tmp_path, HEAD + STAGES + package, out="later") == 0
    for name in ("model.onnx", "model.summand"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "later" / name).read_bytes()


def test_trying_the_stages_changes_no_result(tmp_path, monkeypatch):
    stages = STAGES + "  - {name: b, epochs: 1, optimizer: {rate: 0.05}, techniques: [{kind: sr_ste}]}\n"
    assert train(tmp_path, HEAD + stages, out="a") == 0
    monkeypatch.setattr(trainer.Trainer, "_rehearse", lambda self: None)
    assert train(tmp_path, HEAD + stages, out="b") == 0
    logs = [[row["loss"] for row in json.loads((tmp_path / out / "log.json").read_text()) if "loss" in row]
            for out in "ab"]
    assert np.isfinite(logs[0]).all() and logs[0] == logs[1]
