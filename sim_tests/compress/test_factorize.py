"""Low-rank chains: the rewritten graph, its ranks, and what is refused."""

import numpy as np
import pytest

from compress import demo, engine, factorize, flow, onnx_import, package
from compress import graph as graphs
from golden import tensor_train, tucker
from golden.machine import Machine
from lowering.lower import lower
from spec.config import load
from spec.errors import InputError


def network(weights, rng, *, stride=(1, 1), pads=(0, 0, 0, 0), dilation=(1, 1), size=(9, 8), groups=1):
    """One convolution with residual-free clamp."""
    channels = weights.shape[3] * groups
    node = graphs.Conv(
        name="conv",
        input="x",
        output="y",
        low=0.0,
        high=6.0,
        weights=weights.astype(np.float32),
        bias=rng.normal(size=len(weights)).astype(np.float32),
        stride=stride,
        pads=pads,
        dilation=dilation,
        groups=groups,
    )
    shape = (*size, channels)
    return graphs.Graph(
        name="one", input="x", output="y", nodes=(node,), shapes={"x": shape, "y": graphs.node_shape(node, shape)}
    )


def low_rank(rng, outputs, taps, inputs, r_out, r_in):
    """A kernel [O, R, S, I] of exactly these multilinear ranks."""
    return np.einsum(
        "oa,arsb,bi->orsi",
        rng.normal(size=(outputs, r_out)),
        rng.normal(size=(r_out, *taps, r_in)),
        rng.normal(size=(r_in, inputs)),
    )


@pytest.mark.parametrize("kind", ["tucker", "tt"])
@pytest.mark.parametrize(
    "geometry",
    [{"pads": (1, 1, 1, 1)}, {"stride": (2, 1), "pads": (0, 1, 2, 1)}, {"dilation": (2, 2), "pads": (2, 2, 2, 2)}],
)
def test_low_rank_layer_is_kept_exactly(rng, kind, geometry):
    """Ranks 8 fit in half the parameters, so the chain is the same function (up to float32)."""
    graph = network(low_rank(rng, 32, (3, 3), 40, 8, 8), rng, **geometry)
    x = rng.normal(size=(3, 9, 8, 40)).astype(np.float32)
    chained, facts = factorize.factorize(graph, factorize.parse(f"{kind}:2"), x)
    assert [n.name for n in chained.nodes] == ["conv.1", "conv.2", "conv.3"]
    ranks = facts["layers"]["conv"]["ranks"]
    assert min(ranks) >= 8 and all(r % 8 == 0 for r in ranks)
    assert facts["layers"]["conv"]["relative_error"] < 1e-6
    want, got = graphs.forward(graph, x), graphs.forward(chained, x)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    stages = chained.nodes
    assert [n.low for n in stages] == [None, None, 0.0] and [n.high for n in stages] == [None, None, 6.0]
    assert stages[1].stride == geometry.get("stride", (1, 1)) and stages[1].pads == geometry["pads"]


def test_matrix_takes_stride_in_its_first_stage(rng):
    graph = network((rng.normal(size=(48, 8)) @ rng.normal(size=(8, 64)))[:, None, None, :], rng, stride=(2, 2))
    x = rng.normal(size=(2, 9, 8, 64)).astype(np.float32)
    chained, _ = factorize.factorize(graph, factorize.parse("svd:2"), x)
    assert [n.stride for n in chained.nodes] == [(2, 2), (1, 1)]
    np.testing.assert_allclose(graphs.forward(chained, x), graphs.forward(graph, x), atol=1e-3)


@pytest.mark.parametrize("outputs, taps, inputs", [(64, 9, 64), (128, 9, 64), (512, 9, 512), (64, 25, 48)])
@pytest.mark.parametrize("factor", [1.5, 2, 3, 5.5])
def test_ranks_keep_the_promise_and_no_larger_ones_would(outputs, taps, inputs, factor):
    def parameters(a, b):
        return inputs * b + taps * a * b + a * outputs

    r_out, r_in = factorize.kernel_ranks(outputs, taps, inputs, factor)
    assert parameters(r_out, r_in) * factor <= outputs * taps * inputs
    assert parameters(r_out + 8, r_in + 8) * factor > outputs * taps * inputs or min(r_out, r_in) == 0
    rank = factorize.matrix_rank(outputs, inputs, factor)
    assert rank * (outputs + inputs) * factor <= outputs * inputs < (rank + 8) * (outputs + inputs) * factor


