"""Running packages: batches, kept tensors, refusals, and ONNX Runtime's side."""
import numpy as np
import onnx
import pytest

from compress import engine
from compress import graph as graphs
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
