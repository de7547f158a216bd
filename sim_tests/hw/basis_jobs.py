"""Passes of the basis engine behind its loader: random jobs, their values, what the multipliers make of them."""

from dataclasses import dataclass

import numpy as np

from hw.basis.block import direct_width
from spec.derive import Sizes, ceil_div
from spec.formats import BIT, Field, Record, unsigned
from spec.isa import INSTRUCTIONS, Mode, Opcode, Operation

#: `hw.basis.job.job_layout` as a record.
JOB = Record("job", (*INSTRUCTIONS[Opcode.EXECUTE_BASIS].fields[1:-1], Field("chunks", unsigned(4), None, ""),
                     Field("span", unsigned(7), None, ""), Field("reach", unsigned(7), None, ""),
                     Field("streamed", unsigned(12), None, ""), Field("tap_half", BIT, None, ""),
                     Field("coefficient_half", BIT, None, "")))
ZEROS = {f.name: 0 if f.count is None else [0] * f.count for f in JOB.fields}
ONE = ZEROS | dict.fromkeys(("in_rows", "in_cols", "out_rows", "out_cols", "kernel_rows", "kernel_cols",
                             "dilation_rows", "dilation_cols", "groups"), 1)


def completed(config, fields):
    """Fields of a job with what the loader derives from them."""
    f = ONE | fields
    span = (f["kernel_cols"] - 1) * f["dilation_cols"] + 1
    pushes = ((f["out_cols"] - 1) << f["stride_cols_log2"]) + span - f["pad_left"]
    return f | {"chunks": ceil_div(f["kernel_cols"], config.basis.multipliers), "span": span,
                "reach": span - f["pad_left"], "streamed": min(f["in_cols"], pushes)}


def kernel_rows(f, y):
    """[(kernel row, output row)] that meet input row ``y``, by rising kernel row."""
    stride, out = 1 << f["stride_rows_log2"], []
    for r in range(f["kernel_rows"]):
        at = y + f["pad_top"] - r * f["dilation_rows"]
        if at >= 0 and at % stride == 0 and at // stride < f["out_rows"]:
            out.append((r, at // stride))
    return out


def random_fields(config, rng, mode):
    """A legal pass on few pixels; not every output need have an input row."""
    b, depth = config.basis, Sizes(config).accumulator_depth
    while True:
        f = {"mode": int(mode), "out_rows": int(rng.integers(1, 6)), "out_cols": int(rng.choice([1, 1, 2, 3, 5])),
             "bank": int(rng.integers(2)), "accumulate": int(rng.integers(2)),
             "groups": int(rng.integers(1, 6)) if rng.random() < 0.8 else b.tap_rows,
             "operation": int(rng.choice([Operation.ADD, Operation.MAX]))}
        long = rng.random() < 0.1       # up to a whole bank high, or wide
        if long:
            size = int(rng.choice([depth, rng.integers(1, depth + 1)]))
            f |= {"out_rows": size, "out_cols": 1} if rng.random() < 0.5 else {"out_rows": 1, "out_cols": size}
        if f["out_rows"] * f["out_cols"] > depth:
            continue
        if mode is Mode.POINTWISE:
            f["groups"] = min(f["groups"], b.tap_rows)
            return completed(config, f | {"in_rows": f["out_rows"], "in_cols": f["out_cols"]})
        f |= {"kernel_rows": int(rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 8])), "kernel_cols": int(rng.integers(1, 7)),
              "dilation_rows": int(rng.choice([1, 1, 2, 3, 7])), "dilation_cols": int(rng.choice([1, 1, 2, 4])),
              "stride_rows_log2": int(rng.choice([0, 0, 1, 2])), "stride_cols_log2": int(rng.choice([0, 0, 1, 2, 3])),
              "in_rows": int(rng.integers(1, 8)), "in_cols": int(rng.integers(1, 9))}
        if long:
            f |= {"in_rows": f["out_rows"] + int(rng.integers(600)), "in_cols": f["out_cols"] + int(rng.integers(4))}
        span = (f["kernel_cols"] - 1) * f["dilation_cols"] + 1
        if span > b.window or f["kernel_rows"] * ceil_div(f["kernel_cols"], b.multipliers) > b.tap_rows:
            continue
        f["pad_left"] = int(rng.integers(min(span, 16)))
        f["pad_top"] = int(rng.integers(min((f["kernel_rows"] - 1) * f["dilation_rows"] + 1, 16)))
        return completed(config, f)


