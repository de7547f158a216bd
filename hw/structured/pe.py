"""The N:M processing element: one stationary value with its index, one multiplexer, one multiplier."""
from amaranth.hdl import Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out


class Pe(wiring.Component):
    """One slot of one column.

    ``product[t+1] = value * block[t][index]``

    The stationary operand is double-buffered: the shadow registers fill while the active ones multiply, and ``swap``
    makes the shadow active for the block presented in the next cycle. A dense tile has no indices: ``dense`` at the
    swap takes ``dense_index`` instead. With ``block`` = 1 the element is an ordinary dense one: no index, no
    multiplexer.

    Range: exact for every operand. Latency: 1 cycle. Throughput: one product per cycle. Not reset: the datapath around
    it carries a valid bit.
    Parameters: block (M), activation_bits, weight_bits.
    """

    latency = 1

    @staticmethod
    def members(*, block, activation_bits, weight_bits):
        """Signature members."""
        index_bits = block.bit_length() - 1
        ports = {"block": In(data.ArrayLayout(signed(activation_bits), block)),
                 "value": In(signed(weight_bits)), "value_en": In(1), "swap": In(1),
                 "product": Out(signed(activation_bits + weight_bits))}
        if index_bits:
            # each index bit has its own enable: packed indices may straddle two bus words
            ports |= {"index": In(index_bits), "index_en": In(index_bits),
                      "dense": In(1), "dense_index": In(index_bits)}
        return ports

    def __init__(self, *, block, activation_bits=8, weight_bits=8):
        if block < 1 or block & (block - 1):
            raise ValueError(f"Block size must be a power of two, not {block!r}")
        self._block = block
        super().__init__(self.members(block=block, activation_bits=activation_bits, weight_bits=weight_bits))

    def elaborate(self, platform):
        m = Module()
        value_next = Signal.like(self.value, reset_less=True)
        value = Signal.like(self.value, reset_less=True)
        product = Signal.like(self.product, reset_less=True)
        with m.If(self.value_en):
            m.d.sync += value_next.eq(self.value)
        with m.If(self.swap):
            m.d.sync += value.eq(value_next)
        if self._block > 1:
            index_next = Signal.like(self.index, reset_less=True)
            index = Signal.like(self.index, reset_less=True)
            for k in range(len(self.index)):
                with m.If(self.index_en[k]):
                    m.d.sync += index_next[k].eq(self.index[k])
            with m.If(self.swap):
                m.d.sync += index.eq(Mux(self.dense, self.dense_index, index_next))
            selected = self.block[index]
        else:
            selected = self.block[0]
        m.d.sync += product.eq(selected * value)
        m.d.comb += self.product.eq(product)
        return m
