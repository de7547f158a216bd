"""Checked connections: plain ``wiring.connect`` accepts any two streams of equal width."""


def connect_stream(m, source, sink):
    """Connect an output stream to an input stream of another component; payload layouts must be equal.

    Raises: TypeError if the layouts differ, even where their widths agree.
    """
    a, b = source.payload, sink.payload
    shape_a, shape_b = (getattr(p, "shape", lambda p=p: len(p))() for p in (a, b))
    if shape_a != shape_b:
        raise TypeError(f"Stream payloads must have one layout, not {shape_a!r} and {shape_b!r}")
    m.d.comb += [sink.valid.eq(source.valid), sink.payload.eq(source.payload), source.ready.eq(sink.ready)]


