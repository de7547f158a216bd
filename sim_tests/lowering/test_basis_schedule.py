"""Schedules of the first tile: what they contain, what the search finds, how good its estimate is."""
import numpy as np
import pytest

from golden.cycles import predict, program_words
from lowering import lower
from lowering.basis_schedule import END, LOADER, LOADER_BEATS, PASS, START, STORE, TOKEN, TRANSFER, Scheduler, Timeline
from sim_tests.lowering.networks import basis_convolution, check, network
from sim_tests.lowering.test_basis_tiling import _tiler
from spec.config import load
from spec.isa import Opcode, decode

#: Input rows and columns, input and output channels, stride: 3 x 3 layers of ResNet-18 at CIFAR size.
LAYERS = [(32, 64, 64, 1), (32, 64, 128, 2), (16, 128, 128, 1), (8, 256, 256, 1), (8, 256, 512, 2), (4, 512, 512, 1)]


def _one_of_group(rng, outputs, channels, group=16, count=6):
    """Coefficients with one non-zero in each channel group: a single term 1:group."""
    places = rng.integers(0, group, (outputs, channels // group, count))
    signs = rng.choice([-1, 1], places.shape)
    return (signs[:, :, None] * (np.arange(group)[None, None, :, None] == places[:, :, None])).astype(np.int8).reshape(
        outputs, channels, count)


def _network(rng, size, channels, outputs, stride):
    layer, out = basis_convolution(rng, size=(size, size), channels=channels, outputs=outputs, count=6,
                                   stride=(stride, stride), pads=(1, 1, 1, 1))
    layer.coefficients[:] = _one_of_group(rng, outputs, channels)
    return network((size, size), channels, [layer], [out])


def _cycles(lowered):
    words = program_words(lowered.config, lowered.image, lowered.program_offset, lowered.instruction_count)
    return predict(lowered.config, words, lowered.image, program_offset=lowered.program_offset).cycles


def _rectangle(strip):
    y, n, x, m = strip
    return {(r, c) for r in range(y, y + n) for c in range(x, x + m)}


def _check_covers(plan, groups):
    """Each output of each group and image once, by strips that fit, behind the transfers of all they read."""
    covered = {}
    for step in plan.schedule.steps:
        fresh = _rectangle(step.strip)
        mine = covered.setdefault((step.image, step.group), set())
        assert not mine & fresh
        mine |= fresh
    assert len(covered) == groups * (1 if plan.merged else plan.images)
    assert all(len(outputs) == plan.rows * plan.cols for outputs in covered.values())


@pytest.mark.parametrize(("size", "channels", "outputs", "stride"), LAYERS)
def test_estimate_is_near_the_cycle_model(rng, size, channels, outputs, stride):
    lowered = lower(_network(rng, size, channels, outputs, stride), load("basis288"))
    plan = lowered.layers[0].plan
    _check_covers(plan, outputs // 16)
    assert plan.cost_cycles == pytest.approx(_cycles(lowered), rel=0.03)


def test_strips_grow_with_what_is_loaded(rng):
    """Full strips at once would wait for more than half of the input."""
    lowered = lower(_network(rng, 32, 64, 128, 2), load("basis288"))
    plan = lowered.layers[0].plan
    first = [step.strip for step in plan.schedule.steps if step.group == 0]
    sizes = [n * m for _, n, _, m in first]
    assert sizes[0] * 8 <= max(sizes) and len(first) <= 10
    # half of the rows: less than half of the wait for full strips of 8 rows, 17 x 32 x 4 units
    code = [decode(w) for w in program_words(lowered.config, lowered.image, lowered.program_offset,
                                             lowered.instruction_count)]
    at = next(k for k, (op, _) in enumerate(code) if op == Opcode.EXECUTE_BASIS)
    units = sum(f["planes"] * f["rows"] * f["cols"] for op, f in code[:at] if op == Opcode.LOAD_TILE)
    assert units * 4 < 17 * 32 * 4
    assert _cycles(lowered) < 9800          # the coefficient stage alone: 8192


def test_search_beats_the_simple_schedule(rng):
    tiler = _tiler(rng, load("basis288"), size=(16, 16), channels=128, outputs=128, count=6, density=0.02,
                   pads=(1, 1, 1, 1))
    plan = tiler.plan()
    scheduler = Scheduler(tiler, plan, tiler.window(0, 0, 16), tiler.window(1, 0, 16))
    simple, regular, best = scheduler.simple(), scheduler.best(thorough=False), scheduler.best()
    assert best.cycles <= regular.cycles < simple.cycles and plan.schedule.cycles == best.cycles


@pytest.mark.parametrize("name", ["tiny_basis", "tiny_maps", "basis252"])
@pytest.mark.parametrize("batch", [1, 3])
def test_all_choices_load_the_tile_once(rng, name, batch):
    """Each neighbour of a choice loads every pixel of the tile once."""
    config = load(name)
    tiler = _tiler(rng, config, size=(9, 8), channels=12, outputs=12, pads=(1, 1, 1, 1), density=0.1, batch=batch,
                   intermediate_bits=config.basis.intermediate_bits)
    plan = tiler.plan()
    scheduler = Scheduler(tiler, plan, tiler.window(0, 0, plan.rows), tiler.window(1, 0, plan.cols))
    seed = scheduler.full, (4, 8) if scheduler._cuttable() else (), 1, False
    choices = {seed, *scheduler._neighbours(seed)}
    assert len(choices) > 3
    for heights, cuts, _, _ in choices:
        assert sum(heights) == plan.rows and all(1 <= h <= plan.strip_rows for h in heights)
        levels = scheduler.levels(heights, cuts)
        loaded = {}
        for before, level in zip([None, *levels], levels):
            for t, units in scheduler.transfers(0, before, level):
                fresh = {(t.image, r, c) for r in range(t.begin, t.end)
                         for c in range(t.first_col, t.first_col + (t.cols or scheduler.cols.data))}
                assert units == len(fresh) * tiler.job.span and not fresh & loaded.keys()
                loaded |= dict.fromkeys(fresh)
        rows = scheduler.rows.extent if tiler.job.border else scheduler.rows.data
        assert len(loaded) == rows * scheduler.cols.data * scheduler.images


def test_columns_of_the_first_rows_are_loaded_first(rng):
    """The exact result with cut columns, of which passes and transfers touch only their own."""
    net = _network(rng, 32, 64, 64, 1)
    lowered, _ = check(net, load("basis288"), rng)
    plan = lowered.layers[0].plan
    transfers = [t for before in plan.schedule.before for t in before if t.cols]
    assert transfers and all(t.begin == 0 for t in transfers)
    assert plan.schedule.steps[0].strip[3] < 32


def test_weights_that_do_not_fit_are_loaded_once(rng):
    """More than the buffer: one output group after the other."""
    net = _network(rng, 8, 512, 512, 1)
    coefficients, others = net.layers[0].coefficients, _one_of_group(rng, 512, 512)
    coefficients[coefficients == 0] = others[coefficients == 0]
    lowered = lower(net, load("basis288"))
    info = lowered.layers[0]
    code = [decode(w) for w in program_words(lowered.config, lowered.image, lowered.program_offset,
                                             lowered.instruction_count)]
    beats = sum(f["beats"] for op, f in code if op == Opcode.LOAD_LINEAR)
    assert info.weight_bytes > load("basis288").memory.weight_bytes and not info.plan.strips_first
    assert beats * 64 == info.weight_bytes + 512 * 8
    groups = [step.group for step in info.plan.schedule.steps]
    assert groups == sorted(groups)


def test_timeline():
    time = Timeline()
    there = time.transfer(100)
    assert there == START + 100 + TRANSFER + TOKEN
    time.item(there, [(50, 20)], 16)
    begin = there + 20 + LOADER_BEATS
    assert (time.begin, time.end) == (begin, begin + 50 + PASS)
    assert time.stored == time.end + 16 + STORE == time.banks[0]
    # its loader worked meanwhile
    time.item(0, [(10, 0)], 16)
    assert time.begin == begin + 50 + PASS and LOADER < 50
    # bank 0 is free only when it has been stored
    time.item(0, [(1, 0)], 1)
    assert time.begin == begin + 50 + PASS + 16 + STORE
    assert time.begins == [there, begin, begin + 50 + PASS] and END > 0
