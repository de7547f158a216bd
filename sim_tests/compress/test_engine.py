"""Running packages: batches, kept tensors, refusals, and ONNX Runtime's side."""
import numpy as np
import onnx
import pytest

from compress import engine
from compress import graph as graphs
from compress import basis, validate
from compress.network import BasisConvolution, Network, Requantization, Tensor
from golden.convolution import accumulate
from sim_tests.compress.networks import every_layer_kind, small_network
from spec.errors import InputError


def test_batches_and_kept_tensors_agree():
    network, x, _ = small_network()
    q = engine.quantize_input(network, x)
    values = engine.run(network, q, keep=True)
    assert set(values) == set(network.tensors)
    for name, array in values.items():
        assert array.dtype == np.int8 and array.shape == (len(x), *network.tensors[name].shape)
    whole = engine.run(network, q)
    assert np.array_equal(whole, values[network.output])
    assert np.array_equal(np.concatenate([engine.run(network, q[i:i + 1]) for i in range(len(q))]), whole)
    for layer in network.layers:
        out = values[layer.output]
        assert out.min() >= layer.requantization.low and out.max() <= layer.requantization.high


def test_progress_names_every_layer():
    network, x, _ = small_network()
    told = []
    engine.run(network, engine.quantize_input(network, x[:1]), progress=lambda *a: told.append(a))
    assert [n for n, _ in told] == [v.name for v in network.layers] and told[-1][1] == 1


def test_input_quantisation_rounds_and_clips():
    network, x, _ = small_network()
    t = network.tensors[network.input]
    data = np.zeros((1, *t.shape), np.float32)
    data[0, 0, 0, :3] = 1e9, -1e9, 0
    q = engine.quantize_input(network, data)
    assert q[0, 0, 0, :3].tolist() == [127, -128, t.zero_point]
    inside = engine.quantize_input(network, x)
    back = t.scale * (inside.astype(float) - t.zero_point)
    assert np.abs(back - x).max() <= t.scale * 1.01
    values = np.array([[[[t.zero_point]]]])
    assert (engine.dequantize_output(network, values) != 0).all() or \
        t.zero_point == network.tensors[network.output].zero_point


def test_accuracy_counts_right_answers():
    network, x, _ = small_network()
    right = graphs.top1(engine.predict(network, x))
    assert engine.accuracy(network, x, right) == 1 and engine.accuracy(network, x, right, batch=5) == 1
    wrong = right.copy()
    wrong[:3] = (wrong[:3] + 1) % 5
    assert engine.accuracy(network, x, wrong) == pytest.approx(1 - 3 / len(x))


def test_refusals():
    network, x, _ = small_network()
    with pytest.raises(InputError, match="input data must be int8, not 'float32'"):
        engine.run(network, x)
    with pytest.raises(InputError, match=r"input data must be \[N, 8, 8, 3\]"):
        engine.run(network, np.zeros((1, 3, 8, 8), np.int8))
    with pytest.raises(InputError, match="must be finite"):
        engine.quantize_input(network, x * np.nan)
    with pytest.raises(InputError, match="labels must be one for each of 12 samples"):
        engine.accuracy(network, x, [1, 2])
    with pytest.raises(InputError, match="labels must be one for each"):
        engine.accuracy(network, x[:0], [])


def test_onnx_runtime_side(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(every_layer_kind(np.random.default_rng(0)), path)
    _, x, graph = small_network()
    got = engine.run_onnx(path, graphs.to_nchw(x))
    np.testing.assert_allclose(got, graphs.forward(graph, x)[:, 0, 0], rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="must run in ONNX Runtime"):
        engine.run_onnx(path, x)
    path.write_bytes(b"not a model")
    with pytest.raises(InputError, match="must run in ONNX Runtime"):
        engine.run_onnx(path, x)
    with pytest.raises(InputError, match="must be a readable file"):
        engine.run_onnx(tmp_path / "none.onnx", x)


def basis_network(rng, *, bits, zero_point=-7, channels=24, geometry=None):
    """One basis layer with random integers."""
    geometry = geometry or {"pads": (1, 0, 2, 1), "stride": (2, 1), "dilation": (1, 2)}
    tensors = {"x": Tensor(name="x", height=9, width=8, channels=channels, scale=0.5, zero_point=zero_point)}
    layer = BasisConvolution(
        name="c", input="x", output="y", basis=rng.integers(-128, 128, (3, 3, 2)).astype(np.int8),
        coefficients=rng.integers(-1, 2, (5, channels, 3)).astype(np.int8), intermediate_bits=bits, **geometry,
        requantization=Requantization(bias=rng.integers(-999, 999, 5).astype(np.int32), zero_point=3,
                                      multiplier=np.full(5, 40000, np.uint16), shift=np.full(5, 11, np.uint8)))
    size = accumulate(np.zeros((1, 9, 8, channels), np.int8), layer.effective_weights(), **geometry).shape[1:]
    tensors["y"] = Tensor(name="y", height=size[0], width=size[1], channels=5, scale=1.0, zero_point=3)
    network = Network(name="n", input="x", output="y", tensors=tensors, layers=(layer,))
    validate.network(network)
    return network, rng.integers(-128, 128, (4, 9, 8, channels)).astype(np.int8)


@pytest.mark.parametrize("zero_point", [-128, -7, 127])
def test_basis_layer_without_saturation_is_the_dense_integer_kernel(rng, zero_point):
    network, x = basis_network(rng, bits=16, zero_point=zero_point)
    layer = network.layers[0]
    assert not basis.can_saturate(layer.coefficients, zero_point, 16)
    want = accumulate(x.astype(np.int64) - zero_point, layer.effective_weights(), stride=layer.stride, pads=layer.pads,
                      dilation=layer.dilation)
    assert np.array_equal(engine.accumulators(layer, network, {"x": x}), want) and np.abs(want).max() > 10000
    y = ((want + layer.requantization.bias) * 40000 >> 11) + (1 << 13) >> 14
    assert np.array_equal(engine.run(network, x), np.clip(y + 3, -128, 127))


def test_basis_layer_saturates_each_intermediate_once(rng):
    """Element by element in plain integers, at a width that clamps."""
    network, x = basis_network(rng, bits=9, geometry={"pads": (1, 1, 1, 1), "stride": (1, 2)})
    layer = network.layers[0]
    q = np.pad(x.astype(np.int64) + 7, ((0, 0), (1, 1), (1, 1), (0, 0)))
    exact = np.einsum("nyxc,kcm->nyxkm", q, layer.coefficients.astype(np.int64))
    ir = np.clip(exact, -256, 255)
    assert (ir != exact).any()
    height, width = network.tensors["y"].shape[:2]
    want = np.zeros((4, height, width, 5), np.int64)
    for r in range(3):
        for s in range(2):
            view = ir[:, r:r + height, s:s + 2 * width - 1:2]
            want += np.einsum("nyxkm,m->nyxk", view, layer.basis[:, r, s].astype(np.int64))
    assert np.array_equal(engine.accumulators(layer, network, {"x": x}), want)


def test_parts_of_a_basis_layer_agree_with_the_whole(rng, monkeypatch):
    network, x = basis_network(rng, bits=10)
    whole = engine.run(network, x)
    for chunk in (1, 9 * 8 * 3 * 2, 9 * 8 * 3 * 5 * 3):
        monkeypatch.setattr(engine, "_CHUNK", chunk)
        assert np.array_equal(engine.run(network, x), whole)
    assert engine.run(network, x[:0]).shape == (0, *whole.shape[1:])
