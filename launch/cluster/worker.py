"""One process of a job: what it executes, and how it answers when the scheduler wants its machine back.

    USR2 (preemption, time limit) or SIGTERM
      in training    all processes agree on a step, save a checkpoint there, and end; process 0 requeues the job
      elsewhere      all files on disk are complete, so process 0 requeues the job at once;
                     the others continue until it has left
    node failure     no process gets a signal; the requeued job continues from the newest complete checkpoint

submitit loads this module before it installs its signal handlers, and an earlier signal would end the job for good.
So the module imports nothing slow at its top.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from pixlat.common.errors import UserError
from pixlat.launch.cluster.slurm import job_state
from pixlat.launch.job.failures import explain
from pixlat.launch.job.folder import FAILURE

if TYPE_CHECKING:
    from submitit import JobEnvironment
    from submitit.core.utils import DelayedSubmission

    from pixlat.common.config.schema import RunConfig

PORTS = range(20_000, 32_000)  # below those that Linux hands out to clients


@dataclass(frozen=True)
class Worker:
    """One submitted run: its settings as on a command line, and its folder, which holds all state."""

    settings: dict[str, str]
    folder: Path

    def __call__(self) -> None:
        from submitit import JobEnvironment
        from submitit.core.utils import UncompletedJobError

        environment = JobEnvironment()
        notice = Notice(environment)
        environment.paths.result_pickle.unlink(missing_ok=True)  # an earlier start of this job may have left one
        if notice.first:
            (self.folder / FAILURE).unlink(missing_ok=True)
        try:
            with notice.heeded():
                self.work(environment)
        except UncompletedJobError as error:  # submitit will not requeue
            self.fail(
                environment, f"{error} The limit is cluster.max_timeouts={self.settings.get('cluster.max_timeouts')}."
            )
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            self.fail(environment, str(error))
        except Exception as error:
            if notice.received:  # process 0 has left, which broke the connection to it
                leave(0)
            if reason := explain(error, self.folder):
                print(f"error: {reason}", file=sys.stderr)
                self.fail(environment, reason)
            traceback.print_exc()
            first_line = next(iter(str(error).strip().splitlines()), "")
            self.fail(environment, f"{type(error).__name__}: {first_line}")

    def work(self, environment: JobEnvironment) -> None:
        """Joins the other processes and executes the run."""
        from pixlat.common.config.resolve import resolve
        from pixlat.methods import get_spec

        run = resolve(get_spec(self.settings["method"]), self.settings)
        export_processes(environment)
        check_gpus(run)
        from pixlat.launch.job.execute import run_one

        if message := run_one(run):
            print(message)

    def checkpoint(self) -> DelayedSubmission:
        """The object that submitit puts into the queue again.

        `scontrol requeue` ends all processes of this job, and it is one of them. So it must inherit an ignored SIGTERM.
        """
        from submitit.core.utils import DelayedSubmission

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return DelayedSubmission(self)

    def fail(self, environment: JobEnvironment, reason: str) -> NoReturn:
        """Writes the job's first failure into the run folder and ends this process. The scheduler ends the others."""
        facts = {
            "reason": reason,
            "job": environment.job_id,
            "process": environment.global_rank,
            "node": node_name(),
            "log": str(environment.paths.stdout),
        }
        try:
            with (self.folder / FAILURE).open("x") as file:
                json.dump(facts | {"utc": datetime.now(UTC).isoformat(timespec="seconds")}, file)
        except OSError as error:  # another process was first, or the disk is full: the log has the reason
            print(f"{FAILURE} is not written: {error}", file=sys.stderr)
        leave(1)


class Notice:
    """The scheduler's signal that the job should end soon, and this process's answer to it."""

    def __init__(self, environment: JobEnvironment) -> None:
        self.environment = environment
        self.first = environment.global_rank == 0
        self.slurm = environment.cluster == "slurm"
        self.received = 0
        self._requeue: Any = None

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """In this block a signal ends the job. The training loop has its own handlers and raises `Stopped`."""
        # submitit's handler, which counts time-outs, requeues the job and exits
        self._requeue = signal.signal(signal.SIGUSR2, self._receive)
        signal.signal(signal.SIGTERM, self._receive)
        try:
            yield
        except Exception as error:
            number = getattr(error, "signal_number", 0)  # Stopped has it; its module is too slow to import here
            if not number:
                raise
            print(error, file=sys.stderr)
            self._leave(number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self.first:
            self._leave(number)

    def _leave(self, number: int) -> NoReturn:
        self.received = number
        if self.first and self._goes_on(number):
            try:
                self._requeue(signal.SIGUSR2, None)
            except SystemExit as end:  # the job is requeued; submitit's local scheduler reads its own exit code
                leave(0 if self.slurm else int(end.code or 0))
            except (OSError, subprocess.SubprocessError) as error:
                raise UserError(
                    f"the job cannot be requeued ({error}). Everything is saved; "
                    "run the same command again to continue."
                ) from error
        leave(0 if number == signal.SIGUSR2 else 128 + number)

    def _goes_on(self, number: int) -> bool:
        """Whether to requeue. A cancelled job gets SIGTERM like a preempted one, so this asks the controller."""
        if not self.slurm:
            return number == signal.SIGUSR2
        state = job_state(self.environment.job_id)
        return number == signal.SIGUSR2 if state is None else state.state == "RUNNING"


def leave(code: int) -> NoReturn:
    """Ends the process at once. During a usual exit a communication library could wait for processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def export_processes(environment: JobEnvironment) -> None:
    """Sets the variables from which accelerate and torch.distributed learn the ranks and the meeting point.

    A job of one process needs none of them.
    """
    world = environment.num_tasks
    if world > 1:
        os.environ |= {
            "RANK": str(environment.global_rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(environment.local_rank),
            "LOCAL_WORLD_SIZE": str(world // environment.num_nodes),
            "MASTER_ADDR": environment.hostnames[0] if environment.num_nodes > 1 else "127.0.0.1",
            "MASTER_PORT": str(meeting_port(environment.raw_job_id, os.environ.get("SLURM_RESTART_COUNT", "0"))),
        }


def meeting_port(job_id: str, restart: str) -> int:
    """The port at which the processes meet. A requeued job gets another one, since its old processes may still run."""
    return PORTS[(int(job_id) * 31 + int(restart)) % len(PORTS)]


def check_gpus(run: RunConfig) -> None:
    """UserError on a machine whose GPUs do not work, because computing on its CPUs would waste the allocation.

    A job that requests no GPUs computes on CPUs.
    """
    import torch

    wanted = run.cluster.gpus_per_node
    if not wanted:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    elif not torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU") != "true":
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "none")
        raise UserError(
            f"{node_name()} was to give {wanted} GPUs (given: {given}), and torch {torch.__version__} can use none. "
            f"Submit again with cluster.exclude={node_name()}, or with cluster.gpus_per_node=0 to compute on CPUs."
        )


def node_name() -> str:
    """The scheduler's name for this machine."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename
