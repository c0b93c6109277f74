"""Reads and writes records of runs and claims, curves of scores, and the papers' published rows. Imports no torch."""
