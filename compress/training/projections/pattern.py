"""Pattern sparsity: every kernel keeps a few taps in one of few patterns; whole kernels are removed as well.

Source: X. Ma et al., "PCONV", AAAI 2020, and W. Niu et al., "PatDNN", ASPLOS 2020 (patterns and connectivity);
reference on other systems, section 22, for the rule that finds the patterns. Norms are squared throughout.
"""
import numpy as np

from compress.training import fields
from compress.training.projections.projection import (
    WEIGHT_BITS, Cost, Encoded, Projection, checked, index_bits, keep_count, largest, taps_of)
from spec.errors import InputError


class KernelPattern(Projection):
    """Kernels [R, S] of which each keeps the ``keep`` taps of one pattern of the layer, or nothing at all.

    For given patterns the nearest member: each kernel takes the pattern that keeps most of its energy (the first one
    wins ties), then the kernels that keep most energy stay.

    Options:
        keep: taps of a pattern. count: patterns of a layer. patterns: the patterns themselves, lists of taps in
        row-major order; without them `bind` finds them in a layer's first weight: the ``count`` most frequent among the
        kernels' ``keep`` largest taps (of equally frequent ones the first in order of taps).
        center: the middle tap is in every pattern. kernels: share of kernels that stay, above 0.
    """

    def __init__(self, *, keep=4, count=8, patterns=None, center=True, kernels=1.0):
        self.keep = fields.whole(keep, "keep", low=1, high=64)
        self.count = fields.whole(count, "count", low=1, high=256)
        self.center = fields.flag(center, "center")
        self.kernels = fields.number(kernels, "kernels", above=0, high=1)
        self.patterns = None
        if patterns is not None:
            if not isinstance(patterns, (list, tuple)) or not patterns:
                raise InputError("must be a list of lists of taps", field="patterns", value=patterns)
            self.patterns = sorted({tuple(sorted(fields.wholes(p, f"patterns[{n}]", high=4095, length=self.keep)))
                                    for n, p in enumerate(patterns)})
            if any(len(set(p)) < self.keep for p in self.patterns):
                raise InputError(f"must be lists of {self.keep} different taps", field="patterns", value=patterns)

    def check(self, shape):
        taps = taps_of(shape)
        if taps == 1:
            raise InputError("must be another projection for 1x1 kernels and matrices", field="kind", value="pattern")
        if self.keep > taps:
            raise InputError(f"must be at most {taps}", field="keep", value=self.keep)
        if self.center and not all(n % 2 for n in shape[2:]):
            raise InputError("must be false for kernels without a middle tap", field="center", value=self.center)
        for pattern in self.patterns or ():
            if pattern[-1] >= taps:
                raise InputError(f"must be lists of taps below {taps}", field="patterns", value=list(pattern))

    def bind(self, weight):
        if self.patterns is not None:
            return self
        return KernelPattern(keep=self.keep, count=self.count, patterns=self._frequent(checked(weight)),
                             center=self.center, kernels=self.kernels)

    def memory(self):
        return {} if self.patterns is None else {"patterns": [list(p) for p in self.patterns]}

    def _frequent(self, weight):
        """The most frequent patterns of the kernels that are not zero."""
        self.check(weight.shape)
        rows = np.abs(weight.reshape(-1, taps_of(weight.shape)))
        rows = rows[rows.any(axis=1)] if rows.any() else rows[:1]
        if self.center:
            rows = rows.copy()
            rows[:, rows.shape[1] // 2] = np.inf
        chosen = np.sort(np.argsort(-rows, axis=1, kind="stable")[:, :self.keep], axis=1)
        patterns, counts = np.unique(chosen, axis=0, return_counts=True)
        return patterns[np.argsort(-counts, kind="stable")[:self.count]].tolist()

    def _choose(self, weight):
        """(patterns bool [P, taps], id of each kernel, sorted numbers of the kernels that stay, kernels as rows)."""
        weight = checked(weight)
        bound = self.bind(weight)
        bound.check(weight.shape)
        rows = weight.reshape(-1, taps_of(weight.shape))
        masks = np.zeros((len(bound.patterns), rows.shape[1]), bool)
        for mask, pattern in zip(masks, bound.patterns):
            mask[list(pattern)] = True
        energy = np.square(rows, dtype=np.float64) @ masks.T
        ids = energy.argmax(axis=1)
        stay = largest(energy[np.arange(len(rows)), ids], keep_count(self.kernels, len(rows)))
        return masks, ids, stay, rows

    def project(self, weight):
        masks, ids, stay, rows = self._choose(weight)
        out = np.zeros_like(rows)
        out[stay] = np.where(masks[ids[stay]], rows[stay], 0)
        return out.reshape(weight.shape)

    def encode(self, weight):
        """Parts: present bool [O I]; ids uint8 of the kernels present, values [present, keep] in rising order of taps;
        table uint16 [patterns, keep]."""
        masks, ids, stay, rows = self._choose(weight)
        shape, dtype = weight.shape, weight.dtype
        table = np.nonzero(masks)[1].reshape(len(masks), self.keep)
        present = np.zeros(len(rows), bool)
        present[stay] = True

        def rebuild(present, ids, values, table):
            out = np.zeros((len(present), rows.shape[1]), dtype)
            kept = np.zeros((len(ids), rows.shape[1]), dtype)
            np.put_along_axis(kept, table[ids].astype(np.int64), values, axis=1)
            out[present] = kept
            return out.reshape(shape)

        parts = {"present": present, "ids": ids[stay].astype(np.uint8), "table": table.astype(np.uint16),
                 "values": np.take_along_axis(rows[stay], table[ids[stay]], axis=1)}
        return Encoded(parts=parts, bits=self._bits(len(rows), len(stay), len(table), rows.shape[1]), rebuild=rebuild)

    def _bits(self, kernels, stay, patterns, taps):
        map_bits = kernels if self.kernels < 1 else 0
        return map_bits + stay * (index_bits(patterns) + self.keep * WEIGHT_BITS) + patterns * taps

    def cost(self, shape, positions=1, inputs=None):
        """Each kernel that stays: ``keep`` values and multiplications and a pattern number; one bit per kernel if some
        are removed; the table of patterns, a bit per tap."""
        self.check(shape)
        kernels = shape[0] * shape[1]
        stay = keep_count(self.kernels, kernels)
        patterns = self.count if self.patterns is None else len(self.patterns)
        return Cost(stay * self.keep, stay * self.keep * positions, self._bits(kernels, stay, patterns, taps_of(shape)))
