"""The TFLite importer: golden integers against TFLite's reference arithmetic, the text of its refusals, damaged files,
and the published networks where ../shared/data is there."""
import io
from pathlib import Path
import tarfile

import numpy as np
from PIL import Image
import pytest

from compress import engine, flow, package, tflite_import, validate
from compress import graph as graphs
from compress.network import Add, BasisConvolution, Convolution, Pool
from sim_tests.compress.networks import same_network
from sim_tests.compress.tflite_models import NONE, RELU, RELU6, RELU_N1_TO_1, SAME, VALID, Builder, multiply, reference
from sim_tests.real_data import real_data
from spec.errors import InputError



def network_of(data, tmp_path, method="dense", **options):
    """(path, network) of the bytes of a file."""
    path = tmp_path / "model.tflite"
    path.write_bytes(data)
    return path, flow.compress_model(path, method, **options)


def agree(b, output, tmp_path, *, seed=0, samples=3):
    """Every layer within one unit of the reference that reads the same integers; returns the network and how many
    elements differ, of how many."""
    _, net = network_of(b.file(output), tmp_path)
    validate.network(net)
    shape = b.shape(b.input)[1:]
    x = np.random.default_rng(seed).integers(-128, 128, (samples, *shape), np.int8)
    ours = engine.run(net, x.reshape(samples, *net.tensors[net.input].shape), keep=True)
    values, differ, total = {b.input: x}, 0, 0
    for op in b.operators:
        made = op["outputs"][0]
        if op["kind"] == "SOFTMAX":
            continue
        values[made] = y = reference(b, op, values)
        name = b.tensors[made]["name"]
        if name in ours:
            z = ours[name].reshape(y.shape)
            apart = np.abs(y.astype(int) - z)
            assert apart.max() <= 1, f"{op['kind']} {name}: {apart.max()} apart"
            differ, total, values[made] = differ + np.count_nonzero(apart), total + apart.size, z
    assert total
    return net, differ, total


# -- the reference itself ----------------------------------------------------------------------------------------------
def test_reference_multiplication_by_hand():
    """1/2 is (2**30, 0): halves of odd numbers round away from zero in the doubling high product."""
    assert multiply([3, -3, 5], 0.5).tolist() == [2, -1, 3]        # (-3 * 2**30 + 1 - 2**30) / 2**31 truncates to -1
    assert multiply([7, -7, 10], 1.0).tolist() == [7, -7, 10]
    assert multiply([6, -6, 10, -10], 0.25).tolist() == [2, -2, 3, -3]


# -- operators ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("padding", [SAME, VALID])
@pytest.mark.parametrize("kernel,stride,dilation", [
    ((3, 3), (1, 1), (1, 1)), ((3, 3), (2, 2), (1, 1)), ((1, 1), (2, 2), (1, 1)), ((5, 2), (2, 1), (1, 1)),
    ((3, 3), (1, 1), (2, 3)), ((4, 1), (3, 2), (1, 1)), ((2, 3), (1, 1), (3, 1))])
def test_convolution(padding, kernel, stride, dilation, tmp_path):
    rng = np.random.default_rng([7, *kernel, *stride, *dilation])
    b = Builder((11, 8, 5))
    y = b.conv(rng, b.input, 6, kernel, stride=stride, dilation=dilation, padding=padding)
    net, differ, total = agree(b, y, tmp_path)
    assert isinstance(net.layers[0], Convolution) and differ <= 0.03 * total


@pytest.mark.parametrize("activation", [NONE, RELU, RELU_N1_TO_1, RELU6])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("form", [{}, {"scale": 0.0235, "zero_point": -128}, {"scale": 0.07, "zero_point": 100}])
def test_activations_scales_and_missing_bias(activation, per_channel, form, tmp_path):
    rng = np.random.default_rng(3)
    b = Builder((5, 6, 7), scale=0.031, zero_point=19)
    y = b.conv(rng, b.input, 4, activation=activation, per_channel=per_channel, bias=per_channel, **form)
    net, _, _ = agree(b, y, tmp_path)
    r = net.layers[0].requantization
    out = b.tensors[y]
    scale, zero_point = out["scale"][0], out["zero_point"][0]
    low, high = {NONE: (-99, 99), RELU: (0, 99), RELU_N1_TO_1: (-1, 1), RELU6: (0, 6)}[activation]
    assert r.low == max(-128, round(low / scale) + zero_point) and r.high == min(127, round(high / scale) + zero_point)


