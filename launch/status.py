"""Shows the state of all runs: progress, time left, score, job and log.

  pixlat status                    the runs in ./runs
  pixlat status FOLDER             the runs in FOLDER
  pixlat status FOLDER json=true   one JSON object for each run

It asks `squeue` and no accounting database. The states:

finished     the run has a complete result.json
running      a process holds the run's lock, or its job is running
waiting      its job is queued; Slurm's reason stands below the table
failed       its last job ended with an error, which stands with its log below the table
stopped      no process or job works on it; the same command again continues it
damaged      a file of its folder cannot be read; the error stands below the table, and the other
             runs are shown as usual
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate

from pixlat.common.command_line import as_command
from pixlat.common.config.saved import MAX_CONFIG_BYTES
from pixlat.common.errors import UserError
from pixlat.common.files import open_regular, read_json, read_rows, read_text
from pixlat.evaluation.command import Syntax, from_flags, help_text, parse, run_command, split_words
from pixlat.evaluation.records.record import read_record
from pixlat.launch.cluster.slurm import JobState, job_states
from pixlat.launch.job.folder import FAILURE, JOBS, LOCK, RESULT, is_locked

SIGNS = (
    "error:",
    "Error",
    "slurmstepd:",
    "srun: error",
    "oom",
    "Killed",
)  # a line of a log with one of these probably says why the job ended
LOG_END = 2**16  # bytes at the end of metrics.jsonl that are read; a line has some hundred


@dataclass(frozen=True)
class Row:
    """One run."""

    name: str
    state: str
    progress: str
    images_per_s: str
    left: str
    job: str
    log: str
    reason: str = ""
    score: str = ""


@dataclass
class Keys:
    """The command's keys."""

    out: str = "runs"  # the folder that holds the run folders; `pixlat status FOLDER` sets it as well
    json: bool = False  # print one JSON object for each run instead of the table


SYNTAX = Syntax(Keys, paths=True)
HEADERS = ("run", "state", "done", "images/s", "time left", "score", "job", "log")


@as_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(
        sys.argv[1:] if arguments is None else arguments, lambda: help_text(str(__doc__), Keys), work, alone=True
    )


def work(arguments: Sequence[str]) -> str:
    """The table, and below it the reasons why runs failed or wait."""
    words, given = split_words(from_flags(Keys, arguments))
    keys, _ = parse(Keys, [*(f"out={word}" for word in words), *given])
    folder = Path(keys.out).expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no folder {keys.out}. Give the out= of your runs.")
    rows = statuses(folder)
    if keys.json:
        return "\n".join(json.dumps(vars(row)) for row in rows)
    shown = [
        (row.name, row.state, row.progress, row.images_per_s, row.left, row.score, row.job, row.log) for row in rows
    ]
    table = tabulate(shown, headers=HEADERS, disable_numparse=True)
    return "\n\n".join([table, *(f"{row.name}: {row.reason}" for row in rows if row.reason)])


def statuses(out: Path) -> list[Row]:
    """One row for each run folder, in the order of names."""
    folders = sorted(file.parent for file in out.glob("*/config.yaml"))
    jobs = job_states() if any((folder / JOBS).exists() for folder in folders) else {}
    return [guarded_status(folder, jobs) for folder in folders]


def guarded_status(folder: Path, jobs: Mapping[str, JobState] | None) -> Row:
    """The row of one run. Any error becomes its row, so that one damaged folder does not hide the other runs."""
    try:
        return status(folder, jobs)
    except Exception as error:
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        reason = f"{message} (in {folder})" if str(folder) not in message else message
        return Row(folder.name, "damaged", "", "", "", "", "", reason)


def status(folder: Path, jobs: Mapping[str, JobState] | None) -> Row:
    """The row of one run. jobs: the scheduler's jobs by id; None if it does not answer."""
    submitted = next(iter(read_rows(folder / JOBS)[-1:]), {})
    job_id, log = submitted.get("job", ""), submitted.get("log", "")
    job = (jobs or {}).get(job_id)
    state, reason = explain_state(folder, job, log)
    if jobs is None and submitted.get("cluster") == "slurm" and state == "stopped":
        state, reason = "unknown", "the scheduler does not answer"
    reasons = [each for each in (reason, damaged_checkpoint(folder)) if each]
    return Row(
        folder.name,
        state,
        *progress(folder, state),
        job_id,
        log,
        " ".join(reasons),
        score(folder) if state == "finished" else "",
    )


