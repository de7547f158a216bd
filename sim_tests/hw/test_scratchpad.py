"""The banked scratchpad: masks, rows per bank, every bank in each cycle."""
import numpy as np
import pytest

from hw.memory.scratchpad import Scratchpad
from sim_tests.hw.configs import CONFIGS
from sim_tests.lib.pysim import simulate


@pytest.mark.parametrize("name", ["tiny", "dense", "block8"])
def test_against_an_array(name, rng):
    config = CONFIGS[name]
    pad = Scratchpad(config=config)
    bits = 8 * config.structured.block

    async def bench(ctx):
        model = np.zeros((pad.rows, pad.banks), object)
        out = [0] * pad.banks
        rows = min(pad.rows, 5)         # few rows meet often
        for _ in range(300):
            write, read = rng.integers(2, size=2).tolist()
            row, mask = int(rng.integers(rows)) * (pad.rows // rows), int(rng.integers(1 << pad.banks))
            words = [int.from_bytes(rng.bytes(bits // 8), "little") for _ in range(pad.banks)]
            asked = [int(r) * (pad.rows // rows) for r in rng.integers(rows, size=pad.banks)]
            ctx.set(pad.write_en, write)
            ctx.set(pad.write_row, row)
            ctx.set(pad.write_mask, mask)
            ctx.set(pad.read_en, read)
            for b in range(pad.banks):
                ctx.set(pad.write_data[b], words[b])
                ctx.set(pad.read_row[b], asked[b])
            if read:
                out = [model[asked[b], b] for b in range(pad.banks)]
            for b in range(pad.banks):
                if write and mask >> b & 1:
                    model[row, b] = words[b]
            await ctx.tick()
            assert [ctx.get(pad.read_data[b]) for b in range(pad.banks)] == out

    simulate(pad, bench)
