"""AXI4 and AXI4-Lite signatures. The members are flat, so a port ``m_axi`` comes out as ``m_axi__araddr`` and so on.

Source: Arm IHI 0022 (AXI protocol specification), chapters on AXI4 and AXI4-Lite.
"""
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

#: ID 0 and 1: enough for two independent read clients.
ID_BITS = 1
#: A burst must not cross a boundary of this size.
PAGE_BYTES = 4096
#: Address bits of the register port: one page, the smallest piece an interconnect gives to a slave.
REGISTER_ADDRESS_BITS = 12

RESP_OKAY, RESP_SLVERR = 0b00, 0b10
BURST_INCR = 0b01
#: Normal memory, not cacheable, bufferable.
CACHE_NORMAL = 0b0011


def read_members(bus):
    """Members of the AR and R channels seen from the master. ``bus``: `spec.config.BusConfig`."""
    return {
        "arid": Out(ID_BITS), "araddr": Out(bus.address_bits), "arlen": Out(8), "arsize": Out(3), "arburst": Out(2),
        "arlock": Out(1), "arcache": Out(4), "arprot": Out(3), "arvalid": Out(1), "arready": In(1),
        "rid": In(ID_BITS), "rdata": In(bus.data_bits), "rresp": In(2), "rlast": In(1), "rvalid": In(1),
        "rready": Out(1)}


def write_members(bus):
    """Members of the AW, W and B channels seen from the master. ``bus``: `spec.config.BusConfig`."""
    return {
        "awid": Out(ID_BITS), "awaddr": Out(bus.address_bits), "awlen": Out(8), "awsize": Out(3), "awburst": Out(2),
        "awlock": Out(1), "awcache": Out(4), "awprot": Out(3), "awvalid": Out(1), "awready": In(1),
        "wdata": Out(bus.data_bits), "wstrb": Out(bus.data_bits // 8), "wlast": Out(1), "wvalid": Out(1),
        "wready": In(1), "bid": In(ID_BITS), "bresp": In(2), "bvalid": In(1), "bready": Out(1)}


def read_signature(bus):
    """AXI4 master, read channels only."""
    return wiring.Signature(read_members(bus))


def write_signature(bus):
    """AXI4 master, write channels only."""
    return wiring.Signature(write_members(bus))


def master_signature(bus):
    """AXI4 master, all five channels."""
    return wiring.Signature(read_members(bus) | write_members(bus))


def lite_slave_signature():
    """AXI4-Lite slave with 32-bit data, members directed as the slave sees them (use with ``Out``)."""
    return wiring.Signature({
        "awaddr": In(REGISTER_ADDRESS_BITS), "awprot": In(3), "awvalid": In(1), "awready": Out(1),
        "wdata": In(32), "wstrb": In(4), "wvalid": In(1), "wready": Out(1),
        "bresp": Out(2), "bvalid": Out(1), "bready": In(1),
        "araddr": In(REGISTER_ADDRESS_BITS), "arprot": In(3), "arvalid": In(1), "arready": Out(1),
        "rdata": Out(32), "rresp": Out(2), "rvalid": Out(1), "rready": In(1)})
