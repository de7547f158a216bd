"""What the tests of the DMA masters share: requests, the bursts they must become, windows and memories."""
from dataclasses import replace
import os
import random

from spec.config import BusConfig, load

PAGE_BYTES = 4096
#: A window in the middle of the memory model: its edges can be overrun on both sides.
BASE, WINDOW_BYTES, RAM_BYTES = 0x8000, 0x8000, 0x20000

_TINY = load("tiny")
#: The tiny preset; wide beats with enough bursts in flight for single beats at full rate; the narrowest bus with the
#: longest bursts and the widest address; one beat and one burst at a time.
CONFIGS = {
    "tiny": _TINY,
    "wide": replace(_TINY, bus=BusConfig(data_bits=128, burst_beats=16, outstanding_reads=8, outstanding_writes=8)),
    "narrow": replace(_TINY, bus=BusConfig(data_bits=32, address_bits=40, burst_beats=256, outstanding_reads=16,
                                           outstanding_writes=16)),
    "single": replace(_TINY, bus=BusConfig(data_bits=64, burst_beats=1, outstanding_reads=1, outstanding_writes=1)),
}

#: What each run of the tests takes for the long benches; `make soak` takes all.
OFTEN = CONFIGS if os.environ.get("SUMMAND_SOAK") else ("tiny", "single")


def request_word(offset, beats):
    """Payload bits of a request."""
    return offset | beats << 40


def error_word(code, address):
    """Payload bits of the error output."""
    return 1 | int(code) << 1 | address << 9


def bursts_of(offset, beats, config):
    """The bursts (offset, beats) that a request must become: the longest pieces within burst and page limits."""
    beat_bytes, pieces = config.bus.data_bits // 8, []
    while beats:
        count = min(beats, config.bus.burst_beats, (PAGE_BYTES - offset % PAGE_BYTES) // beat_bytes)
        pieces.append((offset, count))
        offset, beats = offset + count * beat_bytes, beats - count
    return pieces


def requests(config, rng, count):
    """Every length up to two bursts and one, page edges from all sides, both ends of the window, then random.

    Of long bursts only the lengths near their ends: the run stays short.
    """
    beat_bytes, longest = config.bus.data_bits // 8, config.bus.burst_beats
    page, window = PAGE_BYTES // beat_bytes, WINDOW_BYTES // beat_bytes
    if longest <= 16:
        lengths, edges = range(1, 2 * longest + 2), (1, 2, longest)
    else:
        lengths, edges = (1, 2, longest - 1, longest, longest + 1, 2 * longest + 1), (1, longest)
    plan = [(0, n) for n in lengths]
    plan += [(page - before, n) for before in edges for n in (1, 2, 3, lengths[-1] // 2, longest + 1)]
    plan += [(0, 1), (window - 1, 1), (window - longest - 1, longest + 1)]
    plan += [(0, page + longest + 1)] if longest <= 16 else []
    for _ in range(count):
        beats = int(rng.integers(1, 3 * longest))
        plan.append((int(rng.integers(0, window - beats + 1)), beats))
    return [(first * beat_bytes, beats) for first, beats in plan]


def pauses(chance, seed):
    """Endless pause generator for a cocotbext-axi channel."""
    source = random.Random(seed)
    while True:
        yield source.random() < chance


#: Requests that must be refused: name -> function of the bytes per beat giving (offset, beats).
BAD_REQUESTS = {
    "past_the_end": lambda beat_bytes: (WINDOW_BYTES - beat_bytes, 2),
    "at_the_end": lambda beat_bytes: (WINDOW_BYTES, 1),
    "far": lambda beat_bytes: ((1 << 40) - beat_bytes, 1),
    "far_and_long": lambda beat_bytes: ((1 << 40) - beat_bytes, (1 << 20) - 1),
    "too_long": lambda beat_bytes: (0, (1 << 20) - 1),
    "one_too_long": lambda beat_bytes: (0, WINDOW_BYTES // beat_bytes + 1),
    "no_beats": lambda beat_bytes: (64, 0),
    "misaligned": lambda beat_bytes: (64 + beat_bytes // 2, 1),
    "misaligned_by_one": lambda beat_bytes: (64 + 1, 1),
}
