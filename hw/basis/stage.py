"""What the two coefficient stages have in common: their ports."""
from amaranth.hdl import Shape
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out

from spec.derive import Sizes


def word_layout(config):
    """A stream word of one pixel on its way into the coefficient stage.

    ``word``: activations less their zero point, position ``g * group + c`` for channel position c of the word's group
    g; ``row``: number of the word among those of the pixel, which is that of its coefficients; ``half``: half of the
    coefficient memory; ``n_log2``: pattern of the word's term (series); ``last``: the pixel's last word.
    """
    b, sizes = config.basis, Sizes(config)
    return data.StructLayout({
        "word": data.ArrayLayout(Shape(sizes.operand.bits, True), b.stream_groups * b.group),
        "row": range(b.coefficient_rows), "half": 1, "n_log2": 3, "last": 1})


def intermediate_layout(config):
    """IR of one pixel, slice (block, m) at ``block * slices + m``, and how many of them were saturated."""
    sizes = Sizes(config)
    return data.StructLayout({
        "ir": data.ArrayLayout(Shape(sizes.intermediate.bits, True), sizes.basis_slices),
        "saturated": range(sizes.basis_slices + 1)})


def stage_members(config):
    """Ports of a coefficient stage.

    ``i``, ``o``: streams of `word_layout` and `intermediate_layout`; ``i.ready`` may depend on ``o.ready``, ``o.valid``
    comes from a register. Loading: ``load_start`` for one cycle begins to fill half ``load_half`` with the coefficients
    of pixels of ``load_groups`` channel groups from ``load_beats`` beats (all four valid in that cycle only; the series
    stage counts no beats); then the beats come on ``load``;
    ``loaded`` is 1 once they all are in the memory and the half may be used, at the latest a few cycles after the last
    beat, and 0 from the cycle after ``load_start`` on. Words of the other half may pass at the same time.
    ``busy``: a pixel is inside. ``error``: the coefficients break the format (held until reset).
    """
    return {
        "i": In(stream.Signature(word_layout(config))), "o": Out(stream.Signature(intermediate_layout(config))),
        "load_start": In(1), "load_half": In(1), "load_groups": In(8), "load_beats": In(16),
        "load": In(stream.Signature(config.bus.data_bits)), "loaded": Out(1),
        "busy": Out(1), "error": Out(1)}
