"""One slice of the maps variant: lanes that look for work in a stream word and add it up without a multiplier."""
from functools import reduce
from operator import or_

from amaranth.hdl import Cat, Const, Module, Mux, Shape, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from spec.derive import Sizes


def rotate(columns, distance):
    """Bit l of the result is bit ``(l + distance) mod len`` of ``columns``."""
    distance %= len(columns)
    return Cat(columns[distance:], columns[:distance])


def any_of(terms):
    """Bitwise or of ``terms``, at least one."""
    return reduce(or_, terms)


def add(a, b, carry):
    """``a + b + carry`` of signed values in one adder: the carry enters below the lowest bits."""
    return (Cat(Const(1, 1), a).as_signed() + Cat(carry, b).as_signed())[1:].as_signed()


class Concentrator(wiring.Component):
    """``ir = saturate(sum over words, g, c of coefficient[g][c] * activation[g][c])``, coefficient in {-1, 0, 1}

    The lanes and their rule: docs/basis.md, "Concentration". Per channel group g, ``map`` and ``sign`` are the row of
    coefficients, ``word[g][k]`` bit k of the activations (less their zero point; ``word[g]`` is the transposed group:
    what the lanes do is the same for every bit), ``nonzero`` says which of them are not 0; bit c of each belongs to
    channel position c.

    The row and the word stay until ``pick`` comes with ``done``. ``first``: a word has come, all its matches are
    pending; at other times ``first`` is 0. With ``pick`` the lanes take what they have found; ``done``: then nothing
    would be left. What they took last is added with ``add``, to nothing if ``fresh``. ``ir`` is the sum after the last
    ``add``, clamped, and ``saturated`` says whether it had to be.

    Range: the sum is exact (`spec.derive.Sizes.exact_intermediate`) for a pixel of coefficient_groups groups and
    activations in -255..255.
    Latency: 1 cycle from ``pick`` to the operands of ``add``, 1 from ``add`` to ``ir``; ``done`` is combinational.
    Throughput: one match per lane and cycle; a word takes ``max(1, cycles by the rule)`` picks.
    Parameters: config (spec.config.Config) with coefficients "maps".
    """

    latency = 2

    @staticmethod
    def members(config):
        """Signature members."""
        b, sizes = config.basis, Sizes(config)
        row = data.ArrayLayout(b.group, b.stream_groups)
        return {
            "map": In(row), "sign": In(row), "nonzero": In(row),
            "word": In(data.ArrayLayout(data.ArrayLayout(b.group, sizes.operand.bits), b.stream_groups)),
            "first": In(1), "pick": In(1), "done": Out(1), "add": In(1), "fresh": In(1),
            "ir": Out(Shape(sizes.intermediate.bits, True)), "saturated": Out(1)}

    def __init__(self, *, config):
        self._config = config
        super().__init__(self.members(config))

    def _build_matches(self, m, pending):
        """chosen[k][g]: columns whose (k+1)-th match is in group g; seen[k]: columns that have more than k matches.

        k goes as far as the rounds can: the last one takes no match of a column behind the (look_aside + 1)-th.
        """
        b = self._config.basis
        depth = min(b.look_aside + 1, b.stream_groups)
        seen = [Const(0, b.group)] * depth                  # of the groups so far
        chosen = [[] for _ in range(depth)]
        for g, p in enumerate(pending):
            next_seen = []
            for k in range(depth):
                reaches = p & seen[k - 1] if k else p
                chosen[k].append(Signal(b.group, name=f"chosen{k}_{g}"))
                next_seen.append(Signal(b.group, name=f"seen{k}_{g}"))
                m.d.comb += [chosen[k][g].eq(reaches & ~seen[k]), next_seen[k].eq(reaches | seen[k])]
            seen = next_seen
        return chosen, seen

    def _build_rule(self, m, pending):
        """take[d][g]: the columns of group g of which the lane ``d`` places before takes a match."""
        b = self._config.basis
        chosen, seen = self._build_matches(m, pending)
        take, free = [chosen[0]], ~seen[0]                  # free: lanes that have found nothing yet
        # offer[k]: columns of which k matches are taken and the next is there; a column is in one of them at most
        offer = {1: seen[1]} if len(seen) > 1 else {}
        for d in range(1, b.look_aside + 1 if offer else 1):
            asked, left = Signal(b.group, name=f"asked{d}"), Signal(b.group, name=f"free{d}")
            m.d.comb += [asked.eq(rotate(free, -d)), left.eq(free & ~rotate(any_of(offer.values()), d))]
            given = {k: Signal(b.group, name=f"given{d}_{k}") for k in offer}
            m.d.comb += [given[k].eq(columns & asked) for k, columns in offer.items()]
            take.append([Signal(b.group, name=f"take{d}_{g}") for g in range(b.stream_groups)])
            m.d.comb += [taken.eq(any_of(given[k] & chosen[k][g] for k in given)) for g, taken in enumerate(take[d])]
            stay = {k: columns & ~asked for k, columns in offer.items()}
            move = {k + 1: columns & seen[k + 1] for k, columns in given.items() if k + 1 < len(seen)}
            offer = {k: Signal(b.group, name=f"offer{d}_{k}") for k in stay | move}
            m.d.comb += [columns.eq(any_of(c[k] for c in (stay, move) if k in c)) for k, columns in offer.items()]
            free = left
        return take

    def elaborate(self, platform):
        m = Module()
        b, sizes = self._config.basis, Sizes(self._config)
        groups, bits = range(b.stream_groups), range(sizes.operand.bits)

        # nothing is left of the word before when a word comes
        rest = [Signal(b.group, name=f"rest{g}") for g in groups]
        pending = [Signal(b.group, name=f"pending{g}") for g in groups]
        left = [Signal(b.group, name=f"left{g}") for g in groups]
        m.d.comb += [p.eq(r | (self.map[g] & self.nonzero[g] & self.first.replicate(b.group)))
                     for g, (p, r) in enumerate(zip(pending, rest))]
        take = self._build_rule(m, pending)
        for g in groups:
            m.d.comb += left[g].eq(pending[g] & ~any_of(of_group[g] for of_group in take))
            with m.If(self.pick):
                m.d.sync += rest[g].eq(left[g])
        m.d.comb += self.done.eq(~Cat(left).any())

        def select(values):
            """From ``values[g]`` (a bit per column) what each lane has taken, a bit per lane."""
            columns = [any_of(of_group[g] & values[g] for g in groups) for of_group in take]
            return any_of(rotate(of_lanes, d) for d, of_lanes in enumerate(columns))

        # -x = ~x + 1: the ones are the carries of the adders, of which there are as many as lanes
        minus = Signal(b.group)
        negative = Signal(b.group, reset_less=True)
        operand = [Signal(b.group, name=f"operand{k}", reset_less=True) for k in bits]
        m.d.comb += minus.eq(select(self.sign))
        with m.If(self.pick):
            m.d.sync += negative.eq(minus)
            for k in bits:
                activation_bit = select([self.word[g][k] for g in groups])
                m.d.sync += operand[k].eq(activation_bit ^ minus)
        values = [Cat(operand[k][lane] for k in bits).as_signed() for lane in range(b.group)]
        carries = list(negative)
        while len(values) > 1:
            values = [add(low, high, carries.pop()) for low, high in zip(values[0::2], values[1::2])]
        total = Signal(Shape(sizes.exact_intermediate.bits, True), reset_less=True)
        with m.If(self.add):
            m.d.sync += total.eq(add(Mux(self.fresh, 0, total), values[0], carries.pop()))

        width = sizes.intermediate.bits
        if width >= len(total):
            m.d.comb += self.ir.eq(total)
        else:
            high, negative_total = total[width - 1:], total[-1]
            m.d.comb += [self.saturated.eq(high.any() & ~high.all()),
                         self.ir.eq(Mux(self.saturated, Cat((~negative_total).replicate(width - 1), negative_total),
                                        total[:width]))]
        return m
