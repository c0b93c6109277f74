"""The parent of a local job's processes, which submitit's executor starts as
`python -m pixlat.launch.cluster.local_job FOLDER`.

submitit's own parent waits until every process has ended. If one is killed before it has connected to the others, they
wait for it for minutes. This parent ends them, and writes into the run folder which process failed first.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from submitit.core.utils import JobPaths
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE, Controller, LocalExecutor, LocalJob

from pixlat.common.files import write_whole
from pixlat.launch.job.folder import FAILURE

RUN_FOLDER = "PIXLAT_RUN_FOLDER"  # environment variable: the folder into which the parent writes failure.json
ASKED_TO_END = (128 + signal.SIGTERM, 128 + signal.SIGINT)  # exit codes of processes that saved everything and left
SLICE_S = 0.05  # seconds that the parent sleeps before it polls its processes again


class WatchedExecutor(LocalExecutor):
    """submitit's local executor with our parent process, and with GPUs by any name that CUDA accepts."""

    def __init__(self, folder: Path, run_folder: Path, gpus: Sequence[str], **options: Any) -> None:
        """gpus: the entries of CUDA_VISIBLE_DEVICES for the job, for example ["2", "3"]."""
        super().__init__(folder, **options)
        self.run_folder, self.gpus = run_folder, gpus

    def _submit_command(self, command: str) -> LocalJob[Any]:
        tasks = self.parameters["tasks_per_node"]
        environment = os.environ | {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_NTASKS": str(tasks),
            "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_TIMEOUT_S": str(60 * self.parameters["timeout_min"]),
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(self.parameters["signal_delay_s"]),
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_WITH_SHELL": "1",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
            "CUDA_VISIBLE_DEVICES": ",".join(self.gpus),
            RUN_FOLDER: str(self.run_folder),
        }
        parent = shlex.join([sys.executable, "-m", "pixlat.launch.cluster.local_job", str(self.folder)])
        process = subprocess.Popen(" && ".join([*self.parameters["setup"], parent]), shell=True, env=environment)
        return LocalJob(folder=self.folder, job_id=str(process.pid), process=process, tasks=list(range(tasks)))


class Parent(Controller):
    """Starts the processes, warns them before the time limit, restarts them after it; if one fails, ends the others."""

    def wait(self, freq: int = 24) -> Sequence[int | None]:
        """Waits until all processes have ended, one has failed, or the time is over.

        Returns their exit codes, None for a process that still runs.
        """
        start, warned = time.monotonic(), False
        while (seconds := time.monotonic() - start) < self.timeout_s:
            codes = [task.poll() for task in self.tasks]
            if failed := first_failure(codes):
                self.keep_failure(*failed)
                return codes
            if all(code is not None for code in codes):
                return codes
            if not warned and seconds >= self.timeout_s - self.signal_delay_s:
                warned = True
                self._forward_signal(signal.SIGUSR2)
            time.sleep(SLICE_S)
        return [task.poll() for task in self.tasks]

    def kill_tasks(self) -> None:
        """Ends the processes and waits for their end, so that none runs on after the command has returned."""
        tasks = self.tasks
        super().kill_tasks()
        for task in tasks:
            task.wait()

    def keep_failure(self, rank: int, code: int) -> None:
        """Writes failure.json, unless the process has written it.

        A process that got SIGKILL cannot have written it; another process that lost its connection may have.
        """
        file = Path(os.environ[RUN_FOLDER]) / FAILURE
        if file.exists() and signal_of(code) != signal.SIGKILL:
            return
        facts = {
            "reason": f"{cause(code)} process {rank} of {self.ntasks}, and the other processes were ended.",
            "job": self.pid,
            "process": rank,
            "node": os.uname().nodename,
            "log": str(JobPaths(self.folder, self.pid, rank).stdout),
            "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_whole(file, json.dumps(facts))


def first_failure(codes: Sequence[int | None]) -> tuple[int, int] | None:
    """(process, exit code) of a failed process, preferably one that a signal ended.

    None if no process has failed: the job continues, or the scheduler asked it to end.
    """
    if LOCAL_REQUEUE_RETURN_CODE in codes:
        return None
    failed = [(rank, code) for rank, code in enumerate(codes) if code not in (None, 0, *ASKED_TO_END)]
    return min(
        ((rank, code) for rank, code in failed if code is not None),
        key=lambda each: signal_of(each[1]) is None,
        default=None,
    )


def signal_of(code: int) -> signal.Signals | None:
    """The signal that ended a process, from the exit code of Python (-9) or of a shell around it (137)."""
    number = -code if code < 0 else code - 128
    return signal.Signals(number) if number in set(signal.Signals) else None


def cause(code: int) -> str:
    """The beginning of a sentence that says what ended a process."""
    name = signal_of(code)
    if name == signal.SIGKILL:
        return "SIGKILL, which the system sends when memory runs out, ended"
    return f"{name.name} ended" if name else f"The exit code {code}, whose reason is in the log, ended"


if __name__ == "__main__":
    Parent(Path(sys.argv[1])).run()
