"""The compressors behind the wave files, against decoders written from the formats (LZ4) and Python's own (zlib)."""

from pathlib import Path
import subprocess
import zlib

import numpy as np
import pytest

from gen.tools import find
from sim_tests.bench import build

CODECS = build.CODECS


def lz4_decode(data):
    """Plain decoder of the LZ4 block format."""
    out, at = bytearray(), 0

    def length(value):
        nonlocal at
        if value == 15:
            while True:
                at += 1
                value += data[at - 1]
                if data[at - 1] != 255:
                    break
        return value

    while at < len(data):
        token, at = data[at], at + 1
        literals = length(token >> 4)
        out += data[at : at + literals]
        at += literals
        if at == len(data):
            break
        offset, at = data[at] | data[at + 1] << 8, at + 2
        assert 0 < offset <= len(out)
        for _ in range(length(token & 15) + 4):
            out.append(out[-offset])
    return bytes(out)


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    program = tmp_path_factory.mktemp("codecs") / "codecs"
    subprocess.run(
        [
            find("g++"),
            "-std=gnu++17",
            "-Wall",
            "-Wextra",
            "-Werror",
            f"-I{CODECS}",
            "-o",
            program,
            Path(__file__).with_name("codecs.cpp"),
        ],
        check=True,
    )
    return lambda name, data: subprocess.run([program, name], input=data, capture_output=True, check=True).stdout


def samples(rng):
    for size in (0, 1, 4, 11, 12, 13, 14, 15, 16, 20, 270, 70_000):
        yield rng.integers(0, 256, size, dtype=np.uint8).tobytes()  # does not compress: long literals
        yield rng.integers(0, 2, size, dtype=np.uint8).tobytes()  # many short matches
        yield bytes(size)  # one long match
        yield (rng.integers(0, 256, 40_000, dtype=np.uint8).tobytes() * 3)[: size + 50_000]  # far matches


def test_lz4_round_trip(codec, rng):
    for data in samples(rng):
        assert lz4_decode(codec("lz4", data)) == data
    assert len(codec("lz4", bytes(100_000))) < 1000


def test_zlib_round_trip(codec, rng):
    for data in samples(rng):
        assert zlib.decompress(codec("zlib", data)) == data
