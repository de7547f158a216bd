"""Tokens: every pair on its own, limits of the counter, clear, simultaneous push and take."""
import itertools

from hw.control.tokens import UNITS, Tokens
from sim_tests.lib.pysim import simulate
from spec.derive import TOKEN_BITS

PAIRS = list(itertools.permutations(UNITS, 2))
LIMIT = (1 << TOKEN_BITS) - 1


def test_random_pushes_and_takes(rng):
    tokens = Tokens()

    async def bench(ctx):
        counts = dict.fromkeys(PAIRS, 0)
        for cycle in range(2000):
            clear = rng.random() < 0.005
            ctx.set(tokens.clear, clear)
            for a, b in PAIRS:
                assert ctx.get(getattr(tokens, f"available_{a}_{b}")) == (counts[a, b] > 0), f"cycle {cycle}: {a} {b}"
                push = rng.random() < (0.6 if cycle // 250 % 2 else 0.3)
                take = counts[a, b] > 0 and rng.random() < 0.5
                ctx.set(getattr(tokens, f"push_{a}_{b}"), push)
                ctx.set(getattr(tokens, f"take_{a}_{b}"), take)
                counts[a, b] = 0 if clear else counts[a, b] + push - take
            await ctx.tick()
            assert not ctx.get(tokens.overflow)

    simulate(tokens, bench)


def test_overflow_exactly_at_the_limit():
    async def bench(ctx, tokens, pair):
        push, take, available = (getattr(tokens, f"{what}_{'_'.join(pair)}") for what in ("push", "take", "available"))
        ctx.set(push, 1)
        await ctx.tick().repeat(LIMIT)
        assert not ctx.get(tokens.overflow)
        ctx.set(take, 1)                        # full, one in, one out: still full
        await ctx.tick().repeat(3)
        assert not ctx.get(tokens.overflow) and ctx.get(available)
        ctx.set(push, 0)
        await ctx.tick()
        ctx.set(take, 0)
        ctx.set(push, 1)
        await ctx.tick()                        # full again
        assert not ctx.get(tokens.overflow)
        await ctx.tick()
        ctx.set(push, 0)
        assert ctx.get(tokens.overflow)
        ctx.set(tokens.clear, 1)
        await ctx.tick().repeat(2)
        assert ctx.get(tokens.overflow), "held until reset"
        assert not ctx.get(available)

    for pair in PAIRS:
        tokens = Tokens()

        async def one(ctx, tokens=tokens, pair=pair):
            await bench(ctx, tokens, pair)

        simulate(tokens, one)


def test_clear_wins_over_a_push():
    tokens = Tokens()

    async def bench(ctx):
        ctx.set(tokens.push_load_store, 1)
        ctx.set(tokens.clear, 1)
        await ctx.tick()
        assert not ctx.get(tokens.available_load_store)

    simulate(tokens, bench)
