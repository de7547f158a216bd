"""What a search of series gives for a network file, as plain values: choices, table, accuracies, multiplications saved.

The search judges by the validation data; the test data, if any, are looked at once, with the outcome.
"""
from pathlib import Path

from compress import engine, flow
from compress import graph as graphs
from compress.quantize import Calibration, Quantizer
from compress.search import tasder_activations
from compress.search.series import GOAL
from spec import config as configs
from spec.errors import InputError

OPERANDS = ("weights", "activations")
#: Said with every result for activations.
NO_PACKAGE = "a report, no package: no engine runs series of activations yet; cycles are those of a model"


def report(model, *, operand, config, calibration=None, validation=None, test=None, observer="minmax", goal=GOAL,
           mode="layer", first="dense", progress=None):
    """Outcome of TASDER-W (``weights``) or TASDER-A (``activations``) on a network file (`compress.flow.load_graph`).

    Args:
        operand: ``weights`` or ``activations``; config: Config, preset name or file.
        calibration, validation, test: see `compress.flow.load_samples`; the search judges by labelled ``validation``
            data (without it, by labelled calibration data), ``test`` data are judged once at the end.
        goal: share of the float accuracy to keep. mode, first: of `tasder_weights.search`. progress: see there.
    Returns: dict of plain values: operand, network, config, split, samples, the facts of the search, and ``test``
    ({samples, split, float, dense, series}) if there are test data. For activations also ``float_accuracy``, of the
    float network with the series.
    Raises: InputError.
    """
    if operand not in OPERANDS:
        raise InputError("must be weights or activations", field="operand", value=operand)
    if test is not None and test in (validation if validation is not None else calibration, calibration):
        raise InputError("must not be data that the search looks at", field="test", value=str(test))
    settings = config if isinstance(config, configs.Config) else configs.load(config)
    graph = flow.load_graph(model)
    held = flow.load_samples(test, graph) if test is not None else None
    if held is not None and held[1] is None:
        raise InputError("must be given with labels", field="test data")
    shared = {"config": settings, "calibration": calibration, "validation": validation, "observer": observer,
              "goal": goal, "progress": progress}
    search = _weights if operand == "weights" else _activations
    facts, dense, accuracy = search(model, graph, shared, mode=mode, first=first)
    result = {"operand": operand, "network": Path(model).name, "config": settings.name} | facts
    if held is not None:
        x, labels, split = held
        result["test"] = {"samples": len(x), "split": split, "float": _float_accuracy(graph, x, labels),
                          "dense": engine.accuracy(dense, x, labels), "series": accuracy(x, labels)}
    return result


def _float_accuracy(graph, x, labels, read=None):
    right = sum(int((graphs.top1(graphs.forward(graph, x[at:at + 256], read=read)) == labels[at:at + 256]).sum())
                for at in range(0, len(x), 256))
    return right / len(x)


def _weights(model, graph, shared, *, mode, first):
    """(facts, dense network, accuracy of the outcome on data)."""
    network = flow.compress_model(model, "tasder", search=mode, first=first, **shared)
    dense = flow.compress_model(model, "dense", **{k: shared[k] for k in ("config", "calibration", "observer")})
    return network.provenance["method"]["search"], dense, lambda x, labels: engine.accuracy(network, x, labels)


def _activations(model, graph, shared, *, mode, first):
    """Likewise; the outcome is the dense network with other reads."""
    x, labels, source = flow.load_samples(shared["calibration"], graph, limit=flow.MAX_SAMPLES)
    quantizer = Quantizer(graph, Calibration(x=x, source=source), observer=shared["observer"], config=shared["config"],
                          progress=shared["progress"])
    if shared["validation"] is not None:
        x, labels, source = flow.load_samples(shared["validation"], graph)
    if labels is None:
        raise InputError("must be given with labels: the search judges by accuracy", field="validation data")
    dense = quantizer.network("dense")

    def accuracy(chosen, x, labels):
        return engine.accuracy(dense, x, labels, read=tasder_activations.integer_reader(dense, chosen))

    result = tasder_activations.search(quantizer, shared["config"], lambda chosen: accuracy(chosen, x, labels),
                                       reference=_float_accuracy(graph, x, labels), goal=shared["goal"],
                                       progress=shared["progress"])
    floats = _float_accuracy(graph, x, labels, tasder_activations.float_reader(result.chosen))
    facts = result.facts | {"float_accuracy": floats, "split": source, "note": NO_PACKAGE}
    return facts, dense, lambda x, labels: accuracy(result.chosen, x, labels)
