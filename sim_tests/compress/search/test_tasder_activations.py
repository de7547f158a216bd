"""TASDER-A: the rule, calibration, series of activations in integers and floats, the search, the table."""
import numpy as np
import pytest

from compress import engine, methods, onnx_import
from compress import graph as graphs
from compress.quantize import Calibration, Quantizer
from compress.search import tasder_activations as tasder
from golden.structured import tasd_series
from sim_tests.compress.onnx_models import Builder
from spec import config as configs
from spec.errors import InputError

NM256, TINY = configs.load("nm256"), configs.load("tiny")
EIGHTHS = [methods.parse(f"nm:{n}:8") for n in range(1, 8)]


def make_quantizer():
    """Input 16 channels | relu conv | linear conv | relu conv with residual of its own input | max pool | groups."""
    rng = np.random.default_rng(0)
    b = Builder((16, 6, 6))
    x = b.node("Relu", b.conv(rng, "x", 16, 16, pads=[1] * 4))
    x = b.conv(rng, x, 16, 32, pads=[1] * 4)
    y = b.node("Relu", b.conv(rng, x, 32, 32, 1))
    x = b.node("Relu", b.node("Add", b.conv(rng, y, 32, 32, pads=[1] * 4), y))
    x = b.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = b.conv(rng, x, 32, 32, groups=8)
    graph = onnx_import.parse(b.model(b.conv(rng, x, 32, 10, 1)).SerializeToString())
    x = rng.normal(0, 1, (9, *graph.shapes[graph.input])).astype(np.float32)
    return Quantizer(graph, Calibration(x=x, source="test"))


QUANTIZER = make_quantizer()
GRAPH, DENSE = QUANTIZER.graph, QUANTIZER.network("dense")
NAMES = [n.name for n in GRAPH.convolutions]
X = QUANTIZER.calibration.x


@pytest.mark.parametrize("sparsity,alpha,kept", [
    (0.52, 0, 4), (0.52, 0.15, 3), (0.5, 0, 5), (0.35, 0.15, 5), (0.4, 0.1, 5), (0.51, 0, 4), (0.0, 0.0, None),
    (0.05, -0.1, None), (0.12, 0.0, None), (0.13, 0.0, 7), (0.99, 0.3, 1), (0.125, 0.0, None)])
def test_rule(sparsity, alpha, kept):
    """The first three are the reference's examples; S + alpha equal to H_j does not reach H_j, whatever the rounding of
    0.35 + 0.15 and 0.4 + 0.1."""
    chosen = tasder.rule(sparsity, alpha, EIGHTHS)
    assert (chosen and str(chosen)) == (kept and f"nm:{kept}:8")


def test_rule_never_gets_denser_with_alpha():
    for sparsity in np.linspace(0, 1, 41):
        densities = [m.density if (m := tasder.rule(float(sparsity), a, EIGHTHS)) else 1 for a in tasder.ALPHAS]
        assert densities == sorted(densities, reverse=True)


def test_alphas_are_a_grid_of_hundredths():
    assert tasder.ALPHAS[0] == -0.1 and tasder.ALPHAS[-1] == 0.3 and len(tasder.ALPHAS) == 41
    assert np.allclose(np.diff(tasder.ALPHAS), 0.01)


def test_rectified_tensors():
    made = {n.name: tasder.rectified(GRAPH, n.input) for n in GRAPH.convolutions}
    assert list(made.values()) == [False, True, False, True, True, False]


