"""Whole lowerings for the basis engine, run by golden.machine, every element compared with the golden operations."""
from collections import Counter
from dataclasses import replace
import itertools

import numpy as np
import pytest

from compress.network import Network
from golden.cycles import program_words
from lowering import lower
from sim_tests.lowering.networks import add, basis_convolution, check, convolution, network, pool, tensor
from sim_tests.lowering.random_layers import random_basis_network, random_network
from spec.config import load
from spec.derive import Sizes
from spec.errors import InputError
from spec.isa import LinearTarget, Mode, Opcode, TileTarget, decode


def _small(name, **memory):
    config = load(name)
    return replace(config, memory=replace(config.memory, **memory),
                   basis=replace(config.basis, accumulator_depth=16, stream_groups=2))


CONFIGS = {name: load(name) for name in ("tiny_basis", "tiny_maps", "basis252", "basis288", "maps288", "full")} | {
    "small252": _small("basis252", activation_bytes=2048, weight_bytes=16384, parameter_groups=2, residual_bytes=64),
    "small_maps": _small("maps288", activation_bytes=2048, weight_bytes=32768, residual_bytes=256)}
#: Limits that small configurations have; other refusals are mistakes.
LIMITS = ("stream words per pixel", "input channels on", "memory.activation_bytes", "rows of taps", "terms whose sum")


def _try(net, config, rng, batch):
    try:
        return check(net, config, rng, batch=batch)
    except InputError as error:
        assert any(text in str(error) for text in LIMITS), error
        return None


@pytest.mark.parametrize("name", CONFIGS)
def test_random_basis_convolutions(rng, name):
    done = 0
    for _ in range(20):
        net, _ = random_basis_network(rng, CONFIGS[name])
        done += _try(net, CONFIGS[name], rng, int(rng.choice([1, 1, 2, 3]))) is not None
    assert done >= 8


@pytest.mark.parametrize("name", [n for n, c in CONFIGS.items() if c.structured is None])
def test_random_layers(rng, name):
    """Convolutions of all kinds, pools and additions, without a structured engine."""
    done = 0
    for _ in range(20):
        net, _ = random_network(rng, 4)
        done += _try(net, CONFIGS[name], rng, int(rng.choice([1, 1, 2, 3]))) is not None
    assert done >= 12


