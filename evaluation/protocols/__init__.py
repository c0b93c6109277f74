"""Protocols: the identity (hash) of a measurement, the named protocols of the papers, and the files that they need.

Imports no torch.
"""
