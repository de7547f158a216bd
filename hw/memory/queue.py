"""A small first-in first-out queue on streams."""
from amaranth.hdl import Module
from amaranth.lib import fifo, stream, wiring
from amaranth.lib.wiring import In, Out


class Queue(wiring.Component):
    """``depth`` items between two streams.

    Flow control: ``i.ready`` does not depend on ``o.ready`` in the same cycle, nor ``o.valid`` on ``i.valid``.
    Latency: 1 cycle at least. Throughput: one item per cycle.
    Parameters: shape (payload), depth (at least 2).
    Members: i, o (streams), level (items inside).
    """

    def __init__(self, *, shape, depth):
        if depth < 2:
            raise ValueError(f"Queue depth must be at least 2, not {depth!r}")
        self._shape, self._depth = shape, depth
        super().__init__({"i": In(stream.Signature(shape)), "o": Out(stream.Signature(shape)),
                          "level": Out(range(depth + 1))})

    def elaborate(self, platform):
        m = Module()
        raw = self.i.payload.as_value() if hasattr(self.i.payload, "as_value") else self.i.payload
        # the buffered one keeps a place for its output register: with two places it would refuse every second cycle
        kind = fifo.SyncFIFO if self._depth == 2 else fifo.SyncFIFOBuffered
        m.submodules.fifo = buffer = kind(width=len(raw), depth=self._depth)
        out = self.o.payload.as_value() if hasattr(self.o.payload, "as_value") else self.o.payload
        m.d.comb += [
            buffer.w_data.eq(raw), buffer.w_en.eq(self.i.valid), self.i.ready.eq(buffer.w_rdy),
            out.eq(buffer.r_data), self.o.valid.eq(buffer.r_rdy), buffer.r_en.eq(self.o.ready),
            self.level.eq(buffer.level)]
        return m
