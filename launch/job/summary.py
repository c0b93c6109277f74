"""The summary of a finished run in the terminal: leaderboard, scores, warnings, files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixlat.common.weights import checkpoint
from pixlat.evaluation import leaderboard
from pixlat.evaluation.records.record import read_record
from pixlat.launch.job.folder import RESULT
from pixlat.launch.job.job import Job
from pixlat.launch.job.remarks import warning_lines


def summary(job: Job) -> str:
    """The leaderboard of the runs in the same folder under the same protocol, then this run's scores and files."""
    row = read_record(job.folder / RESULT)
    records = leaderboard.read_records(Path(job.run.out))
    warnings = warning_lines(row, records.rows)
    files = [job.folder / name for name in (*row["artifacts"].values(), RESULT) if name]
    newest = checkpoint.latest(job.folder / "checkpoints")
    return "\n".join(
        [
            leaderboard.summary(records, row["protocol_hash"]),
            "\nthis run",
            *(f"  {name:<20} {entry['value']:.4g}{error_of(entry)}" for name, entry in row["metrics"].items()),
            *(["\nwarnings", *warnings] if warnings else []),
            "\nfiles",
            *(f"  {path}" for path in [*files, *([newest] if newest else [])]),
            f"all runs: pixlat leaderboard runs={job.run.out}",
        ]
    )


def error_of(entry: Mapping[str, Any]) -> str:
    """ " ± 0.1" for a metric with a standard error."""
    return "" if entry.get("se") is None else f" ± {entry['se']:.2g}"
