"""One module text for many equal instances.

Amaranth writes every instance of a submodule out anew: a 32 x 32 array becomes megabytes of Verilog. `place` puts a
component into a module as an ``Instance`` of a Verilog module that is written once, when the platform collects such
modules (`gen.emit` does); everywhere else, as in Amaranth's simulator, the component itself becomes the submodule.
"""
from amaranth.hdl import ClockSignal, Instance, ResetSignal
from amaranth.lib.wiring import In, Signature


class SharedModules:
    """A platform that collects what is to be written once: ``modules`` maps name to component, or to Verilog text."""

    def __init__(self):
        self.modules = {}

    def request(self, name, factory):
        """Register a module by name; the first factory builds it."""
        if name not in self.modules:
            self.modules[name] = None       # reserves the place: inner modules come first in the text
            self.modules[name] = factory()


def place(m, instance, *, module, factory, members, platform, name=None):
    """Put a component into ``m`` and return an object with its ports.

    Args:
        instance: name of the submodule in ``m``, or None.
        module: name of the Verilog module; equal names must mean equal parameters.
        factory: builds the component; called only where it will be elaborated.
        members: the component's signature members (from a static function of its class).
        platform: what ``elaborate`` was given.
    """
    if not isinstance(platform, SharedModules):
        component = factory()
        if instance is None:
            m.submodules += component
        else:
            m.submodules[instance] = component
        return component
    platform.request(module, factory)
    ports = Signature(members).create(path=(instance or module,))
    args = {"i_clk": ClockSignal(), "i_rst": ResetSignal()}
    for path, member, value in Signature(members).flatten(ports):
        direction = "i" if member.flow == In else "o"
        args[f"{direction}_{'__'.join(map(str, path))}"] = getattr(value, "as_value", lambda v=value: v)()
    box = Instance(module, **args)
    if instance is None:
        m.submodules += box
    else:
        m.submodules[instance] = box
    return ports
