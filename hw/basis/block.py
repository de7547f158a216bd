"""One block of the basis engine: pixel windows, multipliers and their adder tree."""
from amaranth.hdl import Array, Module, Mux, Shape, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from hw.structured.column import tree_sum
from spec.derive import Sizes


class BasisBlock(wiring.Component):
    """``sum += tap[m, i] * window[m][position[i]]`` over all slices m and multipliers i of one output channel.

    Each slice keeps the last ``window`` values, the newest at 0: ``push`` shifts in ``ir[m]``, or ``direct[m]`` with
    ``dense``. ``pointwise`` instead puts ``direct[m * q + i]`` at position i. A multiplier whose ``enable`` is 0 (its
    position lies in padding) works on 0. Three cycles after ``position`` (and two after ``taps``, which come a cycle
    later than their address) the products are in ``sum``; ``keep`` at that time adds what was there before, so that a
    row of a kernel may take several micro-steps.

    Range: exact (`spec.derive.Sizes.basis_sum`). Latency: 3 cycles. Throughput: slices x q products per cycle.
    Parameters: config (spec.config.Config).
    """

    latency = 3

    @staticmethod
    def members(config):
        """Signature members."""
        b, sizes = config.basis, Sizes(config)
        return {
            "ir": In(data.ArrayLayout(signed(sizes.intermediate.bits), b.slices)),
            "direct": In(data.ArrayLayout(signed(sizes.operand.bits), direct_width(config))),
            "push": In(1), "dense": In(1), "pointwise": In(1),
            "position": In(data.ArrayLayout(range(max(b.window, 2)), b.multipliers)), "enable": In(b.multipliers),
            "taps": In(data.ArrayLayout(signed(8), b.slices * b.multipliers)), "keep": In(1), "add": In(1),
            "sum": Out(Shape(sizes.basis_sum.bits, True))}

    def __init__(self, *, config):
        self._config = config
        super().__init__(self.members(config))

    def elaborate(self, platform):
        m = Module()
        b, sizes = self._config.basis, Sizes(self._config)
        bits = max(sizes.intermediate.bits, sizes.operand.bits)
        products = []
        for s in range(b.slices):
            window = [Signal(signed(bits), name=f"window{s}_{w}", reset_less=True) for w in range(b.window)]
            direct = self.direct[s] if s < direct_width(self._config) else 0
            with m.If(self.push):
                with m.If(self.pointwise):
                    for i in range(b.multipliers):
                        at = s * b.multipliers + i
                        m.d.sync += window[i].eq(self.direct[at] if at < b.group else 0)
                with m.Else():
                    m.d.sync += window[0].eq(Mux(self.dense, direct, self.ir[s]))
                    m.d.sync += [older.eq(newer) for older, newer in zip(window[1:], window)]
            for i in range(b.multipliers):
                value = Signal(signed(bits), name=f"value{s}_{i}", reset_less=True)
                product = Signal(signed(bits + 8), name=f"product{s}_{i}", reset_less=True)
                position = self.position[i]
                chosen = Array(window)[position] if b.window > 1 else window[0]
                m.d.sync += [value.eq(Mux(self.enable[i], chosen, 0)),
                             product.eq(value * self.taps[s * b.multipliers + i])]
                products.append(product)
        total = Signal.like(self.sum, reset_less=True)
        kept = Signal.like(self.sum, reset_less=True)
        m.d.sync += total.eq(tree_sum(products))
        m.d.comb += self.sum.eq(Mux(self.keep, kept, 0) + total)
        with m.If(self.add):
            m.d.sync += kept.eq(self.sum)
        return m


def direct_width(config):
    """Activations that reach the multipliers without the coefficient stage."""
    return max(config.basis.group, config.basis.slices)
