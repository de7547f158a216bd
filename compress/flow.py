"""From a network file to a compressed network: the steps behind ``summand compress``."""
from dataclasses import replace
from pathlib import Path

import numpy as np

from compress import arrays, demo, engine, factorize, methods, onnx_import, package, permute, tflite_import
from compress import data as datasets
from compress import graph as graphs
from compress.network import BasisConvolution, Network
from compress.quantize import Calibration, Quantizer, random_calibration
from compress.search import mix, tasder_weights
from spec import config as configs
from spec.errors import InputError

#: Calibration samples used at most; more rarely change a range and only cost time.
MAX_SAMPLES = 512


#: Suffixes of the network files that can be imported.
IMPORTED = (".onnx", ".tflite")


def load_graph(path):
    """Graph of a network file: ONNX, or int8 TFLite (suffix .tflite). Raises: InputError."""
    return (tflite_import if Path(path).suffix == ".tflite" else onnx_import).load(path)


def load_network(path):
    """Network of a package, or of an int8 TFLite file, which is quantised already. Raises: InputError."""
    return compress_model(path) if Path(path).suffix == ".tflite" else package.load(path)


def _input_format(net):
    """(shape, layout, (scale, zero point) of the int8 input if the source file chose them) of a graph or network."""
    if isinstance(net, Network):
        tensor, facts = net.tensors[net.input], net.provenance
        own = (tensor.scale, tensor.zero_point) if facts.get("scales") == "of the file" else None
        return tensor.shape, facts.get("layout"), own
    return net.shapes[net.input], net.layout, net.integers and net.integers.tensors[net.input]


def _statistics(net, source):
    """(mean, standard deviation) per channel that a trained package names for the kind of data of ``source``, or None.

    Raises: InputError unless they are numbers, one per channel.
    """
    trained = net.provenance.get("training") if isinstance(net, Network) else None
    data = trained.get("data") if isinstance(trained, dict) else None
    if not isinstance(data, dict) or data.get("kind") != str(source).partition(":")[0]:
        return None
    channels, found = net.tensors[net.input].channels, (data.get("mean"), data.get("std"))
    for name, values, least in zip(("mean", "std"), found, (-np.inf, 0)):
        if not isinstance(values, list) or len(values) != channels or not all(
                isinstance(v, (int, float)) and np.isfinite(v) and v > least for v in values):
            raise InputError(f"must be {channels} numbers, for std above 0", field=f"provenance.training.data.{name}",
                             value=values)
    return found


def load_samples(source, net, *, limit=None):
    """Data for a graph or network.

    Networks from int8 TFLite files take their input tensor's own integers too: int8 data ``q`` stand for ``scale * (q -
    zero_point)``, uint8 data for the same of ``q - 128``.

    Args:
        source: path of a .npy (``x``) or .npz (``x``, optionally ``labels``) file in the network file's own layout
            (ONNX: [N, C, H, W] or [N, features]; TFLite: [N, H, W, C] or flattened); ``demo:calibration``,
            ``demo:validation``, ``demo:heldout`` for the demo data; ``KIND:PATH[:SPLIT]`` for a data set
            (`compress.data.load_source`; normalised as in training where the package says how, as uint8 pixels for
            TFLite); or None for seeded random data.
        limit: most samples taken (the first ones).
    Returns: (x float32 [N, H, W, C], labels int64 [N] or None, where the data came from).
    Raises: InputError.
    """
    shape, layout, own = _input_format(net)
    if source is None:
        random = random_calibration(shape, limits=own and [own[0] * (q - own[1]) for q in (-128, 127)])
        return random.x[:limit], None, random.source
    if str(source).startswith("demo:"):
        split = str(source).removeprefix("demo:")
        x, labels = demo.digits(split)
        data, name = {"x": x, "labels": labels}, f"scikit-learn digits, split {split}"
    elif datasets.is_source(source):
        data, name = datasets.load_source(source, raw=own is not None, statistics=_statistics(net, source))
    else:
        data, name = arrays.load_data(source), Path(source).name
    try:
        with np.errstate(over="ignore"):
            x = graphs.to_nhwc(data["x"], shape, layout)
            if own and x.dtype in (np.int8, np.uint8):
                x = own[0] * (x.astype(np.int16) - (128 if x.dtype == np.uint8 else 0) - own[1])
            x = x.astype(np.float32)
        labels = data.get("labels")
        if labels is not None:
            if labels.dtype.kind not in "iu" or labels.shape != (len(x),):
                raise InputError(f"must be {len(x)} integers", field="labels", value=(str(labels.dtype), labels.shape))
            labels = labels[:limit].astype(np.int64)
        if not np.isfinite(x).all():
            raise InputError("must be finite in float32", field="x")
    except InputError as error:
        raise error.within(source) from None
    return x[:limit], labels, name


