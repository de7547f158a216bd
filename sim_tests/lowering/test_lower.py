"""Whole lowerings, run by golden.machine, every element compared with the golden operations."""
from dataclasses import replace

import numpy as np
import pytest

from compress.network import Network
from lowering import lower
from sim_tests.lowering.networks import add, check, convolution, network, pool, tensor
from sim_tests.lowering.random_layers import random_network
from spec.config import load
from spec.errors import InputError


@pytest.mark.parametrize("part", range(6))
def test_random_layers_on_tiny(rng, part):
    """The smallest memories: tiles, chunks, streamed weights and split tables all occur."""
    config = load("tiny")
    for _ in range(15):
        net, _ = random_network(rng, config.structured.block)
        check(net, config, rng, batch=int(rng.choice([1, 1, 2, 3])))


@pytest.mark.parametrize("name", ["nm64", "nm256", "nm1024"])
def test_random_layers_on_presets(rng, name):
    config = load(name)
    for _ in range(15):
        net, _ = random_network(rng, config.structured.block)
        check(net, config, rng, batch=int(rng.choice([1, 1, 2, 3])))


def _variant(name, **sections):
    config = load(name)
    return replace(config, **{k: replace(getattr(config, k), **v) for k, v in sections.items()})


VARIANTS = {
    "one_tap": _variant("tiny", structured={"taps": 1}),
    "narrow_stream": _variant("nm256", structured={"stream_blocks": 4}),
    "narrowest_stream": _variant("nm64", structured={"stream_blocks": 1}),
    "few_steps": _variant("nm256", memory={"step_entries": 16, "activation_bytes": 4096, "weight_bytes": 2048,
                                           "parameter_groups": 2, "residual_bytes": 64}),
    "wide_bus": _variant("tiny", bus={"data_bits": 256, "burst_beats": 4}),
    "four_columns_sixteen_slots": _variant("tiny", structured={"slots": 16}, memory={"activation_bytes": 4096}),
    "many_columns": _variant("tiny", structured={"columns": 8}),
    "shallow": _variant("tiny", structured={"accumulator_depth": 4}, memory={"residual_bytes": 64}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_layers_on_variants(rng, variant):
    config = VARIANTS[variant]
    for _ in range(12):
        net, what = random_network(rng, config.structured.block, largest=9)
        try:
            check(net, config, rng, batch=int(rng.choice([1, 2])))
        except InputError as error:
            # Only max pooling on an array that cannot fetch a whole channel group at once.
            assert variant in ("narrowest_stream", "one_tap", "many_columns") and what[0] == "pool", error


def test_network_of_many_kinds(rng):
    """Convolution, max pool, grouped convolution, residual addition, average pool, fully connected."""
    size, layers, tensors = (9, 8), [], []

    def append(made):
        layers.append(made[0])
        tensors.append(made[1])

    append(convolution(rng, "c1", size=size, channels=3, outputs=12, pads=(1, 1, 1, 1), target="a"))
    append(pool(rng, "p1", size=size, channels=12, kind="max", window=(3, 3), stride=(2, 2), pads=(1, 1, 1, 1),
                source="a", target="b"))
    append(convolution(rng, "c2", size=(5, 4), channels=12, outputs=12, kernel=(3, 3), pads=(1, 1, 1, 1), groups=3,
                       patterns=["2:4", "1:4"], source="b", target="r"))
    append(convolution(rng, "c3", size=(5, 4), channels=12, outputs=12, kernel=(1, 1), patterns=["1:4"], source="r",
                       target="d", residual=True))
    append(add(rng, "a1", size=(5, 4), channels=12, source="d", target="e"))
    append(pool(rng, "p2", size=(5, 4), channels=12, kind="average", window=(5, 4), stride=(1, 1), source="e",
                target="f"))
    append(convolution(rng, "fc", size=(1, 1), channels=12, outputs=10, kernel=(1, 1), source="f", target="g"))
    every = {t.name: t for t in [tensor("x", *size, 3), *tensors]}
    net = Network(name="kinds", input="x", output="g", tensors=every, layers=tuple(layers))
    for name in ("tiny", "nm256"):
        lowered, _ = check(net, load(name), rng, batch=2)
        assert lowered.inputs == ("x",) and [i.mark for i in lowered.layers] == [1, 2, 3, 4, 5, 6, 7]
    lowered, _ = check(net, load("tiny"), rng, layers=["a1", "c3"])
    assert lowered.inputs == ("r",) and lowered.outputs == ("d", "e")
    assert [i.name for i in lowered.layers] == ["c3", "a1"]


def test_figures(rng):
    layer, out = convolution(rng, size=(8, 8), channels=64, outputs=64, patterns=["1:4"], pads=(1, 1, 1, 1))
    lowered, _ = check(network((8, 8), 64, [layer], [out]), load("nm256"), rng)
    (info,) = lowered.layers
    assert info.macs_dense == 64 * 64 * 9 * 64 and info.macs_executed == info.macs_dense // 4
    assert (info.steps, info.patterns, info.format) == (9, ("2:8",), "1:4")
    assert info.weight_bytes == 4 * 9 * 22 * 16
    assert info.last_instruction == lowered.instruction_count - 2
    assert lowered.memory_bytes % 4096 == 0 and lowered.program_offset % 16 == 0


def test_extreme_values(rng):
    """All weights and activations at the ends of their range, at the largest sum that a 20-bit accumulator holds."""
    config = _variant("tiny", structured={"accumulator_bits": 20})
    layer, out = convolution(rng, size=(3, 3), channels=15, outputs=5, kernel=(1, 2))
    layer.terms[0].values[...] = -128
    net = network((3, 3), 15, [layer], [out])
    check(net, config, rng)
    layer, out = convolution(rng, size=(3, 3), channels=16, outputs=5, kernel=(1, 2))
    layer.terms[0].values[...] = -128
    with pytest.raises(InputError, match=r"layer conv must have worst-case sums within 20-bit accumulators \(524287\)"):
        lower(network((3, 3), 16, [layer], [out]), config)


@pytest.mark.parametrize("batch", [0, 1025, True, 2.0])
def test_bad_batch(rng, batch):
    net, _ = random_network(rng, 4)
    with pytest.raises(InputError, match=r"batch must be an integer in 1\.\.1024"):
        lower(net, load("tiny"), batch=batch)


def test_sizes_beyond_the_instruction_set(rng):
    layer, out = convolution(rng, size=(1, 1 << 20), channels=1, outputs=1, kernel=(1, 1))
    with pytest.raises(InputError, match="tensor x must be narrower than 2"):
        lower(network((1, 1 << 20), 1, [layer], [out]), load("tiny"))
    layer, out = convolution(rng, size=(16000, 16000), channels=64, outputs=1, kernel=(1, 1))
    with pytest.raises(InputError, match="bus.address_bits must address all tensors"):
        lower(network((16000, 16000), 64, [layer], [out]), load("nm256"))


def test_unknown_layer_and_tensor(rng):
    net, _ = random_network(rng, 4)
    with pytest.raises(InputError, match="layer must be a layer of test: .*, not 'nose'"):
        lower(net, load("tiny"), layers=["nose"])
    with pytest.raises(InputError, match="layers must name at least one layer"):
        lower(net, load("tiny"), layers=[])
    with pytest.raises(InputError, match="tensor must be one of"):
        lower(net, load("tiny")).read_tensor(np.zeros(1, np.uint8), "nose")


def test_same_input_same_image(rng):
    net, _ = random_network(rng, 4)
    first, second = (lower(net, load("tiny")) for _ in range(2))
    np.testing.assert_array_equal(first.image, second.image)
