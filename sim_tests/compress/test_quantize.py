"""Quantisation: formats, observers, and integer layers against ONNX Runtime and the float network."""
from dataclasses import replace

import numpy as np
import onnxruntime
from onnx import TensorProto, helper
import pytest

from compress import engine, onnx_import, quantize
from compress import graph as graphs
from compress.network import Convolution, Pool
from compress.quantize import Calibration
from sim_tests.compress.networks import every_layer_kind, same_network, small_network
from sim_tests.compress.onnx_models import Builder, random_model
from spec.errors import InputError


@pytest.mark.parametrize("low,high,zero_point", [(0, 1, -128), (0.5, 1, -128), (-1, 0, 127), (-3, -1, 127), (-1, 1, 0),
                                                 (-1, 0.95, 0), (-1, 3, -64), (0, 0, -128), (-1e-9, 1e6, -128)])
def test_activation_format(low, high, zero_point):
    scale, zero = quantize.activation_format(low, high)
    assert zero == zero_point and scale > 0
    for value in (min(low, 0), max(high, 0), 0):
        q = np.round(value / scale) + zero
        assert -129 <= q <= 128, "an end may round half a step out, no more"
    assert quantize.activation_format(low, high) == (scale, zero)


def test_weights_are_symmetric_per_channel():
    rng = np.random.default_rng(0)
    real = rng.normal(0, 1, (5, 3, 3, 4)) * np.array([1, 10, 0.1, 0, 3]).reshape(-1, 1, 1, 1)
    values, scale = quantize.quantize_weights(real)
    assert values.dtype == np.int8 and values.min() >= -127
    assert (np.abs(values.astype(int)).max(axis=(1, 2, 3)) == [127, 127, 127, 0, 127]).all() and (scale > 0).all()
    assert (np.abs(values * scale[:, None, None, None] - real) <= scale[:, None, None, None] / 2 + 1e-12).all()


