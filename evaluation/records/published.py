"""The numbers that papers report (`published.csv`). Imports no torch.

The leaderboard shows them with source, table and status. It never ranks them and never puts them beside a measured
row. Every value is as printed in the source that the row names. status says where we saw the numbers: seen-primary
(in the authors' paper, page or repository), seen-secondary (in another paper's table) or unverified (nowhere).
unverified_fields lists the fields that we did not see in the source.
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
    """The rows in file order. Raises UserError for a file that is not such a table."""
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