@pytest.mark.parametrize("multiplier", [1, 2, 3])
@pytest.mark.parametrize("padding,stride,dilation", [(SAME, (1, 1), (1, 1)), (VALID, (2, 1), (1, 1)),
                                                     (SAME, (1, 1), (2, 2))])
@pytest.mark.parametrize("channels", [1, 5])
def test_depthwise_convolution(multiplier, padding, stride, dilation, channels, tmp_path):
    rng = np.random.default_rng([multiplier, channels])
    b = Builder((9, 7, channels))
    y = b.conv(rng, b.input, None, (3, 2), stride=stride, dilation=dilation, padding=padding, multiplier=multiplier,
               activation=RELU)
    net, _, _ = agree(b, y, tmp_path)
    assert net.layers[0].groups == channels and net.layers[0].outputs == channels * multiplier


def test_grouped_convolution(tmp_path):
    b = Builder((6, 6, 8))
    net, _, _ = agree(b, b.conv(np.random.default_rng(1), b.input, 6, groups=2), tmp_path)
    assert net.layers[0].groups == 2 and net.layers[0].terms[0].values.shape == (6, 3, 3, 4)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("shape", [(12,), (3, 2, 5), (1, 1, 9)])
def test_fully_connected(per_channel, shape, tmp_path):
    rng = np.random.default_rng(5)
    b = Builder(shape)
    y = b.dense(rng, b.dense(rng, b.input, 7, activation=RELU, per_channel=per_channel), 4)
    net, _, _ = agree(b, y, tmp_path)
    assert [layer.kernel for layer in net.layers] == [((1, 1, *shape)[-3:-1]), (1, 1)]


@pytest.mark.parametrize("activation", [NONE, RELU, RELU6])
@pytest.mark.parametrize("scales", [(0.05, 0.05), (0.03, 0.09), (0.11, 0.02)])
def test_addition(activation, scales, tmp_path):
    """It stays a layer of its own; its operands have scales of their own."""
    rng = np.random.default_rng(6)
    b = Builder((5, 4, 6))
    first, second = (b.conv(rng, b.input, 6, scale=s, zero_point=z) for s, z in zip(scales, (-20, 33)))
    net, differ, total = agree(b, b.add(first, second, activation=activation, scale=0.06, zero_point=-10), tmp_path)
    assert [type(layer) for layer in net.layers] == [Convolution, Convolution, Add]
    assert differ <= 0.1 * total, "equal scales of 5/6 make every sixth sum a tie"


def test_addition_of_a_tensor_to_itself(tmp_path):
    b = Builder((4, 4, 3))
    agree(b, b.add(b.input, b.input, scale=0.1, zero_point=5), tmp_path)


@pytest.mark.parametrize("kind,padding", [("MAX", SAME), ("MAX", VALID), ("AVERAGE", VALID)])
@pytest.mark.parametrize("window,stride", [((2, 2), (2, 2)), ((3, 2), (1, 2)), ((7, 9), (1, 1)), ((1, 1), (2, 1))])
@pytest.mark.parametrize("activation", [NONE, RELU])
def test_pools(kind, padding, window, stride, activation, tmp_path):
    b = Builder((7, 9, 5))
    net, differ, _ = agree(b, b.pool(b.input, kind, window, stride=stride, padding=padding, activation=activation),
                           tmp_path)
    assert isinstance(net.layers[0], Pool) and (kind == "AVERAGE" or differ == 0)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("axes", [(1, 2), (2, 1), (1,), (2,), (-3, -2)])
def test_mean(keep, axes, tmp_path):
    b = Builder((6, 5, 4))
    y = b.mean(b.input, tuple(a % 4 for a in axes), keep=keep, scale=0.03, zero_point=7)
    b.tensors[-2]["data"] = np.array(axes, np.int32)
    net, _, _ = agree(b, b.dense(np.random.default_rng(1), y, 3), tmp_path)
    assert net.layers[0].kind == "average" and net.layers[0].window == (6 if len(axes) == 2 or axes == (1,) else 1,
                                                                        5 if len(axes) == 2 or axes == (2,) else 1)


