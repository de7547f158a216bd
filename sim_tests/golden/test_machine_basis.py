"""golden.machine, EXECUTE_BASIS: against loops written from docs/basis.md, golden.basis and golden.convolution."""
from dataclasses import replace
import time

import numpy as np
import pytest

from golden.basis import IntegerDecomposition
from golden.coefficients import (pack_maps, pack_series, pack_taps, taps_of_basis, taps_of_kernels, taps_of_pointwise)
from golden.concentration import word_cycles
from golden.convolution import accumulate
from golden.machine import Machine, MachineError
from golden.requantize import requantize
from spec.config import Pattern, load
from spec.derive import Sizes, ceil_div
from spec.formats import column_parameters, step_entry
from spec.isa import LinearTarget, Mode, Opcode, Operation, TileTarget, encode
from spec.registers import Error

SERIES, MAPS = load("tiny_basis"), load("tiny_maps")
#: Blocks of half a group: every address must be a multiple of 2.
HALVES = replace(SERIES, structured=replace(SERIES.structured, block=2,
                 patterns=(Pattern(1, 2), Pattern(2, 2))))
NARROW = replace(SERIES, structured=replace(SERIES.structured, accumulator_bits=16))
CONFIGS = {"tiny_basis": SERIES, "tiny_maps": MAPS, "halves": HALVES}
LARGE = {name: load(name) for name in ("basis288", "basis252", "maps288")}
PROGRAM = 0x20000


