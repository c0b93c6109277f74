"""From runs to jobs: the runs of a sweep are one array, earlier stages are dependencies, and each submission has a copy of the code.

Every run folder is made here, so a mistake is told now and not tomorrow; `launch/worker.py` is what the jobs do, `launch/status.py` tells how they are.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shlex
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.config import ClusterConfig, DataConfig, RunConfig, flatten, run_folder, to_dict
from common.datasets import summarise
from common.errors import UserError
from common.files import append_row, read_rows
from common.origin import ROOT
from common.trainer import split_batch
from launch.dry_run import describe_run
from launch.folder import FAILURE, JOBS, RESULT, is_finished, open_folder
from launch.slurm import job_states
from launch.snapshot import take_snapshot
from launch.stages import stage_runs
from launch.worker import Worker
from methods import get_class
from methods.base import DataInfo

if TYPE_CHECKING:
    from submitit import Job

JOBS_FOLDER = ".jobs"  # beside the run folders: logs, batch files and copies of the code
YEAR_MIN = 525_600
REQUIRED = {
    "partition": "`sinfo -s` lists the partitions of this cluster",
    "timeout_min": "minutes; within the partition's limit, which `sinfo -s` shows. A longer run goes on after a requeue",
    "gpus_per_node": "a process is started for each; 0 computes on CPUs",
}
GPU_OPTIONS = ("gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket")  # of sbatch, beside gres
PASSED_ON = ("account", "qos", "constraint", "nodelist", "exclude", "comment", "cpus_per_task", "mail_user", "mail_type")


@dataclass
class Planned:
    """A run, and the folders of those that must be finished before it starts."""

    run: RunConfig
    after: tuple[Path, ...] = ()

    @property
    def folder(self) -> Path:
        return run_folder(self.run)


def submit_all(runs: Sequence[RunConfig]) -> int:
    """Submits the runs, or with dry_run prints what would be submitted. Returns the exit code."""
    levels = plan(runs)
    planned = [each for level in levels for each in level]
    for each in planned:
        check(each.run)
    if runs[0].cluster.name == "local":
        visible_gpus(runs[0].cluster.gpus_per_node or 0)
        tell_idle_gpus(runs[0].cluster)
    if runs[0].dry_run:
        print("\n\n".join(describe_run(each.run) for each in planned))
        print("\n\n".join(["", *(sbatch_text(group, ROOT, [f"<job of {path}>" for path in group[0].after]) for group in groups(levels))]))
        return 0
    if runs[0].cluster.name == "local":
        return run_locally(planned)
    ids = already_queued(planned)
    for group in groups(levels):
        waiting = [each for each in group if not is_finished(each.folder) and each.folder not in ids]
        if waiting:
            ids |= submit(waiting, [ids[path] for path in waiting[0].after if path in ids])
    if ids:
        print(f"how they are: python launch/status.py {runs[0].out}")
    return 0


def plan(runs: Sequence[RunConfig]) -> list[list[Planned]]:
    """The runs and those that must come first, each folder once, in levels: a run waits for runs of earlier levels only."""
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
    """The runs that can be one array: the same resources, waiting for the same runs."""
    for level in levels:
        alike: dict[str, list[Planned]] = {}
        for each in level:
            alike.setdefault(json.dumps([dataclasses.asdict(each.run.cluster), list(map(str, each.after))]), []).append(each)
        yield from alike.values()


def check(run: RunConfig) -> None:
    """Refuses what could only fail in the job: settings that the site requires, a batch that the processes cannot share, an impossible network."""
    cluster = run.cluster
    if cluster.name == "local" and cluster.nodes > 1:
        raise UserError(f"cluster=local has one machine, not cluster.nodes={cluster.nodes}. Use cluster.tasks_per_node for several processes.")
    for key, hint in REQUIRED.items() if cluster.name == "slurm" else ():
        if getattr(cluster, key) is None:
            raise UserError(f"cluster=slurm needs cluster.{key}: {hint}. A site's file can hold it (launch/clusters/README.md).")
    if cluster.name == "slurm":
        check_gpu_request(cluster)
    split_batch(run.train, cluster.processes())
    with torch.device("meta"):
        get_class(run.method)(run.model, data_info(json.dumps(dataclasses.asdict(run.data))))


def gpu_request(cluster: ClusterConfig) -> str | None:
    """The option of `cluster.sbatch` that asks for GPUs by itself, such as "gres=gpu:a100:8"."""
    for option in cluster.sbatch:
        key, _, value = option.removeprefix("--").partition("=")
        if key in GPU_OPTIONS or (key == "gres" and any(part.startswith("gpu") for part in value.split(","))):
            return option
    return None


def check_gpu_request(cluster: ClusterConfig) -> None:
    """Refuses a job whose processes and GPUs would not match: a process is started for each of cluster.gpus_per_node, whoever asks for the GPUs."""
    request, count = gpu_request(cluster), cluster.gpus_per_node
    if cluster.gpu_type and (request or not count):
        other = f"cluster.sbatch asks with {request} as well" if request else "cluster.gpus_per_node=0 asks for no GPU"
        raise UserError(f"cluster.gpu_type={cluster.gpu_type} is a part of --gpus-per-node, but {other}. Give one of the two.")
    if request and not count:
        raise UserError(f"cluster.gpus_per_node=0 computes on CPUs, but cluster.sbatch asks for {request}. Set cluster.gpus_per_node to their number.")
    asked = gpus_of(request) if request else None
    if asked is not None and asked != count:
        raise UserError(f"cluster.sbatch asks for {asked} GPUs a machine with {request}, but cluster.gpus_per_node={count}. Give one number in both.")


def gpus_of(request: str) -> int | None:
    """GPUs of a machine that an option asks for; none where it counts otherwise."""
    key, _, value = request.removeprefix("--").partition("=")
    if key not in ("gres", "gpus-per-node"):
        return None
    words = next((part for part in value.split(",") if key != "gres" or part.startswith("gpu")), "").partition("(")[0].split(":")
    return int(words[-1]) if words[-1].isdigit() else 1


@functools.cache
def data_info(settings: str) -> DataInfo:
    """What a method may know of the data; the runs of a sweep share it, since a large folder takes a while to list."""
    return DataInfo.of(summarise(DataConfig(**json.loads(settings))))


def already_queued(planned: Sequence[Planned]) -> dict[Path, str]:
    """The job of each run that waits or works already; says so, and says which runs are finished."""
    states, queued = job_states() or {}, {}
    for each in planned:
        last = next(iter(read_rows(each.folder / JOBS)[-1:]), {"job": ""})["job"]
        if is_finished(each.folder):
            print(f"{each.folder} is finished")
        elif last in states and states[last].alive:
            print(f"{each.folder} is job {last} already, {states[last].state.lower()}")
            queued[each.folder] = last
    return queued


# -- Slurm ----------------------------------------------------------------------------------------------------------------------


def submit(group: Sequence[Planned], parents: Sequence[str]) -> dict[Path, str]:
    """Submits runs of the same resources as one job, or as one array; `parents`: the jobs that must succeed before. Returns their ids."""
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError

    run = group[0].run
    workers = [worker(each) for each in group]
    code = code_folder(run)
    try:
        executor = SlurmExecutor(jobs_folder(run) / "%j", max_num_timeout=run.cluster.max_timeouts, python=python_command(run.cluster))
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


def batch_options(group: Sequence[Planned], code: Path, parents: Sequence[str]) -> dict[str, Any]:
    """submitit's parameters: only what was asked for is passed on to the scheduler."""
    run, cluster = group[0].run, group[0].run.cluster
    options = {key: value for key in PASSED_ON if (value := getattr(cluster, key)) is not None}
    dependencies = [*([f"afterok:{':'.join(parents)}"] if parents else []), *([cluster.dependency] if cluster.dependency else [])]
    if dependencies:
        options["dependency"] = ",".join(dependencies)
    if cluster.exclusive:
        options["exclusive"] = True
    if cluster.gpus_per_node and not gpu_request(cluster):
        options["gpus_per_node"] = f"{cluster.gpu_type}:{cluster.gpus_per_node}" if cluster.gpu_type else cluster.gpus_per_node
    return options | {
        "job_name": run_folder(run).name if len(group) == 1 else "pixlat",
        "partition": cluster.partition,
        "time": cluster.timeout_min,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.tasks_a_node(),
        "array_parallelism": cluster.array_parallelism,
        "signal_delay_s": cluster.signal_delay_s,
        "stderr_to_stdout": True,
        "wckey": None,
        "setup": setup_lines(cluster, code),
        "srun_args": srun_arguments(cluster),
        "additional_parameters": more_options(cluster),
    }


