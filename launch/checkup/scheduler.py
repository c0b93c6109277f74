"""Slurm: its programs, its controller, its partitions, and the settings of a job that would use the best of them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pixlat.launch.checkup.finding import Finding, note, ok, problem, run_tool

CONFIGURATIONS = (Path("/etc/slurm/slurm.conf"), Path("/etc/slurm-llnl/slurm.conf"), Path("/run/slurm/conf/slurm.conf"))
PROGRAMS = ("sbatch", "squeue", "scontrol", "srun")  # that jobs need; sinfo is for this report alone
FORMAT = "%P|%a|%l|%D|%G|%c"  # partition, state, time limit, machines, generic resources, CPUs a machine


@dataclass(frozen=True)
class Partition:
    """The machines of one kind in a partition."""

    name: str
    default: bool
    up: bool
    time_limit: str  # as Slurm writes it: 1-00:00:00 or infinite
    machines: int
    gpu_type: str  # empty where the site gives none
    gpus: int  # of one machine
    cpus: int  # of one machine


def findings() -> Iterator[Finding]:
    """All findings about Slurm; one where there is none, which is no fault."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if len(missing) == len(PROGRAMS):
        yield ok(
            "Slurm is not here. cluster=local starts several processes on this machine, cluster=slurm needs sbatch.",
            slurm=False,
        )
        return
    if missing:
        yield problem(
            f"Slurm is here without {', '.join(missing)}, which jobs need.",
            "use a login node, or: module load slurm",
            missing=missing,
        )
        return
    listing, why = run_tool(["sinfo", "--noheader", f"--format={FORMAT}"])
    if listing is None and not configured():
        yield note(
            "Slurm's programs are here, but no configuration says which cluster this is. cluster=slurm cannot be used.",
            "export SLURM_CONF=...",
        )
        return
    if listing is None:
        yield problem(
            f"Slurm's controller does not answer ({why}), so no job can be submitted.", "scontrol ping", reason=why
        )
        return
    partitions = parse(listing)
    yield from described(partitions)
    if job := os.environ.get("SLURM_JOB_ID"):
        yield note(f"This is inside of job {job}: GPUs, CPUs and memory above are those of the job.", job=job)


def configured() -> bool:
    """Whether this machine belongs to a cluster: SLURM_CONF, or a file at one of the usual places."""
    return "SLURM_CONF" in os.environ or any(file.exists() for file in CONFIGURATIONS)


def parse(listing: str) -> list[Partition]:
    """The lines of `sinfo` in our format. A machine with GPUs of several types counts once for each type."""
    found = []
    for line in listing.splitlines():
        name, state, limit, machines, resources, cpus = line.split("|", 5)
        for gpu_type, gpus in gpus_in(resources) or [("", 0)]:
            numbers = int(machines), gpu_type, gpus, int(re.sub(r"\D.*", "", cpus) or 0)
            found.append(Partition(name.rstrip("*"), name.endswith("*"), state == "up", limit, *numbers))
    return found


def gpus_in(resources: str) -> list[tuple[str, int]]:
    """(type, number) for the GPUs in a machine's generic resources: "gpu:a100:8(S:0-1),nvme:1" has [("a100", 8)]."""
    words = re.findall(r"(?:^|,)gpu:(?:([^:,()]+):)?(\d+)(?![^,(])", resources)
    return [(kind, int(count)) for kind, count in words]


def described(partitions: Sequence[Partition]) -> Iterator[Finding]:
    """A finding for each kind of machine, and the settings that would use the best one."""
    if not partitions:
        yield note(
            "Slurm's controller answers and lists no partition that you may use.",
            "ask the site's administrators for access",
        )
        return
    for each in partitions:
        gpus = f"{each.gpus} {each.gpu_type} GPUs".replace("  ", " ") if each.gpus else "no GPU"
        machines = f"{each.machines} machines with {gpus} and {each.cpus} CPUs each"
        text = f"Partition {each.name}: {machines}, at most {each.time_limit}."
        yield (
            ok(text, **vars(each))
            if each.up
            else note(f"{text} It takes no jobs now.", f"sinfo --partition={each.name}", **vars(each))
        )
    best = max(partitions, key=lambda each: (each.up, each.gpus > 0, each.default, each.machines * each.gpus))
    yield ok(f"The settings of a job there: {settings(best, partitions)}", settings=settings(best, partitions))


def settings(best: Partition, partitions: Sequence[Partition]) -> str:
    """The `cluster=` part of a command line for a whole machine of a partition."""
    types = {each.gpu_type for each in partitions if each.name == best.name and each.gpu_type}
    parts = ["cluster=slurm", f"cluster.partition={best.name}", f"cluster.gpus_per_node={best.gpus}"]
    if len(types) > 1:
        parts.append(f"cluster.gpu_type={best.gpu_type}")
    if best.gpus and best.cpus >= best.gpus:
        parts.append(f"cluster.cpus_per_task={best.cpus // best.gpus}")
    return " ".join([*parts, f"cluster.timeout_min={min(1440, minutes(best.time_limit) or 1440)}"])


def minutes(limit: str) -> int | None:
    """The minutes of "1-12:00:00", "30:00" or "45"; None for "infinite" and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit)
    if found is None:
        return int(limit) if limit.isdigit() else None
    days, hours, mins, _ = (int(part or 0) for part in found.groups())
    return max(1, (days * 24 + hours) * 60 + mins)
