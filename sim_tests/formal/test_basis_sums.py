"""Sums of the basis engine fit: a series lane's word, IR before it is clamped, a block's row, at every shipped preset.

Each expression is built as `hw.basis` builds it, with every operand anywhere in its interval, in unbounded integers;
each width is proved to be enough, and for the sums that `spec.derive` sizes one bit less is refused.
"""
from amaranth.hdl import Mux, Shape, Signal
import pytest
import z3

from hw.structured.column import tree_sum
from sim_tests.formal.test_requantize_widths import fits
from spec.config import IntSpec, load, presets
from spec.derive import Sizes

BASIS = [name for name in presets() if load(name).basis is not None]
SERIES = [name for name in BASIS if load(name).basis.coefficients == "series"]
#: An activation less a zero point.
OPERAND = (-128 - 127, 127 + 128)
#: That, or its inverse.
VALUE = (min(OPERAND[0], ~OPERAND[1]), max(OPERAND[1], ~OPERAND[0]))


def signals(count, bits, interval, name):
    """Signed signals and the intervals they are in."""
    out = [Signal(Shape(bits, True), name=f"{name}{n}") for n in range(count)]
    assert IntSpec(bits).lo <= interval[0] and interval[1] <= IntSpec(bits).hi
    return out, {s.name: interval for s in out}


def test_operand_holds_its_values():
    for name in BASIS:
        spec = Sizes(load(name)).operand
        assert spec.lo <= VALUE[0] and VALUE[1] <= spec.hi and spec.bits == 9


@pytest.mark.parametrize("preset", SERIES)
def test_word_of_a_series_slice(preset):
    """``tree_sum(values) + tree_sum(carries)`` in `SeriesSlice.partial`: a lane gives x, or ~x and 1, or 0."""
    config = load(preset)
    b, z = config.basis, Sizes(config)
    values, known = signals(b.lanes, z.operand.bits, VALUE, "value")
    carries = [Signal(1, name=f"carry{n}") for n in range(b.lanes)]
    exact = tree_sum(values) + tree_sum(carries)
    width = IntSpec(z.operand.bits + (b.lanes - 1).bit_length() + 1)
    assert fits(None, exact, width.lo, width.hi, known | {c.name: (0, 1) for c in carries}) == z3.unsat


@pytest.mark.parametrize("preset", BASIS)
def test_intermediate_before_it_is_clamped(preset):
    """A pixel of ``coefficient_groups`` groups with a coefficient everywhere, word by word."""
    config = load(preset)
    b, z = config.basis, Sizes(config)
    word = min(b.stream_groups, z.coefficient_groups) * b.group
    rest = z.coefficient_groups * b.group - word
    (total, part), _ = signals(2, 40, (0, 0), "sum")
    known = {s.name: (n * OPERAND[0], n * OPERAND[1]) for s, n in ((total, rest), (part, word))}
    spec = z.exact_intermediate
    assert fits(None, total + part, spec.lo, spec.hi, known) == z3.unsat
    narrower = IntSpec(spec.bits - 1)
    assert fits(None, total + part, narrower.lo, narrower.hi, known) == z3.sat


@pytest.mark.parametrize("preset", BASIS)
def test_row_of_a_block(preset):
    """``Mux(keep, kept, 0) + tree_sum(products)`` with all but one of ``tap_rows`` micro-steps in ``kept``."""
    config = load(preset)
    b, z = config.basis, Sizes(config)
    bits = max(z.intermediate.bits, z.operand.bits)
    lo, hi = IntSpec(bits).lo * 127, IntSpec(bits).lo * -128
    each = b.slices * b.multipliers
    products, known = signals(each, bits + 8, (lo, hi), "product")
    before = (b.tap_rows - 1) * each
    kept, keep = Signal(Shape(z.basis_sum.bits, True), name="kept"), Signal(name="keep")
    known |= {"kept": (before * lo, before * hi), "keep": (0, 1)}
    exact, spec = Mux(keep, kept, 0) + tree_sum(products), z.basis_sum
    assert tree_sum(products).shape().width <= len(exact) and exact.shape().signed
    assert IntSpec(spec.bits).lo <= before * lo and before * hi <= IntSpec(spec.bits).hi
    assert fits(None, exact, spec.lo, spec.hi, known) == z3.unsat
    narrower = IntSpec(spec.bits - 1)
    assert fits(None, exact, narrower.lo, narrower.hi, known) == z3.sat
