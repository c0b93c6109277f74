"""Renders tables of records. It leaves out a record that cannot be shown, names it, and shows all others."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from pixlat.evaluation.board.groups import Records
from pixlat.evaluation.board.text import printable, to_terminal
from pixlat.evaluation.records.record import Record

Shown = TypeVar("Shown")


def rendered(records: Records, show: Callable[[Records], Shown]) -> Shown:
    """`show(records)`. If it fails, it is called again without the records that make it fail.

    These records are named on stderr and in `left_out`, so that one record cannot hide the others.
    """
    try:
        return show(records)
    except Exception:  # a record may cause any type; if no single record causes it, we raise it again
        faults = {row["row_id"]: fault for row in records.rows if (fault := _fault(row, records, show))}
        if not faults:
            raise
    left_out = [
        f"{records.folders.get(row_id, row_id)}: its record cannot be shown: {fault}"
        for row_id, fault in faults.items()
    ]
    say_left_out(left_out)
    rows = [row for row in records.rows if row["row_id"] not in faults]
    return show(dataclasses.replace(records, rows=rows, left_out=[*records.left_out, *left_out]))


def _fault(row: Record, records: Records, show: Callable[[Records], object]) -> str | None:
    """The error that `show` raises for this record alone, or None."""
    try:
        show(dataclasses.replace(records, rows=[row]))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def say_left_out(reasons: Sequence[str]) -> None:
    for reason in reasons:
        print(f"left out: {printable(reason)}", file=sys.stderr)


def summary(records: Records, protocol: str | None) -> str:
    """The ranking of one protocol among the records of a folder, for a terminal."""
    return rendered(records, lambda shown: to_terminal(shown, protocol))
