"""golden.lstm against ONNX Runtime and PyTorch, trains against their dense matrices, integers against plain loops."""
import math

import numpy as np
from onnx import TensorProto, helper, numpy_helper
import onnxruntime
import pytest

from golden.chain import Requantizer
from golden.lstm import GATES, LSTM, IntegerLSTM, quantize_lstm, quantize_tt_linear, table
from golden.tensor_train import TensorTrain, TTLinear, tt_linear
from spec.errors import InputError

#: 4 gates x 6 hidden in modes (4, 6), 24 inputs in modes (4, 3, 2).
OUT, IN, RANKS = (4, 6), (4, 3, 2), (1, 3, 5, 4, 2, 1)


def make(rng, *, trains=False):
    """A layer of 24 inputs and 6 hidden; with trains both its matrices are."""
    w, r = rng.normal(0, 0.3, (24, 24)), rng.normal(0, 0.4, (24, 6))
    if trains:
        w, r = tt_linear(w, OUT, IN, RANKS), tt_linear(r, OUT, (3, 2), (1, 4, 5, 2, 1))
    return LSTM(input=w, recurrent=r, bias=rng.normal(0, 0.5, 24))


def by_onnx(layer, x, h, c):
    """(hidden of every step [N, T, H], last cell) by ONNX Runtime; its gates are i, o, f, g, its layout [T, N, I]."""
    hidden = layer.hidden
    order = np.concatenate([np.arange(GATES.index(g) * hidden, (GATES.index(g) + 1) * hidden) for g in "iofg"])
    arrays = {"W": layer.input[order][None], "R": layer.recurrent[order][None],
              "B": np.concatenate([layer.bias[order], np.zeros(4 * hidden)])[None], "h": h[None], "c": c[None]}
    names = ["x", "W", "R", "B", "", "h", "c"]
    node = helper.make_node("LSTM", names, ["y", "last", "cell"], hidden_size=hidden)
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("y", "cell")]
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "N", x.shape[2]])], outputs,
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y, cell = session.run(None, {"x": x.transpose(1, 0, 2).astype(np.float32)})
    return y[:, 0].transpose(1, 0, 2), cell[0]


def test_float_against_onnx_runtime(rng):
    layer, x = make(rng), rng.normal(size=(3, 7, 24))
    h, c = rng.normal(0, 0.5, (2, 3, 6))
    steps = layer.forward(x, hidden=h, cell=c)
    hidden, cell = by_onnx(layer, x, h, c)
    np.testing.assert_allclose(steps.hidden, hidden, atol=2e-6)
    np.testing.assert_allclose(steps.cell[:, -1], cell, atol=2e-6)
    assert steps.sums.shape == (3, 7, 24) and np.abs(steps.hidden).max() > 0.1


def test_float_against_pytorch(rng):
    torch = pytest.importorskip("torch", reason="needs the extra `train` (PyTorch)")
    torch.set_num_threads(1)
    layer, x = make(rng), rng.normal(size=(3, 7, 24))
    theirs = torch.nn.LSTM(24, 6, batch_first=True).double()
    with torch.no_grad():
        for name, value in (("weight_ih_l0", layer.input), ("weight_hh_l0", layer.recurrent),
                            ("bias_ih_l0", layer.bias), ("bias_hh_l0", np.zeros(24))):
            getattr(theirs, name).copy_(torch.from_numpy(value))
        hidden, (_, cell) = theirs(torch.from_numpy(x))
    steps = layer.forward(x)
    np.testing.assert_allclose(steps.hidden, hidden.numpy(), atol=1e-12)
    np.testing.assert_allclose(steps.cell[:, -1], cell[0].numpy(), atol=1e-12)