class Program:
    """A memory image with data from offset 0 and a program at PROGRAM, put together by hand."""

    def __init__(self, config):
        self.config, self.sizes = config, Sizes(config)
        self.memory, self.free, self.words = np.zeros(PROGRAM + 0x4000, np.uint8), 0, []
        self.weight = 3                                          # next free beat of the weight buffer
        self.add(Opcode.HEADER, digest=self.sizes.digest_value, version=1)

    def put(self, data):
        """Offset of ``data``, placed on a fresh beat."""
        data, at, beat = np.frombuffer(bytes(data), np.uint8), self.free, self.sizes.beat_bytes
        self.memory[at:at + len(data)] = data
        self.free = -(-(at + len(data)) // beat) * beat
        assert self.free <= PROGRAM
        return at

    def add(self, opcode, **fields):
        """Append an instruction; its number."""
        self.words.append(encode(opcode, **fields))
        return len(self.words) - 1

    def image(self, x, base=0):
        """Load activations [H, W, groups, group]; the fields of EXECUTE_BASIS that find them."""
        h, w, groups, _ = x.shape
        at, blocks = self.put(np.ascontiguousarray(x.transpose(2, 0, 1, 3)).tobytes()), self.sizes.group_blocks
        steps = {"base": base, "row_step": (w + 1) * groups * blocks, "col_step": groups * blocks}
        self.add(Opcode.LOAD_TILE, target=TileTarget.ACTIVATION, address=at, planes=groups, rows=h, cols=w,
                 plane_stride=h * w, row_stride=w, plane_step=blocks, **steps)
        return steps | {"in_rows": h, "in_cols": w, "groups": groups}

    def weights(self, taps=None, coefficients=None, terms=()):
        """Load taps and coefficients behind one another; the fields of EXECUTE_BASIS that load them."""
        config, z = self.config, self.sizes
        first = b"" if taps is None else pack_taps(taps, config)
        second = b"" if coefficients is None else pack_series(coefficients, config, terms) if terms else \
            pack_maps(coefficients, config)
        at, beats = self.weight, len(first + second) // z.beat_bytes
        self.add(Opcode.LOAD_LINEAR, target=LinearTarget.WEIGHT, address=self.put(first + second), beats=beats, base=at)
        self.weight += beats
        return {"weight": at, "taps": 0 if taps is None else len(taps), "coefficients": len(second) // z.beat_bytes} | \
            series(terms)

    def execute(self, **fields):
        """EXECUTE_BASIS after a barrier; fields left out describe a 1 x 1 kernel. Its number."""
        self.add(Opcode.BARRIER, mark=1)
        return self.add(Opcode.EXECUTE_BASIS, **{"kernel_rows": 1, "kernel_cols": 1, "dilation_rows": 1,
                                                 "dilation_cols": 1} | fields)

    def run(self, **options):
        """Machine after the program and END."""
        memory, stride = self.memory.copy(), self.sizes.instruction_beats * self.sizes.beat_bytes
        words = [*self.words, encode(Opcode.END)]
        for n, word in enumerate(words):
            at = PROGRAM + n * stride
            memory[at:at + 32] = np.frombuffer(word.to_bytes(32, "little"), np.uint8)
        machine = Machine(self.config, memory, **options)
        machine.run(PROGRAM, len(words))
        return machine


def series(terms):
    """Fields of a series."""
    return {"terms": len(terms), "n_log2": [*(n.bit_length() - 1 for n in terms), *[0] * (4 - len(terms))]}


def fails(program, code, text, **options):
    """The program must stop with this error at its last instruction but END."""
    with pytest.raises(MachineError, match=text) as caught:
        program.run(**options)
    assert caught.value.code is code and caught.value.pc == len(program.words) - 1
    return caught.value


def positions(values, config, rng=None):
    """[..., C] in channel positions [..., groups, group]; padding is 0 or, with ``rng``, anything."""
    z = Sizes(config)
    *lead, c = values.shape
    groups = ceil_div(c, z.group_channels)
    full = np.zeros((*lead, groups * z.group_channels), np.int8)
    full[..., :c] = values
    out = np.zeros((*lead, groups, z.columns), np.int8)
    if rng is not None:
        out[:] = rng.integers(-128, 128, out.shape)
    full = full.reshape(*lead, groups, z.group_channels)
    if rng is None:
        out[..., :z.group_channels] = full
    else:
        there = (np.arange(groups * z.group_channels) < c).reshape(groups, -1)
        out[..., :z.group_channels] = np.where(there, full, out[..., :z.group_channels])
    return out


def slots(coefficients, config):
    """[K, C, M] as [blocks, slices, groups, group]."""
    b, z = config.basis, Sizes(config)
    k, c, m = coefficients.shape
    out = np.zeros((b.blocks, b.slices, ceil_div(c, z.group_channels), b.group), np.int8)
    out[:k, :m] = positions(coefficients.transpose(0, 2, 1), config)
    return out


def sparse(rng, shape, density, signs=(-1, 1)):
    """Ternary values [K, C, M]."""
    return (rng.choice(signs, shape) * (rng.random(shape) < density)).astype(np.int8)


# -- plain loops -------------------------------------------------------------------------------------------------------
def streamed_columns(f):
    """Input columns that some output needs."""
    needed = (f["out_cols"] - 1) * (1 << f["stride_cols_log2"]) + (f["kernel_cols"] - 1) * f["dilation_cols"] + 1
    return min(f["in_cols"], needed - f["pad_left"])


def slow_basis(config, x, taps, ce, f, before):
    """docs/basis.md as loops over numbers: (accumulators {(y', x'): list}, saturations, streamed rows, first overflow).

    x [in_rows, in_cols, groups, group], activations; taps [rows, blocks, slices, multipliers]; before: accumulators."""
    b, z, mode = config.basis, Sizes(config), f["mode"]
    q, fmt, width = b.multipliers, z.accumulator, z.intermediate
    st_r, st_c = 1 << f["stride_rows_log2"], 1 << f["stride_cols_log2"]
    value, saturations, streamed, overflow = {}, 0, [], None
    acc = {key: list(v) for key, v in before.items()} if f["accumulate"] else {}

    def pixel(y, xx, block):
        if not 0 <= xx < streamed_columns(f):
            return [0] * b.slices
        return value[y, xx][block]

    for y in range(f["in_rows"]):
        valid = [(yy, r) for yy in range(f["out_rows"]) for r in range(f["kernel_rows"])
                 if yy * st_r + r * f["dilation_rows"] - f["pad_top"] == y]
        if not valid:
            continue
        streamed.append(y)
        for xx in range(streamed_columns(f)):
            q0 = [[int(v) - f["zero_point"] for v in group] for group in x[y, xx]]
            value[y, xx] = []
            for block in range(b.blocks):
                row = []
                for m in range(b.slices):
                    if mode == Mode.DENSE:
                        c = f["channel"] + m
                        row.append(q0[0][c] if c < b.group else 0)
                    elif mode == Mode.DECOMPOSED:
                        total = sum(int(ce[block, m, g, c]) * q0[g][c] for g, c in zip(*np.nonzero(ce[block, m])))
                        row.append(min(max(total, width.lo), width.hi))
                        saturations += row[-1] != total
                    else:
                        row.append([[q0[g][m * q + i] if m * q + i < b.group else 0 for i in range(q)]
                                    for g in range(f["groups"])])
                value[y, xx].append(row)
        for xx in range(f["out_cols"]):
            for yy, r in sorted(valid, key=lambda pair: pair[1]):
                sums = [0] * z.columns
                for block in range(b.blocks):
                    if mode == Mode.POINTWISE:
                        row = value[y, xx][block]
                        sums[block] = sum(int(taps[g, block, m, i]) * row[m][g][i] for g in range(f["groups"])
                                          for m in range(b.slices) for i in range(q))
                        continue
                    parts = -(-f["kernel_cols"] // q)
                    for s in range(f["kernel_cols"]):
                        at = pixel(y, xx * st_c + s * f["dilation_cols"] - f["pad_left"], block)
                        sums[block] += sum(int(taps[r * parts + s // q, block, m, s % q]) * at[m]
                                           for m in range(b.slices))
                first = not f["accumulate"] and (r == 0 or y < f["dilation_rows"])
                assert first == ((yy, xx) not in acc)
                if not first:
                    join = max if f["operation"] == Operation.MAX else int.__add__
                    sums = [join(a, v) for a, v in zip(acc[yy, xx], sums)]
                acc[yy, xx] = sums
                for column, v in enumerate(sums):
                    if overflow is None and not fmt.lo <= v <= fmt.hi:
                        overflow = f"pixel {yy * f['out_cols'] + xx}, column {column}: {v} leaves"
    return acc, saturations, streamed, overflow


def random_pass(rng, config, mode):
    """Fields, activations [in_rows, in_cols, groups, group], taps and coefficients of a random legal pass."""
    b, z = config.basis, Sizes(config)
    while True:
        f = {"in_rows": int(rng.integers(1, 7)), "in_cols": int(rng.integers(1, 7)),
             "kernel_rows": int(rng.integers(1, 6)), "kernel_cols": int(rng.integers(1, 6)),
             "stride_rows_log2": int(rng.integers(0, 3)), "stride_cols_log2": int(rng.integers(0, 3)),
             "dilation_rows": int(rng.integers(1, 4)), "dilation_cols": int(rng.integers(1, 4)),
             "pad_top": int(rng.integers(0, 4)), "pad_left": int(rng.integers(0, 4)),
             "out_rows": int(rng.integers(1, 5)), "out_cols": int(rng.integers(1, 5)),
             "groups": int(rng.integers(1, 5)), "channel": int(rng.integers(0, b.group + 2)),
             "zero_point": int(rng.integers(-128, 128)), "operation": int(rng.integers(0, 2)), "mode": int(mode)}
        if mode == Mode.POINTWISE:
            f |= dict.fromkeys(("pad_top", "pad_left", "stride_rows_log2", "stride_cols_log2"), 0)
            f |= {"kernel_rows": 1, "kernel_cols": 1, "in_rows": f["out_rows"], "in_cols": f["out_cols"]}
        parts = ceil_div(f["kernel_cols"], b.multipliers)
        rows = f["groups"] if mode == Mode.POINTWISE else f["kernel_rows"] * parts
        source = [[(y << f["stride_rows_log2"]) + r * f["dilation_rows"] - f["pad_top"]
                   for r in range(f["kernel_rows"])] for y in range(f["out_rows"])]
        reach = (f["kernel_cols"] - 1) * f["dilation_cols"]
        if reach < b.window and rows <= b.tap_rows and f["pad_left"] <= reach and \
                f["pad_top"] <= (f["kernel_rows"] - 1) * f["dilation_rows"] and \
                all(any(0 <= y < f["in_rows"] for y in row) for row in source):
            break
    x = rng.integers(-128, 128, (f["in_rows"], f["in_cols"], f["groups"], b.group)).astype(np.int8)
    x[rng.random(x.shape) < 0.3] = f["zero_point"]
    taps = rng.integers(-128, 128, (rows, b.blocks, b.slices, b.multipliers)).astype(np.int8)
    if mode != Mode.POINTWISE:                                    # POINTWISE: whatever lies beyond a group
        for row, i in np.ndindex(rows, b.multipliers):
            if row % parts * b.multipliers + i >= f["kernel_cols"]:
                taps[row, :, :, i] = 0
    shape = (b.blocks, b.slices, f["groups"], b.group)
    ce = rng.integers(-1, 2, shape).astype(np.int8)
    taps[:, :, rng.random(b.slices) < 0.2] = 0                    # slices that are not used, the first among them
    terms = ()
    if b.coefficients == "series":
        terms = [(2, 1), (1,), (1, 1, 1), (2,)][rng.integers(4)]
        while sum(ceil_div(f["groups"], z.series_fetch(n)) for n in terms) > b.coefficient_rows:
            terms = (1,)
        ce *= np.cumsum(ce != 0, axis=3) <= sum(terms)
    return f, x, taps, ce, terms


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("name", CONFIGS)
def test_random_passes_equal_plain_loops(rng, name, mode):
    """Two passes into one bank: values, saturations, micro-steps and recorded cycles, every element."""
    config, saturated, skipped = CONFIGS[name], 0, 0
    b, z = config.basis, Sizes(config)
    for _ in range(25):
        f, x, taps, ce, terms = random_pass(rng, config, mode)
        program = Program(config)
        found, decomposed = program.image(x, base=2 * z.group_blocks), mode == Mode.DECOMPOSED
        loaded = program.weights(taps, ce if decomposed else None, terms if decomposed else ())
        bank = int(rng.integers(2))
        numbers = [program.execute(**f | found | loaded | {"bank": bank, "accumulate": n}) for n in range(2)]
        machine = program.run(record_cycles=True)
        want, over, rows, overflow = slow_basis(config, x, taps, ce, f | {"accumulate": 0}, {})
        want, more, _, _ = slow_basis(config, x, taps, ce, f | {"accumulate": 1}, want)
        assert overflow is None
        count = f["out_rows"] * f["out_cols"]
        got = machine.accumulator[bank]
        assert got[:count].tolist() == [want[divmod(p, f["out_cols"])] for p in range(count)]
        assert not got[count:].any() and not machine.accumulator[1 - bank].any()
        assert machine.counts["saturations"] == over + more
        saturated, skipped = saturated + over, skipped + (len(rows) < f["in_rows"])
        valid = sum(0 <= (y << f["stride_rows_log2"]) + r * f["dilation_rows"] - f["pad_top"] < f["in_rows"]
                    for y in range(f["out_rows"]) for r in range(f["kernel_rows"]))
        steps = f["groups"] if mode == Mode.POINTWISE else ceil_div(f["kernel_cols"], b.multipliers)
        assert machine.counts["pixel_steps"] == 2 * steps * valid * f["out_cols"]
        adds = 2 * np.count_nonzero(ce) * len(rows) * streamed_columns(f) if decomposed else 0
        assert machine.counts["adds"] == adds
        if not (decomposed and b.coefficients == "maps"):
            assert machine.basis_word_cycles == {}
            continue
        assert list(machine.basis_word_cycles) == numbers
        for n in numbers:
            cycles = machine.basis_word_cycles[n]
            assert cycles.shape == (len(rows), streamed_columns(f), ceil_div(f["groups"], b.stream_groups))
            for i, xx, w in np.ndindex(cycles.shape):
                part = slice(w * b.stream_groups, (w + 1) * b.stream_groups)
                matches = (ce[:, :, part] != 0) & (x[rows[i], xx, part] != f["zero_point"])
                assert cycles[i, xx, w] == max(1, word_cycles(matches, look_aside=b.look_aside).max())
    if mode == Mode.DECOMPOSED and name == "tiny_maps":
        assert saturated                                          # 10 bits
    if mode != Mode.POINTWISE:
        assert skipped


# -- against golden.basis ----------------------------------------------------------------------------------------------
#: kernel, stride, pads (top, left, bottom, right), dilation, input size; at most 16 outputs.
GEOMETRIES = [((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), (1, 1)), ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (4, 4)),
              ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1), (7, 8)), ((3, 3), (1, 1), (2, 2, 2, 2), (2, 2), (3, 5)),
              ((5, 5), (1, 1), (2, 2, 2, 2), (1, 1), (4, 3)), ((5, 5), (2, 2), (2, 2, 2, 2), (1, 1), (7, 5)),
              ((1, 1), (2, 2), (0, 0, 0, 0), (1, 1), (8, 7)), ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (1, 1)),
              ((1, 3), (1, 2), (0, 1, 0, 1), (1, 1), (4, 7)), ((3, 1), (2, 1), (1, 0, 1, 0), (1, 1), (5, 5)),
              ((3, 2), (4, 1), (1, 0, 0, 0), (3, 2), (9, 6))]


def geometry_fields(kernel, stride, pads, dilation, out):
    """Fields of a geometry."""
    return {"kernel_rows": kernel[0], "kernel_cols": kernel[1], "pad_top": pads[0], "pad_left": pads[1],
            "stride_rows_log2": stride[0].bit_length() - 1, "stride_cols_log2": stride[1].bit_length() - 1,
            "dilation_rows": dilation[0], "dilation_cols": dilation[1], "out_rows": out[0], "out_cols": out[1]}


def layer(rng, config, coefficients, geometry, *, terms=(), low=-128, high=127):
    """Run one decomposed layer of any M and C in passes of ``slices`` basis kernels; compare, return the machine."""
    b = config.basis
    kernel, stride, pads, dilation, size = geometry
    k, c, m = coefficients.shape
    x = rng.integers(low, high + 1, (1, *size, c)).astype(np.int8)
    zero_point = int(rng.integers(-128, 128))
    basis = rng.integers(-128, 128, (m, *kernel)).astype(np.int8)
    decomposition = IntegerDecomposition(basis=basis, coefficients=coefficients)
    want = decomposition.run(x.astype(int) - zero_point, stride=stride, pads=pads, dilation=dilation,
                             intermediate_bits=b.intermediate_bits)
    program, out = Program(config), want.output.shape[1:3]
    found = program.image(positions(x[0], config, rng)) | geometry_fields(kernel, stride, pads, dilation, out)
    for at in range(0, m, b.slices):
        part = slice(at, at + b.slices)
        program.add(Opcode.BARRIER)
        program.weight = 0
        loaded = program.weights(taps_of_basis(basis[part], config, blocks=k), slots(coefficients[..., part], config),
                                 terms)
        program.execute(**found | loaded | {"accumulate": int(at > 0), "zero_point": zero_point})
    machine = program.run()
    count = out[0] * out[1]
    got = machine.accumulator[0, :count].reshape(1, *out, -1)
    assert np.array_equal(got[..., :k], want.output) and not got[..., k:].any()
    rows = {y * stride[0] + r * dilation[0] - pads[0] for y in range(out[0]) for r in range(kernel[0])}
    exact = np.einsum("nyxc,kcm->nyxkm", x.astype(int) - zero_point, coefficients.astype(int))
    used = exact[:, sorted(rows & set(range(size[0])))]
    assert machine.counts["saturations"] == np.count_nonzero(np.abs(used * 2 + 1) > 1 << b.intermediate_bits)
    return machine


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_layers_equal_golden_basis(rng, name, geometry):
    config = CONFIGS[name]
    terms = (2, 2) if config.basis.coefficients == "series" else ()
    for c, density in ((5, 0.4), (8, 1), (3, 0.7), (1, 1)):       # not a multiple of the group; fewer than a group
        layer(rng, config, sparse(rng, (config.basis.blocks, c, 2), density), geometry, terms=terms)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("name", CONFIGS)
def test_any_number_of_basis_kernels(rng, name, count):
    """M = 1 to M = R S: further kernels are added to the bank."""
    config = CONFIGS[name]
    terms = (4,) if config.basis.coefficients == "series" else ()
    layer(rng, config, sparse(rng, (config.basis.blocks - 1, 7, count), 0.5), GEOMETRIES[1], terms=terms)


@pytest.mark.parametrize("name", CONFIGS)
def test_extreme_coefficients(rng, name):
    """None at all, a single one at every place in turn, all of one sign."""
    config = CONFIGS[name]
    terms, shape = (4,) if config.basis.coefficients == "series" else (), (config.basis.blocks, 7, 2)
    machine = layer(rng, config, np.zeros(shape, np.int8), GEOMETRIES[1], terms=terms)
    assert not machine.accumulator.any()
    for at in range(0, int(np.prod(shape)), 5):
        one = np.zeros(shape, np.int8)
        one.flat[at] = -1 if at % 2 else 1
        layer(rng, config, one, GEOMETRIES[7], terms=terms)
    for sign in (-1, 1):
        layer(rng, config, np.full(shape, sign, np.int8), GEOMETRIES[1], terms=terms)


@pytest.mark.parametrize("bits", [8, 10, 16])
@pytest.mark.parametrize("name", ["tiny_basis", "tiny_maps"])
def test_saturation_is_clamped_and_counted(rng, name, bits):
    config = CONFIGS[name]
    config = replace(config, basis=replace(config.basis, intermediate_bits=bits))
    terms = (4,) if config.basis.coefficients == "series" else ()
    clamped = 0
    for _ in range(5):
        shape = (config.basis.blocks, 12, 2)
        clamped += layer(rng, config, np.ones(shape, np.int8), GEOMETRIES[2], terms=terms).counts["saturations"]
        layer(rng, config, sparse(rng, shape, 0.6), GEOMETRIES[4], terms=terms)
    assert bool(clamped) == (bits < 16)


@pytest.mark.parametrize("name", LARGE)
def test_large_presets_equal_golden_basis(rng, name):
    """16 or 14 outputs, 6 and 9 basis kernels, 40 channels."""
    config = LARGE[name]
    terms = (8, 4) if config.basis.coefficients == "series" else ()
    for m, geometry in ((6, ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (8, 14))),
                        (9, ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1), (15, 16))),
                        (4, ((7, 7), (2, 2), (3, 3, 3, 3), (1, 1), (12, 10)))):
        ce = sparse(rng, (config.basis.blocks, 40, m), 0.3)
        layer(rng, config, ce, geometry, terms=terms)