def setup_lines(cluster: ClusterConfig, code: Path) -> list[str]:
    """Shell lines before the run: the site's, then ours, which make Python take the code from its folder, whatever the working directory holds."""
    threads = [f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{cluster.cpus_per_task}}}"] if cluster.cpus_per_task else []
    return [*cluster.setup, *threads, f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}", "export PYTHONSAFEPATH=1"]


def srun_arguments(cluster: ClusterConfig) -> list[str]:
    """A process that fails ends the others, which would wait for it; some versions of srun do not inherit sbatch's --cpus-per-task."""
    if cluster.srun_args is not None:
        return cluster.srun_args
    return ["--kill-on-bad-exit=1", *([f"--cpus-per-task={cluster.cpus_per_task}"] if cluster.cpus_per_task else [])]


def more_options(cluster: ClusterConfig) -> dict[str, Any]:
    """Options of sbatch that submitit has no name for. A job may be requeued, and one whose earlier stage failed does not wait for ever."""
    options: dict[str, Any] = {"requeue": True, "kill-on-invalid-dep": "yes"}
    if cluster.mem_gb is not None:
        options["mem"] = f"{round(cluster.mem_gb * 1024)}M" if cluster.mem_gb else "0"
    if cluster.reservation:
        options["reservation"] = cluster.reservation
    for option in cluster.sbatch:
        key, equals, value = option.removeprefix("--").partition("=")
        options[key] = value if equals else True
    return options


