"""Small faults in the RTL sources, all in one design behind a selector: fault k acts while input ``fault`` is k.

A fault is a replacement in the text of one module of `hw`: the good expression becomes ``Mux(FAULT == k, bad, good)``.
The modules are loaded anew with these texts, under their own names, and put back afterwards.
"""

from contextlib import contextmanager
import importlib
import importlib.util
from pathlib import Path
import sys
from typing import NamedTuple

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In

from sim_tests.lib.simulate import ROOT

FAULT = Signal(8, name="planted_fault")


class Fault(NamedTuple):
    """``good`` (exactly once in ``module``) becomes ``bad`` while the fault is on; ``check`` must see it."""

    module: str
    good: str
    bad: str
    check: str


def _ports(top):
    return dict(top.signature.members.items())


class Planted(wiring.Component):
    """The accelerator, or a part of it, with an input ``fault`` that selects the planted fault; 0: none."""

    def __init__(self, *, accelerator):
        self._inner = accelerator
        super().__init__({**_ports(accelerator), "fault": In(8)})

    def elaborate(self, platform):
        m = Module()
        m.submodules.accelerator = self._inner
        m.d.comb += FAULT.eq(self.fault)
        for name, member in self._inner.signature.members.items():
            inner, outer = getattr(self._inner, name), getattr(self, name)
            if hasattr(inner, "signature"):
                wiring.connect(m, wiring.flipped(outer), inner)
            else:
                m.d.comb += inner.eq(outer) if member.flow == In else outer.eq(inner)
        return m


@contextmanager
def planted(faults):
    """Context in which `hw` has all ``faults``; fault n (from 1) acts while FAULT is n. Raises AssertionError if a
    fault's text is not found exactly once in its module."""
    texts = {}
    for number, fault in enumerate(faults, 1):
        path = ROOT / Path(*fault.module.split(".")).with_suffix(".py")
        text = texts.get(fault.module) or path.read_text()
        assert text.count(fault.good) == 1, (
            f"fault {number}: {fault.good!r} occurs {text.count(fault.good)} times in {path.name}"
        )
        texts[fault.module] = text.replace(fault.good, f"_Mux(_FAULT == {number}, {fault.bad}, {fault.good})")
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name == "hw" or name.startswith("hw.")}

    class Finder:
        """Loads a changed module from its changed text."""

        @staticmethod
        def find_spec(name, path=None, target=None):
            if name not in texts:
                return None
            return importlib.util.spec_from_loader(name, Finder)

        @staticmethod
        def create_module(spec):
            return None

        @staticmethod
        def exec_module(module):
            module.__dict__.update(_Mux=Mux, _FAULT=FAULT)
            exec(compile(texts[module.__name__], module.__name__, "exec"), module.__dict__)  # noqa: S102 (own sources)

    sys.meta_path.insert(0, Finder)
    try:
        yield importlib.import_module("hw.top")
    finally:
        sys.meta_path.remove(Finder)
        for name in [n for n in sys.modules if n == "hw" or n.startswith("hw.")]:
            del sys.modules[name]
        sys.modules.update(kept)
