"""Recipes, loader, schedules, trainer: killed runs end like runs that were not; bad recipes name their field."""
import csv
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

from compress.training import loader, recipe, trainer  # noqa: E402
from compress.training.schedule import Optimizer, Schedule  # noqa: E402
from compress.training.fields import construct  # noqa: E402
from compress.training.technique import Technique, default_layers, select  # noqa: E402
from compress.training.networks import build  # noqa: E402
from spec.errors import InputError  # noqa: E402

DIGITS = """
network: digits
data: {kind: digits}
precision: float32
seed: 3
stages:
  - {name: first, epochs: 2, batch: 256, optimizer: {rate: 0.05}, schedule: {kind: cosine, warmup: 0.25}}
  - name: second
    epochs: 2
    batch: 256
    optimizer: {rate: 0.01, kind: adamw}
    average: 0.5
    settle: 2
    distill: {weight: 0.5}
"""


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def written(tmp_path, text, name="recipe.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def digits():
    return loader.Source(kind="digits").load(seed=3)


class Stop(Exception):
    pass


def interrupted(share):
    """A progress function that kills the run once ``share`` of it is done."""
    def progress(message, fraction, detail=""):
        if fraction is not None and fraction > share:
            raise Stop
    return progress


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_a_killed_run_ends_like_one_that_was_not(tmp_path, digits, share):
    plan, digest, _ = recipe.load(written(tmp_path, DIGITS))
    whole = trainer.Trainer(plan, digest, digits, tmp_path / "whole")
    wanted = whole.run().state_dict()
    with pytest.raises(Stop):
        trainer.Trainer(plan, digest, digits, tmp_path / "cut", progress=interrupted(share)).run()
    again = trainer.Trainer(plan, digest, digits, tmp_path / "cut")
    found = again.run().state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(value, found[name]), name
    timing = ("seconds", "images_per_second")
    assert [{k: v for k, v in row.items() if k not in timing} for row in again.rows] == \
           [{k: v for k, v in row.items() if k not in timing} for row in whole.rows]
    assert whole.rows[-1]["validation_accuracy"] > whole.rows[0]["validation_accuracy"]


def test_the_log_has_a_row_for_each_epoch(tmp_path, digits):
    plan, digest, _ = recipe.load(written(tmp_path, DIGITS))
    run = trainer.Trainer(plan, digest, digits, tmp_path / "run")
    run.run()
    rows = json.loads((tmp_path / "run" / "log.json").read_text())
    assert [(r["stage"], r["epoch"], r.get("finished", False)) for r in rows] == [
        ("first", 1, False), ("first", 2, False), ("first", 2, True),
        ("second", 1, False), ("second", 2, False), ("second", 2, True)]
    with open(tmp_path / "run" / "log.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(r["stage"], r["epoch"]) for r in table] == [("first", "1"), ("first", "2"), ("second", "1"),
                                                         ("second", "2")]
    assert float(table[1]["loss"]) < float(table[0]["loss"])


def test_another_recipe_and_damaged_checkpoints_are_refused(tmp_path, digits):
    plan, digest, _ = recipe.load(written(tmp_path, DIGITS))
    trainer.Trainer(plan, digest, digits, tmp_path / "run").run()
    other, other_digest, _ = recipe.load(written(tmp_path, DIGITS.replace("seed: 3", "seed: 4")))
    with pytest.raises(InputError, match="another recipe"):
        trainer.Trainer(other, other_digest, digits, tmp_path / "run").run()
    trainer.Trainer(other, other_digest, digits, tmp_path / "run").run(restart=True)
    file = tmp_path / "run" / "checkpoint.pt"
    good = file.read_bytes()
    for bad in (b"", b"not a checkpoint", good[:len(good) // 2]):
        file.write_bytes(bad)
        with pytest.raises(InputError, match="checkpoint.pt: must be a checkpoint"):
            trainer.Trainer(other, other_digest, digits, tmp_path / "run").run()
    file.write_bytes(good)
    (tmp_path / "run" / "stage-0.pt").unlink()
    with pytest.raises(InputError, match="stage-0.pt: must be there"):
        trainer.Trainer(other, other_digest, digits, tmp_path / "run").run()


def test_paths_and_threads_are_no_part_of_the_digest():
    tree = {"network": "digits", "data": {"kind": "cifar10", "path": "a"}, "stages": [{"name": "x"}]}
    same = {"threads": "2", "weights": "w", "stages": [{"name": "x"}], "data": {"path": "b", "kind": "cifar10"},
            "network": "digits"}
    assert recipe.digest(tree) == recipe.digest(same)
    assert recipe.digest(tree) != recipe.digest(tree | {"seed": "2"})


@pytest.mark.parametrize("old, new, message", [
    ("network: digits", "network: digit", "network must be one of"),
    ("seed: 3", "seed: -1", "seed must be a whole number"),
    ("seed: 3", "sead: 3", r"sead is not a known field \(did you mean seed"),
    ("data: {kind: digits}", "data: {kind: digits, path: x}", "data.path must not be given"),
    ("data: {kind: digits}", "data: {kind: cifar10}", "data.path must be given"),
    ("data: {kind: digits}", "data: {kind: digits, mean: [0, 0]}", "data.mean must be a list of 1 numbers"),
    ("precision: float32", "precision: float16", "precision must be one of"),
    ("epochs: 2, batch", "epochs: many, batch", r"stages\[0\].epochs must be a whole number"),
    ("optimizer: {rate: 0.05}", "optimizer: {rate: 0}", r"stages\[0\].optimizer.rate must be a number above 0"),
    ("optimizer: {rate: 0.05}", "optimizer: {rate: nan}", r"stages\[0\].optimizer.rate must be a number"),
    ("optimizer: {rate: 0.05}, ", "", r"stages\[0\].optimizer must be given"),
    ("kind: cosine", "kind: cosinus", r"stages\[0\].schedule.kind must be one of"),
    ("name: second", "name: first", "stages must have different names"),
    ("distill: {weight: 0.5}", "distill: {weight: 2}", r"stages\[1\].distill.weight must be a number"),
    ("distill: {weight: 0.5}", "distill: {network: digits}", r"stages\[1\].distill.weights must be given"),
    ("settle: 2", "techniques: [{kind: magic}]", r"stages\[1\].techniques\[0\].kind must be one of"),
    ("settle: 2", "techniques: [sr_ste]", r"stages\[1\].techniques\[0\] must be a mapping with kind"),
    ("settle: 2", "techniques: [{kind: sr_ste, pattern: 5:4}]", r"stages\[1\].techniques\[0\].pattern must"),
    ("stages:", "package: {integer: {epochs: 1}}\nstages:", "package.integer.optimizer must be given"),
    ("stages:", "package: {calibration: 0}\nstages:", "package.calibration must be a whole number"),
])
def test_bad_recipes_name_file_field_and_rule(tmp_path, old, new, message):
    assert old in DIGITS
    path = written(tmp_path, DIGITS.replace(old, new, 1))
    with pytest.raises(InputError, match=message) as caught:
        recipe.load(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_network_of_another_image_size_is_refused(tmp_path, digits):
    plan, digest, _ = recipe.load(written(tmp_path, DIGITS.replace("network: digits", "network: resnet20")))
    with pytest.raises(InputError, match="network needs images of"):
        trainer.Trainer(plan, digest, digits, tmp_path / "run").run()


def test_a_loss_that_is_not_finite_ends_the_run_with_its_stage(tmp_path, digits, monkeypatch):
    plan, digest, _ = recipe.load(written(tmp_path, DIGITS))
    monkeypatch.setattr(trainer.Phase, "_loss", lambda self, x, logits, labels: logits.sum() * float("nan"))
    with pytest.raises(InputError, match="stage first diverged in epoch 1"):
        trainer.Trainer(plan, digest, digits, tmp_path / "run").run()


# -- loader ------------------------------------------------------------------------------------------------------------
def small_set(rng, count=40, shift=2, flip=True):
    images = rng.integers(0, 256, (count, 6, 5, 3), dtype=np.uint8)
    images[:, 2, 2, 0] = np.arange(count)                     # a mark that finds an image again
    labels = np.arange(count) % 4
    return loader.Dataset(train=(images, labels), validation=(images, labels), test=(images, labels), shift=shift,
                          flip=flip, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))


def test_every_batch_element_is_a_crop_of_its_image():
    data = small_set(np.random.default_rng(0))
    images, labels = data.train
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))).astype(np.float64) / 255
    normal = (padded - data.mean) / data.std
    crops = {}                                                # every possible view of every image
    for n in range(len(images)):
        for top in range(5):
            for left in range(5):
                view = normal[n, top:top + 6, left:left + 5]
                for mirrored in (view, view[:, ::-1]):
                    crops[np.round(mirrored, 4).tobytes()] = n
    seen = []
    for x, y in data.batches(16, torch.Generator().manual_seed(1)):
        assert x.shape[1:] == (3, 6, 5) and x.is_contiguous(memory_format=torch.channels_last)
        for view, label in zip(x.permute(0, 2, 3, 1).numpy().astype(np.float64), y.tolist()):
            near = min(range(len(images)), key=lambda n: _distance(normal[n], view))
            assert _distance(normal[near], view) < 1e-5 and labels[near] == label
            seen.append(near)
    assert sorted(seen) == list(range(len(images)))           # 16 + 16 + 8: no batch is below half
    assert data.steps(16) == 3 and small_set(np.random.default_rng(0), count=38).steps(16) == 2


