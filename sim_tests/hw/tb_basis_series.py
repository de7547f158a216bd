"""The coefficient stage for series under idle and stall, against plain sums: values, saturations, cycles, loads."""

import itertools

import cocotb
from cocotb.triggers import FallingEdge, ReadOnly
import numpy as np

from golden.coefficients import pack_series
from hw.basis.series import SeriesStage
from sim_tests.hw.tb_map_stage import formats
from sim_tests.lib.scoreboard import Scoreboard
from sim_tests.lib.simulate import config_of_run
from sim_tests.lib.streams import Sink, Source, exchange, start
from spec.derive import Sizes, ceil_div


def pattern_words(config, groups, terms):
    """[(n_log2, first channel group)] of each stream word of a pixel, in order."""
    sizes = Sizes(config)
    return [(n.bit_length() - 1, w * sizes.series_fetch(n)) for n in terms
            for w in range(ceil_div(groups, sizes.series_fetch(n)))]


def possible(config):
    """(groups, terms) that fit the coefficient memory: every N alone, then series of several terms."""
    b = config.basis
    ns = [1 << k for k in range(b.group.bit_length())]
    series = [(n,) for n in ns] + list(itertools.product(ns, repeat=2)) + [(1, 2, 1), (1, 1, 1, 1)]
    return [(groups, terms) for terms in series for groups in range(1, Sizes(config).coefficient_groups + 1)
            if len(pattern_words(config, groups, terms)) <= b.coefficient_rows]


def with_sum(total, shape):
    """Activations in -255..255 of this shape that add up to ``total``."""
    out = np.zeros(int(np.prod(shape)), int)
    for k in range(out.size):
        out[k] = np.clip(total, -255, 255)
        total -= out[k]
    assert not total
    return out.reshape(shape)


def job(config, rng, groups, terms):
    """(terms, coefficients [blocks, slices, groups, group], pixels): the ends of IR at and one beyond them first."""
    b, spec = config.basis, Sizes(config).intermediate
    shape, most = (b.blocks, b.slices, groups, b.group), min(sum(terms), b.group)
    coefficients = rng.choice([-1, 1], shape) * (rng.random(shape) < rng.choice([0, 0.3, 1]))
    coefficients *= np.argsort(rng.random(shape), axis=-1) < most
    first, last = rng.choice([[1, -1], [-1, 1]])
    coefficients.reshape(-1, groups, b.group)[0] = first * (np.arange(b.group) < most)
    coefficients.reshape(-1, groups, b.group)[-1] = last * (np.arange(b.group) < most)
    pixels = [np.full(shape[2:], v) for v in (255, -255, 0)]
    for value in (spec.hi, spec.hi + 1, spec.lo, spec.lo - 1, -spec.lo, -spec.lo + 1):
        if abs(value) <= 255 * groups * most:
            pixel = np.zeros(shape[2:], int)
            pixel[:, :most] = with_sum(value, (groups, most))
            pixels.append(pixel)
    for k in range(6):
        pixel = np.where(rng.random(shape[2:]) < 0.3, rng.choice([-255, 255, -1, 1], shape[2:]),
                         rng.integers(-255, 256, shape[2:]))
        pixels.append(pixel * (rng.random(shape[2:]) < (0.3, 1)[k % 2]))
    return terms, coefficients, pixels


def words_of(config, rng, pixel, terms, half):
    """Stream words of a pixel as dicts; groups beyond the pixel's, and beyond those that the term takes: anything."""
    b = config.basis
    order, out = pattern_words(config, len(pixel), terms), []
    for number, (n_log2, first) in enumerate(order):
        word = rng.integers(-256, 256, (b.stream_groups, b.group))
        part = pixel[first:first + b.stream_groups]
        word[:len(part)] = part
        out.append({"word": word.ravel().tolist(), "row": number, "half": half, "n_log2": n_log2,
                    "last": int(number == len(order) - 1)})
    return out


def with_garbage(config, rng, data):
    """Packed tiles in which lanes without a coefficient have any place and any sign: only "non-zero" counts."""
    z, b = Sizes(config), config.basis
    size, width, codes = z.series_tile_beats * z.beat_bytes, z.lane_code_bits, z.basis_slices * b.lanes
    out = b""
    for at in range(0, len(data), size):
        tile = int.from_bytes(data[at:at + size], "little")
        for lane in range(codes):
            if not tile >> lane * width + width - 2 & 1:
                tile |= int(rng.integers(1 << width)) % (1 << width - 2) << lane * width
                tile |= int(rng.integers(2)) << lane * width + width - 1
        out += tile.to_bytes(size, "little")
    return out


def expected(config, coefficients, pixel):
    """IR of all slices and how many of them were clamped."""
    spec = Sizes(config).intermediate
    exact = [int((c * pixel).sum()) for c in coefficients.reshape(-1, *pixel.shape)]
    clamped = [min(max(v, spec.lo), spec.hi) for v in exact]
    return {"ir": clamped, "saturated": sum(a != b for a, b in zip(exact, clamped))}


