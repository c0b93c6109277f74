"""Measures speed and memory on this machine. No score uses these numbers."""