def test_pad_before_a_convolution_and_an_average_pool(tmp_path):
    rng = np.random.default_rng(8)
    b = Builder((6, 6, 3))
    x = b.conv(rng, b.pad(b.input, 0, 1, 0, 1), 4, stride=(2, 2), padding=VALID)
    x = b.conv(rng, b.pad(x, 1, 0, 0, 1), 4, padding=SAME)
    x = b.conv(rng, b.pad(x, 2, 1, 1, 1), None, padding=VALID, multiplier=1)
    x = b.pool(b.pad(x, 1, 1, 0, 0), "AVERAGE", (2, 2))
    net, _, _ = agree(b, x, tmp_path)
    assert [layer.pads for layer in net.layers] == [(0, 0, 1, 1), (2, 1, 1, 2), (2, 1, 1, 1), (1, 0, 1, 0)]


def test_reshapes_change_no_order(tmp_path):
    rng = np.random.default_rng(9)
    b = Builder((60,))
    x = b.conv(rng, b.reshape(b.input, (1, 5, 4, 3)), 4, padding=VALID)
    x = b.reshape(b.reshape(x, (1, 24)), (1, 3, 2, 4))
    x = b.dense(rng, b.reshape(b.conv(rng, x, 2, (1, 1)), (1, 12)), 5)
    net, _, _ = agree(b, x, tmp_path)
    assert net.tensors[net.input].shape == (5, 4, 3) and net.provenance["flat_input"]


@pytest.mark.parametrize("kind", ["FLOAT32", "UINT8"])
def test_quantisation_at_both_ends(kind, tmp_path):
    """The same network with float or uint8 ends is the same network."""
    def middle(b, x):
        rng = np.random.default_rng(4)
        return b.softmax(b.dense(rng, b.conv(rng, x, 4), 3, zero_point=2))

    plain, ends = Builder((4, 4, 2)), Builder((4, 4, 2), kind=kind, zero_point=125)
    y = middle(ends, ends.operator("QUANTIZE", [ends.input], (1, 4, 4, 2)))
    if kind == "FLOAT32":
        y = ends.operator("DEQUANTIZE", [y], (1, 3), output="FLOAT32")
    else:
        y = ends.operator("QUANTIZE", [y], (1, 3), scale=1 / 256, zero_point=0, output="UINT8")
    first, second = (network_of(b.file(o), tmp_path)[1] for b, o in ((plain, middle(plain, plain.input)), (ends, y)))
    x = np.random.default_rng(0).integers(-128, 128, (5, 4, 4, 2), np.int8)
    assert first.tensors[first.input].zero_point == second.tensors[second.input].zero_point == -3
    assert np.array_equal(engine.run(first, x), engine.run(second, x))
    assert "SOFTMAX" in first.provenance["import_notes"][0]


def test_a_fixed_batch_is_only_a_size(tmp_path):
    def output(b, count):
        rng = np.random.default_rng(3)
        x = b.reshape(b.pool(b.conv(rng, b.pad(b.input, 1, 1, 1, 1), 4, padding=VALID), "MAX", (2, 2)), (1, 4 * 5 * 5))
        y = b.softmax(b.dense(rng, x, 3))
        for tensor in b.tensors:
            if tensor["data"] is None:
                tensor["shape"][0] = count
        return y

    one, four = Builder((6, 6, 3)), Builder((6, 6, 3))
    nets = [network_of(b.file(output(b, count)), tmp_path)[1] for b, count in ((one, 1), (four, 4))]
    x = np.random.default_rng(0).integers(-128, 128, (5, 6, 6, 3), np.int8)
    assert np.array_equal(engine.run(nets[0], x), engine.run(nets[1], x))


@pytest.mark.parametrize("seed", range(12))
def test_random_network(seed, tmp_path):
    rng = np.random.default_rng([31, seed])
    b = Builder((int(rng.integers(6, 12)), int(rng.integers(6, 12)), int(rng.integers(1, 6))),
                zero_point=int(rng.integers(-128, 128)))
    x = b.input
    for _ in range(int(rng.integers(2, 6))):
        kind = rng.integers(5)
        form = {"scale": float(rng.uniform(0.03, 0.07)), "zero_point": int(rng.integers(-128, 64)),
                "activation": int(rng.choice([NONE, RELU, RELU6])), "padding": SAME}
        if kind == 0:
            x = b.conv(rng, x, int(rng.integers(1, 9)), tuple(rng.integers(1, 4, 2).tolist()),
                       stride=tuple(rng.integers(1, 3, 2).tolist()), **form)
        elif kind == 1:
            x = b.conv(rng, x, None, multiplier=int(rng.integers(1, 3)), **form)
        elif kind == 2 and min(b.shape(x)[1:3]) >= 2:
            x = b.pool(x, str(rng.choice(["MAX", "AVERAGE"])), (2, 2), stride=(1, 2))
        else:
            other = b.conv(rng, x, b.shape(x)[3], **form)
            x = b.add(x, other, scale=0.06, zero_point=int(rng.integers(-128, 128)), activation=form["activation"])
    agree(b, b.softmax(b.dense(rng, b.mean(x, keep=False), 4)), tmp_path)