# -- the other modes ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_dense_equals_golden_convolution(rng, name, geometry):
    """Channels two by two: DENSE passes over positions and groups of one image."""
    config = CONFIGS[name]
    b, z = config.basis, Sizes(config)
    kernel, stride, pads, dilation, size = geometry
    c, zero_point = 5, int(rng.integers(-128, 128))
    x = rng.integers(-128, 128, (1, *size, c)).astype(np.int8)
    w = rng.integers(-128, 128, (b.blocks, *kernel, c)).astype(np.int8)
    want = accumulate(x.astype(int) - zero_point, w, stride=stride, pads=pads, dilation=dilation)
    program, out, passes = Program(config), want.shape[1:3], 0
    found = program.image(positions(x[0], config, rng)) | geometry_fields(kernel, stride, pads, dilation, out)
    for start in range(0, c, z.group_channels):
        for channel in range(0, z.group_channels, b.slices):
            program.add(Opcode.BARRIER)
            program.weight = 0
            first = start + channel
            part = w[..., first:min(first + b.slices, start + z.group_channels)]
            if not part.size:
                continue
            loaded = program.weights(taps_of_kernels(part.transpose(0, 3, 1, 2), config))
            here = {"base": start // z.group_channels * z.group_blocks, "channel": channel, "mode": Mode.DENSE}
            program.execute(**found | loaded | here | {"accumulate": int(passes > 0), "zero_point": zero_point})
            passes += 1
    got = program.run().accumulator[0, :out[0] * out[1]].reshape(1, *out, -1)
    assert passes > 1 and np.array_equal(got[..., :b.blocks], want)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", [*CONFIGS, *LARGE])
def test_pointwise_equals_golden_convolution(rng, name, stride):
    """Strides through the address steps; 11 or 50 channels."""
    config = (CONFIGS | LARGE)[name]
    b = config.basis
    c, zero_point = 11 if name in CONFIGS else 50, int(rng.integers(-128, 128))
    x = rng.integers(-128, 128, (1, 4, 4, c)).astype(np.int8)
    w = rng.integers(-128, 128, (b.blocks, 1, 1, c)).astype(np.int8)
    want = accumulate(x.astype(int) - zero_point, w, stride=(stride, stride))
    program, side = Program(config), 4 // stride
    found = program.image(positions(x[0], config, rng))
    found |= {name: found[name] * stride for name in ("row_step", "col_step")}
    found |= dict.fromkeys(("in_rows", "in_cols", "out_rows", "out_cols"), side)
    loaded = program.weights(taps_of_pointwise(positions(w[:, 0, 0], config), config))
    program.execute(**found | loaded | {"mode": Mode.POINTWISE, "zero_point": zero_point})
    machine = program.run()
    assert np.array_equal(machine.accumulator[0, :side * side, :b.blocks].reshape(1, side, side, -1), want)
    assert machine.counts["macs"] == np.count_nonzero(w) * side * side


# -- what is kept ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CONFIGS)
def test_kept_taps_and_coefficients(rng, name):
    """Taps stay over a pass that loads coefficients, coefficients over a DENSE pass that loads taps."""
    config = CONFIGS[name]
    b = config.basis
    terms = (4,) if b.coefficients == "series" else ()
    x = rng.integers(-128, 128, (3, 3, 2, b.group)).astype(np.int8)
    first, second = (slots(sparse(rng, (b.blocks, 2 * Sizes(config).group_channels, 2), 0.5), config) for _ in range(2))
    taps, other = (taps_of_basis(rng.integers(-128, 128, (2, 3, 3)), config) for _ in range(2))
    program = Program(config)
    found = program.image(x) | geometry_fields((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (3, 3))
    passes = [(taps, first, Mode.DECOMPOSED), (None, None, Mode.DECOMPOSED), (None, second, Mode.DECOMPOSED),
              (other, None, Mode.DENSE), (None, None, Mode.DECOMPOSED)]
    have, want = [None, None], {}
    for n, (new_taps, new_ce, mode) in enumerate(passes):
        decomposed = mode == Mode.DECOMPOSED
        loaded = program.weights(new_taps, new_ce, terms if new_ce is not None else ()) \
            if new_taps is not None or new_ce is not None else {}
        fields = found | loaded | (series(terms) if decomposed else {}) | {"mode": mode, "accumulate": int(n > 0)}
        program.execute(**fields)
        have = [have[0] if new_taps is None else new_taps, have[1] if new_ce is None else new_ce]
        f = {"zero_point": 0, "channel": 0, "operation": 0} | fields
        want = slow_basis(config, x, *have, f, want)[0]
    assert program.run().accumulator[0, :9].tolist() == [want[divmod(p, 3)] for p in range(9)]


def one_pass(config=SERIES, *, x=None, load_taps=True, load_coefficients=True, **fields):
    """A legal 1 x 1 pass on 2 x 2 pixels of one group, with fields changed."""
    b = config.basis
    program = Program(config)
    terms = (1,) if b.coefficients == "series" else ()
    ce = np.zeros((b.blocks, b.slices, 1, b.group), np.int8)
    ce[..., 0] = 1
    found = program.image(np.ones((2, 2, 1, b.group), np.int8) if x is None else x)
    taps = np.zeros((1, b.blocks, b.slices, b.multipliers), np.int8)
    taps[..., 0] = 1
    loaded = program.weights(taps if load_taps else None, ce if load_coefficients else None, terms) \
        if load_taps or load_coefficients else {}
    program.execute(**found | loaded | {"out_rows": 2, "out_cols": 2} | series(terms) | fields)
    return program


@pytest.mark.parametrize("fields, text", [
    ({"load_taps": False}, "1 rows of taps are read but 0 were loaded"),
    ({"load_coefficients": False}, "coefficients are read but were never loaded"),
    ({"kernel_rows": 2}, "2 rows of taps are read but 1 were loaded"),
    ({"coefficients": 3}, "weight beat 8 is read but was never written"),
    ({"coefficients": 1}, "Coefficients must be 1 tiles of 16 bytes, not 8 bytes"),
    ({"mode": Mode.DENSE}, "coefficients must be loaded by a DECOMPOSED pass, not DENSE"),
    ({"accumulate": 1}, "accumulator bank 0 is added to but was never written"),
    ({"in_rows": 1}, "output row 1 has no contribution"),
    ({"in_cols": 3, "stride_cols_log2": 1}, "activation block 2 is read but was never written"),
    ({"weight": 2}, "weight beat 2 is read but was never written"),
    ({"taps": 0, "coefficients": 0}, "1 rows of taps are read but 0"),
])
def test_faults_of_programs(fields, text):
    fails(one_pass(**fields), Error.NONE, text)


def test_kept_coefficients_must_be_of_the_same_groups_and_terms():
    for fields in ({"groups": 2}, {"n_log2": [1, 0, 0, 0]}, {"terms": 2}):
        program = one_pass()
        program.image(np.ones((2, 2, 2, 4), np.int8), base=32)
        keep = {"base": 32, "row_step": 6, "col_step": 2, "in_rows": 2, "in_cols": 2, "groups": 1, "terms": 1,
                "out_rows": 2, "out_cols": 2}
        program.execute(**keep)
        program.run()
        program.execute(**keep | fields)
        fails(program, Error.NONE, "the coefficients kept are for")


def test_broken_data():
    """Bits that must be 0: a tap beyond the kernel, an idle lane's code."""
    program = one_pass(kernel_cols=2, in_cols=2)
    program.weights(taps_of_kernels(np.full((4, 2, 1, 3), 7), SERIES))
    program.execute(weight=program.weight - 3, taps=1, groups=1, in_rows=1, in_cols=1, out_rows=1, out_cols=1,
                    kernel_cols=2, terms=1)
    fails(program, Error.NONE, "taps from column 2 of a kernel row on must be 0")
    program = one_pass()
    program.memory[program.free - 16] |= 1 << 6                   # lane 1: there is no group 1
    fails(program, Error.NONE, "Lane 1 of slice 0 in tile 0 must have the code 0")
    program = one_pass(MAPS)
    program.memory[program.free - 1] |= 1 << 7                    # behind the 15 words
    fails(program, Error.NONE, "What lies behind the last segment must be 0")


# -- errors of the hardware --------------------------------------------------------------------------------------------
STATIC = [
    ({"mode": 3}, "mode 3 is unknown"),
    *(({name: 0}, f"{name} must be at least 1") for name in (
        "in_rows", "in_cols", "out_rows", "out_cols", "kernel_rows", "kernel_cols", "dilation_rows", "dilation_cols",
        "groups")),
    ({"out_rows": 17, "out_cols": 1}, r"out_rows \* out_cols must be at most 16"),
    ({"kernel_rows": 9}, "kernel_rows must be at most 8"),
    ({"operation": 2}, "operation 2 is unknown"),
    ({"terms": 0}, "terms must be in 1..4"),
    ({"terms": 5}, "terms must be in 1..4"),
]
AT_EXECUTION = [
    ({"kernel_cols": 6}, "kernel_cols reach over 6 pixels, more than the window of 5"),
    ({"kernel_cols": 2, "dilation_cols": 5}, "kernel_cols reach over 6 pixels"),
    ({"mode": Mode.POINTWISE, "groups": 17}, "the pass needs 17 rows of taps, more than 16"),
    ({"taps": 17}, "taps must be at most 16"),
    ({"n_log2": [3, 0, 0, 0]}, "n_log2 must name N of at most 4"),
    ({"terms": 2, "n_log2": [0, 3, 0, 0]}, "n_log2 must name N of at most 4"),
    ({"groups": 17}, "groups must be at most 16"),
    ({"groups": 16, "n_log2": [1, 0, 0, 0]}, "a pixel takes 8 stream words, more than 4 rows of coefficients"),
    ({"pad_left": 1}, "pad_left must be below 1"),
    ({"pad_top": 1}, "pad_top must be below the reach"),
    *(({"mode": Mode.POINTWISE, name: value}, f"{name} must be .* in mode POINTWISE, not {value}")
      for name, value in (("kernel_rows", 2), ("kernel_cols", 2), ("stride_rows_log2", 1), ("stride_cols_log2", 1),
                          ("out_rows", 1), ("out_cols", 3))),
]


@pytest.mark.parametrize("fields, text", STATIC)
def test_static_errors_come_before_the_wait(fields, text):
    """A missing token does not matter: nothing of the instruction happens."""
    fails(one_pass(**fields, wait_load=1), Error.ILLEGAL_FIELD, text)


@pytest.mark.parametrize("fields, text", AT_EXECUTION)
def test_illegal_fields_at_execution(fields, text):
    fails(one_pass(**fields), Error.ILLEGAL_FIELD, text)
    fails(one_pass(**fields, wait_load=1), Error.WATCHDOG, "no token from load")


def test_too_many_rows_of_taps():
    config = replace(SERIES, basis=replace(SERIES.basis, tap_rows=4))
    fails(one_pass(config, kernel_rows=5), Error.ILLEGAL_FIELD, "the pass needs 5 rows of taps, more than 4")
    fails(one_pass(config, kernel_rows=3, kernel_cols=4), Error.ILLEGAL_FIELD, "the pass needs 6 rows of taps")
    fails(one_pass(MAPS, groups=9), Error.ILLEGAL_FIELD, "groups must be at most 8")
    fails(one_pass(MAPS, mode=Mode.POINTWISE, groups=17), Error.ILLEGAL_FIELD, "needs 17 rows of taps")


def test_unused_terms_do_not_matter():
    got = [one_pass(n_log2=n).run().accumulator for n in ([0, 0, 0, 0], [0, 7, 7, 7])]
    assert np.array_equal(*got) and got[0][0, :4].tolist() == [[2] * 4] * 4
    assert one_pass(MAPS, terms=0, n_log2=[7] * 4).run().accumulator[0, 0].tolist() == [2, 2, 2, 0]


@pytest.mark.parametrize("fields, code, text", [
    ({"weight": 126}, Error.SCRATCHPAD_RANGE, r"weight beat 130 is out of range \(0..127\)"),
    ({"weight": 127, "coefficients": 0}, Error.SCRATCHPAD_RANGE, "weight beat 129 is out of range"),
    ({"weight": 126, "base": 2047}, Error.SCRATCHPAD_RANGE, "weight beat"),
    ({"base": 512 - 4}, Error.STREAM_ADDRESS, "reads block 512, beyond 511"),
    ({"row_step": 511}, Error.STREAM_ADDRESS, "reads block 512, beyond 511"),
    ({"col_step": 65535}, Error.STREAM_ADDRESS, "beyond 511"),
])
def test_ranges(fields, code, text):
    fails(one_pass(**fields), code, text)


def test_last_addresses_are_legal():
    """The last block and the last weight beat; rows that no kernel row needs are not read."""
    program = Program(SERIES)
    program.weight = 128 - 3
    loaded = program.weights(np.array([1, 0, 0] * 8, np.int8).reshape(1, 4, 2, 3))
    program.add(Opcode.FILL, value=3, rows=1, blocks=1, base=511)
    program.execute(**loaded, base=511, in_rows=1, in_cols=1, out_rows=1, out_cols=1, groups=1, mode=Mode.POINTWISE)
    program.execute(base=511, in_rows=4000, row_step=1, in_cols=1, out_rows=1, out_cols=1, groups=9, mode=Mode.DENSE,
                    bank=1)
    machine = program.run()
    assert machine.accumulator[:, 0].tolist() == [[3 * 2] * 4] * 2
    assert one_pass(in_rows=4000).run().accumulator[0, :4].tolist() == [[2] * 4] * 4


@pytest.mark.parametrize("name", ["base", "row_step", "col_step"])
def test_addresses_are_multiples_of_a_units_blocks(name):
    good = one_pass(HALVES).run()
    assert good.accumulator[0, :4].tolist() == [[2] * 4] * 4
    fails(one_pass(HALVES, **{name: 3}), Error.STREAM_ADDRESS, f"{name} must be a multiple of 2, not 3")


def test_accumulator_overflow_in_the_order_of_the_hardware(rng):
    """16-bit accumulators: the first contribution that leaves them is named, rows first, then columns, then r."""
    seen = set()
    for _ in range(60):
        f, x, taps, ce, terms = random_pass(rng, NARROW, Mode.DECOMPOSED)
        f |= {"accumulate": 0, "operation": Operation.ADD}
        taps //= int(rng.integers(1, 8))
        taps[rng.random(taps.shape) < 0.5] = 0
        program = Program(NARROW)
        program.execute(**f | program.image(x) | program.weights(taps, ce, terms))
        want, _, _, overflow = slow_basis(NARROW, x, taps, ce, f, {})
        seen.add(overflow is None)
        if overflow is None:
            got = program.run().accumulator[0, :f["out_rows"] * f["out_cols"]]
            assert got.tolist() == [want[divmod(p, f["out_cols"])] for p in range(len(got))]
        else:
            fails(program, Error.ACCUMULATOR_OVERFLOW, overflow)
    assert seen == {True, False}


@pytest.mark.parametrize("high, pixel, row", [
    ([(2, 0), (2, 1)], 4, 2),                                     # alone: r = 0 of output row 2
    ([(0, 0, 1), (1, 0, 1), (2, 0)], 0, 1),                       # two halves on row 1 come before a whole on row 2
    ([(0, 1, 1), (1, 1, 1), (1, 0)], 2, 1),                       # on one row, columns from the left
    ([(0, 0, 1), (1, 0)], 2, 1),                                  # on one pixel, r = 0 (of output row 1) before r = 1
])
def test_first_overflow(high, pixel, row):
    """2 x 1 kernel of 127: a pixel of 255 in both slices leaves 16 bits at once, 128 in both with a second such."""
    x = np.full((3, 2, 1, 4), -128, np.int8)
    for y, xx, *half in high:
        x[y, xx, 0, :2] = 0 if half else 127
    program = Program(NARROW)
    taps = taps_of_kernels(np.full((4, 2, 2, 1), 127), NARROW)
    f = geometry_fields((2, 1), (1, 1), (0, 0, 1, 0), (1, 1), (3, 2)) | program.image(x) | {"zero_point": -128}
    f |= {"mode": Mode.DENSE, "channel": 0, "accumulate": 0, "operation": 0}
    program.execute(**f | program.weights(taps))
    text = slow_basis(NARROW, x, taps, None, f, {})[3]
    assert text.startswith(f"pixel {pixel}, column 0: ")
    fails(program, Error.ACCUMULATOR_OVERFLOW, f"{text} 16 bits with kernel row . on input row {row}")


def test_opcodes_of_engines_that_are_not_there():
    program = Program(load("tiny"))
    program.add(Opcode.EXECUTE_BASIS, reserved=1)
    fails(program, Error.ILLEGAL_OPCODE, "operation code 9 is unknown without a basis engine")
    program = Program(MAPS)
    program.add(Opcode.EXECUTE)
    fails(program, Error.ILLEGAL_OPCODE, "operation code 5 is unknown without a structured engine")
    program = Program(MAPS)
    program.add(Opcode.LOAD_LINEAR, target=LinearTarget.STEP, beats=2)
    fails(program, Error.ILLEGAL_FIELD, "target STEP needs a structured engine")


# -- order, shared parts -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("place", ["activation", "weight", "accumulator"])
def test_unordered_accesses(place):
    program = one_pass(push_store=1, push_load=1)
    if place == "activation":
        program.add(Opcode.FILL, rows=1, blocks=1)
    elif place == "weight":
        program.add(Opcode.LOAD_LINEAR, target=LinearTarget.WEIGHT, beats=1, base=4)
    else:
        program.add(Opcode.STORE, rows=1, cols=1, high=1, address=0x400)
        program.words.insert(1, encode(Opcode.LOAD_LINEAR, target=LinearTarget.PARAMETER, address=0x800,
                                       beats=4))
    fails(program, Error.NONE, "no token or barrier orders it")
    program.words[-1] |= 1 << 5                                  # wait for the execute unit
    program.run()


def test_tokens(rng):
    program = one_pass(wait_load=1, push_store=1)
    program.words[2] |= 1 << 8                                   # LOAD_LINEAR gives the execute unit one
    assert {pair for pair, n in program.run().tokens.items() if n} == {(1, 2)}


@pytest.mark.parametrize("residual", [0, 1])
def test_load_execute_store_without_structured_engine(rng, residual):
    """FILL, LOAD, STORE of preset tiny_maps: 3 channels in units of 4 bytes."""
    x = rng.integers(-128, 128, (2, 2, 1, 4)).astype(np.int8)
    program = one_pass(MAPS, x=x, zero_point=-9)
    other = rng.integers(-128, 128, (4, 4)).astype(np.int8)
    bias, multiplier, shift = rng.integers(-99, 99, 4), rng.integers(20000, 65536, 4), np.array([14, 15, 16, 17])
    record = column_parameters()
    words = [record.pack(bias=int(a), multiplier=int(m), shift=int(s), reserved=0)
             for a, m, s in zip(bias, multiplier, shift)]
    at, where = program.put(b"".join(w.to_bytes(8, "little") for w in words)), program.put(other.tobytes())
    out = program.put(bytes(64))
    program.add(Opcode.LOAD_LINEAR, target=LinearTarget.PARAMETER, address=at, beats=4, base=4)
    program.add(Opcode.LOAD_TILE, target=TileTarget.RESIDUAL, address=where, planes=1, rows=1, cols=4, base=3,
                col_step=1)
    program.add(Opcode.BARRIER)
    program.add(Opcode.STORE, address=out, rows=2, cols=2, row_stride=3, parameter=4, zero_point=5, low=-100, high=99,
                residual=residual, residual_base=3, residual_zero_point=7, residual_multiplier=9000)
    program.add(Opcode.FILL, value=-7, rows=1, blocks=2, base=100)
    machine = program.run()
    acc = np.zeros((4, 4), int)
    acc[:, :3] = 2 * (x[..., 0, :1].reshape(4, 1).astype(int) + 9)
    assert np.array_equal(machine.accumulator[0, :4], acc)
    want = requantize(acc, bias=bias, multiplier=multiplier, shift=shift, zero_point=5, low=-100, high=99,
                      residual=other if residual else None, residual_zero_point=7, residual_multiplier=9000)
    got = machine.memory[out:out + 24].view(np.int8).reshape(6, 4)
    assert np.array_equal(got[[0, 1, 3, 4]], want) and not got[[2, 5]].any()
    assert machine.activation[100:102].tolist() == [[-7] * 4] * 2


def test_both_engines_share_a_bank(rng):
    """EXECUTE adds to what EXECUTE_BASIS left, and the other way round; a held tile survives between them."""
    program = one_pass()
    taps, z = SERIES.structured.taps, SERIES.basis.blocks
    entry = {"offset": [0] * taps, "enable": [1] + [0] * (taps - 1), "n_log2": 2, "segments_log2": 0}
    data = b"".join(step_entry(taps).pack(**entry, hold=h).to_bytes(16, "little") for h in (0, 1))
    w = rng.integers(-128, 128, (4, 4)).astype(np.int8)
    at, weight = program.put(data), program.put(w.tobytes())
    program.add(Opcode.LOAD_LINEAR, target=LinearTarget.STEP, address=at, beats=4)
    program.add(Opcode.LOAD_LINEAR, target=LinearTarget.WEIGHT, address=weight, beats=2, base=60)
    program.add(Opcode.BARRIER)
    run = {"rows": 2, "cols": 2, "row_step": 3, "col_step": 1, "steps": 1, "accumulate": 1}
    program.add(Opcode.EXECUTE, **run, weight=60)
    program.execute(row_step=3, col_step=1, in_rows=2, in_cols=2, out_rows=2, out_cols=2, groups=1, terms=1,
                    accumulate=1)
    program.add(Opcode.EXECUTE, **run, step=1)
    want = np.full((4, z), 4) + 2 * w.astype(int).sum(axis=0)
    assert np.array_equal(program.run().accumulator[0, :4], want)


def test_max_of_rows_and_passes(rng):
    """A 3 x 1 kernel of one 1 in DENSE with MAX is the largest of three rows; with padding, of two."""
    x = rng.integers(-128, 128, (4, 4, 1, 4)).astype(np.int8)
    program, kernels = Program(SERIES), np.zeros((4, 2, 3, 1), np.int8)
    kernels[:2, 0], kernels[2:, 1] = 1, 1
    found = program.image(x) | geometry_fields((3, 1), (1, 1), (1, 0, 1, 0), (1, 1), (4, 4))
    program.execute(**found | program.weights(taps_of_kernels(kernels, SERIES)), mode=Mode.DENSE, channel=1,
                    operation=Operation.MAX)
    got = program.run().accumulator[0].reshape(4, 4, 4)
    rows = np.stack([x[max(0, y - 1):y + 2, :, 0].max(axis=0) for y in range(4)])
    assert np.array_equal(got, rows[..., [1, 1, 2, 2]])


def test_the_bank_keeps_pixels_beyond_a_pass(rng):
    program = one_pass()
    program.execute(row_step=3, col_step=1, in_rows=1, in_cols=1, out_rows=1, out_cols=1, groups=1, terms=1,
                    zero_point=-4)
    assert program.run().accumulator[0, :5].tolist() == [[10] * 4, *[[2] * 4] * 3, [0] * 4]


def test_a_288_pass_is_fast(rng):
    """256 channels on 10 x 18 pixels, 3 x 3, 16 outputs; the figure bounds whole networks."""
    config = LARGE["basis288"]
    ce = sparse(rng, (16, 256, 6), 0.2)
    ce = (ce.reshape(16, 16, 16, 6) * (np.cumsum(ce.reshape(16, 16, 16, 6) != 0, axis=2) <= 4)).reshape(ce.shape)
    program = Program(config)
    found = program.image(rng.integers(-128, 128, (8, 16, 16, 16)).astype(np.int8))
    found |= geometry_fields((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (8, 16))
    loaded = program.weights(taps_of_basis(rng.integers(-128, 128, (6, 3, 3)), config), slots(ce, config), (4,))
    for _ in range(20):
        program.execute(**found | loaded)
    start = time.perf_counter()
    program.run()
    assert (time.perf_counter() - start) / 20 < 0.2                # measured: 1 ms with one thread
