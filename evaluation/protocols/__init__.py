"""What a number is: the identity of a protocol, the named protocols of the papers, and the files that they need.

No torch.
"""
