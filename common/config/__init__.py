"""The configuration of a run: its keys (schema.py), how a command line becomes a checked configuration (resolve.py),
and which keys can change a result (identity.py). Imports no torch.
"""
