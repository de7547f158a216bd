"""The coefficient stage for maps under idle and stall, against plain Python: values, counts, cycles, loads, errors."""

import itertools

import cocotb
from cocotb.triggers import FallingEdge, ReadOnly
import numpy as np

from hw.basis.map_decoder import MapDecoder
from hw.basis.maps import MapStage
from sim_tests.hw.basis_reference import (
    intermediates,
    pack,
    random_activations,
    random_coefficients,
    rows,
    segment_table,
    to_beats,
    to_words,
    visits,
    word_cycles,
)
from sim_tests.lib.scoreboard import Scoreboard
from sim_tests.lib.simulate import config_of_run
from sim_tests.lib.streams import Sink, Source, exchange, start
from spec.config import IntSpec
from spec.derive import Sizes
from spec.formats import BIT, Field, Record, unsigned


def formats(config):
    """Records of a word and of a pixel's IR."""
    b, sizes = config.basis, Sizes(config)
    word = Record("i", (
        Field("word", sizes.operand, b.stream_groups * b.group, ""),
        Field("row", unsigned((b.coefficient_rows - 1).bit_length()), None, ""), Field("half", BIT, None, ""),
        Field("n_log2", unsigned(3), None, ""), Field("last", BIT, None, "")))
    out = Record("o", (Field("ir", IntSpec(b.intermediate_bits), sizes.basis_slices, ""),
                       Field("saturated", unsigned(sizes.basis_slices.bit_length()), None, "")))
    return word, out


def jobs(config, rng, count):
    """(coefficients [blocks, slices, groups, group], list of pixels [groups, group]): ends and zeros first."""
    b, most = config.basis, Sizes(config).coefficient_groups
    for n in range(count):
        groups = (most, 1, b.stream_groups, most)[n] if n < 4 else int(rng.integers(1, most + 1))
        shape = b.blocks, b.slices, groups, b.group
        if n == 0:
            # one sign in each slice
            coefficients = np.ones(shape, int) * random_coefficients(rng, (*shape[:2], 1, 1), 1)
            coefficients[0], coefficients[1] = -1, 1
        elif n == 1:
            coefficients = np.zeros(shape, int)
        elif n == 2:
            coefficients = np.zeros(shape, int)
            coefficients.flat[rng.integers(coefficients.size)] = -1
        else:
            coefficients = random_coefficients(rng, shape, (0.1, 0.4, 0.8)[n % 3])
        pixels = [np.full(shape[2:], v) for v in (255, -255, 0)]
        pixels += [random_activations(rng, shape[2:], (0.2, 0.6, 1)[k % 3]) for k in range(8)]
        yield coefficients, [pixels[k] for k in rng.permutation(len(pixels))]


def stream(config, pixel, half, rng):
    """Words of one pixel as dicts and their activations [stream_groups, group]."""
    b = config.basis
    words = rows(config, pixel[None])[:, 0]
    return [({"word": w.ravel().tolist(), "row": n, "half": half, "n_log2": int(rng.integers(8)),
              "last": int(n == len(words) - 1)}, w.reshape(b.stream_groups, b.group)) for n, w in enumerate(words)]


