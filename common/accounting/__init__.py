"""Counts the cost of a method without data: multiply-accumulates, parameters and memory."""
