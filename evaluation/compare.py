"""What methods or settings gain over the first one, with 95 % intervals, from finished runs.

  pixlat compare runs/sit-emoji32-demo-* runs/repa-emoji32-demo-* runs/reg-emoji32-demo-*
  pixlat compare runs/jit-emoji32-demo-*           two settings of one method, named by what differs

Runs that differ only in the training seed are one entry, and a seed is compared with the same seed.
With several seeds the interval (Student's t) is that of the mean over them, which includes the
randomness of training. With one it is the jackknife of the difference, of sampling alone: image i of
every run was made from the same noise and label. The verdict is better or worse if the interval
excludes zero, else open. Nothing is sampled again. Imports no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pixlat.common.command_line import as_command
from pixlat.common.errors import UserError
from pixlat.evaluation.board.gains import entries, table
from pixlat.evaluation.command import Syntax, help_text, run_command
from pixlat.evaluation.records.record import RESULT, read_record

SYNTAX = Syntax(paths=True)


def work(arguments: Sequence[str]) -> str:
    """The tables for the run folders."""
    records = [read_record(Path(folder).expanduser() / RESULT) for folder in arguments]
    if unknown := next((record["name"] for record in records if not record["metrics"] or "train" not in record), None):
        raise UserError(f"{unknown} was not trained and evaluated here; there is nothing to compare.")
    return table(entries(records))


@as_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(sys.argv[1:] if arguments is None else arguments, lambda: help_text(str(__doc__)), work)


if __name__ == "__main__":
    sys.exit(main())
