"""AXI4 write DMA."""
from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from hw.bus.axi import BURST_INCR, CACHE_NORMAL, RESP_OKAY, write_signature
from hw.bus.burst import OFFSET_BITS, SIZE_BITS, BurstSplitter, request_layout
from hw.layouts import error_layout
from spec.config import Config
from spec.registers import Error


def write_data_layout(bus):
    """One beat: ``data`` and its byte enables ``strb``."""
    return data.StructLayout({"data": bus.data_bits, "strb": bus.data_bits // 8})


class WriteMaster(wiring.Component):
    """Writes memory: a stream of requests and a stream with their beats, in the same order.

    Bus address = memory_base + offset. The address of a burst may run ahead of its data.

    Flow control: one AW per cycle and one W beat per cycle, also across bursts and requests, up to
        ``bus.outstanding_writes`` unacknowledged bursts. All AXI outputs are registers or constants. Beats are taken
        only once the burst they belong to has been issued.
    Latency: 2 cycles from a request to AWVALID, 1 from a beat of an issued burst to WVALID, 1 from B to ``done``.
    Errors (``error``, the first one stays until reset; it acts like ``stop``):
        MEMORY_RANGE: the request leaves the window, is misaligned or has no beats (nothing of it is issued);
        BUS_WRITE: BRESP is not OKAY; address = the burst's offset;
        BUS_PROTOCOL: a B that is not due (address 0), before the burst's AW and last W were taken, or with a wrong ID
        (address = the offset of the oldest burst).
    ``stop``: no further AW (one that is asserted stays until taken), requests and data are swallowed and forgotten;
        the beats still owed to issued bursts are sent with no byte enabled, so the bus does not hang; no ``done``.
    Parameters: config (`spec.config.Config`).
    Members:
        request: In(stream of `hw.bus.burst.request_layout`); data: In(stream of `write_data_layout`).
        m_axi: Out(AXI4 write channels).
        memory_base: In(40), bytes, multiple of 4096; memory_bytes: In(41); both constant while not idle.
        stop: In(1); idle: Out(1), no request, nothing owed, nothing unacknowledged.
        done: Out(1), pulse for each request whose bursts were all acknowledged with OKAY, in order.
        beat: Out(1), pulse for each W beat transferred; error: Out(`hw.layouts.error_layout`).
    """

    def __init__(self, *, config):
        if not isinstance(config, Config):
            raise TypeError(f"Configuration must be a Config, not {config!r}")
        self._bus = bus = config.bus
        super().__init__({
            "request": In(stream.Signature(request_layout())), "data": In(stream.Signature(write_data_layout(bus))),
            "m_axi": Out(write_signature(bus)), "memory_base": In(OFFSET_BITS), "memory_bytes": In(SIZE_BITS),
            "stop": In(1), "idle": Out(1), "done": Out(1), "beat": Out(1), "error": Out(error_layout())})

    def elaborate(self, platform):
        m = Module()
        bus, axi = self._bus, self.m_axi
        shift = (bus.data_bits // 8).bit_length() - 1
        halt = Signal()
        m.d.comb += halt.eq(self.stop | self.error.valid)

        m.submodules.split = split = BurstSplitter(bus=bus)
        wiring.connect(m, split.request, wiring.flipped(self.request))
        m.d.comb += [split.memory_base.eq(self.memory_base), split.memory_bytes.eq(self.memory_bytes),
                     split.drop.eq(halt)]

        # Two queues per issued burst: the beats it still needs, and what its acknowledgement means.
        pending_layout = data.StructLayout({"final": 1, "beat_address": bus.address_bits - shift})
        depth = max(2, bus.outstanding_writes)  # a queue of one would have pointers without bits, which Verilog lacks
        m.submodules.lengths = lengths = SyncFIFO(width=8, depth=depth)
        m.submodules.pending = pending = SyncFIFO(width=pending_layout.size, depth=depth)
        entry, head = Signal(pending_layout), Signal(pending_layout)

        # --- AW ---
        issue = Signal()
        m.d.comb += [
            split.burst.ready.eq((~axi.awvalid | axi.awready) & (pending.level != bus.outstanding_writes)),
            issue.eq(split.burst.valid & split.burst.ready),
            entry.final.eq(split.burst.p.final), entry.beat_address.eq(split.burst.p.address[shift:]),
            pending.w_data.eq(entry), pending.w_en.eq(issue),
            lengths.w_data.eq(split.burst.p.length), lengths.w_en.eq(issue),
            axi.awsize.eq(shift), axi.awburst.eq(BURST_INCR), axi.awcache.eq(CACHE_NORMAL)]
        with m.If(~axi.awvalid | axi.awready):
            m.d.sync += axi.awvalid.eq(issue)
        with m.If(issue):
            m.d.sync += [axi.awaddr.eq(split.burst.p.address), axi.awlen.eq(split.burst.p.length)]

        # --- W ---
        count = Signal(8)  # beats of the head burst so far
        free, send, last = Signal(), Signal(), Signal()
        m.d.comb += [
            free.eq(~axi.wvalid | axi.wready),
            send.eq(free & lengths.r_rdy & (halt | self.data.valid)),
            last.eq(count == lengths.r_data), lengths.r_en.eq(send & last),
            self.data.ready.eq(halt | (free & lengths.r_rdy)),
            self.beat.eq(axi.wvalid & axi.wready)]
        with m.If(free):
            m.d.sync += axi.wvalid.eq(send)
        with m.If(send):
            m.d.sync += [axi.wdata.eq(self.data.p.data), axi.wstrb.eq(Mux(halt, 0, self.data.p.strb)),
                         axi.wlast.eq(last), count.eq(Mux(last, 0, count + 1))]

        # --- B: due once the address and the last beat have been taken ---
        addresses, bodies = (Signal(range(bus.outstanding_writes + 1), name=n) for n in ("addresses", "bodies"))
        acknowledged, due, good = Signal(), Signal(), Signal()
        m.d.comb += [
            axi.bready.eq(1), head.eq(pending.r_data),
            acknowledged.eq(axi.bvalid & pending.r_rdy), pending.r_en.eq(acknowledged),
            due.eq((addresses != 0) & (bodies != 0) & (axi.bid == 0)),
            good.eq(acknowledged & due & (axi.bresp == RESP_OKAY))]
        for counter, taken in ((addresses, axi.awvalid & axi.awready), (bodies, axi.wvalid & axi.wready & axi.wlast)):
            m.d.sync += counter.eq(counter + taken - (acknowledged & (counter != 0)))
        m.d.sync += self.done.eq(good & head.final & ~halt)

        with m.If(~self.error.valid):
            burst_offset = (head.beat_address << shift) - (self.memory_base[12:] << 12)
            with m.If(axi.bvalid & ~(pending.r_rdy & due)):
                m.d.sync += [self.error.valid.eq(1), self.error.code.eq(Error.BUS_PROTOCOL),
                             self.error.address.eq(Mux(pending.r_rdy, burst_offset, 0))]
            with m.Elif(acknowledged & (axi.bresp != RESP_OKAY)):
                m.d.sync += [self.error.valid.eq(1), self.error.code.eq(Error.BUS_WRITE),
                             self.error.address.eq(burst_offset)]
            with m.Elif(split.range_error):
                m.d.sync += [self.error.valid.eq(1), self.error.code.eq(Error.MEMORY_RANGE),
                             self.error.address.eq(split.range_offset)]
        m.d.comb += self.idle.eq(~axi.awvalid & ~axi.wvalid & ~lengths.r_rdy & ~pending.r_rdy & ~split.busy)
        return m
