"""The basis engine: runs EXECUTE_BASIS."""
from amaranth.hdl import Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.accumulators import update_layout
from hw.basis.job import job_layout
from hw.basis.loader import BasisLoader
from hw.basis.maps import MapStage
from hw.basis.multiply import BasisMultiply
from hw.basis.series import SeriesStage
from hw.basis.streamer import BasisStreamer
from hw.connect import connect_stream
from hw.layouts import error_layout, instruction_layout
from hw.memory.queue import Queue
from spec.derive import Sizes
from spec.isa import Opcode
from spec.registers import Error


def coefficient_stage(config):
    """The stage that the configuration asks for; the engine around it is the same."""
    return SeriesStage(config=config) if config.basis.coefficients == "series" else MapStage(config=config)


class BasisEngine(wiring.Component):
    """Decomposed convolution, coefficients first (docs/basis.md).

    Loader -> streamer -> coefficient stage -> queue -> multipliers -> accumulators. Each part works on its own pass:
    while the multipliers finish one, the coefficient stage may be at the next and the loader at the one after that.
    Tokens of the load unit are taken before a pass enters the loader, those of the store unit before its first
    micro-step.

    Throughput: one micro-step per cycle, blocks x slices x q multiplications, as long as the coefficient stage needs no
    more cycles for a pixel than the multipliers, and loading no more than the pass before.
    Parameters: config (spec.config.Config).
    """

    def __init__(self, *, config):
        sizes = Sizes(config)
        self._config = config
        rows = sizes.activation_blocks // sizes.banks
        super().__init__({
            "i": In(stream.Signature(instruction_layout(Opcode.EXECUTE_BASIS))),
            "available_load": In(1), "take_load": Out(1), "push_load": Out(1),
            "available_store": In(1), "take_store": Out(1), "push_store": Out(1),
            "weight_en": Out(1), "weight_address": Out(range(sizes.weight_beats)),
            "weight_data": In(config.bus.data_bits),
            "read_en": Out(1), "read_row": Out(data.ArrayLayout(range(rows), sizes.banks)),
            "read_data": In(data.ArrayLayout(8 * sizes.block, sizes.banks)),
            "update": Out(update_layout(config)), "overflow": In(1),
            "issue": Out(1), "wait_load": Out(1), "wait_store": Out(1), "wait_weights": Out(1),
            "wait_coefficients": Out(1), "saturated": Out(range(sizes.basis_slices + 1)),
            "busy": Out(1), "error": Out(error_layout())})

    def elaborate(self, platform):
        m = Module()
        config, b = self._config, self._config.basis
        m.submodules.loader = loader = BasisLoader(config=config)
        m.submodules.streamer = streamer = BasisStreamer(config=config)
        m.submodules.stage = stage = coefficient_stage(config)
        m.submodules.multiply = multiply = BasisMultiply(config=config)
        m.submodules.intermediates = intermediates = Queue(shape=stage.o.payload.shape(), depth=b.fifo_depth)
        m.submodules.direct = direct = Queue(shape=streamer.direct.payload.shape(), depth=b.fifo_depth)
        m.submodules.passes = passes = Queue(shape=job_layout(config), depth=2)
        error = Signal(error_layout())
        stop = error.valid
        m.d.comb += self.error.eq(error)

        # -- tokens of the load unit, then the loader ----------------------------------------------------------------
        need_load = self.i.payload.wait_load & ~self.available_load
        m.d.comb += [
            loader.i.payload.eq(self.i.payload), loader.i.valid.eq(self.i.valid & ~need_load),
            self.i.ready.eq(loader.i.ready & ~need_load),
            self.take_load.eq(self.i.valid & self.i.ready & self.i.payload.wait_load),
            loader.stop.eq(stop), multiply.stop.eq(stop)]

        # -- a pass goes to the streamer and, in the same cycle, in line for the multipliers ---------------------------
        go = Signal()
        m.d.comb += [
            go.eq(loader.o.valid & streamer.i.ready & passes.i.ready), loader.o.ready.eq(go),
            streamer.i.valid.eq(go), streamer.i.payload.eq(loader.o.payload),
            passes.i.valid.eq(go), passes.i.payload.eq(loader.o.payload)]
        connect_stream(m, streamer.words, stage.i)
        connect_stream(m, stage.o, intermediates.i)
        connect_stream(m, intermediates.o, multiply.intermediate)
        connect_stream(m, streamer.direct, direct.i)
        connect_stream(m, direct.o, multiply.direct)
        connect_stream(m, passes.o, multiply.i)
        connect_stream(m, loader.load, stage.load)
        m.d.comb += [
            stage.load_start.eq(loader.load_start), stage.load_half.eq(loader.load_half),
            stage.load_groups.eq(loader.load_groups), stage.load_beats.eq(loader.load_beats),
            loader.loaded.eq(stage.loaded),
            multiply.tap_en.eq(loader.tap_en), multiply.tap_row.eq(loader.tap_row),
            multiply.tap_beat.eq(loader.tap_beat), multiply.tap_data.eq(self.weight_data),
            loader.coefficient_use.eq(streamer.coefficient_use),
            self.weight_en.eq(loader.weight_en), self.weight_address.eq(loader.weight_address),
            loader.weight_data.eq(self.weight_data),
            self.read_en.eq(streamer.read_en), self.read_row.eq(streamer.read_row),
            streamer.read_data.eq(self.read_data),
            self.update.eq(multiply.update), multiply.available_store.eq(self.available_store),
            self.take_store.eq(multiply.take_store), self.push_load.eq(multiply.push_load),
            self.push_store.eq(multiply.push_store), self.saturated.eq(multiply.saturated)]

        # -- which half of the taps is still needed: passes in line or at work, each with its half ---------------------
        for half in range(2):
            users = Signal(3, name=f"tap_users{half}")
            more = go & (loader.o.payload.tap_half == half)
            fewer = multiply.done & (multiply.done_half == half)
            m.d.sync += users.eq(users + more - fewer)
            m.d.comb += loader.tap_use[half].eq(users != 0)

        # -- counters: each cycle has one cause -----------------------------------------------------------------------
        m.d.comb += self.issue.eq(multiply.issue)
        with m.If(~multiply.issue):
            with m.If(multiply.working):
                m.d.comb += self.wait_coefficients.eq(1)
            with m.Elif(multiply.wait_store):
                m.d.comb += self.wait_store.eq(1)
            with m.Elif(loader.busy):
                m.d.comb += self.wait_weights.eq(1)
            with m.Elif(self.i.valid & need_load):
                m.d.comb += self.wait_load.eq(1)
        m.d.comb += self.busy.eq(loader.busy | streamer.busy | stage.busy | multiply.busy | passes.o.valid)

        with m.If(~error.valid):
            with m.If(self.overflow):
                m.d.sync += [error.valid.eq(1), error.code.eq(Error.ACCUMULATOR_OVERFLOW)]
            with m.Elif(streamer.error.valid):
                m.d.sync += error.eq(streamer.error)
            with m.Elif(loader.error.valid):
                m.d.sync += error.eq(loader.error)
            with m.Elif(stage.error):
                m.d.sync += [error.valid.eq(1), error.code.eq(Error.ILLEGAL_FIELD)]
        return m
