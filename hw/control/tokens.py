"""Dependency tokens: a counter for each ordered pair of units."""
from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from spec.derive import TOKEN_BITS

#: The units, in the order of `spec.isa.Unit`.
UNITS = ("load", "execute", "store")


class Tokens(wiring.Component):
    """``count[a, b] += push_a_b - take_a_b`` for every pair of different units a, b (from a to b).

    ``clear`` empties all counters (a program starts without tokens). ``available_a_b`` is 1 while a token waits.
    ``overflow`` is held once a counter passes its range.
    Latency: a token pushed in one cycle is available in the next.
    """

    def __init__(self):
        ports = {"clear": In(1), "overflow": Out(1)}
        for a in UNITS:
            for b in UNITS:
                if a != b:
                    ports |= {f"push_{a}_{b}": In(1), f"take_{a}_{b}": In(1), f"available_{a}_{b}": Out(1)}
        super().__init__(ports)

    def elaborate(self, platform):
        m = Module()
        for a in UNITS:
            for b in UNITS:
                if a == b:
                    continue
                count = Signal(TOKEN_BITS, name=f"count_{a}_{b}")
                push, take = getattr(self, f"push_{a}_{b}"), getattr(self, f"take_{a}_{b}")
                m.d.comb += getattr(self, f"available_{a}_{b}").eq(count != 0)
                m.d.sync += count.eq(count + push - take)
                with m.If(push & ~take & (count == (1 << TOKEN_BITS) - 1)):
                    m.d.sync += self.overflow.eq(1)
                with m.If(self.clear):
                    m.d.sync += count.eq(0)
        return m
