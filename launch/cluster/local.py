"""Runs in several processes of this machine, through submitit's local executor."""

from __future__ import annotations

import json
import os
import stat
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pixlat.common.config.schema import ClusterConfig
from pixlat.common.errors import UserError
from pixlat.launch.cluster.planned import Planned, code_folder, jobs_folder, note, worker
from pixlat.launch.cluster.request import clean_environment, setup_lines
from pixlat.launch.job.folder import FAILURE, RESULT, is_finished

if TYPE_CHECKING:
    from submitit import Job

YEAR_MIN = 525_600


def run_locally(planned: Sequence[Planned]) -> int:
    """Executes the runs one after the other, each in its number of processes, through the code path of a cluster.

    Returns the largest exit code.
    """
    from pixlat.launch.cluster.local_job import WatchedExecutor

    code = 0
    for each in planned:
        if is_finished(each.folder):
            print(f"{each.folder} is finished")
            continue
        submitted = worker(each)
        cluster, copy = each.run.cluster, code_folder(each.run)
        gpus = visible_gpus(cluster.gpus_per_node or 0)
        options = {"max_num_timeout": cluster.max_timeouts, "python": cluster.python}
        executor = WatchedExecutor(fresh_folder(jobs_folder(each.run)), submitted.folder, gpus, **options)
        executor.update_parameters(
            tasks_per_node=cluster.tasks_a_node(),
            timeout_min=cluster.timeout_min or YEAR_MIN,
            signal_delay_s=cluster.signal_delay_s,
            setup=setup_lines(cluster, copy),
        )
        with clean_environment():
            job = executor.submit(submitted)
        note(each, job, copy)
        print(f"{each.folder}\n  {cluster.processes()} processes, log {job.paths.stdout}", flush=True)
        code = max(code, outcome(each, job))
    return code


def visible_gpus(count: int) -> list[str]:
    """The first `count` GPUs that this process may use, by their names in CUDA_VISIBLE_DEVICES.

    UserError if there are fewer.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return [str(number) for number in range(count)]
    gpus = [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    if len(gpus) < count:
        raise UserError(
            f"cluster.gpus_per_node={count}, but CUDA_VISIBLE_DEVICES={given!r} shows {len(gpus)}. "
            "Lower cluster.gpus_per_node, or add GPUs to CUDA_VISIBLE_DEVICES."
        )
    return gpus[:count]


def tell_idle_gpus(cluster: ClusterConfig) -> None:
    """Says that the run will not use this machine's GPUs, unless the user has set cluster.gpus_per_node."""
    if cluster.gpus_per_node is None and (idle := torch.cuda.device_count()):
        print(f"computing on CPUs, {idle} GPUs are here: set cluster.gpus_per_node={idle}", file=sys.stderr)


def fresh_folder(jobs: Path) -> Path:
    """Creates a new folder for each local job.

    submitit numbers local jobs by process id. Ids come again, so in a shared folder it could read an old job's result.
    """
    folder = Path(tempfile.mkdtemp(prefix="local-", dir=jobs))
    folder.chmod(stat.S_IMODE(jobs.stat().st_mode))  # mkdtemp shuts other users out, but they may need the logs
    return folder


def outcome(each: Planned, job: Job[Any]) -> int:
    """Waits for a local job, says how it ended, and returns its exit code."""
    # submitit has no other way to wait for a job without its result
    process = job._process  # type: ignore[attr-defined]
    try:
        process.wait()
    except KeyboardInterrupt:  # the terminal has sent the signal to the job's processes as well
        process.wait()
        print(
            f"interrupted. Finished files are in {each.folder}; run the same command again to continue.",
            file=sys.stderr,
        )
        return 130
    if (each.folder / RESULT).exists():
        print(f"  finished; pixlat leaderboard runs={each.run.out}")
        return 0
    failure = each.folder / FAILURE
    reason = json.loads(failure.read_text())["reason"] if failure.exists() else "it ended without a reason"
    print(f"error: {reason} Log: {job.paths.stdout}", file=sys.stderr)
    return 1