def _distance(padded, view):
    """Largest difference to the nearest of all crops and mirrored crops."""
    best = np.inf
    for top in range(5):
        for left in range(5):
            crop = padded[top:top + 6, left:left + 5]
            best = min(best, np.abs(crop - view).max(), np.abs(crop[:, ::-1] - view).max())
    return best


def test_all_shifts_and_both_sides_occur():
    data = small_set(np.random.default_rng(0), count=400)
    middle = set()
    for x, _ in data.batches(100, torch.Generator().manual_seed(2)):
        dark = (x[:, 0] < (0 - 0.1) / 0.5 + 1e-6)             # rows and columns of the padding
        middle |= {(int(d.all(1).nonzero().numel()), int(d.all(0).nonzero().numel())) for d in dark}
    assert {m[0] for m in middle} >= {0, 1, 2} and {m[1] for m in middle} >= {0, 1, 2}


def test_splits_are_disjoint_even_and_seeded(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 40)
    chosen = loader._spread(labels, 50, np.random.default_rng(7), "validation")
    assert len(set(chosen.tolist())) == 50 and np.bincount(labels[chosen]).tolist() == [10] * 5
    assert np.array_equal(chosen, loader._spread(labels, 50, np.random.default_rng(7), "validation"))
    assert not np.array_equal(chosen, loader._spread(labels, 50, np.random.default_rng(8), "validation"))
    with pytest.raises(InputError, match="validation must be below the 200 training images"):
        loader._spread(labels, 200, rng, "validation")


