"""Post-training quantisation to int8: float graph + calibration data -> `compress.network.Network`.

Weights: symmetric, one scale per output channel, q = round(w / s) in -127..127. Activations: one scale and zero point
per tensor (docs/numerics.md). Float parameters are rounded here, once, in float64; what runs afterwards is integer.
"""
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np

from compress import basis as bases
from compress import graph as graphs
from compress import methods
from compress.graph import Conv, Pool
from compress.network import Add, BasisConvolution, Convolution, Network, Requantization, Tensor
from compress.network import Pool as PoolLayer
from golden import convolution, requantize
from spec.errors import InputError

OBSERVERS = ("minmax", "percentile", "mse")
#: Bins of the observers' histograms.
_BINS = 4096
#: Scales of the requantiser must stay below 65535.5 / 2**14; this leaves room for rounding.
_LARGEST_RATIO = 3.999
#: Biases keep two bits of room for the folded zero point and the accumulator.
_LARGEST_BIAS = 1 << 29
#: Activation elements kept at once, in calibration and for the error metrics.
_SAMPLE_ELEMENTS = 1 << 25
#: A range whose sides differ by less than this is taken as symmetric (zero point 0).
_SYMMETRIC = 0.9


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Calibration samples, NHWC float32, and where they came from (goes into the provenance)."""

    x: np.ndarray
    source: str


def random_calibration(shape, *, limits=None, samples=32, seed=0):
    """Seeded samples for a network without data, standard normal or uniform between ``limits``; reports must say so."""
    rng = np.random.default_rng(seed)
    samples = int(np.clip(_SAMPLE_ELEMENTS // np.prod(shape), 1, samples))      # a small file may ask for a huge input
    x = rng.normal(0, 1, (samples, *shape)) if limits is None else rng.uniform(*limits, (samples, *shape))
    kind = "normal" if limits is None else "uniform"
    return Calibration(x=x.astype(np.float32), source=f"random {kind} data, seed {seed}")


def ranges(graph, x, *, observer="minmax", percentile=99.99, batch=32, progress=None):
    """Observed range (low, high) of every tensor on calibration data.

    Args:
        x: float [N, H, W, C].
        observer: ``minmax``; ``percentile`` (two-sided, ``percentile`` in 50..100); ``mse`` (the clipped range whose
            8-bit quantisation error is smallest).
        progress: called with a fraction 0..1.
    Raises: InputError for an unknown observer, data that do not fit, or activations that are not finite.
    """
    if observer not in OBSERVERS:
        raise InputError(f"must be one of {', '.join(OBSERVERS)}", field="observer", value=observer)
    if not isinstance(percentile, (int, float)) or not 50 <= percentile <= 100:
        raise InputError("must be in 50..100", field="percentile", value=percentile)
    if not len(x):
        raise InputError("must have at least one sample", field="calibration")
    if not np.isfinite(x).all():
        raise InputError("must be finite (NaN or infinity found)", field="calibration")
    elements = sum(int(np.prod(s)) for s in graph.shapes.values())
    batch = int(np.clip(_SAMPLE_ELEMENTS // elements, 1, batch))
    passes = 1 if observer == "minmax" else 2
    found, histograms = {}, {}
    for number in range(passes):
        for at in range(0, len(x), batch):
            for name, values in graphs.forward(graph, x[at:at + batch], keep=True).items():
                if number == 0:
                    low, high = float(values.min()), float(values.max())
                    if not np.isfinite([low, high]).all():
                        raise InputError("must be finite on the calibration data (overflow)", field=f"tensor {name!r}")
                    old = found.get(name, (low, high))
                    found[name] = (min(low, old[0]), max(high, old[1]))
                else:
                    counts = np.histogram(values, bins=_BINS, range=_span(found[name]))[0]
                    histograms[name] = histograms.get(name, 0) + counts
            if progress:
                progress((number + min(1, (at + batch) / len(x))) / passes)
    if observer == "minmax":
        return found
    narrow = _percentile_range if observer == "percentile" else _mse_range
    return {name: narrow(limits, histograms[name], percentile) for name, limits in found.items()}


def _span(limits):
    low, high = limits
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _percentile_range(limits, counts, percentile):
    low, high = _span(limits)
    edges = np.linspace(low, high, _BINS + 1)
    share = np.cumsum(counts) / counts.sum()
    tail = 1 - percentile / 100
    first = int(np.searchsorted(share, tail, side="right"))
    last = int(np.searchsorted(share, 1 - tail, side="left"))
    if limits[0] >= 0:                                     # one-sided data: the tail is at the top
        return limits[0], float(min(limits[1], edges[last + 1]))
    return float(max(limits[0], edges[first])), float(min(limits[1], edges[last + 1]))


def _mse_range(limits, counts, _):
    low, high = _span(limits)
    edges = np.linspace(low, high, _BINS + 1)
    centres = (edges[1:] + edges[:-1]) / 2
    best = (np.inf, limits)
    for factor in np.linspace(1, 0.3, 36):
        trial = (limits[0] * factor if limits[0] < 0 else limits[0], limits[1] * factor if limits[1] > 0 else limits[1])
        scale, zero_point = activation_format(*trial)
        q = np.clip(np.round(centres / scale) + zero_point, -128, 127)
        error = float(((scale * (q - zero_point) - centres) ** 2 * counts).sum())
        if error < best[0]:
            best = (error, trial)
    return best[1]


def activation_format(low, high):
    """(scale, zero point) of an activation whose values lie in ``low..high``; 0 is always representable.

    Non-negative data: zero point -128. Non-positive: 127. Sides within 10 %: symmetric, zero point 0. Else asymmetric.
    """
    low, high = min(0.0, float(low)), max(0.0, float(high))
    if low == high:
        return 1.0, -128
    if low == 0:
        return high / 255, -128
    if high == 0:
        return -low / 255, 127
    if min(-low, high) >= _SYMMETRIC * max(-low, high):
        return max(-low, high) / 127, 0
    scale = (high - low) / 255
    return scale, int(np.clip(np.round(-128 - low / scale), -128, 127))


def quantize_weights(weights, *, least=0.0):
    """Per-channel symmetric int8 weights.

    Args: weights: float [K, R, S, C]; least: number or [K], smallest scale (a large bias may need a coarser one).
    Returns: (int8 [K, R, S, C] in -127..127, float64 scales [K]).
    """
    weights = np.asarray(weights, np.float64)
    peak = np.abs(weights).max(axis=(1, 2, 3))
    peak = np.where(peak > 0, peak, peak.max() or 1.0)         # a dead channel takes the layer's scale
    scale = np.maximum(peak / 127, least)
    q = np.clip(np.round(weights / scale[:, None, None, None]), -127, 127).astype(np.int8)
    return q, scale


class Quantizer:
    """Quantises one graph under any assignment of methods to layers; formats and layers are computed once.

    A graph that brings its own quantisation (`graph.Integers`) keeps scales, zero points, int8 weights and biases; the
    methods then work on these weights, and the calibration data only measure and correct what a method drops.

    Args:
        graph: the float network. calibration: Calibration. observer, percentile: see `ranges`.
        bias_correction: add the mean that the dropped weights contributed on the calibration samples,
            ``mean((W - W*) X)`` per output channel, to the bias; costs nothing in hardware, 0 where nothing is dropped.
            Scales of basis layers are corrected likewise.
        config: Config or None; its basis engine, if any, decides group and intermediate width of basis layers.
        seed: of the random rotations of basis layers.
        decompositions: {layer name: (basis, coefficients)}, factors of layers with a basis method that were trained and
            are kept (`basis.given`); the other layers are fitted.
        progress: called with (step name, fraction).
    """

    def __init__(self, graph, calibration, *, observer="minmax", percentile=99.99, bias_correction=True, config=None,
                 seed=0, decompositions=None, progress=None):
        self.config, self.seed, self.decompositions = config, seed, dict(decompositions or {})
        for name in self.decompositions:
            if name not in (known := [n.name for n in graph.convolutions]):
                raise InputError(f"is not a layer with weights; layers: {', '.join(known)}",
                                 field=f"decompositions.{name}")
        self.graph, self.calibration, self.bias_correction = graph, calibration, bias_correction
        self.settings = {"observer": observer} | ({"percentile": percentile} if observer == "percentile" else {})
        self.weights, self.tensors, self._layers = {}, {}, {}
        if graph.integers is None:
            tell = (lambda f: progress("calibrate", f)) if progress else None
            self.ranges = ranges(graph, calibration.x, observer=observer, percentile=percentile, progress=tell)
            self._choose_formats()
        elif observer != "minmax":
            raise InputError("must be left out: the file's own scales are kept", field="observer", value=observer)
        else:
            self.settings = {"observer": "none, scales of the file"}
            self._take_formats(graph.integers)
        elements = sum(int(np.prod(s)) for s in graph.shapes.values())
        count = int(np.clip(_SAMPLE_ELEMENTS // elements, 1, 32))
        self._samples = graphs.forward(graph, calibration.x[:count], keep=True)
        if graph.integers is not None:
            for name, values in self._samples.items():
                if not np.isfinite(values).all():
                    raise InputError("must be finite on the calibration data (overflow)", field=f"tensor {name!r}")
        self._norms = {}

    # -- formats -------------------------------------------------------------------------------------------------
    def _choose_formats(self):
        """Tensor formats in execution order: a tensor's scale must keep the ratios of its producer encodable."""
        g = self.graph
        self._add_tensor(g.input, 0.0)
        for node in g.nodes:
            source = self.tensors[node.input].scale
            if isinstance(node, Pool) and node.kind == "max":
                old = self.tensors[node.input]
                self._add_tensor(node.output, 0.0, same_as=old)
                continue
            if isinstance(node, Conv):
                least = np.abs(node.bias.astype(np.float64)) / (source * _LARGEST_BIAS)
                values, scale = quantize_weights(node.weights, least=least)
                self.weights[node.name] = (values, scale)
                largest = source * float(scale.max())
            else:
                largest = source / (np.prod(node.window) if isinstance(node, Pool) else 1)
            if node.residual is not None:
                largest = max(largest, self.tensors[node.residual].scale)
            self._add_tensor(node.output, largest / _LARGEST_RATIO)

    def _take_formats(self, integers):
        """The source file's formats, each checked for what the requantiser can encode."""
        self.weights = dict(integers.weights)
        for name, (height, width, channels) in self.graph.shapes.items():
            scale, zero_point = integers.tensors[name]
            self.tensors[name] = Tensor(name=name, height=height, width=width, channels=channels, scale=scale,
                                        zero_point=zero_point)
        for node in self.graph.nodes:
            source, output = self.tensors[node.input].scale, self.tensors[node.output].scale
            ratio = source / output
            if isinstance(node, Conv):
                ratio *= float(self.weights[node.name][1].max())
            elif isinstance(node, Pool) and node.kind == "average":
                ratio /= np.prod(node.window)
            if node.residual is not None:
                ratio = max(ratio, self.tensors[node.residual].scale / output)
            if ratio >= _LARGEST_RATIO:
                raise InputError(f"must not scale its sums by {_LARGEST_RATIO} or more to the output's scale (16-bit "
                                 "multiplier, 14 fraction bits)", field=f"layer {node.name!r}", value=ratio)

    def _add_tensor(self, name, least_scale, *, same_as=None):
        height, width, channels = self.graph.shapes[name]
        scale, zero_point = (same_as.scale, same_as.zero_point) if same_as else activation_format(*self.ranges[name])
        self.tensors[name] = Tensor(name=name, height=height, width=width, channels=channels,
                                    scale=max(scale, float(least_scale)), zero_point=zero_point)

    def _clamp(self, node):
        """int8 clamp limits of a node's activation."""
        tensor = self.tensors[node.output]
        limits = []
        for limit, full in ((node.low, -128), (node.high, 127)):
            real = np.round(limit / tensor.scale) + tensor.zero_point if limit is not None else full
            limits.append(int(np.clip(real, -128, 127)))
        return tuple(limits)

    def _requantization(self, node, bias, scale):
        low, high = self._clamp(node)
        output = self.tensors[node.output]
        multiplier, shift = requantize.encode_scale(np.asarray(scale, np.float64))
        extra = {}
        if node.residual is not None:
            residual = self.tensors[node.residual]
            extra = {"residual_zero_point": residual.zero_point,
                     "residual_multiplier": requantize.encode_residual_scale(residual.scale / output.scale)}
        return Requantization(bias=bias.astype(np.int32), multiplier=multiplier, shift=shift,
                              zero_point=output.zero_point, low=low, high=high, **extra)

    # -- layers --------------------------------------------------------------------------------------------------
    def effective_method(self, node, recipe):
        """(method after exceptions, reason why the layer stays dense or None)."""
        method, named = recipe.method(node.name)
        if method.basis is not None:
            shape = self.graph.shapes[node.input]
            if named and (reason := bases.impossible(node, shape)):
                raise InputError(f"must not be a basis method: the layer is {reason}", field=f"layers.{node.name}",
                                 value=str(method))
            reason = None if named else bases.kept_dense(node, shape)
        else:
            reason = None if named else methods.kept_dense(node, method)
        return (methods.parse("dense") if reason else method), reason

    def layer(self, node, method, reason=None):
        """The quantised layer of a graph node; for convolutions under ``method``."""
        if not isinstance(node, Conv):
            return self._channelwise(node)
        key = (node.name, str(method), reason)
        if key not in self._layers:
            if method.basis is not None:
                self._layers[key] = self._basis_convolution(node, method)
            else:
                self._layers[key] = self._convolution(node, method, reason)
        return self._layers[key]

    def _basis_convolution(self, node, method):
        """The layer by basis kernels; dense, with the reason, where its scales or sums would leave their formats."""
        if not np.any(node.weights):
            return self._convolution(node, methods.parse("dense"), "all weights are zero")
        plan = bases.plan(method.basis, self.config)
        retrained = node.name in self.decompositions
        if retrained:
            decomposition, metrics, plan = self._given(node, plan)
        else:
            number = [n.name for n in self.graph.convolutions].index(node.name)
            decomposition, metrics = bases.fit(node.weights, plan, rng=np.random.default_rng([self.seed, number]))
        source, output = self.tensors[node.input], self.tensors[node.output]
        # an output whose bias is that large has weights that do not count
        least = np.abs(node.bias.astype(np.float64)) / (source.scale * _LARGEST_BIAS)
        scale = decomposition.alpha * decomposition.scale
        values, dense_scale = self.weights[node.name]
        dense = node.weights if retrained else values * dense_scale[:, None, None, None]
        if self.bias_correction and not retrained:
            scale = scale * self._slope(node, dense, decomposition.integer_kernel() * scale[:, None, None, None])
        coefficients = np.where((scale < least)[:, None, None], 0, decomposition.coefficients).astype(np.int8)
        scale = np.maximum(scale, least)
        ratio, bits = source.scale * scale / output.scale, plan.intermediate_bits
        if ratio.max() >= _LARGEST_RATIO:
            return self._convolution(node, methods.parse("dense"), "scales of the basis layer do not fit")
        if bases.largest_accumulator(decomposition.basis, coefficients, source.zero_point, bits) >= 1 << 31:
            return self._convolution(node, methods.parse("dense"), "could leave the 32-bit accumulator")
        kernel = decomposition.with_coefficients(coefficients).integer_kernel()
        error, shift = self._lost(node, dense, kernel * scale[:, None, None, None])
        # sums are over q - zero_point, so no zero point is folded in
        bias = np.clip(np.round((node.bias + shift) / (source.scale * scale)), -_LARGEST_BIAS, _LARGEST_BIAS)
        x = np.clip(np.round(self._samples[node.input] / source.scale) + source.zero_point, -128, 127).astype(np.int8)
        seen = bases.saturation(coefficients, x, source.zero_point, bits)
        metrics = metrics | {
            "output_error": error, "nonzeros": int(np.count_nonzero(coefficients)),
            "density": int(np.count_nonzero(coefficients)) / coefficients.size,
            "saturations": seen.saturations, "intermediates_checked": seen.elements,
            "exact_intermediate_bits": seen.exact_bits, "retrained": retrained,
        } | bases.storage_metrics(decomposition.basis, coefficients, plan.sizes, pattern=plan.pattern)
        if plan.pattern is not None:
            metrics["pattern_density"] = plan.pattern.density
        share = metrics["density"] if retrained else plan.density
        wanted = plan.pattern if plan.pattern is not None else f"{share:g}"
        return BasisConvolution(
            name=node.name, input=node.input, output=node.output, residual=node.residual, basis=decomposition.basis,
            coefficients=coefficients, intermediate_bits=bits, pattern=plan.pattern, stride=node.stride,
            pads=node.pads, dilation=node.dilation, weight_scale=scale,
            format=f"basis:{len(decomposition.basis)}@{wanted}", metrics=metrics,
            requantization=self._requantization(node, bias.astype(np.int64), ratio))

    def _given(self, node, plan):
        """(decomposition, facts, plan) of the layer's given factors; their pattern, where the engine takes series, is
        the tightest unless the method names one."""
        try:
            decomposition, facts = bases.given(node.weights, plan, *self.decompositions[node.name])
        except InputError as error:
            raise error.inside(f"decompositions.{node.name}") from None
        if plan.pattern is not None and plan.method.pattern is None:
            plan = plan._replace(pattern=bases.tightest(decomposition.coefficients, plan.pattern.m))
        return decomposition, facts, plan

    def _slope(self, node, dense, kept):
        """Slope [K] of the outputs of kernel ``dense`` over those of ``kept`` about their means, in 0.5..2; 1 where the
        latter do not vary."""
        shape = {"stride": node.stride, "pads": node.pads, "dilation": node.dilation, "groups": node.groups}
        y, z = (graphs.convolve(self._samples[node.input], w, **shape).reshape(-1, len(w)) for w in (dense, kept))
        y, z = (v - v.mean(axis=0, dtype=np.float64) for v in (y, z))
        spread = (z * z).sum(axis=0)
        return np.clip(np.divide((y * z).sum(axis=0), spread, out=np.ones(len(spread)), where=spread > 0), 0.5, 2)

    def _convolution(self, node, method, reason):
        values, scale = self.weights[node.name]
        source, output = self.tensors[node.input], self.tensors[node.output]
        terms = methods.decompose(values, node.weights, method)
        kept = sum(t.values.astype(np.int64) for t in terms)
        if int(np.abs(kept).sum(axis=(1, 2, 3)).max()) * 128 >= 1 << 31:
            raise InputError("could leave the 32-bit accumulator (too many inputs)", field=f"layer {node.name!r}")
        error, shift = self._dropped(node, values, kept, scale)
        given = None if self.graph.integers is None else self.graph.integers.biases[node.name]
        real = shift + (node.bias if given is None else 0)
        bias = np.clip(np.round(real / (source.scale * scale)), -_LARGEST_BIAS, _LARGEST_BIAS).astype(np.int64)
        if given is not None:
            bias = given + bias
        folded = convolution.fold_bias(bias, kept, source.zero_point)
        if int(np.abs(folded).max()) >= 1 << 31:
            raise InputError("has a bias that does not fit 32 bits", field=f"layer {node.name!r}")
        metrics = methods.weight_metrics(values, scale, terms)
        metrics["output_error"] = error
        if reason:
            metrics["kept_dense"] = reason
        return Convolution(
            name=node.name, input=node.input, output=node.output, residual=node.residual, terms=terms,
            stride=node.stride, pads=node.pads, dilation=node.dilation, groups=node.groups, weight_scale=scale,
            format=str(method), metrics=metrics,
            requantization=self._requantization(node, folded, source.scale * scale / output.scale))

    def _dropped(self, node, values, kept, scale):
        """(||(W - W*) X|| / ||W X||, correction of the bias [K]) with W the dense int8 weights, W* the kept ones and X
        the float inputs on calibration samples."""
        if np.array_equal(values, kept):
            return 0.0, np.zeros(len(scale))
        real = scale[:, None, None, None]
        return self._lost(node, values * real, kept * real)

    def _lost(self, node, dense, kept):
        """As `_dropped`, of real kernels [K, R, S, C / groups]."""
        x, shape = self._samples[node.input], {"stride": node.stride, "pads": node.pads, "dilation": node.dilation,
                                               "groups": node.groups}
        if node.name not in self._norms:
            self._norms[node.name] = float(np.linalg.norm(graphs.convolve(x, dense, **shape)))
        lost = graphs.convolve(x, dense - kept, **shape)
        norm = self._norms[node.name]
        error = float(np.linalg.norm(lost)) / norm if norm else 0.0
        return error, lost.mean(axis=(0, 1, 2), dtype=np.float64) * bool(self.bias_correction)

    def _channelwise(self, node):
        """Pooling and addition: weight 1, so the bias only takes the input's zero point out."""
        source, output = self.tensors[node.input], self.tensors[node.output]
        average = isinstance(node, Pool) and node.kind == "average"
        count = int(np.prod(node.window)) if average else 1
        bias = np.full(output.channels, -count * source.zero_point)
        scale = np.full(output.channels, source.scale / (count * output.scale))
        shared = {"name": node.name, "input": node.input, "output": node.output, "residual": node.residual,
                  "requantization": self._requantization(node, bias, scale)}
        if isinstance(node, Pool):
            return PoolLayer(kind=node.kind, window=node.window, stride=node.stride, pads=node.pads, **shared)
        return Add(**shared)

    def network(self, recipe, *, provenance=None):
        """The quantised network under a recipe (or a method string)."""
        recipe = methods.recipe(recipe)
        recipe.check([n.name for n in self.graph.convolutions])
        layers = []
        for node in self.graph.nodes:
            method, reason = self.effective_method(node, recipe) if isinstance(node, Conv) else (None, None)
            layers.append(self.layer(node, method, reason))
        g = self.graph
        facts = {"source_digest": g.source_digest, "import_notes": list(g.notes), "method": recipe.to_dict(),
                 "calibration": {"source": self.calibration.source, "samples": len(self.calibration.x)} | self.settings,
                 "bias_correction": self.bias_correction,
                 "flat_input": g.flat_input, "flat_output": g.flat_output,
                 "layout": g.layout, "scales": "chosen" if g.integers is None else "of the file",
                 "versions": {name: version(name) for name in ("numpy", "onnx" if g.integers is None else "tflite")}}
        return Network(name=g.name, input=g.input, output=g.output, tensors=dict(self.tensors), layers=tuple(layers),
                       provenance=facts | (provenance or {}))


def quantize(graph, calibration, method="dense", *, observer="minmax", percentile=99.99, bias_correction=True,
             config=None, seed=0, provenance=None, progress=None):
    """Quantise ``graph`` under a method string, recipe or recipe file (none that is searched); see `Quantizer`."""
    plan = methods.recipe(method)
    if plan.default.searched:
        kind = "basis-mix" if plan.default.mixed else "tasder"
        raise InputError(f"{kind} must be searched: use compress.flow", field="method")
    return Quantizer(graph, calibration, observer=observer, percentile=percentile, bias_correction=bias_correction,
                     config=config, seed=seed, progress=progress).network(plan, provenance=provenance)