async def run(dut, jobs, *, idle, stall):
    """Jobs, each loaded while the words of the one before pass; returns cycles of (word, last), results, beats."""
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    word_format, out_format = formats(config)
    source, load, sink = Source(dut, "i", idle=idle), Source(dut, "load", idle=idle), Sink(dut, "o", stall=stall)
    board, took, gave, busy, beats_at, last_words = Scoreboard("pixel"), [], [], set(), [], []
    state = {"next": 0, "start": None, "under_way": 0}
    await start(dut, (source, load, sink), load_start=0, load_half=0, load_groups=0)

    def begin(cycle):
        number, (terms, coefficients, _) = state["next"], jobs[state["next"]]
        data = with_garbage(config, rng, bytes(pack_series(coefficients.astype(np.int8), config, terms)))
        beat = config.bus.data_bits // 8
        dut.load_start.value, dut.load_half.value = 1, number % 2
        state["start"] = cycle
        state["beats"] = [int.from_bytes(data[k:k + beat], "little") for k in range(0, len(data), beat)]

    def end_load():
        number = state["next"]
        terms, coefficients, pixels = jobs[number]
        for pixel in pixels:
            source.words.extend(word_format.pack(**w) for w in words_of(config, rng, pixel, terms, number % 2))
            board.expect(expected(config, coefficients, pixel))
        last_words.append(source.taken + len(source.words))
        state["next"], state["start"] = number + 1, None

    def drive(cycle):
        assert dut.loaded.value and not dut.error.value
        if state["start"] is None:
            number = state["next"]
            # the half must be free: every word of two jobs ago was taken
            if number < len(jobs) and (number < 2 or source.taken >= last_words[number - 2]):
                begin(cycle)
        elif cycle == state["start"] + 1:
            dut.load_start.value = 0
            load.words.extend(state["beats"])
        elif not load.words:
            end_load()
        if state["start"] != cycle:
            dut.load_half.value, dut.load_groups.value = int(rng.integers(2)), int(rng.integers(256))
        state["under_way"] += bool(load.words and source.words)

    async for cycle, port, value in exchange(dut, (source, load, sink), rng=rng, watch=("busy",), on_cycle=drive,
                                             until=lambda: state["next"] == len(jobs)):
        if port == "i":
            took.append((cycle, word_format.unpack(value)["last"]))
        elif port == "load":
            beats_at.append(cycle)
        elif port == "o":
            gave.append(cycle)
            board.observe(out_format.unpack(value))
        elif port == "busy":
            busy.add(cycle)
    board.close(sum(len(pixels) for *_, pixels in jobs))
    firsts = [c for (c, _), (_, before) in zip(took, [(0, 1), *took]) if before]
    inside = set()
    for first, last in zip(firsts, gave, strict=True):
        inside.update(range(first + 1, last + 1))
    assert busy == inside, f"busy differs in cycles {sorted(busy ^ inside)[:5]}"
    assert state["under_way"] > 0, "no load while words pass"
    return took, gave, beats_at


@cocotb.test(timeout_time=4, timeout_unit="ms")
@cocotb.parametrize(idle=[0.0, 0.4], stall=[0.0, 0.4, 0.95])
async def matches_reference(dut, idle, stall):
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    choices = possible(config)
    picks = rng.permutation(len(choices))[:4 if stall > 0.5 else 12]
    await run(dut, [job(config, rng, *choices[k]) for k in picks], idle=idle, stall=stall)


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def every_pattern_alone(dut):
    """Each N with the fewest and the most groups: every lane selection."""
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    of_n = {}
    for groups, terms in possible(config):
        if len(terms) == 1:
            of_n.setdefault(terms, []).append(groups)
    assert len(of_n) >= config.basis.group.bit_length() - 1
    jobs = [job(config, rng, groups, terms) for terms, all_groups in of_n.items()
            for groups in (min(all_groups), max(all_groups))]
    await run(dut, jobs, idle=0.1, stall=0.1)


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def meets_rate_and_latency(dut):
    """One word and one beat per cycle without a gap, the pixel `SeriesStage.latency` cycles after its last word."""
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    choices = possible(config)
    jobs = [job(config, rng, *choices[k]) for k in rng.integers(len(choices), size=8)]
    took, gave, beats_at = await run(dut, jobs, idle=0.0, stall=0.0)
    assert [b - c for (c, last), b in zip([t for t in took if t[1]], gave, strict=True)] == \
        [SeriesStage.latency] * len(gave)
    gaps = [b - a for (a, _), (b, _) in itertools.pairwise(took)]
    assert sum(g != 1 for g in gaps) <= len(jobs) - 1, "a gap within a job"
    assert sum(b - a != 1 for a, b in itertools.pairwise(beats_at)) <= len(jobs) - 1, "a gap within a load"


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def holds_three_pixels(dut):
    """With ``o`` blocked three pixels of one word each are taken, and all come out when it opens."""
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    b = config.basis
    word, out = formats(config)
    zeros = [0] * (b.stream_groups * b.group)
    source = Source(dut, "i", [word.pack(word=zeros, row=0, half=0, n_log2=0, last=1)] * 8)
    sink = Sink(dut, "o", stall=1.0)
    await start(dut, (source, sink), load_start=0, load__valid=0)
    for cycle in range(20):
        await FallingEdge(dut.clk)
        source.drive(rng)
        sink.drive(rng)
        await ReadOnly()
        source.sample(cycle)
        sink.sample(cycle)
    assert source.taken == SeriesStage.latency and sink.offered and dut.busy.value
    await FallingEdge(dut.clk)
    sink.stall = 0.0
    given = [out.unpack(v) async for _, port, v in exchange(dut, (source, sink), rng=rng) if port == "o"]
    assert given == [{"ir": [0] * (b.blocks * b.slices), "saturated": 0}] * 8 and not dut.busy.value
