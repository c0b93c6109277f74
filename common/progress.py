"""Progress bars for terminals and for log files."""

from __future__ import annotations

import sys
import weakref
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 30.0  # time between two lines if stderr is a file
_bars: weakref.WeakSet[tqdm[Any]] = weakref.WeakSet()


def progress_bar(
    title: str, total: int, initial: int = 0, unit: str = " images", enabled: bool = True, keep: bool = False
) -> tqdm[Any]:
    """A bar on stderr with the number done, the rate and the time left.

    In a log file it writes one line every LOG_SECONDS, and none if the work ends sooner.
    keep: leave the bar on the screen at the end.
    """
    terminal = sys.stderr.isatty()
    bar = tqdm(
        total=total,
        initial=initial,
        desc=title,
        unit=unit,
        mininterval=0.2 if terminal else LOG_SECONDS,
        delay=0 if terminal else LOG_SECONDS,
        leave=keep or not terminal,  # a log file cannot be cleared, so the line must end
        disable=not enabled,
        dynamic_ncols=terminal,
        file=sys.stderr,
    )
    _bars.add(bar)
    return bar


def say_last(line: str) -> None:
    """Prints to stderr, on a separate line, why the program ends. First closes bars that an error left open."""
    for bar in list(_bars):
        bar.close()
    print(line, file=sys.stderr)


def print_beside_bar(line: str) -> None:
    """Prints a line to stderr without damaging a progress bar that is on the screen."""
    tqdm.write(line, file=sys.stderr)