# -- integers that are kept, methods -----------------------------------------------------------------------------------
def block(seed=0):
    """A residual block with room for patterns: (Builder, output)."""
    rng = np.random.default_rng(seed)
    b = Builder((8, 8, 16), scale=1.0, zero_point=-128)
    first = b.conv(rng, b.input, 16, activation=RELU, scale=0.9, zero_point=-128)
    second = b.conv(rng, first, 16, scale=0.8, zero_point=4)
    x = b.add(first, second, activation=RELU, scale=1.0, zero_point=-128)
    return b, b.softmax(b.dense(rng, b.pool(x, "AVERAGE", (8, 8)), 10, scale=0.5))


def test_the_files_integers_are_kept(tmp_path):
    b, output = block()
    path, net = network_of(b.file(output), tmp_path)
    weights = [b.tensors[op["inputs"][1]] for op in b.operators if op["kind"] == "CONV_2D"]
    for layer, weight in zip(net.layers, weights):
        assert np.array_equal(layer.terms[0].values, weight["data"])
        assert np.array_equal(layer.weight_scale.astype(np.float32), np.float32(weight["scale"]))
    for op in b.operators[:3]:
        made = b.tensors[op["outputs"][0]]
        tensor = net.tensors[made["name"]]
        assert (np.float32(tensor.scale), tensor.zero_point) == (np.float32(made["scale"][0]), made["zero_point"][0])
    folded = net.layers[1].requantization.bias
    bias = b.tensors[b.operators[1]["inputs"][2]]["data"]
    assert np.array_equal(folded, bias + 128 * weights[1]["data"].astype(np.int64).sum(axis=(1, 2, 3)))
    assert net.provenance["scales"] == "of the file" and "tflite" in net.provenance["versions"]
    package.save(net, tmp_path / "p")
    same_network(package.load(tmp_path / "p"), flow.load_network(path))


@pytest.mark.parametrize("method", ["nm:2:4", "tasd:4:8+1:8", "basis:6"])
def test_methods_work_on_the_int8_weights(method, tmp_path):
    b, output = block()
    path, net = network_of(b.file(output), tmp_path, method)
    dense = flow.load_network(path)
    validate.network(net)
    assert net.tensors == dense.tensors
    for layer, full in zip(net.layers[:2], dense.layers):
        if isinstance(layer, BasisConvolution):
            assert method.startswith("basis")
            continue
        kept = layer.effective_weights()
        assert layer.format == method and np.array_equal(kept[kept != 0], full.effective_weights()[kept != 0])
        assert 0 < layer.metrics["output_error"] < 1 and layer.metrics["dropped_nonzeros"] > 0.2


def test_full_patterns_give_the_dense_network(tmp_path):
    b, output = block()
    x = np.random.default_rng(1).integers(-128, 128, (2, 8, 8, 16), np.int8)
    dense, full = (engine.run(network_of(b.file(output), tmp_path, m)[1], x, keep=True) for m in ("dense", "nm:8:8"))
    assert all(np.array_equal(dense[name], full[name]) for name in dense)


def test_dequantised_graph_is_near_the_integers(tmp_path):
    """The float graph has the real values of the integers and saturates like them: outputs differ by rounding only."""
    b, output = block()
    path, net = network_of(b.file(output), tmp_path)
    x = np.random.default_rng(2).integers(0, 256, (2, 8, 8, 16)).astype(np.float32)
    first = net.tensors[net.layers[0].output]
    real = graphs.forward(flow.load_graph(path), x, keep=True)[first.name]
    ours = engine.run(net, engine.quantize_input(net, x), keep=True)[first.name]
    assert 0.1 < (ours == -128).mean() < 0.9
    assert np.abs(first.scale * (ours.astype(float) - first.zero_point) - real).max() <= 0.51 * first.scale


