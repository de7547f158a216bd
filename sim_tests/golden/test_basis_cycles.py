"""golden.basis_cycles: closed forms for small programs, geometry against a count by hand, engines that take turns."""
from dataclasses import replace

import numpy as np
import pytest

from golden.basis_cycles import Geometry, segment_words
from golden.coefficients import pack_maps
from golden.cycles import predict, program_words
from golden.machine import Machine
from sim_tests.hw.basis_programs import RandomPasses
from spec.config import load
from spec.derive import Sizes, ceil_div
from spec.formats import step_entry
from spec.isa import LinearTarget, Mode, Opcode, encode
from spec.registers import COUNTERS

SERIES, MAPS = load("tiny_basis"), load("tiny_maps")
STATES = ("EXECUTE_ISSUE", "EXECUTE_WAIT_LOAD", "EXECUTE_WAIT_STORE", "EXECUTE_WAIT_WEIGHTS",
          "EXECUTE_WAIT_COEFFICIENTS", "EXECUTE_IDLE")
END = encode(Opcode.END)
POINT = {"kernel_rows": 1, "kernel_cols": 1, "dilation_rows": 1, "dilation_cols": 1, "groups": 1}


def header(config):
    return encode(Opcode.HEADER, digest=Sizes(config).digest_value, version=1)


def basis(mode, rows, cols, **fields):
    """EXECUTE_BASIS with as many input as output pixels unless told."""
    fields = POINT | {"in_rows": rows, "in_cols": cols, "out_rows": rows, "out_cols": cols} | fields
    return encode(Opcode.EXECUTE_BASIS, mode=mode, **fields)


def decomposed(rows, cols, *, groups, terms=1, **fields):
    """A 3 x 3 pass with padding of one: patterns 4:4, so that each term has a stream word per channel group."""
    shape = {"pad_top": 1, "pad_left": 1, "kernel_rows": 3, "kernel_cols": 3, "groups": groups, "terms": terms,
             "n_log2": [2, 2, 2, 2]}
    return basis(Mode.DECOMPOSED, rows, cols, **shape | fields)


def cycles(config, words, memory=None, **options):
    return predict(config, [header(config), *words, END], np.zeros(4096, np.uint8) if memory is None else memory,
                   **options)


def test_one_pass_by_hand():
    """Taps of one row (3 beats of 24 multipliers), four pixels of one group: every time added up on paper."""
    load_ = encode(Opcode.LOAD_LINEAR, target=LinearTarget.WEIGHT, beats=3, push_execute=1)
    result = cycles(SERIES, [load_, basis(Mode.POINTWISE, 1, 4, taps=1, wait_load=1, push_store=1),
                             encode(Opcode.STORE, rows=1, cols=4, wait_execute=1)])
    loaded, run, store = result.events[1:4]
    assert run.begin == loaded.end + 2                  # a register, the token counter
    offered = run.begin + 2 + (1 + 3 + 2)               # checked; taps: a state, 3 beats, the last one's way
    value = offered + 1 + 2 + 1                         # the streamer's word, two registers, the queue
    done = value + 4                                    # pushed, four micro-steps
    assert run.end == done + 4 + 1                      # block and accumulator; the token is there
    counters = result.counters
    assert counters["EXECUTE_ISSUE"] == 4 and counters["EXECUTE_WAIT_WEIGHTS"] == offered - run.begin
    assert counters["EXECUTE_WAIT_COEFFICIENTS"] == done - 4 - (offered + 1)
    assert counters["EXECUTE_WAIT_LOAD"] > 0 == counters["EXECUTE_WAIT_STORE"]
    assert result.events[4].end > store.end > run.end


@pytest.mark.parametrize("groups, terms", [(1, 1), (2, 1), (4, 1), (1, 4)])
@pytest.mark.parametrize("rows, cols", [(4, 4), (2, 6), (1, 4), (5, 1)])
def test_passes_behind_each_other_take_the_larger_of_words_and_micro_steps(rows, cols, groups, terms):
    """The difference of two programs cancels everything but the passes: 2 cycles a pass beside its micro-steps, for the
    two values before the first one, or its words and nothing else. Rows at the edge have two kernel rows."""
    steps = (3 * rows - 2) * cols
    words = rows * cols * groups * terms
    few, many = (cycles(SERIES, [decomposed(rows, cols, groups=groups, terms=terms)] * n) for n in (20, 40))
    hold = rows - 1 if cols == 1 else 0                 # a sum must be written before it is added to again
    spent = (many.cycles - few.cycles) / 20
    assert many.counters["EXECUTE_ISSUE"] == 40 * steps
    if rows * cols > 6:
        assert spent == max(words, steps + hold + 2)
    else:                                               # as short as the instructions that bring them
        assert spent >= max(words, steps + hold + 2)


