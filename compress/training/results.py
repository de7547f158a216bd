"""What a run leaves: ``model.onnx`` (float), ``model.summand`` (the package) and ``report.json``, with the accuracy of
each step on the full test set, which is looked at nowhere else: it chooses nothing."""
from dataclasses import replace
import hashlib
from importlib.metadata import version
import json
from pathlib import Path
import platform
import time

import numpy as np

from compress import engine, onnx_import, package
from compress import graph as graphs
from compress.quantize import Calibration, Quantizer
from compress.training import export, log, trainer
from compress.training.integer import IntegerNetwork
from compress.training.techniques.ternary import export_decompositions
from spec.errors import InputError

#: Images of one golden step.
GOLDEN_BATCH = 100


def write(run, recipe, text, *, progress=None):
    """Export, quantise, measure and store a finished run.

    Args:
        run: `trainer.Trainer` after `run`. recipe: its `recipe.Recipe`; text: the recipe's YAML.
        progress: called with (message, fraction or None).
    Returns: the report (plain values). Raises: InputError for a package that cannot be made.
    """
    tell, folder, dataset = progress or (lambda *_: None), run.folder, run.dataset
    began = time.monotonic()
    with trainer.settings(recipe):
        tell("test set, float", None)
        accuracies = {"float": trainer.accuracy(run.model, dataset, "test")}
        model = export.to_onnx(run.model, name=recipe.network)
        data = model.SerializeToString()
        log.replace(folder / "model.onnx", lambda part: part.write_bytes(data))
        report = {
            "network": recipe.network, "seed": recipe.seed, "recipe_digest": run.digest, "recipe": text,
            "weights": None if recipe.weights is None else {
                "file": Path(recipe.weights).name,
                "sha256": hashlib.sha256(Path(recipe.weights).read_bytes()).hexdigest()},
            "data": {"kind": recipe.data.kind, "digest": dataset.digest(), "mean": list(dataset.mean),
                     "std": list(dataset.std), "train": len(dataset.train[1]),
                     "validation": len(dataset.validation[1]), "test": len(dataset.test[1])},
            "versions": {"python": platform.python_version()} | {p: version(p) for p in ("torch", "numpy", "onnx")},
            "precision": recipe.precision, "threads": recipe.threads,
            "parameters": sum(p.numel() for p in run.model.parameters()), "onnx_bytes": len(data),
        }
        if recipe.package is not None:
            try:
                network, figures = _package(run, recipe, tell)
            except InputError as error:
                raise (error if error.source else error.inside("package")) from None
            accuracies |= figures
            package.save(_with_results(network, report, accuracies), folder / "model.summand", packed=True)
            report["package_bytes"] = (folder / "model.summand").stat().st_size
            report["layers"] = {layer.name: {"format": layer.format} | layer.metrics for layer in network.layers
                                if hasattr(layer, "format")}
    report["accuracy"] = accuracies
    report["epochs"] = sum("rate" in row for row in run.rows)
    report["training_seconds"] = sum(r.get("seconds", 0) for r in run.rows)
    report["results_seconds"] = time.monotonic() - began
    log.plots(folder, run.rows)
    log.replace_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
    return report


def _with_results(network, report, accuracies):
    """The network with where it came from."""
    facts = {k: report[k] for k in ("network", "seed", "recipe_digest", "weights", "data", "versions")}
    return replace(network, provenance=network.provenance | {"training": facts, "accuracy": accuracies})


def _package(run, recipe, tell):
    """(network, accuracies) of the quantised network, after integer training if the recipe asks for it."""
    plan, dataset = recipe.package, run.dataset
    graph = onnx_import.load(run.folder / "model.onnx")
    count = len(dataset.train[1])
    picks = np.linspace(0, count - 1, min(plan.calibration, count)).astype(int)
    x = _nhwc(dataset, dataset.train[0][picks])
    quantizer = Quantizer(graph, Calibration(x=x, source=f"{len(picks)} training images of {recipe.data.kind}"),
                          observer=plan.observer, percentile=plan.percentile, config=plan.config, seed=recipe.seed,
                          decompositions={
                              graphs.layer_name(name): factors
                              for name, factors in export_decompositions(run.model).items()},
                          progress=tell)
    methods = replace(plan.methods, layers={graphs.layer_name(n): m for n, m in plan.methods.layers.items()})
    network = quantizer.network(methods, provenance={"source": "model.onnx", "data_is_random": False})
    module = IntegerNetwork(network, graph, learn_scales=plan.learn_scales)
    figures = {"quantized": trainer.accuracy(module, dataset, "test")}
    if plan.integer is not None:
        run.epochs(plan.integer, module, len(recipe.stages), key=plan.key)
        network = module.to_network()
        figures["integer_trained"] = trainer.accuracy(module, dataset, "test")
    figures["golden"] = golden_accuracy(network, dataset, trainer.logits_of(module, dataset, "test"), tell)
    return network, figures


def _nhwc(dataset, images):
    return np.ascontiguousarray(dataset.normalized(images).permute(0, 2, 3, 1).numpy())


def golden_accuracy(network, dataset, logits, tell):
    """Accuracy of the integer network in golden on the test set, whose outputs must equal the module's ``logits``.

    Raises: AssertionError if one output differs: training and golden would not compute the same network.
    """
    images, labels = dataset.test
    right = 0
    for at in range(0, len(images), GOLDEN_BATCH):
        y = engine.predict(network, _nhwc(dataset, images[at:at + GOLDEN_BATCH]), batch=GOLDEN_BATCH)
        mine = logits[at:at + GOLDEN_BATCH].numpy()
        if not np.allclose(y.reshape(len(y), -1), mine, rtol=1e-5, atol=1e-5):
            raise AssertionError(f"golden and the trained integers differ in images {at} to {at + len(y) - 1}")
        right += int((graphs.top1(y) == labels[at:at + GOLDEN_BATCH]).sum())
        tell("test set, golden integers", (at + len(y)) / len(images))
    return right / len(images)

