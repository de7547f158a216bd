"""Unbounded proofs: the queue keeps every word, tokens are counted, a request's bursts add up to it."""
from amaranth.asserts import AnySeq
from amaranth.hdl import Assert, Assume, Const, Cover, Elaboratable, Fragment, Module, Mux, Signal
from amaranth.hdl._mem import MemoryInstance
import pytest

from hw.bus.burst import BurstSplitter
from hw.control.tokens import UNITS, Tokens
from hw.memory.queue import Queue
from sim_tests.formal.prove import Harness, run
from spec.config import load
from spec.derive import TOKEN_BITS

CONFIG = load("tiny")


class Elaborated(Elaboratable):
    """A component seen from inside: ``inner[name]`` are the signals that it drives, ``memory`` is its memory."""

    def __init__(self, component):
        self.signature, self.fragment = component.signature, Fragment.get(component, None)
        for name in component.signature.members:
            setattr(self, name, getattr(component, name))
        self.inner, self.memory = {}, None
        self._look(self.fragment)

    def _look(self, fragment):
        if isinstance(fragment, MemoryInstance):
            self.memory = fragment
        for statements in fragment.statements.values():
            for signal in statements._lhs_signals():
                self.inner[signal.name] = signal
        for inner, *_ in fragment.subfragments:
            self._look(inner)

    def elaborate(self, platform):
        return self.fragment


class QueueProof(Harness):
    """Any word, marked as it goes in, comes out unchanged behind exactly those that were inside before it.

    ``ahead`` counts them. The induction needs to be told where the marked word lies, which a further read port of the
    queue's memory shows.
    """

    def __init__(self, *, bits, depth, buffered=True):
        self.depth, self.buffered = depth, buffered
        super().__init__(Elaborated(Queue(shape=bits, depth=depth)))

    def properties(self, m):
        dut, inner, places = self.dut, self.dut.inner, self.depth - self.buffered
        put, get = dut.i.valid & dut.i.ready, dut.o.valid & dut.o.ready
        self.stable(m, dut.o.valid, dut.o.ready, dut.o.payload)
        produce, consume = inner["produce"], inner["consume"]
        stored = inner["inner_level"] if self.buffered else inner["level"]

        count = Signal(range(self.depth + 2))
        m.d.sync += count.eq(count + put - get)
        m.d.comb += [Assert(dut.level == count), Assert(count <= self.depth),
                     Assert(stored <= places), Assert(produce < places), Assert(consume < places),
                     Assert(produce == Mux(consume + stored >= places, consume + stored - places, consume + stored))]
        # It refuses only when it is full (the buffered one: when its memory is), and shows what it has.
        m.d.comb += Assert(dut.i.ready == (stored != places))
        with m.If(self.started & (self.past(count) != 0) & ~self.past(get)):
            m.d.comb += Assert(dut.o.valid)

        marked, word, ahead = Signal(), Signal.like(dut.i.payload), Signal(range(self.depth + 1))
        with m.If(~marked & put & AnySeq(1)):
            m.d.sync += [marked.eq(1), word.eq(dut.i.payload), ahead.eq(count - get)]
        with m.Elif(marked & get):
            m.d.sync += [marked.eq(ahead != 0), ahead.eq(ahead - 1)]
        place, there = Signal(range(2 * self.depth)), Signal.like(word)
        behind = ahead - dut.o.valid if self.buffered else ahead
        at_output = (ahead == 0) & dut.o.valid if self.buffered else Const(0)
        m.d.comb += place.eq(Mux(consume + behind >= places, consume + behind - places, consume + behind))
        if places > 1:
            where = place[:len(produce)]
        else:
            where = Const(0, 0)
        dut.memory.read_port(domain="comb", addr=where, data=there, en=Const(1), transparent_for=())
        with m.If(marked):
            m.d.comb += Assert(ahead < count)
            with m.If(at_output):
                m.d.comb += Assert(dut.o.payload == word)
            with m.Else():
                m.d.comb += Assert(there == word)
            with m.If(get & (ahead == 0)):      # what all this is for
                m.d.comb += Assert(dut.o.payload == word)
        longest = Signal()
        with m.If(marked & (ahead == self.depth - 1)):
            m.d.sync += longest.eq(1)
        m.d.comb += Cover(longest & marked & get & (ahead == 0) & (word == 5))