def test_data_are_reals_or_the_tensors_own_integers(tmp_path):
    b = Builder((4, 3, 2), scale=0.5, zero_point=10)
    path, net = network_of(b.file(b.conv(np.random.default_rng(0), b.input, 3)), tmp_path)
    package.save(net, tmp_path / "p.summand")
    q = np.random.default_rng(1).integers(-128, 128, (6, 4, 3, 2), np.int8)
    real = np.float32(0.5) * (q.astype(np.float32) - 10)
    for number, x in enumerate((q, (q.astype(np.int16) + 128).astype(np.uint8), real, q.reshape(6, -1))):
        np.save(tmp_path / f"{number}.npy", x)
        for source in (flow.load_graph(path), package.load(tmp_path / "p.summand")):
            got, labels, _ = flow.load_samples(tmp_path / f"{number}.npy", source)
            assert labels is None and np.array_equal(got, real)
    assert np.array_equal(engine.quantize_input(net, real), q)
    np.save(tmp_path / "chw.npy", np.zeros((2, 2, 4, 3), np.float32))
    with pytest.raises(InputError, match=r"must be \[N, 4, 3, 2\]"):
        flow.load_samples(tmp_path / "chw.npy", net)
    x, _, source = flow.load_samples(None, net)
    assert "uniform" in source and x.min() >= 0.5 * (-128 - 10) and x.max() <= 0.5 * (127 - 10)


@pytest.mark.parametrize("options,text", [
    ({"method": "svd:2"}, "method must not be factorised or permuted"), ({"method": "tt:3"}, "must not be factorised"),
    ({"permutation": True}, "permutation must not be factorised or permuted"),
    ({"observer": "mse"}, "observer must be left out: the file's own scales are kept, not 'mse'")])
def test_options_that_would_change_the_integers(options, text, tmp_path):
    b, output = block()
    with pytest.raises(InputError, match=text):
        network_of(b.file(output), tmp_path, **({"method": "nm:2:4"} | options))


# -- refusals ----------------------------------------------------------------------------------------------------------
def small(change=None, **form):
    """A network of one convolution and one matrix product, and ``change(builder)`` before it is written."""
    rng = np.random.default_rng(0)
    b = Builder((4, 4, 2), **form)
    y = b.dense(rng, b.conv(rng, b.input, 3), 2)
    return b.file((change(b) if change else None) or y)


def put(entry, **fields):
    """A change of one entry of ``tensors`` or ``operators`` (``("tensors", 1)``)."""
    kind, number = entry

    def change(b):
        getattr(b, kind)[number] |= fields
    return change


def options(number, **fields):
    """A change of the options of an operator."""
    def change(b):
        b.operators[number]["options"] |= fields
    return change


def after(function):
    """``function(builder, output of the convolution)`` makes another output."""
    return lambda b: function(b, b.operators[0]["outputs"][0])


