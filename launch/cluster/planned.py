"""A run before its submission: its folder, what its job executes, and the line that the run folder keeps of the job."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixlat.common.config.identity import run_folder
from pixlat.common.config.schema import RunConfig, flatten, to_dict
from pixlat.common.files import append_row
from pixlat.common.origin import IMPORTED_FROM
from pixlat.launch.cluster.snapshot import take_snapshot
from pixlat.launch.cluster.worker import Worker
from pixlat.launch.job.folder import FAILURE, JOBS, open_folder

if TYPE_CHECKING:
    from submitit import Job


JOBS_FOLDER = ".jobs"  # beside the run folders: logs, batch files and copies of the code


@dataclass
class Planned:
    """A run, and the folders of the runs that must finish before it starts."""

    run: RunConfig
    after: tuple[Path, ...] = ()

    @property
    def folder(self) -> Path:
        return run_folder(self.run)


def worker(each: Planned) -> Worker:
    """The object that submitit sends to the job. Creates the run folder; UserError if it has other settings."""
    return Worker(as_overrides(each.run), open_folder(each.run).absolute())


def as_overrides(run: RunConfig) -> dict[str, str]:
    """The resolved configuration as keys and values of a command line."""
    settings = {key: json.dumps(value, ensure_ascii=False) for key, value in flatten(to_dict(run))}
    return {**settings, "method": run.method, "preset": run.preset}


def jobs_folder(run: RunConfig) -> Path:
    """The folder of logs, batch files and copies of the code."""
    return Path(run.out).absolute() / JOBS_FOLDER


def code_folder(run: RunConfig) -> Path:
    """The code that the job runs: a new copy, or this checkout if cluster.snapshot=false."""
    jobs_folder(run).mkdir(parents=True, exist_ok=True)
    return take_snapshot(jobs_folder(run)) if run.cluster.snapshot else IMPORTED_FROM


def note(each: Planned, job: Job[Any], code: Path) -> None:
    """Appends the job to the run folder's jobs.jsonl, and removes the failure of an earlier job."""
    (each.folder / FAILURE).unlink(missing_ok=True)
    row: Mapping[str, Any] = {
        "job": job.job_id,
        "log": str(job.paths.stdout),
        "cluster": each.run.cluster.name,
        "processes": each.run.cluster.processes(),
        "code": str(code),
        "submitted_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
    }
    append_row(each.folder / JOBS, row)
