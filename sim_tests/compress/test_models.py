"""The shipped networks are what their reports say: form, size, provenance and, where CIFAR-10 is at hand, accuracy."""
import json
from pathlib import Path

import numpy as np
import pytest

from compress import engine, flow, package
from compress.network import BasisConvolution, Convolution
from golden import structured
from sim_tests.real_data import real_data
from spec import strict_yaml

FOLDER = Path(__file__).resolve().parents[2] / "models" / "resnet20"
NAMES = sorted(p.stem for p in FOLDER.glob("*.summand"))
#: Images that a test runs, and how far their accuracy may be from that of all 10,000.
IMAGES, MARGIN = 200, 0.08


def shipped(name):
    return package.load(FOLDER / f"{name}.summand")


def report_of(name):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def test_the_packages_are_small():
    assert NAMES == ["basis", "nm_2_4", "tasd", "tt"]
    assert sum((FOLDER / f"{name}.summand").stat().st_size for name in NAMES) < 5_000_000


@pytest.mark.parametrize("name", [n for n in NAMES if n != "tasd"])
def test_a_report_is_of_its_recipe_and_package(name):
    network, report = shipped(name), report_of(name)
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert report["recipe"] == text and strict_yaml.load(FOLDER / f"{name}.yaml")["network"] == report["network"]
    assert network.provenance["accuracy"] == report["accuracy"]
    assert network.provenance["training"]["recipe_digest"] == report["recipe_digest"]
    assert report["package_bytes"] == (FOLDER / f"{name}.summand").stat().st_size
    assert report["data"]["test"] == 10_000 and report["accuracy"]["golden"] == report["accuracy"]["integer_trained"]


def kernels(network):
    return [layer for layer in network.layers if isinstance(layer, (Convolution, BasisConvolution))
            and layer.kernel == (3, 3)]


def test_2_4_has_two_of_four():
    layers = [layer for layer in kernels(shipped("nm_2_4")) if layer.name != "conv1"]
    assert len(layers) == 18
    for layer in layers:
        assert layer.format == "nm:2:4"
        assert np.count_nonzero(layer.effective_weights().reshape(-1, 4), axis=1).max() == 2


def test_basis_is_ternary_and_sparse():
    layers = [layer for layer in kernels(shipped("basis")) if layer.name != "conv1"]
    assert len(layers) == 18 and all(isinstance(layer, BasisConvolution) for layer in layers)
    nonzeros = sum(np.count_nonzero(layer.coefficients) for layer in layers)
    assert nonzeros / sum(layer.coefficients.size for layer in layers) <= 0.1
    assert all(len(layer.basis) == 6 and set(np.unique(layer.coefficients)) <= {-1, 0, 1} for layer in layers)
    assert all(layer.metrics["retrained"] for layer in layers)


def test_tt_has_a_third_of_the_parameters():
    network, report = shipped("tt"), report_of("tt")
    weights = sum(layer.effective_weights().size for layer in network.layers if isinstance(layer, Convolution)
                  if "shortcut" not in layer.name)
    assert weights < 270_000 / 3 and report["parameters"] < 270_000 / 3
    chains = {layer.name.rsplit("_", 1)[0] for layer in network.layers if layer.name.endswith("_3")}
    assert len(chains) == 11


def test_tasd_saves_multiplications():
    network = shipped("tasd")
    found = network.provenance["method"]["search"]
    assert found["totals"]["macs_saved"] >= 0.4 and found["accuracy"] >= 0.99 * found["reference_accuracy"]
    executed = sum(row["macs_executed"] for row in found["table"])
    assert executed == found["totals"]["macs_executed"]
    formats = {layer.name: layer.format for layer in kernels(network)}
    assert sum(f.startswith(("nm:", "tasd:")) for f in formats.values()) == 18
    for layer in kernels(network):
        assert all(structured.fits(t.values, t.pattern) for t in layer.terms)


@pytest.mark.parametrize("name", NAMES)
def test_accuracy_on_real_images(name):
    network = shipped(name)
    facts = network.provenance
    wanted = facts["accuracy"]["golden"] if name != "tasd" else facts["method"]["search"]["accuracy"]
    x, labels, _ = flow.load_samples(f"cifar10:{real_data('cifar10')}:test", network, limit=IMAGES)
    assert np.bincount(labels).tolist() == [IMAGES // 10] * 10
    assert abs(engine.accuracy(network, x, labels) - wanted) < MARGIN
