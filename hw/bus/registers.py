"""The register file behind the AXI4-Lite port, built from the table in `spec.registers`."""
from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from hw.bus.axi import RESP_OKAY, RESP_SLVERR, lite_slave_signature
from spec.config import Config
from spec.registers import BY_NAME, INTERFACE_VERSION, MAGIC, REGISTERS, Access

#: Registers that describe the running program: not writable while busy.
LOCKED_WHILE_BUSY = tuple(r.name for r in REGISTERS
                          if r.access is Access.READ_WRITE and r.name != "IRQ_ENABLE")


def member_of(name):
    """Name of the component member that carries register ``name``: ``MEMORY_BASE_LOW`` -> value_memory_base_low."""
    return f"value_{name.lower()}"


class RegisterFile(wiring.Component):
    """AXI4-Lite slave with 32-bit registers.

    Answers SLVERR, without effect, to: a misaligned address, a hole, an address beyond the window, a write to a
    read-only register, a write to one of `LOCKED_WHILE_BUSY` while ``busy``. Byte enables are honoured (a write with
    none answers OKAY and changes nothing); bits beyond a register's width are ignored and read 0.

    Flow control: one access each way at a time; AW and W in any order. All outputs are registers or follow from
        registers. A write acts 1 cycle after the later of AW and W was taken, a read samples 1 cycle after AR.
    Parameters: config (`spec.config.Config`): the digest and the default of the watchdog.
    Members:
        s_axil: the port.
        value_<name>: In for read-only registers (except the constants ID, VERSION, DIGEST_*), Out for read-write ones;
            `value` finds it by the register's name.
        busy: In(1). start: Out(1) pulse, suppressed while busy, or while STATUS shows an error or a soft reset, or
            when the same write asks for a soft reset. soft_reset: Out(1) pulse.
        event_done, event_error: In(1) pulses, set the bits of IRQ_STATUS (and win over a clearing write).
        irq: Out(1), level.
    """

    def __init__(self, *, config):
        if not isinstance(config, Config):
            raise TypeError(f"Configuration must be a Config, not {config!r}")
        digest = int(config.digest, 16)
        self._constants = {"ID": MAGIC, "VERSION": INTERFACE_VERSION, "DIGEST_LOW": digest & 0xFFFF_FFFF,
                           "DIGEST_HIGH": digest >> 32}
        members = {}
        for r in REGISTERS:
            if r.access is Access.READ_ONLY and r.name not in self._constants:
                members[member_of(r.name)] = In(r.bits)
            elif r.access is Access.READ_WRITE:
                init = config.control.watchdog_cycles if r.name == "WATCHDOG_CYCLES" else 0
                members[member_of(r.name)] = Out(r.bits, init=init)
        super().__init__({
            **members, "s_axil": Out(lite_slave_signature()), "busy": In(1), "start": Out(1), "soft_reset": Out(1),
            "event_done": In(1), "event_error": In(1), "irq": Out(1)})

    def value(self, name):
        """The member of register ``name`` of `spec.registers`. Raises KeyError for one that has none."""
        if member_of(name) not in self.signature.members:
            raise KeyError(f"Register must have a value member, not {name!r}")
        return getattr(self, member_of(name))

    def elaborate(self, platform):
        m = Module()
        axi = self.s_axil
        irq_status = Signal(BY_NAME["IRQ_STATUS"].bits)

        # --- write: hold the address and the data, then act once ---
        address_held, data_held = Signal(), Signal()
        address, word, strobes = Signal.like(axi.awaddr), Signal(32), Signal(4)
        act = Signal()
        m.d.comb += [axi.awready.eq(~address_held), axi.wready.eq(~data_held),
                     act.eq(address_held & data_held & ~axi.bvalid)]
        with m.If(axi.awvalid & axi.awready):
            m.d.sync += [address_held.eq(1), address.eq(axi.awaddr)]
        with m.If(axi.wvalid & axi.wready):
            m.d.sync += [data_held.eq(1), word.eq(axi.wdata), strobes.eq(axi.wstrb)]
        with m.If(axi.bvalid & axi.bready):
            m.d.sync += axi.bvalid.eq(0)

        mask = Signal(32)
        m.d.comb += mask.eq(Cat(s.replicate(8) for s in strobes))
        refused = Signal(init=1)
        cleared = Signal.like(irq_status)
        with m.Switch(address):
            for r in REGISTERS:
                if r.access is Access.READ_ONLY:
                    continue
                with m.Case(r.offset):
                    allowed = ~self.busy if r.name in LOCKED_WHILE_BUSY else 1
                    m.d.comb += refused.eq(~allowed if r.name in LOCKED_WHILE_BUSY else 0)
                    if r.access is Access.READ_WRITE:
                        value = self.value(r.name)
                        with m.If(act & allowed):
                            m.d.sync += value.eq((value & ~mask) | (word & mask))
                    elif r.access is Access.CLEAR:
                        m.d.comb += cleared.eq(Mux(act, word & mask, 0))
                    else:
                        status, asked = self.value("STATUS"), word & mask
                        blocked = self.busy | status[2] | status[3] | asked[1]
                        m.d.comb += [self.start.eq(act & asked[0] & ~blocked), self.soft_reset.eq(act & asked[1])]
        with m.If(act):
            m.d.sync += [address_held.eq(0), data_held.eq(0), axi.bvalid.eq(1),
                         axi.bresp.eq(Mux(refused, RESP_SLVERR, RESP_OKAY))]
        m.d.sync += irq_status.eq((irq_status & ~cleared) | Cat(self.event_done, self.event_error))
        m.d.comb += self.irq.eq((irq_status & self.value("IRQ_ENABLE")).any())

        # --- read ---
        read_held, read_address = Signal(), Signal.like(axi.araddr)
        m.d.comb += axi.arready.eq(~read_held)
        with m.If(axi.arvalid & axi.arready):
            m.d.sync += [read_held.eq(1), read_address.eq(axi.araddr)]
        with m.If(axi.rvalid & axi.rready):
            m.d.sync += axi.rvalid.eq(0)
        answer, missing = Signal(32), Signal(init=1)
        with m.Switch(read_address):
            for r in REGISTERS:
                with m.Case(r.offset):
                    m.d.comb += missing.eq(0)
                    if r.name in self._constants:
                        m.d.comb += answer.eq(self._constants[r.name])
                    elif r.access is Access.CLEAR:
                        m.d.comb += answer.eq(irq_status)
                    elif r.access is not Access.TRIGGER:
                        m.d.comb += answer.eq(self.value(r.name))
        with m.If(read_held & ~axi.rvalid):
            m.d.sync += [read_held.eq(0), axi.rvalid.eq(1), axi.rdata.eq(answer),
                         axi.rresp.eq(Mux(missing, RESP_SLVERR, RESP_OKAY))]
        return m
