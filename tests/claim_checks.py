"""What test_claims.py gives to processes of their own in the place of a claim.

Imports nothing heavy, as every process imports it anew.
"""

import os
import signal


def done_or_not(name, quick, folder):
    """Fails or dies where the name says so; otherwise leaves its folder."""
    if name == "fails":
        raise ValueError("on purpose")
    if name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    folder.mkdir()
