"""golden.cycles: closed forms for small programs, bounds, and agreement with the machine's counts."""
from dataclasses import replace

import numpy as np
import pytest

from golden.cycles import EXECUTE_LATENCY, predict, program_words
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


@pytest.mark.parametrize("pixels", [1, 2, 4, 7, 8, 16])
@pytest.mark.parametrize("n_log2, beats", [(2, 2), (1, 3), (0, 3)])
def test_long_rows_of_steps_take_the_larger_of_pixels_and_tile(pixels, n_log2, beats):
    """The difference of two programs cancels everything but the steps: 5 cycles a tile beside its beats."""
    entries, each = [(n_log2, 0)] * 16, max(pixels, beats + 5)
    few, many = executes(pixels, entries, 20), executes(pixels, entries, 40)
    # the first step of the next EXECUTE costs no more: it is taken the cycle after the last step was accepted
    assert many.cycles - few.cycles == 20 * 16 * each
    assert many.counters["EXECUTE_ISSUE"] == 40 * 16 * pixels
    waited = many.counters["EXECUTE_WAIT_WEIGHTS"] - few.counters["EXECUTE_WAIT_WEIGHTS"]
    assert waited == 20 * 16 * (each - pixels)


@pytest.mark.parametrize("pixels, each", [(1, 3), (2, 3), (3, 3), (8, 8)])
def test_held_steps_cost_their_pixels_and_at_least_the_table_read(pixels, each):
    ends = {held: executes(pixels, [(2, 0)] + [(2, 1)] * held, 1).events[2] for held in (4, 15)}
    assert (ends[15].end - ends[15].begin) - (ends[4].end - ends[4].begin) == 11 * each
    # table, entry, two beats, their arrival, offer; then 4 steps and the last one's pixels; pipeline
    assert ends[4].end - ends[4].begin == (3 + 2 + 1) + max(pixels, 3) + 3 * each + pixels + EXECUTE_LATENCY


def test_one_program_by_hand():
    """HEADER, LOAD_LINEAR of 2 beats, EXECUTE of 4 pixels and a dense tile, END: every time added up on paper.

    tiny: an instruction is 4 beats, two of them are one request and one burst of 8.
    """
    result = executes(4, [(2, 0)], 1, memory_latency_cycles=16)
    # Start acts in cycle 1, request in 2, burst 3, address 4, beats from 20, used from 21: HEADER is whole in 24.
    header = 24
    assert result.events[0].begin == header + 2 + 1             # queue with output register; checked, gone
    # LOAD_LINEAR is whole in 28, taken in 30, gone in 31, at the unit in 33; sized, requested, burst, address in 37
    assert result.events[1].begin == 33
    first_beat = 37 + 16
    assert result.events[1].end == first_beat + 1 + 1           # register slice, second beat
    # token: a register, the counter
    assert result.events[2].begin == result.events[1].end + 2 == 57
    offer = 57 + 3 + 2 + 1
    assert result.events[2].end == offer + 4 + 7
    assert result.events[3].end == result.events[2].end + 1     # two cycles in a row without work
    assert result.cycles == result.events[3].end + 1 and result.counters["CYCLES"] == result.cycles - 2
    assert result.counters["READ_BEATS"] == 4 * 4 + 2 and result.counters["INSTRUCTIONS"] == 4
    assert result.counters["EXECUTE_WAIT_LOAD"] == 57 - 37      # EXECUTE whole in 32, at the unit in 37
    assert result.counters["EXECUTE_WAIT_WEIGHTS"] == offer - 57


def test_instruction_fetches_go_before_loads():
    """60 beats of weights while FILLs are fetched: each fetch takes its beats, and a place among outstanding bursts."""
    words = [HEADER, encode(Opcode.LOAD_LINEAR, beats=60), *[encode(Opcode.FILL, rows=1, blocks=1)] * 12, END]
    load_event = predict(TINY, words, memory()).events[1]
    alone = predict(TINY, [*words[:2], END], memory()).events[1]
    # Two bursts of 8 beats under way; a pair every 1 + 16 + 1 + 8 + 7 + ... cycles from issue to the first's last use.
    assert load_event.begin == alone.begin and load_event.end >= alone.end + 8
    assert predict(TINY, [*words[:2], END], memory(), memory_latency_cycles=30).events[1].end > alone.end + 4 * 14 - 1


def test_words_behind_the_end_are_waited_for_and_thrown_away():
    plain, more = (predict(TINY, [HEADER, END, *[END] * n], memory()) for n in (0, 20))
    assert more.cycles > plain.cycles and more.counters["INSTRUCTIONS"] == plain.counters["INSTRUCTIONS"] == 2
    assert plain.counters["READ_BEATS"] == 8 and 8 < more.counters["READ_BEATS"] <= 8 + 4 * TINY.control.fetch_depth


