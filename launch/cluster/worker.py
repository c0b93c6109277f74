"""One process of a job: what is submitted, and what it does when the scheduler wants its machine back.

    USR2 (preemption, time limit) or SIGTERM
      in training    all processes agree on a step, save there, and end; the first one asks for the job to be requeued
      elsewhere      everything on disk is whole, so the first process asks at once;
                     the others work on until it has left
    node failure     nothing is signalled; the requeued job goes on from the newest whole checkpoint

submitit loads this module before it listens to signals, and a signal before that would end the job for good:
nothing heavy is imported at its top.
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
    """One run as it is submitted: its settings as on the command line, and its folder. All state is in the folder."""

    settings: dict[str, str]
    folder: Path

    def __call__(self) -> None:
        from submitit import JobEnvironment
        from submitit.core.utils import UncompletedJobError

        environment = JobEnvironment()
        notice = Notice(environment)
        environment.paths.result_pickle.unlink(missing_ok=True)  # of an earlier start of this job
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
            if notice.received:  # the first process has left, so a connection broke
                leave(0)
            if reason := explain(error, self.folder):
                print(f"error: {reason}", file=sys.stderr)
                self.fail(environment, reason)
            traceback.print_exc()
            first_line = next(iter(str(error).strip().splitlines()), "")
            self.fail(environment, f"{type(error).__name__}: {first_line}")

    def work(self, environment: JobEnvironment) -> None:
        """Joins the other processes and does the run."""
        from pixlat.common.config.resolve import resolve
        from pixlat.methods import get_spec

        run = resolve(get_spec(self.settings["method"]), self.settings)
        export_processes(environment)
        check_gpus(run)
        from pixlat.launch.job.execute import run_one

        if told := run_one(run):
            print(told)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit queues again.

        `scontrol requeue` ends this job's processes, itself included unless it inherits that SIGTERM is ignored.
        """
        from submitit.core.utils import DelayedSubmission

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return DelayedSubmission(self)

    def fail(self, environment: JobEnvironment, reason: str) -> NoReturn:
        """Keeps the first failure of the job in the run folder, and ends this process,
        so that the scheduler ends the others.
        """
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
    """The scheduler's wish that the job ends soon."""

    def __init__(self, environment: JobEnvironment) -> None:
        self.environment = environment
        self.first = environment.global_rank == 0
        self.slurm = environment.cluster == "slurm"
        self.received = 0
        self._requeue: Any = None

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Within the block a signal makes the job leave; the training loop answers by itself, with `Stopped`."""
        # submitit's own: it counts time-outs, requeues and exits
        self._requeue = signal.signal(signal.SIGUSR2, self._receive)
        signal.signal(signal.SIGTERM, self._receive)
        try:
            yield
        except Exception as error:
            number = getattr(error, "signal_number", 0)  # of common.trainer.Stopped, not imported here
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
            except SystemExit as end:  # it is done; submitit's local scheduler wants the number that it gave
                leave(0 if self.slurm else int(end.code or 0))
            except (OSError, subprocess.SubprocessError) as error:
                raise UserError(
                    f"the job cannot be requeued ({error}). Everything is saved: run the same command again to go on."
                ) from error
        leave(0 if number == signal.SIGUSR2 else 128 + number)

    def _goes_on(self, number: int) -> bool:
        """Not if the job is being cancelled, which comes as a SIGTERM; the controller knows."""
        if not self.slurm:
            return number == signal.SIGUSR2
        state = job_state(self.environment.job_id)
        return number == signal.SIGUSR2 if state is None else state.state == "RUNNING"


def leave(code: int) -> NoReturn:
    """Ends the process now: at a usual exit a communication library could wait for processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def export_processes(environment: JobEnvironment) -> None:
    """Tells accelerate and torch.distributed who else works on the run.

    A job of one process is like one without a scheduler.
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
    """The same for all processes of a start of a job; another one after a requeue,
    when the old processes may still be ending.
    """
    return PORTS[(int(job_id) * 31 + int(restart)) % len(PORTS)]


def check_gpus(run: RunConfig) -> None:
    """A machine without its GPUs is refused, where computing on its CPUs would waste the allocation.

    A job without GPUs computes on CPUs.
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
    """This machine, as the scheduler calls it."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename
