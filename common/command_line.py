"""What every command of the project does around its work: a reader that leaves early ends it quietly.

Imports no torch.
"""

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

# torch 2.15 warns of its own use of TorchScript, at the first forward-mode derivative.
# No user can do anything about it.
TORCH_ABOUT_ITSELF = r"`torch\.jit\.script` is deprecated"


def as_command(main: Callable[P, int]) -> Callable[P, int]:
    """A `main` that returns an exit code.

    When the reader of a pipe leaves (`... | head`), it returns 141 as the shell's own tools do, after Ctrl-C 130.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        warnings.filterwarnings("ignore", message=TORCH_ABOUT_ITSELF, category=FutureWarning)
        try:
            code = main(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
            return 128 + signal.SIGPIPE
        except KeyboardInterrupt:
            say_last("interrupted. Files that are finished are kept.")
            return 128 + signal.SIGINT
        return code

    return wrapped