class TokenProof(Harness):
    """Each counter equals pushes minus takes until one overflows, which is told at once and for ever."""

    def __init__(self):
        super().__init__(Elaborated(Tokens()))

    def properties(self, m):
        dut, told = self.dut, []
        with m.If(self.started & self.past(dut.overflow)):
            m.d.comb += Assert(dut.overflow)
        for a in UNITS:
            for b in UNITS:
                if a == b:
                    continue
                push, take, available = (getattr(dut, f"{what}_{a}_{b}") for what in ("push", "take", "available"))
                m.d.comb += Assume(~take | available)       # units take only what there is
                model = Signal(TOKEN_BITS + 1, name=f"model_{a}_{b}")
                beyond = (1 << TOKEN_BITS) - 1
                # A counter that was once passed stays passed: its model must not come back into range.
                with m.If(model <= beyond):
                    m.d.sync += model.eq(Mux(dut.clear & (model + push - take <= beyond), 0, model + push - take))
                told.append(model > beyond)
                with m.If(~dut.overflow):
                    m.d.comb += [Assert(model <= beyond), Assert(dut.inner[f"count_{a}_{b}"] == model),
                                 Assert(available == (model != 0))]
        m.d.comb += Cover(dut.inner["count_load_store"] == 3)
        passed = Signal()
        m.d.comb += passed.eq(sum(told) != 0)
        m.d.comb += Assert(dut.overflow == passed)          # no alarm without reason either


class SumProof(Harness):
    """The bursts of a request lie one behind the other and together are the request; the last one says so."""

    def properties(self, m):
        dut, rest = self.dut, self.dut.rest
        beat_bytes = CONFIG.bus.data_bits // 8
        shift = beat_bytes.bit_length() - 1
        for value in (dut.memory_base, dut.memory_bytes):
            self.constant(m, value)
        total, begin, sent = Signal(20), Signal(40), Signal(21)
        burst, length = dut.burst, dut.burst.p.length + 1
        with m.If(burst.valid & burst.ready):
            m.d.sync += sent.eq(sent + length)
        with m.If(dut.request.valid & dut.request.ready):
            m.d.sync += [total.eq(dut.request.p.beats), begin.eq(dut.request.p.offset), sent.eq(0)]
        with m.If(rest.active):
            m.d.comb += [Assert(rest.left + sent == total), Assert((rest.left != 0) | (total == 0)),
                         Assert(rest.first == (sent == 0)), Assert(rest.low == begin[:shift]),
                         Assert(rest.beat == (begin[shift:] + sent)[:len(rest.beat)])]
        with m.If(burst.valid):
            base = dut.memory_base[12:] << 12
            m.d.comb += [Assert(burst.p.address == base + begin + sent * beat_bytes),
                         Assert(burst.p.final == (sent + length == total)), Assert(sent + length <= total)]
        m.d.comb += Cover(burst.valid & burst.ready & burst.p.final & (total == 11))
        # The request is given up before its last burst only with an error, or when it is dropped.
        over = self.past(rest.active) & ~self.past(dut.drop | dut.range_error)
        ended = self.past(burst.valid & burst.ready & burst.p.final)
        with m.If(self.started & over & ~ended):
            m.d.comb += Assert(rest.active)


PROOFS = {
    "queue_2": lambda: QueueProof(bits=8, depth=2, buffered=False),
    "queue_3": lambda: QueueProof(bits=8, depth=3),
    "queue_4": lambda: QueueProof(bits=4, depth=4),
    "queue_8": lambda: QueueProof(bits=4, depth=8),
    "tokens": lambda: TokenProof(),
    "burst_sums": lambda: SumProof(BurstSplitter(bus=CONFIG.bus)),
}


@pytest.mark.parametrize("name", PROOFS)
def test_holds_in_every_cycle(name, tmp_path):
    status, log = run(PROOFS[name](), tmp_path, depth=2)
    assert status == 0, log[-3000:]
    assert "successful proof by k-induction" in log, log[-3000:]


@pytest.mark.parametrize("name", ["queue_2", "queue_4", "tokens", "burst_sums"])
def test_what_is_proved_happens(name, tmp_path):
    """No assumption shuts out the interesting case."""
    status, log = run(PROOFS[name](), tmp_path, mode="cover", depth=14)
    assert status == 0, log[-3000:]


class _Forgets(Tokens):
    """Planted fault: a push takes the alarm back."""

    def elaborate(self, platform):
        m = super().elaborate(platform)
        with m.If(self.push_load_execute):
            m.d.sync += self.overflow.eq(0)
        return m


class _Changes(Queue):
    """Planted fault: one word in 16 is changed on its way."""

    def elaborate(self, platform):
        m = Module()
        m.submodules.good = good = Queue(shape=self._shape, depth=self._depth)
        m.d.comb += [good.i.valid.eq(self.i.valid), self.i.ready.eq(good.i.ready), self.level.eq(good.level),
                     good.i.payload.eq(Mux(self.i.payload == 9, 8, self.i.payload)), self.o.valid.eq(good.o.valid),
                     self.o.payload.eq(good.o.payload), good.o.ready.eq(self.o.ready)]
        return m


def test_planted_faults_are_refuted(tmp_path):
    tokens, queue = TokenProof(), QueueProof(bits=4, depth=4)
    tokens.dut, queue.dut = Elaborated(_Forgets()), Elaborated(_Changes(shape=4, depth=4))
    for n, proof in enumerate((queue, tokens)):
        folder = tmp_path / str(n)
        folder.mkdir()
        status, log = run(proof, folder, depth=2)
        assert status in (2, 4) and "successful proof" not in log, log[-3000:]
        assert n or status == 2, "a changed word within reach gives a counterexample"
