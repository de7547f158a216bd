"""Unbounded proofs of hw/bus: what holds for every input, in every cycle, from reset on."""
from amaranth.hdl import Assert, Signal, Value
import pytest

from hw.bus.axi import PAGE_BYTES, RESP_SLVERR
from hw.bus.burst import BurstSplitter, RegisterSlice
from hw.bus.read import ReadMaster
from hw.bus.registers import LOCKED_WHILE_BUSY, RegisterFile, member_of
from hw.bus.write import WriteMaster
from sim_tests.formal.prove import Harness, run
from spec.config import load
from spec.registers import REGISTERS, Access

CONFIG = load("tiny")
WRITABLE = [member_of(r.name) for r in REGISTERS if r.access is Access.READ_WRITE]


class RegisterFileProof(Harness):
    """Stable answers; exactly one answer per access; nothing changes on a refusal, nor while it is locked."""

    def properties(self, m):
        dut, axi = self.dut, self.dut.s_axil
        self.stable(m, axi.bvalid, axi.bready, axi.bresp)
        self.stable(m, axi.rvalid, axi.rready, axi.rdata, axi.rresp)
        for channel, answer in (("aw", "b"), ("w", "b"), ("ar", "r")):
            valid, ready = (getattr(axi, f"{channel}{s}") for s in ("valid", "ready"))
            answer_valid, answer_ready = (getattr(axi, f"{answer}{s}") for s in ("valid", "ready"))
            owed = Signal(2, name=f"{channel}_owed")
            m.d.sync += owed.eq(owed + (valid & ready) - (answer_valid & answer_ready))
            m.d.comb += Assert(owed == ~ready + answer_valid)  # held, plus answered but not taken: never more
        answered = axi.bvalid & ~self.past(axi.bvalid)
        busy = self.past(dut.busy)
        for name in WRITABLE:
            value = getattr(dut, name)
            changed = self.started & (value != self.past(value))
            with m.If(changed):  # only by a write that was answered with OKAY
                m.d.comb += Assert(answered & (axi.bresp != RESP_SLVERR))
                if name in map(member_of, LOCKED_WHILE_BUSY):
                    m.d.comb += Assert(~busy)
        for bit, event in enumerate((dut.event_done, dut.event_error)):
            with m.If(self.started & self.past(event) & dut.value_irq_enable[bit]):
                m.d.comb += Assert(dut.irq)  # an event is never lost, whatever is written in its cycle
        with m.If(dut.start):
            m.d.comb += Assert(~dut.busy & ~dut.soft_reset & ~dut.value_status[2])


class SliceProof(Harness):
    """No word is lost, doubled or changed: the newest is at the output, or behind the one that stays there."""

    def properties(self, m):
        i, o = self.dut.i, self.dut.o
        self.stable(m, o.valid, o.ready, o.payload)
        level = Signal(range(4))
        m.d.sync += level.eq(level + (i.valid & i.ready) - (o.valid & o.ready))
        m.d.comb += Assert(level == ~i.ready + o.valid)
        newest = Signal.like(i.payload)  # what was taken last
        with m.If(i.valid & i.ready):
            m.d.sync += newest.eq(i.payload)
        with m.If(level == 1):
            m.d.comb += Assert(o.valid & (o.payload == newest))
        with m.If(level == 2):  # the first one is at the output since before; the newest waits behind it
            m.d.comb += Assert(o.valid & (self.dut.spare == newest))


class SplitterProof(Harness):
    """No burst leaves the memory window, crosses a page or is longer than allowed, for any request."""

    def properties(self, m):
        dut, bus = self.dut, CONFIG.bus
        beat_bytes, rest, burst = bus.data_bits // 8, self.dut.rest, self.dut.burst.p
        shift = beat_bytes.bit_length() - 1
        for value in (dut.memory_base, dut.memory_bytes):
            self.constant(m, value)
        self.stable(m, dut.burst.valid, dut.burst.ready, burst, unless=dut.drop)
        base = dut.memory_base[12:] << 12
        with m.If(dut.burst.valid & ~dut.drop):
            end = burst.address + (burst.length + 1) * beat_bytes
            m.d.comb += [
                Assert(burst.length < bus.burst_beats),
                Assert(burst.address % PAGE_BYTES + (burst.length + 1) * beat_bytes <= PAGE_BYTES),
                Assert(burst.address[:shift] == 0),
                Assert(burst.address >= base),
                Assert(end <= base + dut.memory_bytes)]
        # Invariants for the induction: what is left ends where the request ends, and after the first burst the
        # request has been checked.
        with m.If(rest.active & ~rest.misaligned):
            m.d.comb += Assert(rest.end == ((rest.beat + rest.left) << shift) + rest.low)
            m.d.comb += Assert(rest.low == 0)
        with m.If(rest.active & ~rest.first):
            m.d.comb += Assert(~rest.misaligned & (rest.end <= dut.memory_bytes))


