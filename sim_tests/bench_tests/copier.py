"""The smallest accelerator with Summand's ports: copies a block of memory and adds one to each byte.

It exists so that the bench itself is tested by a design whose every cycle and byte is known.
"""

from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import Out, connect, flipped

from hw.bus.axi import BURST_INCR, lite_slave_signature, master_signature
from hw.bus.registers import RegisterFile


class Copier(wiring.Component):
    """``memory[program + k * beat .. ] = memory[k * beat ..] + 1`` for k < program_count, one beat per burst.

    Marks 1 when half (rounded down) is done and 2 at the end. ``trace.execute`` is 1 while reading, 3 while writing.
    A read or write response that is an error ends the run with ERROR_CODE 5 or 6.
    """

    def __init__(self, *, config, hold_write=True):
        self._config, self._hold_write = config, hold_write
        super().__init__(
            {
                "s_axil": Out(lite_slave_signature()),
                "m_axi": Out(master_signature(config.bus)),
                "irq": Out(1),
                "trace": Out(wiring.Signature({"execute": Out(3), "mark_valid": Out(1), "mark": Out(16)})),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.registers = registers = RegisterFile(config=self._config)
        connect(m, registers.s_axil, flipped(self.s_axil))
        m.d.comb += self.irq.eq(registers.irq)
        axi, beat_bytes = self.m_axi, self._config.bus.data_bits // 8
        busy, done, word = Signal(), Signal(32), Signal(self._config.bus.data_bits)
        error, cycles, reads, writes = Signal(8), Signal(32), Signal(32), Signal(32)
        base, offset = registers.value("MEMORY_BASE_LOW"), Signal(32)
        count = registers.value("PROGRAM_COUNT")
        m.d.comb += [
            offset.eq(done * beat_bytes),
            registers.busy.eq(busy),
            axi.awid.eq(0),
            axi.arid.eq(0),
            registers.value("STATUS").eq(Cat(busy, ~busy & (done != 0), error != 0)),
            registers.value("ERROR_CODE").eq(error),
            registers.value("CYCLES").eq(cycles),
            registers.value("READ_BEATS").eq(reads),
            registers.value("WRITE_BEATS").eq(writes),
            axi.araddr.eq(base + offset),
            axi.awaddr.eq(base + registers.value("PROGRAM_LOW") + offset),
            axi.wdata.eq(Cat((word[8 * n : 8 * n + 8] + 1)[:8] for n in range(beat_bytes))),
            axi.wstrb.eq(-1),
            axi.wlast.eq(1),
        ]
        for channel in ("ar", "aw"):
            m.d.comb += [
                getattr(axi, f"{channel}size").eq((beat_bytes - 1).bit_length()),
                getattr(axi, f"{channel}burst").eq(BURST_INCR),
            ]
        with m.If(busy):
            m.d.sync += cycles.eq(cycles + 1)
        sent_aw, sent_w = Signal(), Signal()
        m.d.sync += [registers.event_done.eq(0), registers.event_error.eq(0), self.trace.mark_valid.eq(0)]
        with m.FSM():
            with m.State("IDLE"), m.If(registers.start):
                m.d.sync += [busy.eq(1), done.eq(0), cycles.eq(0)]
                m.next = "ADDRESS"
            with m.State("ADDRESS"):
                m.d.comb += [axi.arvalid.eq(1), self.trace.execute.eq(1)]
                with m.If(axi.arready):
                    m.next = "DATA"
            with m.State("DATA"):
                m.d.comb += [axi.rready.eq(1), self.trace.execute.eq(1)]
                m.d.sync += [sent_aw.eq(0), sent_w.eq(0)]
                with m.If(axi.rvalid):
                    m.d.sync += [word.eq(axi.rdata), reads.eq(reads + 1)]
                    m.next = "WRITE"
                    with m.If(axi.rresp != 0):
                        m.d.sync += error.eq(5)
                        m.next = "END"
            with m.State("WRITE"):
                # With hold_write off, W is offered in every other cycle only: a fault that the bench must see.
                blink = Signal()
                m.d.sync += blink.eq(~blink)
                m.d.comb += [
                    self.trace.execute.eq(3),
                    axi.awvalid.eq(~sent_aw),
                    axi.wvalid.eq(~sent_w & (1 if self._hold_write else blink)),
                ]
                with m.If(axi.awvalid & axi.awready):
                    m.d.sync += sent_aw.eq(1)
                with m.If(axi.wvalid & axi.wready):
                    m.d.sync += [sent_w.eq(1), writes.eq(writes + 1)]
                m.d.comb += axi.bready.eq(1)
                with m.If(axi.bvalid):
                    m.d.sync += done.eq(done + 1)
                    m.next = "ADDRESS"
                    with m.If(done + 1 == count >> 1):
                        m.d.sync += [self.trace.mark_valid.eq(1), self.trace.mark.eq(1)]
                    with m.If(done + 1 == count):
                        m.d.sync += [self.trace.mark_valid.eq(1), self.trace.mark.eq(2)]
                        m.next = "END"
                    with m.If(axi.bresp != 0):
                        m.d.sync += error.eq(6)
                        m.next = "END"
            with m.State("END"):
                m.d.sync += [busy.eq(0), registers.event_done.eq(error == 0), registers.event_error.eq(error != 0)]
                m.next = "IDLE"
        return m
