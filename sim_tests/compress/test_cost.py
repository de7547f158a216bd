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


# -- basis engine ------------------------------------------------------------------------------------------------------
def ones(outputs, channels, count, per_group=1, group=16):
    """Coefficients with so many non-zeros in each channel group."""
    ce = np.zeros((outputs, channels, count), np.int8)
    for at in range(0, channels, group):
        ce[:, at:at + per_group] = 1
    return ce


def same(outputs, depth, kernel=(3, 3), **geometry):
    return replace(conv(outputs, kernel, depth), **({"pads": (1, 1, 1, 1)} | geometry))


def test_basis_passes_of_one_strip():
    """8 x 8 pixels: 22 of 24 pairs of output and kernel row are valid, 8 columns each; 4 groups at 4:16 are 1 word."""
    config = configs.load("basis288")

    def cycles(outputs, depth, count, per_group):
        shapes = (8, 8, depth), (8, 8, outputs)
        return cost.basis_cycles(same(outputs, depth), *shapes, ones(outputs, depth, count, per_group), config)

    assert cycles(16, 64, 6, 4) == 176
    assert cycles(17, 64, 6, 4) == 2 * 176 and cycles(16, 64, 7, 4) == 2 * 176
    assert cycles(16, 64, 6, 16) == 4 * 64, "16:16 takes one word per group: the coefficient stage is slower"
    assert cycles(16, 512, 6, 2) == 4 * 64 and cycles(16, 512, 6, 3) == 6 * 64, "3 = 2 + 1: 4 + 2 words"


def test_basis_strips_see_rows_twice():
    """16 x 64 pixels, 128 per bank: 8 strips of 2 rows see 4 input rows each, the first and last 3."""
    config = configs.load("basis288")
    cycles = cost.basis_cycles(same(16, 64), (16, 64, 64), (16, 64, 16), ones(16, 64, 6, 16), config)
    assert cycles == 4 * 64 * (6 * 4 + 2 * 3)
    wide = cost.basis_cycles(same(16, 16, (1, 3), pads=(0, 1, 0, 1)), (1, 200, 16), (1, 200, 16), ones(16, 16, 6, 16),
                             config)
    assert wide == max(128, 129) + max(72, 73), "parts of one row overlap by the kernel's reach"


def test_basis_strides_dilation_and_wide_kernels():
    config = configs.load("basis288")
    strided = cost.basis_cycles(same(16, 16, stride=(2, 2)), (8, 8, 16), (4, 4, 16), ones(16, 16, 6), config)
    assert strided == max(11 * 4, 8 * 8)
    five = cost.basis_cycles(same(16, 16, (5, 5), pads=(2, 2, 2, 2)), (8, 8, 16), (8, 8, 16), ones(16, 16, 6), config)
    assert five == 2 * (5 * 8 - 6) * 8, "5 taps of a row take 2 cycles of 3 multipliers"


def test_map_words_wait_for_the_slice_with_the_most():
    config = configs.load("maps288")                       # words of 8 groups, 16 lanes
    ce = np.zeros((16, 256, 6), np.int8)
    ce[3, :40, 2] = 1                                      # first word: 40 non-zeros in one slice, 3 cycles
    node, shapes = same(16, 256, (1, 1), pads=(0, 0, 0, 0)), ((4, 4, 256), (4, 4, 16))
    assert cost.basis_cycles(node, *shapes, ce, config) == 16 * (3 + 1)
    assert cost.basis_cycles(node, *shapes, ce, config, active=0.5) == 16 * (2 + 1)


def test_dense_layers_on_the_basis_engine():
    config = configs.load("basis288")
    pointwise = same(17, 40, (1, 1), pads=(0, 0, 0, 0))
    assert cost.basis_dense_cycles(pointwise, (4, 4, 40), (4, 4, 17), config) == 2 * 16 * 3
    assert cost.basis_dense_cycles(same(16, 3), (8, 8, 3), (8, 8, 16), config) == 176
    assert cost.basis_dense_cycles(same(16, 20), (8, 8, 20), (8, 8, 16), config) == (3 + 1) * 176
    assert cost.basis_dense_cycles(same(14, 14), (8, 8, 14), (8, 8, 14), configs.load("basis252")) == 3 * 176


def test_what_the_basis_engine_takes():
    config = configs.load("basis288")
    assert cost.basis_runs(same(16, 16), config) and cost.basis_runs(same(16, 16, (8, 7)), config)
    for geometry in ({"stride": (3, 1)}, {"dilation": (8, 1)}, {"dilation": (1, 4)}, {"pads": (16, 0, 0, 0)}):
        assert not cost.basis_runs(same(16, 16, **geometry), config)
    assert not cost.basis_runs(same(16, 16, (9, 1)), config) and not cost.basis_runs(same(16, 16, (1, 8)), config)


def test_costs_need_their_engine():
    with pytest.raises(InputError, match="basis must be there for a basis layer, not 'none'"):
        cost.basis_runs(same(16, 16), NM256)
    with pytest.raises(InputError, match="structured must be there for a structured layer, not 'none'"):
        cost.layer_cycles(conv(16, (1, 1), 64), (5, 7, 16), (), configs.load("basis288"))
    with pytest.raises(TypeError, match="config must be a Config"):
        cost.basis_runs(same(16, 16), "basis288")