@pytest.mark.parametrize("count", [1, 5, 40])
def test_pointwise_groups_take_a_cycle_each(count):
    """And a pass one more, in which its first value is pushed."""
    few, many = (cycles(SERIES, [basis(Mode.POINTWISE, 4, 4, groups=count)] * n) for n in (20, 30))
    assert many.cycles - few.cycles == 10 * (16 * count + 1)
    assert many.counters["EXECUTE_ISSUE"] == 30 * 16 * count
    assert many.counters["EXECUTE_WAIT_COEFFICIENTS"] - few.counters["EXECUTE_WAIT_COEFFICIENTS"] == 10


def test_pixels_that_cost_more_words_than_micro_steps_show_as_waiting_for_coefficients():
    few, many = (cycles(SERIES, [decomposed(4, 4, groups=4, terms=4)] * n) for n in (10, 30))
    new = {name: many.counters[name] - few.counters[name] for name in STATES}
    assert new["EXECUTE_ISSUE"] == 20 * 40 and sum(new.values()) == 20 * 256
    # the first value of a pass comes late, too, but the multipliers have taken the pass: almost all is one cause
    assert new["EXECUTE_WAIT_COEFFICIENTS"] >= 20 * (256 - 40 - 2)


def brute(f, chunks):
    """Micro-steps of an output on each input row."""
    uses = [0] * f["in_rows"]
    for y in range(f["out_rows"]):
        for r in range(f["kernel_rows"]):
            row = (y << f["stride_rows_log2"]) + r * f["dilation_rows"] - f["pad_top"]
            if 0 <= row < f["in_rows"]:
                uses[row] += chunks
    return uses


def test_geometry_counts_what_meets_each_row(rng):
    skipped = 0
    for _ in range(200):
        f = {"mode": Mode.DENSE, "in_rows": rng.integers(1, 12), "in_cols": rng.integers(1, 12),
             "out_rows": rng.integers(1, 8), "out_cols": rng.integers(1, 8), "kernel_rows": rng.integers(1, 6),
             "kernel_cols": rng.integers(1, 6), "dilation_rows": rng.integers(1, 4), "dilation_cols": 1,
             "stride_rows_log2": rng.integers(0, 3), "stride_cols_log2": rng.integers(0, 3), "groups": 3, "terms": 0,
             "n_log2": 0}
        f |= {"pad_top": rng.integers(0, (f["kernel_rows"] - 1) * f["dilation_rows"] + 1),
              "pad_left": rng.integers(0, f["kernel_cols"])}
        f = {name: int(value) for name, value in f.items()}
        g = Geometry(SERIES, f)
        uses = [n for before, rows in g.runs for n in [0] * before + rows] + [0] * g.behind
        chunks = ceil_div(f["kernel_cols"], SERIES.basis.multipliers)
        assert uses == brute(f, chunks) and g.steps == sum(uses) * f["out_cols"]
        assert all(before or n == 0 for n, (before, _) in enumerate(g.runs))
        assert all(n for _, rows in g.runs for n in rows)
        last = (f["out_cols"] - 1 << f["stride_cols_log2"]) + f["kernel_cols"] - f["pad_left"]
        assert g.streamed == min(f["in_cols"], last) and g.words == 1 and not g.decomposed
        skipped += 0 in uses
    assert skipped > 20


@pytest.mark.parametrize("config", [SERIES, MAPS], ids=lambda c: c.name)
def test_counters_are_those_of_the_machine_and_every_cycle_has_one_cause(config, rng):
    made = RandomPasses(config, rng, groups=8)
    machine = Machine(config, made.memory.copy(), record_cycles=True)
    machine.run(made.program, made.count)
    words = program_words(config, made.memory, made.program, made.count)
    result = predict(config, words, made.memory, program_offset=made.program, word_cycles=machine.basis_word_cycles,
                     saturations=machine.counts["saturations"])
    counters = result.counters
    assert counters.keys() == {name for name, _ in COUNTERS}
    assert counters["EXECUTE_ISSUE"] == machine.counts["pixel_steps"] > 0
    assert counters["SATURATIONS"] == machine.counts["saturations"]
    assert sum(counters[name] for name in STATES) == counters["CYCLES"] and min(counters.values()) >= 0
    for segment in result.segments:
        assert len(segment.execute) == 6
    assert sum(s.execute[5] for s in result.segments) == counters["EXECUTE_WAIT_COEFFICIENTS"]
    runs = [e for e in result.events if e.opcode is Opcode.EXECUTE_BASIS]
    assert all(a.begin < b.begin and a.end < b.end for a, b in zip(runs, runs[1:]))
    bound = predict(config, words, made.memory, program_offset=made.program)
    assert bound.cycles <= result.cycles and bound.counters["SATURATIONS"] == 0


def test_a_window_larger_than_the_kernel_hides_the_pushes_between_rows():
    """Rows of four outputs: their three first values are pushed while the row before is at work; without spare places
    they are not."""
    tight = replace(SERIES, basis=replace(SERIES.basis, window=3))
    spent = {}
    for config in (SERIES, tight):
        few, many = (cycles(config, [decomposed(4, 4, groups=1)] * n) for n in (10, 30))
        spent[config.basis.window] = (many.cycles - few.cycles) // 20
    assert spent[5] == 42 and spent[3] == 42 + 3


