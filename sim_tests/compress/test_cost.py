"""Padded cycle counts: hand-counted cases, and the paper's layers."""
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compress import cost, flow, onnx_import
from compress.graph import Conv
from lowering.lower import lower
from spec import config as configs
from spec.config import Pattern
from spec.derive import Sizes
from spec.errors import InputError

NM256, TINY = configs.load("nm256"), configs.load("tiny")


def conv(outputs, kernel, depth, groups=1):
    weights = np.broadcast_to(np.float32(0), (outputs, *kernel, depth))
    return Conv(name="n", input="a", output="b", weights=weights, bias=np.zeros(1), groups=groups)


@pytest.mark.parametrize("patterns,fetches", [((), 4), (("8:8",), 4), (("4:8",), 2), (("2:8",), 1), (("1:8",), 1),
                                              (("4:8", "1:8"), 3), (("2:4",), 2), (("5:8",), 3), (("7:8",), 4)])
def test_pointwise_layer_of_64_channels(patterns, fetches):
    """64 channels are 8 blocks; a fetch of 16 slots covers 2 (dense), 4 (4:8), 8 (2:8) or 16 (1:8) of them."""
    patterns = [Pattern.parse(p) for p in patterns]
    assert cost.layer_cycles(conv(16, (1, 1), 64), (5, 7, 16), patterns, NM256) == 35 * fetches


def test_outputs_pad_to_columns_and_channels_to_blocks():
    assert cost.layer_cycles(conv(17, (1, 1), 16), (1, 1, 17), (), NM256) == 2
    assert cost.layer_cycles(conv(16, (1, 1), 17), (1, 1, 16), (), NM256) == 2
    assert cost.layer_cycles(conv(16, (1, 1), 1, groups=16), (2, 2, 16), (), NM256) == 16 * 4


def test_narrow_layers_share_a_fetch_between_taps():
    """8 channels are one block: a 2:8 fetch of 8 blocks takes 4 taps (the configuration's limit), 9 taps take 3."""
    assert cost.layer_cycles(conv(16, (3, 3), 8), (1, 1, 16), [Pattern(2, 8)], NM256) == 3
    assert cost.layer_cycles(conv(16, (3, 3), 8), (1, 1, 16), (), NM256) == 5
    assert cost.layer_cycles(conv(4, (3, 3), 4), (1, 1, 4), (), TINY) == 9


def test_narrow_stream_port_slows_sparse_patterns():
    narrow = replace(NM256, structured=replace(NM256.structured, stream_blocks=4))
    layer = conv(16, (1, 1), 128)
    cycles = [cost.layer_cycles(layer, (1, 1, 16), [Pattern(n, 8)], narrow) for n in (1, 2, 4, 8)]
    assert cycles == [4, 4, 4, 8]


def test_resnet_layer_of_the_paper():
    """Section 7.4's orientation of weights: M = 512 filters in 32 groups of 16 columns, K = 4608, 49 pixels."""
    assert cost.layer_cycles(conv(512, (3, 3), 512), (7, 7, 512), (), NM256) == 32 * 49 * 288


@pytest.mark.parametrize("n,supported,expected", [(7, [1, 2, 4, 8], (4, 2, 1)), (5, [1, 2, 4], (4, 1)),
                                                  (3, [1], (1,) * 3), (3, [2, 4], None), (6, [2, 4], (4, 2)),
                                                  (8, [1, 8], (8,))])
def test_parts(n, supported, expected):
    assert cost.parts(n, supported) == expected


def test_series_never_costs_less_than_one_of_its_terms():
    layer, sizes = conv(32, (3, 3), 24), Sizes(NM256)
    for n in range(1, 9):
        single = [cost.fetches(sizes, p, 9, 24) for p in cost.parts(n, [1, 2, 4, 8])]
        total = cost.layer_cycles(layer, (1, 1, 32), [Pattern(n, 8)], NM256)
        assert total == 2 * sum(single)


def test_refusals():
    with pytest.raises(InputError, match=r"must have M that divides the block \(8\)"):
        cost.layer_cycles(conv(16, (1, 1), 64), (1, 1, 16), [Pattern(2, 16)], NM256)
    coarse = replace(NM256, structured=replace(NM256.structured, patterns=(Pattern(4, 8), Pattern(8, 8))))
    with pytest.raises(InputError, match="must be a sum of 4:8, 8:8, not '2:8'"):
        cost.layer_cycles(conv(16, (1, 1), 64), (1, 1, 16), [Pattern(2, 8)], coarse)
    with pytest.raises(TypeError, match="config must be a Config"):
        cost.layer_cycles(conv(16, (1, 1), 64), (1, 1, 16), (), "nm256")


@pytest.mark.parametrize("method", ["dense", "nm:2:4", "nm:2:8", "tasd:4:8+1:8"])
def test_counts_equal_the_steps_of_lowered_programs(method):
    """Where no block is empty and no bank conflicts, lowering needs exactly these steps per pixel and column group."""
    model = Path(__file__).resolve().parents[2] / "models" / "digits.onnx"
    network = flow.compress_model(model, method, calibration="demo:calibration")
    steps = {info.name: info.steps for info in lower(network, NM256).layers}
    layers = {v.name: v for v in network.layers}
    for node in onnx_import.load(model).convolutions:
        series = [t.pattern for t in layers[node.name].terms if not t.dense]
        groups = -(-layers[node.name].outputs // NM256.structured.columns)
        assert cost.layer_cycles(node, (1, 1, 1), series, NM256) == groups * steps[node.name], node.name
