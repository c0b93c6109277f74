#!/usr/bin/env python3
"""A private Slurm cluster on this machine: real daemons, several nodes, pretend GPUs. Standard library only.

    eval "$(python tests/local_slurm.py start FOLDER --gpus 2)"    # sets SLURM_CONF and PATH of this shell
    python launch/run.py method=jit cluster=slurm cluster.partition=main ...
    python tests/local_slurm.py stop FOLDER

Debian's packages are enough: apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge

Everything lives in FOLDER; the daemons are plain processes of the caller, without systemd,
cgroups or anything under /etc. A node is one more slurmd, named after a loopback address (127.0.0.11, ...),
because submitit makes node names into MASTER_ADDR and they must resolve inside jobs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pwd
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

PACKAGES = "slurmctld slurmd slurm-client munge"
DAEMONS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "squeue")
MAX_SOCKET_PATH = 107  # bytes: sun_path holds one more, the terminating NUL
STOP_ORDER = ("slurmd", "slurmctld", "munged")  # all of them sign with munge

Process = dict[str, Any]  # name, pid, and the kernel's start time, because a pid can be used again

# submitit asks sacct how a job ended. Without an accounting database the controller still knows,
# and tells it through squeue.
SACCT = """\
#!/bin/sh
ids=
while [ $# -gt 0 ]; do
    if [ "$1" = -j ]; then ids=$ids,$2; shift; fi
    shift
done
echo "JobID|State|NodeList"
exec squeue --noheader --states=all --format="%i|%T|%N" ${ids:+--jobs="${ids#,}"}
"""

# cred_expire is how long a requeued job has to wait (default 120 s),
# and sched_interval another part of it (default 60 s).
# config_overrides lets a node claim more than the machine has, so that the request meant for a large
# cluster can be submitted here.
# FirstJobId: a result that an older job of the same number left would be taken for the new job's.
# "urgent" takes the nodes of jobs in "main", which are signalled and have GraceTime seconds left.
CONFIG = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU={memory_per_cpu}
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=1
FirstJobId={first_job}
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
{gres_types}
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=30 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""


class ClusterError(RuntimeError):
    """What the user can mend; printed without a traceback."""


class Cluster:
    """The cluster of one folder."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).resolve()
        self.state_file = self.folder / "cluster.json"
        outer = ("SLURM", "SBATCH", "SRUN", "SALLOC", "SQUEUE", "SINFO", "SCANCEL")  # of a cluster that we may be in
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(outer)}
        self.environment["SLURM_CONF"] = str(self.folder / "slurm.conf")
        self.environment["PATH"] = f"{self.folder / 'bin'}:{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"

    def client(self, *command: str, seconds: float = 20) -> str:
        """The output of a Slurm command; bounded, because without a controller most of them wait for minutes."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=seconds, check=True
        ).stdout

    def processes(self) -> list[Process]:
        """The daemons that were started here, also those that have ended."""
        return json.loads(self.state_file.read_text()) if self.state_file.exists() else []

    # -- start ---------------------------------------------------------------------------------------------------------

    def start(
        self, nodes: int = 2, cpus: int = 8, memory_mb: int = 64_000, gpus: int = 0, seconds: float = 30
    ) -> list[str]:
        """Starts the daemons and waits until all nodes are idle; returns the nodes' names.

        After a failure nothing is left running.
        """
        self.check()
        if any(map(is_alive, self.processes())):
            raise ClusterError(f"a cluster is running in {self.folder}; stop it first")
        self.stop()  # what a killed predecessor may have left
        for name in ("state", "spool", "log", "run", "dev", "bin"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(parents=True)
        (self.folder / "bin/sacct").write_text(SACCT)
        (self.folder / "bin/sacct").chmod(0o755)
        names = [f"127.0.0.{11 + i}" for i in range(nodes)]
        try:
            self.write_config(names, cpus, memory_mb, gpus)
            self.start_munge()
            self.spawn("slurmctld", ["slurmctld", "-D"])
            for name in names:
                self.start_node(name)
            self.wait_idle(names, seconds)
        except BaseException:
            self.stop()
            raise
        return names

    def check(self) -> None:
        """Refuses a machine without Slurm, and a folder that its sockets or its configuration cannot name."""
        if missing := [name for name in DAEMONS if not shutil.which(name, path=self.environment["PATH"])]:
            raise ClusterError(
                f"not found: {', '.join(missing)}. apt-get install -y --no-install-recommends {PACKAGES}"
            )
        longest = self.folder / "spool/127.0.0.200/127.0.0.200_1234567.4294967290"  # slurmstepd's socket
        if len(str(longest)) > MAX_SOCKET_PATH or any(sign in str(self.folder) for sign in " \t#=,[]%\\\"'"):
            raise ClusterError(
                "the path is too long for sockets or has signs that slurm.conf cannot hold: "
                f"{self.folder}. Choose a shorter one."
            )

    def write_config(self, names: list[str], cpus: int, memory_mb: int, gpus: int) -> None:
        """slurm.conf, cgroup.conf, and gres.conf where there are GPUs."""
        port, *ports = free_ports(len(names) + 1)
        host, gres = socket.gethostname().split(".")[0], f"Gres=gpu:{gpus} " if gpus else ""
        lines = [
            (
                f"NodeName={name} NodeHostname={host} NodeAddr={name} Port={p} CPUs={cpus} "
                f"RealMemory={memory_mb} {gres}State=UNKNOWN"
            )
            for name, p in zip(names, ports, strict=True)
        ]
        text = CONFIG.format(
            host=host, port=port, user=pwd.getpwuid(os.geteuid()).pw_name,
            folder=self.folder, memory_per_cpu=max(1, memory_mb // cpus),
            first_job=1 + int(time.time()) % 60_000_000,
            gres_types="GresTypes=gpu" if gpus else "", nodes="\n".join(lines),
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(text)
        # slurmd loads a cgroup plugin even if nothing uses it; the one that it detects wants systemd,
        # this one nothing. Slurm 24.05 can do without.
        version = tuple(int(part) for part in self.client("slurmd", "-V").split()[-1].split(".")[:2])
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={'disabled' if version >= (24, 5) else 'cgroup/v1'}\n")
        for i in range(gpus):  # a GPU must be a character device to be handed out, and a link to /dev/null is one
            (self.folder / f"dev/gpu{i}").symlink_to("/dev/null")
        if gpus:
            (self.folder / "gres.conf").write_text(
                f"Name=gpu File={self.folder}/dev/gpu{f'[0-{gpus - 1}]' if gpus > 1 else '0'}\n"
            )

    def start_munge(self) -> None:
        """munged with a key and a socket of its own; --force, because it distrusts folders that others cannot enter."""
        key, sock = self.folder / "run/munge.key", self.folder / "run/munge.sock"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        own_files = [f"--{kind}-file={self.folder}/run/munged.{kind}" for kind in ("pid", "seed", "log")]
        self.spawn("munged", ["munged", "--foreground", "--force", f"--socket={sock}", f"--key-file={key}", *own_files])

        def answers() -> bool:
            return (
                subprocess.run(
                    ["munge", "-n", "-S", str(sock)], env=self.environment, capture_output=True, check=False
                ).returncode
                == 0
            )

        if not wait_for(answers, 10):
            raise ClusterError(f"munged does not answer\n{self.log_tails(['munged'])}")

    def start_node(self, name: str) -> None:
        """One slurmd."""
        (self.folder / "spool" / name).mkdir(exist_ok=True)
        self.spawn(f"slurmd.{name}", ["slurmd", "-D", "-N", name])

    def spawn(self, name: str, command: list[str]) -> None:
        """Starts a daemon that outlives this process and keeps it in mind; a signal in between is put off."""
        with (self.folder / f"log/{name}.out").open("ab") as out, signals_held():
            child = subprocess.Popen(
                command,
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
            self.state_file.write_text(
                json.dumps(
                    [*self.processes(), {"name": name, "pid": child.pid, "start": started_at(child.pid)}], indent=1
                )
            )

    def wait_idle(self, names: Iterable[str], seconds: float) -> None:
        """Until every node is idle; a daemon that ends meanwhile is an error with the end of its log."""
        wanted = {f"{name} idle" for name in names}

        def ready() -> bool:
            newest = {p["name"]: p for p in self.processes()}
            if dead := [name for name, process in newest.items() if not is_alive(process)]:
                raise ClusterError(f"{', '.join(dead)} ended at once\n{self.log_tails(dead)}")
            try:
                return wanted <= set(self.client("sinfo", "-h", "-N", "-o", "%N %T", seconds=5).splitlines())
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
                return False

        if not wait_for(ready, seconds):
            raise ClusterError(
                f"nodes are not idle after {seconds} s\n{self.log_tails([p['name'] for p in self.processes()])}"
            )

    def log_tails(self, names: Iterable[str], lines: int = 15) -> str:
        """The ends of the daemons' logs."""
        found = [
            path for name in names for path in sorted((self.folder / "log").glob(f"{name}.*")) if path.stat().st_size
        ]
        return "\n".join(
            f"--- {path}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) for path in found
        )

    # -- stop ----------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Cancels all jobs, then ends the daemons, then whatever the jobs left behind."""
        daemons = self.processes()
        if any(p["name"] == "slurmctld" and is_alive(p) for p in daemons):
            self.cancel_jobs()
        stuck = [p for kind in STOP_ORDER for p in end([d for d in daemons if d["name"].split(".")[0] == kind])]
        stuck += end(self.leftovers(), grace=2)
        if stuck:
            raise ClusterError(f"still alive: {stuck}")
        self.state_file.unlink(missing_ok=True)

    def cancel_jobs(self) -> None:
        """Ends every job; one that ignores SIGTERM takes KillWait seconds."""
        with contextlib.suppress(subprocess.SubprocessError):
            if ids := sorted(set(self.client("squeue", "-h", "-o", "%A").split())):
                self.client("scancel", *ids)
                wait_for(lambda: not self.client("squeue", "-h", "-o", "%A").split(), 15, 0.3)

    def leftovers(self) -> list[Process]:
        """Processes of this cluster's jobs and their step daemons, by the SLURM_CONF in their environment;
        the caller's own family is not meant.
        """
        mark, spared = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode(), ancestors(os.getpid())
        found = []
        for pid in set(pids()) - spared:
            variables = environment_of(pid)
            in_job = any(
                variable.startswith(b"SLURM_JOB_ID=") for variable in variables
            ) or b"slurmstepd" in command_of(pid)
            if mark in variables and in_job:
                found.append({"name": "leftover", "pid": pid, "start": started_at(pid)})
        return found

    def kill_node(self, name: str) -> None:
        """What a power failure does to a node: its daemon, its step daemons and the processes of its jobs
        end at once, without a word.
        """
        daemon = next(p["pid"] for p in reversed(self.processes()) if p["name"] == f"slurmd.{name}")
        marks = {f"SLURM_CONF={self.environment['SLURM_CONF']}".encode(), f"SLURMD_NODENAME={name}".encode()}
        of_jobs = [pid for pid in pids() if marks <= environment_of(pid)]
        keepers = {parent for pid in of_jobs for parent in ancestors(pid) if b"slurmstepd" in command_of(parent)}
        for pid in (daemon, *keepers, *of_jobs):  # in this order, so that none can report the end of the others
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


