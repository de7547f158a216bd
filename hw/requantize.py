"""Requantisation: int32 accumulators to int8 activations, the only rounding in the accelerator."""
from amaranth.hdl import Module, Mux, Shape, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from spec.config import Config, IntSpec
from spec.derive import BIAS, FRACTION_BITS, MULTIPLIER, SHIFT, Sizes

#: Activations, zero points and clamps are int8 (docs/numerics.md).
ACTIVATION = IntSpec(8)
#: Weight of the rounding digit.
HALF = 1 << FRACTION_BITS - 1


def _span(lo, hi):
    """Narrowest signed shape that holds every integer in lo..hi."""
    return signed(max(hi.bit_length() if hi >= 0 else 0, (~lo).bit_length() if lo < 0 else 0) + 1)


def widths(accumulator):
    """Shapes of the requantiser's intermediate values, by interval arithmetic from the formats of its inputs.

    Args:
        accumulator: `IntSpec` of an accumulator.

    Returns: dict of Amaranth shapes, for the names of docs/numerics.md: ``A``, ``product`` (A * multiplier), ``u``,
    ``r`` (residual - residual_zero_point), ``v``, ``t`` and ``y`` (before the clamp). A value of the given input
    formats never leaves its shape, and each shape is the narrowest for which that holds.
    """
    a_lo, a_hi = accumulator.lo + BIAS.lo, accumulator.hi + BIAS.hi
    p_lo, p_hi = a_lo * MULTIPLIER.hi, a_hi * MULTIPLIER.hi
    r_lo, r_hi = ACTIVATION.lo - ACTIVATION.hi, ACTIVATION.hi - ACTIVATION.lo
    v_lo, v_hi = r_lo * MULTIPLIER.hi, r_hi * MULTIPLIER.hi
    t_lo, t_hi = p_lo + v_lo + HALF >> FRACTION_BITS, p_hi + v_hi + HALF >> FRACTION_BITS
    return {"A": _span(a_lo, a_hi), "product": _span(p_lo, p_hi), "u": _span(p_lo, p_hi), "r": _span(r_lo, r_hi),
            "v": _span(v_lo, v_hi), "t": _span(t_lo, t_hi),
            "y": _span(t_lo + ACTIVATION.lo, t_hi + ACTIVATION.hi)}


class Requantizer(wiring.Component):
    """Scale, round and clamp one pixel of accumulators, all columns in parallel.

    Per column, exactly as docs/numerics.md::

        A = acc + bias
        u = (A * multiplier) >> shift
        v = (residual - residual_zero_point) * residual_multiplier      0 unless residual_enable
        t = (u + v + 2**13) >> 14
        data = clamp(t + zero_point, low, high)

    Range: exact for every input; widths come from `widths`, nothing saturates before the clamp.
    Flow control: stallable; all stages move together, ``i.ready`` follows ``o.ready`` in the same cycle.
    Latency: ``latency`` cycles. Throughput: one pixel per cycle.

    Configuration inputs must not change while a pixel that needs them is inside: they may change on any clock edge
    before which ``settled`` was 1.

    Args:
        config: `spec.config.Config`.

    Members:
        i: In, stream of {acc: [columns] accumulators, residual: [columns] int8, last}.
        o: Out, stream of {data: [columns] int8, last}.
        parameters: In, [columns] of {bias, multiplier, shift}.
        zero_point, low, high: In, int8; low <= high.
        residual_enable, residual_zero_point, residual_multiplier: In, 1 bit, int8, unsigned 16 bits.
        settled: Out, 1 if after this cycle every pixel taken so far no longer looks at the configuration inputs.
    """

    #: Cycles from a transfer on ``i`` to ``o.valid``; the same number of registers on the way. A test measures it.
    latency = 4

    def __init__(self, *, config):
        if not isinstance(config, Config):
            raise TypeError(f"Requantizer configuration must be a Config, not {config!r}")
        self._accumulator = Sizes(config).accumulator
        self._columns = columns = Sizes(config).columns
        int8 = Shape(ACTIVATION.bits, ACTIVATION.signed)
        parameters = data.StructLayout({"bias": Shape(BIAS.bits, BIAS.signed),
                                        "multiplier": Shape(MULTIPLIER.bits, MULTIPLIER.signed),
                                        "shift": Shape(SHIFT.bits, SHIFT.signed)})
        super().__init__({
            "i": In(stream.Signature(data.StructLayout({
                "acc": data.ArrayLayout(signed(self._accumulator.bits), columns),
                "residual": data.ArrayLayout(int8, columns),
                "last": 1}))),
            "o": Out(stream.Signature(data.StructLayout({"data": data.ArrayLayout(int8, columns), "last": 1}))),
            "parameters": In(data.ArrayLayout(parameters, columns)),
            "zero_point": In(int8),
            "low": In(int8),
            "high": In(int8),
            "residual_enable": In(1),
            "residual_zero_point": In(int8),
            "residual_multiplier": In(Shape(MULTIPLIER.bits, MULTIPLIER.signed)),
            "settled": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        self.exact = {}
        advance = Signal()
        valid = [self.i.valid, *(Signal(name=f"valid{n}") for n in range(1, self.latency)), self.o.valid]
        last = [self.i.p.last, *(Signal(name=f"last{n}") for n in range(1, self.latency)), self.o.p.last]
        m.d.comb += [
            advance.eq(self.o.ready | ~self.o.valid),
            self.i.ready.eq(advance),
            # Only the last of the configuration's readers (the clamp behind stage 3) may hold a pixel, on its way out.
            self.settled.eq(~(valid[0] | valid[1] | valid[2]) & (~valid[3] | advance)),
        ]
        with m.If(advance):
            for n in range(self.latency):
                m.d.sync += [valid[n + 1].eq(valid[n]), last[n + 1].eq(last[n])]
        for column in range(self._columns):
            self._build_column(m, column, advance)
        return m

    def _build_column(self, m, column, advance):
        """One column's four stages: add, multiply, shift, round and clamp."""
        shapes, parameters = widths(self._accumulator), self.parameters[column]
        a, product, u, r, v, v_late = (Signal(shapes[name], name=f"{label}{column}") for name, label in (
            ("A", "a"), ("product", "product"), ("u", "u"), ("r", "r"), ("v", "v"), ("v", "v_late")))
        t, y = Signal(shapes["t"], name=f"t{column}"), Signal(shapes["y"], name=f"y{column}")
        # Each value beside the untruncated expression assigned to it: sim_tests/formal proves that nothing is lost.
        self.exact[column] = exact = {
            "a": (a, self.i.p.acc[column] + parameters.bias),
            "r": (r, self.i.p.residual[column] - self.residual_zero_point),
            "product": (product, a * parameters.multiplier),
            "v": (v, Mux(self.residual_enable, r * self.residual_multiplier, 0)),
            "u": (u, product >> parameters.shift),
            "v_late": (v_late, v),
            "t": (t, (u + v_late + HALF) >> FRACTION_BITS),
            "y": (y, t + self.zero_point),
            "data": (self.o.p.data[column], Mux(y < self.low, self.low, Mux(y > self.high, self.high, y))),
        }
        unregistered = {"t", "y"}
        m.d.comb += [exact[name][0].eq(exact[name][1]) for name in sorted(unregistered)]
        with m.If(advance):
            m.d.sync += [register.eq(value) for name, (register, value) in exact.items() if name not in unregistered]
