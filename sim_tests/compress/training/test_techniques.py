"""Every technique in a run of the trainer: killed and resumed it ends the same, and its result is plain layers."""
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")

from compress.training import loader, recipe, trainer  # noqa: E402 (they follow the skip)
from compress.training.parametrizations import materialize  # noqa: E402
from compress.training.techniques import TECHNIQUES, build  # noqa: E402
from spec.errors import InputError  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402

torch.set_num_threads(1)

RECIPE = """
network: digits
data: {{kind: digits}}
precision: float32
seed: 3
stages:
  - {{name: sparse, epochs: 2, batch: 64, optimizer: {{rate: 0.02}}, techniques: [{technique}]}}
  - {{name: tune, epochs: 1, batch: 64, optimizer: {{rate: 0.01}}}}
"""
EXAMPLES = {
    "sr_ste": "{kind: sr_ste, pattern: '2:4', freeze_at: 0.5}",
    "sr_ste by layer": "{kind: sr_ste, pattern: '2:4', layers: {'block_*': '4:8+1:8', fc: dense}}",
    "prune": "{kind: prune, sparsity: 0.9, end: 0.5}",
    "hoyer": "{kind: hoyer, strength: 0.001, threshold: 0.01}",
    "reweighted": "{kind: reweighted, strength: 0.0001, groups: block, block: [4, 4], std: 0.9, refresh: 2}",
    "svd_training": "{kind: svd_training, strength: 0.1, energy: 0.2}",
    "lines": "{kind: lines, strength: 0.001, std: 0.8, block: [4, 16], layers: [fc]}",
    "constant_fan_in": "{kind: constant_fan_in, sparsity: 0.8, interval: 2, until: 1}",
    "collaborative": "{kind: collaborative, ratio: 0.5, layers: [block_a]}",
}


@pytest.fixture(scope="module")
def data():
    """The first 128 digits, one step of validation."""
    whole = loader.Source(kind="digits").load(seed=3)
    return replace(whole, **{name: tuple(a[:128] for a in getattr(whole, name)) for name in ("train", "validation")})


class Stop(Exception):
    pass


def kill(message, fraction, detail=""):
    """A progress function that ends the run in the second epoch."""
    if fraction is not None and 1 / 3 < fraction < 2 / 3:
        raise Stop


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_killed_run_ends_like_one_that_was_not(name, tmp_path, data):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(technique=EXAMPLES[name]), encoding="utf-8")
    plan, digest, _ = recipe.load(path)
    whole = trainer.Trainer(plan, digest, data, tmp_path / "whole")
    wanted = whole.run().state_dict()
    with pytest.raises(Stop):
        trainer.Trainer(plan, digest, data, tmp_path / "cut", progress=kill).run()
    found = trainer.Trainer(plan, digest, data, tmp_path / "cut").run().state_dict()
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(value, found[key]), key
    plain, x = materialize(whole.model).eval(), data.normalized(data.test[0][:4])
    assert not any(parametrize.is_parametrized(m) for m in plain.modules())
    torch.testing.assert_close(plain(x), whole.model.eval()(x), rtol=1e-4, atol=1e-5)


def test_every_kind_can_be_built_or_says_what_it_needs():
    for kind in TECHNIQUES:
        try:
            build({"kind": kind})
        except InputError as error:
            assert str(error).startswith("technique.")
    with pytest.raises(InputError, match=r"technique.kind must be one of .* \(did you mean sr_ste\?\), not 'sr_ste2'"):
        build({"kind": "sr_ste2"})
    with pytest.raises(InputError, match="technique must be a mapping with kind, not 'sr_ste'"):
        build("sr_ste")
    with pytest.raises(InputError, match=r"technique.decoy is not a known field \(did you mean decay\?\)"):
        build({"kind": "sr_ste", "decoy": 1})