def score(folder: Path) -> str:
    """The run's first distance (fd, rfd or fid; smaller is better) or, without one, its first metric."""
    metrics = read_record(folder / RESULT)["metrics"]
    name = next((name for name in metrics if name.startswith(("fd_", "rfd_", "fid"))), next(iter(metrics), None))
    return "" if name is None else f"{name} {metrics[name]['value']:.4g}"


def damaged_checkpoint(folder: Path) -> str:
    """A sentence if a file of the newest checkpoint has a wrong size, else an empty string.

    Only a start of the run compares digests, because that takes long.
    """
    manifests = sorted(folder.glob("checkpoints/step-*/manifest.json"))
    if not manifests:
        return ""
    newest = manifests[-1].parent
    for name, expected in read_json(manifests[-1]).items():
        file = newest / name
        if not file.is_file() or file.stat().st_size != expected["bytes"]:
            fault = (
                f"has {file.stat().st_size} bytes instead of {expected['bytes']}" if file.is_file() else "is missing"
            )
            return f"The newest checkpoint is damaged: {file} {fault}."
    return ""


def explain_state(folder: Path, job: JobState | None, log: str) -> tuple[str, str]:
    """(state, reason), from the files in the folder and the scheduler's state of the last job."""
    if (folder / RESULT).exists():
        read_record(folder / RESULT)  # an error if the file is empty or altered
        return "finished", ""
    if job is not None and job.alive:
        return ("waiting", job.reason) if job.state == "PENDING" else ("running", "")
    if works(folder):
        return "running", ""
    if (folder / FAILURE).exists():
        failure = read_json(folder / FAILURE)
        return "failed", f"{failure['reason']} Log: {failure['log']}"
    if job is None or job.state == "COMPLETED":
        return "stopped", ""
    why = f" ({job.reason})" if job.reason not in ("None", "") else ""
    return "failed" if job.state != "CANCELLED" else "stopped", f"{job.state}{why}: {last_words(log)} Log: {log}"


def works(folder: Path) -> bool:
    """Whether a process on this file system holds the run's lock. A start at the same moment waits a second for us."""
    if not (folder / LOCK).exists():
        return False
    with (folder / LOCK).open("r+") as lock:
        return is_locked(lock)


def last_words(log: str) -> str:
    """The last line of a log that looks like the reason why the job ended."""
    if not log or not Path(log).exists():
        return "it wrote no log."
    with Path(log).open("rb") as file:
        file.seek(max(0, Path(log).stat().st_size - 20_000))
        lines = file.read().decode(errors="replace").splitlines()
    return next(
        (line.strip() for line in reversed(lines) if any(sign in line for sign in SIGNS)), "the log does not say why."
    )


def progress(folder: Path, state: str) -> tuple[str, str, str]:
    """(share of the training images, images/s, time left) as text; empty where a value is not known."""
    total = training_images(folder)
    last = last_row(folder / "metrics.jsonl") or {"images": 0, "images_per_s": None}
    done = min(1.0, last["images"] / total) if total else 1.0
    if state == "finished":
        return "100 %", "", ""
    speed = last["images_per_s"]
    missing = max(0, total - last["images"])
    left = "evaluating" if not missing else clock(missing / speed) if speed else ""
    return f"{100 * done:.0f} %", f"{speed:.4g}" if speed else "", left if state == "running" else ""


def training_images(folder: Path) -> int:
    """train.images in config.yaml. Reads it fast and without checks, which a start makes (common/config/saved.py)."""
    file = folder / "config.yaml"
    try:
        return int(
            yaml.load(read_text(file, MAX_CONFIG_BYTES), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["train"][
                "images"
            ]
        )
    except (yaml.YAMLError, RecursionError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is damaged: {str(error).partition(chr(10))[0] or type(error).__name__}. Restore it, or "
            "remove the folder."
        ) from error


def last_row(file: Path) -> dict[str, Any] | None:
    """The last complete line of a JSON-lines file, of which it reads only the end. None if there is none.

    UserError if that line is damaged.
    """
    if not file.exists():
        return None
    with open_regular(file) as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - LOG_END))
        *lines, _ = stream.read(LOG_END).split(b"\n")
    if not lines:
        return None
    try:
        row = json.loads(lines[-1])
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise UserError(f"the last line of {file} is damaged. Remove it.")
    return row


def clock(seconds: float) -> str:
    """ "3 d 04:05", "4:05:06" """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours // 24} d {hours % 24:02}:{minute:02}" if hours >= 24 else f"{hours}:{minute:02}:{second:02}"


if __name__ == "__main__":
    sys.exit(main())
