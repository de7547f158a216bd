"""golden.cycles: closed forms for small programs, bounds, and agreement with the machine's counts."""
import numpy as np
import pytest

from golden.cycles import CONSTANTS, predict, program_words
from golden.machine import Machine
from spec.config import load
from spec.derive import Sizes
from spec.formats import step_entry
from spec.isa import LinearTarget, Opcode, Unit, encode
from spec.registers import COUNTERS

TINY = load("tiny")
SIZES = Sizes(TINY)
HEADER = encode(Opcode.HEADER, digest=SIZES.digest_value, version=1)
END = encode(Opcode.END)


def memory(*entries):
    """Image with step entries at offset 0; each entry is (n_log2, hold)."""
    words = [step_entry(2).pack(offset=[0, 0], enable=[1, 0], n_log2=n, segments_log2=0, hold=h) for n, h in entries]
    data = b"".join(word.to_bytes(16, "little") for word in words)
    return np.frombuffer(data.ljust(0x1000, b"\0"), np.uint8).copy()


def executes(pixels, entries, times, **options):
    """Prediction of ``times`` EXECUTEs of ``pixels`` pixels over the same steps."""
    words = [HEADER, encode(Opcode.LOAD_LINEAR, target=LinearTarget.STEP, beats=2 * len(entries), push_execute=1)]
    words += [encode(Opcode.EXECUTE, rows=1, cols=pixels, steps=len(entries), wait_load=int(n == 0))
              for n in range(times)]
    return predict(TINY, [*words, END], memory(*entries), **options)


@pytest.mark.parametrize("pixels", [1, 4, 7, 8, 16])
@pytest.mark.parametrize("n_log2, beats", [(2, 2), (1, 3), (0, 3)])
def test_long_rows_of_steps_take_the_larger_of_pixels_and_tile(pixels, n_log2, beats):
    """The difference of two programs cancels every constant but the step's own."""
    entries, each = [(n_log2, 0)] * 16, max(pixels, beats + CONSTANTS["tile_overhead"])
    few, many = executes(pixels, entries, 20), executes(pixels, entries, 40)
    assert many.cycles - few.cycles == 20 * 16 * each
    counters = many.counters
    assert counters["EXECUTE_ISSUE"] == 40 * 16 * pixels
    first = min(pixels, beats + CONSTANTS["tile_overhead"])     # nothing hides the very first tile
    assert counters["EXECUTE_WAIT_WEIGHTS"] == 40 * 16 * (each - pixels) + first


def test_held_steps_cost_their_pixels_only():
    for held in (5, 15):
        event = executes(3, [(2, 0)] + [(2, 1)] * held, 1).events[2]
        tile = SIZES.tile_beats(4) + CONSTANTS["tile_overhead"]
        assert event.end - event.begin == tile + 3 * (1 + held) + CONSTANTS["execute_drain"]


def test_one_program_by_hand():
    """HEADER, LOAD_LINEAR of 2 beats, EXECUTE of 4 pixels and a dense tile, END: every time added up on paper.

    tiny: an instruction is 4 beats. Fetches leave at 3 + 4 i (i from 1), arrive 16 later.
    """
    result = executes(4, [(2, 0)], 1, memory_latency_cycles=16)
    load_begin = (3 + 8) + 16 + 2 + 2
    assert (result.events[1].begin, result.events[1].end) == (load_begin, load_begin + 16 + 4 + 2)
    execute = result.events[1].end + 1
    assert result.events[2].begin == execute
    assert result.events[2].end == execute + (2 + 5) + 4 + 8
    assert result.cycles == result.events[2].end + 2
    assert result.counters["READ_BEATS"] == 4 * 4 + 2


def test_instruction_fetches_take_beats_from_a_load():
    """60 beats of weights while FILLs are fetched: each fetch in the window costs its 4 beats."""
    words = [HEADER, encode(Opcode.LOAD_LINEAR, beats=60), *[encode(Opcode.FILL, rows=1, blocks=1)] * 12, END]
    load_event = predict(TINY, words, memory()).events[1]
    alone = predict(TINY, [*words[:2], END], memory()).events[1]
    # Two bursts of 8 beats under way, each 20 + 8 cycles from its address to its last beat: one begins every 14.
    assert alone.end - alone.begin == 16 + CONSTANTS["read"] + 7 * 14 + 8
    stolen = load_event.end - alone.end
    assert load_event.begin == alone.begin and 0 < stolen <= 12 * 4 and stolen % 4 == 0


def convolution(rng):
    """A program with every unit and tokens in every direction but store to execute; (words, memory)."""
    image = memory(*[(2, 0)] * 6, *[(1, 0)] * 3)
    image[0x200:] = rng.integers(0, 128, len(image) - 0x200)
    image[0x300:0x320] = 0
    linear, words = Opcode.LOAD_LINEAR, [HEADER, encode(Opcode.FILL, rows=4, blocks=10, row_step=10)]
    words += [encode(Opcode.LOAD_TILE, address=0x400, planes=2, rows=3, cols=5, plane_stride=64, row_stride=7,
                     plane_step=1, row_step=10, col_step=2),
              encode(linear, target=LinearTarget.STEP, beats=18), encode(linear, address=0x300, beats=4, target=2),
              encode(linear, address=0x600, beats=21, push_execute=1, push_store=1)]
    for n in range(6):
        words.append(encode(Opcode.EXECUTE, rows=2, cols=3, row_step=4, col_step=2, steps=9, bank=n % 2, wait_load=1,
                            push_store=1, push_load=1, wait_store=int(n >= 2)))
        words.append(encode(Opcode.STORE, address=0xA00 + 32 * n, rows=2, cols=3, row_stride=3, bank=n % 2,
                            wait_execute=1, wait_load=int(n == 0), push_execute=int(n < 4)))
        if n < 5:
            words.append(encode(linear, address=0x600, beats=21, wait_execute=1, push_execute=1))
    return [*words, encode(Opcode.BARRIER, mark=9), END], image


