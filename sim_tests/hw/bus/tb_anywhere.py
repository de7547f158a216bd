"""cocotb tests of both DMA masters: any window, any base, any offset; limits and leftovers that a polite memory hides.

Every one of them was added because a mutant of hw/bus survived without it (docs/verification.md).
"""
import cocotb
import numpy as np

from hw.bus.read import CLIENTS
from sim_tests.hw.bus.common import RAM_BYTES, bursts_of, error_word, request_word
from sim_tests.hw.tb_requantize import reset
from sim_tests.lib.faulty_axi import ReadSlave, WriteSlave
from sim_tests.lib.simulate import config_of_run
from sim_tests.lib.streams import Sink, Source, Tap, exchange, start
from spec.registers import Error


class Side:
    """What differs between the masters: names of ports and the memory that answers."""

    def __init__(self, dut, client="load"):
        self.dut, self.write = dut, hasattr(dut, "m_axi__awvalid")
        self.channel = "m_axi__aw" if self.write else "m_axi__ar"
        self.request = "request" if self.write else f"{client}_request"
        self.number = 0 if self.write else CLIENTS.index(client)
        bus = config_of_run().bus
        self.beat_bytes = bus.data_bits // 8
        self.limit = bus.outstanding_writes if self.write else bus.outstanding_reads
        self.silent = {"m_axi__awready": 1, "m_axi__wready": 1, "m_axi__bvalid": 0} if self.write else {
            "m_axi__arready": 1, "m_axi__rvalid": 0}

    def ends(self, requests=(), **slave):
        """Request source, address tap, data, and a memory if any of ``slave`` is given."""
        source = Source(self.dut, self.request, [request_word(*r) for r in requests])
        ends = [source, Tap(self.dut, self.channel, ("addr", "len", "id"), check_stable=True)]
        if self.write:
            beats = min(sum(n for _, n in requests), 4 * self.limit * 256)
            ends.append(Source(self.dut, "data", [(1 << len(self.dut.data__payload)) - 1 - n for n in range(beats)]))
        else:
            ends += [Sink(self.dut, f"{name}_data") for name in CLIENTS]
            ends += [Source(self.dut, f"{name}_request") for name in CLIENTS if f"{name}_request" != self.request]
            for sink in ends[2:4]:
                sink.check_stable = False
        if slave:
            kind = WriteSlave if self.write else ReadSlave
            ends.append(kind(self.dut, Folded(), self.beat_bytes, **slave))
        return ends

    async def run(self, ends, *, first, drain=14, **options):
        """Returns {port: [(cycle, word)]}."""
        inputs = {"stop": 0} | {name: options.pop(name) for name in ("memory_base", "memory_bytes")}
        if not any(isinstance(e, (WriteSlave, ReadSlave)) for e in ends):
            inputs |= self.silent
        await (start if first else reset)(self.dut, ends, **inputs)
        out = {}
        async for cycle, port, word in exchange(self.dut, ends, rng=np.random.default_rng(3), drain=drain, limit=3000,
                                                **options):
            out.setdefault(port, []).append((cycle, word))
        return out


class Folded:
    """A memory for every address: what differs by a multiple of its size is the same place."""

    def __init__(self):
        self.data = bytearray(RAM_BYTES)

    def __len__(self):
        return 1 << 41

    def __setitem__(self, at, value):
        self.data[at % RAM_BYTES] = value

    def __getitem__(self, at):
        begin = at.start % RAM_BYTES
        return self.data[begin:begin + at.stop - at.start]