@dataclass
class Pass:
    """``values`` [needed rows, streamed, all slices] (DECOMPOSED), else [needed rows, streamed, words, channels]."""

    fields: dict
    taps: np.ndarray        # [rows, blocks, slices, multipliers]
    values: np.ndarray

    @property
    def needed(self):
        """Input rows that any kernel row needs."""
        return [y for y in range(self.fields["in_rows"]) if kernel_rows(self.fields, y)]


def random_pass(config, rng, mode, *, fields=None, taps=None):
    """A `Pass`; a fifth of them with values and taps at their ends only."""
    b, z = config.basis, Sizes(config)
    f = random_fields(config, rng, mode) if fields is None else fields
    decomposed, pointwise = mode is Mode.DECOMPOSED, mode is Mode.POINTWISE
    spec = z.intermediate if decomposed else z.operand
    lo, hi = (spec.lo, spec.hi) if decomposed else (-255, 255)
    rows = f["groups"] if pointwise else f["kernel_rows"] * f["chunks"]
    one = Pass(f, None, None)
    shape = (len(one.needed), f["streamed"]) + \
        ((z.basis_slices,) if decomposed else (f["groups"] if pointwise else 1, direct_width(config)))
    ends = rng.random() < 0.2
    one.values = rng.choice([lo, hi], shape) if ends else rng.integers(lo, hi + 1, shape)
    if taps is None:
        taps = rng.integers(-128, 128, (rows, b.blocks, b.slices, b.multipliers))
        if ends:
            taps = np.full(taps.shape, -128)
        if not pointwise:
            column = np.arange(rows)[:, None] % f["chunks"] * b.multipliers + np.arange(b.multipliers)
            taps = np.where(column[:, None, None] < f["kernel_cols"], taps, 0)
    one.taps = taps
    return one


def micro_steps(one):
    """Cycles in which the multipliers work."""
    f = one.fields
    each = f["groups"] if f["mode"] == Mode.POINTWISE else f["chunks"]
    return each * f["out_cols"] * sum(len(kernel_rows(f, y)) for y in one.needed)


def updates(config, one):
    """What the accumulators are told, in order: dicts of bank, address, init, operation, sums (of all columns)."""
    b, z, f, out = config.basis, Sizes(config), one.fields, []
    for place, y in enumerate(one.needed):
        for col in range(f["out_cols"]):
            for r, row in kernel_rows(f, y):
                sums = np.zeros(z.columns, np.int64)
                for s in range(1 if f["mode"] == Mode.POINTWISE else f["kernel_cols"]):
                    x = (col << f["stride_cols_log2"]) + s * f["dilation_cols"] - f["pad_left"]
                    if not 0 <= x < f["streamed"]:
                        continue
                    value = one.values[place, x]
                    if f["mode"] == Mode.POINTWISE:
                        channel = np.zeros((f["groups"], b.slices * b.multipliers), np.int64)
                        channel[:, :b.group] = value[:, :b.group]
                        flat = one.taps.reshape(len(one.taps), b.blocks, -1)
                        sums[:b.blocks] += np.einsum("gc,gbc->b", channel, flat)
                        continue
                    taps = one.taps[r * f["chunks"] + s // b.multipliers, :, :, s % b.multipliers]
                    v = value.reshape(b.blocks, b.slices) if f["mode"] == Mode.DECOMPOSED else value[0, :b.slices]
                    sums[:b.blocks] += (taps * v).sum(axis=1)
                out.append({"bank": f["bank"], "address": row * f["out_cols"] + col, "operation": f["operation"],
                            "init": int(not f["accumulate"] and (r == 0 or y < f["dilation_rows"])),
                            "sums": sums.tolist()})
    return out
