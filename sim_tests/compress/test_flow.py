"""The whole flow on the demo network: accuracy on data that nothing was tuned on, options, refusals."""
import json
from pathlib import Path

import numpy as np
import pytest

from compress import demo, engine, flow, onnx_import, package
from compress import graph as graphs
from compress.network import Convolution
from sim_tests.compress.networks import same_network
from spec.errors import InputError

DIGITS = Path(__file__).resolve().parents[2] / "models" / "digits.onnx"
FACTS = json.loads(DIGITS.with_suffix(".json").read_text(encoding="utf-8"))


def heldout():
    x, labels = demo.digits("heldout")
    return graphs.to_nhwc(x, (8, 8, 1)), labels


def compress(method, **options):
    return flow.compress_model(DIGITS, method, **({"calibration": "demo:calibration"} | options))


def test_import_equals_onnx_runtime():
    graph = onnx_import.load(DIGITS)
    x, labels = demo.digits("heldout")
    got = graphs.forward(graph, graphs.to_nhwc(x, (8, 8, 1)))[:, 0, 0]
    np.testing.assert_allclose(got, engine.run_onnx(DIGITS, x), rtol=1e-3, atol=1e-4)
    assert (got.argmax(1) == labels).mean() == pytest.approx(FACTS["float_accuracy"]["heldout"], abs=1e-9)
    kinds = [type(n).__name__ for n in graph.nodes]
    assert kinds == ["Conv", "Conv", "Conv", "Conv", "Pool", "Pool", "Conv"]
    assert graph.nodes[2].residual == graph.nodes[0].output


@pytest.mark.parametrize("method,loss", [("dense", 0.006), ("nm:2:4", 0.012), ("nm:4:8", 0.012),
                                         ("tasd:4:8+1:8", 0.009)])
@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_int8_accuracy_on_the_held_out_split(method, loss, observer):
    """At most two images of 350 lost by int8, four by half of the weights."""
    network = compress(method, observer=observer)
    assert engine.accuracy(network, *heldout()) >= FACTS["float_accuracy"]["heldout"] - loss


def test_full_patterns_give_the_dense_network():
    dense, full = compress("dense"), compress("nm:8:8")
    q = engine.quantize_input(dense, heldout()[0][:32])
    for name, array in engine.run(dense, q, keep=True).items():
        assert np.array_equal(array, engine.run(full, q, keep=True)[name])


def test_tasder_keeps_99_percent_and_reports_its_search(tmp_path):
    network = compress("tasder", config="nm256", validation="demo:validation")
    facts = network.provenance["method"]
    assert facts["method"] == "tasder" and facts["search"]["accuracy"] >= 0.99 * facts["search"]["reference_accuracy"]
    assert facts["search"]["split"] == "scikit-learn digits, split validation"
    formats = {v.name: v.format for v in network.layers if isinstance(v, Convolution)}
    assert formats == dict.fromkeys(formats, "dense") | facts["layers"]
    assert formats["conv1"] == "dense" and sum(f != "dense" for f in formats.values()) >= 4
    assert engine.accuracy(network, *heldout()) >= 0.97
    package.save(network, tmp_path / "t.sum")
    same_network(package.load(tmp_path / "t.sum"), network)


def test_permutation_is_reported_and_dense_results_stay():
    plain, moved = compress("nm:2:8"), compress("nm:2:8", permutation=True)
    sets = moved.provenance["permutation"]["sets"]
    assert all(s["kept_after"] >= s["kept_before"] for s in sets) and any(
        s["kept_after"] > s["kept_before"] for s in sets)
    lost = [sum(v.metrics["dropped_magnitude"] for v in n.layers if isinstance(v, Convolution)) for n in (plain, moved)]
    assert lost[1] < lost[0]


def test_data_files_and_recipes(tmp_path):
    x, labels = demo.digits("calibration")
    np.savez(tmp_path / "c.npz", x=x, labels=labels)
    np.save(tmp_path / "c.npy", x)
    (tmp_path / "r.yaml").write_text("method: nm:2:4\nlayers: {fc: dense}\n", encoding="utf-8")
    told = []
    network = flow.compress_model(DIGITS, str(tmp_path / "r.yaml"), calibration=tmp_path / "c.npz",
                                  progress=lambda *a: told.append(a))
    other = flow.compress_model(DIGITS, str(tmp_path / "r.yaml"), calibration=tmp_path / "c.npy")
    assert network.tensors == other.tensors and told
    formats = {v.name: v.format for v in network.layers if isinstance(v, Convolution)}
    assert formats["fc"] == "dense" and formats["conv2"] == "nm:2:4"
    assert network.provenance["calibration"]["source"] == "c.npz" and not network.provenance["data_is_random"]


def test_named_layers_are_not_spared():
    plan = flow.methods.Recipe(default=flow.methods.parse("dense"), layers={"conv1": flow.methods.parse("nm:2:4")})
    layer = compress(plan).layers[0]
    assert layer.format == "nm:2:4" and "kept_dense" not in layer.metrics


def test_random_calibration_says_so():
    network = flow.compress_model(DIGITS, "dense")
    assert network.provenance["data_is_random"] and "seed 0" in network.provenance["calibration"]["source"]


@pytest.mark.parametrize("options,text", [
    ({"method": "tasder"}, "tasder needs a configuration"),
    ({"method": "tasder", "config": "nm256", "calibration": None}, "must be given with labels"),
    ({"method": "tasder", "config": "nm257", "validation": "demo:validation"}, "did you mean nm256"),
    ({"method": "nm:9:4"}, "must be an N:M pattern"), ({"calibration": "demo:other"}, "split must be one of"),
    ({"observer": "best"}, "observer must be one of"),
    ({"method": flow.methods.Recipe(default=flow.methods.parse("dense"),
                                    layers={"conv9": flow.methods.parse("dense")})}, "layers.conv9 is not a layer")])
def test_refusals(options, text):
    with pytest.raises(InputError) as caught:
        compress(**({"method": "dense"} | options))
    assert text in str(caught.value)


def test_data_that_do_not_fit(tmp_path):
    cases = [({"x": np.zeros((4, 8, 8, 1))}, "must be [N, 1, 8, 8]"),
             ({"x": np.zeros((4, 1, 8, 8)), "labels": np.zeros(3, int)}, "labels must be 4 integers"),
             ({"x": np.zeros((4, 1, 8, 8)), "labels": np.zeros(4)}, "labels must be 4 integers"),
             ({"x": np.full((4, 1, 8, 8), 1e300)}, "must be finite in float32")]
    for number, (members, text) in enumerate(cases):
        path = tmp_path / f"{number}.npz"
        np.savez(path, **members)
        with pytest.raises(InputError) as caught:
            compress("dense", calibration=path)
        assert text in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("source", [None, "demo:calibration"])
@pytest.mark.parametrize("limit", [1, 5])
def test_limit_counts_samples_of_every_source(source, limit):
    x, _, _ = flow.load_samples(source, onnx_import.load(DIGITS), limit=limit)
    assert x.shape == (limit, 8, 8, 1)
