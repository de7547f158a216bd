"""Compressed network and configuration to program and memory image."""
from lowering.lower import LayerInfo, Lowered, lower

__all__ = ["LayerInfo", "Lowered", "lower"]