WEIGHT, BIAS, MADE = ("tensors", 1), ("tensors", 2), ("tensors", 3)
REFUSED = [
    (lambda b: b.operators[0].update(kind="HARD_SWISH"), "operator 0 (HARD_SWISH) is not supported; supported: ADD"),
    (lambda b: b.operators[0].update(kind="CUSTOM", table=None), "operator 0 (custom operator ) is not supported"),
    (lambda b: b.fields.update(version=2), "schema version must be 3, not 2"),
    (lambda b: b.fields.update(subgraphs=2), "must have one subgraph, not 2"),
    (put(("operators", 0), inputs=[0]), "must have 2..3 inputs, not (0,)"),
    (put(("operators", 0), inputs=[-1, 1, 2]), "must have 2..3 inputs"),
    (put(("operators", 0), inputs=[0] * 17), "must have at most 16 inputs, not 17"),
    (put(("operators", 0), inputs=[0, 99, 2]), "operator 0 must refer to one of 7 tensors, not 99"),
    (put(("operators", 0), inputs=[4, 1, 2]), "must read what an earlier operator makes, not tensor 4"),
    (put(("operators", 0), outputs=[3, 4]), "must have one output"),
    (put(("operators", 0), outputs=[0]), "must not make tensor 0, which is there already"),
    (put(("operators", 0), table="AddOptions", options={}), "must have options of type Conv2DOptions"),
    (put(("tensors", 0), kind="INT16"), "must be INT8, or UINT8 or FLOAT32 with a QUANTIZE behind it, not 'INT16'"),
    (put(("tensors", 0), kind="FLOAT32"), "must read INT8 (quantise the network to full integers), not 'FLOAT32'"),
    (put(("tensors", 0), shape=[1, 4, 4, 2, 1]), "must have 2 to 4 dimensions, the batch first"),
    (put(("tensors", 0), shape=[1, 4, 0, 2]), "each must be in 1..65536"),
    (put(("tensors", 0), shape=[1, 70000, 4, 2]), "each must be in 1..65536"),
    (put(("tensors", 0), shape=[1, 4, 4, -1]), "must have dimensions of 0 or more"),
    (put(("tensors", 0), shape=[1] * 9), "must have at most 8 dimensions, not 9"),
    (put(("tensors", 0), scale=[0.1, 0.2]), "must have one scale and zero point"),
    (put(("tensors", 0), scale=[0.0]), "must have a scale in 1e-30..1e+06 and a zero point in -128..127"),
    (put(("tensors", 0), scale=[float("nan")]), "must have finite scales"),
    (put(("tensors", 0), zero_point=[128]), "a zero point in -128..127, not (0.05000000074505806, 128)"),
    (put(("tensors", 0), name="x" * 5000), "name must be printable text of at most 4096 bytes"),
    (put(("tensors", 0), name="a\nb"), "name must be printable text"),
    (put(WEIGHT, kind="UINT8"), "weight must be INT8, not 'UINT8'"),
    (put(WEIGHT, data=None), "weight must be a constant of the file"),
    (put(WEIGHT, data=np.zeros(5, np.int8)), "weight must have the bytes of its shape [3, 3, 3, 2], not 5"),
    (put(WEIGHT, shape=[3, 18]), "weight must have 4 dimensions"),
    (put(WEIGHT, shape=[2, 3, 3, 3], scale=[0.001], zero_point=[0]),
     "weight must divide 2 input and 2 output channels into groups"),
    (put(WEIGHT, axis=3), "must have one scale, or one for each output channel, and zero point 0"),
    (put(WEIGHT, zero_point=[0, 1, 0]), "must have one scale, or one for each output channel, and zero point 0"),
    (put(WEIGHT, scale=[0.1, 0.0, 0.1]), "weight scales must be in 1e-30..1e+06"),
    (put(BIAS, shape=[2], data=np.zeros(2, np.int32)), "bias must have 3 elements"),
    (put(BIAS, kind="INT64", data=np.zeros(3, np.int64)), "bias must be INT32, not 'INT64'"),
    (put(BIAS, scale=[1.0]), "bias scale must be input scale * weight scale"),
    (put(BIAS, scale=[1.0, 2.0]), "bias must have one scale, or one for each output channel"),
    (put(BIAS, data=np.full(3, 2**31 - 1, np.int32)), "has a bias that does not fit 32 bits"),
    (put(MADE, kind="INT16"), "must make INT8, not 'INT16'"),
    (put(MADE, shape=[1, 4, 4, 5]), "must make a tensor of [1, 4, 4, 3], not (1, 4, 4, 5)"),
    (put(MADE, shape=[2, 4, 4, 3]), "must keep the batch of 1"),
    (put(MADE, scale=[1e-5]), "must not scale its sums by 3.999 or more"),
    (options(0, StrideH=0), "stride must be in 1..65536"),
    (options(0, DilationWFactor=0), "dilation must be in 1..1024"),
    (options(0, Padding=7), "padding must be SAME or VALID, not 7"),
    (options(0, Padding=VALID, DilationHFactor=3), "window of 7 must fit the padded input"),
    (options(0, FusedActivationFunction=4), "must have the activation NONE, RELU, RELU_N1_TO_1, RELU6, not 'TANH'"),
    (options(1, WeightsFormat=1), "weights must be in the default format"),
    (put(("tensors", 4), shape=[3, 32]), "weight must have 48 input features"),
    (after(lambda b, x: b.add(x, b.input)), "operands must have equal shapes (no broadcasting)"),
    (after(lambda b, x: b.operator("ADD", [x, 1], b.shape(x), FusedActivationFunction=0)), "not tensor 1"),
    (after(lambda b, x: b.pool(x, "AVERAGE", (3, 3), padding=SAME)), "must not need padding (SAME): the hardware"),
    (after(lambda b, x: b.pool(x, "MAX", (2000, 1), padding=SAME)), "window must be in 1..1024"),
    (after(lambda b, x: b.pool(b.pad(x, 1, 1, 1, 1), "MAX", (2, 2))), "must not read a PAD directly"),
    (after(lambda b, x: b.pad(x, 1, 1, 1, 1)), "must not read a PAD directly: it is only supported before"),
    (after(lambda b, x: b.pad(x, 0, 2000, 0, 0)), "rows and columns only, in 0..1024"),
    (after(lambda b, x: b.conv(np.random.default_rng(0), b.pad(x, 3, 0, 0, 0), 2, padding=VALID)),
     "pads must be smaller than the window"),
    (after(lambda b, x: b.mean(x, (1, 3))), "must be taken over rows and columns (axes 1 and 2), not [1, 3]"),
    (after(lambda b, x: b.conv(np.random.default_rng(0), b.reshape(x, (1, 2, 8, 3)), 2)),
     "must read a tensor of [batch, 4, 4, 3] as it was made, not (2, 8, 3)"),
    (after(lambda b, x: b.reshape(x, (1, 47))), "must keep the number of elements"),
    (after(lambda b, x: b.operator("RESHAPE", [x], (1, 48), scale=0.2)), "must keep scale and zero point of its input"),
    (after(lambda b, x: b.softmax(x)), "must run along the classes of [batch, classes]"),
    (after(lambda b, x: b.softmax(b.dense(np.random.default_rng(0), x, 3), beta=0.0)), "with beta above 0"),
    (after(lambda b, x: b.dense(np.random.default_rng(0), b.softmax(b.dense(np.random.default_rng(0), x, 3)), 2)),
     "(SOFTMAX) is only supported at the end of the network"),
    (after(lambda b, x: b.operator("QUANTIZE", [x], b.shape(x), scale=0.2)),
     "is only supported from the input to INT8"),
    (after(lambda b, x: b.operator("DEQUANTIZE", [x], b.shape(x))),
     "is only supported from int8 to FLOAT32, at the end"),
    (after(lambda b, x: b.reshape(b.input, (1, 32))), "must have at least one layer to run between input and output"),
    (lambda b: 1, "must be made by an operator"),
]