@pytest.mark.parametrize("order", ["right_to_left", "left_to_right", "decoupled"])
def test_trains_are_their_dense_matrices(rng, order):
    layer, x = make(rng, trains=True), rng.normal(size=(2, 5, 24))
    dense = layer.to_dense()
    assert isinstance(dense.input, np.ndarray) and isinstance(layer.input, TTLinear)
    for got, want in zip(layer.forward(x, order=order), dense.forward(x)):
        np.testing.assert_allclose(got, want, atol=1e-12)


def test_full_rank_is_the_layer_and_error_falls_with_rank(rng):
    plain, x, errors = make(rng), rng.normal(size=(2, 4, 24)), []
    for rank in (1, 3, 8, 24):
        ranks = (1, min(4, rank), rank, min(6, rank), min(2, rank), 1)
        layer = LSTM(input=tt_linear(plain.input, OUT, IN, ranks), recurrent=plain.recurrent, bias=plain.bias)
        errors.append(layer.input.meta["relative_error"])
        assert layer.parameters == layer.input.parameters + 144
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.5 and errors[-1] < 1e-12
    np.testing.assert_allclose(layer.forward(x).hidden, plain.forward(x).hidden, atol=1e-12)


def test_sequences_continue(rng):
    layer, x = make(rng), rng.normal(size=(2, 6, 24))
    whole, first = layer.forward(x), layer.forward(x[:, :2])
    rest = layer.forward(x[:, 2:], hidden=first.hidden[:, -1], cell=first.cell[:, -1])
    np.testing.assert_array_equal(rest.hidden, whole.hidden[:, 2:])
    integer, q = quantize_lstm(layer, x_int(rng), scale=0.02), x_int(rng)
    whole, first = integer.run(q), integer.run(q[:, :2])
    rest = integer.run(q[:, 2:], hidden=first.hidden[:, -1], cell=first.cell[:, -1])
    assert all(np.array_equal(a, b[:, 2:]) for a, b in zip(rest, whole))


def x_int(rng, low=-128):
    return rng.integers(low, 128, (4, 6, 24)).astype(np.int8)


def test_published_counts():
    """UCF11, section 8: decoupled 3,400 parameters and 294,912 multiplications for the input of all four gates."""
    modes, ranks = (16, 8, 8, 8, 20, 20, 18), (1, 4, 8, 16, 8, 4, 4, 1)
    train = TensorTrain(cores=tuple(np.broadcast_to(0.0, (a, n, b)) for a, n, b in zip(ranks, modes, ranks[1:])))
    layer = LSTM(input=TTLinear(train=train, outputs=3), recurrent=np.zeros((1024, 256)))
    assert layer.hidden == 256 and layer.parameters == 3400 + 262144 and layer.macs() == 294912 + 262144
    assert layer.cycles(16, 16) == 4640 + 64 * 256
    assert layer.macs(2, "decoupled") == 2 * (8 * 57600 + 1024 * 8 + 262144) - 2 * (8 * 57600 + 1024 * 8) + \
        layer.input.macs(2, "decoupled")


