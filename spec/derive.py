"""What follows from a configuration: pure functions, the only place where widths, beats and depths are computed."""
from dataclasses import dataclass
from functools import cached_property

from spec.config import Config, IntSpec

#: Bits of an instruction, of a step-table entry and of one column's requantisation parameters.
INSTRUCTION_BITS = 256
STEP_BITS = 128
PARAMETER_BITS = 64
#: Fraction bits that the requantiser keeps between its product and its only rounding.
FRACTION_BITS = 14
#: Requantisation multipliers are unsigned; shifts are right shifts.
MULTIPLIER = IntSpec(16, signed=False)
SHIFT = IntSpec(5, signed=False)
BIAS = IntSpec(32)
#: Bits of each dependency token counter.
TOKEN_BITS = 8


def sum_spec(count, *factors):
    """Narrowest signed format that holds any sum of ``count`` products of values of the given formats."""
    lo = hi = 1
    for f in factors:
        ends = [e * v for e in (lo, hi) for v in (f.lo, f.hi)]
        lo, hi = min(ends), max(ends)
    lo, hi = min(count * lo, 0), max(count * hi, 0)
    return IntSpec(max(hi.bit_length(), (~lo).bit_length()) + 1)


def ceil_div(a, b):
    """Smallest integer not below a / b."""
    return -(-a // b)


@dataclass(frozen=True)
class Sizes:
    """Derived sizes of one configuration. Every attribute carries its unit in its name or its first line."""

    config: Config

    # -- what the engines share --------------------------------------------------------------------------------
    @cached_property
    def columns(self):
        """Outputs that an accumulator word holds: bytes of a unit."""
        c = self.config
        return c.structured.columns if c.structured is not None else c.basis.group

    @cached_property
    def group_channels(self):
        """Channels that a channel group really has; the rest of its ``columns`` bytes is padding."""
        return self.columns if self.config.structured is not None else self.config.basis.blocks

    @cached_property
    def block(self):
        """Bytes of a block of the activation scratchpad."""
        c = self.config
        return c.structured.block if c.structured is not None else c.basis.group

    @cached_property
    def accumulator_depth(self):
        """Output pixels in each accumulator bank."""
        c = self.config
        return c.structured.accumulator_depth if c.structured is not None else c.basis.accumulator_depth

    # -- operands ------------------------------------------------------------------------------------------------
    @cached_property
    def activation(self):
        """Format of an activation operand (stored in a byte)."""
        s = self.config.structured
        return IntSpec(s.activation_bits if s is not None else 8)

    @cached_property
    def weight(self):
        """Format of a weight operand (stored in a byte)."""
        s = self.config.structured
        return IntSpec(s.weight_bits if s is not None else 8)

    @cached_property
    def accumulator(self):
        """Format of an accumulator; leaving it is an error, never a wrap."""
        s = self.config.structured
        return IntSpec(s.accumulator_bits if s is not None else 32)

    @cached_property
    def column_sum(self):
        """Format of one column's sum over all slots: exact for every operand."""
        return sum_spec(self.config.structured.slots, self.activation, self.weight)

    @cached_property
    def accumulator_input(self):
        """Format that holds a sum of either engine on its way to the accumulators."""
        c = self.config
        return max(([self.column_sum] if c.structured is not None else []) +
                   ([self.basis_sum] if c.basis is not None else []), key=lambda spec: spec.bits)

    # -- stream and activation scratchpad -------------------------------------------------------------------------
    @cached_property
    def index_bits(self):
        """Bits of an index inside a block."""
        return self.config.structured.block.bit_length() - 1

    @cached_property
    def stream_blocks(self):
        """Blocks that the stream port delivers per cycle."""
        s = self.config.structured
        return s.stream_blocks or s.slots // s.patterns[0].n

    def fetch_blocks(self, n):
        """Blocks that one fetch of pattern ``n``:block consumes."""
        return min(self.config.structured.slots // n, self.stream_blocks)

    @cached_property
    def group_blocks(self):
        """Blocks in one channel group (``columns`` channels) of one pixel."""
        return self.columns // self.block

    @cached_property
    def banks(self):
        """Banks of the activation scratchpad, each one block wide; block address a is in bank a mod banks."""
        structured, basis = self.config.structured, self.config.basis
        return max(self.stream_blocks if structured is not None else 1, self.group_blocks,
                   basis.stream_groups * self.group_blocks if basis is not None else 1)

    @cached_property
    def activation_blocks(self):
        """Blocks in the activation scratchpad."""
        return self.config.memory.activation_bytes // self.block

    # -- bus -----------------------------------------------------------------------------------------------------
    @cached_property
    def beat_bytes(self):
        """Bytes of one bus beat."""
        return self.config.bus.data_bits // 8

    @cached_property
    def unit_bytes(self):
        """Bytes of a unit: one pixel of one channel group, the grain of activation transfers."""
        return self.columns

    @cached_property
    def units_per_beat(self):
        """Units in one bus beat."""
        return self.beat_bytes // self.unit_bytes

    def beats(self, bits):
        """Bus beats that hold ``bits`` bits."""
        return ceil_div(bits, self.config.bus.data_bits)

    @cached_property
    def instruction_beats(self):
        """Beats of one instruction; each begins on a beat."""
        return self.beats(INSTRUCTION_BITS)

    @cached_property
    def step_beats(self):
        """Beats of one step-table entry; each begins on a beat."""
        return self.beats(STEP_BITS)

    @cached_property
    def parameter_beats(self):
        """Beats of the requantisation parameters of one channel group."""
        return self.beats(PARAMETER_BITS * self.columns)

    # -- weights -------------------------------------------------------------------------------------------------
    @cached_property
    def value_beats(self):
        """Beats of the values of one weight tile (slots x columns bytes)."""
        return self.beats(8 * self.config.structured.multipliers)

    @cached_property
    def index_beats(self):
        """Beats of the indices of one sparse weight tile."""
        return self.beats(self.index_bits * self.config.structured.multipliers)

    def tile_beats(self, n):
        """Beats of one weight tile of pattern ``n``:block; dense tiles carry no indices."""
        return self.value_beats + (self.index_beats if n < self.config.structured.block else 0)

    @cached_property
    def weight_beats(self):
        """Beats in the weight buffer."""
        return self.config.memory.weight_bytes // self.beat_bytes

    # -- basis engine --------------------------------------------------------------------------------------------
    @cached_property
    def basis_slices(self):
        """Slices of all blocks."""
        return self.config.basis.blocks * self.config.basis.slices

    @cached_property
    def tap_row_beats(self):
        """Beats of one row of taps: a signed byte for each multiplier."""
        return self.beats(8 * self.config.basis.multiplications)

    @cached_property
    def lane_code_bits(self):
        """Bits of one lane's coefficient in a series tile: place in its group, non-zero, sign."""
        return self.config.basis.group.bit_length() - 1 + 2

    @cached_property
    def series_tile_beats(self):
        """Beats of one tile of series coefficients: a code for each lane of each slice."""
        return self.beats(self.basis_slices * self.config.basis.lanes * self.lane_code_bits)

    def series_fetch(self, n):
        """Channel groups that one stream word of pattern ``n``:group covers."""
        return min(self.config.basis.lanes // n, self.config.basis.stream_groups)

    @cached_property
    def segment_table_beats(self):
        """Beats of the table of segment lengths that begins the coefficients of the maps variant."""
        return self.beats(16 * self.config.basis.blocks)

    @cached_property
    def operand(self):
        """Format of an activation less its zero point."""
        return IntSpec(self.activation.bits + 1)

    @cached_property
    def intermediate(self):
        """Format of IR."""
        return IntSpec(self.config.basis.intermediate_bits)

    @cached_property
    def coefficient_groups(self):
        """Most channel groups of a pixel that one pass of the coefficient stage adds up (field ``groups``)."""
        return min(self.config.basis.coefficient_rows * self.config.basis.stream_groups, 255)

    @cached_property
    def exact_intermediate(self):
        """Format that holds IR before saturation, for any coefficients."""
        return sum_spec(self.coefficient_groups * self.config.basis.group, self.operand)

    @cached_property
    def basis_sum(self):
        """Format of one block's sum over all its multipliers and all micro-steps of one output."""
        b = self.config.basis
        factor = max(self.intermediate, self.operand, key=lambda spec: spec.bits)
        return sum_spec(b.slices * b.multipliers * b.tap_rows, factor, IntSpec(8))

    # -- other memories ------------------------------------------------------------------------------------------
    @cached_property
    def residual_units(self):
        """Units in the residual buffer."""
        return self.config.memory.residual_bytes // self.unit_bytes

    @cached_property
    def parameter_words(self):
        """Beats in the parameter memory."""
        return self.config.memory.parameter_groups * self.parameter_beats

    @cached_property
    def digest_value(self):
        """The config digest as a 48-bit integer."""
        return int(self.config.digest, 16)
