"""Reports of both searches on the demo network and on a one-shot pruned one: the 99 % rule on data nobody tuned on."""
import json

import numpy as np
import onnx
from onnx import numpy_helper
import pytest

from compress.search import report
from sim_tests.compress.test_flow import DIGITS
from spec.errors import InputError

DATA = {"config": "nm256", "calibration": "demo:calibration", "validation": "demo:validation"}


def pruned(path, share):
    """The demo network with the smallest ``share`` of the weights of each convolution but the first set to zero."""
    model, count = onnx.load(DIGITS), 0
    for tensor in model.graph.initializer:
        w = numpy_helper.to_array(tensor)
        if w.ndim == 4 and w.shape[1] > 1:
            cut = np.quantile(np.abs(w), share)
            tensor.CopyFrom(numpy_helper.from_array(np.where(np.abs(w) > cut, w, 0).astype(w.dtype), tensor.name))
            count += 1
    assert count >= 3
    onnx.save(model, path)
    return path


def test_weights_of_a_pruned_network(tmp_path):
    """One-shot pruned by 70 %, no training: the rule holds and most multiplications go."""
    path = pruned(tmp_path / "pruned.onnx", 0.7)
    facts = report.report(path, operand="weights", test="demo:heldout", **DATA)
    assert facts["accuracy"] >= 0.99 * facts["reference_accuracy"] and facts["first"] == "dense"
    assert facts["totals"]["macs_saved"] >= 0.4 and facts["totals"]["cycles_saved"] >= 0.4
    assert facts["test"]["samples"] == 350 and facts["test"]["series"] >= 0.98 * facts["test"]["float"]
    assert facts["table"][0]["method"] == "dense" and facts["split"].endswith("validation")
    searched = report.report(path, operand="weights", first="search", **DATA)
    assert searched["table"][0]["method"] == "nm:1:8" and searched["table"][0]["dropped_nonzeros"] == 0
    assert searched["table"][0]["cycles_padded"] < facts["table"][0]["cycles_padded"]
    assert searched["table"][0]["macs_executed"] == searched["table"][0]["macs"], "one channel of eight: nothing saved"


def test_network_wise_weights():
    facts = report.report(DIGITS, operand="weights", mode="network", **DATA)
    assert len({r["method"] for r in facts["table"][1:]}) == 1 and facts["mode"] == "network"


def test_activations(tmp_path):
    facts = report.report(DIGITS, operand="activations", test="demo:heldout", **DATA)
    json.dumps(facts)
    assert facts["accuracy"] >= 0.99 * facts["reference_accuracy"] and facts["note"].startswith("a report, no package")
    assert facts["float_accuracy"] >= 0.98 and facts["totals"]["macs_saved"] >= 0.3
    assert facts["test"]["series"] >= 0.97 and facts["sparsity"]["conv1"]["pseudo"]
    assert facts["network"] == "digits.onnx" and facts["config"] == "nm256" and -0.1 <= facts["alpha"] <= 0.3


@pytest.mark.parametrize("options,text", [
    ({"operand": "both"}, "operand must be weights or activations, not 'both'"),
    ({"test": "demo:validation"}, "test must not be data that the search looks at, not 'demo:validation'"),
    ({"test": "demo:calibration"}, "test must not be data that the search looks at"),
    ({"calibration": None, "validation": None, "operand": "activations"}, "validation data must be given with labels"),
    ({"config": "nm257"}, "did you mean nm256"), ({"first": "last"}, "first must be dense or search, not 'last'")])
def test_refusals(options, text):
    with pytest.raises(InputError) as caught:
        report.report(DIGITS, **({"operand": "weights"} | DATA | options))
    assert text in str(caught.value)


def test_test_data_need_labels(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 1, 8, 8), np.float32))
    with pytest.raises(InputError, match="test data must be given with labels"):
        report.report(DIGITS, operand="weights", test=tmp_path / "x.npy", **DATA)
