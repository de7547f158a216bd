"""Bit formats shared by RTL and software: named records, packed and unpacked by one table each.

Fields are laid out from the lowest bit upwards in the order given, elements of an array likewise. `Record.pack`
refuses what does not fit, where a hardware layout would cut silently.
"""
import operator
from typing import NamedTuple

from spec.config import IntSpec
from spec.derive import Sizes
from spec.errors import InputError

BIT = IntSpec(1, signed=False)


def unsigned(bits):
    """Unsigned format of ``bits`` bits."""
    return IntSpec(bits, signed=False)


class Field(NamedTuple):
    """One field: name, element format, array length (None: a scalar), meaning."""

    name: str
    elem: IntSpec
    count: int | None
    doc: str

    @property
    def bits(self):
        """Width of the whole field."""
        return self.elem.bits * (1 if self.count is None else self.count)


class Record(NamedTuple):
    """An ordered set of fields."""

    name: str
    fields: tuple[Field, ...]

    @property
    def bits(self):
        """Width of the whole record."""
        return sum(f.bits for f in self.fields)

    def offset(self, name):
        """Lowest bit of a field."""
        at = 0
        for f in self.fields:
            if f.name == name:
                return at
            at += f.bits
        raise KeyError(name)

    def pack(self, **values):
        """Integer whose bits are the record. Raises InputError for missing, extra or out-of-range fields."""
        if values.keys() != (names := {f.name for f in self.fields}):
            odd = sorted(values.keys() ^ names)
            raise InputError(f"fields must be exactly {sorted(names)}; wrong or missing: {odd}", field=self.name)
        word = at = 0
        for f in self.fields:
            elems = [values[f.name]] if f.count is None else list(values[f.name])
            if len(elems) != (f.count or 1):
                raise InputError(f"must have {f.count} elements", field=f"{self.name}.{f.name}", value=len(elems))
            for value in map(operator.index, elems):
                if not f.elem.lo <= value <= f.elem.hi:
                    raise InputError(f"must be in {f.elem.lo}..{f.elem.hi}", field=f"{self.name}.{f.name}", value=value)
                word |= (value & (1 << f.elem.bits) - 1) << at
                at += f.elem.bits
        return word

    def unpack(self, word):
        """Field values of an integer (bits above the record are ignored)."""
        out = {}
        for f in self.fields:
            elems = []
            for _ in range(f.count or 1):
                value, word = word & (1 << f.elem.bits) - 1, word >> f.elem.bits
                elems.append(value - (1 << f.elem.bits) if value > f.elem.hi else value)
            out[f.name] = elems[0] if f.count is None else elems
        return out


def step_entry(taps):
    """One step of an output tile's K loop, as it stands in the step table (128 bits in memory).

    A step streams every pixel of the output tile once past one weight tile. Each pixel's fetch has
    ``2**segments_log2`` segments of ``L = fetch_blocks(2**n_log2) >> segments_log2`` consecutive blocks; segment j
    starts at block address ``pixel_address + offset[j]``, a multiple of L, and delivers the blocks at positions
    j*L .. j*L + L-1 of the fetch. Enabled segments must not meet in a bank.
    """
    return Record("step_entry", (
        Field("offset", unsigned(16), taps, "Block offset of each segment from the pixel's address."),
        Field("enable", BIT, taps, "1: the segment is read. Slots on a disabled segment must hold weight 0."),
        Field("n_log2", unsigned(3), None, "log2 of N of the step's pattern N:block; N = block is dense."),
        Field("segments_log2", unsigned(2), None, "log2 of the number of segments."),
        Field("hold", BIT, None, "1: keep the weights of the step before; no tile is read from the weight buffer."),
    ))


def column_parameters():
    """Requantisation parameters of one output channel (64 bits in memory)."""
    return Record("column_parameters", (
        Field("bias", IntSpec(32), None, "Added to the accumulator before scaling."),
        Field("multiplier", unsigned(16), None, "Scale = multiplier / 2**(shift + 14)."),
        Field("shift", unsigned(5), None, "See multiplier."),
        Field("reserved", unsigned(11), None, "Must be 0."),
    ))


def mac_operand(config):
    """What the stand-alone N:M MAC unit takes per beat: one weight tile column and the stream word it works on."""
    s, sizes = config.structured, Sizes(config)
    return Record("mac_operand", (
        Field("stream", IntSpec(8), sizes.stream_blocks * s.block, "Activations, block after block, one byte each."),
        Field("value", IntSpec(8), s.slots, "Weights, slot 0 in the lowest bits, one byte each."),
        Field("index", unsigned(sizes.index_bits), s.slots, "Element inside the slot's block; ignored when dense."),
        Field("n_log2", unsigned(3), None, "log2 of N of this beat's pattern; beats of one sum may differ (a series)."),
        Field("last", BIT, None, "1 on the last beat of a sum."),
    ))


def mac_sum(config):
    """What the stand-alone N:M MAC unit gives per sum."""
    return Record("mac_sum", (
        Field("sum", IntSpec(config.structured.accumulator_bits), None, "Sum of all products since the last sum."),
        Field("overflow", BIT, None, "1: the sum left its format; `sum` is meaningless."),
    ))
