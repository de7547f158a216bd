"""The structured engine: runs EXECUTE."""
from amaranth.hdl import Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.accumulators import update_layout
from hw.layouts import error_layout, instruction_layout
from hw.structured.array import StructuredArray
from hw.structured.streamer import Streamer, pixel_layout
from hw.structured.weight_loader import WeightLoader
from spec.derive import STEP_BITS, Sizes
from spec.isa import Opcode
from spec.registers import Error


class StructuredEngine(wiring.Component):
    """Runs EXECUTE: weights from the weight buffer, activations from the scratchpad, sums to the
    accumulators.

    Weight loader, streamer, array and accumulators in a row; only the loader and the streamer can wait. Tokens are
    taken before an EXECUTE enters the loader and given when its last accumulator is written.

    Latency: `latency` cycles from the issue of a pixel to its accumulator. Throughput: one pixel, that is
    columns x slots multiplications, per cycle; series terms and further steps cost no cycle between them as long as
    a step has at least tile beats + `WeightLoader.overhead` pixels.
    Parameters: config (spec.config.Config).
    """

    latency = Streamer.latency + StructuredArray.latency + 2

    def __init__(self, *, config):
        s, sizes = config.structured, Sizes(config)
        self._config = config
        rows = sizes.activation_blocks // sizes.banks
        super().__init__({
            "i": In(stream.Signature(instruction_layout(Opcode.EXECUTE))),
            "available_load": In(1), "take_load": Out(1), "push_load": Out(1),
            "available_store": In(1), "take_store": Out(1), "push_store": Out(1),
            "step_en": Out(1), "step_address": Out(range(config.memory.step_entries)), "step_data": In(STEP_BITS),
            "weight_en": Out(1), "weight_address": Out(range(sizes.weight_beats)),
            "weight_data": In(config.bus.data_bits),
            "read_en": Out(1), "read_row": Out(data.ArrayLayout(range(rows), sizes.banks)),
            "read_data": In(data.ArrayLayout(8 * s.block, sizes.banks)),
            "update": Out(update_layout(config)), "overflow": In(1),
            "issue": Out(1), "wait_load": Out(1), "wait_store": Out(1), "wait_weights": Out(1),
            "busy": Out(1), "error": Out(error_layout())})

    def elaborate(self, platform):
        m = Module()
        config = self._config
        m.submodules.loader = loader = WeightLoader(config=config)
        m.submodules.streamer = streamer = Streamer(config=config)
        m.submodules.array = array = StructuredArray(config=config)
        wiring.connect(m, loader.o, streamer.i)

        # -- tokens, then the loader ------------------------------------------------------------------------------
        need_load = self.i.payload.wait_load & ~self.available_load
        need_store = self.i.payload.wait_store & ~self.available_store
        m.d.comb += [
            loader.i.payload.eq(self.i.payload), loader.i.valid.eq(self.i.valid & ~need_load & ~need_store),
            self.i.ready.eq(loader.i.ready & ~need_load & ~need_store)]
        with m.If(self.i.valid & self.i.ready):
            m.d.comb += [self.take_load.eq(self.i.payload.wait_load), self.take_store.eq(self.i.payload.wait_store)]

        m.d.comb += [
            self.step_en.eq(loader.step_en), self.step_address.eq(loader.step_address),
            loader.step_data.eq(self.step_data), self.weight_en.eq(loader.weight_en),
            self.weight_address.eq(loader.weight_address), loader.weight_data.eq(self.weight_data),
            array.load_data.eq(loader.load_data), array.load_value.eq(loader.load_value),
            array.load_index.eq(loader.load_index), array.load_word.eq(loader.load_word),
            self.read_en.eq(streamer.read_en), self.read_row.eq(streamer.read_row),
            streamer.read_data.eq(self.read_data),
            array.stream.eq(streamer.stream), array.n_log2.eq(streamer.n_log2), array.swap.eq(streamer.swap),
            array.en.eq(streamer.valid), loader.shadow_free.eq(streamer.swap & streamer.valid)]

        # -- the pixel's description travels beside its data --------------------------------------------------------
        valid, pixel = streamer.valid, streamer.pixel
        in_flight = streamer.valid
        for stage in range(StructuredArray.latency):
            if stage == StructuredArray.latency - 1:
                m.d.comb += [self.update.fetch.eq(valid), self.update.bank.eq(pixel.bank),
                             self.update.address.eq(pixel.address)]
            valid_next = Signal(name=f"valid{stage}")
            pixel_next = Signal(pixel_layout(config), name=f"pixel{stage}")
            m.d.sync += [valid_next.eq(valid), pixel_next.eq(pixel)]
            valid, pixel = valid_next, pixel_next
            in_flight = in_flight | valid
        m.d.comb += [self.update.init.eq(pixel.init), self.update.operation.eq(pixel.operation),
                     *(self.update.sums[c].eq(array.sums[c]) for c in range(config.structured.columns))]
        done = Signal()
        m.d.sync += [done.eq(valid & pixel.last),
                     self.push_load.eq(valid & pixel.last & pixel.push_load),
                     self.push_store.eq(valid & pixel.last & pixel.push_store)]

        # -- counters: each cycle has one cause ---------------------------------------------------------------------
        m.d.comb += self.issue.eq(streamer.issue)
        with m.If(~streamer.issue):
            with m.If(loader.busy):
                m.d.comb += self.wait_weights.eq(1)
            with m.Elif(self.i.valid & need_load):
                m.d.comb += self.wait_load.eq(1)
            with m.Elif(self.i.valid & need_store):
                m.d.comb += self.wait_store.eq(1)
        m.d.comb += self.busy.eq(loader.busy | streamer.busy | in_flight | done)

        error = Signal(error_layout())
        m.d.comb += self.error.eq(error)
        with m.If(~error.valid):
            with m.If(self.overflow):
                m.d.sync += [error.valid.eq(1), error.code.eq(Error.ACCUMULATOR_OVERFLOW)]
            with m.Elif(streamer.error.valid):
                m.d.sync += error.eq(streamer.error)
            with m.Elif(loader.error.valid):
                m.d.sync += error.eq(loader.error)
        return m