# -- processes ---------------------------------------------------------------------------------------------------------


def started_at(pid: int) -> int | None:
    """The kernel's start time of a live process, None if it is gone or a zombie, which signals still reach."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_alive(process: Process) -> bool:
    """Whether this very process still runs."""
    return process["start"] is not None and started_at(process["pid"]) == process["start"]


def pids() -> list[int]:
    """All processes."""
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]


def environment_of(pid: int) -> set[bytes]:
    """The variables that a process was started with; none if it is gone or not ours to look at."""
    try:
        return set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:
        return set()


def command_of(pid: int) -> bytes:
    """The short name of a process."""
    try:
        return Path(f"/proc/{pid}/comm").read_bytes()
    except OSError:
        return b""


def ancestors(pid: int) -> set[int]:
    """The process and those it descends from."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        while pid > 1:
            found.add(pid)
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return found


def end(processes: list[Process], grace: float = 10.0) -> list[Process]:
    """SIGTERM, then SIGKILL after the grace; only to the processes given. Returns those that live on."""
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 5.0)):
        for process in filter(is_alive, processes):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process["pid"], number)
        wait_for(lambda: not any(map(is_alive, processes)), seconds)
    return [process for process in processes if is_alive(process)]


def wait_for(condition: Callable[[], bool], seconds: float, step: float = 0.1) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(step)
    return True


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Puts off SIGINT and SIGTERM, so that no child is started and then forgotten."""
    held: list[int] = []
    before = {number: signal.signal(number, lambda n, _: held.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in held:
            signal.raise_signal(number)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; held open together, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    for name in ("start", "stop", "env"):
        action = actions.add_parser(name)
        action.add_argument("folder")
        if name == "start":
            action.add_argument("--nodes", type=int, default=2)
            action.add_argument("--cpus", type=int, default=8, help="that each node claims")
            action.add_argument("--memory-mb", type=int, default=64_000, help="that each node claims")
            action.add_argument("--gpus", type=int, default=0, help="pretend GPUs of each node")
    options = vars(parser.parse_args())
    for number in (signal.SIGINT, signal.SIGTERM):  # a start that is interrupted cleans up
        signal.signal(number, lambda n, _: sys.exit(128 + n))
    cluster, action = Cluster(options.pop("folder")), options.pop("action")
    try:
        if action == "start":
            print(f"idle: {' '.join(cluster.start(**options))}", file=sys.stderr)
        elif action == "stop":
            cluster.stop()
        if action in ("start", "env"):
            print(f"export SLURM_CONF={shlex.quote(cluster.environment['SLURM_CONF'])}")
            print(f'export PATH={shlex.quote(str(cluster.folder / "bin"))}:"$PATH":/usr/sbin:/sbin')
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
