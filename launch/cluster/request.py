"""A job's request to Slurm: GPUs, options, setup lines, and the text of its batch file."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pixlat.common.config.identity import run_folder
from pixlat.common.config.schema import ClusterConfig
from pixlat.common.errors import UserError
from pixlat.launch.cluster.planned import Planned, jobs_folder

GPU_OPTIONS = ("gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket")  # sbatch's, beside gres
PASSED_ON = (
    "account",
    "qos",
    "constraint",
    "nodelist",
    "exclude",
    "comment",
    "cpus_per_task",
    "mail_user",
    "mail_type",
)


def gpu_request(cluster: ClusterConfig) -> str | None:
    """The option in `cluster.sbatch` that requests GPUs, such as "gres=gpu:a100:8"; None if there is none."""
    for option in cluster.sbatch:
        key, _, value = option.removeprefix("--").partition("=")
        if key in GPU_OPTIONS or (key == "gres" and any(part.startswith("gpu") for part in value.split(","))):
            return option
    return None


def check_gpu_request(cluster: ClusterConfig) -> None:
    """UserError if the numbers of processes and GPUs would differ.

    A job starts one process for each of cluster.gpus_per_node, whichever option requests the GPUs.
    """
    request, count = gpu_request(cluster), cluster.gpus_per_node
    if cluster.gpu_type and (request or not count):
        other = f"cluster.sbatch asks with {request} as well" if request else "cluster.gpus_per_node=0 asks for no GPU"
        raise UserError(
            f"cluster.gpu_type={cluster.gpu_type} is a part of --gpus-per-node, but {other}. Change one of the two."
        )
    if request and not count:
        raise UserError(
            f"cluster.gpus_per_node=0 computes on CPUs, but cluster.sbatch asks for {request}. "
            "Set cluster.gpus_per_node to their number."
        )
    asked = gpus_of(request) if request else None
    if asked is not None and asked != count:
        raise UserError(
            f"cluster.sbatch asks for {asked} GPUs a machine with {request}, but cluster.gpus_per_node={count}. "
            "Give the same number in both."
        )


def gpus_of(request: str) -> int | None:
    """How many GPUs of a machine an option requests; None for options that do not count by machine."""
    key, _, value = request.removeprefix("--").partition("=")
    if key not in ("gres", "gpus-per-node"):
        return None
    words = (
        next((part for part in value.split(",") if key != "gres" or part.startswith("gpu")), "")
        .partition("(")[0]
        .split(":")
    )
    return int(words[-1]) if words[-1].isdigit() else 1


def batch_options(group: Sequence[Planned], code: Path, parents: Sequence[str]) -> dict[str, Any]:
    """submitit's parameters. Settings that the user left empty do not reach the scheduler."""
    run, cluster = group[0].run, group[0].run.cluster
    options = {key: value for key in PASSED_ON if (value := getattr(cluster, key)) is not None}
    dependencies = [
        *([f"afterok:{':'.join(parents)}"] if parents else []),
        *([cluster.dependency] if cluster.dependency else []),
    ]
    if dependencies:
        options["dependency"] = ",".join(dependencies)
    if cluster.exclusive:
        options["exclusive"] = True
    if cluster.gpus_per_node and not gpu_request(cluster):
        options["gpus_per_node"] = (
            f"{cluster.gpu_type}:{cluster.gpus_per_node}" if cluster.gpu_type else cluster.gpus_per_node
        )
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
    """Shell lines before the run: the site's lines, then ours.

    Ours make Python import pixlat from `code`, even if the working directory holds a folder of the same name.
    """
    threads = [f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{cluster.cpus_per_task}}}"] if cluster.cpus_per_task else []
    return [
        *cluster.setup,
        *threads,
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1",
    ]


def srun_arguments(cluster: ClusterConfig) -> list[str]:
    """Options of srun. When a process fails, srun ends the others, because they would wait for it.

    --cpus-per-task stands here as well, because some versions of srun do not inherit it from sbatch.
    """
    if cluster.srun_args is not None:
        return cluster.srun_args
    return ["--kill-on-bad-exit=1", *([f"--cpus-per-task={cluster.cpus_per_task}"] if cluster.cpus_per_task else [])]


def more_options(cluster: ClusterConfig) -> dict[str, Any]:
    """Options of sbatch that submitit has no parameter for.

    Slurm may requeue the job, and it cancels a job whose earlier stage has failed instead of letting it wait for ever.
    """
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
    """The command that starts Python in the job.

    USR2 would end the job before submitit has installed its handler. So the shell ignores it: exec keeps that setting,
    and the handler replaces it later.
    """
    return f"""sh -c 'trap "" USR2; exec "$0" "$@"' {cluster.python or shlex.quote(sys.executable)}"""


def sbatch_text(group: Sequence[Planned], code: Path, parents: Sequence[str] = ()) -> str:
    """The batch file that `submit` would send; needs no scheduler."""
    from submitit.slurm.slurm import _make_sbatch_string

    cluster, folder = group[0].run.cluster, jobs_folder(group[0].run) / "%j"
    runs = "\n".join(f"# run: {each.folder}" for each in group)
    if cluster.name != "slurm":
        return f"# cluster=local: {cluster.processes()} processes a run, one run after the other\n{runs}"
    command = f"{python_command(cluster)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    array: dict[str, Any] = {"map_count": len(group)} if len(group) > 1 else {}
    return (
        f"{_make_sbatch_string(command=command, folder=folder, **batch_options(group, code, parents), **array)}{runs}"
    )


@contextmanager
def clean_environment() -> Iterator[None]:
    """Hides the variables of the Slurm job that we may run in, because sbatch would reuse its request for the new job.

    SLURM_CONF stays, because it names the cluster.
    """
    from submitit.helpers import clean_env

    conf = os.environ.get("SLURM_CONF")
    with clean_env():
        if conf:
            os.environ["SLURM_CONF"] = conf
        yield
