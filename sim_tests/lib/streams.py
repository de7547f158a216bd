"""Drivers and monitors of Amaranth streams for cocotb: one loop per test that offers, accepts, watches and ends.

Values are driven at the falling edge and sampled just after it, so that they are settled at the rising edge whatever
other models (cocotbext-axi drives after the rising edge) do.
"""
from collections import deque
import itertools

from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, FallingEdge, ReadOnly


class Source:
    """Words for an input stream: ``port`` names the member (``fetch_request``: signals fetch_request__valid …).

    ``idle``: chance per cycle of offering nothing (random garbage on the payload meanwhile). ``words`` may grow while
    `exchange` runs; ``taken`` counts transfers.
    """

    def __init__(self, dut, port, words=(), *, idle=0.0):
        self.port, self.words, self.idle, self.taken = port, deque(words), idle, 0
        self.valid, self.ready, self.payload = (getattr(dut, f"{port}__{s}") for s in ("valid", "ready", "payload"))
        self.offering = False

    def drive(self, rng):
        self.offering = self.offering or bool(self.words and rng.random() >= self.idle)
        width = len(self.payload)
        garbage = int.from_bytes(rng.bytes(width // 8 + 1), "little") % (1 << width)
        self.payload.value = self.words[0] if self.offering else garbage
        self.valid.value = int(self.offering)

    def sample(self, cycle):
        """The word transferred in this cycle, or None."""
        if not (self.offering and self.ready.value):
            return None
        self.offering, self.taken = False, self.taken + 1
        return self.words.popleft()


class Sink:
    """Accepts an output stream; ``stall``: chance per cycle of not being ready. An offer must stay until taken."""

    def __init__(self, dut, port, *, stall=0.0):
        self.port, self.stall, self.taken = port, stall, 0
        self.valid, self.ready, self.payload = (getattr(dut, f"{port}__{s}") for s in ("valid", "ready", "payload"))
        self.held, self.accept, self.offered = None, False, False
        #: Set False where the contract allows a withdrawn offer (for example after ``stop``).
        self.check_stable = True

    def drive(self, rng):
        self.accept = rng.random() >= self.stall
        self.ready.value = int(self.accept)

    def sample(self, cycle):
        """The word transferred in this cycle, or None."""
        word = int(self.payload.value) if self.valid.value else None
        if self.check_stable:
            assert self.held in (None, word), f"cycle {cycle}: stalled offer on {self.port} changed"
        self.offered = word is not None
        self.held = None if self.accept else word
        if word is None or not self.accept:
            return None
        self.taken += 1
        return word


class Tap:
    """Watches a handshake that other models drive, for example an AXI channel: ``Tap(dut, "m_axi__ar", ("addr",))``.

    Yields a dict of the fields per transfer, and asserts that an offer stays, unchanged, until it is taken.
    """

    def __init__(self, dut, prefix, fields, *, check_stable=True):
        self.port, self.check_stable, self.taken = prefix, check_stable, 0
        self.valid, self.ready = getattr(dut, f"{prefix}valid"), getattr(dut, f"{prefix}ready")
        self.fields = {name: getattr(dut, f"{prefix}{name}") for name in fields}
        self.held, self.offered = None, False

    def drive(self, rng):
        """Nothing: a tap only looks."""

    def sample(self, cycle):
        """The fields transferred in this cycle, or None."""
        self.offered = bool(self.valid.value)
        word = {name: int(signal.value) for name, signal in self.fields.items()} if self.offered else None
        if self.check_stable:
            assert self.held in (None, word), \
                f"cycle {cycle}: stalled offer on {self.port} changed from {self.held} to {word}"
        accepted = self.offered and bool(self.ready.value)
        self.held = None if accepted else word
        self.taken += accepted
        return word if accepted else None


async def start(dut, ends=(), **inputs):
    """Clock, the given sources and sinks idle, the given input ports at their values, some cycles of reset.

    Each test begins with it: the tests of one run share the device.
    """
    for end in ends:
        if isinstance(end, Source):
            end.valid.value = end.payload.value = 0
        elif isinstance(end, Sink):
            end.ready.value = 0
    for name, value in inputs.items():
        getattr(dut, name).value = value
    dut.rst.value = 1
    Clock(dut.clk, 10, unit="ns", impl="gpi").start()
    await ClockCycles(dut.clk, 3)
    await FallingEdge(dut.clk)
    dut.rst.value = 0


async def exchange(dut, ends, *, rng, drain=100, watch=(), until=None, on_cycle=None, limit=200_000):
    """Run the given sources and sinks; yield ``(cycle, port, word)`` for each transfer.

    Args:
        ends: `Source`, `Sink` and `Tap` objects.
        rng: numpy Generator; decides idles and stalls.
        drain: the run ends after this many cycles in which no source had words and nothing was offered to a sink:
            extra data are seen.
        watch: names of output signals; yields ``(cycle, name, value)`` in each cycle in which one is not 0. A watched
            signal that is high does not keep the run alive.
        until: called every cycle; the run cannot end before it returns true.
        on_cycle: called with the cycle number when inputs may be driven.
        limit: cycles after which the run fails.
    """
    quiet = 0
    watched = [(name, getattr(dut, name)) for name in watch]
    for cycle in itertools.count():
        if quiet >= drain and (until is None or until()):
            await FallingEdge(dut.clk)  # leave the read-only phase: the caller may drive at once
            return
        assert cycle < limit, f"no end after {limit} cycles"
        await FallingEdge(dut.clk)
        if on_cycle is not None:
            on_cycle(cycle)
        for end in ends:
            end.drive(rng)
        await ReadOnly()
        quiet += 1
        events = []
        for end in ends:
            word = end.sample(cycle)
            if isinstance(end, Source):
                if end.words or word is not None:
                    quiet = 0
            elif end.offered:
                quiet = 0
            if word is not None:
                events.append((cycle, end.port, word))
        for name, signal in watched:
            if value := int(signal.value):
                events.append((cycle, name, value))
        for event in events:
            yield event
