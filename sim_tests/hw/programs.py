"""Small hand-made programs for the whole accelerator that use every instruction and most of its fields."""

import numpy as np

from golden.tiles import fill_slots, pack_tile
from spec.derive import Sizes
from spec.formats import column_parameters, step_entry
from spec.isa import VERSION, LinearTarget, Opcode, Operation, TileTarget, encode

#: Where things lie in the image; the window ends behind the guard.
REGION = 256


class LittleProgram:
    """Two output tiles of ``tiny``'s kind (block 4): sparse series with segments, hold, accumulate, MAX, residual.

    ``memory``: uint8 image with the program in it; ``program``, ``count``: where and how long; ``words``: the
    instructions; ``outputs``: (first byte, bytes) that a good run changes; ``steps``: (first byte, bytes)
    of the step table. ``start``: bytes left free at the beginning.
    """

    def __init__(self, config, rng, *, start=0):
        s, z = config.structured, Sizes(config)
        assert s.block == s.columns == s.slots == 4 and s.taps == 2, "made for tiny"
        self.config, self.sizes, self.memory = config, z, bytearray(start)
        unit = z.unit_bytes
        x = self._put(rng.integers(0, 256, 2 * 16 * unit, np.uint8))  # two channel groups of 4 x 4
        residual = self._put(rng.integers(0, 256, 3 * 3 * unit, np.uint8))
        taps = [0] * s.taps

        def entry(offset, n, segments_log2=0, hold=0, enable=(1, 1)):
            return step_entry(s.taps).pack(
                offset=(list(offset) + taps)[: s.taps],
                enable=list(enable),
                n_log2=n.bit_length() - 1,
                segments_log2=segments_log2,
                hold=hold,
            )

        # pixels lie 2 blocks apart (channel groups side by side), rows 8
        steps = [
            entry((0, 10), 2, 1),
            entry((8,), 4, enable=(1, 0)),
            entry((16,), 4, hold=1, enable=(1, 0)),
            entry((0,), 1, enable=(1, 0)),
            entry((9,), 4, enable=(1, 0)),
        ]
        step_bytes = z.step_beats * z.beat_bytes
        steps_at = self._put(b"".join(word.to_bytes(step_bytes, "little") for word in steps))
        self.steps = steps_at, len(steps) * step_bytes
        tiles = []
        for n in (2, 4, 1, 4):
            blocks = z.fetch_blocks(n)
            weights = rng.integers(-128, 128, (blocks, s.block, s.columns))
            weights *= np.argsort(rng.random(weights.shape), axis=1) < n
            values, indices = fill_slots(weights.reshape(-1, s.columns), config, n)
            if n == 1:  # one segment of four blocks, of which only three are filled
                values[3] = indices[3] = 0
            tiles.append(pack_tile(values, None if n == s.block else indices, config, n))
        weights_at = self._put(b"".join(tiles))
        record = column_parameters()
        words = [
            record.pack(
                bias=int(rng.integers(-2000, 2000)),
                multiplier=int(rng.integers(20000, 65536)),
                shift=int(rng.integers(6, 10)),
                reserved=0,
            )
            for _ in range(s.columns)
        ]
        parameters_at = self._put(b"".join(w.to_bytes(8, "little") for w in words))
        first, second = self._put(bytes(REGION)), self._put(bytes(REGION))
        self.outputs = ((first, 9 * unit), (second, 4 * unit))
        beats = sum(z.tile_beats(n) for n in (2, 4))
        self.words = [
            encode(Opcode.HEADER, digest=z.digest_value, version=VERSION),
            encode(
                Opcode.LOAD_LINEAR, target=LinearTarget.STEP, address=steps_at, beats=len(steps) * z.step_beats, base=3
            ),
            encode(
                Opcode.LOAD_LINEAR,
                target=LinearTarget.WEIGHT,
                address=weights_at,
                beats=len(b"".join(tiles)) // z.beat_bytes,
                base=5,
            ),
            encode(Opcode.FILL, value=-5, rows=5, blocks=10, base=0, row_step=8),
            encode(
                Opcode.LOAD_TILE,
                target=TileTarget.ACTIVATION,
                address=x,
                planes=2,
                rows=4,
                cols=4,
                plane_stride=16,
                row_stride=4,
                base=0,
                plane_step=1,
                row_step=8,
                col_step=2,
                push_execute=1,
            ),
            encode(
                Opcode.LOAD_TILE,
                target=TileTarget.RESIDUAL,
                address=residual,
                planes=1,
                rows=3,
                cols=3,
                row_stride=3,
                base=7,
                row_step=3,
                col_step=1,
            ),
            encode(
                Opcode.LOAD_LINEAR,
                target=LinearTarget.PARAMETER,
                address=parameters_at,
                beats=z.parameter_beats,
                base=z.parameter_beats,
                push_store=1,
            ),
            encode(
                Opcode.EXECUTE,
                base=0,
                rows=3,
                cols=3,
                row_step=8,
                col_step=2,
                weight=5,
                step=3,
                steps=3,
                bank=0,
                wait_load=1,
                push_store=1,
            ),
            encode(
                Opcode.EXECUTE,
                base=0,
                rows=2,
                cols=2,
                row_step=8,
                col_step=4,
                weight=5 + beats,
                step=6,
                steps=1,
                bank=1,
            ),
            encode(
                Opcode.EXECUTE,
                base=0,
                rows=2,
                cols=2,
                row_step=8,
                col_step=2,
                weight=5 + beats + z.tile_beats(1),
                step=7,
                steps=1,
                bank=1,
                accumulate=1,
                operation=Operation.MAX,
                push_store=1,
            ),
            encode(
                Opcode.STORE,
                address=first + unit,
                rows=3,
                cols=3,
                row_stride=4,
                bank=0,
                parameter=z.parameter_beats,
                zero_point=3,
                low=-120,
                high=120,
                residual=1,
                residual_base=7,
                residual_zero_point=-3,
                residual_multiplier=9000,
                wait_load=1,
                wait_execute=1,
            ),
            encode(
                Opcode.STORE,
                address=second,
                rows=2,
                cols=2,
                row_stride=2,
                bank=1,
                parameter=z.parameter_beats,
                zero_point=-7,
                low=-128,
                high=127,
                wait_execute=1,
                push_load=1,
            ),
            encode(
                Opcode.LOAD_TILE,
                target=TileTarget.RESIDUAL,
                address=second,
                planes=1,
                rows=1,
                cols=4,
                row_stride=4,
                base=20,
                col_step=1,
                wait_store=1,
            ),
            encode(Opcode.BARRIER, mark=0x1234),
            encode(Opcode.END),
        ]
        self.count = len(self.words)
        stride = z.instruction_beats * z.beat_bytes
        self.program = self._put(b"".join(w.to_bytes(stride, "little") for w in self.words))
        self.stride = stride
        self.memory = np.frombuffer(bytes(self.memory) + bytes(REGION), np.uint8)

    def _put(self, data):
        at = len(self.memory)
        self.memory += bytes(data) + bytes(-len(bytes(data)) % 64)
        return at

    def with_words(self, words):
        """The image with other instructions in the program's place."""
        memory = self.memory.copy()
        for n, word in enumerate(words):
            at = self.program + n * self.stride
            memory[at : at + 32] = np.frombuffer(word.to_bytes(32, "little"), np.uint8)
        return memory
