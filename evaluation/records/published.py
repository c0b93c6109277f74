"""The papers' own numbers (`published.csv`): shown with source, table and status, never ranked,
never beside a measured row. Imports no torch.

Every value is as printed in the source that the row names. status: seen-primary (in the authors' paper,
page or repository), seen-secondary (in another paper's table), unverified (not seen).
A field named in unverified_fields was not seen in the source.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TypeAlias

from pixlat.common.errors import UserError

FILE = Path(__file__).with_name("published.csv")
STATUSES = ("seen-primary", "seen-secondary", "unverified")

PublishedRow: TypeAlias = dict[str, str]


def read_published(path: Path = FILE) -> list[PublishedRow]:
    """The rows in file order. A file that is not one of ours is a UserError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as the table of published results: {error}") from error
    for number, row in enumerate(rows, start=2):
        missing = [name for name in ("system", "resolution", "source", "status") if not row.get(name)]
        if missing or None in row or row["status"] not in STATUSES:
            raise UserError(
                f"{path}, line {number}: "
                f"needs {', '.join(missing) or 'as many cells as the header, and a status of'} {', '.join(STATUSES)}."
            )
    return rows
