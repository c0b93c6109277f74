"""Layers that several methods use with identical numerics."""
