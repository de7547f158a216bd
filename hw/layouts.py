"""Amaranth layouts of the records in `spec`: what software packs and what RTL reads are one table."""
from amaranth.hdl import Shape
from amaranth.lib import data

from spec.formats import Record
from spec.isa import INSTRUCTIONS


def from_record(record):
    """Amaranth layout of a `spec.formats` record; bit for bit what ``record.pack`` writes."""
    def shape(f):
        elem = Shape(f.elem.bits, f.elem.signed)
        return elem if f.count is None else data.ArrayLayout(elem, f.count)
    return data.StructLayout({f.name: shape(f) for f in record.fields})


def instruction_layout(opcode):
    """Layout of an instruction without its operation code and its reserved bits."""
    record = INSTRUCTIONS[opcode]
    return from_record(Record(record.name, record.fields[1:-1]))


def error_layout():
    """How a component reports trouble: held from the first error until reset."""
    return data.StructLayout({"valid": 1, "code": 8, "address": 40})
