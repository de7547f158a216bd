"""What both DMA masters share: requests, errors, the split into bursts, and a register slice."""
from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.bus.axi import PAGE_BYTES
from spec.config import BusConfig

#: Bits of an offset into the accelerator's memory window, and of a size of the window (2**40 included).
OFFSET_BITS, SIZE_BITS = 40, 41
#: Bits of the number of beats of one request.
BEATS_BITS = 20


def request_layout():
    """A transfer: ``offset`` in bytes, a multiple of the beat; ``beats`` >= 1."""
    return data.StructLayout({"offset": OFFSET_BITS, "beats": BEATS_BITS})


class RegisterSlice(wiring.Component):
    """Two registers that cut every combinational path of a stream. Latency 1, one word per cycle.

    Parameters: shape of the payload. Members: i, In(stream); o, Out(stream).
    """

    #: Cycles from a transfer on ``i`` to ``o.valid``.
    latency = 1

    def __init__(self, *, shape):
        super().__init__({"i": In(stream.Signature(shape)), "o": Out(stream.Signature(shape))})
        #: The second word held; an attribute for the proof in sim_tests/formal/.
        self.spare = Signal.like(self.i.payload)

    def elaborate(self, platform):
        m = Module()
        spare_valid, spare = Signal(), self.spare
        m.d.comb += self.i.ready.eq(~spare_valid)
        with m.If(self.o.ready | ~self.o.valid):
            m.d.sync += [self.o.valid.eq(spare_valid | self.i.valid), spare_valid.eq(0),
                         self.o.payload.eq(Mux(spare_valid, spare, self.i.payload))]
        with m.Elif(self.i.valid & self.i.ready):
            m.d.sync += [spare_valid.eq(1), spare.eq(self.i.payload)]
        return m


class BurstSplitter(wiring.Component):
    """Checks a request against the memory window and splits it into bursts.

    A burst has at most ``bus.burst_beats`` beats and crosses no 4 KiB boundary; it is the longest such piece.
    Before the first burst: ``offset + beats * beat_bytes <= memory_bytes``, ``offset`` aligned, ``beats`` > 0;
    otherwise nothing of the request is issued and ``range_error`` pulses. A burst whose bus address would pass the
    end of the address bus is refused the same way (with the burst's offset).

    Flow control: a request is taken when the one before has no burst left; one burst per cycle, also across requests.
    Latency: 1 cycle from a request to its first burst.
    Parameters: bus (`spec.config.BusConfig`).
    Members:
        request: In(stream of `request_layout`).
        burst: Out(stream): ``address`` on the bus, ``length`` = beats - 1, ``final`` on the request's last burst.
        memory_base, memory_bytes: In, constant during a request; the low 12 bits of the base are ignored.
        drop: In(1), throws away the present request and swallows new ones.
        busy: Out(1), a request is held.
        range_error: Out(1) pulse; range_offset: Out(40).
    """

    def __init__(self, *, bus):
        if not isinstance(bus, BusConfig):
            raise TypeError(f"Bus configuration must be a BusConfig, not {bus!r}")
        self._bus = bus
        super().__init__({
            "request": In(stream.Signature(request_layout())),
            "burst": Out(stream.Signature(data.StructLayout({"address": bus.address_bits, "length": 8, "final": 1}))),
            "memory_base": In(OFFSET_BITS), "memory_bytes": In(SIZE_BITS), "drop": In(1), "busy": Out(1),
            "range_error": Out(1), "range_offset": Out(OFFSET_BITS)})
        shift = (bus.data_bits // 8).bit_length() - 1
        #: What is left of the present request; only the proofs in sim_tests/formal/ look at it from outside.
        self.rest = Signal(data.StructLayout({
            "active": 1, "first": 1, "misaligned": 1, "low": shift,  # low: kept only to report a misaligned offset
            "beat": OFFSET_BITS - shift, "left": BEATS_BITS, "end": SIZE_BITS}))

    def elaborate(self, platform):
        m = Module()
        bus, request, burst = self._bus, self.request.p, self.burst.p
        beat_bytes = bus.data_bits // 8
        shift = beat_bytes.bit_length() - 1
        page_beats = PAGE_BYTES // beat_bytes

        rest = self.rest
        beat, left = rest.beat, rest.left

        # The sum is registered and compared one cycle later: one carry chain per cycle.
        total = Signal(OFFSET_BITS + 1)
        beyond = Signal()
        m.d.comb += [total.eq((self.memory_base[12:] << 12) + (beat << shift)),
                     beyond.eq(total[bus.address_bits:].any())]
        bad = Signal()
        m.d.comb += bad.eq(rest.active & ~self.drop & (
            beyond | (left == 0) | rest.first & (rest.misaligned | (rest.end > self.memory_bytes))))

        room = Signal(range(page_beats + 1))
        longest = Signal(range(bus.burst_beats + 1))
        final = Signal()
        m.d.comb += [
            room.eq(page_beats - beat[:page_beats.bit_length() - 1]),
            longest.eq(Mux(room < bus.burst_beats, room, bus.burst_beats)),
            final.eq(left <= longest),
            self.burst.valid.eq(rest.active & ~self.drop & ~bad),
            burst.address.eq(total),
            burst.length.eq(Mux(final, left, longest) - 1),
            burst.final.eq(final),
            self.request.ready.eq(self.drop | ~rest.active | (self.burst.valid & self.burst.ready & final)),
            self.busy.eq(rest.active), self.range_error.eq(bad), self.range_offset.eq(Cat(rest.low, beat))]

        with m.If(self.burst.valid & self.burst.ready):
            m.d.sync += [beat.eq(beat + longest), left.eq(left - longest), rest.first.eq(0)]
        with m.If(bad | self.drop):
            m.d.sync += rest.active.eq(0)
        with m.Elif(self.request.ready):
            m.d.sync += [rest.active.eq(self.request.valid), rest.first.eq(1), Cat(rest.low, beat).eq(request.offset),
                         rest.misaligned.eq(request.offset[:shift].any()), left.eq(request.beats),
                         rest.end.eq(request.offset + (request.beats << shift))]
        return m