def python_command(cluster: ClusterConfig) -> str:
    """Python in the job. A signal before submitit listens would end the job, so it is ignored until then: that survives exec, and a handler replaces it."""
    return f"""sh -c 'trap "" USR2; exec "$0" "$@"' {cluster.python or shlex.quote(sys.executable)}"""


def sbatch_text(group: Sequence[Planned], code: Path, parents: Sequence[str] = ()) -> str:
    """The batch file that would be submitted; needs no scheduler."""
    from submitit.slurm.slurm import _make_sbatch_string

    cluster, folder = group[0].run.cluster, jobs_folder(group[0].run) / "%j"
    runs = "\n".join(f"# run: {each.folder}" for each in group)
    if cluster.name != "slurm":
        return f"# cluster=local: {cluster.processes()} processes a run, one run after the other\n{runs}"
    command = f"{python_command(cluster)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    array: dict[str, Any] = {"map_count": len(group)} if len(group) > 1 else {}
    return f"{_make_sbatch_string(command=command, folder=folder, **batch_options(group, code, parents), **array)}{runs}"


@contextmanager
def clean_environment() -> Iterator[None]:
    """Hides the job that we may be in from the scheduler, which else would hand its request down; but not which cluster this is."""
    from submitit.helpers import clean_env

    conf = os.environ.get("SLURM_CONF")
    with clean_env():
        if conf:
            os.environ["SLURM_CONF"] = conf
        yield


# -- several processes of this machine ------------------------------------------------------------------------------------------


def run_locally(planned: Sequence[Planned]) -> int:
    """Runs one after the other, each in as many processes as asked for, through the code path of a cluster. Returns the exit code."""
    from launch.local_job import WatchedExecutor

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
    """The first `count` of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them. Fewer than that are a UserError."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return [str(number) for number in range(count)]
    gpus = [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    if len(gpus) < count:
        raise UserError(f"cluster.gpus_per_node={count}, but CUDA_VISIBLE_DEVICES={given!r} shows {len(gpus)}. Lower the one or widen the other.")
    return gpus[:count]


def tell_idle_gpus(cluster: ClusterConfig) -> None:
    """Says that the processes of this machine will leave its GPUs alone, where nobody has said that they shall."""
    if cluster.gpus_per_node is None and (idle := torch.cuda.device_count()):
        print(f"computing on CPUs, {idle} GPUs are here: set cluster.gpus_per_node={idle}", file=sys.stderr)


def fresh_folder(jobs: Path) -> Path:
    """A folder of its own for a local job: its number is that of a process, which comes again, and submitit would take an old result for the new one."""
    folder = Path(tempfile.mkdtemp(prefix="local-", dir=jobs))
    folder.chmod(stat.S_IMODE(jobs.stat().st_mode))  # mkdtemp's are closed to everybody else, and there are logs in it
    return folder


def outcome(each: Planned, job: Job[Any]) -> int:
    """Waits for a local job and says how it ended."""
    process = job._process  # type: ignore[attr-defined]  # submitit has no other way to wait for a job without its result
    try:
        process.wait()
    except KeyboardInterrupt:  # the terminal has told the job's processes, too
        process.wait()
        print(f"interrupted; what is whole is kept in {each.folder}. Run the same command again to go on.", file=sys.stderr)
        return 130
    if (each.folder / RESULT).exists():
        print(f"  finished; python evaluation/leaderboard.py --runs {each.run.out}")
        return 0
    failure = each.folder / FAILURE
    reason = json.loads(failure.read_text())["reason"] if failure.exists() else "it ended without a reason"
    print(f"error: {reason} Log: {job.paths.stdout}", file=sys.stderr)
    return 1


# -- what both need -------------------------------------------------------------------------------------------------------------


def worker(each: Planned) -> Worker:
    """What is submitted for a run; makes its folder, and refuses one of other settings."""
    return Worker(as_overrides(each.run), open_folder(each.run).absolute())


def as_overrides(run: RunConfig) -> dict[str, str]:
    """The resolved configuration as `key` -> value of a command line."""
    settings = {key: json.dumps(value, ensure_ascii=False) for key, value in flatten(to_dict(run))}
    return {**settings, "method": run.method, "preset": run.preset}


def jobs_folder(run: RunConfig) -> Path:
    """Where logs, batch files and copies of the code are kept."""
    return Path(run.out).absolute() / JOBS_FOLDER


def code_folder(run: RunConfig) -> Path:
    """The code that the job runs: a copy, or with cluster.snapshot=false this checkout."""
    jobs_folder(run).mkdir(parents=True, exist_ok=True)
    return take_snapshot(jobs_folder(run)) if run.cluster.snapshot else ROOT


def note(each: Planned, job: Job[Any], code: Path) -> None:
    """Keeps in the run folder which job works on it."""
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
