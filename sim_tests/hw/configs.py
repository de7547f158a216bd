"""Configurations of the hardware tests: ``tiny`` and odd variants that reach what it does not."""

from dataclasses import replace

from spec.config import BusConfig, MemoryConfig, Pattern, load


def _patterns(block, *ns):
    return tuple(Pattern(n, block) for n in ns)


def _bus(config, data_bits, **fields):
    return replace(config, bus=replace(config.bus, data_bits=data_bits, **fields))


TINY = load("tiny")

#: Name -> Config.
CONFIGS = {
    "tiny": TINY,  # two units per beat, four banks, full stream port
    "bus32": _bus(TINY, 32),  # one unit per beat; steps 4, instructions 8 beats
    "bus128": _bus(TINY, 128),  # four units per beat
    "bus256": _bus(TINY, 256),  # one beat per instruction, half a beat per step
    # only the dense pattern: one block, one bank, no segments
    "dense": replace(TINY, structured=replace(TINY.structured, patterns=_patterns(4, 4), taps=1)),
    # block 8, four segments, indices of 3 bits that straddle beats, narrow accumulators
    "block8": replace(
        _bus(TINY, 64),
        structured=replace(
            TINY.structured, columns=8, slots=8, block=8, patterns=_patterns(8, 1, 2, 8), taps=4, accumulator_bits=20
        ),
        memory=MemoryConfig(
            activation_bytes=2048, weight_bytes=1024, residual_bytes=256, step_entries=32, parameter_groups=4
        ),
    ),
    # a port narrower than 1:8 asks for; operands narrower than a byte
    "narrow": replace(
        _bus(TINY, 64),
        structured=replace(
            TINY.structured,
            columns=8,
            slots=16,
            block=8,
            patterns=_patterns(8, 1, 4, 8),
            taps=4,
            stream_blocks=4,
            activation_bits=7,
            weight_bits=5,
        ),
        memory=MemoryConfig(
            activation_bytes=4096, weight_bytes=1024, residual_bytes=256, step_entries=32, parameter_groups=4
        ),
    ),
    # channel groups wider than the stream: four banks though one fetch has one block
    "groups": replace(
        TINY,
        structured=replace(TINY.structured, columns=16, slots=4, patterns=_patterns(4, 4)),
        bus=BusConfig(data_bits=128, burst_beats=8, outstanding_reads=2, outstanding_writes=2),
    ),
}
