"""Rules of a network built in memory (those of files are in test_package)."""
from dataclasses import replace

import numpy as np
import pytest

from compress import validate
from compress.network import BasisConvolution, Convolution, Network, Requantization, Tensor, Term
from sim_tests.compress.networks import small_network
from spec.config import Pattern
from spec.errors import InputError

NETWORK = small_network()[0]


def with_layer(index, **changes):
    layers = list(NETWORK.layers)
    layers[index] = replace(layers[index], **changes)
    return replace(NETWORK, layers=tuple(layers))


def with_requantization(index, **changes):
    return with_layer(index, requantization=replace(NETWORK.layers[index].requantization, **changes))


def test_good_network_passes():
    validate.network(NETWORK)


@pytest.mark.parametrize("network,text", [
    (replace(NETWORK, name="a b"), "network.name must be a name of 1..64"),
    (replace(NETWORK, layers=()), "must have 1..65536 layers, not 0"),
    (replace(NETWORK, input="nowhere"), "network.input must be one of the tensors"),
    (with_layer(0, terms=()), "must have 1..8 terms"),
    (with_layer(1, output=NETWORK.layers[0].output), "must not be made twice"),
    (with_layer(1, name=NETWORK.layers[0].name), "must not be repeated"),
    (with_layer(0, stride=(0, 1)), "stride must be an integer in 1.."),
    (with_layer(0, pads=(1, 1, 1)), "pads must be 4 integers"),
    (with_layer(0, weight_scale=np.ones(3)), "weight_scale must be float64 of shape (8,)"),
    (with_layer(0, groups=3), "must divide 3 inputs"),
    (with_requantization(0, bias=np.zeros(8, np.int64)), "bias must be int32 of shape (8,)"),
    (with_requantization(0, shift=np.full(8, 40, np.uint8)), "shift must be in 0..31, not 40"),
    (with_requantization(0, low=4, high=-4), "low must be at most high (-4), not 4"),
    (with_requantization(0, zero_point=300), "zero_point must be an integer in -128..127, not 300"),
    (with_requantization(0, residual_zero_point=1), "must be 0 (it has no residual)"),
], ids=range(15))
def test_broken_network(network, text):
    with pytest.raises(InputError) as caught:
        validate.network(network)
    assert text in str(caught.value)


def test_sums_that_could_leave_the_accumulator():
    terms = tuple(Term(pattern=Pattern(1, 1), values=np.full((1, 1, 1, 1 << 15), 127, np.int8)) for _ in range(5))
    tensors = {"a": Tensor(name="a", height=1, width=1, channels=1 << 15, scale=1.0, zero_point=0),
               "b": Tensor(name="b", height=1, width=1, channels=1, scale=1.0, zero_point=0)}
    r = Requantization(bias=np.zeros(1, np.int32), multiplier=np.ones(1, np.uint16), shift=np.zeros(1, np.uint8),
                       zero_point=0)
    layer = Convolution(name="c", input="a", output="b", requantization=r, terms=terms[:4])
    network = Network(name="n", input="a", output="b", tensors=tensors, layers=(layer,))
    validate.network(network)
    with pytest.raises(InputError, match="must not be able to leave a 32-bit accumulator"):
        validate.network(replace(network, layers=(replace(layer, terms=terms),)))


BASIS = small_network("basis:4@2:16")[0]
AT = next(i for i, layer in enumerate(BASIS.layers) if isinstance(layer, BasisConvolution))


def with_basis(**changes):
    layers = list(BASIS.layers)
    layers[AT] = replace(layers[AT], **changes)
    return replace(BASIS, layers=tuple(layers))


@pytest.mark.parametrize("changes", [{"format": "basis"}, {"format": "basis:4"}, {"weight_scale": None},
                                     {"pattern": None, "format": "basis:4@0.25"}, {"intermediate_bits": 8},
                                     {"pattern": None, "format": "basis:4@1e-05"}, {"intermediate_bits": 32},
                                     {"pattern": Pattern(8, 8), "format": "basis:4@8:8"}])
def test_legal_basis_layer_passes(changes):
    validate.network(with_basis(**changes))


@pytest.mark.parametrize("changes,text", [
    ({"basis": np.zeros((4, 3, 3), np.int16)}, "basis must be int8"),
    ({"basis": np.zeros((3, 3, 3), np.int8)}, "coefficients must be 3 (the number of basis kernels)"),
    ({"basis": [1]}, "basis must be [M, kernel_h, kernel_w]"),
    ({"coefficients": np.zeros((8, 8, 4))}, "coefficients must be int8"),
    ({"coefficients": np.zeros((8, 9, 4), np.int8)}, "coefficients must be 8 (the input's channels)"),
    ({"coefficients": np.zeros((7, 8, 4), np.int8), "weight_scale": None}, "the shape that its input and window give"),
    ({"coefficients": np.full((8, 8, 4), 2, np.int8)}, "coefficients must be -1, 0 or 1"),
    ({"coefficients": np.full((8, 8, 4), -2, np.int8), "pattern": None, "format": "basis"}, "must be -1, 0 or 1"),
    ({"coefficients": np.ones((8, 8, 4), np.int8)}, "must have at most 2 non-zeros in each block of 16 channels"),
    ({"pattern": "2:16"}, "must be an N:M pattern"), ({"pattern": Pattern(9, 8), "format": "basis"}, "N:M pattern"),
    ({"pattern": Pattern(1.0, 8), "format": "basis"}, "N:M pattern"), ({"format": "basis:4@0.5"}, "name the pattern"),
    ({"pattern": None}, "must name the pattern"), ({"format": "basis:6"}, "must be 4 (the number of its basis"),
    ({"format": "nm:2:4"}, "must be basis, basis:M"), ({"format": None}, "must be basis, basis:M"),
    ({"intermediate_bits": 7}, "in 8..32"), ({"intermediate_bits": 33}, "in 8..32"),
    ({"intermediate_bits": 16.0}, "in 8..32"), ({"dilation": (0, 1)}, "dilation must be an integer in 1.."),
    ({"stride": (1,)}, "stride must be 2 integers"), ({"pads": None}, "pads must be 4 integers"),
    ({"weight_scale": np.zeros(8)}, "finite and above 0"), ({"weight_scale": np.ones(3)}, "float64 of shape (8,)"),
], ids=range(25))
def test_broken_basis_layer(changes, text):
    with pytest.raises(InputError) as caught:
        validate.network(with_basis(**changes))
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_basis_sums_that_could_leave_the_accumulator():
    """8 inputs x 255 per basis kernel, or 2**15 at 16 bits: only 32 bits with many inputs reach 2**31."""
    kernels, ones = np.full((49, 7, 7), 127, np.int8), np.ones((1, 1 << 12, 49), np.int8)
    tensors = {"a": Tensor(name="a", height=7, width=7, channels=1 << 12, scale=1.0, zero_point=-128),
               "b": Tensor(name="b", height=1, width=1, channels=1, scale=1.0, zero_point=0)}
    r = Requantization(bias=np.zeros(1, np.int32), multiplier=np.ones(1, np.uint16), shift=np.zeros(1, np.uint8),
                       zero_point=0)
    layer = BasisConvolution(name="c", input="a", output="b", requantization=r, basis=kernels[:10],
                             coefficients=ones[..., :10])
    network = Network(name="n", input="a", output="b", tensors=tensors, layers=(layer,))
    validate.network(network)
    for changes in ({"basis": kernels, "coefficients": ones}, {"intermediate_bits": 32}):
        with pytest.raises(InputError, match="must not be able to leave a 32-bit accumulator"):
            validate.network(replace(network, layers=(replace(layer, **changes),)))
