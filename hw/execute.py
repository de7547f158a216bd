"""The execute unit: the engines that the configuration has, and the accumulators they share."""
from amaranth.hdl import Module, Shape, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.accumulators import Accumulators
from hw.basis.engine import BasisEngine
from hw.layouts import error_layout, instruction_layout
from hw.structured.engine import StructuredEngine
from spec.derive import INSTRUCTION_BITS, STEP_BITS, Sizes
from spec.isa import Opcode

#: Outputs of an engine that are the unit's whichever engine gives them.
_FLAGS = ("take_load", "push_load", "take_store", "push_store", "issue", "wait_load", "wait_store", "wait_weights",
          "busy")


class ExecuteUnit(wiring.Component):
    """Hands each instruction to its engine. An engine begins only when the other has nothing left to do, so that their
    instructions end in order; within an engine instructions overlap.

    ``i`` takes whole instruction words of EXECUTE and EXECUTE_BASIS; the other ports are those of the engines.
    Errors: those of the engines. An overflow of the accumulators is told to both; it is one error.
    Parameters: config (spec.config.Config).
    """

    def __init__(self, *, config):
        sizes = Sizes(config)
        self._config = config
        rows = sizes.activation_blocks // sizes.banks
        super().__init__({
            "i": In(stream.Signature(INSTRUCTION_BITS)),
            "available_load": In(1), "take_load": Out(1), "push_load": Out(1),
            "available_store": In(1), "take_store": Out(1), "push_store": Out(1),
            "step_en": Out(1), "step_address": Out(range(config.memory.step_entries)), "step_data": In(STEP_BITS),
            "weight_en": Out(1), "weight_address": Out(range(sizes.weight_beats)),
            "weight_data": In(config.bus.data_bits),
            "read_en": Out(1), "read_row": Out(data.ArrayLayout(range(rows), sizes.banks)),
            "read_data": In(data.ArrayLayout(8 * sizes.block, sizes.banks)),
            "acc_en": In(1), "acc_bank": In(1), "acc_address": In(range(sizes.accumulator_depth)),
            "acc_data": Out(data.ArrayLayout(Shape(sizes.accumulator.bits, True), sizes.columns)),
            "issue": Out(1), "wait_load": Out(1), "wait_store": Out(1), "wait_weights": Out(1),
            "wait_coefficients": Out(1), "saturated": Out(10),
            "busy": Out(1), "error": Out(error_layout())})

    def elaborate(self, platform):
        m = Module()
        config = self._config
        m.submodules.accumulators = acc = Accumulators(config=config)
        engines = {}
        if config.structured is not None:
            m.submodules.structured = engines[Opcode.EXECUTE] = StructuredEngine(config=config)
        if config.basis is not None:
            m.submodules.basis = engines[Opcode.EXECUTE_BASIS] = BasisEngine(config=config)

        flags = {name: [] for name in _FLAGS}
        ready = []
        # the engine at work owns the memories; it keeps them until the other one is given an instruction
        last = Signal(init=0)
        for n, (opcode, engine) in enumerate(engines.items()):
            layout = instruction_layout(opcode)
            mine = self.i.payload[:4] == opcode
            others = [e.busy for e in engines.values() if e is not engine]
            free = ~others[0] if others else 1
            m.d.comb += [
                engine.i.payload.eq(data.View(layout, self.i.payload[4:4 + layout.size])),
                engine.i.valid.eq(self.i.valid & mine & free),
                engine.available_load.eq(self.available_load), engine.available_store.eq(self.available_store),
                engine.weight_data.eq(self.weight_data), engine.read_data.eq(self.read_data),
                engine.overflow.eq(acc.overflow)]
            ready.append(mine & free & engine.i.ready)
            with m.If(engine.i.valid & engine.i.ready):
                m.d.sync += last.eq(n)
            for name in _FLAGS:
                flags[name].append(getattr(engine, name))
            with m.If(last == n if len(engines) > 1 else 1):
                m.d.comb += [
                    self.weight_en.eq(engine.weight_en), self.weight_address.eq(engine.weight_address),
                    self.read_en.eq(engine.read_en), self.read_row.eq(engine.read_row), acc.update.eq(engine.update)]
            with m.If(engine.error.valid):
                m.d.comb += self.error.eq(engine.error)
        m.d.comb += self.i.ready.eq(_any(ready))
        m.d.comb += [getattr(self, name).eq(_any(values)) for name, values in flags.items() if name != "busy"]
        m.d.comb += self.busy.eq(self.i.valid | _any(flags["busy"]))
        if Opcode.EXECUTE in engines:
            structured = engines[Opcode.EXECUTE]
            m.d.comb += [self.step_en.eq(structured.step_en), self.step_address.eq(structured.step_address),
                         structured.step_data.eq(self.step_data)]
        if Opcode.EXECUTE_BASIS in engines:
            basis = engines[Opcode.EXECUTE_BASIS]
            m.d.comb += [self.wait_coefficients.eq(basis.wait_coefficients), self.saturated.eq(basis.saturated)]
        m.d.comb += [acc.read_en.eq(self.acc_en), acc.read_bank.eq(self.acc_bank),
                     acc.read_address.eq(self.acc_address), self.acc_data.eq(acc.read_data)]
        return m


def _any(values):
    out = values[0]
    for value in values[1:]:
        out = out | value
    return out