def test_stages_are_the_golden_chains(rng):
    """Up to the powers of two of the intermediates' scaling: the rebuilt kernel is golden's."""
    w = rng.normal(size=(32, 3, 3, 32))
    graph = network(w, rng, pads=(1, 1, 1, 1))
    x = rng.normal(size=(2, 9, 8, 32)).astype(np.float32)
    for kind, golden in (
        ("tucker", lambda r: tucker.tucker2(w.astype(np.float32), r, sweeps=2)),
        ("tt", lambda r: tensor_train.tt_convolution(w.astype(np.float32), (1, *r, 1)).chain()),
    ):
        chained, facts = factorize.factorize(graph, factorize.parse(f"{kind}:2"), x)
        r_in, r_out = facts["layers"]["conv"]["ranks"]
        a, core, b = (n.weights.astype(np.float64) for n in reversed(chained.nodes))
        got = np.einsum("oa,arsb,bi->orsi", a[:, 0, 0], core, b[:, 0, 0])
        np.testing.assert_allclose(got, golden((r_out, r_in)).to_dense(), atol=1e-5)


@pytest.mark.parametrize(
    "weights, groups, reason",
    [((8, 3, 3, 1), 8, "grouped"), ((12, 3, 3, 16), 1, "too small"), ((10, 1, 1, 64), 1, "too small")],
)
def test_layers_that_stay_whole_say_why(rng, weights, groups, reason):
    graph = network(rng.normal(size=weights), rng, groups=groups)
    x = rng.normal(size=(1, 9, 8, weights[3] * groups)).astype(np.float32)
    chained, facts = factorize.factorize(graph, factorize.parse("tucker:3"), x)
    assert facts["layers"]["conv"] == {"kept": reason} and chained.nodes == graph.nodes


def test_svd_leaves_kernels_whole(rng):
    graph = network(rng.normal(size=(32, 3, 3, 32)), rng)
    _, facts = factorize.factorize(graph, factorize.parse("svd:2"), np.zeros((1, 9, 8, 32), np.float32))
    assert facts["layers"]["conv"]["kept"] == "svd is for 1x1 and fully connected layers"


@pytest.mark.parametrize(
    "text", ["svd", "svd:", "tt:1", "tucker:0", "tucker:-2", "tt:x", "tt:nan", "svd:inf", "svd:1e9"]
)
def test_bad_factor_is_refused(text):
    with pytest.raises(InputError, match="must be followed by a parameter reduction factor above 1, at most 1000"):
        factorize.parse(text)


@pytest.mark.parametrize("method", ["tucker:1.5", "tt:1.5"])
def test_demo_network_end_to_end(method, tmp_path):
    """Package round trip, and the lowered program computes what the golden engine computes, in every tensor."""
    net = flow.compress_model("models/digits.onnx", method, calibration="demo:calibration")
    assert [x.format for x in net.layers if x.name.startswith("block_a")] == [method] * 3
    package.save(net, tmp_path / "d.summand")
    net = package.load(tmp_path / "d.summand")
    x = graphs.to_nhwc(demo.digits("heldout")[0][:100], (8, 8, 1)).astype(np.float32)
    samples = graphs.to_nhwc(demo.digits("calibration")[0], (8, 8, 1)).astype(np.float32)
    chained, _ = factorize.factorize(onnx_import.load("models/digits.onnx"), factorize.parse(method), samples)
    # how accurate an untrained chain is, is the method's affair; quantisation must keep its answers
    assert engine.accuracy(net, x, graphs.top1(graphs.forward(chained, x))) >= 0.85
    first = engine.quantize_input(net, x[:1])
    want = engine.run(net, first, keep=True)
    low = lower(net, load("nm64"))
    memory = low.new_memory()
    low.write_tensor(memory, net.input, first)
    machine = Machine(load("nm64"), memory)
    machine.run(low.program_offset, low.instruction_count)
    for name in low.outputs:
        np.testing.assert_array_equal(low.read_tensor(machine.memory, name), want[name], err_msg=name)
