"""The accelerator: register port, command processor, units, memories and bus masters wired together."""
from amaranth.hdl import Cat, Module, ResetInserter, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import Out

from hw.bus.axi import lite_slave_signature, master_signature, read_members, write_members
from hw.bus.read import ReadMaster
from hw.bus.registers import RegisterFile
from hw.bus.write import WriteMaster
from hw.connect import connect_stream
from hw.control.command import CommandProcessor
from hw.control.load import LoadUnit
from hw.control.store import StoreUnit
from hw.control.supervisor import Supervisor
from hw.control.tokens import UNITS, Tokens
from hw.execute import ExecuteUnit
from hw.layouts import instruction_layout
from hw.memory.ram import Ram
from hw.memory.scratchpad import Scratchpad
from spec.config import Config
from spec.derive import STEP_BITS, Sizes
from spec.isa import Opcode
from spec.registers import COUNTERS, Error

#: Who may report an error, most specific first.
ERROR_SOURCES = ("command", "execute", "load", "store", "read", "write", "tokens")


class Accelerator(wiring.Component):
    """One accelerator for one configuration.

    Ports: ``s_axil`` AXI4-Lite registers (`spec.registers`), ``m_axi`` AXI4 master to memory, ``irq``, and ``trace``
    for simulation and logic analysers: ``execute`` (0 idle, 1 issue, 2 wait for load, 3 wait for store, 4 wait for
    weights, 5 wait for coefficients), ``mark_valid`` and ``mark`` (a BARRIER passed).
    Parameters: config (spec.config.Config).
    """

    def __init__(self, *, config):
        if not isinstance(config, Config):
            raise TypeError(f"Configuration must be a Config, not {config!r}")
        self._config = config
        super().__init__({
            "s_axil": Out(lite_slave_signature()), "m_axi": Out(master_signature(config.bus)), "irq": Out(1),
            "trace": Out(wiring.Signature({"execute": Out(3), "mark_valid": Out(1), "mark": Out(16)}))})

    def elaborate(self, platform):
        m = Module()
        config = self._config
        m.submodules.registers = registers = RegisterFile(config=config)
        m.submodules.supervisor = supervisor = Supervisor(sources=ERROR_SOURCES)
        wiring.connect(m, wiring.flipped(self.s_axil), registers.s_axil)

        core = Module()
        parts = self._build_core(core, supervisor, registers)
        # soft reset reaches everything but the registers and the supervisor
        m.submodules.core = ResetInserter({"sync": supervisor.core_reset})(core)

        self._build_status(m, registers, supervisor, parts)
        return m

    def _build_core(self, m, supervisor, registers):
        config, sizes = self._config, Sizes(self._config)
        m.submodules.read = read = ReadMaster(config=config)
        m.submodules.write = write = WriteMaster(config=config)
        m.submodules.command = command = CommandProcessor(config=config)
        m.submodules.load = load = LoadUnit(config=config)
        m.submodules.execute = execute = ExecuteUnit(config=config)
        m.submodules.store = store = StoreUnit(config=config)
        m.submodules.tokens = tokens = Tokens()
        m.submodules.scratchpad = scratchpad = Scratchpad(config=config)
        m.submodules.weights = weights = Ram(width=config.bus.data_bits, depth=sizes.weight_beats)
        m.submodules.parameters = parameters = Ram(width=config.bus.data_bits, depth=sizes.parameter_words)
        m.submodules.residuals = residuals = Ram(width=8 * sizes.columns, depth=sizes.residual_units)

        # -- bus ------------------------------------------------------------------------------------------------------
        for name in read_members(config.bus):
            self._join(m, getattr(self.m_axi, name), getattr(read.m_axi, name), read_members(config.bus)[name])
        for name in write_members(config.bus):
            self._join(m, getattr(self.m_axi, name), getattr(write.m_axi, name), write_members(config.bus)[name])
        for master in (read, write):
            m.d.comb += [
                master.memory_base.eq(Cat(registers.value("MEMORY_BASE_LOW"), registers.value("MEMORY_BASE_HIGH"))),
                master.memory_bytes.eq(Cat(registers.value("MEMORY_BYTES_LOW"), registers.value("MEMORY_BYTES_HIGH"))),
                master.stop.eq(supervisor.stop)]
        connect_stream(m, command.request, read.fetch_request)
        connect_stream(m, read.fetch_data, command.data)
        connect_stream(m, load.request, read.load_request)
        connect_stream(m, read.load_data, load.data)
        connect_stream(m, store.request, write.request)
        connect_stream(m, store.data, write.data)
        m.d.comb += store.done.eq(write.done)

        # -- instructions and tokens ----------------------------------------------------------------------------------
        connect_stream(m, command.load, load.i)
        connect_stream(m, command.execute, execute.i)
        layout = instruction_layout(Opcode.STORE)
        m.d.comb += [store.i.valid.eq(command.store.valid), command.store.ready.eq(store.i.ready),
                     store.i.payload.eq(data.View(layout, command.store.payload[4:4 + layout.size]))]
        units = dict(zip(UNITS, (load, execute, store)))
        for a in UNITS:
            for b in UNITS:
                if a != b:
                    m.d.comb += [
                        getattr(tokens, f"push_{a}_{b}").eq(getattr(units[a], f"push_{b}")),
                        getattr(units[b], f"available_{a}").eq(getattr(tokens, f"available_{a}_{b}")),
                        getattr(tokens, f"take_{a}_{b}").eq(getattr(units[b], f"take_{a}"))]
        m.d.comb += [
            tokens.clear.eq(supervisor.begin), command.start.eq(supervisor.begin),
            command.program.eq(Cat(registers.value("PROGRAM_LOW"), registers.value("PROGRAM_HIGH"))),
            command.count.eq(registers.value("PROGRAM_COUNT")),
            command.quiet.eq(~load.busy & ~execute.busy & store.idle & write.idle)]

        # -- memories -------------------------------------------------------------------------------------------------
        m.d.comb += [
            scratchpad.write_en.eq(load.tile_en), scratchpad.write_row.eq(load.tile_row),
            scratchpad.write_mask.eq(load.tile_mask), scratchpad.write_data.eq(load.tile_data),
            scratchpad.read_en.eq(execute.read_en), scratchpad.read_row.eq(execute.read_row),
            execute.read_data.eq(scratchpad.read_data),
            weights.write_en.eq(load.weight_en), weights.write_address.eq(load.weight_address),
            weights.write_data.eq(load.linear_data), weights.read_en.eq(execute.weight_en),
            weights.read_address.eq(execute.weight_address), execute.weight_data.eq(weights.read_data),
            parameters.write_en.eq(load.parameter_en), parameters.write_address.eq(load.parameter_address),
            parameters.write_data.eq(load.linear_data), parameters.read_en.eq(store.parameter_en),
            parameters.read_address.eq(store.parameter_address), store.parameter_data.eq(parameters.read_data),
            residuals.write_en.eq(load.residual_en), residuals.write_address.eq(load.residual_address),
            residuals.write_data.eq(load.residual_data), residuals.read_en.eq(store.residual_en),
            residuals.read_address.eq(store.residual_address), store.residual_data.eq(residuals.read_data),
            execute.acc_en.eq(store.acc_en), execute.acc_bank.eq(store.acc_bank),
            execute.acc_address.eq(store.acc_address), store.acc_data.eq(execute.acc_data)]
        if config.structured is not None:
            m.submodules.steps = steps = Ram(width=STEP_BITS, depth=config.memory.step_entries)
            m.d.comb += [
                steps.write_en.eq(load.step_en), steps.write_address.eq(load.step_address),
                steps.write_data.eq(load.step_data), steps.read_en.eq(execute.step_en),
                steps.read_address.eq(execute.step_address), execute.step_data.eq(steps.read_data)]
        return {"read": read, "write": write, "command": command, "load": load, "execute": execute, "store": store,
                "tokens": tokens}

    @staticmethod
    def _join(m, outer, inner, member):
        """Connect a port of the top to the master's member of the same name."""
        m.d.comb += outer.eq(inner) if member.flow == Out else inner.eq(outer)

    def _build_status(self, m, registers, supervisor, parts):
        read, write, command = parts["read"], parts["write"], parts["command"]
        load, execute, store = parts["load"], parts["execute"], parts["store"]
        for name in ERROR_SOURCES[:-1]:
            m.d.comb += getattr(supervisor, f"error_{name}").eq(parts[name].error)
        from_tokens = supervisor.error_tokens
        m.d.comb += [from_tokens.valid.eq(parts["tokens"].overflow), from_tokens.code.eq(Error.TOKEN_OVERFLOW)]
        m.d.comb += [
            supervisor.start.eq(registers.start), supervisor.soft_reset.eq(registers.soft_reset),
            supervisor.done.eq(command.done), supervisor.bus_idle.eq(read.idle & write.idle),
            supervisor.watchdog_cycles.eq(registers.value("WATCHDOG_CYCLES")),
            supervisor.progress.eq(
                read.beat | write.beat | execute.issue | load.writing | store.reading | command.issued),
            registers.busy.eq(supervisor.busy | supervisor.resetting),
            registers.event_done.eq(supervisor.event_done), registers.event_error.eq(supervisor.event_error),
            self.irq.eq(registers.irq),
            registers.value("STATUS").eq(Cat(supervisor.busy, supervisor.status_done, supervisor.status_error,
                                             supervisor.resetting)),
            registers.value("ERROR_CODE").eq(supervisor.code),
            Cat(registers.value("ERROR_ADDRESS_LOW"), registers.value("ERROR_ADDRESS_HIGH")).eq(supervisor.address),
            registers.value("MARK").eq(command.mark),
            self.trace.mark_valid.eq(command.mark_valid), self.trace.mark.eq(command.mark_number)]

        idle = ~(execute.issue | execute.wait_load | execute.wait_store | execute.wait_weights
                 | execute.wait_coefficients)
        with m.If(execute.issue):
            m.d.comb += self.trace.execute.eq(1)
        with m.Elif(execute.wait_load):
            m.d.comb += self.trace.execute.eq(2)
        with m.Elif(execute.wait_store):
            m.d.comb += self.trace.execute.eq(3)
        with m.Elif(execute.wait_weights):
            m.d.comb += self.trace.execute.eq(4)
        with m.Elif(execute.wait_coefficients):
            m.d.comb += self.trace.execute.eq(5)

        events = {
            "CYCLES": 1, "EXECUTE_ISSUE": execute.issue, "EXECUTE_WAIT_LOAD": execute.wait_load,
            "EXECUTE_WAIT_STORE": execute.wait_store, "EXECUTE_WAIT_WEIGHTS": execute.wait_weights,
            "EXECUTE_IDLE": idle, "LOAD_BUSY": load.writing, "LOAD_WAIT_TOKEN": load.waiting,
            "STORE_BUSY": store.reading, "STORE_WAIT_TOKEN": store.waiting, "READ_BEATS": read.beat,
            "WRITE_BEATS": write.beat, "INSTRUCTIONS": command.issued,
            "EXECUTE_WAIT_COEFFICIENTS": execute.wait_coefficients, "SATURATIONS": execute.saturated}
        for name, _ in COUNTERS:
            counter = Signal(32, name=f"count_{name.lower()}")
            with m.If(supervisor.begin):
                m.d.sync += counter.eq(0)
            with m.Elif(supervisor.busy):
                m.d.sync += counter.eq(counter + events[name])
            m.d.comb += registers.value(name).eq(counter)
