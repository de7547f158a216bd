"""The maps variant of the basis engine in plain Python, written from docs/basis.md alone."""

from dataclasses import replace

import numpy as np

from spec.config import load
from spec.derive import Sizes

TINY_MAPS = load("tiny_maps")


def variant(*, data_bits=64, **fields):
    """``tiny_maps`` with other fields of its basis section and another bus."""
    config = TINY_MAPS
    if "group" in fields:
        fields["lanes"] = fields["group"]
    slices, group = fields.get("slices", config.basis.slices), fields.get("group", config.basis.group)
    if slices * config.basis.multipliers < group:
        fields |= {"multipliers": -(-group // slices), "window": 8}
    return replace(
        config,
        basis=replace(config.basis, **fields),
        bus=replace(config.bus, data_bits=data_bits),
        memory=replace(config.memory, weight_bytes=4096, activation_bytes=4096),
    )


#: Name -> Config: look-aside 0 to 3, one to sixteen groups per word, groups of 4, 8 and 16 channels, IR that saturates
#: soon and IR that cannot, one word and several words of a segment in a beat, two beats of segment table.
CONFIGS = {
    "tiny": TINY_MAPS,
    "plain": variant(slices=1, look_aside=0, stream_groups=1, intermediate_bits=20),
    "aside2": variant(look_aside=2, stream_groups=4, data_bits=32),
    "aside3": variant(look_aside=3, stream_groups=4, coefficient_rows=2, intermediate_bits=9),
    "group8": variant(group=8, look_aside=2, stream_groups=4, blocks=8),
    "group16": variant(group=16, look_aside=2, stream_groups=2, blocks=5, data_bits=128, coefficient_rows=16),
    # one row has the groups of several level-1 words; segments do not fit the FIFO
    "long": variant(look_aside=3, stream_groups=8, slices=3, blocks=2, coefficient_rows=8, data_bits=32),
}


def to_words(config, coefficients):
    """The ``group``-bit words of one block's segment. Args: coefficients: integers in -1..1 [slices, groups, group]."""
    group, words, coefficients = config.basis.group, [], np.asarray(coefficients)
    signs = [int(v < 0) for v in coefficients.ravel() if v]
    sent = used = 0         # signs in the words so far, signs that their maps took
    for of_slice in coefficients:
        for run in range(0, len(of_slice), group):
            part = of_slice[run : run + group]
            words.append(sum(1 << g for g, maps in enumerate(part) if maps.any()))
            for maps in part:
                count = np.count_nonzero(maps)
                if not count:
                    continue
                words.append(sum(1 << c for c in range(group) if maps[c]))
                if sent - used < count:
                    words.append(sum(bit << k for k, bit in enumerate(signs[sent : sent + group])))
                    sent += group
                used += count
    return words


def to_beats(config, words):
    """Beats of words, of one segment or all: first word lowest, zeros behind the last."""
    group, per_beat = config.basis.group, config.bus.data_bits // config.basis.group
    return [
        sum(word << group * k for k, word in enumerate(words[at : at + per_beat]))
        for at in range(0, len(words), per_beat)
    ]


def segment_table(config, lengths):
    """Beats of the table of segment lengths. Args: lengths: words of each block's segment."""
    bits = config.bus.data_bits
    value = sum(length << 16 * block for block, length in enumerate(lengths))
    return [value >> bits * k & (1 << bits) - 1 for k in range(-(-16 * config.basis.blocks // bits))]


def pack(config, coefficients):
    """All beats of a load. Args: coefficients: [blocks, slices, groups, group]."""
    segments = [to_words(config, c) for c in coefficients]
    return segment_table(config, [len(s) for s in segments]) + to_beats(config, [word for s in segments for word in s])


def visits(config, lengths):
    """How many beats hold words of each segment. Args: lengths: words of each."""
    per_beat, at, out = config.bus.data_bits // config.basis.group, 0, []
    for words in lengths:
        out.append(len({place // per_beat for place in range(at, at + words)}))
        at += words
    return out


def rows(config, coefficients):
    """[words, slices, stream_groups, group]: what belongs to each stream word, zeros behind the last group.

    Args: coefficients: [slices, groups, group].
    """
    count, groups = len(coefficients), config.basis.stream_groups
    words = -(-coefficients.shape[1] // groups)
    full = np.zeros((count, words * groups, config.basis.group), int)
    full[:, : coefficients.shape[1]] = coefficients
    return full.reshape(count, words, groups, -1).swapaxes(0, 1)


def concentrate(config, matches):
    """Groups and columns that each cycle takes: list of lists of (lane, group, column).

    Args: matches: bool [stream_groups, group].
    """
    lanes, pending, cycles = config.basis.lanes, [], []
    for c in range(lanes):
        pending.append([g for g in range(len(matches)) if matches[g][c]])
    while any(pending):
        taken, idle = [], list(range(lanes))
        for d in range(config.basis.look_aside + 1):
            looking, idle = idle, []
            for lane in looking:
                column = (lane + d) % lanes
                if pending[column]:
                    taken.append((lane, pending[column].pop(0), column))
                else:
                    idle.append(lane)
        cycles.append(taken)
    return cycles


def word_cycles(config, coefficients, word):
    """Cycles of one stream word.

    Args: coefficients: [all slices, stream_groups, group]; word: [stream_groups, group].
    """
    return max(1, *(len(concentrate(config, (c != 0) & (word != 0))) for c in coefficients))


def intermediates(config, coefficients, activations):
    """(IR [slices], number of them saturated) of one pixel.

    Args: coefficients: [slices, groups, group]; activations: [groups, group], less their zero point.
    """
    spec = Sizes(config).intermediate
    exact = [int((c.astype(int) * activations.astype(int)).sum()) for c in coefficients]
    clamped = [min(max(v, spec.lo), spec.hi) for v in exact]
    return clamped, sum(a != b for a, b in zip(exact, clamped))


def random_coefficients(rng, shape, density):
    """Coefficients in -1..1, non-zero with the chance ``density``."""
    return rng.choice([-1, 1], shape) * (rng.random(shape) < density)


def random_activations(rng, shape, density):
    """Activations less a zero point, both ends among them."""
    values = rng.choice([-255, 255, -1, 1], shape)
    values = np.where(rng.random(shape) < 0.7, rng.integers(-255, 256, shape), values)
    return values * (rng.random(shape) < density)