@pytest.mark.parametrize("change,text", REFUSED, ids=[str(n) for n in range(len(REFUSED))])
def test_refusals(change, text, tmp_path):
    with pytest.raises(InputError) as caught:
        network_of(small(change), tmp_path)
    assert text in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "model.tflite")) or "32 bits" in text or "3.999" in text


def test_unused_operators_are_left_out(tmp_path):
    def change(b):
        made = b.operators[0]["outputs"][0]
        b.pool(made, "MAX", (2, 2))
    _, net = network_of(small(change), tmp_path)
    assert len(net.layers) == 2 and "1 operators" in net.provenance["import_notes"][0]


@pytest.mark.parametrize("data,text", [
    (b"", "it has no TFL3 mark"), (b"\x00" * 4 + b"TFL3", "schema version must be 3, not 0"),
    (b"\xff" * 4 + b"TFL3" + bytes(64), "must be an undamaged TFLite file"), (b"PK\x03\x04" * 40, "no TFL3 mark")])
def test_other_files(data, text):
    with pytest.raises(InputError, match=text):
        tflite_import.parse(data)


def test_shared_weights_cannot_grow_without_bound(monkeypatch):
    monkeypatch.setattr(tflite_import, "MAX_WEIGHTS", 100)
    with pytest.raises(InputError, match="must have at most 100 weights, not 150"):
        tflite_import.parse(small())


def test_a_scale_and_its_activation_limits_survive_the_floats():
    """Limits are kept as real values of integers, whatever 6 / scale rounds to."""
    for n in range(1, 300):
        scale = 6 / (n / 7 + 0.5)
        b = Builder((2, 2, 1))
        graph = tflite_import.parse(b.file(b.conv(np.random.default_rng(0), b.input, 1, activation=RELU6, scale=scale,
                                                  zero_point=-90)))
        node = graph.nodes[0]
        own = graph.integers.tensors[node.output][0]
        steps = int(np.floor(np.float32(6) / np.float32(scale) + np.float32(0.5)))
        assert node.low == 0 and node.high == own * min(steps, 217)


