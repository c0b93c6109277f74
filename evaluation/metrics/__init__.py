"""Metrics and error bars: pure mathematics on features and moments."""
