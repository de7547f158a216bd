"""N:M sparsity and series of it, along the input channels of each tap.

Source: reference on TASD (arXiv 2403.07953, section 3); the rule for ties is golden's, the lowest channel wins.
"""
import numpy as np

from compress.training.projections.projection import (
    WEIGHT_BITS, Cost, Encoded, Projection, checked, index_bits, taps_of)
from golden.structured import tasd_series
from spec.config import Pattern
from spec.derive import ceil_div
from spec.errors import InputError


class NM(Projection):
    """At most N non-zeros in every M consecutive input channels, or a sum of such terms; a last block that is shorter
    counts as padded with zeros.

    The greedy series gives the nearest member if its Ms agree or rise, each a multiple of the one before (``2:4+1:8``);
    else nearly so.

    Options: pattern: ``"2:4"``, or a series ``"4:8+1:8"``.
    """

    def __init__(self, *, pattern):
        self.patterns = tuple(Pattern.parse(part, field="pattern") for part in str(pattern).split("+"))

    def check(self, shape):
        for p in self.patterns:
            if p.m > shape[1]:
                raise InputError(f"must have blocks of at most {shape[1]} input channels", field="pattern",
                                 value=str(p))

    def _terms(self, weight):
        weight = checked(weight)
        self.check(weight.shape)
        return tasd_series(weight, self.patterns, axis=1)[0]

    def project(self, weight):
        first, *rest = self._terms(weight)
        return sum(rest, first)

    def encode(self, weight):
        """Parts of term n: ``values<n>`` [O, taps, blocks, N] and ``places<n>``, their index in the block; unused slots
        hold value 0, place 0."""
        weight, parts = checked(weight), {}
        for n, (term, (size, block)) in enumerate(zip(self._terms(weight), self.patterns), 1):
            rows = np.moveaxis(term.reshape(*term.shape[:2], -1), 1, 2)                    # [O, taps, I]
            rows = np.pad(rows, [(0, 0), (0, 0), (0, -rows.shape[2] % block)])
            rows = rows.reshape(*rows.shape[:2], -1, block)
            places = np.argsort(rows == 0, axis=-1, kind="stable")[..., :size]
            values = np.take_along_axis(rows, places, -1)
            parts |= {f"values{n}": values, f"places{n}": np.where(values != 0, places, 0).astype(np.uint8)}

        def rebuild(**parts):
            total = np.zeros(weight.shape, weight.dtype)
            for n, (_, block) in enumerate(self.patterns, 1):
                values, places = parts[f"values{n}"], parts[f"places{n}"]
                rows = np.zeros((*values.shape[:3], block), weight.dtype)
                for slot in range(values.shape[3]):          # one after the other: unused slots share place 0
                    at = places[..., slot:slot + 1].astype(np.int64)
                    held = np.take_along_axis(rows, at, -1)
                    np.put_along_axis(rows, at, held + values[..., slot:slot + 1], -1)
                rows = rows.reshape(*rows.shape[:2], -1)[:, :, :weight.shape[1]]
                total += np.moveaxis(rows, 2, 1).reshape(weight.shape)
            return total

        bits = self.cost(weight.shape).bits
        return Encoded(parts=parts, bits=bits, rebuild=rebuild)

    def cost(self, shape, positions=1, inputs=None):
        """Every slot counts, used or not: ``sum over terms of O R S ceil(I / M) N`` values of `WEIGHT_BITS` and an
        index of ceil(log2 M) bits (2:4: 5 bits per dense weight)."""
        self.check(shape)
        slots = [shape[0] * taps_of(shape) * ceil_div(shape[1], m) * n for n, m in self.patterns]
        bits = sum(count * (WEIGHT_BITS + index_bits(m)) for count, (_, m) in zip(slots, self.patterns))
        return Cost(sum(slots), sum(slots) * positions, bits)
