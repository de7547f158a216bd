"""Unbounded proof: no value of the requantiser loses a bit, for every input; and one bit less would lose some.

The expressions are those that `Requantizer.elaborate` assigns, translated to unbounded integers of z3 (Amaranth's
operators are exact; only an assignment cuts). Each stage's proven interval is what the next stage may assume, so the
whole pipeline follows by induction over its registers, whose reset values lie inside.
"""
import dataclasses

from amaranth.hdl import Const, Fragment, Shape, Signal
from amaranth.hdl._ast import Operator, SwitchValue
import pytest
import z3

from hw.requantize import Requantizer, widths
from spec.config import IntSpec, load


class Translation:
    """An Amaranth expression as a z3 integer, with the ranges of its leaves."""

    def __init__(self, proven):
        self.proven, self.leaves, self.rules = proven, {}, []

    def leaf(self, value):
        """One variable per signal, or per named piece of one; a proven interval beats the shape's own range."""
        name = repr(value)
        if name not in self.leaves:
            self.leaves[name] = variable = z3.Int(name)
            shape = value.shape()
            spec = IntSpec(shape.width, shape.signed)
            known = self.proven.get(value.name) if isinstance(value, Signal) else None
            lo, hi = known or (spec.lo, spec.hi)
            self.rules += [lo <= variable, variable <= hi]
        return self.leaves[name]

    def integer(self, value):
        """The exact value. Anything that is not arithmetic is a leaf: it may be any number of its shape."""
        if isinstance(value, Const):
            return z3.IntVal(value.value)
        if isinstance(value, SwitchValue):
            (zero, if_zero), (default, otherwise) = value.cases
            assert set(zero[0]) == {"0"} and default is None, "not a Mux"
            return z3.If(self.truth(value.test), self.integer(otherwise), self.integer(if_zero))
        if isinstance(value, Operator) and value.operator in ("+", "-", "*", ">>") and len(value.operands) == 2:
            a, b = value.operands
            if value.operator == ">>":
                return self.shifted(self.integer(a), b)
            a, b = self.integer(a), self.integer(b)
            return {"+": a + b, "-": a - b, "*": a * b}[value.operator]
        return self.leaf(value)

    def truth(self, value):
        if isinstance(value, Operator) and value.operator in ("<", ">"):
            a, b = map(self.integer, value.operands)
            return a < b if value.operator == "<" else a > b
        return self.integer(value) != 0

    def shifted(self, value, amount):
        """Arithmetic right shift: floor division (z3's ``/`` of integers floors for positive divisors)."""
        if isinstance(amount, Const):
            return value / (1 << amount.value)
        which, cases = self.integer(amount), value
        for n in range(1, 1 << len(amount)):
            cases = z3.If(which == n, value / (1 << n), cases)
        return cases


def fits(value, expression, lo, hi, proven):
    """z3's answer to "can ``expression`` leave lo..hi?": unsat is a proof, sat a counterexample."""
    solver, translation = z3.Solver(), Translation(proven)
    solver.set("timeout", 60_000)
    exact = translation.integer(expression)
    solver.add(*translation.rules, z3.Or(exact < lo, exact > hi))
    return solver.check()


def component(accumulator_bits):
    config = load("tiny")
    unit = Requantizer(config=dataclasses.replace(
        config, structured=dataclasses.replace(config.structured, accumulator_bits=accumulator_bits)))
    Fragment.get(unit, None)
    return unit


def intervals(accumulator):
    """The interval that each named value is claimed to stay in: the induction hypothesis, itself proved below."""
    a = accumulator.lo - 2**31, accumulator.hi + 2**31 - 1
    product = a[0] * 65535, a[1] * 65535
    v = -255 * 65535, 255 * 65535
    t = (product[0] + v[0] + 2**13) // 2**14, (product[1] + v[1] + 2**13) // 2**14
    return {"a": a, "r": (-255, 255), "product": product, "u": product, "v": v, "v_late": v, "t": t,
            "y": (t[0] - 128, t[1] + 127), "data": (-128, 127)}


@pytest.mark.parametrize("accumulator_bits", [16, 20, 31, 32])
def test_nothing_is_lost(accumulator_bits):
    unit, claimed = component(accumulator_bits), intervals(IntSpec(accumulator_bits))
    for column, exact in unit.exact.items():
        assert exact.keys() == claimed.keys(), "a value is assigned that nobody proves"
        if column:  # columns are alike
            continue
        proven = {f"{name}{column}": interval for name, interval in claimed.items()}
        for name, (value, expression) in exact.items():
            shape = Shape.cast(value.shape())
            spec, (lo, hi) = IntSpec(shape.width, shape.signed), claimed[name]
            assert lo <= 0 <= hi, "the reset value is outside"
            assert spec.lo <= lo and hi <= spec.hi, f"{name}: {lo}..{hi} does not fit {shape}"
            assert fits(value, expression, lo, hi, proven) == z3.unsat, f"{name} may leave {lo}..{hi}"


@pytest.mark.parametrize("name", ["A", "product", "u", "r", "v", "t", "y"])
def test_one_bit_less_is_refused(name):
    """The proof can fail: at one bit less z3 finds values that are cut."""
    unit, claimed = component(32), intervals(IntSpec(32))
    proven = {f"{key}0": interval for key, interval in claimed.items()}
    value, expression = unit.exact[0]["a" if name == "A" else name]
    narrower = IntSpec(widths(IntSpec(32))[name].width - 1)
    assert fits(value, expression, narrower.lo, narrower.hi, proven) == z3.sat
