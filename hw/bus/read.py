"""AXI4 read DMA with two clients."""
from amaranth.hdl import Array, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from hw.bus.axi import BURST_INCR, CACHE_NORMAL, RESP_OKAY, read_signature
from hw.bus.burst import OFFSET_BITS, SIZE_BITS, BurstSplitter, RegisterSlice, request_layout
from hw.layouts import error_layout
from spec.config import Config
from spec.registers import Error

#: Clients; the position is the ARID.
CLIENTS = ("load", "fetch")


class ReadMaster(wiring.Component):
    """Reads memory for two clients: data for the load unit, instructions for the fetch unit.

    Each client's data arrive in the order of its requests, one transfer per beat. Bus address = memory_base + offset.

    Flow control: several requests of a client may be in flight; a burst is issued every cycle if the bus takes it, up
        to ``bus.outstanding_reads`` in flight, fetch first. One R beat per cycle. All AXI outputs are registers or
        follow from registers. The clients share one R channel: each must request only what it can take without the
        other one's progress, or both may wait for each other.
    Latency: 2 cycles from a request to ARVALID, `data_latency` from an R transfer to the client's ``data.valid``.
    Errors (``error``, the first one stays until reset; it acts like ``stop``):
        MEMORY_RANGE: the request leaves the window, is misaligned or has no beats (nothing of it is issued);
        BUS_READ: RRESP is not OKAY; address = the burst's offset;
        BUS_PROTOCOL: RLAST early or late (address = the burst's offset), or a beat of an ID with nothing outstanding
        (address 0). A beat that is wrong in any way never reaches a client.
    ``stop``: no further AR (one that is asserted stays until taken), requests are swallowed and forgotten, R beats
        are taken and dropped; an offer to a client may be withdrawn. After a BUS_PROTOCOL error ``idle`` is the best
        knowledge: a burst ends with RLAST or with its last expected beat, whichever is first, and stays open if its
        RLAST came with the wrong ID.
    Parameters: config (`spec.config.Config`).
    Members:
        load_request, fetch_request: In(stream of `hw.bus.burst.request_layout`).
        load_data, fetch_data: Out(stream of ``data_bits``).
        m_axi: Out(AXI4 read channels).
        memory_base: In(40), bytes, multiple of 4096; memory_bytes: In(41); both constant while not idle.
        stop: In(1); idle: Out(1), no request, no AR, no outstanding beat.
        beat: Out(1), pulse for each R beat transferred; error: Out(`hw.layouts.error_layout`).
    """

    #: Cycles from an R transfer to ``data.valid``.
    data_latency = RegisterSlice.latency

    def __init__(self, *, config):
        if not isinstance(config, Config):
            raise TypeError(f"Configuration must be a Config, not {config!r}")
        self._bus = bus = config.bus
        members = {}
        for name in CLIENTS:
            members[f"{name}_request"] = In(stream.Signature(request_layout()))
            members[f"{name}_data"] = Out(stream.Signature(bus.data_bits))
        super().__init__({
            **members, "m_axi": Out(read_signature(bus)), "memory_base": In(OFFSET_BITS), "memory_bytes": In(SIZE_BITS),
            "stop": In(1), "idle": Out(1), "beat": Out(1), "error": Out(error_layout())})

    def elaborate(self, platform):
        m = Module()
        bus, axi = self._bus, self.m_axi
        shift = (bus.data_bits // 8).bit_length() - 1
        halt = Signal()
        m.d.comb += halt.eq(self.stop | self.error.valid)

        # --- requests to bursts ---
        splitters = []
        for name in CLIENTS:
            m.submodules[f"split_{name}"] = splitter = BurstSplitter(bus=bus)
            wiring.connect(m, splitter.request, wiring.flipped(getattr(self, f"{name}_request")))
            m.d.comb += [splitter.memory_base.eq(self.memory_base), splitter.memory_bytes.eq(self.memory_bytes),
                         splitter.drop.eq(halt)]
            splitters.append(splitter)
        load, fetch = splitters

        # --- AR: one register; fetch has priority ---
        outstanding = Signal(range(bus.outstanding_reads + 1))  # bursts in the AR register or on their way
        issue, finish = Signal(), Signal()
        slot = Signal()
        chosen = Signal.like(load.burst.p)
        m.d.comb += [
            chosen.eq(Mux(fetch.burst.valid, fetch.burst.p, load.burst.p)),
            slot.eq((~axi.arvalid | axi.arready) & (outstanding != bus.outstanding_reads)),
            fetch.burst.ready.eq(slot), load.burst.ready.eq(slot & ~fetch.burst.valid),
            issue.eq(slot & (fetch.burst.valid | load.burst.valid)),
            axi.arsize.eq(shift), axi.arburst.eq(BURST_INCR), axi.arcache.eq(CACHE_NORMAL)]
        with m.If(~axi.arvalid | axi.arready):
            m.d.sync += axi.arvalid.eq(issue)
        with m.If(issue):
            m.d.sync += [axi.arid.eq(fetch.burst.valid), axi.araddr.eq(chosen.address), axi.arlen.eq(chosen.length)]
        m.d.sync += outstanding.eq(outstanding + issue - finish)

        # --- what is expected, per ID in order; entered with the AR handshake, so that a beat before it is an error ---
        expected_layout = data.StructLayout({"length": 8, "beat_address": bus.address_bits - shift})
        depth = max(2, bus.outstanding_reads)  # a queue of one would have pointers without bits, which Verilog lacks
        queues, heads = [], []
        for number, name in enumerate(CLIENTS):
            m.submodules[f"expect_{name}"] = queue = SyncFIFO(width=expected_layout.size, depth=depth)
            entry = Signal(expected_layout, name=f"entry_{name}")
            m.d.comb += [entry.length.eq(axi.arlen), entry.beat_address.eq(axi.araddr[shift:]),
                         queue.w_data.eq(entry), queue.w_en.eq(axi.arvalid & axi.arready & (axi.arid == number))]
            queues.append(queue)
            head = Signal(expected_layout, name=f"head_{name}")
            m.d.comb += head.eq(queue.r_data)
            heads.append(head)

        # --- R ---
        beat_layout = data.StructLayout({"id": 1, "data": bus.data_bits, "resp": 2, "last": 1})
        m.submodules.slice = r_slice = RegisterSlice(shape=beat_layout)
        m.d.comb += [r_slice.i.p.id.eq(axi.rid), r_slice.i.p.data.eq(axi.rdata), r_slice.i.p.resp.eq(axi.rresp),
                     r_slice.i.p.last.eq(axi.rlast), r_slice.i.valid.eq(axi.rvalid), axi.rready.eq(r_slice.i.ready),
                     self.beat.eq(axi.rvalid & axi.rready)]
        beat = r_slice.o.p
        counts = Array(Signal(8, name=f"count_{name}") for name in CLIENTS)  # beats of the head burst so far
        known, length, address = Signal(), Signal(8), Signal(bus.address_bits)
        at_end, wrong_last, good, take = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            known.eq(Array(q.r_rdy for q in queues)[beat.id]),
            length.eq(Mux(beat.id, heads[1].length, heads[0].length)),
            address.eq(Mux(beat.id, heads[1].beat_address, heads[0].beat_address) << shift),
            at_end.eq(counts[beat.id] == length),
            wrong_last.eq(~known | (beat.last != at_end)),
            good.eq(~wrong_last & (beat.resp == RESP_OKAY) & ~halt),
            r_slice.o.ready.eq(~good | Array(getattr(self, f"{n}_data").ready for n in CLIENTS)[beat.id]),
            take.eq(r_slice.o.valid & r_slice.o.ready),
            finish.eq(take & known & (at_end | beat.last))]
        for number, name in enumerate(CLIENTS):
            out = getattr(self, f"{name}_data")
            m.d.comb += [out.payload.eq(beat.data), out.valid.eq(r_slice.o.valid & good & (beat.id == number)),
                         queues[number].r_en.eq(finish & (beat.id == number))]
        with m.If(take & known):
            m.d.sync += counts[beat.id].eq(Mux(finish, 0, counts[beat.id] + 1))

        # --- errors: the oldest cause first ---
        with m.If(~self.error.valid):
            with m.If(take & wrong_last):
                m.d.sync += [self.error.valid.eq(1), self.error.code.eq(Error.BUS_PROTOCOL),
                             self.error.address.eq(Mux(known, address - (self.memory_base[12:] << 12), 0))]
            with m.Elif(take & (beat.resp != RESP_OKAY)):
                m.d.sync += [self.error.valid.eq(1), self.error.code.eq(Error.BUS_READ),
                             self.error.address.eq(address - (self.memory_base[12:] << 12))]
            with m.Elif(fetch.range_error | load.range_error):
                m.d.sync += [self.error.valid.eq(1), self.error.code.eq(Error.MEMORY_RANGE),
                             self.error.address.eq(Mux(fetch.range_error, fetch.range_offset, load.range_offset))]
        m.d.comb += self.idle.eq(~axi.arvalid & (outstanding == 0) & ~r_slice.o.valid & ~load.busy & ~fetch.busy)
        return m
