"""The states of our jobs, from `squeue` alone, so no accounting database is needed. Does not import torch."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

SECONDS = 20  # time limit of a Slurm command, which waits for minutes if the controller is down
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "STOPPED")
WORKING = ("RUNNING", "CONFIGURING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT")


@dataclass(frozen=True)
class JobState:
    """One job, or one element of an array, as the controller sees it now."""

    state: str  # e.g. RUNNING, PENDING, NODE_FAIL
    nodes: str
    time_left: str  # until its time limit
    reason: str  # why it waits, or why it ended

    @property
    def alive(self) -> bool:
        """Whether it works or will work."""
        return self.state in WAITING + WORKING


def job_states() -> dict[str, JobState] | None:
    """All jobs of this user that the controller remembers, by id ("123", "123_4"); None if squeue does not answer."""
    listing = _squeue("--me", "--array")
    return None if listing is None else parse(listing)


def job_state(job_id: str) -> JobState | None:
    """One job; None if the controller does not know it or squeue does not answer."""
    listing = _squeue("--array", f"--jobs={job_id}")
    return None if listing is None else parse(listing).get(job_id)


def parse(listing: str) -> dict[str, JobState]:
    """Lines of `id|state|nodes|time left|reason`."""
    states = {}
    for line in listing.splitlines():
        job_id, state, nodes, time_left, reason = line.split("|", 4)
        states[job_id] = JobState(state, nodes, time_left, reason)
    return states


def _squeue(*arguments: str) -> str | None:
    command: Sequence[str] = ("squeue", "--noheader", "--states=all", "--format=%i|%T|%N|%L|%r", *arguments)
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
