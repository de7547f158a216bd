"""AXI4 memories that are as fast as the protocol allows, reorder between IDs, and break it on request.

They are ends for `sim_tests.lib.streams.exchange`, beside its sources and sinks. cocotbext-axi is the memory that
nobody here wrote; this one answers in the next cycle and can lie.
"""
from collections import deque


class _Slave:
    def __init__(self, dut, prefix, pause):
        self._dut, self._prefix, self.port, self.pause = dut, prefix, prefix, pause
        self.offered, self.cycle = False, 0

    def signal(self, name):
        return getattr(self._dut, f"{self._prefix}__{name}")


class ReadSlave(_Slave):
    """Answers reads.

    Args:
        memory: bytes-like; an address beyond it fails the test.
        beat_bytes: bytes per beat.
        pause: chance per cycle, on each channel, of not being ready or not offering.
        latency: cycles between AR and the first beat, at least 1.
        interleave: beats of different IDs are mixed at random.
        fault: function (number of the burst, list of beats) -> list of beats that are sent. A beat is a dict of
            ``id, data, resp, last``.
        unsolicited: {cycle: [beats]} sent although nobody asked.
    ``bursts`` lists what was asked: (id, address, beats).
    """

    def __init__(self, dut, memory, beat_bytes, *, prefix="m_axi", pause=0.0, latency=1, interleave=False, fault=None,
                 unsolicited=None):
        super().__init__(dut, prefix, pause)
        self.memory, self.beat_bytes, self.latency, self.interleave = memory, beat_bytes, latency, interleave
        self.fault, self.unsolicited = fault, unsolicited or {}
        self.bursts, self.waiting, self.current = [], deque(), None
        self.accept_addresses = True
        for name in ("arready", "rvalid", "rid", "rdata", "rresp", "rlast"):
            self.signal(name).value = 0

    def drive(self, rng):
        self.signal("arready").value = int(self.accept_addresses and rng.random() >= self.pause)
        if self.current is None and self.waiting and self.waiting[0][0] <= self.cycle and rng.random() >= self.pause:
            due = [n for n, (when, _) in enumerate(self.waiting) if when <= self.cycle]
            first = {}  # the oldest beat of each ID may go next
            for n in due:
                first.setdefault(self.waiting[n][1]["id"], n)
            at = first[sorted(first)[int(rng.integers(len(first)))]] if self.interleave else 0
            self.current = self.waiting[at][1]
            del self.waiting[at]
        self.signal("rvalid").value = int(self.current is not None)
        beat = self.current or {"id": int(rng.integers(2)), "data": 0xBAD, "resp": int(rng.integers(4)),
                                "last": int(rng.integers(2))}
        for name, value in beat.items():
            self.signal(f"r{name}").value = value

    def sample(self, cycle):
        """Bookkeeping of one cycle; yields nothing."""
        self.cycle = cycle + 1
        if self.signal("arvalid").value and self.signal("arready").value:
            number, address, count = (int(self.signal(n).value) for n in ("arid", "araddr", "arlen"))
            assert address + (count + 1) * self.beat_bytes <= len(self.memory), \
                f"read beyond the memory at {address:#x}"
            words = [bytes(self.memory[address + n * self.beat_bytes:address + (n + 1) * self.beat_bytes])
                     for n in range(count + 1)]
            beats = [{"id": number, "data": int.from_bytes(word, "little"), "resp": 0, "last": int(n == count)}
                     for n, word in enumerate(words)]
            if self.fault is not None:
                beats = self.fault(len(self.bursts), beats)
            self.bursts.append((number, address, count + 1))
            self.waiting.extend((cycle + self.latency, beat) for beat in beats)
        if self.current is not None and self.signal("rready").value:
            self.current = None
        self.waiting.extend((cycle, beat) for beat in self.unsolicited.get(cycle, ()))
        self.offered = self.current is not None or bool(self.waiting) or bool(self.signal("arvalid").value)


class WriteSlave(_Slave):
    """Takes writes into ``memory`` (a bytearray) and answers them in order.

    Args:
        fault: function (number of the burst) -> list of answers (id, resp); empty: never answered.
        unsolicited: {cycle: [(id, resp)]} sent although nothing is due.
        early: number of a burst that is answered with its address, before its data.
    ``bursts`` lists (address, beats); ``strobes`` the byte enables of every beat. Asserts that WLAST is right.
    """

    def __init__(self, dut, memory, beat_bytes, *, prefix="m_axi", pause=0.0, fault=None, unsolicited=None, early=None):
        super().__init__(dut, prefix, pause)
        self.memory, self.beat_bytes, self.fault = memory, beat_bytes, fault or (lambda number: [(0, 0)])
        self.unsolicited, self.early = unsolicited or {}, early
        self.bursts, self.strobes, self.beats, self.answers, self.current = [], [], deque(), deque(), None
        self.written = 0  # bursts whose data have come
        self.accept_addresses = self.accept_data = True
        for name in ("awready", "wready", "bvalid", "bid", "bresp"):
            self.signal(name).value = 0

    def drive(self, rng):
        self.signal("awready").value = int(self.accept_addresses and rng.random() >= self.pause)
        self.signal("wready").value = int(self.accept_data and rng.random() >= self.pause)
        if self.current is None and self.answers and rng.random() >= self.pause:
            self.current = self.answers.popleft()
        number, resp = self.current or (int(rng.integers(2)), int(rng.integers(4)))
        self.signal("bvalid").value = int(self.current is not None)
        self.signal("bid").value, self.signal("bresp").value = number, resp

    def sample(self, cycle):
        """Bookkeeping of one cycle; yields nothing."""
        if self.current is not None and self.signal("bready").value:
            self.current = None
        if self.signal("awvalid").value and self.signal("awready").value:
            address, count = (int(self.signal(n).value) for n in ("awaddr", "awlen"))
            assert address + (count + 1) * self.beat_bytes <= len(self.memory), \
                f"write beyond the memory at {address:#x}"
            if self.early == len(self.bursts):
                self.answers.extend(self.fault(len(self.bursts)))
            self.bursts.append((address, count + 1))
        if self.signal("wvalid").value and self.signal("wready").value:
            self.beats.append(tuple(int(self.signal(n).value) for n in ("wdata", "wstrb", "wlast")))
        while self.written < len(self.bursts) and len(self.beats) >= self.bursts[self.written][1]:
            address, count = self.bursts[self.written]
            for n in range(count):
                data, strobe, last = self.beats.popleft()
                assert last == (n == count - 1), f"WLAST wrong on beat {n} of {count}"
                self.strobes.append(strobe)
                for lane in range(self.beat_bytes):
                    if strobe >> lane & 1:
                        self.memory[address + n * self.beat_bytes + lane] = data >> 8 * lane & 255
            if self.early != self.written:
                self.answers.extend(self.fault(self.written))
            self.written += 1
        self.answers.extend(self.unsolicited.get(cycle, ()))
        self.offered = (self.current is not None or bool(self.answers)
                        or any(self.signal(n).value for n in ("awvalid", "wvalid")))
