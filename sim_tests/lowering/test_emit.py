"""Order of instructions: what it costs, by the cycle model and by what the program does."""
from collections import Counter

import pytest

from golden.cycles import predict, program_words
from lowering import lower
from lowering.emit import LayerEmitter, Ring
from lowering.program import Program
from sim_tests.lowering.networks import check, convolution, network, pool
from spec.config import load
from spec.derive import Sizes
from spec.isa import LinearTarget, Opcode, TileTarget, decode


def _target(rng, patterns):
    layer, out = convolution(rng, size=(8, 8), channels=64, outputs=64, patterns=patterns, pads=(1, 1, 1, 1))
    return network((8, 8), 64, [layer], [out])


def _program(lowered, config):
    words = program_words(config, lowered.image, lowered.program_offset, lowered.instruction_count)
    return words, [decode(w) for w in words]


@pytest.mark.parametrize("patterns, ideal, most", [(["1:4"], 2304, 2700), (["4:8", "1:8"], 5888, 6400),
                                                   (["8:8"], 9216, 9700)])
def test_cycles_of_the_target_layer(rng, patterns, ideal, most):
    config = load("nm256")
    lowered = lower(_target(rng, patterns), config)
    memory = lowered.new_memory()
    p = predict(config, _program(lowered, config)[0], memory, memory_latency_cycles=16)
    assert p.counters["EXECUTE_ISSUE"] == ideal and p.cycles <= most


def test_sparse_is_faster_than_dense_where_strips_are_small(rng):
    """tiny, 8x8x32 -> 64, stride 2: strips of few pixels do not hide the weight tiles, and the search must know."""
    config, cycles = load("tiny"), {}
    for pattern in ("4:4", "2:4", "1:4"):
        layer, out = convolution(rng, size=(8, 8), channels=32, outputs=64, patterns=[pattern], stride=(2, 2),
                                 pads=(1, 1, 1, 1))
        lowered = lower(network((8, 8), 32, [layer], [out]), config)
        p = predict(config, _program(lowered, config)[0], lowered.new_memory(), program_offset=lowered.program_offset)
        cycles[pattern] = p.cycles
    assert cycles["2:4"] < 0.85 * cycles["4:4"] and cycles["1:4"] < 0.5 * cycles["4:4"], cycles


def test_first_instructions(rng):
    """Padding, step table, one weight tile, the first strip's first rows, EXECUTE; parameters only later."""
    config = load("nm256")
    _, code = _program(lower(_target(rng, ["1:4"]), config), config)
    assert [op.name for op, _ in code[:7]] == ["HEADER", "FILL", "FILL", "LOAD_LINEAR", "LOAD_LINEAR", "LOAD_TILE",
                                               "EXECUTE"]
    assert [code[3][1]["target"], code[4][1]["target"]] == [LinearTarget.STEP, LinearTarget.WEIGHT]
    assert code[4][1]["beats"] == 22 and code[5][1]["rows"] == 3 and code[6][1]["steps"] == 1
    parameters = [n for n, (op, f) in enumerate(code)
                  if op == Opcode.LOAD_LINEAR and f["target"] == LinearTarget.PARAMETER]
    assert len(parameters) == 1 and parameters[0] > max(n for n, (op, _) in enumerate(code) if op == Opcode.LOAD_TILE)
    assert [op.name for op, _ in code[-2:]] == ["BARRIER", "END"]


def test_everything_is_loaded_once_where_it_fits(rng):
    config = load("nm256")
    lowered = lower(_target(rng, ["1:4"]), config)
    _, code = _program(lowered, config)
    beats = Counter()
    for op, f in code:
        if op == Opcode.LOAD_LINEAR:
            beats[f["target"]] += f["beats"]
        if op == Opcode.LOAD_TILE and f["target"] == TileTarget.ACTIVATION:
            beats["tile"] += f["planes"] * f["rows"] * f["cols"]
    assert beats == {LinearTarget.WEIGHT: 4 * 9 * 22, LinearTarget.STEP: 9, LinearTarget.PARAMETER: 4 * 8,
                     "tile": 4 * 64}


def test_next_weights_are_requested_before_the_group_ends(rng):
    config = load("nm256")
    _, code = _program(lower(_target(rng, ["1:4"]), config), config)
    weights = [n for n, (op, f) in enumerate(code) if op == Opcode.LOAD_LINEAR and f["target"] == LinearTarget.WEIGHT
               and f["beats"] == 198]
    executes = [n for n, (op, f) in enumerate(code) if op == Opcode.EXECUTE and f["steps"] == 9]
    # Strips: the first group's second one, then two for each further group.
    assert len(executes) == 7 and all(load < executes[2 * k + 1] for k, load in enumerate(weights))


def test_max_pool_holds_its_weights(rng):
    layer, out = pool(rng, size=(8, 8), channels=32, kind="max", window=(3, 3), stride=(2, 2), pads=(1, 1, 1, 1))
    lowered, _ = check(network((8, 8), 32, [layer], [out]), load("nm256"), rng)
    assert lowered.layers[0].steps == 9 and lowered.layers[0].weight_bytes == 16 * 16


def test_long_tables_and_weights_are_streamed(rng):
    config = load("tiny")
    layer, out = convolution(rng, size=(5, 5), channels=24, outputs=9, patterns=["3:4", "1:4"], pads=(1, 1, 1, 1))
    lowered, machine = check(network((5, 5), 24, [layer], [out]), config, rng)
    assert lowered.layers[0].steps > config.memory.step_entries
    assert machine.counts["bytes_read"] > lowered.layers[0].weight_bytes


def test_ring_reuses_evicts_and_respects_pins():
    sizes = Sizes(load("tiny"))
    ring = Ring("weight", LinearTarget.WEIGHT, 64, 1, Program(sizes), sizes, streaming=False)
    a, b = ring.get("a", 30, 0), ring.get("b", 30, 240)
    assert (a.base, b.base) == (0, 30) and ring.get("a", 30, 0) is a
    assert ring.get("c", 10, 480, pinned=("a",)) is None and "c" not in ring.live
    assert ring.get("c", 10, 480).base == 0 and "a" not in ring.live and "b" in ring.live
    ring.load(b, 10)
    ring.load(b)
    loads = [e for e in ring.program.instructions if e["opcode"] == Opcode.LOAD_LINEAR]
    assert [(e["base"], e["beats"], e["address"]) for e in loads] == [(30, 10, 240), (40, 20, 320)]


def test_first_cuts_follow_kernel_rows_and_never_begin_held():
    class Piece:
        steps, row, tile_beat = 8, (0, 0, 0, 1, 1, 1, 1, 2), (0, 1, 2, 3, -1, 4, 5, 6)
    assert LayerEmitter._first_cuts(Piece, 1) == [0, 1, 3, 5, 7, 8]
    assert LayerEmitter._first_cuts(Piece, 5) == [0, 3, 5, 7, 8]