# -- damaged files -----------------------------------------------------------------------------------------------------
def survives(data):
    """True if the file is imported and quantised, False if refused; nothing else may happen."""
    try:
        graph = tflite_import.parse(data)
        shape = graph.shapes[graph.input]
        if sum(int(np.prod(s)) for s in graph.shapes.values()) > 1 << 20:
            return True
        limits = [graph.integers.tensors[graph.input][0] * (q - graph.integers.tensors[graph.input][1])
                  for q in (-128, 127)]
        calibration = flow.random_calibration(shape, limits=limits, samples=2)
        net = flow.Quantizer(graph, calibration).network("dense")
        validate.network(net)
    except InputError as error:
        assert "\n" not in str(error)
        return False
    return True


def test_every_truncation_is_refused():
    data = small()
    tail = len(data) - max(i for i, byte in enumerate(data) if byte)
    for length in range(0, len(data) - tail, 5):
        assert not survives(data[:length]) or length > len(data) - 64


@pytest.mark.parametrize("part", range(4))
def test_byte_flips_never_escape(part):
    rng = np.random.default_rng([77, part])
    b, output = block(part)
    data, good = (small(), b.file(output))[part % 2], 0
    for _ in range(400 if part % 2 == 0 else 100):
        changed = bytearray(data)
        for at in rng.integers(0, len(data), int(rng.integers(1, 4))):
            changed[at] = int(rng.choice([0, 1, 127, 128, 255, changed[at] ^ (1 << int(rng.integers(8)))]))
        good += survives(bytes(changed))
    assert good > 0


def test_no_byte_of_the_tables_escapes():
    """Every byte of a file with few weights is offset, length, option or scale: each is changed once."""
    b, rng = Builder((3, 3, 1)), np.random.default_rng(5)
    data = b.file(b.softmax(b.dense(rng, b.pool(b.input, "MAX", (2, 2)), 2)))
    refused = 0
    for at, byte in enumerate(data):
        refused += not survives(data[:at] + bytes([byte ^ int(rng.choice([1, 4, 0x80, 0xFF]))]) + data[at + 1:])
    assert refused > 200


# -- published networks ------------------------------------------------------------------------------------------------
def members(path, suffix, *, every=1):
    """(name, bytes) of every so many files of a packed archive, in one pass."""
    count = 0
    with tarfile.open(path, "r|*") as archive:
        for member in archive:
            if member.name.endswith(suffix):
                count += 1
                if count % every == 0:
                    yield member.name, archive.extractfile(member).read()


def keywords():
    """(int8 [1000, 49, 10, 1], labels) of the MLPerf Tiny keyword set."""
    found = list(members(next(real_data("kws").glob("*.tar.xz")), ".bin"))
    x = np.stack([np.frombuffer(data, np.int8) for _, data in found]).reshape(-1, 49, 10, 1)
    return x, np.array([int(name[:-4].rsplit("_", 1)[1]) for name, _ in found])


def photos():
    """(int8 [200, 32, 32, 3], labels) of every 50th CIFAR-10 test image."""
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    found = list(members(real_data("cifar10", "cifar10_png_test.tar.gz"), ".png", every=50))
    x = np.stack([np.asarray(Image.open(io.BytesIO(data))) for _, data in found])
    return (x.astype(np.int16) - 128).astype(np.int8), np.array([classes.index(Path(n).parent.name) for n, _ in found])


def correct(net, x, labels):
    """Number of samples whose largest output is the label."""
    outputs = [engine.run(net, x[at:at + 50]) for at in range(0, len(x), 50)]
    return int((graphs.top1(np.concatenate(outputs)) == labels).sum())


def test_keyword_spotting_scores_its_published_accuracy():
    """90.2 % with TFLite's optimised kernels, 90.1 % with its reference kernels."""
    net = flow.load_network(real_data("mlperf_tiny", "dscnn_kws", "kws_ref_model.tflite"))
    x, labels = keywords()
    assert [type(layer).__name__ for layer in net.layers] == ["Convolution"] * 9 + ["Pool", "Convolution"]
    assert correct(net, x, labels) == 901


@pytest.mark.parametrize("name,step,right", [("quant", 1, 179), ("large_int8", 4, 46)])
def test_resnet8_scores_as_in_tflite(name, step, right):
    """TFLite, too, has 179 of the 200 photos right; with the large network 184 or 185, by its kernels, and we 183."""
    x, labels = (a[::step] for a in photos())
    net = flow.load_network(real_data("mlperf_tiny", "resnet8", f"pretrainedResnet_{name}.tflite"))
    assert len(x) == 200 // step and sum(isinstance(layer, Add) for layer in net.layers) == 3
    assert correct(net, x, labels) == right
