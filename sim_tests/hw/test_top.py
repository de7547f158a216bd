"""The whole accelerator through AXI models that nobody here wrote, against the machine or against arithmetic."""
import numpy as np
import pytest

from golden.convolution import accumulate
from golden.requantize import requantize
from golden.tiles import pack_tile
from hw.top import Accelerator
from sim_tests.lib.simulate import run_cocotb
from spec.config import load
from spec.derive import PARAMETER_BITS, Sizes
from spec.formats import column_parameters, step_entry
from spec.isa import LinearTarget, Opcode, encode


def pad(data, size):
    """Bytes padded with zeros to a multiple of ``size``."""
    return data + bytes(-len(data) % size)


class Image:
    """A memory image under construction: regions aligned to 64 bytes."""

    def __init__(self):
        self.data = bytearray(64)

    def add(self, raw):
        at = len(self.data)
        self.data += pad(bytes(raw), 64)
        return at


def single_convolution(config, rng):
    """A 3x3 convolution with padding, one channel group in and out, written by hand."""
    s, sizes = config.structured, Sizes(config)
    c, height, width = s.columns, 4, 3
    x = rng.integers(-128, 128, (1, height, width, c), np.int8)
    w = rng.integers(-128, 128, (c, 3, 3, c), np.int8)
    bias = rng.integers(-1000, 1000, c)
    mult, shift = rng.integers(32768, 65536, c), np.full(c, 11)
    image = Image()
    x_at = image.add(np.ascontiguousarray(x[0]).tobytes())
    cb, pitch = sizes.group_blocks, width + 1
    per_tap = -(-c // s.slots) if c > s.slots else 1
    assert per_tap == 1 and c == s.slots
    tiles, steps = b"", b""
    for r in range(3):
        for t in range(3):
            values = w[:, r, t, :].T.astype(np.int64)
            tiles += pack_tile(values, None, config, s.block)
            entry = step_entry(s.taps).pack(
                offset=[(r * pitch + t) * cb] + [0] * (s.taps - 1), enable=[1] + [0] * (s.taps - 1),
                n_log2=s.block.bit_length() - 1, segments_log2=0, hold=0)
            steps += pad(entry.to_bytes(16, "little"), sizes.beat_bytes)
    w_at, t_at = image.add(tiles), image.add(steps)
    params = b"".join(column_parameters().pack(bias=int(b), multiplier=int(q), shift=int(h), reserved=0)
                      .to_bytes(PARAMETER_BITS // 8, "little") for b, q, h in zip(bias, mult, shift))
    p_at = image.add(pad(params, sizes.beat_bytes))
    y_at = image.add(bytes(height * width * c))
    ops = [
        encode(Opcode.HEADER, digest=sizes.digest_value, version=1),
        encode(Opcode.LOAD_LINEAR, target=LinearTarget.STEP, address=t_at, beats=9 * sizes.step_beats, base=0),
        encode(Opcode.LOAD_LINEAR, target=LinearTarget.WEIGHT, address=w_at, beats=9 * sizes.value_beats, base=0),
        encode(Opcode.FILL, value=-5, rows=1, blocks=(height + 2) * pitch * cb + cb, base=0),
        encode(Opcode.LOAD_TILE, address=x_at, planes=1, rows=height, cols=width, row_stride=width,
               base=(pitch + 1) * cb, row_step=pitch * cb, col_step=cb, push_execute=1),
        encode(Opcode.LOAD_LINEAR, target=LinearTarget.PARAMETER, address=p_at, beats=sizes.parameter_beats,
               push_store=1),
        encode(Opcode.EXECUTE, rows=height, cols=width, row_step=pitch * cb, col_step=cb, steps=9, wait_load=1,
               push_store=1),
        encode(Opcode.STORE, address=y_at, rows=height, cols=width, row_stride=width, zero_point=3, low=-128,
               high=127, wait_load=1, wait_execute=1),
        encode(Opcode.BARRIER, mark=7),
        encode(Opcode.END),
    ]
    program = image.add(b"".join(pad(op.to_bytes(32, "little"), sizes.instruction_beats * sizes.beat_bytes)
                                 for op in ops))
    before = np.frombuffer(bytes(image.data), np.uint8)
    y = requantize(accumulate(x, w, pads=(1, 1, 1, 1), pad_value=-5), bias=bias, multiplier=mult, shift=shift,
                   zero_point=3, low=-128, high=127)
    after = before.copy()
    after[y_at:y_at + y.size] = np.frombuffer(y.tobytes(), np.uint8)
    return {"before": before, "after": after, "program": np.array([program, len(ops)])}


@pytest.mark.parametrize("preset", ["tiny", "nm64", "nm256"])
def test_hand_written_program(preset, tmp_path):
    config = load(preset)
    rng = np.random.default_rng(1)
    jobs = {f"{n}.{k}": v for n in range(2) for k, v in single_convolution(config, rng).items()}
    np.savez(tmp_path / "jobs.npz", **jobs)
    run_cocotb(Accelerator(config=config), f"summand_{preset}", "sim_tests.hw.tb_top", 2, tmp_path, config,
               env={"SUMMAND_JOBS": str(tmp_path / "jobs.npz")}, flags=("-Wno-CASEINCOMPLETE",))
