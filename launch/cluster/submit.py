"""Turns runs into jobs. The runs of a sweep become one array, and jobs depend on the jobs of earlier stages.

Each submission gets a copy of the code. This module creates every run folder, so that users see a mistake at once and
not when the job starts. `launch/cluster/worker.py` is what a job executes; `pixlat status` shows the jobs' states.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from pixlat.common.config.identity import run_folder
from pixlat.common.config.schema import DataConfig, RunConfig
from pixlat.common.datasets.load import summarise
from pixlat.common.errors import UserError
from pixlat.common.files import read_rows
from pixlat.common.origin import IMPORTED_FROM
from pixlat.common.training.steps import split_batch
from pixlat.launch.cluster.local import run_locally, tell_idle_gpus, visible_gpus
from pixlat.launch.cluster.planned import Planned, code_folder, jobs_folder, note, worker
from pixlat.launch.cluster.request import (
    batch_options,
    check_gpu_request,
    clean_environment,
    python_command,
    sbatch_text,
)
from pixlat.launch.cluster.slurm import job_states
from pixlat.launch.job.dry_run import describe_run
from pixlat.launch.job.folder import JOBS, is_finished
from pixlat.launch.job.stages import stage_runs
from pixlat.methods import get_class
from pixlat.methods.base import DataInfo

REQUIRED = {
    "partition": "`sinfo -s` lists the partitions of this cluster",
    "timeout_min": (
        "minutes; within the partition's limit, which `sinfo -s` shows. A longer run continues after a requeue"
    ),
    "gpus_per_node": "a job starts one process for each GPU; 0 computes on CPUs",
}


def submit_all(runs: Sequence[RunConfig]) -> int:
    """Submits the runs, or with dry_run=true prints their descriptions and batch files. Returns the exit code."""
    levels = plan(runs)
    planned = [each for level in levels for each in level]
    for each in planned:
        check(each.run)
    if runs[0].cluster.name == "local":
        visible_gpus(runs[0].cluster.gpus_per_node or 0)
        tell_idle_gpus(runs[0].cluster)
    if runs[0].dry_run:
        print("\n\n".join(describe_run(each.run) for each in planned))
        print(
            "\n\n".join(
                [
                    "",
                    *(
                        sbatch_text(group, IMPORTED_FROM, [f"<job of {path}>" for path in group[0].after])
                        for group in groups(levels)
                    ),
                ]
            )
        )
        return 0
    if runs[0].cluster.name == "local":
        return run_locally(planned)
    ids = already_queued(planned)
    for group in groups(levels):
        waiting = [each for each in group if not is_finished(each.folder) and each.folder not in ids]
        if waiting:
            ids |= submit(waiting, [ids[path] for path in waiting[0].after if path in ids])
    if ids:
        print(f"how they are: pixlat status {runs[0].out}")
    return 0


def plan(runs: Sequence[RunConfig]) -> list[list[Planned]]:
    """The runs and their earlier stages in levels, each folder once. A run waits only for runs of earlier levels."""
    levels: list[list[Planned]] = []
    seen: dict[Path, int] = {}

    def place(run: RunConfig) -> int:
        folder = run_folder(run)
        if folder not in seen:
            earlier = [dataclasses.replace(stage, cluster=run.cluster) for stage in stage_runs(run).values()]
            seen[folder] = max((place(stage) + 1 for stage in earlier), default=0)
            levels.extend([] for _ in range(seen[folder] + 1 - len(levels)))
            levels[seen[folder]].append(Planned(run, tuple(map(run_folder, earlier))))
        return seen[folder]

    for run in runs:
        place(run)
    return levels


def groups(levels: Sequence[Sequence[Planned]]) -> Iterator[list[Planned]]:
    """Groups of runs that can be one array: they need the same resources and wait for the same runs."""
    for level in levels:
        alike: dict[str, list[Planned]] = {}
        for each in level:
            alike.setdefault(json.dumps([dataclasses.asdict(each.run.cluster), list(map(str, each.after))]), []).append(
                each
            )
        yield from alike.values()


def check(run: RunConfig) -> None:
    """UserError for settings with which the job would fail.

    These are missing cluster settings, a batch that the processes cannot share, and an impossible network.
    """
    cluster = run.cluster
    if cluster.name == "local" and cluster.nodes > 1:
        raise UserError(
            f"cluster=local has one machine, not cluster.nodes={cluster.nodes}. "
            "Use cluster.tasks_per_node for several processes."
        )
    for key, hint in REQUIRED.items() if cluster.name == "slurm" else ():
        if getattr(cluster, key) is None:
            raise UserError(
                f"cluster=slurm needs cluster.{key}: {hint}. A site's file can hold it (launch/clusters/README.md)."
            )
    if cluster.name == "slurm":
        check_gpu_request(cluster)
    split_batch(run.train, cluster.processes())
    with torch.device("meta"):
        get_class(run.method)(run.model, data_info(json.dumps(dataclasses.asdict(run.data))))


@functools.cache
def data_info(settings: str) -> DataInfo:
    """The data's facts for a method. Cached for all runs of a sweep, because listing a large folder takes long."""
    return DataInfo.of(summarise(DataConfig(**json.loads(settings))))


def already_queued(planned: Sequence[Planned]) -> dict[Path, str]:
    """The job ids of runs that are already waiting or running. Prints them, and prints which runs are finished."""
    states, queued = job_states() or {}, {}
    for each in planned:
        last = next(iter(read_rows(each.folder / JOBS)[-1:]), {"job": ""})["job"]
        if is_finished(each.folder):
            print(f"{each.folder} is finished")
        elif last in states and states[last].alive:
            print(f"{each.folder} is job {last} already, {states[last].state.lower()}")
            queued[each.folder] = last
    return queued


def submit(group: Sequence[Planned], parents: Sequence[str]) -> dict[Path, str]:
    """Submits runs that need the same resources as one job or one array.

    parents: ids of the jobs that must succeed before these start. Returns the job id of each run folder.
    """
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError

    run = group[0].run
    workers = [worker(each) for each in group]
    code = code_folder(run)
    try:
        executor = SlurmExecutor(
            jobs_folder(run) / "%j", max_num_timeout=run.cluster.max_timeouts, python=python_command(run.cluster)
        )
        executor.update_parameters(**batch_options(group, code, parents))
        with clean_environment(), executor.batch():
            jobs = [executor.submit(each) for each in workers]
    except (FailedJobError, RuntimeError) as error:
        raise UserError(f"the scheduler did not take the job. {error}") from error
    for each, job in zip(group, jobs, strict=True):
        note(each, job, code)
        after = f", after {', '.join(parents)}" if parents else ""
        print(f"{each.folder}\n  job {job.job_id}{after}, log {job.paths.stdout}")
    return {each.folder: job.job_id for each, job in zip(group, jobs, strict=True)}