def test_counts_agree_with_the_machine(rng):
    words, image = convolution(rng)
    result = predict(TINY, words, image)
    run = np.zeros(0x2000, np.uint8)
    run[:0x1000] = image
    run[0x1000:0x1000 + 32 * len(words)] = np.frombuffer(b"".join(w.to_bytes(32, "little") for w in words), np.uint8)
    machine = Machine(TINY, run)
    machine.run(0x1000, len(words))
    counters = result.counters
    assert counters.keys() == {name for name, _ in COUNTERS}
    assert counters["EXECUTE_ISSUE"] == machine.counts["pixel_steps"] == 6 * 9 * 6
    assert counters["INSTRUCTIONS"] == len(words) - 3
    assert counters["STORE_BUSY"] == machine.counts["bytes_written"] // SIZES.unit_bytes
    beats = (machine.counts["bytes_read"] - 30 * 4 + machine.counts["bytes_instructions"]) // 8
    assert counters["READ_BEATS"] == beats + 6 * 3               # rows of 5 units of half a beat touch 3 beats
    assert counters["WRITE_BEATS"] == 6 * (2 + 2)                # rows of 3 units: the second begins inside a beat
    assert result.marks == ((9, result.events[-2].end),)
    assert program_words(TINY, run, 0x1000, len(words)) == words


def test_times_respect_order_and_bounds(rng):
    words, image = convolution(rng)
    last = 0
    for latency in (1, 16, 60, 200):
        result = predict(TINY, words, image, memory_latency_cycles=latency)
        counters = result.counters
        assert result.cycles > last and result.cycles >= max(counters["EXECUTE_ISSUE"], counters["READ_BEATS"])
        last = result.cycles
        for unit in (Unit.LOAD, Unit.EXECUTE, Unit.STORE):
            events = [e for e in result.events if e.unit is unit]
            assert all(a.begin <= b.begin and a.end <= b.end for a, b in zip(events, events[1:]))
        assert all(e.begin <= e.end <= result.cycles for e in result.events)
        parts = [counters[n] for n in ("EXECUTE_ISSUE", "EXECUTE_WAIT_LOAD", "EXECUTE_WAIT_STORE",
                                       "EXECUTE_WAIT_WEIGHTS", "EXECUTE_IDLE")]
        assert min(parts) >= 0 and sum(parts) == result.cycles
        assert result.utilization == counters["EXECUTE_ISSUE"] / result.cycles


def test_store_begins_after_its_execute_and_load_after_the_acknowledged_store():
    words = [HEADER, encode(Opcode.LOAD_LINEAR, target=LinearTarget.STEP, beats=2, push_execute=1),
             encode(Opcode.EXECUTE, rows=1, cols=9, steps=1, wait_load=1, push_store=1),
             encode(Opcode.STORE, rows=1, cols=9, wait_execute=1, push_load=1, push_execute=1),
             encode(Opcode.FILL, rows=1, blocks=1, wait_store=1), encode(Opcode.EXECUTE, rows=1, cols=1, steps=1,
                                                                         wait_store=1), END]
    result = predict(TINY, words, memory((2, 0)), memory_latency_cycles=50)
    execute, store, fill, second = result.events[2:6]
    assert store.end == execute.end + 1 + 9 + 6 + 50
    assert fill.begin == store.end + 1 and second.begin == store.end - 50 - 6 + 1
    assert result.counters["EXECUTE_WAIT_STORE"] > 0 and result.counters["LOAD_WAIT_TOKEN"] > 0


def test_queue_depth_holds_back_dispatch_behind_a_busy_unit():
    """Five EXECUTEs fill the queue of 4; the FILL behind them cannot be dispatched before the first has begun."""
    words = [HEADER, encode(Opcode.LOAD_LINEAR, target=LinearTarget.STEP, beats=2, push_execute=1)]
    words += [encode(Opcode.EXECUTE, rows=4, cols=4, steps=1, wait_load=int(n == 0)) for n in range(5)]
    words += [encode(Opcode.FILL, rows=1, blocks=1), END]
    result = predict(TINY, words, memory((2, 0)), memory_latency_cycles=300)
    assert result.events[7].begin > result.events[2].begin


@pytest.mark.parametrize("words, text", [
    ([HEADER], "must end with END"), ([HEADER, 0, END], "Instruction 1 must have a known"),
    ([HEADER, encode(Opcode.FILL, rows=1, blocks=1, wait_store=1), END], "token that nobody gave .store to load"),
    ([HEADER, encode(Opcode.EXECUTE, rows=1, cols=1, steps=1), END], "step entry 0, which was not loaded")])
def test_bad_programs(words, text):
    with pytest.raises(ValueError, match=text):
        predict(TINY, words, memory())
    with pytest.raises(ValueError, match="must lie in memory"):
        program_words(TINY, memory(), 0xFF0, 1)
