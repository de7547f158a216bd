"""What a layer becomes for the basis engine, and what is refused."""
from dataclasses import replace

import numpy as np
import pytest

from compress.network import Layer, Term
from golden.coefficients import unpack_maps, unpack_series, unpack_taps
from lowering import lower
from lowering.basis import make_basis_job, needs_border, uses_basis
from lowering.job import pack_parameters, planes_of
from lowering.layout import Placement
from sim_tests.lowering.networks import add, basis_convolution, convolution, network, pool, tensor
from spec.config import Pattern, load
from spec.derive import Sizes
from spec.errors import InputError
from spec.formats import column_parameters
from spec.isa import Mode, Operation

TINY, MAPS, B252, B288 = (load(name) for name in ("tiny_basis", "tiny_maps", "basis252", "basis288"))


def _job(layer, out, *, size=(4, 4), channels=8, config=B252, zero_point=-5):
    sizes = Sizes(config)

    def place(t):
        return Placement(name=t.name, offset=0, images=1, planes=planes_of(t.channels, sizes), height=t.height,
                         width=t.width, channels=t.channels, unit_bytes=sizes.unit_bytes, zero_point=t.zero_point,
                         group_channels=sizes.group_channels)

    tensors = {t.name: place(t) for t in (tensor("x", *size, channels, zero_point), out)}
    tensors["r"] = replace(tensors["y"], name="r")
    return make_basis_job(layer, sizes=sizes, mark=1, tensors=tensors, batch=1)


def _lower(made, *, size=(4, 4), channels=8, config=B252):
    layer, out = made
    return lower(network(size, channels, [layer], [out]), config)


def test_which_engine(rng):
    basis, _ = basis_convolution(rng, size=(4, 4), channels=4, outputs=4, count=2)
    dense, _ = convolution(rng, size=(4, 4), channels=4, outputs=4)
    assert [uses_basis(basis, c) for c in (TINY, B252)] == [True, True]
    assert [uses_basis(dense, c) for c in (TINY, B252)] == [False, True]
    with pytest.raises(InputError, match="layer basis must run on a configuration with a basis engine, not tiny"):
        uses_basis(basis, load("tiny"))