def compress_model(model, method="dense", *, config=None, calibration=None, validation=None, observer="minmax",
                   percentile=99.99, bias_correction=True, permutation=False, seed=0, goal=tasder_weights.GOAL,
                   search="layer", first="dense", progress=None):
    """Compress a network file.

    Args:
        model: path of the ONNX or int8 TFLite file. The latter's scales, zero points, biases and int8 weights stay; the
            method is applied to these weights.
        method: method string, recipe file (.yaml), `methods.Recipe`; ``tasder`` searches per layer; ``svd:F``,
            ``tucker:F`` and ``tt:F`` replace layers by low-rank chains first (`compress.factorize`); ``basis:M`` and
            the like make basis layers (`compress.basis`), ``basis-mix`` chooses per layer (`compress.search.mix`).
        config: Config, preset name or file; needed by ``tasder`` (it gives the supported patterns) and ``basis-mix``;
            its basis engine, if any, decides group and intermediate width of basis layers.
        calibration, validation: see `load_samples`. ``tasder`` judges accuracy on the labelled ``validation`` data,
            which must not be the data that the final accuracy is reported on; without it, on labelled calibration data.
        observer, percentile, bias_correction: see `quantize.ranges` and `quantize.Quantizer`. Without calibration data
            the biases of a TFLite file stay as they are.
        permutation: reorder channels first so that the default method keeps more magnitude (exact, see `permute`).
        seed: of the permutation search and of the rotations of basis layers.
        goal, search, first: share of the float accuracy that ``tasder`` keeps; ``layer`` or ``network`` wise; whether
            the first convolution stays ``dense`` or is searched too (``search``).
        progress: called with (step, fraction 0..1).
    Returns: Network. With basis layers and labelled data its provenance has ``accuracy``: of the float network and of
    this one, on the validation data, else the calibration data. Raises: InputError.
    """
    chains = factorize.parse(method)
    plan = methods.recipe("dense" if chains else method)
    graph = load_graph(model)
    x, labels, source = load_samples(calibration, graph, limit=MAX_SAMPLES)
    plan.check([n.name for n in graph.convolutions])
    if plan.default.searched and config is None:
        raise InputError("basis-mix needs a configuration: its engines decide" if plan.default.mixed else
                         "tasder needs a configuration: its patterns are the candidates", field="method")
    settings = config if config is None or isinstance(config, configs.Config) else configs.load(config)
    provenance = {"source": Path(model).name, "data_is_random": calibration is None}
    if graph.integers is not None and (chains or permutation):
        raise InputError("must not be factorised or permuted: the integers of a TFLite file are kept",
                         field="method" if chains else "permutation", value=str(method) if chains else True)
    if graph.integers is not None and calibration is None:
        bias_correction = False                 # random data would only spoil what was trained
    if chains:
        graph, provenance["factorization"] = factorize.factorize(graph, chains, x, progress=progress)
    if permutation and plan.default.basis is not None:
        raise InputError("must not be asked for with basis methods: rotation takes its place", field="permutation")
    if permutation:
        target = methods.parse("nm:2:4") if not plan.default.patterns else plan.default
        graph, facts = permute.permute(graph, target, rng=np.random.default_rng(seed), progress=progress)
        provenance["permutation"] = facts | {"seed": seed}
    quantizer = Quantizer(graph, Calibration(x=x, source=source), observer=observer, percentile=percentile,
                          bias_correction=bias_correction, config=settings, seed=seed, progress=progress)
    if chains:
        return _named_chains(quantizer.network(plan, provenance=provenance), chains)
    split, judged = source, plan.default.searched or any(m.basis for m in (plan.default, *plan.layers.values()))
    if validation is not None and judged:
        x, labels, split = load_samples(validation, graph)
    if plan.default.mixed:
        recipe, facts = mix.search(quantizer, settings, plan.default, fixed=plan.layers, progress=progress)
        network = _judged(quantizer.network(recipe, provenance=provenance), graph, x, labels, split)
        facts = network.provenance["method"] | {"method": str(plan.default), "search": facts}
        return replace(network, provenance=network.provenance | {"method": facts})
    if not plan.default.searched:
        return _judged(quantizer.network(plan, provenance=provenance), graph, x, labels, split)
    if labels is None:
        raise InputError("must be given with labels: tasder judges each candidate by accuracy", field="validation data")
    reference = float((graphs.top1(graphs.forward(graph, x)) == labels).mean())
    result = tasder_weights.search(quantizer, settings, lambda net: engine.accuracy(net, x, labels),
                                   reference=reference, goal=goal, mode=search, first=first, fixed=plan.layers,
                                   progress=progress)
    network = quantizer.network(result.recipe, provenance=provenance)
    facts = network.provenance["method"] | {"method": "tasder", "search": result.facts | {"split": split}}
    return replace(network, provenance=network.provenance | {"method": facts})


def _judged(network, graph, x, labels, split):
    """The network; with basis layers its provenance says what they cost, where there are labels."""
    if labels is None or not any(isinstance(layer, BasisConvolution) for layer in network.layers):
        return network
    facts = {"float": float((graphs.top1(graphs.forward(graph, x)) == labels).mean()),
             "compressed": engine.accuracy(network, x, labels), "split": split, "samples": len(labels),
             "retrained": all(layer.metrics.get("retrained") for layer in network.layers
                              if isinstance(layer, BasisConvolution))}
    return replace(network, provenance=network.provenance | {"accuracy": facts})


def _named_chains(network, chains):
    """The network with the stages of its chains called by their method."""
    made = network.provenance["factorization"]["layers"]
    names = {f"{name}.{n}" for name, facts in made.items() if "ranks" in facts
             for n in range(1, len(facts["ranks"]) + 2)}
    layers = tuple(replace(layer, format=str(chains)) if layer.name in names else layer for layer in network.layers)
    return replace(network, layers=layers)
