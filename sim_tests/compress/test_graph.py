"""The float forward pass against plain loops, and its refusals."""
import numpy as np
import pytest

from compress import graph as graphs
from spec.errors import InputError


@pytest.mark.parametrize("seed", range(12))
def test_convolution_equals_the_sum(seed):
    rng = np.random.default_rng([9, seed])
    groups = int(rng.choice([1, 2, 4]))
    depth, per = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    n, h, w, r, s = 2, 6, 7, int(rng.integers(1, 4)), int(rng.integers(1, 4))
    x, k = rng.normal(0, 1, (n, h, w, groups * depth)), rng.normal(0, 1, (groups * per, r, s, depth))
    stride, dilation = tuple(rng.integers(1, 3, 2).tolist()), tuple(rng.integers(1, 3, 2).tolist())
    pads = tuple(rng.integers(0, 2, 4).tolist())
    got = graphs.convolve(x.astype(np.float32), k.astype(np.float32), stride=stride, pads=pads, dilation=dilation,
                          groups=groups)
    padded = np.pad(x, ((0, 0), pads[::2], pads[1::2], (0, 0)))
    ho = graphs.output_size(h, r, stride[0], pads[0], pads[2], dilation[0])
    wo = graphs.output_size(w, s, stride[1], pads[1], pads[3], dilation[1])
    assert got.shape == (n, ho, wo, groups * per)
    for y in range(ho):
        for z in range(wo):
            for out in range(groups * per):
                g = out // per
                window = padded[:, y * stride[0]:y * stride[0] + dilation[0] * r:dilation[0],
                                z * stride[1]:z * stride[1] + dilation[1] * s:dilation[1], g * depth:(g + 1) * depth]
                expected = (window[:, :r, :s] * k[out]).sum(axis=(1, 2, 3))
                np.testing.assert_allclose(got[:, y, z, out], expected, rtol=1e-4, atol=1e-4)


def test_batches_do_not_change_the_result(monkeypatch):
    rng = np.random.default_rng(1)
    x, k = rng.normal(0, 1, (9, 5, 5, 3)).astype(np.float32), rng.normal(0, 1, (4, 3, 3, 3)).astype(np.float32)
    whole = graphs.convolve(x, k)
    monkeypatch.setattr(graphs, "_PATCH_ELEMENTS", 1)
    np.testing.assert_allclose(graphs.convolve(x, k), whole, rtol=1e-5, atol=1e-5)


def make_graph():
    nodes = (graphs.Pool(name="p", input="x", output="y", kind="max", window=(2, 2), stride=(2, 2), low=0.0),
             graphs.Add(name="a", input="y", residual="y", output="z", high=1.5))
    return graphs.Graph(name="g", input="x", output="z", nodes=nodes,
                        shapes={"x": (4, 4, 2), "y": (2, 2, 2), "z": (2, 2, 2)})


def test_keep_returns_every_tensor():
    graph = make_graph()
    x = np.random.default_rng(2).normal(0, 1, (3, 4, 4, 2)).astype(np.float32)
    values = graphs.forward(graph, x, keep=True)
    assert set(values) == {"x", "y", "z"}
    pooled = np.maximum(x.reshape(3, 2, 2, 2, 2, 2).max(axis=(2, 4)), 0)
    assert np.array_equal(values["y"], pooled) and np.array_equal(values["z"], np.minimum(2 * pooled, 1.5))
    assert np.array_equal(graphs.forward(graph, x), values["z"])
    assert graph.producer("y").name == "p" and graph.producer("x") is None
    assert [n.name for n in graph.consumers("y")] == ["a"]


def test_layouts():
    x = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert np.array_equal(graphs.to_nchw(graphs.to_nhwc(x, (4, 5, 3))), x)
    assert graphs.to_nhwc(np.zeros((2, 7)), (1, 1, 7)).shape == (2, 1, 1, 7)
    logits = np.zeros((2, 1, 1, 3))
    logits[0, 0, 0, 2] = logits[1, 0, 0, 1] = 1
    assert graphs.top1(logits).tolist() == [2, 1] and graphs.top1(logits[:, 0, 0]).tolist() == [2, 1]


def test_refusals():
    with pytest.raises(InputError, match=r"input must be \[N, 4, 4, 2\], not \(1, 2, 4, 4\)"):
        graphs.forward(make_graph(), np.zeros((1, 2, 4, 4)))
    with pytest.raises(InputError, match=r"input data must be \[N, 2, 4, 4\] like the network's input"):
        graphs.to_nhwc(np.zeros((1, 4, 4, 2)), (4, 4, 2))
