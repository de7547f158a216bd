"""The structured engine with its memories around it, which a test fills through their write ports."""
from amaranth.hdl import Cat, Const, Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In

from hw.execute import ExecuteUnit
from hw.layouts import instruction_layout
from hw.memory.ram import Ram
from hw.memory.scratchpad import Scratchpad
from spec.derive import STEP_BITS, Sizes
from spec.isa import Opcode

#: Ports that go through to the engine.
_THROUGH = ("available_load", "take_load", "push_load", "available_store", "take_store", "push_store", "acc_en",
            "acc_bank", "acc_address", "acc_data", "issue", "wait_load", "wait_store", "wait_weights", "busy", "error")


class EngineBench(wiring.Component):
    """`ExecuteUnit` as EXECUTE sees it, scratchpad, weight buffer and step table."""

    def __init__(self, *, config):
        self._config, sizes = config, Sizes(config)
        self._engine = ExecuteUnit(config=config)
        members = self._engine.signature.members
        rows = sizes.activation_blocks // sizes.banks
        super().__init__({
            "i": In(stream.Signature(instruction_layout(Opcode.EXECUTE))),
            **{name: members[name] for name in _THROUGH},
            "pad_mask": In(sizes.banks), "pad_row": In(range(rows)),
            "pad_data": In(8 * config.structured.block * sizes.banks),
            "weight_write": In(1), "weight_at": In(range(sizes.weight_beats)), "weight_word": In(config.bus.data_bits),
            "step_write": In(1), "step_at": In(range(config.memory.step_entries)), "step_word": In(STEP_BITS)})

    def elaborate(self, platform):
        m = Module()
        sizes = Sizes(self._config)
        m.submodules.engine = engine = self._engine
        m.submodules.pad = pad = Scratchpad(config=self._config)
        m.submodules.weights = weights = Ram(width=self._config.bus.data_bits, depth=sizes.weight_beats)
        m.submodules.steps = steps = Ram(width=STEP_BITS, depth=self._config.memory.step_entries)
        m.d.comb += [engine.i.payload.eq(Cat(Const(Opcode.EXECUTE, 4), self.i.payload)),
                     engine.i.valid.eq(self.i.valid), self.i.ready.eq(engine.i.ready)]
        for name in _THROUGH:
            inner, outer = getattr(engine, name), getattr(self, name)
            m.d.comb += inner.eq(outer) if self.signature.members[name].flow == In else outer.eq(inner)
        m.d.comb += [
            pad.write_en.eq(1), pad.write_mask.eq(self.pad_mask), pad.write_row.eq(self.pad_row),
            pad.write_data.eq(self.pad_data), pad.read_en.eq(engine.read_en), pad.read_row.eq(engine.read_row),
            engine.read_data.eq(pad.read_data),
            weights.write_en.eq(self.weight_write), weights.write_address.eq(self.weight_at),
            weights.write_data.eq(self.weight_word), weights.read_en.eq(engine.weight_en),
            weights.read_address.eq(engine.weight_address), engine.weight_data.eq(weights.read_data),
            steps.write_en.eq(self.step_write), steps.write_address.eq(self.step_at),
            steps.write_data.eq(self.step_word), steps.read_en.eq(engine.step_en),
            steps.read_address.eq(engine.step_address), engine.step_data.eq(steps.read_data)]
        return m
