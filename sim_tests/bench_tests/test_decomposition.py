"""The speed bench: its layers are ResNet-18's, its figures are those of the decompositions."""

import json

import numpy as np

from golden import basis, tensor_train
from sim_tests.bench import decomposition


def test_layers_are_those_of_resnet18():
    layers = decomposition.resnet18()
    sizes = {name: int(np.prod(shape)) for name, (shape, _) in layers.items()}
    assert len(layers) == 21 and sum(sizes.values()) == 11_678_912
    assert sum(n for name, n in sizes.items() if ".conv" in name) == 10_985_472
    for shape, ranks in layers.values():
        taps = () if shape[1:3] == (1, 1) else (shape[1] * shape[2],)
        tensor_train.check_ranks((shape[0], *taps, shape[3]), ranks)


def test_rows(rng, tmp_path, monkeypatch, capsys):
    layers = {"a": ((12, 3, 3, 8), (1, 6, 5, 1)), "b": ((12, 1, 1, 8), (1, 4, 1))}
    a, b = decomposition.measure(layers, np.random.default_rng(3))
    again = np.random.default_rng(3)
    w, v = again.standard_normal((12, 3, 3, 8)), again.standard_normal((12, 1, 1, 8))
    assert a["train_error"] == tensor_train.tt_convolution(w, (1, 6, 5, 1)).meta["relative_error"]
    assert a["basis_energy"] == basis.decompose(w, count=6).meta["energy"]
    assert b["train_error"] == tensor_train.tt_linear(v[:, 0, 0], (12,), (8,), (1, 4, 1)).meta["relative_error"]
    assert "basis_s" not in b and min(a["train_s"], a["basis_s"], b["train_s"]) >= 0
    monkeypatch.setattr(decomposition, "resnet18", lambda: layers)
    assert decomposition.main(["--json", str(tmp_path / "rows.json")]) == 0
    assert "target 20 s" in capsys.readouterr().out
    assert [row["layer"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]] == ["a", "b"]
    monkeypatch.setattr(decomposition, "TARGET_SECONDS", -1.0)
    assert decomposition.main([]) == 1