CASES = {
    "one kernel": {"count": 1},
    "a kernel for every position": {"count": 9},
    "5 x 5": {"count": 4, "kernel": (5, 5), "pads": (2, 2, 2, 2)},
    "dilated, strided, padded unevenly": {"count": 3, "dilation": (2, 2), "stride": (2, 1), "pads": (3, 1, 0, 2)},
    "one by one": {"count": 2, "kernel": (1, 1), "stride": (3, 5)},
    "flat kernel, stride 3 along its thin side": {"count": 2, "kernel": (1, 5), "stride": (3, 2), "pads": (0, 2, 0, 2)},
    "outputs wholly in the padding": {"count": 2, "pads": (4, 5, 3, 4)},
    "padding beyond the fields": {"count": 2, "pads": (17, 0, 2, 16), "size": (4, 4)},
    "one pixel": {"count": 2, "size": (1, 1), "pads": (1, 1, 1, 1)},
    "many pixels": {"count": 2, "size": (9, 61), "pads": (1, 1, 1, 1)},
    "no coefficient": {"count": 2, "density": 0},
    "residual": {"count": 2, "residual": True, "pads": (1, 1, 1, 1)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["tiny_basis", "tiny_maps", "basis252"])
def test_cases(rng, name, case):
    config, fields = CONFIGS[name], {"size": (7, 6), "density": 0.2} | CASES[case]
    channels, outputs = 2 * config.basis.blocks + 1, config.basis.blocks + 2
    layer, out = basis_convolution(rng, channels=channels, outputs=outputs,
                                   intermediate_bits=config.basis.intermediate_bits, **fields)
    # 2:4 at most, so that tiny_basis has enough rows of coefficients
    keep = np.zeros(channels, bool)
    keep[::2] = True
    layer.coefficients[:, ~keep] = 0
    check(network(fields["size"], channels, [layer], [out]), config, rng, batch=3)


def test_seven_by_seven(rng):
    layer, out = basis_convolution(rng, size=(11, 13), channels=20, outputs=20, count=8, kernel=(7, 7), stride=(2, 2),
                                   pads=(3, 3, 3, 3))
    lowered, _ = check(network((11, 13), 20, [layer], [out]), CONFIGS["basis252"], rng)
    assert lowered.layers[0].steps == 2


def test_saturation(rng):
    """Ten bits overflow with a dozen activations; each clamped intermediate is counted once per pass that makes it."""
    layer, out = basis_convolution(rng, size=(4, 4), channels=24, outputs=3, count=2, density=1, intermediate_bits=10,
                                   pads=(1, 1, 1, 1))
    lowered, machine = check(network((4, 4), 24, [layer], [out]), CONFIGS["tiny_maps"], rng)
    assert machine.counts["saturations"] > 10 and lowered.layers[0].patterns == ("maps",)


def test_both_engines_in_one_network(rng):
    size, layers, tensors = (9, 8), [], []

    def append(made):
        layers.append(made[0])
        tensors.append(made[1])

    append(convolution(rng, "c1", size=size, channels=3, outputs=12, pads=(1, 1, 1, 1), patterns=["4:4"], target="a"))
    append(basis_convolution(rng, "b1", size=size, channels=12, outputs=10, count=3, pads=(1, 1, 1, 1), source="a",
                             target="b"))
    append(pool(rng, "p1", size=size, channels=10, kind="max", window=(3, 3), stride=(2, 2), pads=(1, 1, 1, 1),
                source="b", target="r"))
    append(basis_convolution(rng, "b2", size=(5, 4), channels=10, outputs=10, count=2, pads=(1, 1, 1, 1), source="r",
                             target="d", residual=True))
    append(basis_convolution(rng, "b3", size=(5, 4), channels=10, outputs=9, count=2, source="d", target="e"))
    append(convolution(rng, "fc", size=(3, 2), channels=9, outputs=10, kernel=(3, 2), patterns=["2:4"], source="e",
                       target="f"))
    net = Network(name="mixed", input="x", output="f", layers=tuple(layers),
                  tensors={t.name: t for t in [tensor("x", *size, 3), *tensors]})
    for name in ("tiny_basis", "full"):
        lowered, machine = check(net, load(name), rng, batch=2)
        assert machine.counts["EXECUTE"] and machine.counts["EXECUTE_BASIS"]
        assert [i.patterns[0].endswith(f":{load(name).basis.group}") for i in lowered.layers][1] is True


@pytest.mark.parametrize("name", ["tiny_maps", "basis252"])
def test_network_without_a_structured_engine(rng, name):
    size, layers, tensors = (9, 8), [], []
    bits = load(name).basis.intermediate_bits

    def append(made):
        layers.append(made[0])
        tensors.append(made[1])

    append(convolution(rng, "stem", size=size, channels=3, outputs=16, pads=(1, 1, 1, 1), target="a"))
    append(pool(rng, "p1", size=size, channels=16, kind="max", window=(3, 3), stride=(2, 2), pads=(1, 1, 1, 1),
                source="a", target="b"))
    append(convolution(rng, "dw", size=(5, 4), channels=16, outputs=16, groups=16, pads=(1, 1, 1, 1), source="b",
                       target="r"))
    append(basis_convolution(rng, "b2", size=(5, 4), channels=16, outputs=16, count=4, pads=(1, 1, 1, 1), source="r",
                             target="d", residual=True, intermediate_bits=bits))
    append(add(rng, "a1", size=(5, 4), channels=16, source="d", target="e"))
    append(convolution(rng, "down", size=(5, 4), channels=16, outputs=20, kernel=(1, 1), stride=(2, 2), source="e",
                       target="f"))
    append(pool(rng, "p2", size=(3, 2), channels=20, kind="average", window=(3, 2), stride=(1, 1), source="f",
                target="g"))
    append(convolution(rng, "fc", size=(1, 1), channels=20, outputs=10, kernel=(1, 1), source="g", target="h"))
    net = Network(name="kinds", input="x", output="h", layers=tuple(layers),
                  tensors={t.name: t for t in [tensor("x", *size, 3), *tensors]})
    lowered, machine = check(net, load(name), rng, batch=3)
    assert machine.counts["EXECUTE"] == 0 and lowered.inputs == ("x",) and lowered.outputs[-1] == "h"


# -- what programs do --------------------------------------------------------------------------------------------------
def _code(lowered):
    return [decode(w) for w in program_words(lowered.config, lowered.image, lowered.program_offset,
                                             lowered.instruction_count)]


def _passes(lowered):
    return [f for op, f in _code(lowered) if op == Opcode.EXECUTE_BASIS]


def _beats(lowered, target):
    return sum(f["beats"] for op, f in _code(lowered) if op == Opcode.LOAD_LINEAR and f["target"] == target)


def test_taps_and_input_are_loaded_once(rng):
    """32 x 32 x 64 to 64: taps with the first pass only, coefficients with each, all from one copy on chip."""
    config = load("basis288")
    layer, out = basis_convolution(rng, size=(32, 32), channels=64, outputs=64, count=6, density=0.05,
                                   pads=(1, 1, 1, 1))
    lowered, _ = check(network((32, 32), 64, [layer], [out]), config, rng)
    passes, plan = _passes(lowered), lowered.layers[0].plan
    assert plan.strips_first and plan.regions == 1 and plan.schedule.steps[0].strip[1] < plan.strip_rows
    assert [p["taps"] for p in passes] == [3] + [0] * (len(passes) - 1)
    groups = [step.group for step in plan.schedule.steps]
    assert [p["coefficients"] > 0 for p in passes] == [a != b for a, b in zip([None, *groups], groups)]
    assert _beats(lowered, LinearTarget.WEIGHT) * Sizes(config).beat_bytes == lowered.layers[0].weight_bytes
    units = Counter()
    for op, f in _code(lowered):
        if op == Opcode.LOAD_TILE:
            units[f["target"]] += f["planes"] * f["rows"] * f["cols"]
    assert units == {TileTarget.ACTIVATION: 32 * 32 * 4}
    # what the first pass needs comes first: its pixels and the halo only
    before = itertools.takewhile(lambda entry: entry[0] != Opcode.EXECUTE_BASIS, _code(lowered))
    loaded = sum(f["planes"] * f["rows"] * f["cols"] for op, f in before if op == Opcode.LOAD_TILE)
    assert 4 * passes[0]["in_rows"] * passes[0]["in_cols"] <= loaded <= 4 * passes[0]["in_rows"] * 32 <= 4 * 3 * 32
    info = lowered.layers[0]
    edges = 2 * 32 * 64 // 16
    assert info.macs_executed == (32 * 32 * 3 * 4 - edges) * 288 and info.macs_dense == 32 * 32 * 64 * 64 * 9


def test_coefficients_stay_for_all_strips(rng):
    """More coefficients than the weight buffer holds: each output group's are loaded once, for all images."""
    config = _small("basis252", activation_bytes=8192, weight_bytes=8192)
    layer, out = basis_convolution(rng, size=(6, 6), channels=56, outputs=140, count=6, density=0.3, pads=(1, 1, 1, 1))
    lowered, _ = check(network((6, 6), 56, [layer], [out]), config, rng, batch=3)
    plan, passes = lowered.layers[0].plan, _passes(lowered)
    assert not plan.strips_first and plan.images == 3 and lowered.layers[0].weight_bytes > 8192
    assert sum(p["coefficients"] > 0 for p in passes) == 10 and len(passes) > 60
    assert _beats(lowered, LinearTarget.WEIGHT) * Sizes(config).beat_bytes == lowered.layers[0].weight_bytes


def test_strips_have_their_halo_and_no_padding_inside(rng):
    config = load("tiny_basis")
    layer, out = basis_convolution(rng, size=(12, 20), channels=4, outputs=4, count=2, pads=(1, 1, 1, 1), density=0.2)
    lowered, _ = check(network((12, 20), 4, [layer], [out]), config, rng)
    passes = _passes(lowered)
    assert len(passes) > 8 and {p["pad_top"] for p in passes} == {p["pad_left"] for p in passes} == {0, 1}
    assert not any(op == Opcode.FILL for op, _ in _code(lowered))
    assert [p["bank"] for p in passes] == [k % 2 for k in range(len(passes))]
    assert all(p["out_rows"] * p["out_cols"] <= Sizes(config).accumulator_depth for p in passes)


def test_more_basis_kernels_than_slices_add_up(rng):
    layer, out = basis_convolution(rng, size=(4, 4), channels=8, outputs=4, count=5, density=0.2)
    lowered, _ = check(network((4, 4), 8, [layer], [out]), load("tiny_basis"), rng)
    passes = _passes(lowered)
    assert [p["accumulate"] for p in passes] == [0, 1, 1] and len({p["bank"] for p in passes}) == 1
    assert [p["taps"] for p in passes] == [3, 3, 3] and lowered.layers[0].steps == 3


def test_fully_connected_batch_is_one_strip(rng):
    layer, out = convolution(rng, size=(3, 2), channels=20, outputs=30, kernel=(3, 2))
    lowered, _ = check(network((3, 2), 20, [layer], [out]), load("basis252"), rng, batch=5)
    passes = _passes(lowered)
    assert [(p["mode"], p["groups"], p["in_rows"], p["in_cols"]) for p in passes] == [(Mode.POINTWISE, 12, 5, 1)] * 3
    assert lowered.layers[0].plan.merged and lowered.layers[0].patterns == ("pointwise",)


def test_max_pool_loads_its_identity_once(rng):
    layer, out = pool(rng, size=(8, 8), channels=40, kind="max", window=(3, 3), stride=(2, 2), pads=(1, 1, 1, 1))
    lowered, _ = check(network((8, 8), 40, [layer], [out]), load("basis252"), rng)
    assert [p["taps"] for p in _passes(lowered)] == [1] + [0] * (len(_passes(lowered)) - 1)
    assert lowered.layers[0].weight_bytes == Sizes(load("basis252")).tap_row_beats * Sizes(load("basis252")).beat_bytes


def test_average_pool_of_a_whole_image_is_one_run(rng):
    layer, out = pool(rng, size=(7, 7), channels=40, kind="average", window=(7, 7), stride=(1, 1))
    lowered, _ = check(network((7, 7), 40, [layer], [out]), load("basis252"), rng)
    assert [(p["groups"], p["taps"]) for p in _passes(lowered)] == [(32, 32), (17, 0)] + [(32, 0), (17, 0)] * 2


def test_weights_of_many_passes_are_streamed_once(rng):
    """Six passes of 32 rows of taps for each output group do not fit a buffer of 16 KiB; no load is in vain."""
    config = _small("basis252", activation_bytes=8192, weight_bytes=16384)
    layer, out = convolution(rng, size=(3, 3), channels=14 * 20, outputs=40, kernel=(3, 3))
    lowered, _ = check(network((3, 3), 14 * 20, [layer], [out]), config, rng)
    assert lowered.layers[0].steps == 6 and lowered.layers[0].weight_bytes > 2 * 16384
    assert _beats(lowered, LinearTarget.WEIGHT) * Sizes(config).beat_bytes == lowered.layers[0].weight_bytes


def test_many_small_images(rng):
    """So many transfers ahead of their use that each as a token would overflow a counter."""
    config = _small("basis252", activation_bytes=8192, weight_bytes=16384)
    layer, out = pool(rng, size=(2, 2), channels=28, kind="average", window=(2, 1), stride=(1, 1))
    lowered, _ = check(network((2, 2), 28, [layer], [out]), config, rng, batch=300)
    assert lowered.layers[0].plan.regions == 2


def test_passes_are_legal(rng):
    """What the engine refuses as ILLEGAL_FIELD beyond golden.machine: padding as long as the kernel reaches."""
    config, seen = load("basis252"), 0
    for _ in range(20):
        net, _ = random_basis_network(rng, config)
        for p in _passes(lower(net, config)):
            assert p["pad_top"] <= (p["kernel_rows"] - 1) * p["dilation_rows"]
            assert p["pad_left"] <= (p["kernel_cols"] - 1) * p["dilation_cols"]
            assert p["dilation_rows"] >= 1 and p["dilation_cols"] >= 1 and p["groups"] >= 1
            seen += p["pad_top"] > 0
    assert seen


def test_same_input_same_image(rng):
    net, _ = random_basis_network(rng, load("basis252"))
    first, second = (lower(net, load("basis252")) for _ in range(2))
    np.testing.assert_array_equal(first.image, second.image)