# -- schedules and losses ----------------------------------------------------------------------------------------------
def test_schedules_by_hand():
    cosine = Schedule(kind="cosine", warmup="0.2", final="0.1")
    assert [cosine(p) for p in (0, 0.1, 0.2)] == [0, 0.5, 1]
    assert cosine(0.6) == pytest.approx(0.55) and cosine(1.0) == pytest.approx(0.1)
    linear = Schedule(kind="linear", final=0.5)
    assert (linear(0), linear(0.5), linear(1)) == (1, 0.75, 0.5)
    step = Schedule(kind="step", milestones=["0.5", "0.75"], factor="0.1")
    assert [step(p) for p in (0, 0.5, 0.8)] == pytest.approx([1, 0.1, 0.01])
    assert Schedule(kind="constant")(0.9) == 1


def test_weight_decay_spares_vectors():
    groups = Optimizer(rate=0.1, weight_decay=0.5).make(build("digits")).param_groups
    assert [g["weight_decay"] for g in groups] == [0.5, 0.0]
    assert all(p.ndim > 1 for p in groups[0]["params"]) and all(p.ndim <= 1 for p in groups[1]["params"])


def test_the_distillation_loss_by_hand(digits):
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return torch.tensor([[2.0, 0.0]])

    stage = recipe.Stage(name="x", epochs=1, optimizer={"rate": 0.1}, distill={"weight": 0.75, "temperature": 2})
    phase = trainer.Phase(stage, build("digits"), digits, precision="float32", generator=None, teacher=Fixed())
    logits, label = np.array([0.5, 1.0]), 1

    def soft(v, t):
        return np.exp(v / t) / np.exp(v / t).sum()
    p, q = soft(np.array([2.0, 0.0]), 2), soft(logits, 2)
    wanted = 0.25 * -np.log(soft(logits, 1)[label]) + 0.75 * 4 * (p * np.log(p / q)).sum()
    found = phase._loss(None, torch.tensor(logits[None], dtype=torch.float32), torch.tensor([label]))
    assert float(found) == pytest.approx(wanted, rel=1e-5)