async def run(dut, *, idle, stall, count):
    """Run jobs, each with its load while the words of the one before pass; all results and cycles compared."""
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    word_format, out_format = formats(config)
    source, load, sink = Source(dut, "i", idle=idle), Source(dut, "load", idle=idle), Sink(dut, "o", stall=stall)
    todo, board = list(jobs(config, rng, count)), Scoreboard("pixel")
    cycles, expected_load, load_cycles, shared = [], [], [], 0        # cycles of each word; of each load
    starts, job_ends, took, gave, busy = [], [], [], [], set()
    state = {"loading": False, "given": 0, "under_way": 0}
    await start(dut, (source, load, sink), load_start=0, load_half=0, load_groups=0, load_beats=0)

    def begin(cycle):
        number = len(starts)
        coefficients, _ = todo[number]
        dut.load_start.value, dut.load_half.value, dut.load_groups.value = 1, number % 2, coefficients.shape[2]
        dut.load_beats.value = len(pack(config, coefficients))
        state["loading"] = True
        starts.append(cycle)

    def end_load(cycle):
        number = len(starts) - 1
        coefficients, pixels = todo[number]
        load_cycles.append(cycle - starts[-1])
        state["loading"] = False
        for pixel in pixels:
            for word, activations in stream(config, pixel, number % 2, rng):
                source.words.append(word_format.pack(**word))
                of_word = [rows(config, c)[word["row"]] for c in coefficients]
                cycles.append(word_cycles(config, np.concatenate(of_word), activations))
            ir, saturated = intermediates(config, np.concatenate(coefficients), pixel)
            board.expect({"ir": ir, "saturated": saturated})
        job_ends.append((job_ends[-1] if job_ends else 0) + len(pixels))

    def drive(cycle):
        if starts and cycle == starts[-1] + 1:
            dut.load_start.value = 0
            load.words.extend(pack(config, todo[len(starts) - 1][0]))
            assert not dut.loaded.value
        elif state["loading"] and dut.loaded.value:
            assert not load.words, "loaded before the last beat"
            end_load(cycle)
        elif not state["loading"] and len(starts) < len(todo):
            # the half must be free: every pixel of two jobs ago is out
            if len(starts) < 2 or state["given"] >= job_ends[len(starts) - 2]:
                begin(cycle)
        if not (starts and cycle == starts[-1]):
            dut.load_half.value, dut.load_groups.value = int(rng.integers(2)), int(rng.integers(256))
            dut.load_beats.value = int(rng.integers(1 << 16))
        state["under_way"] += state["loading"] and bool(source.words)

    async for cycle, port, value in exchange(
            dut, (source, load, sink), rng=rng, watch=("busy", "error"), on_cycle=drive,
            until=lambda: len(starts) == len(todo) and not state["loading"]):
        assert port != "error", f"cycle {cycle}: error"
        if port == "i":
            took.append((cycle, word_format.unpack(value)["last"]))
        elif port == "o":
            gave.append(cycle)
            state["given"] += 1
            board.observe(out_format.unpack(value))
        elif port == "busy":
            busy.add(cycle)
    planned = sum(len(pixels) for _, pixels in todo)
    board.close(planned)

    firsts = [c for (c, _), (_, before) in zip(took, [(0, 1), *took]) if before]
    inside = set()
    for first, last in zip(firsts, gave, strict=True):
        inside.update(range(first + 1, last + 1))
    assert busy == inside, f"busy differs in cycles {sorted(busy ^ inside)[:5]}"
    assert state["under_way"] > 10, "no load while words pass"
    for coefficients, _ in todo:
        lengths = [len(to_words(config, c)) for c in coefficients]
        at, ends, beats = len(segment_table(config, lengths)), [], visits(config, lengths)
        for words, own in zip(lengths, beats):
            ends.append(words + max(-(-coefficients.shape[2] // config.basis.stream_groups), at + 2))
            at += own
        shared += sum(beats) > len(to_beats(config, [0] * sum(lengths)))
        expected_load.append(MapStage.load_overhead + max(ends) if max(beats) <= MapDecoder.fifo_beats else None)
    assert shared, "no beat was shared"
    return cycles, took, gave, load_cycles, expected_load


@cocotb.test(timeout_time=4, timeout_unit="ms")
@cocotb.parametrize(idle=[0.0, 0.4], stall=[0.0, 0.4, 0.95])
async def matches_reference(dut, idle, stall):
    await run(dut, idle=idle, stall=stall, count=5 if stall > 0.5 else 10)


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def meets_rate_latency_and_load_time(dut):
    """Each word takes exactly the cycles of its slowest slice, without a gap, while coefficients load."""
    cycles, took, gave, load_cycles, expected_load = await run(dut, idle=0.0, stall=0.0, count=16)
    assert len(cycles) == len(took)
    gaps = [(b - a, n) for n, ((a, _), (b, _)) in enumerate(itertools.pairwise(took))]
    late = [(n, gap, cycles[n]) for gap, n in gaps if gap != cycles[n]]
    # between two jobs the next words may not be there yet
    assert len(late) <= 15 and all(gap > want and took[n][1] for n, gap, want in late), late[:5]
    ends = [(cycle, cycles[n]) for n, (cycle, last) in enumerate(took) if last]
    assert [b - a for (a, _), b in zip(ends, gave, strict=True)] == [MapStage.latency + n - 1 for _, n in ends]
    compared = [(got, want) for got, want in zip(load_cycles, expected_load, strict=True) if want is not None]
    assert compared and all(got == want for got, want in compared), compared


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def waits_with_two_pixels_and_two_words(dut):
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    word, _ = formats(config)
    zeros = [0] * (config.basis.stream_groups * config.basis.group)
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
    assert source.taken == 4 and sink.offered and dut.busy.value
    await FallingEdge(dut.clk)
    sink.stall = 0.0
    given = [port async for _, port, _ in exchange(dut, (source, sink), rng=rng) if port == "o"]
    assert len(given) == 8 and not dut.busy.value


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def refuses_malformed_loads(dut):
    """Every error is held, beats are swallowed, ``loaded`` does not come, words pass."""
    config, rng = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED)
    b, sizes = config.basis, Sizes(config)
    word, _ = formats(config)
    groups = 2
    coefficients = random_coefficients(rng, (b.blocks, b.slices, groups, b.group), 0.6)
    good = pack(config, coefficients)
    table = len(segment_table(config, [0]))
    lengths = [len(to_words(config, c)) for c in coefficients]
    ones = (1 << config.bus.data_bits) - 1
    # whole beats, so that only the decoders see what is wrong
    per_beat = config.bus.data_bits // b.group
    full = segment_table(config, [2 * per_beat] * b.blocks) + [ones] * (2 * b.blocks)
    few = segment_table(config, [1] * b.blocks) + to_beats(config, [1] * b.blocks)

    def table_with(block, length):
        return segment_table(config, [*lengths[:block], length, *lengths[block + 1:]]) + good[table:]

    # name -> (groups, beats, second start behind so many beats, whether it fails, [beats told if others])
    kinds = {
        "good": (groups, good, 0, False),
        "another one good": (groups, pack(config, coefficients[::-1]), 0, False),
        "no groups": (0, good, 0, True),
        "too many groups": (sizes.coefficient_groups + 1, good, 0, True),
        "first segment of no words": (groups, table_with(0, 0), 0, True),
        "segment of no words": (groups, table_with(1, 0), 0, True),
        "last segment of no words": (groups, table_with(b.blocks - 1, 0), 0, True),
        "first segment a word too long": (groups, table_with(0, lengths[0] + 1), 0, True),
        "first segment a word too short": (groups, table_with(0, lengths[0] - 1), 0, True),
        "last segment a word too long": (groups, table_with(b.blocks - 1, lengths[-1] + 1), 0, True),
        "last segment a word too short": (groups, table_with(b.blocks - 1, lengths[-1] - 1), 0, True),
        "a beat more than there are": (groups, table_with(b.blocks - 1, lengths[-1] + per_beat), 0, True),
        "huge segment": (groups, table_with(0, 65535), 0, True),
        "huge last segment": (groups, table_with(b.blocks - 1, 65535), 0, True),
        "bits beyond the groups": (groups, full, 0, True),
        "one word of many": (groups, few, 0, True),
        "a beat too many": (groups, [*good, 0], 0, True),
        "a beat too many, not told": (groups, [*good, 0], 0, True, len(good)),
        "a beat too many told": (groups, good, 0, True, len(good) + 1),
        "a beat too few told": (groups, good, 0, True, len(good) - 1),
        "a beat too few": (groups, good[:-1], 0, True),
        "the table alone": (groups, good[:table], 0, True),
        "no beats told": (groups, good, 0, True, 0),
        "a late beat": (groups, good, 0, True),
        "a second start": (groups, good, table, True),
        "no start": (None, good, 0, True),
    }
    for name, (of_load, beats, again, fails, *told) in kinds.items():
        load, source, sink = Source(dut, "load", idle=0.2), Source(dut, "i"), Sink(dut, "o")
        await start(dut, (source, load, sink), load_start=0, load_half=0, load_groups=0, load_beats=0)
        seen = {"error": None, "loaded": 0}

        def drive(cycle):
            restart = again and load.taken == again
            dut.load_start.value = int((cycle == 2 and of_load is not None) or restart)
            dut.load_groups.value = of_load or 0
            dut.load_beats.value = told[0] if told else len(beats)
            if cycle == 3:
                load.words.extend(beats)
            if cycle == 300:
                load.words.extend([0] * 60 if fails else [])
                source.words.append(word.pack(word=[1] * (b.stream_groups * b.group), row=0, half=1, n_log2=0, last=1))
            seen["loaded"] += int(dut.loaded.value)
            if dut.error.value and seen["error"] is None:
                seen["error"] = cycle
            assert seen["error"] is None or dut.error.value, f"{name}: error was not held"
            seen["cycle"] = cycle

        async for _ in exchange(dut, (source, load, sink), rng=rng, on_cycle=drive, limit=2000,
                                until=lambda: seen["cycle"] > 500):
            pass
        assert (seen["error"] is not None) == fails, f"{name}: error is {seen['error']}"
        assert bool(seen["loaded"]) == (not fails or name == "a late beat"), name
        assert load.taken == len(beats) + 60 * fails, f"{name}: {load.taken} beats taken"
        assert source.taken == sink.taken == 1, f"{name}: words do not pass"
