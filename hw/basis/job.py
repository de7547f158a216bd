"""What an EXECUTE_BASIS is inside the engine, and the geometry that its parts share."""
from amaranth.hdl import Cat, Signal
from amaranth.lib import data

from hw.layouts import instruction_layout
from spec.isa import MAX_KERNEL_ROWS, Opcode

#: Bits of an input or output row number with its padding, signed.
ROW_BITS = 15


def job_layout(config):
    """An EXECUTE_BASIS whose taps and coefficients are on chip.

    ``chunks``: micro-steps of a kernel row (J); ``span``: pixels that a kernel row spans; ``reach``: pushes before the
    first output of a row; ``streamed``: input columns that any output needs; ``tap_half``, ``coefficient_half``: where
    its operands lie.
    """
    return data.StructLayout({
        "execute": instruction_layout(Opcode.EXECUTE_BASIS), "chunks": 4, "span": 7, "reach": 7, "streamed": 12,
        "tap_half": 1, "coefficient_half": 1})


def kernel_rows_of(m, job, row, *, name):
    """Which kernel rows meet input row ``row``: (mask, output rows), one for each kernel row r.

    Output row ``(row + pad_top - r * dilation) / stride`` where that is a whole number in range.
    """
    x = job.execute
    mask = Signal(MAX_KERNEL_ROWS, name=f"{name}_mask")
    outputs = []
    for r in range(MAX_KERNEL_ROWS):
        at = Signal(range(-(1 << ROW_BITS - 1), 1 << ROW_BITS - 1), name=f"{name}_at{r}")
        out = Signal(12, name=f"{name}_out{r}")
        odd = Signal(name=f"{name}_odd{r}")
        m.d.comb += [at.eq(row + x.pad_top - r * x.dilation_rows), out.eq(at >> x.stride_rows_log2),
                     odd.eq((at & ((1 << x.stride_rows_log2) - 1)[:8]).any()),
                     mask[r].eq((r < x.kernel_rows) & ~at[-1] & ~odd & ((at >> x.stride_rows_log2) < x.out_rows))]
        outputs.append(out)
    return mask, outputs


def lowest(mask):
    """``mask`` with all bits but its lowest cleared."""
    return mask & (~mask + 1)[:len(mask)]


def to_log2(one_hot, bits):
    """Number of the only set bit."""
    return Cat(*(Cat(*(one_hot[n] for n in range(len(one_hot)) if n >> k & 1)).any() for k in range(bits)))
