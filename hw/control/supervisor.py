"""Run, error, reset: what the register port sees of the accelerator's life."""
from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from hw.layouts import error_layout
from spec.registers import Error


class Supervisor(wiring.Component):
    """Collects the first error, brings the bus to rest, reports it, and performs soft reset.

    * idle -> ``start`` -> busy -> ``done`` -> idle with STATUS.done.
    * The first error of any source (lowest first in one cycle) stops the bus masters: nothing new is issued, what was
      issued completes. When the bus is idle, or after another watchdog period if memory does not answer any more,
      STATUS.error is set and ``event_error`` raised. Only soft reset leaves this state.
    * Soft reset does the same and then holds ``core_reset`` for one cycle. Registers keep their values, counters too.
    * Watchdog: no ``progress`` for ``watchdog_cycles`` while busy is an error; 0 switches it off.

    Members: sources are ``error_<name>`` with name in `sources`.
    """

    def __init__(self, *, sources):
        self._sources = tuple(sources)
        super().__init__({
            **{f"error_{name}": In(error_layout()) for name in self._sources},
            "start": In(1), "soft_reset": In(1), "done": In(1), "progress": In(1), "bus_idle": In(1),
            "watchdog_cycles": In(32),
            "busy": Out(1), "status_done": Out(1), "status_error": Out(1), "resetting": Out(1),
            "event_done": Out(1), "event_error": Out(1), "stop": Out(1), "core_reset": Out(1), "begin": Out(1),
            "code": Out(8), "address": Out(40)})

    def elaborate(self, platform):
        m = Module()
        found = Signal(error_layout())
        for name in reversed(self._sources):        # the first of the list is assigned last, and wins
            source = getattr(self, f"error_{name}")
            with m.If(source.valid):
                m.d.comb += found.eq(source)

        quiet_cycles = Signal(32)
        expired = Signal()
        m.d.comb += expired.eq((self.watchdog_cycles != 0) & (quiet_cycles >= self.watchdog_cycles))
        m.d.sync += quiet_cycles.eq(Mux(self.progress, 0, quiet_cycles + 1))

        with m.FSM() as fsm:
            with m.State("IDLE"):
                with m.If(self.soft_reset):
                    m.d.sync += quiet_cycles.eq(0)
                    m.next = "QUIET"
                with m.Elif(self.start & ~self.status_error):
                    m.d.comb += self.begin.eq(1)
                    m.d.sync += [self.status_done.eq(0), quiet_cycles.eq(0)]
                    m.next = "RUN"
            with m.State("RUN"):
                with m.If(self.soft_reset):
                    m.d.sync += quiet_cycles.eq(0)
                    m.next = "QUIET"
                with m.Elif(found.valid | expired):
                    m.d.sync += [self.code.eq(Mux(found.valid, found.code, Error.WATCHDOG)),
                                 self.address.eq(Mux(found.valid, found.address, 0)), quiet_cycles.eq(0)]
                    m.next = "STOP"
                with m.Elif(self.done):
                    m.d.comb += self.event_done.eq(1)
                    m.d.sync += self.status_done.eq(1)
                    m.next = "IDLE"
            with m.State("STOP"):
                m.d.comb += self.stop.eq(1)
                with m.If(self.soft_reset):
                    m.d.sync += quiet_cycles.eq(0)
                    m.next = "QUIET"
                with m.Elif(self.bus_idle | expired):
                    m.d.comb += self.event_error.eq(1)
                    m.d.sync += self.status_error.eq(1)
                    m.next = "ERROR"
            with m.State("ERROR"):
                m.d.comb += self.stop.eq(1)
                with m.If(self.soft_reset):
                    m.d.sync += quiet_cycles.eq(0)
                    m.next = "QUIET"
            with m.State("QUIET"):
                m.d.comb += [self.stop.eq(1), self.resetting.eq(1)]
                with m.If(self.bus_idle | expired):
                    m.next = "RESET"
            with m.State("RESET"):
                m.d.comb += [self.core_reset.eq(1), self.resetting.eq(1)]
                m.d.sync += [self.status_error.eq(0), self.status_done.eq(0), self.code.eq(0), self.address.eq(0)]
                m.next = "IDLE"
        m.d.comb += self.busy.eq(fsm.ongoing("RUN") | fsm.ongoing("STOP"))
        return m
