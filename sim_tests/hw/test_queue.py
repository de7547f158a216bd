# amaranth: UnusedElaboratable=no
"""The queue: order, no loss under any idle and stall, depth, rate."""
from collections import deque

from amaranth.lib import data
import pytest

from hw.memory.queue import Queue
from sim_tests.lib.pysim import simulate


@pytest.mark.parametrize("depth", [2, 3, 8])
@pytest.mark.parametrize("idle, stall", [(0, 0), (0.4, 0), (0, 0.4), (0.4, 0.4), (0, 0.95), (0.9, 0.9)])
def test_keeps_order_and_level(depth, idle, stall, rng):
    queue = Queue(shape=data.StructLayout({"a": 5, "b": 3}), depth=depth)

    async def bench(ctx):
        inside, sent, got, fullest, offer = deque(), 0, 0, 0, None
        for cycle in range(600):
            if offer is None and rng.random() >= idle:
                offer = sent % 32, sent // 32 % 8
            ctx.set(queue.i.valid, offer is not None)
            ctx.set(queue.i.payload, dict(zip("ab", offer or (31, 7))))
            ready = rng.random() >= stall
            ctx.set(queue.o.ready, ready)
            assert ctx.get(queue.level) == len(inside) <= depth
            if ctx.get(queue.o.valid):
                word = ctx.get(queue.o.payload.a), ctx.get(queue.o.payload.b)
                assert word == inside[0], f"cycle {cycle}"
                if ready:
                    inside.popleft()
                    got += 1
            taken = offer is not None and ctx.get(queue.i.ready)
            assert ctx.get(queue.i.ready) or ctx.get(queue.level) == depth, "refuses although there is room"
            fullest = max(fullest, len(inside))
            await ctx.tick()
            if taken:
                inside.append(offer)
                sent, offer = sent + 1, None
        assert sent == got + len(inside) and got > (20 if stall < .9 else 5)
        if stall == 0.95:
            assert fullest == depth, "never full"
        if idle == stall == 0:
            assert got >= 597, "not one item per cycle"

    simulate(queue, bench)


@pytest.mark.parametrize("side", ["i", "o"])
def test_handshakes_do_not_look_through(side):
    """i.ready does not follow o.ready, o.valid not i.valid, in the same cycle."""
    queue = Queue(shape=4, depth=2)

    async def bench(ctx):
        if side == "i":
            ctx.set(queue.i.valid, 1)
            await ctx.tick().repeat(4)
            for ready in (1, 0):
                ctx.set(queue.o.ready, ready)
                assert not ctx.get(queue.i.ready)
        else:
            for valid in (1, 0):
                ctx.set(queue.i.valid, valid)
                assert not ctx.get(queue.o.valid)

    simulate(queue, bench)


def test_refuses_depth_one():
    with pytest.raises(ValueError, match="Queue depth must be at least 2, not 1"):
        Queue(shape=1, depth=1)