def test_calibration_by_loops():
    got = tasder.calibrate(GRAPH, DENSE, X, batch=4)
    values = engine.run(DENSE, engine.quantize_input(DENSE, X), keep=True)
    assert set(got) == {n.input for n in GRAPH.convolutions}
    for name, s in got.items():
        real = values[name].astype(int) - DENSE.tensors[name].zero_point
        each = []
        for image in real.reshape(len(X), -1):
            if s.pseudo:
                order = sorted((abs(int(v)) for v in image), reverse=True)
                total, taken = 0, 0
                while total < 0.99 * sum(order):
                    total, taken = total + order[taken], taken + 1
                each.append(1 - taken / len(order))
            else:
                each.append(sum(int(v) == 0 for v in image) / len(image))
        assert abs(s.mean - sum(each) / len(each)) < 1e-12 and s.least == min(each)
        assert s.least <= s.percentile_1 <= s.mean and abs(s.percentile_1 - np.percentile(each, 1)) < 1e-12
    assert [got[n.input].pseudo for n in GRAPH.convolutions] == [True, False, True, False, False, True]


def test_integer_series_keep_the_largest_distances_from_the_zero_point():
    """Blocks of 4, 1 and 2 kept: q = -128 lies 128 away at zero point 0, 0 away at -128, 255 away at 127."""
    layer = type("Layer", (), {"name": "l", "input": "t"})
    x = np.array([[[[-128, 127, -1, 5]]]], np.int8)
    for zero_point, one, two in ((0, [-128, 0, 0, 0], [-128, 127, 0, 0]),
                                 (-128, [-128, 127, -128, -128], [-128, 127, -128, 5]),
                                 (127, [-128, 127, 127, 127], [-128, 127, -1, 127]),
                                 (20, [-128, 20, 20, 20], [-128, 127, 20, 20])):
        network = type("Net", (), {"tensors": {"t": type("T", (), {"zero_point": zero_point})}})
        for count, want in ((1, one), (2, two)):
            read = tasder.integer_reader(network, {"l": methods.parse(f"nm:{count}:4")})
            got = read(layer, x)
            assert got.dtype == np.int8 and got.ravel().tolist() == want
        other = type("Layer", (), {"name": "m", "input": "t"})
        assert read(other, x) is x


@pytest.mark.parametrize("method", ["nm:4:8", "tasd:4:8+1:8", "tasd:2:4+1:8"])
def test_networks_with_series_by_hand(method):
    """Every layer again with the series of its input taken here; the residual operand stays whole."""
    chosen = {name: methods.parse(method) for name in (NAMES[1], NAMES[3])}
    x = engine.quantize_input(DENSE, X)
    values = engine.run(DENSE, x, keep=True, read=tasder.integer_reader(DENSE, chosen))
    plain = engine.run(DENSE, x, keep=True)
    residuals = 0
    for layer in DENSE.layers:
        source = dict(values)
        if layer.name in chosen:
            zero_point = DENSE.tensors[layer.input].zero_point
            terms, _ = tasd_series(values[layer.input].astype(np.int64) - zero_point, chosen[layer.name].patterns)
            source[layer.input] = (sum(terms) + zero_point).astype(np.int8)
            residuals += layer.residual == layer.input
            other = engine.run_layer(layer, DENSE, source)
            assert np.array_equal(other, values[layer.output]) == (layer.residual != layer.input)
            source[layer.input] = values[layer.input]
            read = tasder.integer_reader(DENSE, chosen)
            assert np.array_equal(engine.run_layer(layer, DENSE, source, read=read), values[layer.output])
        else:
            assert np.array_equal(engine.run_layer(layer, DENSE, source), values[layer.output])
    assert residuals == 1 and not np.array_equal(values[DENSE.output], plain[DENSE.output])
    full = engine.run(DENSE, x, read=tasder.integer_reader(DENSE, dict.fromkeys(NAMES, methods.parse("nm:8:8"))))
    assert np.array_equal(full, plain[DENSE.output])


def test_float_series():
    chosen = {NAMES[1]: methods.parse("tasd:4:8+1:8")}
    values = graphs.forward(GRAPH, X, keep=True, read=tasder.float_reader(chosen))
    node = GRAPH.convolutions[1]
    terms, _ = tasd_series(values[node.input], [(4, 8), (1, 8)])
    want = graphs.convolve(sum(terms), node.weights, pads=node.pads) + node.bias
    np.testing.assert_array_equal(values[node.output], want)
    assert not np.array_equal(graphs.forward(GRAPH, X), values[GRAPH.output])