def test_a_program_across_a_page_takes_one_burst_more():
    words = [HEADER, *[encode(Opcode.FILL, rows=1, blocks=1)] * 2, END]
    inside, across = (predict(TINY, words, memory(), program_offset=at) for at in (0x1000, 0x1000 - 8))
    assert across.cycles > inside.cycles                        # two bursts outstanding at most, each paid once
    assert predict(TINY, words, memory()).cycles == inside.cycles   # not in this image: taken as offset 0
    image = np.zeros(0x3000, np.uint8)
    image[0xFF8:0xFF8 + 128] = np.frombuffer(b"".join(w.to_bytes(32, "little") for w in words), np.uint8)
    assert predict(TINY, words, image).cycles == across.cycles  # found


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
    assert counters["INSTRUCTIONS"] == len(words)
    assert counters["STORE_BUSY"] == machine.counts["bytes_written"] // SIZES.unit_bytes
    beats = (machine.counts["bytes_read"] - 30 * 4 + machine.counts["bytes_instructions"]) // 8
    assert counters["READ_BEATS"] == beats + 6 * 3               # rows of 5 units of half a beat touch 3 beats
    assert counters["WRITE_BEATS"] == 6 * 3                      # two rows of 3 units that follow one another
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
        assert min(parts) >= 0 and sum(parts) == counters["CYCLES"] == result.cycles - 2
        (segment,) = result.segments
        assert sum(segment.execute) == segment.cycle == result.marks[0][1] and segment.mark == 9
        assert list(segment.execute[1:5]) == parts[:4] and segment.execute[5] == 0
        assert segment.write_beats == counters["WRITE_BEATS"] and segment.load_busy == counters["LOAD_BUSY"]
        assert result.utilization == counters["EXECUTE_ISSUE"] / result.cycles


def test_store_begins_after_its_execute_and_load_after_the_acknowledged_store():
    words = [HEADER, encode(Opcode.LOAD_LINEAR, target=LinearTarget.STEP, beats=2, push_execute=1),
             encode(Opcode.EXECUTE, rows=1, cols=9, steps=1, wait_load=1, push_store=1),
             encode(Opcode.STORE, rows=1, cols=9, wait_execute=1, push_load=1, push_execute=1),
             encode(Opcode.FILL, rows=1, blocks=1, wait_store=1), encode(Opcode.EXECUTE, rows=1, cols=1, steps=1,
                                                                         wait_store=1), END]
    result = predict(TINY, words, memory((2, 0)), memory_latency_cycles=50, write_latency_cycles=31)
    execute, store, fill, second = result.events[2:6]
    start = execute.end                                 # the token is there
    # 2 cycles to the requantiser, 4 in it, 9 pixels, packed, on the bus; response; done, token
    assert store.end == start + 2 + 4 + 9 + 1 + 31 + 2
    assert fill.begin == store.end
    assert second.begin == start + 2 + 8 + 1            # the ninth pixel enters the requantiser, token
    counters = result.counters
    assert counters["EXECUTE_WAIT_STORE"] > 0 and counters["LOAD_WAIT_TOKEN"] > 0
    assert counters["WRITE_BEATS"] == 5 and counters["STORE_BUSY"] == 9


@pytest.mark.parametrize("outstanding", [1, 2, 8])
def test_rows_of_one_pixel_are_limited_by_outstanding_writes(outstanding):
    """16 rows, each a burst of its own: ``outstanding`` of them per round trip."""
    config = replace(TINY, bus=replace(TINY.bus, outstanding_writes=outstanding))
    header = encode(Opcode.HEADER, digest=Sizes(config).digest_value, version=1)
    ends = {}
    for rows in (8, 16):
        words = [header, encode(Opcode.STORE, rows=rows, cols=1, row_stride=2), END]
        ends[rows] = predict(config, words, memory(), memory_latency_cycles=100).events[1].end
    # issue, the beat at the earliest two cycles later on the bus, 100, and the place is free the cycle after
    assert ends[16] - ends[8] == 8 // outstanding * (1 + 1 + 100 + 1)


def test_queue_depth_holds_back_dispatch_behind_a_busy_unit():
    """Five EXECUTEs fill the queue of 4; the FILL behind them cannot be dispatched before the first has begun."""
    words = [HEADER, encode(Opcode.LOAD_LINEAR, target=LinearTarget.STEP, beats=2, push_execute=1)]
    words += [encode(Opcode.EXECUTE, rows=4, cols=4, steps=1, wait_load=int(n == 0)) for n in range(5)]
    words += [encode(Opcode.FILL, rows=1, blocks=1), END]
    result = predict(TINY, words, memory((2, 0)), memory_latency_cycles=300)
    assert result.events[7].begin > result.events[2].begin


@pytest.mark.parametrize("words, text", [
    ([HEADER], "must end with END"), ([], "must end with END"),
    ([HEADER, 0, END], "Instruction 1 must have a known"),
    ([HEADER, encode(Opcode.FILL, rows=1, blocks=1, wait_store=1), END], "token that nobody gave .store to load"),
    ([HEADER, encode(Opcode.LOAD_LINEAR, target=LinearTarget.STEP, beats=2, base=32), END], "inside the table"),
    ([HEADER, encode(Opcode.LOAD_LINEAR, target=LinearTarget.STEP, beats=2, address=0xFF8), END], "the memory image"),
    ([HEADER, encode(Opcode.EXECUTE, rows=1, cols=1, steps=1), END], "step entry 0, which was not loaded"),
    ([HEADER, encode(Opcode.LOAD_LINEAR, target=LinearTarget.STEP, beats=2),
      encode(Opcode.EXECUTE, rows=1, cols=1, steps=1), END], "step entry 0, whose pattern is not supported")])
def test_bad_programs(words, text):
    with pytest.raises(ValueError, match=text):
        predict(TINY, words, memory((5, 0)))
    with pytest.raises(ValueError, match="must lie in memory"):
        program_words(TINY, memory(), 0xFF0, 1)


@pytest.mark.parametrize("latencies", [{"memory_latency_cycles": 0}, {"write_latency_cycles": 0}])
def test_latency_is_at_least_one_cycle(latencies):
    with pytest.raises(ValueError, match="Memory latency must be at least 1 cycle, not 0"):
        predict(TINY, [HEADER, END], memory(), **latencies)
