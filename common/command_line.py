"""The wrapper of every command's `main`: exit codes for closed pipes and Ctrl-C. Imports no torch."""

from __future__ import annotations

import functools
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import ParamSpec

from pixlat.common.progress import say_last

P = ParamSpec("P")
HELP_WORDS = ("-h", "--help", "help")

# torch 2.15 warns about its internal use of TorchScript at the first forward-mode derivative.
# Users cannot do anything about it, so we hide the warning.
TORCH_ABOUT_ITSELF = r"`torch\.jit\.script` is deprecated"


def as_command(main: Callable[P, int]) -> Callable[P, int]:
    """Wraps a `main` that returns an exit code.

    If the reader of a pipe closes it (`... | head`), returns 141 as Unix tools do. After Ctrl-C returns 130.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        warnings.filterwarnings("ignore", message=TORCH_ABOUT_ITSELF, category=FutureWarning)
        try:
            code = main(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again at exit
            return 128 + signal.SIGPIPE
        except KeyboardInterrupt:
            say_last("interrupted. Finished files are kept.")
            return 128 + signal.SIGINT
        return code

    return wrapped