def test_tables():
    for name, function in (("sigmoid", lambda v: 1 / (1 + math.exp(-v))), ("tanh", math.tanh)):
        got = table(name)
        assert got.dtype == np.int16 and got.shape == (65536,)
        for a in (-32768, -5000, -1, 0, 1, 777, 4096, 32767):
            assert got[a + 32768] == max(-32767, min(32767, math.floor(function(a / 2048) * 32768 + 0.5)))
        assert (np.diff(got.astype(int)) >= 0).all()
    assert table("sigmoid")[32768] == 16384 and table("tanh")[32768] == 0 and table("tanh")[-1] == 32767


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("zero_point", [0, -128, 7])
def test_integers_by_loops(rng, trains, zero_point):
    """Sums from the requantised products, then every gate of every element with Python's integers."""
    layer = make(rng, trains=trains)
    x = x_int(rng)
    integer = quantize_lstm(layer, x, scale=0.02, zero_point=zero_point)
    steps = integer.run(x)
    sigmoid, tanh = (table(n).tolist() for n in ("sigmoid", "tanh"))
    for n in range(len(x)):
        h, c = [0] * 6, [0] * 6
        for t in range(x.shape[1]):
            parts = []
            for matrix, vector, requantizers, zero in (
                    (integer.input, x[n, t], integer.input_requantizers, zero_point),
                    (integer.recurrent, np.array(h), integer.recurrent_requantizers, 0)):
                if trains:
                    parts.append(matrix.run(vector[None], requantizers, zero)[-1].output[0].tolist())
                else:
                    (q,) = requantizers
                    rows = [sum(int(w) * int(v) for w, v in zip(row, vector)) for row in matrix]
                    parts.append([min(32767, max(-32768, (((acc + int(b)) * int(m) >> int(s)) + 8192) >> 14))
                                  for acc, b, m, s in zip(rows, q.bias, q.multiplier, q.shift)])
            a = [min(32767, max(-32768, p + r + int(b))) for p, r, b in zip(*parts, integer.bias)]
            assert steps.sums[n, t].tolist() == a
            for k in range(6):
                i, f, g, o = (a[gate * 6 + k] + 32768 for gate in range(4))
                c[k] = min(32767, max(-32768, (16 * sigmoid[f] * c[k] + sigmoid[i] * tanh[g] + 2 ** 18) // 2 ** 19))
                h[k] = min(127, max(-128, (sigmoid[o] * tanh[c[k] + 32768] + 2 ** 22) // 2 ** 23))
            assert steps.cell[n, t].tolist() == c and steps.hidden[n, t].tolist() == h
    assert steps.cell.dtype == np.int16 and steps.hidden.dtype == np.int8 and np.unique(steps.hidden).size > 30


@pytest.mark.parametrize("trains", [False, True])
def test_integers_stay_near_the_float_layer(rng, trains):
    """h has a step of 1/128 and feeds back; 8-bit weights: six steps stay within 5 of these steps."""
    layer, x = make(rng, trains=trains), x_int(rng)
    steps = quantize_lstm(layer, x, scale=0.02, zero_point=-5).run(x)
    want = layer.forward((x.astype(np.int64) + 5) * 0.02)
    assert np.abs(steps.hidden / 128 - want.hidden).max() <= 5 / 128
    assert np.abs(steps.cell / 2048 - want.cell).max() <= 0.1 and np.abs(want.hidden).max() > 0.3


def test_exact_train_is_the_dense_integer_matrix(rng):
    """None requantises nothing: the last product's requantiser then sees the dense matrix's accumulators."""
    cores = tuple(rng.integers(-3, 4, (a, n, b)).astype(np.int8) for a, n, b in zip(RANKS, OUT + IN, RANKS[1:]))
    train = TTLinear(train=TensorTrain(cores=cores), outputs=2)
    recurrent, bias = rng.integers(-128, 128, (24, 6)).astype(np.int8), rng.integers(-3000, 3000, 24)
    last = Requantizer(multiplier=40000, shift=9, bits=16)
    shared = {"recurrent": recurrent, "bias": bias,
              "recurrent_requantizers": (Requantizer(multiplier=50000, shift=3, bits=16),)}
    one = IntegerLSTM(input=train, input_requantizers=(None,) * 4 + (last,), **shared)
    two = IntegerLSTM(input=train.to_dense(), input_requantizers=(last,), **shared)
    x = x_int(rng)
    for got, want in zip(one.run(x), two.run(x)):
        assert np.array_equal(got, want)
    assert np.unique(got).size > 20


def test_extremes_saturate():
    """All forget gates open and every input the largest: the cell ends at its limit, h at 127."""
    open_ = Requantizer(multiplier=65535, shift=0, bits=16)
    bias = np.repeat([32767, 32767, 32767, 32767], 2)
    layer = IntegerLSTM(input=np.full((8, 3), 127, np.int8), recurrent=np.full((8, 2), 127, np.int8), bias=bias,
                        input_requantizers=(open_,), recurrent_requantizers=(open_,))
    steps = layer.run(np.full((1, 40, 3), 127, np.int8))
    assert (steps.sums == 32767).all() and (steps.cell[0, -1] == 32767).all() and (steps.hidden[0, -1] == 127).all()
    steps = layer.run(np.full((1, 40, 3), -128, np.int8), hidden=np.full((1, 2), -128, np.int8),
                      cell=np.full((1, 2), -32768, np.int16))
    assert (steps.sums[0, 0] == -32768).all() and (steps.cell[0, 0] == 0).all(), "the forget gate is shut"


def test_a_silent_row_is_quantised(rng):
    w = rng.normal(size=(8, 3))
    w[2] = 0
    layer = quantize_lstm(LSTM(input=w, recurrent=np.zeros((8, 2))), rng.integers(-128, 128, (1, 3, 3)), scale=0.01)
    assert not layer.input[2].any() and layer.recurrent_requantizers[0].bits == 16


def test_refusals(rng):
    layer = make(rng)
    cases = [
        (lambda: LSTM(input=np.ones((8, 3)), recurrent=np.ones((8, 3))), ValueError, r"recurrent must be \[4 H, H\]"),
        (lambda: LSTM(input=np.ones((4, 3)), recurrent=np.ones((8, 2))), ValueError, "input must have 8 rows, not 4"),
        (lambda: LSTM(input=np.ones((8, 3)), recurrent=np.ones((8, 2)), bias=np.ones(4)), ValueError,
         r"bias must be \[8\]"),
        (lambda: layer.forward(np.ones((2, 3, 5))), ValueError, r"x must be \[N, T, 24\]"),
        (lambda: layer.forward(np.ones((2, 3, 24)), cell=np.ones((2, 5))), ValueError, r"cell must be \[2, 6\]"),
        (lambda: quantize_lstm(layer, np.ones((1, 2, 24)), scale=1), TypeError, "x must be an integer array"),
        (lambda: quantize_lstm(LSTM(input=layer.input, recurrent=layer.recurrent, bias=np.full(24, 17.0)),
                               np.ones((1, 2, 24), np.int8), scale=0.1), ValueError, "bias must fit 16 bits"),
        (lambda: quantize_lstm(layer, np.ones((1, 0, 24), np.int8), scale=1), ValueError, "at least one step")]
    integer = quantize_lstm(layer, x_int(rng), scale=0.02)
    fields = {k: getattr(integer, k) for k in integer.__dataclass_fields__}
    cases += [
        (lambda: IntegerLSTM(**fields | {"input_requantizers": ()}), ValueError, "input_requantizers must be 1, not 0"),
        (lambda: IntegerLSTM(**fields | {"recurrent_requantizers": (None,)}), InputError, "must end with 16 bits"),
        (lambda: IntegerLSTM(**fields | {"input": layer.input}), TypeError, "input must be an integer array"),
        (lambda: integer.run(np.ones((1, 2, 24))), TypeError, "x must be an integer array"),
        (lambda: integer.run(x_int(rng), hidden=np.ones((4, 6))), TypeError, "hidden must be an integer array")]
    for call, kind, text in cases:
        with pytest.raises(kind, match=text):
            call()


def test_train_quantises_on_its_own(rng):
    w = rng.normal(size=(24, 24))
    layer, x = tt_linear(w, OUT, IN, RANKS), rng.integers(-128, 128, (50, 24)).astype(np.int8)
    integer, requantizers = quantize_tt_linear(layer, x, scale=0.03, zero_point=-128, output_scale=0.2, output_bits=8)
    got = integer.run(x, requantizers, -128)[-1].output
    want = layer.forward((x.astype(np.int64) + 128) * 0.03)
    inside = np.abs(want) < 0.2 * 126
    assert got.dtype == np.int8 and inside.mean() > 0.5
    spread = np.linalg.norm((got * 0.2 - want)[inside]) / np.linalg.norm(want[inside])
    assert spread < 0.03
