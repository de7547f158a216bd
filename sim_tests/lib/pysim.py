"""Amaranth's own simulator for components that are not worth a Verilator build."""
import gc
import warnings

from amaranth.sim import Simulator


def simulate(component, *benches, clocked=True):
    """Elaborate ``component`` and run the async functions ``benches`` (each gets the simulator's context) to their end.

    After ``await ctx.tick()`` a bench sees the state behind the clock edge; what it sets acts at once on combinational
    outputs. ``clocked``: False for a component without registers. Raises AssertionError on any warning of elaboration.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        simulator = Simulator(component)
        if clocked:
            simulator.add_clock(1e-6)
        for bench in benches:
            simulator.add_testbench(bench)
        simulator.run()
        gc.collect()
    assert not caught, f"simulation of {type(component).__name__} warns: {caught[0].message}"