# -- techniques --------------------------------------------------------------------------------------------------------
def test_default_layers_are_kernels_with_channels():
    assert default_layers(build("digits")) == ["block_a", "block_b", "conv2"]
    assert list(select(build("digits"), ["block_*", "fc"])) == ["block_a", "block_b", "fc"]
    with pytest.raises(InputError, match="layers matches no layer with weights; layers: conv1, block_a"):
        select(build("digits"), ["blok*"])
    with pytest.raises(InputError, match="layers must be a list"):
        select(build("digits"), "block_a")


def test_construct_names_missing_and_unknown_options():
    class Example(Technique):
        def __init__(self, *, strength, layers=None):
            self.strength, self.layers = strength, layers

    assert construct(Example, {"strength": 1}).strength == 1
    with pytest.raises(InputError, match="here.strength must be given"):
        construct(Example, {}, field="here")
    with pytest.raises(InputError, match=r"^strenght is not a known field \(did you mean strength"):
        construct(Example, {"strenght": 1})


def test_hooks_are_called_in_their_order(tmp_path, digits):
    calls = []

    class Recorder(Technique):
        def start(self, model):
            super().start(model)
            calls.append("start")

        def begin_epoch(self, epoch, epochs):
            calls.append(f"epoch {epoch}/{epochs}")

        def penalty(self):
            calls.append("penalty")
            return 0.0 * sum(p.sum() for p in self.model.parameters())

        def after_backward(self):
            assert all(p.grad is not None for p in self.model.parameters())
            calls.append("after_backward")

        def after_step(self):
            calls.append("after_step")

        def figures(self):
            calls.append("figures")
            return {"conv1/one": 1.0}

        def finish(self):
            calls.append("finish")

    plan, digest, _ = recipe.load(written(tmp_path, DIGITS))
    plan.stages[0].techniques = lambda: [Recorder()]
    plan.stages = plan.stages[:1]
    run = trainer.Trainer(plan, digest, digits, tmp_path / "run")
    run.run()
    step = ["penalty", "after_backward", "after_step"]
    steps = digits.steps(256)
    epochs = [[f"epoch {n}/2"] + steps * step + ["figures"] for n in range(2)]
    rehearsal = ["start", "finish"]
    assert calls == [*rehearsal, "start", *epochs[0], *epochs[1], "finish"]
    assert run.rows[0]["conv1/one"] == 1.0
    assert "first,1,conv1,one,1.0" in (tmp_path / "run" / "layers.csv").read_text()