def channel(axi, name, fields):
    return [getattr(axi, f"{name}{s}") for s in ("valid", "ready", *fields)]


class ReadProof(Harness):
    """The AR channel is stable; addresses stay within bursts and pages; outputs to clients exclude each other."""

    def properties(self, m):
        dut, axi = self.dut, self.dut.m_axi
        self.stable(m, *channel(axi, "ar", ("id", "addr", "len", "size", "burst", "lock", "cache", "prot")))
        page_rules(m, axi.arvalid, axi.araddr, axi.arlen)
        m.d.comb += Assert(~(dut.load_data.valid & dut.fetch_data.valid))
        no_new_after_stop(self, m, axi.arvalid, axi.arready)
        sticky_error(self, m)
        with m.If(dut.stop):
            m.d.comb += Assert(~dut.load_data.valid & ~dut.fetch_data.valid)
        with m.If(dut.idle):
            m.d.comb += Assert(~axi.arvalid)


class WriteProof(Harness):
    """The AW and W channels are stable; addresses stay within bursts and pages; no byte is enabled after a stop."""

    def properties(self, m):
        dut, axi = self.dut, self.dut.m_axi
        self.stable(m, *channel(axi, "aw", ("id", "addr", "len", "size", "burst", "lock", "cache", "prot")))
        self.stable(m, *channel(axi, "w", ("data", "strb", "last")))
        page_rules(m, axi.awvalid, axi.awaddr, axi.awlen)
        no_new_after_stop(self, m, axi.awvalid, axi.awready)
        sticky_error(self, m)
        fresh = ~self.past(axi.wvalid & ~axi.wready)
        with m.If(self.started & self.past(dut.stop) & fresh & axi.wvalid):
            m.d.comb += Assert(axi.wstrb == 0)
        with m.If(dut.idle):
            m.d.comb += Assert(~axi.awvalid & ~axi.wvalid)
        m.d.comb += Assert(axi.bready)


def page_rules(m, valid, address, length):
    beat_bytes = CONFIG.bus.data_bits // 8
    with m.If(valid):
        m.d.comb += [Assert(length < CONFIG.bus.burst_beats),
                     Assert(address % PAGE_BYTES + (length + 1) * beat_bytes <= PAGE_BYTES)]


def no_new_after_stop(proof, m, valid, ready):
    """After a cycle with ``stop`` an address is offered only if it was waiting before."""
    with m.If(proof.started & proof.past(proof.dut.stop) & ~proof.past(valid & ~ready)):
        m.d.comb += Assert(~valid)


def sticky_error(proof, m):
    error = proof.dut.error
    same = Value.cast(error) == proof.past(Value.cast(error))
    with m.If(proof.started & proof.past(error.valid)):
        m.d.comb += Assert(same)


PROOFS = {
    "register_file": lambda: RegisterFileProof(RegisterFile(config=CONFIG)),
    "slice": lambda: SliceProof(RegisterSlice(shape=8)),
    "splitter": lambda: SplitterProof(BurstSplitter(bus=CONFIG.bus)),
    "read_master": lambda: ReadProof(ReadMaster(config=CONFIG)),
    "write_master": lambda: WriteProof(WriteMaster(config=CONFIG)),
}


@pytest.mark.parametrize("name", PROOFS)
def test_holds_in_every_cycle(name, tmp_path):
    status, log = run(PROOFS[name](), tmp_path, depth=2)
    assert status == 0, log[-3000:]
    assert "successful proof by k-induction" in log, log[-3000:]


class DropsUnderStall(RegisterSlice):
    """Planted fault: takes a word although both registers are full."""

    def elaborate(self, platform):
        m = super().elaborate(platform)
        m.d.comb += self.i.ready.eq(1)
        return m


def test_a_planted_fault_is_refuted(tmp_path):
    status, log = run(SliceProof(DropsUnderStall(shape=8)), tmp_path, depth=6)
    assert status == 2 and "Assert failed" in log, log[-3000:]
