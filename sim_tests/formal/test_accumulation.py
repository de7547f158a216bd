"""Sums fit: every shipped preset's column sum, and its accumulators at the longest sum that lowering accepts.

Column: the expression of `hw.structured.column.tree_sum` over all slots, each product anywhere in its interval, in
unbounded integers. Accumulator: k-induction on a K loop of such sums. Each width is proved to be enough, and one bit
less is refused.
"""
from amaranth.asserts import AnySeq, Initial
from amaranth.hdl import Assert, Assume, Elaboratable, Module, ResetSignal, Shape, Signal
import numpy as np
import pytest
import z3

from compress.network import Convolution, Requantization, Term
from hw.structured.column import tree_sum
from lowering.job import make_job
from lowering.layout import Placement
from sim_tests.formal.prove import run
from sim_tests.formal.test_requantize_widths import fits
from spec.config import IntSpec, Pattern, load, presets
from spec.derive import Sizes, sum_spec
from spec.errors import InputError


STRUCTURED = [name for name in presets() if load(name).structured is not None]


def product_interval(sizes):
    """Ends of one product."""
    ends = [a * w for a in (sizes.activation.lo, sizes.activation.hi) for w in (sizes.weight.lo, sizes.weight.hi)]
    return min(ends), max(ends)


@pytest.mark.parametrize("preset", STRUCTURED)
def test_column_sum(preset):
    config = load(preset)
    sizes = Sizes(config)
    lo, hi = product_interval(sizes)
    bits = sizes.activation.bits + sizes.weight.bits
    products = [Signal(Shape(bits, True), name=f"product{n}") for n in range(config.structured.slots)]
    exact, proven = tree_sum(products), {p.name: (lo, hi) for p in products}
    assert IntSpec(bits).lo <= lo <= hi <= IntSpec(bits).hi
    spec = sizes.column_sum
    assert spec == sum_spec(config.structured.slots, sizes.activation, sizes.weight)
    assert exact.shape().width >= spec.bits and exact.shape().signed, "the tree itself would cut"
    assert fits(None, exact, spec.lo, spec.hi, proven) == z3.unsat
    narrower = IntSpec(spec.bits - 1)
    assert fits(None, exact, narrower.lo, narrower.hi, proven) == z3.sat


def longest(sizes):
    """Products of the largest magnitude that one sum may have: what `lowering.job` accepts."""
    return sizes.accumulator.hi // (1 << sizes.activation.bits - 1 << sizes.weight.bits - 1)


def term(values):
    return Term(pattern=Pattern(1, 1), values=values)


@pytest.mark.parametrize("preset", STRUCTURED)
def test_lowering_accepts_exactly_that_much(preset):
    config = load(preset)
    sizes = Sizes(config)
    for depth in (longest(sizes), longest(sizes) + 1):
        def place(name, channels):
            return Placement(name=name, offset=0, images=1, planes=-(-channels // sizes.unit_bytes), height=1, width=1,
                             channels=channels, unit_bytes=sizes.unit_bytes, zero_point=0)
        layer = Convolution(
            name="wide", input="x", output="y", residual=None, stride=(1, 1), pads=(0, 0, 0, 0), dilation=(1, 1),
            groups=1, format="dense", terms=(term(np.full((1, 1, 1, depth), sizes.weight.lo, np.int8)),),
            requantization=Requantization(bias=np.zeros(1, np.int32), multiplier=np.full(1, 16384, np.uint16),
                                          shift=np.zeros(1, np.uint8), zero_point=0))
        tensors = {"x": place("x", depth), "y": place("y", 1)}
        if depth == longest(sizes):
            make_job(layer, sizes=sizes, mark=1, tensors=tensors, batch=1)
        else:
            with pytest.raises(InputError, match="must have worst-case sums within"):
                make_job(layer, sizes=sizes, mark=1, tensors=tensors, batch=1)


class KLoop(Elaboratable):
    """An accumulator of ``bits`` bits that takes column sums until the longest sum is complete, then begins anew.

    Every step adds ``slots`` products, the last one those that are left.
    """

    def __init__(self, sizes, bits):
        self.sizes, self.bits = sizes, bits

    def elaborate(self, platform):
        m = Module()
        lo, hi = product_interval(self.sizes)
        steps, rest = divmod(longest(self.sizes), slots := self.sizes.config.structured.slots)
        column = AnySeq(self.sizes.column_sum.bits).as_signed()
        acc, n = Signal(Shape(self.bits, True)), Signal(range(steps + 1))
        exact = acc + column
        with m.If(~Initial()):
            m.d.comb += Assume(~ResetSignal())
        with m.If(n == steps):
            m.d.comb += [Assume(column >= lo * rest), Assume(column <= hi * rest)]
            m.d.sync += [acc.eq(0), n.eq(0)]
        with m.Else():
            m.d.comb += [Assume(column >= lo * slots), Assume(column <= hi * slots)]
            m.d.sync += [acc.eq(exact), n.eq(n + 1)]
        m.d.comb += [Assert(exact == exact[:self.bits].as_signed()), Assert(n <= steps),
                     Assert(acc <= hi * slots * n), Assert(acc >= lo * slots * n)]      # makes it inductive
        return m


@pytest.mark.parametrize("preset", STRUCTURED)
def test_accumulator_at_the_longest_sum(preset, tmp_path):
    sizes = Sizes(load(preset))
    for bits, proved in ((sizes.accumulator.bits, True), (sizes.accumulator.bits - 1, False)):
        folder = tmp_path / str(bits)
        folder.mkdir()
        status, log = run(KLoop(sizes, bits), folder, depth=1)
        assert (status == 0) == proved, log[-3000:]
        assert ("successful proof by k-induction" in log) == proved, log[-3000:]
