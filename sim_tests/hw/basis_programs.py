"""Random programs of EXECUTE_BASIS for the whole accelerator: every mode, odd geometries, kept operands, sums of passes."""

import numpy as np

from golden.coefficients import map_words, pack_maps, pack_series, pack_taps, series_words
from lowering.program import Program
from spec.derive import Sizes, ceil_div
from spec.formats import column_parameters
from spec.isa import LinearTarget, Mode, Opcode, Operation, TileTarget

#: Bytes of each STORE's place in memory.
REGION = 4096


class RandomPasses:
    """``groups`` sums of one to three passes, each stored.

    ``memory``: uint8 image with the program at ``program``; ``count``: its instructions; ``summary``: one line per pass.
    Args: density: of the coefficients (None: a random one per pass). modes: those to draw from. large: chance that
    activations and coefficients are extreme, so that intermediates saturate. largest: most input rows and columns.
    """

    def __init__(self, config, rng, *, groups=6, modes=tuple(Mode), density=None, extreme=0.1, largest=9, depth=None):
        self.config, self.sizes, self.rng = config, Sizes(config), rng
        self.density, self.extreme, self.largest, self.modes = density, extreme, largest, modes
        self.depth = depth or self.sizes.accumulator_depth
        z = self.sizes
        self._blobs, self.summary, self._kept = bytearray(), [], None
        self.program_ = Program(z)
        self._weight_at, self._outputs = 0, 0
        self._fill_scratchpad()
        self._load_parameters()
        bank = 0
        for _ in range(groups):
            self._sum(bank)
            bank ^= 1
        self.program_.barrier(1)
        data_bytes = ceil_div(len(self._blobs), 4096) * 4096
        words = self.program_.finish(0)
        self._finish(words, data_bytes)

    def _finish(self, words, data_bytes):
        """STOREs were emitted relative to the end of the data, which is known only now."""
        self.program = data_bytes
        program_bytes = ceil_div(words.size, 4096) * 4096
        out = data_bytes + program_bytes
        self.memory = np.zeros(out + (self._outputs + 1) * REGION, np.uint8)
        self.memory[:len(self._blobs)] = np.frombuffer(bytes(self._blobs), np.uint8)
        for entry in self.program_.instructions:
            if entry["opcode"] is Opcode.STORE:
                entry["address"] += out
        words = self._encode()
        self.memory[data_bytes:data_bytes + words.size] = words.ravel()
        self.count = len(words)

    def _encode(self):
        from spec.isa import encode
        stride = self.sizes.instruction_beats * self.sizes.beat_bytes
        out = np.zeros((len(self.program_.instructions), stride), np.uint8)
        for row, entry in zip(out, self.program_.instructions):
            fields = {k: v if isinstance(v, (list, tuple)) else int(v) for k, v in entry.items() if k != "opcode"}
            row[:32] = np.frombuffer(encode(entry["opcode"], **fields).to_bytes(32, "little"), np.uint8)
        return out

    def _put(self, data):
        at = len(self._blobs)
        self._blobs += bytes(data) + bytes(-len(bytes(data)) % 128)
        return at

    def _fill_scratchpad(self):
        """The whole scratchpad, many values equal to the zero point that all passes use."""
        z, rng = self.sizes, self.rng
        self.zero_point = int(rng.integers(-128, 128))
        units = z.activation_blocks // z.group_blocks
        data = rng.integers(-128, 128, (units, z.columns))
        if rng.random() < self.extreme:
            data = rng.choice([-128, 127], data.shape)
        data[rng.random(data.shape) < 0.4] = self.zero_point
        at = self._put(data.astype(np.int8).tobytes())
        step = 8192
        for first in range(0, units, step):
            count = min(step, units - first)
            self.program_.emit(Opcode.LOAD_TILE, target=TileTarget.ACTIVATION, address=at + first * z.columns, planes=1,
                               rows=1, cols=count, row_stride=count, base=first * z.group_blocks,
                               col_step=z.group_blocks,
                               writes=[("activation", first * z.group_blocks, count * z.group_blocks)])

    def _load_parameters(self):
        z, rng, record = self.sizes, self.rng, column_parameters()
        words = [record.pack(bias=int(rng.integers(-3000, 3000)), multiplier=int(rng.integers(20000, 65536)),
                             shift=int(rng.integers(0, 9)), reserved=0) for _ in range(z.columns)]
        at = self._put(b"".join(w.to_bytes(8, "little") for w in words).ljust(z.parameter_beats * z.beat_bytes, b"\0"))
        self.program_.emit(Opcode.LOAD_LINEAR, target=LinearTarget.PARAMETER, address=at, beats=z.parameter_beats, base=0,
                           writes=[("parameter", 0, z.parameter_beats)])

    # -- one sum --------------------------------------------------------------------------------------------------
    def _sum(self, bank):
        rng = self.rng
        rows = int(rng.integers(1, min(self.depth, 6) + 1))
        cols = int(rng.integers(1, min(self.depth // rows, 8) + 1))
        passes = int(rng.integers(1, 4))
        done = 0
        while done < passes:
            done += self._pass(bank, rows, cols, accumulate=done > 0)
        z = self.sizes
        self.program_.emit(Opcode.STORE, address=self._outputs * REGION, rows=rows, cols=cols, row_stride=cols, bank=bank,
                           parameter=0, zero_point=int(rng.integers(-20, 20)), low=-128, high=127,
                           reads=[("bank", bank, 1), ("parameter", 0, z.parameter_beats)])
        self._outputs += 1

    def _geometry(self, mode, rows, cols):
        """Fields for so many outputs, or None where an output would be without any input row."""
        b, rng = self.config.basis, self.rng
        if mode is Mode.POINTWISE:
            return {"in_rows": rows, "in_cols": cols, "pad_top": 0, "pad_left": 0, "kernel_rows": 1, "kernel_cols": 1,
                    "stride_rows_log2": 0, "stride_cols_log2": 0, "dilation_rows": 1, "dilation_cols": 1}
        kernel_rows, kernel_cols = int(rng.choice([1, 2, 3, 3, 5])), int(rng.choice([1, 2, 3, 3, 5]))
        dilation_rows, dilation_cols = int(rng.choice([1, 1, 2])), int(rng.choice([1, 1, 2, 3]))
        stride_rows, stride_cols = int(rng.choice([0, 0, 1, 2])), int(rng.choice([0, 0, 1, 2]))
        reach_rows, reach_cols = (kernel_rows - 1) * dilation_rows + 1, (kernel_cols - 1) * dilation_cols + 1
        chunks = ceil_div(kernel_cols, b.multipliers)
        if reach_cols > b.window or kernel_rows * chunks > b.tap_rows:
            return None
        pad_top, pad_left = int(rng.integers(reach_rows)), int(rng.integers(reach_cols))
        below, right = int(rng.integers(-1, reach_rows)), int(rng.integers(-1, reach_cols))
        in_rows = ((rows - 1) << stride_rows) + reach_rows - pad_top - below
        in_cols = ((cols - 1) << stride_cols) + reach_cols - pad_left - right
        if not 1 <= in_rows <= 2 * self.largest or not 1 <= in_cols <= 2 * self.largest:
            return None
        for y in range(rows):
            at = [(y << stride_rows) + r * dilation_rows - pad_top for r in range(kernel_rows)]
            if not any(0 <= a < in_rows for a in at):
                return None
        return {"in_rows": in_rows, "in_cols": in_cols, "pad_top": pad_top, "pad_left": pad_left,
                "kernel_rows": kernel_rows, "kernel_cols": kernel_cols, "stride_rows_log2": stride_rows,
                "stride_cols_log2": stride_cols, "dilation_rows": dilation_rows, "dilation_cols": dilation_cols}

    def _pass(self, bank, rows, cols, *, accumulate):
        """Emit a pass; whether the drawn geometry was possible."""
        config, b, z, rng = self.config, self.config.basis, self.sizes, self.rng
        mode = Mode(int(rng.choice([int(m) for m in self.modes])))
        fields = self._geometry(mode, rows, cols)
        if fields is None:
            return False
        keep = None
        if self._kept and mode is Mode.DECOMPOSED and self._kept["mode"] is mode and rng.random() < 0.5:
            keep = self._kept
            fields |= {k: keep[k] for k in ("kernel_rows", "kernel_cols")}
            if (fields["kernel_cols"] - 1) * fields["dilation_cols"] + 1 > b.window:
                return False
            again = self._reconsider(fields, rows, cols)
            if again is None:
                return False
            fields = again
        chunks = ceil_div(fields["kernel_cols"], b.multipliers)
        groups, terms, coefficients = self._coefficients(mode, keep)
        tap_rows = groups if mode is Mode.POINTWISE else fields["kernel_rows"] * chunks
        # where the pixels lie: rows and columns with gaps
        units = z.activation_blocks // z.group_blocks
        col_step, row_step = groups + int(rng.integers(3)), None
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
        if keep is None:
            taps = rng.integers(-128, 128, (tap_rows, b.blocks, b.slices, b.multipliers))
            if rng.random() < self.extreme:
                taps = rng.choice([-128, 127], taps.shape)
            if mode is not Mode.POINTWISE:      # multipliers beyond the kernel's columns
                column = np.arange(tap_rows)[:, None] % chunks * b.multipliers + np.arange(b.multipliers)
                taps = np.where(column[:, None, None] < fields["kernel_cols"], taps, 0)
            blob = bytes(pack_taps(taps.astype(np.int8), config)) + coefficients
            beats = len(blob) // z.beat_bytes
            if beats > z.weight_beats:
                return False
            if self._weight_at + beats > z.weight_beats:
                self._weight_at = 0
            at = self._put(blob)
            self.program_.emit(Opcode.LOAD_LINEAR, target=LinearTarget.WEIGHT, address=at, beats=beats,
                               base=self._weight_at, writes=[("weight", self._weight_at, beats)])
            emitted |= {"weight": self._weight_at, "taps": tap_rows, "coefficients": len(coefficients) // z.beat_bytes}
            reads.append(("weight", self._weight_at, beats))
            self._weight_at += beats
            self._kept = {"mode": mode, "groups": groups, "terms": terms, **fields}
        self.program_.emit(Opcode.EXECUTE_BASIS, reads=reads, writes=[("bank", bank, 1)], **emitted)
        self.summary.append(str(emitted))
        return True

    def _reconsider(self, fields, rows, cols):
        """The geometry with another kernel's size, if it still fits."""
        reach_rows = (fields["kernel_rows"] - 1) * fields["dilation_rows"] + 1
        reach_cols = (fields["kernel_cols"] - 1) * fields["dilation_cols"] + 1
        fields = fields | {"pad_top": min(fields["pad_top"], reach_rows - 1),
                           "pad_left": min(fields["pad_left"], reach_cols - 1)}
        for y in range(rows):
            at = [(y << fields["stride_rows_log2"]) + r * fields["dilation_rows"] - fields["pad_top"]
                  for r in range(fields["kernel_rows"])]
            if not any(0 <= a < fields["in_rows"] for a in at):
                return None
        return fields

    def _coefficients(self, mode, keep):
        """(channel groups, terms or None, packed bytes)."""
        config, b, z, rng = self.config, self.config.basis, self.sizes, self.rng
        if mode is Mode.DENSE:
            return 1, None, b""
        if mode is Mode.POINTWISE:
            return int(rng.integers(1, min(b.tap_rows, 6) + 1)), None, b""
        if keep is not None:
            return keep["groups"], keep["terms"], b""
        series = b.coefficients == "series"
        while True:
            groups = int(rng.integers(1, min(z.coefficient_groups, 2 * b.stream_groups + 2) + 1))
            terms = [int(n) for n in 1 << rng.integers(0, b.group.bit_length(), int(rng.integers(1, 4)))] \
                if series else None
            words = series_words(groups, terms, config) if series else map_words(groups, config)
            if words <= b.coefficient_rows:
                break
        shape = (b.blocks, b.slices, groups, b.group)
        density = rng.choice([0, 0.05, 0.2, 0.6, 1]) if self.density is None else self.density
        signs = rng.choice([-1, 1], shape)
        if rng.random() < self.extreme:
            signs = np.full(shape, int(rng.choice([-1, 1])))
        coefficients = signs * (rng.random(shape) < density)
        if series:
            coefficients *= np.argsort(rng.random(shape), axis=-1) < sum(terms)
            return groups, terms, bytes(pack_series(coefficients.astype(np.int8), config, terms))
        return groups, None, bytes(pack_maps(coefficients.astype(np.int8), config))