@pytest.mark.parametrize("config", [B252, MAPS], ids=lambda c: c.name)
def test_decomposed_passes_hold_every_coefficient_once(rng, config):
    b, sizes = config.basis, Sizes(config)
    outputs, channels, count = 2 * b.blocks + 1, 2 * b.blocks - 1, b.slices + 2
    layer, out = basis_convolution(rng, size=(4, 5), channels=channels, outputs=outputs, count=count, kernel=(3, 5),
                                   intermediate_bits=b.intermediate_bits)
    job = _job(layer, out, size=(4, 5), channels=channels, config=config)
    assert len(job.passes) == 3 and all(len(group) == 2 for group in job.passes) and not job.border
    found = np.zeros_like(layer.coefficients)
    for plane, group in enumerate(job.passes):
        for number, run in enumerate(group):
            ce = unpack_maps(run.coefficients, config, run.groups) if b.coefficients == "maps" else \
                unpack_series(run.coefficients, config, run.terms, run.groups)
            taps = unpack_taps(run.taps, config)
            assert run.mode is Mode.DECOMPOSED and run.groups == 2 and run.micro_steps == -(-5 // b.multipliers)
            assert len(taps) == 3 * run.micro_steps
            for block, m in np.ndindex(b.blocks, b.slices):
                k, kernel = plane * b.blocks + block, number * b.slices + m
                rows = taps[:, block, m].reshape(3, -1)[:, :5]
                assert not taps[:, block, m].reshape(3, -1)[:, 5:].any()
                assert np.array_equal(rows, layer.basis[kernel] if kernel < count else np.zeros((3, 5)))
                flat = ce[block, m, :, :b.blocks].reshape(-1)
                assert not ce[block, m, :, b.blocks:].any() and not flat[channels:].any()
                if k < outputs and kernel < count:
                    found[k, :, kernel] = flat[:channels]
                else:
                    assert not flat.any()
    np.testing.assert_array_equal(found, layer.coefficients)
    assert job.zero_point == -5 and job.requantization is layer.requantization and sizes.group_channels == b.blocks


def test_hardware_n_is_counted_in_hardware_groups(rng):
    """2:16 in channels; with 14 of them in a group, channels 14 and 15 join those of the next block of 16."""
    layer, out = basis_convolution(rng, size=(4, 4), channels=32, outputs=3, count=1, density=0)
    layer.coefficients[1, [14, 15, 16, 27], 0] = 1, -1, 1, -1
    assert _job(layer, out, channels=32, config=B288).passes[0][0].terms == (2,)
    assert _job(layer, out, channels=32, config=B252).passes[0][0].terms == (4,)


def test_pointwise_passes_hold_every_weight_once(rng):
    """520 channels are 38 groups of 14; the tap memory holds 32 rows."""
    layer, out = convolution(rng, size=(3, 3), channels=520, outputs=15, kernel=(1, 1))
    job = _job(layer, out, size=(3, 3), channels=520)
    assert [(r.mode, r.first, r.groups) for r in job.passes[1]] == [(Mode.POINTWISE, 0, 32), (Mode.POINTWISE, 32, 6)]
    assert job.patterns == ("pointwise",) and job.zero_point == 0 and job.requantization is layer.requantization
    for plane in (0, 1):
        taps = np.concatenate([unpack_taps(run.taps, B252) for run in job.passes[plane]])       # [groups, b, m, i]
        rows = taps.reshape(38, 14, 18)
        assert not rows[:, :, 14:].any()
        weights = rows[:, :, :14].transpose(1, 0, 2).reshape(14, -1)
        want = layer.terms[0].values[plane * 14:plane * 14 + 14, 0, 0]
        assert np.array_equal(weights[:len(want), :520], want)
        assert not weights[len(want):].any() and not weights[:, 520:].any()


def test_dense_passes_hold_every_weight_once(rng):
    """20 channels: groups of 14 and 6, hence chunks of 6, 6, 2 and 6."""
    layer, out = convolution(rng, size=(6, 6), channels=20, outputs=5, kernel=(3, 5), pads=(1, 2, 1, 2))
    layer.terms[0].values[layer.terms[0].values == 0] = 1
    job = _job(layer, out, size=(6, 6), channels=20)
    assert [(r.mode, r.first, r.channel, r.micro_steps) for r in job.passes[0]] == [
        (Mode.DENSE, 0, 0, 2), (Mode.DENSE, 0, 6, 2), (Mode.DENSE, 0, 12, 2), (Mode.DENSE, 1, 0, 2)]
    found = np.zeros_like(layer.terms[0].values)
    for run in job.passes[0]:
        taps = unpack_taps(run.taps, B252).reshape(3, 2, 14, 6, 3)
        kernels = taps.transpose(2, 3, 0, 1, 4).reshape(14, 6, 3, 6)
        assert not kernels[5:].any() and not kernels[..., 5].any()
        for m in range(6):
            position = run.channel + m
            if position < 14 and run.first * 14 + position < 20:
                found[..., run.first * 14 + position] += kernels[:5, m, :, :5]
            else:
                assert not kernels[:, m].any()
    np.testing.assert_array_equal(found, layer.terms[0].values)


def test_the_zero_point_goes_back_into_the_bias(rng):
    """The layer sums q, with the zero point outside; DENSE passes sum q - zero_point, with 0 outside."""
    layer, out = convolution(rng, size=(6, 6), channels=3, outputs=5, pads=(1, 1, 1, 1))
    job = _job(layer, out, size=(6, 6), channels=3)
    assert job.passes[0][0].mode is Mode.DENSE and job.zero_point == -5 and not job.border
    sums = layer.terms[0].values.astype(np.int64).sum(axis=(1, 2, 3))
    assert job.requantization.bias.dtype == np.int32
    np.testing.assert_array_equal(job.requantization.bias, layer.requantization.bias - 5 * sums)
    layer.terms[0].values[...] = -1
    layer.requantization.bias[2] = 2 ** 31 - 100
    with pytest.raises(InputError, match="layer conv must have 32-bit biases without the input's zero point, not "
                                         "2147483683"):
        _job(layer, out, size=(6, 6), channels=3)


def test_depthwise_reads_the_channels_of_its_outputs(rng):
    layer, out = convolution(rng, size=(4, 4), channels=30, outputs=30, groups=30, pads=(1, 1, 1, 1))
    layer.terms[0].values[...] = 1
    job = _job(layer, out, channels=30)
    assert job.starts == (0, 1, 2) and job.span == 1
    assert [[r.channel for r in group] for group in job.passes] == [[0, 6, 12], [0, 6, 12], [0]]


def test_channelwise_layers_share_their_passes(rng):
    layer, out = pool(rng, size=(7, 7), channels=30, kind="max", window=(3, 2), stride=(2, 2))
    job = _job(layer, out, size=(7, 7), channels=30)
    assert job.operation is Operation.MAX and job.fill == -128 and len(set(job.passes)) == 1
    assert [r.tap for r in job.passes[0]] == [(r, s) for r in range(3) for s in range(2)]
    assert len({r.taps for r in job.passes[0]}) == 1 and job.border
    taps = unpack_taps(job.passes[0][0].taps, B252).reshape(1, 14, 18)
    assert np.array_equal(taps[0], np.eye(14, 18))
    layer, out = pool(rng, size=(7, 7), channels=30, kind="average", window=(7, 7), stride=(1, 1))
    job = _job(layer, out, size=(7, 7), channels=30)
    assert [(r.first, r.groups) for r in job.passes[0]] == [(0, 32), (32, 17)] and job.shared_taps
    layer, out = add(rng, size=(4, 4), channels=30)
    job = _job(layer, out, channels=30)
    assert (job.op, len(job.passes), len(job.passes[0])) == ("add", 3, 1) and job.macs_dense == 0


def test_parameters_lie_at_their_positions(rng):
    layer, out = convolution(rng, size=(4, 4), channels=3, outputs=5, kernel=(1, 1))
    job, sizes = _job(layer, out, channels=3, config=MAPS), Sizes(MAPS)
    blob = pack_parameters(job, sizes).reshape(2, sizes.parameter_beats * sizes.beat_bytes)
    words = blob[:, :32].copy().view("<u8")
    for k in range(5):
        fields = column_parameters().unpack(int(words[k // 3, k % 3]))
        assert (fields["bias"], fields["shift"]) == (layer.requantization.bias[k], layer.requantization.shift[k])
    assert words[0, 3] == words[1, 2] == words[1, 3] == 0
    assert [planes_of(c, sizes) for c in (1, 3, 4, 9)] == [1, 1, 2, 3]


@pytest.mark.parametrize("changes, border", [
    ({}, False), ({"pads": (2, 2, 2, 2)}, False), ({"pads": (3, 0, 1, 1)}, True), ({"pads": (0, 3, 1, 1)}, True),
    ({"kernel": (1, 1), "stride": (2, 2)}, False), ({"kernel": (1, 1), "stride": (2, 2), "pads": (0, 1, 0, 0)}, True),
    ({"pads": (3, 0, 3, 0), "dilation": (4, 1)}, False), ({"pads": (1, 0, 9, 0), "dilation": (7, 1)}, True)])
def test_padding_is_stored_only_where_it_must_be(rng, changes, border):
    """An output without any kernel row or column inside the image; a stride made of addresses beside padding."""
    layer, out = basis_convolution(rng, size=(6, 6), channels=8, outputs=4, count=2, **changes)
    job = _job(layer, out, size=(6, 6))
    assert job.border is border and needs_border(job) is border


def _basis(rng, **changes):
    fields = {"size": (9, 9), "channels": 8, "outputs": 4, "count": 2}
    return basis_convolution(rng, **fields | changes)


@pytest.mark.parametrize("config, changes, text", [
    (B252, {"kernel": (9, 1)}, "must have at most 8 kernel rows on configuration basis252, not 9"),
    (B252, {"kernel": (1, 8)}, r"must have kernel rows within 7 pixels \(basis.window\) on .* basis252, not 8"),
    (B252, {"kernel": (3, 3), "dilation": (1, 4)}, "must have kernel rows within 7 pixels"),
    (MAPS, {"kernel": (6, 5), "intermediate_bits": 10}, r"must have at most 16 rows of taps \(basis.tap_rows\) on "
     "configuration tiny_maps, not 18"),
    (B252, {"stride": (3, 1)}, r"must have strides 1, 2, 4 or 8 on configuration basis252, not \(3, 1\)"),
    (B252, {"kernel": (2, 2), "dilation": (8, 1)}, r"must have dilations of at most 7 on .* basis252, not \(8, 1\)"),
    (B252, {"intermediate_bits": 8}, r"must have 16-bit intermediates on configuration basis252 "
     r"\(basis.intermediate_bits\), not 8"),
])
def test_what_a_basis_convolution_must_be(rng, config, changes, text):
    with pytest.raises(InputError, match=f"layer basis {text}"):
        _lower(_basis(rng, density=1, **changes), size=(9, 9), config=config)


def test_too_many_channels(rng):
    made = _basis(rng, channels=25, intermediate_bits=10)
    with pytest.raises(InputError, match=r"layer basis must have at most 24 input channels on configuration tiny_maps "
                                         r"\(basis.coefficient_rows\), not 25"):
        _lower(made, size=(9, 9), channels=25, config=MAPS)
    made = _basis(rng, channels=20, density=1)
    with pytest.raises(InputError, match=r"layer basis must take at most 4 stream words per pixel on configuration "
                                         r"tiny_basis \(basis.coefficient_rows\), not 5"):
        _lower(made, size=(9, 9), channels=20, config=TINY)


def test_another_width_is_good_where_nothing_can_saturate(rng):
    """9 bits hold one activation less its zero point of -5, but not two."""
    layer, out = _basis(rng, density=0, intermediate_bits=9)
    layer.coefficients[:, 3, :] = -1
    _job(layer, out, size=(9, 9))
    layer.coefficients[2, 4, 1] = 1
    with pytest.raises(InputError, match="16-bit intermediates"):
        _job(layer, out, size=(9, 9))


def test_basis_and_coefficients_must_fit(rng):
    layer, out = _basis(rng)
    for changes, text in (({"basis": layer.basis.astype(np.int16)}, "must have int8 basis kernels"),
                          ({"coefficients": layer.coefficients[:, :7]}, r"coefficients \[4, 8, M\]"),
                          ({"coefficients": layer.coefficients * 2 + 3}, "must have coefficients -1, 0 or 1")):
        with pytest.raises(InputError, match=text):
            _job(replace(layer, **changes), out, size=(9, 9))
    wide, out = _basis(rng, channels=4096 - 526, count=130, kernel=(5, 7), density=1)
    wide.basis[...] = -128
    with pytest.raises(InputError, match="must have worst-case sums within 32-bit accumulators"):
        _job(wide, out, size=(9, 9), channels=4096 - 526)


def test_what_other_layers_must_be(rng):
    two, out = convolution(rng, size=(4, 4), channels=8, outputs=2, patterns=["8:8", "8:8"])
    two.terms[0].values[0, 0, 0, 0] = two.terms[1].values[0, 0, 0, 0] = 100
    with pytest.raises(InputError, match=r"layer conv must have terms whose sum is in -128..127 on configuration "
                                         r"basis252 \(no structured engine\)"):
        _lower((two, out))
    one, out = convolution(rng, size=(4, 4), channels=8, outputs=2)
    odd = Term(pattern=Pattern(8, 8), values=one.terms[0].values[:1])
    for changes, text in (({"terms": (*one.terms, odd)}, "must have terms of int8 weights of one shape"),
                          ({"groups": 2}, "must have 2 outputs and 8 input channels in 2 groups")):
        with pytest.raises(InputError, match=text):
            _lower((replace(one, **changes), out))
    with pytest.raises(InputError, match="must keep the 8 channels of its input, not 9"):
        _lower(add(rng, size=(4, 4), channels=9))
    layer, out = pool(rng, size=(4, 4), channels=8, kind="average", window=(2, 2), stride=(2, 2))
    with pytest.raises(InputError, match="must be a max or average pool, not 'median'"):
        _lower((replace(layer, kind="median"), out))
    with pytest.raises(InputError, match="must be a BasisConvolution, Convolution, Pool or Add, not 'Layer'"):
        _lower((Layer(name="odd", input="x", output="y", requantization=one.requantization), out))