def convinteger(layer, x, zero_point):
    """ONNX Runtime's ConvInteger plus the layer's real bias: [N, Ho, Wo, K]."""
    weights = layer.effective_weights().astype(np.int8)
    top, left, bottom, right = layer.pads
    node = helper.make_node("ConvInteger", ["x", "w", "z"], ["y"], group=layer.groups, strides=list(layer.stride),
                            pads=[top, left, bottom, right], dilations=list(layer.dilation))
    w = np.ascontiguousarray(weights.transpose(0, 3, 1, 2))
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.UINT8, None)],
        [helper.make_tensor_value_info("y", TensorProto.INT32, None)],
        [helper.make_tensor("w", TensorProto.INT8, w.shape, w.tobytes(), raw=True),
         helper.make_tensor("z", TensorProto.UINT8, [], bytes([zero_point + 128]), raw=True)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    shifted = (x.astype(np.int16) + 128).astype(np.uint8).transpose(0, 3, 1, 2)
    return session.run(None, {"x": np.ascontiguousarray(shifted)})[0].transpose(0, 2, 3, 1)


@pytest.mark.parametrize("method", ["dense", "nm:2:4", "tasd:2:8+1:8"])
@pytest.mark.parametrize("seed", [0, 1])
def test_accumulators_equal_convinteger(method, seed):
    """acc + folded bias = ConvInteger (which subtracts the zero point itself) + bias, on every element."""
    network, x, graph = small_network(method, seed=seed)
    values = engine.run(network, engine.quantize_input(network, x), keep=True)
    seen = 0
    for layer in network.layers:
        if isinstance(layer, Convolution):
            t = network.tensors[layer.input]
            acc = engine.accumulators(layer, network, values) + layer.requantization.bias
            theirs = convinteger(layer, values[layer.input], t.zero_point).astype(np.int64)
            taken_out = t.zero_point * layer.effective_weights().sum(axis=(1, 2, 3))
            assert np.array_equal(acc, theirs + layer.requantization.bias + taken_out)
            seen += 1
    assert seen == 5


@pytest.mark.parametrize("observer", quantize.OBSERVERS)
@pytest.mark.parametrize("seed", range(20))
def test_integer_network_follows_the_float_network(seed, observer):
    """Random graphs: at least 20 dB of signal to noise at the output (8 bits give about 40 dB on the range)."""
    rng = np.random.default_rng([2024, seed])
    graph = onnx_import.parse(random_model(rng)[0].SerializeToString())
    x = rng.normal(0, 1, (16, *graph.shapes[graph.input])).astype(np.float32)
    network = quantize.quantize(graph, Calibration(x=x, source="test"), observer=observer)
    real, got = graphs.forward(graph, x).astype(np.float64), engine.predict(network, x)
    assert got.shape == real.shape
    noise = ((got - real) ** 2).sum()
    assert noise * 100 <= (real ** 2).sum()


def test_each_layer_rounds_once():
    """Layer by layer, on the integer inputs: within half a unit plus what encoding scales and biases can add."""
    network, x, graph = small_network("dense")
    values = engine.run(network, engine.quantize_input(network, x), keep=True)
    tensors = network.tensors
    for node, layer in zip(graph.nodes, network.layers):
        floats = {n: tensors[n].scale * (values[n].astype(np.float64) - tensors[n].zero_point) for n in node.inputs}
        if isinstance(node, graphs.Conv):
            node = replace(node, weights=layer.effective_weights() * layer.weight_scale[:, None, None, None])
        out = tensors[node.output]
        exact = graphs.apply_node(node, floats) / out.scale + out.zero_point
        exact = np.clip(exact, layer.requantization.low, layer.requantization.high)
        bias_unit = 0.5 * layer.weight_scale.max() * tensors[layer.input].scale / out.scale \
            if isinstance(layer, Convolution) else 0
        # half a unit; 2**-16 of up to 255 units twice (multiplier, residual multiplier); clamp limits round to integers
        assert np.abs(exact - values[node.output]).max() <= 0.5 + bias_unit + 2 * 512 * 2**-15 + 0.01, node.name


def test_relu_tensors_use_the_whole_range():
    network, _, graph = small_network()
    for node in graph.nodes:
        if node.low == 0 and not isinstance(node, graphs.Pool):
            t = network.tensors[node.output]
            assert t.zero_point == -128
            assert next(v for v in network.layers if v.output == t.name).requantization.low == -128


def test_max_pool_keeps_the_format_and_is_exact():
    network, x, _ = small_network()
    values = engine.run(network, engine.quantize_input(network, x), keep=True)
    pool = next(v for v in network.layers if isinstance(v, Pool) and v.kind == "max")
    old, new = network.tensors[pool.input], network.tensors[pool.output]
    assert (old.scale, old.zero_point) == (new.scale, new.zero_point)
    q = values[pool.input]
    n, h, w, c = q.shape
    assert np.array_equal(values[pool.output], q.reshape(n, h // 2, 2, w // 2, 2, c).max(axis=(2, 4)))


def scaled_sum(factor):
    """y = conv(x) + factor * maxpool(x), cancelling: the residual's scale is far above the output's."""
    b = Builder((4, 4, 4))
    eye = np.eye(4).reshape(4, 4, 1, 1)
    a = b.node("Conv", "x", factor * eye)
    pooled = b.node("MaxPool", a, kernel_shape=[1, 1])
    return b.model(b.node("Add", b.node("Conv", "x", (0.01 - factor) * eye), pooled))


def test_scale_ratios_stay_encodable():
    graph = onnx_import.parse(scaled_sum(50.0).SerializeToString())
    x = np.random.default_rng(3).normal(0, 1, (8, 4, 4, 4)).astype(np.float32)
    network = quantize.quantize(graph, Calibration(x=x, source="test"))
    layer = network.layers[-1]
    assert layer.residual is not None and 0 < layer.requantization.residual_multiplier <= 65535
    ratio = network.tensors[layer.residual].scale / network.tensors[layer.output].scale
    assert ratio < 4 and layer.requantization.residual_multiplier == round(ratio * 2**14)
    engine.run(network, engine.quantize_input(network, x))


def test_large_bias_coarsens_its_channel():
    b = Builder((4, 3, 3))
    w = np.ones((3, 4, 1, 1)) * np.array([1, 1e-9, 0]).reshape(3, 1, 1, 1)
    graph = onnx_import.parse(b.model(b.node("Conv", "x", w, np.array([1.0, 500.0, -3.0]))).SerializeToString())
    x = np.random.default_rng(4).normal(0, 1, (8, 3, 3, 4)).astype(np.float32)
    network = quantize.quantize(graph, Calibration(x=x, source="test"))
    got, real = engine.predict(network, x), graphs.forward(graph, x)
    assert np.abs(got - real).max() <= network.tensors[network.output].scale * 1.1


def test_output_error_is_measured_on_the_calibration_data():
    network, x, graph = small_network("nm:1:4", bias_correction=False)
    conv = next(v for v in network.layers if isinstance(v, Convolution) and v.format == "nm:1:4")
    node = next(n for n in graph.nodes if n.name == conv.name)
    values, scale = quantize.quantize_weights(node.weights)
    inputs = graphs.forward(graph, x, keep=True)[node.input]
    shape = {"stride": node.stride, "pads": node.pads}
    full = graphs.convolve(inputs, values * scale[:, None, None, None], **shape)
    kept = graphs.convolve(inputs, conv.effective_weights() * scale[:, None, None, None], **shape)
    assert conv.metrics["output_error"] == pytest.approx(np.linalg.norm(full - kept) / np.linalg.norm(full), rel=1e-4)


def test_bias_correction_removes_the_mean_error():
    plain, x, graph = small_network("nm:1:4", bias_correction=False)
    corrected = small_network("nm:1:4")[0]
    node = graph.convolutions[1]
    inputs = graphs.forward(graph, x, keep=True)[node.input]
    means = []
    for network in (plain, corrected):
        layer = next(v for v in network.layers if v.name == node.name)
        scale = layer.weight_scale
        t = network.tensors[layer.input]
        real = graphs.convolve(inputs, layer.effective_weights() * scale[:, None, None, None], pads=node.pads)
        unfolded = layer.requantization.bias + t.zero_point * layer.effective_weights().sum(axis=(1, 2, 3))
        exact = graphs.convolve(inputs, node.weights, pads=node.pads) + node.bias
        means.append(np.abs((real + unfolded * scale * t.scale - exact).mean(axis=(0, 1, 2))).max())
    assert means[1] < 0.1 * means[0]
    off, on = small_network("dense", bias_correction=False)[0], small_network("dense")[0]
    same_network(off, replace(on, provenance=off.provenance))


def test_reason_of_a_dense_layer_is_in_its_metrics():
    network, _, graph = small_network("nm:2:4")
    reasons = {v.name: v.metrics.get("kept_dense") for v in network.layers if isinstance(v, Convolution)}
    first, depthwise = graph.convolutions[0].name, next(n.name for n in graph.convolutions if n.depthwise)
    assert reasons[first] == "3 input channels, fewer than M = 4" and reasons[depthwise] == "depthwise"
    assert sum(r is None for r in reasons.values()) == 3


def test_percentile_and_mse_narrow_the_range():
    graph = onnx_import.parse(every_layer_kind(np.random.default_rng(0)).SerializeToString())
    x = np.random.default_rng(1).normal(0, 1, (64, 8, 8, 3)).astype(np.float32)
    x[0, 0, 0, 0] = 1000
    wide = quantize.ranges(graph, x)
    assert wide[graph.input][1] == 1000
    narrow = quantize.ranges(graph, x, observer="percentile", percentile=99.0)
    assert narrow[graph.input][1] < 10 and narrow[graph.input][0] >= wide[graph.input][0]
    assert quantize.ranges(graph, x, observer="mse")[graph.input][1] <= 1000


@pytest.mark.parametrize("options,data,text", [
    ({"observer": "median"}, 1.0, "observer must be one of minmax, percentile, mse, not 'median'"),
    ({"observer": "percentile", "percentile": 20}, 1.0, "percentile must be in 50..100, not 20"),
    ({}, np.nan, "calibration must be finite"), ({}, 3e38, "must be finite on the calibration data (overflow)")])
def test_refusals(options, data, text):
    graph = onnx_import.parse(every_layer_kind(np.random.default_rng(0)).SerializeToString())
    with pytest.raises(InputError) as caught:
        quantize.ranges(graph, np.full((1, 8, 8, 3), data, np.float32), **options)
    assert text in str(caught.value)


def test_search_methods_are_refused_here():
    with pytest.raises(InputError, match="tasder must be searched"):
        small_network("tasder")


def test_repeatable():
    same_network(small_network("tasd:2:4+1:8")[0], small_network("tasd:2:4+1:8")[0])