def windows(config, rng):
    """(base, size of the window, request): each bit of each of them decides at least once."""
    beat, top = config.bus.data_bits // 8, config.bus.address_bits
    lowest = beat.bit_length() - 1
    for k in range(lowest, 41):
        for size in (1 << k, (1 << k) - beat, (1 << k) + beat, (1 << k) - 1):
            if not beat <= size <= 1 << 40:
                continue
            last = (size // beat - 1) * beat
            yield 0x1000, size, (last, 1)
            yield 0x1000, size, (last, 2)
            if last + beat < 1 << 40:
                yield 0x1000, size, (last + beat, 1)
    for k in range(lowest, 40):
        yield 0, 1 << 40, (1 << k, 3)
        yield 0, beat, (1 << k, 1)
        yield 0, 1 << 40, ((1 << k) - beat, 2)
    for k in range(12, 40):
        yield 1 << k, 1 << 40, (beat, 2)
        yield (1 << 40) - (1 << k), 1 << 40, (0, 1)
    for k in range(20):
        yield 0, 1 << 40, (0, 1 << k)
        yield 0, (beat << k) - beat, (0, 1 << k)
    for k in range(lowest):
        yield 0, 1 << 40, (64 + (1 << k), 1)
    for _ in range(40):
        size = int(rng.integers(beat, 1 << int(rng.integers(8, 40))))
        yield (int(rng.integers(0, 1 << top - 12)) << 12, size,
               (int(rng.integers(0, size + beat)) // beat * beat, int(rng.integers(1, 20))))


def expected(config, base, size, request, limit):
    """(bursts that go out, error) while memory answers nothing."""
    offset, beats = request
    beat = config.bus.data_bits // 8
    if offset % beat or not beats or offset + beats * beat > size:
        return [], error_word(Error.MEMORY_RANGE, offset)
    out = []
    for at, count in bursts_of(offset, min(beats, (limit + 2) * config.bus.burst_beats), config):
        if len(out) == limit:           # the next one is looked at, but has no place
            return out, error_word(Error.MEMORY_RANGE, at) if base + at >= 1 << config.bus.address_bits else 0
        if base + at >= 1 << config.bus.address_bits:
            return out, error_word(Error.MEMORY_RANGE, at)
        out.append((base + at, count))
    return out, 0


@cocotb.test(timeout_time=20, timeout_unit="ms")
async def any_window_and_base(dut):
    config, rng, side = config_of_run(), np.random.default_rng(cocotb.RANDOM_SEED), Side(dut)
    seen = set()
    for n, (base, size, request) in enumerate(windows(config, rng)):
        side = Side(dut, CLIENTS[n % 2])
        # The low bits of the base are documented to be ignored.
        out = await side.run(side.ends([request])[:2], first=n == 0, memory_base=base | int(rng.integers(4096)),
                             memory_bytes=size)
        bursts, error = expected(config, base, size, request, side.limit)
        got = [(w["addr"], w["len"] + 1) for _, w in out.get(side.channel, [])]
        assert (got, int(dut.error.value)) == (bursts, error), f"window {base:#x} {size:#x}, request {request}"
        seen.add((bool(bursts), bool(error)))
    assert seen >= {(True, False), (False, True)}, "both accepted and refused"


@cocotb.test(timeout_time=20, timeout_unit="ms")
async def error_address_anywhere(dut):
    """The offset of a burst that was answered with an error, each bit of offset and base."""
    config = config_of_run()
    beat, top = config.bus.data_bits // 8, config.bus.address_bits
    places = [(1 << k, 0x8000) for k in range(12, top - 1)] + [(0, 0)]
    places += [(0, 1 << k) for k in range(beat.bit_length() - 1, top)]
    places += [(1 << top - 1, 1 << k) for k in range(12, top - 2)]
    for n, (base, offset) in enumerate(places):
        side = Side(dut, CLIENTS[n % 2])
        fault = (lambda number: [(0, 2)]) if side.write else (lambda number, beats: [dict(b, resp=2) for b in beats])
        await side.run(side.ends([(offset, 1)], fault=fault), first=n == 0, memory_base=base, memory_bytes=1 << 40)
        assert int(dut.error.value) == error_word(Error.BUS_WRITE if side.write else Error.BUS_READ, offset), \
            f"base {base:#x}, offset {offset:#x}"


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def never_more_unanswered_than_configured(dut):
    """Data flow, answers do not come: the number of bursts stays at the limit."""
    side, config = Side(dut), config_of_run()
    requests = [(n * 4 * side.beat_bytes, 1) for n in range(3 * side.limit)]
    silence = (lambda number: []) if side.write else (lambda number, beats: [])
    ends = side.ends(requests, fault=silence)

    def give_up(cycle):
        if cycle == 150:
            for end in ends:
                if isinstance(end, Source):
                    end.words.clear()
                    end.offering = False

    out = await side.run(ends, first=True, memory_base=0, memory_bytes=1 << 20, on_cycle=give_up, drain=30)
    assert len(out[side.channel]) == side.limit and dut.idle.value == 0 and int(dut.error.value) == 0
    assert config.bus.burst_beats >= 1


@cocotb.test(timeout_time=5, timeout_unit="ms")
@cocotb.parametrize(client=list(CLIENTS), last=[1, 2, 3, 4])
async def requests_of_the_last_stopped_cycle_are_forgotten(dut, client, last):
    """Requests come without pause while ``stop`` falls: those taken before are gone, those after are carried out."""
    side, config = Side(dut, client), config_of_run()
    requests = [((n + 1) * 64 * side.beat_bytes, 2) for n in range(6)]
    ends = side.ends(requests, pause=0.0)
    source = ends[0]
    if side.write:                                  # beats only for what will be carried out
        ends[2].words.clear()

    def control(cycle):
        dut.stop.value = int(source.taken < last)
        if side.write and source.taken == last and not ends[2].words and not ends[2].taken:
            ends[2].words.extend(range(2 * (len(requests) - last)))

    out = await side.run(ends, first=True, memory_base=0, memory_bytes=1 << 20, on_cycle=control, drain=40)
    got = [(w["addr"], w["len"] + 1) for _, w in out[side.channel]]
    assert got == [b for r in requests[last:] for b in bursts_of(*r, config)]
    assert int(dut.error.value) == 0 and dut.idle.value == 1


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def answer_before_its_address_was_taken(dut):
    """Memory has taken a burst's data, but not yet its address, and answers: that is an error."""
    side = Side(dut)
    if not side.write:
        beat = [{"id": 0, "data": 1, "resp": 0, "last": 1}]
        ends = side.ends([(256, 1)], unsolicited={20: beat})
    else:
        ends = side.ends([(256, 1)], unsolicited={20: [(0, 0)]}, fault=lambda number: [])
    slave = ends[-1]
    slave.accept_addresses = False

    def control(cycle):
        slave.accept_addresses = cycle >= 40

    out = await side.run(ends, first=True, memory_base=0, memory_bytes=1 << 20, on_cycle=control, drain=40)
    assert int(dut.error.value) == error_word(Error.BUS_PROTOCOL, 256 if side.write else 0)
    assert "done" not in out