def test_candidates_lower_the_cycles_and_do_not_cut_blocks():
    allowed = tasder.layer_candidates(GRAPH, NM256)
    assert list(allowed) == NAMES and not allowed[NAMES[4]], "4 channels per group, fewer than M"
    assert [str(m) for m in allowed[NAMES[1]]][:2] == ["nm:1:8", "nm:2:8"]
    tiny = tasder.layer_candidates(GRAPH, TINY)
    assert tiny[NAMES[4]], "4 channels per group are whole blocks of 4"


def loss(chosen):
    """A stand-in for accuracy: falls with the share of elements that the series leave out."""
    return 1 - sum(1 - m.density for m in chosen.values()) / len(NAMES)


@pytest.mark.parametrize("goal", [1.0, 0.9, 0.75, 0.6, 0.3])
def test_search_takes_the_largest_alpha_that_passes(goal):
    told = []
    result = tasder.search(QUANTIZER, NM256, loss, reference=1.0, goal=goal, progress=lambda *a: told.append(a))
    sparsity = tasder.calibrate(GRAPH, DENSE, X)
    allowed = tasder.layer_candidates(GRAPH, NM256)
    best = None
    for alpha in tasder.ALPHAS:
        chosen = {n.name: tasder.rule(sparsity[n.input].mean, alpha, allowed[n.name]) for n in GRAPH.convolutions}
        chosen = {name: m for name, m in chosen.items() if m}
        if loss(chosen) >= goal:
            best = alpha, chosen
    assert (result.alpha, result.chosen) == (best or (None, {}))
    assert result.accuracy == loss(result.chosen) >= goal and {step for step, _ in told} == {"sparsity", "search"}
    assert result.facts["alpha"] == result.alpha and result.facts["totals"]["macs_saved"] >= 0
    assert [r["layer"] for r in result.facts["table"]] == NAMES
    assert result.facts["sparsity"][NAMES[1]]["pseudo"] is False


def test_rows_by_loops():
    chosen = {NAMES[1]: methods.parse("tasd:4:8+1:8"), NAMES[5]: methods.parse("nm:2:8")}
    values = engine.run(DENSE, engine.quantize_input(DENSE, X), keep=True)
    for row, node in zip(tasder.rows(QUANTIZER, DENSE, NM256, chosen), GRAPH.convolutions):
        assert row.layer == node.name and row.method == str(chosen.get(node.name, "dense"))
        if node.name not in chosen:
            assert row.dropped_nonzeros == row.dropped_magnitude == row.output_error == 0
            assert row.macs == row.macs_executed and row.cycles_padded == row.cycles_dense
            continue
        real = values[node.input].astype(np.int64) - DENSE.tensors[node.input].zero_point
        _, residual = tasd_series(real, chosen[node.name].patterns)
        assert row.dropped_nonzeros == np.count_nonzero(residual) / np.count_nonzero(real)
        assert row.dropped_magnitude == np.abs(residual).sum() / np.abs(real).sum() < row.dropped_nonzeros
        values_, scale = QUANTIZER.weights[node.name]
        weights = values_ * scale[:, None, None, None]
        whole, lost = (np.linalg.norm(graphs.convolve(v.astype(np.float32), weights, pads=node.pads))
                       for v in (real, residual))
        assert row.output_error == pytest.approx(lost / whole, rel=1e-6)
        assert row.macs_executed == row.macs * row.density and row.cycles_padded < row.cycles_dense


@pytest.mark.parametrize("options,text", [
    ({"goal": 0}, "goal must be above 0 and at most 1"),
    ({"reference": 2.0}, "goal must be reachable: the dense int8 network has 1.0000, needed are 1.9800")])
def test_refusals(options, text):
    with pytest.raises(InputError) as caught:
        tasder.search(QUANTIZER, NM256, loss, **({"reference": 1.0} | options))
    assert text in str(caught.value)
