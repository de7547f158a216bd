"""Configurations at the edges of `spec.config` and random ones: the accelerator converts, and Verilog can say it."""

from dataclasses import replace
import re

import numpy as np
import pytest

from hw.top import Accelerator
from sim_tests.lib.simulate import to_verilog
from spec.config import BasisConfig, BusConfig, Config, ControlConfig, MemoryConfig, Pattern, StructuredConfig
from spec.errors import InputError


def _config(
    *,
    columns,
    slots,
    block,
    ns,
    taps=1,
    stream_blocks=0,
    bits=(8, 8, 32),
    depth=16,
    data_bits=64,
    burst=8,
    outstanding=2,
    queue=4,
    fetch=4,
    activation_bytes=2048,
    weight_bytes=4096,
    residual_bytes=256,
    groups=4,
):
    return Config(
        name="edge",
        structured=StructuredConfig(
            columns=columns,
            slots=slots,
            block=block,
            patterns=tuple(Pattern(n, block) for n in ns),
            taps=taps,
            stream_blocks=stream_blocks,
            activation_bits=bits[0],
            weight_bits=bits[1],
            accumulator_bits=bits[2],
            accumulator_depth=depth,
        ),
        memory=MemoryConfig(
            activation_bytes=activation_bytes,
            weight_bytes=weight_bytes,
            residual_bytes=residual_bytes,
            step_entries=16,
            parameter_groups=groups,
        ),
        bus=BusConfig(
            data_bits=data_bits, burst_beats=burst, outstanding_reads=outstanding, outstanding_writes=outstanding
        ),
        control=ControlConfig(queue_depth=queue, fetch_depth=fetch),
    )


def _basis(structured=None, *, data_bits=64, activation_bytes=2048, weight_bytes=4096, **fields):
    """A configuration with a basis engine of these fields."""
    return Config(
        name="edge", structured=structured, basis=BasisConfig(lanes=fields["group"], **fields),
        memory=MemoryConfig(activation_bytes=activation_bytes, weight_bytes=weight_bytes, residual_bytes=256,
                            step_entries=16, parameter_groups=2),
        bus=BusConfig(data_bits=data_bits, burst_beats=4, outstanding_reads=1, outstanding_writes=1),
        control=ControlConfig(queue_depth=2, fetch_depth=2))


EDGES = {
    # -- with a basis engine
    "basis: one pixel of everything": _basis(
        group=4, blocks=2, slices=4, multipliers=1, coefficients="maps", window=1, stream_groups=1, look_aside=0,
        fifo_depth=2, tap_rows=4, coefficient_rows=2, accumulator_depth=4, intermediate_bits=8, data_bits=32),
    "basis: series, one group per word": _basis(
        group=4, blocks=3, slices=1, multipliers=9, window=9, stream_groups=1, intermediate_bits=20, fifo_depth=16,
        tap_rows=8, coefficient_rows=4, accumulator_depth=16, data_bits=512),
    "basis: words of more groups than lanes": _basis(
        group=4, blocks=2, slices=9, multipliers=2, window=2, stream_groups=16, tap_rows=4, coefficient_rows=16,
        accumulator_depth=16),
    "basis: maps, deepest look-aside, two groups": _basis(
        group=8, blocks=3, slices=2, multipliers=4, coefficients="maps", window=15, stream_groups=2, look_aside=3,
        tap_rows=4, coefficient_rows=64, accumulator_depth=16),
    "both engines, units of many blocks": _basis(
        StructuredConfig(columns=8, slots=2, block=2, patterns=(Pattern(2, 2),), taps=1, accumulator_depth=4,
                         accumulator_bits=16),
        group=8, blocks=8, slices=2, multipliers=4, window=5, stream_groups=1, tap_rows=4, coefficient_rows=2,
        accumulator_depth=4, data_bits=128),
    # -- with the structured engine alone
    "smallest": _config(
        columns=2,
        slots=2,
        block=2,
        ns=[2],
        depth=4,
        data_bits=32,
        burst=1,
        outstanding=1,
        queue=2,
        fetch=2,
        activation_bytes=256,
        weight_bytes=256,
        residual_bytes=64,
        groups=2,
        bits=(2, 2, 16),
    ),
    "widest bus": _config(
        columns=4, slots=4, block=4, ns=[1, 2, 4], taps=2, data_bits=1024, burst=4, residual_bytes=64
    ),
    "one beat per tile": _config(columns=4, slots=4, block=4, ns=[4], data_bits=128),
    "groups of many blocks": _config(columns=32, slots=2, block=2, ns=[2], data_bits=256, activation_bytes=256),
    "all segments": _config(columns=4, slots=8, block=4, ns=[1, 4], taps=4, stream_blocks=8),
    "narrowest stream": _config(columns=4, slots=8, block=4, ns=[1, 2, 4], taps=4, stream_blocks=2),
    "block 16": _config(columns=16, slots=16, block=16, ns=[16], taps=4, data_bits=128, weight_bytes=8192),
}


def random_config(rng):
    """Any small legal configuration."""
    while True:
        block = int(rng.choice([2, 4, 8]))
        ns = [n for n in (1, 2, 4, 8) if n < block and rng.random() < 0.5] + [block]
        try:
            return _config(
                columns=block * int(rng.choice([1, 2, 4])),
                slots=block * int(rng.choice([1, 2])),
                block=block,
                ns=ns,
                taps=int(rng.choice([1, 2, 4])),
                stream_blocks=int(rng.choice([0, 1, 2, 4])),
                depth=int(rng.choice([4, 32])),
                bits=(int(rng.integers(2, 9)), int(rng.integers(2, 9)), int(rng.integers(16, 33))),
                data_bits=int(rng.choice([32, 64, 128, 256, 512])),
                burst=int(rng.choice([1, 2, 8])),
                outstanding=int(rng.integers(1, 5)),
                queue=int(rng.choice([2, 8])),
                fetch=int(rng.choice([2, 4, 16])),
            )
        except InputError:
            continue


def random_basis_config(rng):
    """Any small legal configuration with a basis engine alone."""
    while True:
        group = int(rng.choice([4, 8]))
        try:
            return _basis(
                group=group, blocks=int(rng.integers(2, group + 1)), slices=int(rng.integers(1, 7)),
                multipliers=int(rng.integers(1, 7)), coefficients=str(rng.choice(["series", "maps"])),
                stream_groups=int(rng.choice([1, 2, 4])), look_aside=int(rng.integers(4)),
                intermediate_bits=int(rng.integers(8, 21)), fifo_depth=int(rng.integers(2, 6)),
                window=int(rng.integers(1, 16)), tap_rows=int(rng.choice([4, 16])),
                coefficient_rows=int(rng.choice([2, 8])), accumulator_depth=int(rng.choice([4, 64])),
                data_bits=int(rng.choice([32, 64, 256])))
        except InputError:
            continue


def check(config):
    text = to_verilog(Accelerator(config=replace(config)), "edge")
    reversed_ranges = re.findall(r".*\[-\d+:.*", text)
    assert not reversed_ranges, f"{config}: a signal without bits: {reversed_ranges[0].strip()}"


@pytest.mark.parametrize("name", EDGES)
def test_edges(name):
    check(EDGES[name])


@pytest.mark.parametrize("draw", [random_config, random_basis_config])
@pytest.mark.parametrize("number", range(2))
def test_random(number, draw, rng):
    check(draw(np.random.default_rng([number, int(rng.integers(1 << 30))])))
