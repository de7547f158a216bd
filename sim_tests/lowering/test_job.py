"""What a layer becomes in the hardware's coordinates, and what is refused."""
from dataclasses import replace

import numpy as np
import pytest

from compress.network import Layer, Term
from lowering import lower
from lowering.job import pack_parameters, planes_of
from sim_tests.lowering.networks import add, convolution, network, pool, tensor
from sim_tests.lowering.test_steps import _job
from spec.config import Pattern, load
from spec.derive import Sizes
from spec.errors import InputError
from spec.formats import column_parameters

TINY = load("tiny")


def _lower(layer, out, *, size=(4, 4), channels=8, config=TINY):
    return lower(network(size, channels, [layer], [out]), config)


def test_grouped_convolution_reads_its_own_channels(rng):
    """24 inputs and outputs in 3 groups of 8, 4 columns: two column groups share two channel groups."""
    job, _ = _job(rng, TINY, channels=24, outputs=24, groups=3)
    assert job.starts == (0, 0, 2, 2, 4, 4) and job.span == 2
    assert job.bundles() == [(0, [0, 1]), (2, [2, 3]), (4, [4, 5])]


def test_expanded_weights_hold_every_element_once(rng):
    job, _ = _job(rng, TINY, channels=15, outputs=10, groups=5, kernel=(1, 2))
    weights = job.parts[0].weights
    total = 0
    for k in range(10):
        own = weights[k // 4, k % 4].reshape(2, -1)
        begin = k // 2 * 3 - job.starts[k // 4] * 4
        total += np.count_nonzero(own[:, begin:begin + 3])
    assert total == np.count_nonzero(weights) > 50 and weights.shape == (3, 4, 2, job.span, 4)


def test_parameters(rng):
    job, sizes = _job(rng, TINY, channels=4, outputs=6)
    blob = pack_parameters(job, sizes)
    step, r = sizes.parameter_beats * sizes.beat_bytes, job.requantization
    for k in range(8):
        at = k // 4 * step + k % 4 * 8
        entry = column_parameters().unpack(int.from_bytes(blob[at:at + 8].tobytes(), "little"))
        want = (r.bias[k], r.multiplier[k], r.shift[k]) if k < 6 else (0, 0, 0)
        assert (entry["bias"], entry["multiplier"], entry["shift"], entry["reserved"]) == (*want, 0)
    assert planes_of(6, Sizes(TINY)) == 2


def test_pattern_that_the_block_does_not_hold(rng):
    for pattern in ("2:3", "4:8"):
        made = convolution(rng, size=(4, 4), channels=8, outputs=4, patterns=[pattern])
        with pytest.raises(InputError, match=rf"layer conv must have a pattern whose M divides 4 \(block of "
                                             rf"configuration tiny\), not '{pattern}'"):
            _lower(*made)


def test_weights_beyond_their_pattern(rng):
    layer, out = convolution(rng, size=(4, 4), channels=8, outputs=4)
    layer.terms[0].values[...] = 1
    with pytest.raises(InputError, match=r"layer conv must fit its pattern 1:4, not '4 non-zeros in 4'"):
        _lower(replace(layer, terms=(Term(pattern=Pattern(1, 4), values=layer.terms[0].values),)), out)


def test_too_many_terms(rng):
    made = convolution(rng, size=(4, 4), channels=8, outputs=4, patterns=["1:4"] * 5)
    with pytest.raises(InputError, match=r"layer conv must have 1..4 terms for configuration tiny"):
        _lower(*made)


def test_unequal_terms(rng):
    layer, out = convolution(rng, size=(4, 4), channels=8, outputs=4)
    other, _ = convolution(rng, size=(4, 4), channels=8, outputs=5)
    with pytest.raises(InputError, match="layer conv must have terms of one shape"):
        _lower(replace(layer, terms=layer.terms + other.terms), out)


def test_channel_mismatch(rng):
    with pytest.raises(InputError, match="layer conv must have 4 outputs and 12 input channels in 1 groups"):
        _lower(*convolution(rng, size=(4, 4), channels=8, outputs=4), channels=12)
    with pytest.raises(InputError, match="layer pool must keep the 12 channels of its input, not 8"):
        _lower(*pool(rng, size=(4, 4), channels=8, kind="max", window=(2, 2), stride=(2, 2)), channels=12)


def test_wrong_output_size(rng):
    layer, out = convolution(rng, size=(4, 4), channels=8, outputs=4)
    with pytest.raises(InputError, match="layer conv must have output height 2, not 3"):
        _lower(layer, replace(out, height=3))


def test_weight_format(rng):
    config = replace(TINY, structured=replace(TINY.structured, weight_bits=4))
    with pytest.raises(InputError, match=r"layer conv must have weights in -8\.\.7"):
        _lower(*convolution(rng, size=(4, 4), channels=8, outputs=4), config=config)
    layer, out = convolution(rng, size=(4, 4), channels=8, outputs=4)
    wide = Term(pattern=Pattern(4, 4), values=layer.terms[0].values.astype(np.int32))
    with pytest.raises(InputError, match="layer conv must have int8 weights, not 'int32'"):
        _lower(replace(layer, terms=(wide,)), out)


@pytest.mark.parametrize("name, value", [("shift", 32), ("multiplier", 65536), ("bias", 1 << 31)])
def test_requantization_range(rng, name, value):
    layer, out = convolution(rng, size=(4, 4), channels=8, outputs=4)
    wrong = replace(layer.requantization, **{name: np.array([0, 1, value, 2])})
    with pytest.raises(InputError, match=rf"layer conv: {name} must be 4 integers in "):
        _lower(replace(layer, requantization=wrong), out)


def test_pool_and_add_rules(rng):
    layer, out = pool(rng, size=(4, 4), channels=8, kind="max", window=(2, 2), stride=(2, 2))
    with pytest.raises(InputError, match="layer pool must be a max or average pool, not 'median'"):
        _lower(replace(layer, kind="median"), out)
    narrow = replace(TINY, structured=replace(TINY.structured, accumulator_bits=16))
    wide = pool(rng, size=(32, 32), channels=4, kind="average", window=(32, 32), stride=(1, 1))
    with pytest.raises(InputError, match="layer pool must have sums within 16-bit accumulators, not 131072"):
        _lower(*wide, size=(32, 32), channels=4, config=narrow)
    layer, out = add(rng, size=(4, 4), channels=8)
    with pytest.raises(InputError, match="layer add must name a residual operand"):
        _lower(replace(layer, residual=None), out)


def test_residual_shape(rng):
    layer, out = add(rng, size=(4, 4), channels=8)
    net = network((4, 4), 8, [layer], [out])
    net.tensors["r"] = tensor("r", 4, 5, 8, 7)
    with pytest.raises(InputError, match="layer add: residual r must have the shape of the output"):
        lower(net, TINY)


def test_unknown_kind(rng):
    layer, out = add(rng, size=(4, 4), channels=8)
    plain = Layer(name="odd", input="x", output="y", requantization=layer.requantization)
    with pytest.raises(InputError, match="layer odd must be a Convolution, Pool or Add, not 'Layer'"):
        _lower(plain, out)
