"""The coefficient stage for series, as Verilog with shared modules, and one slice alone."""

from dataclasses import replace
import itertools

import numpy as np
import pytest

from gen.emit import to_verilog
from hw.basis.series import SeriesSlice, SeriesStage
from sim_tests.hw.test_basis_programs import CONFIGS
from sim_tests.lib.pysim import simulate
from sim_tests.lib.simulate import run_cocotb
from spec.config import load
from spec.derive import Sizes

TINY = load("tiny_basis")


def _bits(config, bits):
    return replace(config, basis=replace(config.basis, intermediate_bits=bits))


#: IR that saturates, IR that cannot, groups of 16 in words of one group, words of more groups than there are lanes.
STAGES = {"narrow": _bits(TINY, 9), "exact": TINY, "wide": CONFIGS["wide"], "bus32": CONFIGS["bus32"]}


@pytest.mark.parametrize("name", ["narrow", "exact", "wide", "bus32"])
def test_series_stage(name, tmp_path, seed):
    config = STAGES[name]
    run_cocotb(to_verilog(SeriesStage(config=config), "series_stage"), "series_stage",
               "sim_tests.hw.tb_basis_series", 9, tmp_path, config, seed=seed)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_slice(bits, rng):
    """Every code of a lane, then random words in pixels of one to five words; registers hold without ``advance``."""
    config = _bits(TINY, bits)
    b, sizes = config.basis, Sizes(config)
    spec = sizes.intermediate
    codes = [(index, nonzero, negative) for index in range(b.group) for nonzero in (0, 1) for negative in (0, 1)]
    words = []          # (groups [lanes, group], codes, first, last)
    for lane, code in itertools.product(range(b.lanes), codes):
        other = [code if n == lane else (0, 0, 1) for n in range(b.lanes)]      # a sign without a coefficient
        words.append((rng.integers(-255, 256, (b.lanes, b.group)), other, True, True))
    for _ in range(60):
        count = int(rng.integers(1, 6))
        value, drawn = rng.choice([-255, 255, 0]), codes if rng.random() < 0.5 else codes[2::4]     # all added
        for k in range(count):
            groups = np.where(rng.random((b.lanes, b.group)) < 0.7, value, rng.integers(-255, 256, (b.lanes, b.group)))
            words.append((groups, [drawn[n] for n in rng.integers(len(drawn), size=b.lanes)], k == 0, k == count - 1))
    total = 0
    ends, values = set(), []
    for groups, code, first, last in words:
        total = (0 if first else total) + sum(int(groups[n, i]) * (-1) ** s * v for n, (i, v, s) in enumerate(code))
        if last:
            values.append((min(max(total, spec.lo), spec.hi), not spec.lo <= total <= spec.hi))
            ends.add(values[-1][0])
    assert {spec.lo, spec.hi} <= ends or bits > 12
    part = SeriesSlice(config=config)

    async def bench(ctx):
        pipe, got, at = [None, None], [], 0
        while len(got) < len(values):
            advance, offer = rng.random() < 0.7, at < len(words) and rng.random() < 0.8
            groups, code, first, last = words[at] if offer else (rng.integers(-255, 256, (b.lanes, b.group)),
                                                                 [codes[-1]] * b.lanes, True, True)
            for n in range(b.lanes):
                for i in range(b.group):
                    ctx.set(part.groups[n][i], int(groups[n, i]))
            width = sizes.lane_code_bits
            ctx.set(part.code, sum((i | v << width - 2 | s << width - 1) << n * width
                                   for n, (i, v, s) in enumerate(code)))
            ctx.set(part.advance, int(advance))
            before = pipe[0]
            ctx.set(part.add, int(before is not None))
            ctx.set(part.first, int(before is None or before[0]))
            ctx.set(part.last, int(before is None or before[1]))
            await ctx.tick()
            if not advance:
                continue
            pipe = [(first, last) if offer else None, before]
            at += offer
            if before is not None and before[1]:
                got.append((ctx.get(part.ir), bool(ctx.get(part.saturated))))
        assert got == values

    simulate(part, bench)
