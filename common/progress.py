"""Progress bars that suit a terminal and a log file alike."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 30.0  # between two lines where stderr is a file


def progress_bar(title: str, total: int, initial: int = 0, unit: str = " images", enabled: bool = True, keep: bool = False) -> tqdm[Any]:
    """Done, rate and time left, on stderr. In a log file: a new line now and then, none for what is over sooner. keep: leave the full bar standing."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=title,
        unit=unit,
        mininterval=0.2 if terminal else LOG_SECONDS,
        delay=0 if terminal else LOG_SECONDS,
        leave=keep,
        disable=not enabled,
        dynamic_ncols=terminal,
        file=sys.stderr,
    )


def print_beside_bar(line: str) -> None:
    """Prints to stderr a line that a progress bar, where one is shown, neither follows nor overwrites."""
    tqdm.write(line, file=sys.stderr)
