"""What a training run does, from YAML::

    network: resnet20                     # compress.training.networks
    weights: resnet20-12fca82f.th         # start; without it the seed decides
    data: {kind: cifar10, path: cifar10, validation: 1000}
    seed: 1
    stages:
      - name: admm
        epochs: 10
        optimizer: {rate: 0.05, weight_decay: 0.0001}
        schedule: {kind: cosine}
        techniques:
          - {kind: admm, projection: {kind: tensor_train}, layers: {"layer3.*": {ranks: [1, 24, 24, 1]}}}
    package: {method: dense, integer: {epochs: 1, optimizer: {rate: 0.001}}}

Relative paths are relative to the recipe's folder; the command line can replace the paths of data and weights, which is
why they are no part of the recipe's digest (the digests of what they hold are in the report). Nor is the package: it
can be changed, and made again from the trained weights.
"""
import hashlib
import json
from pathlib import Path

from compress import methods
from compress.basis import plan as plan_basis
from compress.quantize import OBSERVERS
from compress.training import fields, networks
from compress.training.fields import construct
from compress.training.integer import LEARNED
from compress.training.loader import Source
from compress.training.schedule import Optimizer, Schedule
from compress.training.techniques import build as technique
from spec import config as configs
from spec import strict_yaml
from spec.errors import InputError

PRECISIONS = ("float32", "bfloat16")


class Distill:
    """Loss of a stage ``(1 - weight) CE + weight T^2 KL(teacher || student)``, both softened by the temperature T.

    The teacher is ``network`` with ``weights``, by default the run's own start. Source: Hinton, Vinyals, Dean,
    "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """

    def __init__(self, *, network=None, weights=None, weight=0.9, temperature=4.0):
        self.network, self.weights = network, None if weights is None else fields.path(weights, "weights")
        if network is not None:
            fields.choice(network, "network", networks.NETWORKS)
            if weights is None:
                raise InputError("must be given with network", field="weights")
        elif weights is not None:
            raise InputError("must be given with weights", field="network")
        self.weight = fields.number(weight, "weight", low=0, high=1)
        self.temperature = fields.number(temperature, "temperature", above=0, high=100)


class Stage:
    """One phase of training.

    Args:
        name: of the log and the plots. epochs: 0 or more (with 0 the techniques start and finish: a conversion).
        optimizer, schedule: see `compress.training.schedule`. batch: images of a step.
        smoothing: of the labels, 0..1. distill: see `Distill`. average: decay of a running mean of the weights that
        replaces them at the end of the stage (0: none). settle: batches that renew the statistics of batch
        normalisation at the end, after the techniques have finished. techniques: list of mappings with ``kind``.
    """

    def __init__(self, *, name, epochs, optimizer=None, schedule=None, batch=128, smoothing=0.0, distill=None,
                 average=0.0, settle=0, techniques=()):
        if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
            raise InputError("must be a plain name", field="name", value=name)
        self.name, self.epochs = name, fields.whole(epochs, "epochs", high=100_000)
        if self.epochs and optimizer is None:
            raise InputError("must be given", field="optimizer")
        self.optimizer = None if optimizer is None else _part(Optimizer, optimizer, "optimizer")
        self.schedule = _part(Schedule, {} if schedule is None else schedule, "schedule")
        self.batch = fields.whole(batch, "batch", low=1, high=1 << 16)
        self.smoothing = fields.number(smoothing, "smoothing", low=0, below=1)
        self.distill = None if distill is None else _part(Distill, distill, "distill")
        self.average = fields.number(average, "average", low=0, below=1)
        self.settle = fields.whole(settle, "settle")
        if not isinstance(techniques, (list, tuple)):
            raise InputError("must be a list", field="techniques", value=techniques)
        self.options = [dict(t) if isinstance(t, dict) else t for t in techniques]
        self.techniques()                                        # bad options are found before anything runs

    def techniques(self):
        """Fresh techniques of the stage."""
        return [technique(o, field=f"techniques[{n}]") for n, o in enumerate(self.options)]


