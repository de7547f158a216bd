"""Number of steps, bank rule, and tiles against golden.tiles."""
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from golden.tiles import pack_tile
from lowering.job import make_job
from lowering.layout import Placement
from lowering.steps import Chunk, Reduction, count_steps, pack_segments, split_candidates
from lowering.tiling import Tiler
from sim_tests.lowering.networks import convolution
from spec.config import Pattern, load
from spec.derive import Sizes
from spec.formats import step_entry


def _job(rng, config, *, size=(8, 8), channels=64, outputs=64, patterns=("8:8",), **options):
    sizes = Sizes(config)
    layer, out = convolution(rng, size=size, channels=channels, outputs=outputs, patterns=patterns, **options)
    def place(name, h, w, c):
        return Placement(name=name, offset=0, images=1, planes=-(-c // sizes.unit_bytes), height=h, width=w, channels=c,
                         unit_bytes=sizes.unit_bytes, zero_point=-5)
    tensors = {"x": place("x", *size, channels), "y": place("y", *out.shape)}
    return make_job(layer, sizes=sizes, mark=1, tensors=tensors, batch=1), sizes


@pytest.mark.parametrize("patterns, passes", [
    (["8:8"], [(8, 36)]), (["1:8"], [(1, 5)]), (["2:8"], [(2, 9)]), (["1:4"], [(2, 9)]), (["2:4"], [(4, 18)]),
    (["4:8", "1:8"], [(4, 18), (1, 5)]), (["5:8"], [(4, 18), (1, 5)]), (["3:4"], [(4, 18), (2, 9)]),
    (["3:8"], [(2, 9), (1, 5)])])
def test_steps_of_the_target_layer(rng, patterns, passes):
    """8x8x64 -> 64, 3x3, pad 1 on nm256: no more steps than the multipliers need."""
    job, sizes = _job(rng, load("nm256"), patterns=patterns, pads=(1, 1, 1, 1))
    tiler = Tiler(job, sizes, 1)
    plan = tiler.plan()
    steps = tiler.reduction.steps(plan.chunks[0], plan.passes, plan.pitch, plan.cb)
    assert [(p.n, sum(s.run == p for s in steps)) for p in plan.passes] == passes


def test_first_layer_puts_several_taps_into_a_step(rng):
    job, sizes = _job(rng, load("nm256"), channels=3, patterns=["8:8"], pads=(1, 1, 1, 1))
    tiler = Tiler(job, sizes, 1)
    plan = tiler.plan()
    assert len(tiler.reduction.steps(plan.chunks[0], plan.passes, plan.pitch, plan.cb)) == 5


def test_depthwise_runs_sparse(rng):
    job, sizes = _job(rng, load("nm256"), groups=64, pads=(1, 1, 1, 1))
    tiler = Tiler(job, sizes, 1)
    plan = tiler.plan()
    assert len(tiler.reduction.steps(plan.chunks[0], plan.passes, plan.pitch, plan.cb)) == 3
    assert [p.n for p in plan.passes] in ([1], [2])


def test_dense_terms_stay_dense_and_zero_passes_are_dropped(rng):
    job, sizes = _job(rng, load("nm256"), patterns=["8:8", "5:8"])
    few = replace(job.parts[1], required=5)
    assert split_candidates(job.parts[0], sizes) == [[(0, 8, 8)]]
    assert split_candidates(few, sizes)[0] == [(0, 4, 4), (4, 1, 1)]
    job.parts[1].weights[...] = 0
    plan = Tiler(job, sizes, 1).plan()
    assert [p.n for p in plan.passes] == [8]


def test_all_zero_weights_take_one_step(rng):
    job, sizes = _job(rng, load("tiny"), channels=8, outputs=4, patterns=["1:4"], size=(3, 3))
    job.parts[0].weights[...] = 0
    tiler = Tiler(job, sizes, 1)
    plan = tiler.plan()
    steps = tiler.reduction.steps(plan.chunks[0], plan.passes, plan.pitch, plan.cb)
    assert len(steps) == 1
    tile = tiler.reduction.tiles(plan.chunks[0], steps, plan.cb)[0]
    assert not np.any(tile[:, :sizes.value_beats * sizes.beat_bytes])


@pytest.mark.parametrize("name", ["tiny", "nm64", "nm256", "nm1024"])
def test_packing_reaches_the_bound_and_never_meets_in_a_bank(rng, name):
    sizes = Sizes(load(name))
    for _ in range(200):
        n = int(rng.choice([p.n for p in sizes.config.structured.patterns]))
        fetch = sizes.fetch_blocks(n)
        least = fetch // sizes.config.structured.taps
        length = int(rng.choice([k for k in (1, 2, 4, 8, 16, 32) if least <= k <= fetch]))
        ranges = int(rng.integers(1, 5))
        mask = rng.random((int(rng.integers(1, 12)), ranges)) < 0.7
        offsets = rng.integers(0, 50, len(mask)) * length
        steps = pack_segments(mask, offsets, length, n, sizes, False)
        assert len(steps) == count_steps(mask, offsets, length, n, sizes, False)
        assert sorted(s for step in steps for s in step) == [(t, r * length) for t, r in zip(*np.nonzero(mask))]
        for step in steps:
            banks = [(offsets[t] + b + k) % sizes.banks for t, b in step for k in range(length)]
            assert len(set(banks)) == len(banks) <= fetch


def _plain_tile(job, sizes, chunk, step, group):
    """Values and indices [slots, columns] of a step, element by element."""
    s = sizes.config.structured
    values, indices = np.zeros((s.slots, s.columns), int), np.zeros((s.slots, s.columns), int)
    run, weights = step.run, job.parts[step.run.part].weights
    for j, (tap, first) in enumerate(step.segments):
        for k in range(run.segment_blocks):
            block = first + k + chunk.groups[0] * sizes.group_blocks
            if block >= chunk.groups[1] * sizes.group_blocks:
                continue
            for column in range(s.columns):
                elements = weights[group, column, tap, block]
                place = [e for e in range(s.block) if elements[e]][run.first:run.first + run.take]
                place = list(range(s.block)) if run.n == s.block else place
                for at, e in enumerate(place):
                    slot = (j * run.segment_blocks + k) * run.n + at
                    values[slot, column], indices[slot, column] = elements[e], e if elements[e] else 0
    return values, indices


@pytest.mark.parametrize("name, patterns", [("tiny", ["3:4"]), ("tiny", ["4:4", "1:4"]), ("nm64", ["5:8"]),
                                            ("nm256", ["4:8", "1:8"]), ("nm256", ["8:8"])])
def test_tiles_match_golden_packing(rng, name, patterns):
    config = load(name)
    job, sizes = _job(rng, config, channels=20, outputs=10, patterns=patterns, kernel=(2, 2))
    tiler = Tiler(job, sizes, 1)
    plan = tiler.plan()
    (chunk,) = plan.chunks
    steps = tiler.reduction.steps(chunk, plan.passes, plan.pitch, plan.cb)
    tiles = tiler.reduction.tiles(chunk, steps, plan.cb)
    for step, tile in zip(steps, tiles):
        for group in range(tile.shape[0]):
            values, indices = _plain_tile(job, sizes, chunk, step, group)
            dense = step.run.n == config.structured.block
            want = pack_tile(values, None if dense else indices, config, step.run.n)
            assert tile[group].tobytes() == want


def test_early_steps_touch_early_rows(rng):
    job, sizes = _job(rng, load("nm256"), patterns=["1:4"], pads=(1, 1, 1, 1))
    tiler = Tiler(job, sizes, 1)
    plan = tiler.plan()
    steps = tiler.reduction.steps(plan.chunks[0], plan.passes, plan.pitch, plan.cb)
    rows = [max(t for t, _ in s.segments) // 3 for s in steps]
    assert all(a <= b for a, b in pairwise(rows))


def test_table_entries(rng):
    job, sizes = _job(rng, load("tiny"), channels=4, outputs=4, patterns=["1:4"], kernel=(1, 2))
    reduction = Reduction(job, sizes)
    chunk = Chunk((0, 1), (0, 1), (0, 2))
    _, _, passes = reduction.choose((chunk,), 8, 2)
    steps = reduction.steps(chunk, passes, 8, 2)
    table = reduction.table(steps, [False] * len(steps), 8, 2, chunk)
    entry = step_entry(2).unpack(int.from_bytes(table[0, :16].tobytes(), "little"))
    assert entry == {"offset": [0, 2], "enable": [1, 1], "n_log2": 0, "segments_log2": 1, "hold": 0}
    assert Pattern(1, 4) in sizes.config.structured.patterns
