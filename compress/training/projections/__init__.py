"""Projections by the name that recipes use; one module for each format."""