class Package:
    """The compressed network that a run ends in.

    Args:
        method: compression method (docs/formats.md) of the trained network; layers: mapping of layer names to other
        methods, as in a compression recipe; ``config``: for methods that need one.
        calibration: training images that decide the activation formats. observer, percentile: how
        (`compress.quantize.ranges`). integer: a `Stage` without techniques that trains the quantised network, exactly
        as integers compute it; without it, quantisation after training. learn_scales: which scales that stage learns
        besides weights and biases, ``none``, ``weights``, ``activations`` or ``all``.
    """

    def __init__(self, *, method="dense", layers=None, config=None, calibration=512, observer="minmax",
                 percentile=99.99, integer=None, learn_scales="none"):
        self.methods = methods.from_tree({"method": method} | ({} if layers is None else {"layers": layers}))
        if self.methods.default.searched:
            raise InputError("must not be searched: use summand compress on the run's model.onnx", field="method",
                             value=method)
        self.config = None if config is None else _config(config)
        self.key = repr((method, layers, calibration, observer, percentile, integer, learn_scales))
        if self.config is not None:
            self.key += self.config.digest
        for method in (self.methods.default, *self.methods.layers.values()):
            if method.basis is not None:
                plan_basis(method.basis, self.config)            # a pattern that its engine does not take
        self.calibration = fields.whole(calibration, "calibration", low=1, high=1 << 16)
        self.learn_scales = fields.choice(learn_scales, "learn_scales", LEARNED)
        self.observer = fields.choice(observer, "observer", OBSERVERS)
        self.percentile = fields.number(percentile, "percentile", low=50, high=100)
        if integer is not None:
            if isinstance(integer, dict):
                if "name" in integer:
                    raise InputError("must not be given: it is integer", field="integer.name", value=integer["name"])
                integer = {"name": "integer"} | integer
            integer = _part(Stage, integer, "integer")
            if integer.options:
                raise InputError("must not be given: formats are fixed by then", field="integer.techniques")
        self.integer = integer


class Recipe:
    """A whole run; see the module's text. ``classes`` are those of the data.

    Args:
        network, weights, data, stages, package: see there. seed: of everything random. precision: of the
        convolutions in training, ``bfloat16`` (much faster where the processor has it) or ``float32``; all
        evaluation is float32, and integer training exact in both. threads: of PyTorch and NumPy; results are the same
        for equal threads only. deterministic: refuse operations whose results could differ between runs.
    """

    def __init__(self, *, network, data, stages, weights=None, seed=1, precision="bfloat16", threads=1,
                 deterministic=True, package=None):
        self.network = fields.choice(network, "network", networks.NETWORKS)
        self.weights = None if weights is None else fields.path(weights, "weights")
        self.data = _part(Source, data, "data")
        self.seed = fields.whole(seed, "seed")
        self.precision = fields.choice(precision, "precision", PRECISIONS)
        self.threads = fields.whole(threads, "threads", low=1, high=1024)
        self.deterministic = fields.flag(deterministic, "deterministic")
        if not isinstance(stages, list) or not stages:
            raise InputError("must be a list of stages", field="stages", value=stages)
        self.stages = [_part(Stage, s, f"stages[{n}]") for n, s in enumerate(stages)]
        names = [s.name for s in self.stages]
        if len(set(names)) != len(names) or "integer" in names:
            raise InputError("must have different names, none of them integer", field="stages", value=names)
        self.package = None if package is None else _part(Package, package, "package")


def _config(name):
    """Configuration of a preset or a file."""
    try:
        return configs.load(fields.path(name, "config"))
    except InputError as error:
        if error.source is None:
            raise
        raise InputError(f"must be a good configuration ({error})", field="config") from None


def _part(cls, options, field):
    if not isinstance(options, dict):
        raise InputError("must be a mapping", field=field, value=options)
    return construct(cls, options, field=field)


def digest(tree):
    """sha256 of all that decides the trained weights: a recipe's mapping without its package, the paths of data and
    weights, and the number of threads."""
    def strip(value, *more):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in sorted(value.items()) if k not in ("path", "weights", "threads", *more)}
        return [strip(v) for v in value] if isinstance(value, list) else value
    return hashlib.sha256(json.dumps(strip(tree, "package"), sort_keys=True).encode()).hexdigest()


def load(path, *, data=None, weights=None):
    """(Recipe, its digest, its text) of a YAML file.

    Args: data, weights: paths that replace those of the file.
    Raises: InputError naming file and field.
    """
    path = Path(path)
    tree = strict_yaml.load(path)
    try:
        tree = _resolve(tree, path.parent)
        if data is not None and isinstance(tree.get("data"), dict):
            tree["data"] = tree["data"] | {"path": str(data)}
        if weights is not None:
            tree["weights"] = str(weights)
        return construct(Recipe, tree), digest(tree), path.read_text(encoding="utf-8")
    except InputError as error:
        raise error.within(path) from None


def _resolve(value, folder):
    """Relative paths of ``path`` and ``weights`` seen from the recipe's folder."""
    if isinstance(value, dict):
        return {k: str(folder / v) if k in ("path", "weights") and isinstance(v, str) else _resolve(v, folder)
                for k, v in value.items()}
    return [_resolve(v, folder) for v in value] if isinstance(value, list) else value
