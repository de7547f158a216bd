"""One slice: what the lanes take in every cycle, running sums, saturation, cycles, under any gaps."""
import itertools

import numpy as np
import pytest

from golden.concentration import word_cycles
from hw.basis.concentrator import Concentrator
from sim_tests.hw.basis_reference import CONFIGS, concentrate, random_activations, random_coefficients
from sim_tests.lib.pysim import simulate
from spec.derive import Sizes


def to_bits(rows):
    """Bits in order, the first lowest."""
    return sum(int(bool(v)) << k for k, v in enumerate(np.ravel(rows)))


def run(config, pixels, rng, *, gaps):
    """Add up ``pixels``, lists of (coefficients, activations) [stream_groups, group]; compare every partial sum.

    Returns the saturated pixels' number and the picks of each word.
    """
    unit, sizes = Concentrator(config=config), Sizes(config)
    lo, hi = sizes.intermediate.lo, sizes.intermediate.hi
    picks, saturated = [], 0

    async def bench(ctx):
        nonlocal saturated
        waiting, total = None, 0        # what the lanes took last: (sum, first of its pixel)

        async def cycle(pick=None):
            """One cycle, with ``pick`` = (sum of what is taken, first of its pixel) or without."""
            nonlocal waiting, total
            add = waiting is not None and (pick is not None or not gaps or rng.random() < 0.5)
            ctx.set(unit.pick, pick is not None)
            ctx.set(unit.add, add)
            ctx.set(unit.fresh, waiting[1] if add else int(rng.integers(2)))
            await ctx.tick()
            if add:
                total = waiting[0] + (0 if waiting[1] else total)
                assert ctx.get(unit.ir) == min(max(total, lo), hi)
                assert ctx.get(unit.saturated) == (not lo <= total <= hi)
                waiting = None
            if pick is not None:
                waiting = pick

        for pixel in pixels:
            fresh = True
            for coefficients, activations in pixel:
                ctx.set(unit.map.as_value(), to_bits(coefficients != 0))
                # signs of zeros do not matter
                noise = rng.integers(2, size=coefficients.shape) & (coefficients == 0)
                ctx.set(unit.sign.as_value(), to_bits((coefficients < 0) | noise))
                ctx.set(unit.nonzero.as_value(), to_bits(activations != 0))
                ctx.set(unit.word.as_value(), to_bits(
                    [[a >> k & 1 for a in group] for group in activations for k in range(sizes.operand.bits)]))
                ctx.set(unit.first, 1)
                taken = concentrate(config, (coefficients != 0) & (activations != 0)) or [[]]
                for n, now in enumerate(taken):
                    while gaps and rng.random() < gaps:
                        await cycle()
                    assert ctx.get(unit.done) == (n == len(taken) - 1), f"cycle {n} of {len(taken)}"
                    await cycle((sum(int(coefficients[g][c] * activations[g][c]) for _, g, c in now), fresh))
                    ctx.set(unit.first, 0)
                    fresh = False
                assert ctx.get(unit.done)
                picks.append(len(taken))
            while waiting is not None:
                await cycle()
            assert total == sum(int((c * a).sum()) for c, a in pixel)
            saturated += not lo <= total <= hi

    simulate(unit, bench)
    return saturated, picks


@pytest.mark.parametrize("gaps", [0, 0.5])
@pytest.mark.parametrize("name", CONFIGS)
def test_matches_the_rule(name, gaps, rng):
    config = CONFIGS[name]
    b = config.basis
    shape = b.stream_groups, b.group
    extremes = [np.full(shape, v) for v in (255, -255)]
    pixels = [[(np.full(shape, c), a)] * n for c in (1, -1) for a in extremes for n in (1, b.coefficient_rows)]
    one = np.zeros(shape, int)
    pixels += [[(one, a), (np.full(shape, 1), one)] for a in extremes]       # no coefficient; no activation
    for place in rng.permutation(one.size)[:24]:
        single = one.copy()
        single.flat[place] = rng.choice([-1, 1])
        pixels.append([(single, random_activations(rng, shape, 1))])
    for n in range(40):
        words = int(rng.integers(1, 4))
        pixels.append([(random_coefficients(rng, shape, (0.15, 0.4, 0.7, 1)[n % 4]),
                        random_activations(rng, shape, (0.5, 0.9)[n // 4 % 2])) for _ in range(words)])
    saturated, picks = run(config, pixels, rng, gaps=gaps)
    golden = [max(1, int(word_cycles((c != 0) & (a != 0), look_aside=b.look_aside))) for p in pixels for c, a in p]
    assert picks == golden and len(set(picks)) > (1 if b.stream_groups > 1 else 0)
    assert max(picks) == b.stream_groups and min(picks) == 1
    if name == "plain":     # IR of 20 bits holds any sum
        assert saturated == 0
    elif name != "aside2":
        assert saturated > 3


@pytest.mark.parametrize("name", ["tiny", "plain"])
def test_every_pattern_of_matches(name, rng):
    config = CONFIGS[name]
    shape = config.basis.stream_groups, config.basis.group
    pixels = []
    for matches in itertools.product((0, 1), repeat=shape[0] * shape[1]):
        signs = rng.choice([-1, 1], shape)
        pixels.append([(np.reshape(matches, shape) * signs, random_activations(rng, shape, 1) | 1)])
    run(config, pixels, rng, gaps=0)
