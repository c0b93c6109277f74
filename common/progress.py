"""Progress bars that suit a terminal and a log file alike."""

from __future__ import annotations

import sys
import weakref
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 30.0  # between two lines where stderr is a file
_bars: weakref.WeakSet[tqdm[Any]] = weakref.WeakSet()


def progress_bar(
    title: str, total: int, initial: int = 0, unit: str = " images", enabled: bool = True, keep: bool = False
) -> tqdm[Any]:
    """Done, rate and time left, on stderr.

    In a log file: a new line now and then, none for what is over sooner. keep: leave the full bar standing.
    """
    terminal = sys.stderr.isatty()
    bar = tqdm(
        total=total,
        initial=initial,
        desc=title,
        unit=unit,
        mininterval=0.2 if terminal else LOG_SECONDS,
        delay=0 if terminal else LOG_SECONDS,
        leave=keep or not terminal,  # what is in a log file cannot be taken back, and its line must end
        disable=not enabled,
        dynamic_ncols=terminal,
        file=sys.stderr,
    )
    _bars.add(bar)
    return bar


def say_last(line: str) -> None:
    """Prints to stderr, on a line of its own, why the work is over.

    Progress bars that an error left open are closed.
    """
    for bar in list(_bars):
        bar.close()
    print(line, file=sys.stderr)


def print_beside_bar(line: str) -> None:
    """Prints to stderr a line that a progress bar, where one is shown, neither follows nor overwrites."""
    tqdm.write(line, file=sys.stderr)