def test_load_tokens_before_the_loader_and_store_tokens_before_the_first_micro_step():
    """A pass that waits for a STORE is loaded meanwhile, a pass that waits for a load is not."""
    store = encode(Opcode.STORE, rows=4, cols=4, wait_execute=1, push_execute=1)
    first = basis(Mode.POINTWISE, 4, 4, push_store=1, taps=1)
    late = cycles(SERIES, [first, store, basis(Mode.POINTWISE, 4, 4, wait_store=1, taps=1)])
    free = cycles(SERIES, [first, store, basis(Mode.POINTWISE, 4, 4, taps=1)])
    assert late.events[3].begin == free.events[3].begin < late.events[1].end < late.events[3].end
    assert late.counters["EXECUTE_WAIT_STORE"] > 0 == free.counters["EXECUTE_WAIT_STORE"]
    # without the token the pass is taken as the first one ends, which is no cycle of waiting
    assert late.events[3].end - free.events[3].end == late.counters["EXECUTE_WAIT_STORE"] + 1


def test_engines_take_turns():
    """An EXECUTE begins when the basis engine has ended, and the other way round."""
    entry = step_entry(2).pack(offset=[0, 0], enable=[1, 0], n_log2=2, segments_log2=0, hold=0)
    memory = np.zeros(4096, np.uint8)
    memory[:16] = np.frombuffer(entry.to_bytes(16, "little"), np.uint8)
    table = [encode(Opcode.LOAD_LINEAR, target=LinearTarget.STEP, beats=2), encode(Opcode.BARRIER, mark=1)]
    point, dense = basis(Mode.POINTWISE, 4, 4, groups=8), encode(Opcode.EXECUTE, rows=4, cols=4, steps=1)
    result = cycles(SERIES, [*table, point, dense, point, point, dense], memory)
    a, b, c, d, e = result.events[3:8]
    assert b.begin == a.end and c.begin == b.end and e.begin == d.end
    assert d.begin < c.end                              # passes overlap
    assert result.counters["EXECUTE_ISSUE"] == 3 * 16 * 8 + 2 * 16


def test_word_cycles_of_maps_stretch_the_pass():
    words = [basis(Mode.DECOMPOSED, 4, 4, groups=4)]    # two stream words a pixel
    results = {n: cycles(MAPS, words, word_cycles={1: np.full((4, 4, 2), n)}) for n in (1, 2, 7)}
    assert results[1].cycles == cycles(MAPS, words).cycles
    assert results[7].cycles - results[2].cycles == 32 * 5
    assert results[1].counters["EXECUTE_ISSUE"] == results[7].counters["EXECUTE_ISSUE"] == 16


@pytest.mark.parametrize("groups", [1, 3, 8])
def test_maps_take_a_cycle_for_each_word_of_the_longest_segment(groups, rng):
    """The formula of the loading stage: table, beats of the blocks before, words of the block; beats come a cycle later
    than at once, and the pass is offered in the cycle behind ``loaded``."""
    b, z = MAPS.basis, Sizes(MAPS)
    spent = []
    for density in (0.2, 1):
        shape = b.blocks, b.slices, groups, b.group
        coefficients = (rng.random(shape) < density).astype(np.int8)
        coefficients[..., b.blocks:] = 0
        data = np.frombuffer(bytes(pack_maps(coefficients, MAPS)), np.uint8).reshape(-1, z.beat_bytes)
        lengths = segment_words(data, MAPS)
        assert len(lengths) == b.blocks and ceil_div(sum(lengths) * b.group, 64) == len(data) - z.segment_table_beats
        per, longest, put, at = 64 // b.group, 0, z.segment_table_beats, 0
        for n in lengths:
            longest = max(longest, n + max(ceil_div(groups, b.stream_groups), put + 3))
            put += (at + n - 1) // per - at // per + 1
            at += n
        memory = np.zeros(8192, np.uint8)
        memory[4096:4096 + data.size] = data.reshape(-1)
        words = [encode(Opcode.LOAD_LINEAR, target=LinearTarget.WEIGHT, address=4096, beats=len(data), push_execute=1),
                 basis(Mode.DECOMPOSED, 1, 1, groups=groups, coefficients=len(data), wait_load=1)]
        result = cycles(MAPS, words, memory)
        assert result.counters["EXECUTE_WAIT_WEIGHTS"] == 2 + longest + 2 + 1
        spent.append(longest)
    assert spent[0] < spent[1]


@pytest.mark.parametrize("config, word, name", [
    (MAPS, encode(Opcode.EXECUTE, rows=1, cols=1, steps=1), "EXECUTE"),
    (load("tiny"), basis(Mode.POINTWISE, 1, 1), "EXECUTE_BASIS")])
def test_instructions_without_engine(config, word, name):
    with pytest.raises(ValueError, match=f"Instruction 1 must not be {name}, for which there is no engine"):
        cycles(config, [word])


def test_a_pass_whose_token_never_comes_is_refused():
    with pytest.raises(ValueError, match="token that nobody gave .store to execute"):
        cycles(SERIES, [basis(Mode.POINTWISE, 1, 1, wait_store=1)])
