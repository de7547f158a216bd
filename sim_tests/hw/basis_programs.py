"""Random programs of EXECUTE_BASIS for the whole accelerator: every mode, odd geometries, kept operands, sums."""

import numpy as np

from golden.coefficients import map_words, pack_maps, pack_series, pack_taps, series_words
from golden.tiles import pack_tile
from lowering.program import Program
from spec.derive import Sizes, ceil_div
from spec.formats import column_parameters, step_entry
from spec.isa import LinearTarget, Mode, Opcode, Operation, TileTarget

#: Bytes of each STORE's place in memory.
REGION = 4096
#: How the coefficients of a pass are drawn: a density, or a single one in all.
DENSITIES = (0, "one", 0.05, 0.2, 0.6, 1)


class RandomPasses:
    """``groups`` sums of one to three passes, each stored.

    ``memory``: uint8 image, outputs first, with the program at ``program``; ``count``: its instructions; ``code``: the
    `Program` itself; ``summary``: one line per pass.
    Args: modes: those to draw from. density: of the coefficients, see `DENSITIES` (None: another one in each pass).
    extreme: chance that activations, taps or signs are all at one of their ends, so that intermediates saturate.
    structured: chance that a pass is an EXECUTE of the structured engine. largest: half of the most input rows and
    columns. depth: most outputs of a sum.
    """

    def __init__(self, config, rng, *, groups=6, modes=tuple(Mode), density=None, extreme=0.1, structured=0.0,
                 largest=9, depth=None):
        self.config, self.sizes, self.rng = config, Sizes(config), rng
        self.density, self.extreme, self.largest, self.modes = density, extreme, largest, modes
        self.structured = structured
        self.depth = depth or self.sizes.accumulator_depth
        self._blobs, self.summary = bytearray(groups * REGION), []
        self._taps = self._kept_coefficients = None
        self.code = Program(self.sizes)
        self._weight_at = self._step_at = self._outputs = 0
        self._fill_scratchpad()
        self._load_parameters()
        for n in range(groups):
            self._sum(n % 2)
        self.code.barrier(1)
        words = self.code.finish(0)
        self.program, self.count = ceil_div(len(self._blobs), 4096) * 4096, len(words)
        self.memory = np.zeros(self.program + ceil_div(words.size, 4096) * 4096, np.uint8)
        self.memory[:len(self._blobs)] = np.frombuffer(bytes(self._blobs), np.uint8)
        self.memory[self.program:self.program + words.size] = words.ravel()

    def _put(self, data):
        at = len(self._blobs)
        self._blobs += bytes(data) + bytes(-len(bytes(data)) % 128)
        return at

    def _fill_scratchpad(self):
        """The whole scratchpad, many values equal to the zero point that all passes use."""
        z, rng = self.sizes, self.rng
        self.zero_point = int(rng.choice([-128, 0, 127])) if rng.random() < 0.3 else int(rng.integers(-128, 128))
        units = z.activation_blocks // z.group_blocks
        data = rng.integers(-128, 128, (units, z.columns))
        if rng.random() < self.extreme:
            data = rng.choice([-128, 127], data.shape)
        data[rng.random(data.shape) < 0.4] = self.zero_point
        at = self._put(data.astype(np.int8).tobytes())
        step = 8192
        for first in range(0, units, step):
            count = min(step, units - first)
            self.code.emit(Opcode.LOAD_TILE, target=TileTarget.ACTIVATION, address=at + first * z.columns, planes=1,
                           rows=1, cols=count, row_stride=count, base=first * z.group_blocks,
                           col_step=z.group_blocks,
                           writes=[("activation", first * z.group_blocks, count * z.group_blocks)])

    def _load_parameters(self):
        z, rng, record = self.sizes, self.rng, column_parameters()
        words = [record.pack(bias=int(rng.integers(-3000, 3000)), multiplier=int(rng.integers(20000, 65536)),
                             shift=int(rng.integers(0, 9)), reserved=0) for _ in range(z.columns)]
        at = self._put(b"".join(w.to_bytes(8, "little") for w in words).ljust(z.parameter_beats * z.beat_bytes, b"\0"))
        self.code.emit(Opcode.LOAD_LINEAR, target=LinearTarget.PARAMETER, address=at, beats=z.parameter_beats, base=0,
                       writes=[("parameter", 0, z.parameter_beats)])

    # -- one sum --------------------------------------------------------------------------------------------------
    def _sum(self, bank):
        rng = self.rng
        rows = int(rng.integers(1, min(self.depth, 6) + 1))
        cols = int(rng.integers(1, min(self.depth // rows, 8) + 1))
        passes = int(rng.integers(1, 4))
        done = 0
        while done < passes:
            one = self._execute if rng.random() < self.structured else self._pass
            done += one(bank, rows, cols, accumulate=done > 0)
        z = self.sizes
        self.code.emit(Opcode.STORE, address=self._outputs * REGION, rows=rows, cols=cols, row_stride=cols, bank=bank,
                       parameter=0, zero_point=int(rng.integers(-20, 20)), low=-128, high=127,
                       reads=[("bank", bank, 1), ("parameter", 0, z.parameter_beats)])
        self._outputs += 1

    def _geometry(self, mode, rows, cols):
        """Fields for so many outputs, or None where an output would be without any input row."""
        b, rng = self.config.basis, self.rng
        if mode is Mode.POINTWISE:
            return {"in_rows": rows, "in_cols": cols, "pad_top": 0, "pad_left": 0, "kernel_rows": 1, "kernel_cols": 1,
                    "stride_rows_log2": 0, "stride_cols_log2": 0, "dilation_rows": 1, "dilation_cols": 1}
        kernel_rows, kernel_cols = int(rng.choice([1, 2, 3, 3, 5, 8])), int(rng.choice([1, 2, 3, 3, 5, 9]))
        dilation_rows, dilation_cols = int(rng.choice([1, 1, 2, 7])), int(rng.choice([1, 1, 2, 3, 7]))
        stride_rows, stride_cols = int(rng.choice([0, 0, 1, 2, 3])), int(rng.choice([0, 0, 1, 2, 3]))
        reach_rows, reach_cols = (kernel_rows - 1) * dilation_rows + 1, (kernel_cols - 1) * dilation_cols + 1
        chunks = ceil_div(kernel_cols, b.multipliers)
        if reach_cols > b.window or kernel_rows * chunks > b.tap_rows:
            return None
        pad_top, pad_left = int(rng.integers(min(reach_rows, 16))), int(rng.integers(reach_cols))
        below, right = int(rng.integers(-1, reach_rows)), int(rng.integers(-1, reach_cols))
        in_rows = ((rows - 1) << stride_rows) + reach_rows - pad_top - below
        in_cols = ((cols - 1) << stride_cols) + reach_cols - pad_left - right
        if not 1 <= in_rows <= 2 * self.largest or not 1 <= in_cols <= 2 * self.largest:
            return None
        fields = {"in_rows": in_rows, "in_cols": in_cols, "pad_top": pad_top, "pad_left": pad_left,
                  "kernel_rows": kernel_rows, "kernel_cols": kernel_cols, "stride_rows_log2": stride_rows,
                  "stride_cols_log2": stride_cols, "dilation_rows": dilation_rows, "dilation_cols": dilation_cols}
        return fields if self._each_row_has_input(fields, rows) else None

    def _pass(self, bank, rows, cols, *, accumulate):
        """Emit a pass; whether the drawn geometry was possible."""
        b, z, rng = self.config.basis, self.sizes, self.rng
        mode = Mode(int(rng.choice([int(m) for m in self.modes])))
        fields = self._geometry(mode, rows, cols)
        kept = self._taps
        keep = kept is not None and kept["pointwise"] == (mode is Mode.POINTWISE) and rng.random() < 0.6
        if fields is not None and keep:
            fields = self._with_kernel(fields, rows, kept)
        if fields is None:
            return False
        chunks = ceil_div(fields["kernel_cols"], b.multipliers)
        groups, terms, coefficients = self._coefficients(mode, kept["groups"] if keep else None)
        tap_rows = groups if mode is Mode.POINTWISE else fields["kernel_rows"] * chunks
        # where the pixels lie: rows and columns with gaps
        units = z.activation_blocks // z.group_blocks
        col_step = groups + int(rng.integers(3))
        row_step = col_step * fields["in_cols"] + int(rng.integers(4))
        room = units - row_step * (fields["in_rows"] - 1) - col_step * (fields["in_cols"] - 1) - groups
        if room < 0:
            return False
        base = int(rng.integers(room + 1))
        emitted = fields | {
            "mode": mode, "base": base * z.group_blocks, "row_step": row_step * z.group_blocks,
            "col_step": col_step * z.group_blocks, "out_rows": rows, "out_cols": cols, "groups": groups,
            "channel": int(rng.integers(z.columns)) if mode is Mode.DENSE else 0, "zero_point": self.zero_point,
            "bank": bank, "accumulate": int(accumulate),
            "operation": Operation.MAX if accumulate and rng.random() < 0.2 else Operation.ADD}
        if terms is not None:
            emitted |= {"terms": len(terms), "n_log2": [n.bit_length() - 1 for n in terms] + [0] * (4 - len(terms))}
        reads = [("activation", 0, z.activation_blocks)]
        taps = b"" if keep else self._new_taps(mode, tap_rows, chunks, fields["kernel_cols"])
        if blob := taps + coefficients:
            if len(blob) > z.weight_beats * z.beat_bytes:
                return False
            weight = self._weights(blob)
            emitted |= {"weight": weight, "taps": 0 if keep else tap_rows,
                        "coefficients": len(coefficients) // z.beat_bytes}
            reads.append(("weight", weight, len(blob) // z.beat_bytes))
        if taps:
            self._taps = {k: fields[k] for k in ("kernel_rows", "kernel_cols")}
            self._taps |= {"pointwise": mode is Mode.POINTWISE, "groups": groups}
        if coefficients:
            self._kept_coefficients = groups, terms
        self.code.emit(Opcode.EXECUTE_BASIS, reads=reads, writes=[("bank", bank, 1)], **emitted)
        self.summary.append(str(emitted))
        return True

    def _new_taps(self, mode, tap_rows, chunks, kernel_cols):
        """Packed rows of taps."""
        b, rng = self.config.basis, self.rng
        taps = rng.integers(-128, 128, (tap_rows, b.blocks, b.slices, b.multipliers))
        if rng.random() < self.extreme:
            taps = rng.choice([-128, 127], taps.shape)
        if mode is not Mode.POINTWISE:      # multipliers beyond the kernel's columns
            column = np.arange(tap_rows)[:, None] % chunks * b.multipliers + np.arange(b.multipliers)
            taps = np.where(column[:, None, None] < kernel_cols, taps, 0)
        return bytes(pack_taps(taps.astype(np.int8), self.config))

    def _weights(self, blob):
        """Load into the weight buffer, behind what came before if it fits there; returns the first beat."""
        z, beats = self.sizes, len(blob) // self.sizes.beat_bytes
        at = self._weight_at if self._weight_at + beats <= z.weight_beats else 0
        self.code.emit(Opcode.LOAD_LINEAR, target=LinearTarget.WEIGHT, address=self._put(blob), beats=beats, base=at,
                       writes=[("weight", at, beats)])
        self._weight_at = at + beats
        return at

    def _execute(self, bank, rows, cols, *, accumulate):
        """Emit an EXECUTE of one to three steps, random patterns and segments; whether its addresses were possible."""
        config, s, z, rng = self.config, self.config.structured, self.sizes, self.rng
        row_step, col_step = (int(n) * z.banks for n in rng.integers(4, size=2))
        base = int(rng.integers(2 * z.banks))
        room = (z.activation_blocks - base - (rows - 1) * row_step - (cols - 1) * col_step) // z.banks - 2
        if room < 1:
            return False
        count, entries, tiles = int(rng.integers(1, 4)), [], []
        for k in range(count):
            hold = k > 0 and rng.random() < 0.3
            if not hold:
                n = int(rng.choice([p.n for p in s.patterns]))
                blocks = z.fetch_blocks(n)
                segments_log2 = int(rng.integers(min(blocks, s.taps).bit_length()))
                segments, length = 1 << segments_log2, blocks >> segments_log2
                enable = (rng.random(s.taps) < 0.8).astype(int)
                values = rng.integers(-128, 128, (s.slots, s.columns))
                slot = np.arange(s.slots)
                values[(slot // n >= blocks) | ~enable[np.minimum(slot // n // length, s.taps - 1)].astype(bool)] = 0
                indices = rng.integers(0, s.block, values.shape)
                tiles.append(pack_tile(values, None if n == s.block else indices, config, n))
            lanes = rng.permutation(z.banks // length)[:segments]
            offset = [int(length * lane + z.banks * rng.integers(room) + -base % length) for lane in lanes]
            entries.append(step_entry(s.taps).pack(
                offset=offset + [0] * (s.taps - segments), enable=enable.tolist(), n_log2=n.bit_length() - 1,
                segments_log2=segments_log2, hold=int(hold)))
        blob = b"".join(bytes(tile) for tile in tiles)
        if len(blob) > z.weight_beats * z.beat_bytes:
            return False
        if self._step_at + count > config.memory.step_entries:
            self._step_at = 0
        table = b"".join(word.to_bytes(z.step_beats * z.beat_bytes, "little") for word in entries)
        steps = ("step", self._step_at, count)
        self.code.emit(Opcode.LOAD_LINEAR, target=LinearTarget.STEP, address=self._put(table),
                       beats=count * z.step_beats, base=self._step_at, writes=[steps])
        weight = self._weights(blob)
        fields = {"base": base, "rows": rows, "cols": cols, "row_step": row_step, "col_step": col_step,
                  "weight": weight, "step": self._step_at, "steps": count, "bank": bank, "accumulate": int(accumulate),
                  "operation": Operation.MAX if accumulate and rng.random() < 0.2 else Operation.ADD}
        self.code.emit(Opcode.EXECUTE, writes=[("bank", bank, 1)], **fields, reads=[
            ("activation", 0, z.activation_blocks), ("weight", weight, len(blob) // z.beat_bytes), steps])
        self._step_at += count
        self.summary.append(str(fields))
        return True

    def _with_kernel(self, fields, rows, kept):
        """The geometry with the size of the kernel whose taps are kept, if it still fits."""
        fields = fields | {k: kept[k] for k in ("kernel_rows", "kernel_cols")}
        reach_rows = (fields["kernel_rows"] - 1) * fields["dilation_rows"] + 1
        reach_cols = (fields["kernel_cols"] - 1) * fields["dilation_cols"] + 1
        fields["pad_top"] = min(fields["pad_top"], reach_rows - 1)
        fields["pad_left"] = min(fields["pad_left"], reach_cols - 1)
        return fields if reach_cols <= self.config.basis.window and self._each_row_has_input(fields, rows) else None

    @staticmethod
    def _each_row_has_input(fields, rows):
        """Whether no output row lies in padding altogether."""
        return all(any(0 <= (y << fields["stride_rows_log2"]) + r * fields["dilation_rows"] - fields["pad_top"]
                       < fields["in_rows"] for r in range(fields["kernel_rows"])) for y in range(rows))

    def _coefficients(self, mode, groups):
        """(channel groups, terms or None, packed bytes); ``groups``: those of kept taps, which decide in POINTWISE."""
        config, b, z, rng = self.config, self.config.basis, self.sizes, self.rng
        if mode is Mode.DENSE:
            return 1, None, b""
        if mode is Mode.POINTWISE:
            return groups or int(rng.integers(1, min(b.tap_rows, 6) + 1)), None, b""
        if self._kept_coefficients is not None and rng.random() < 0.5:
            return *self._kept_coefficients, b""
        series = b.coefficients == "series"
        while True:
            groups = int(rng.integers(1, min(z.coefficient_groups, 2 * b.stream_groups + 2) + 1))
            terms = [int(n) for n in 1 << rng.integers(0, b.group.bit_length(), int(rng.integers(1, 4)))] \
                if series else None
            words = series_words(groups, terms, config) if series else map_words(groups, config)
            if words <= b.coefficient_rows:
                break
        shape = (b.blocks, b.slices, groups, b.group)
        density = DENSITIES[rng.integers(len(DENSITIES))] if self.density is None else self.density
        signs = rng.choice([-1, 1], shape)
        if rng.random() < self.extreme:
            signs = np.full(shape, int(rng.choice([-1, 1])))
        there = np.arange(signs.size).reshape(shape) == rng.integers(signs.size) if density == "one" else \
            rng.random(shape) < density
        coefficients = signs * there
        if series:
            coefficients *= np.argsort(rng.random(shape), axis=-1) < sum(terms)
            return groups, terms, bytes(pack_series(coefficients.astype(np.int8), config, terms))
        return groups, None, bytes(pack_maps(coefficients.astype(np.int8), config))
