"""The keys of a run: what they are, how a command line becomes a checked configuration,
and which of them make a run what it is. No torch.
"""
