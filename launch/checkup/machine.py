"""CPUs and memory of this process, free space and permission to write, and the shared memory of loader processes."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pixlat.common.cache import cache_folder, folder_bytes
from pixlat.launch.checkup.finding import Finding, note, ok, problem

GIGA = 1e9
CGROUP = Path("/sys/fs/cgroup")
CPUINFO, MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
SHARED_MEMORY = Path("/dev/shm")
MATRIX_UNITS = {
    "amx_bf16": "bf16 matrix units (AMX)",
    "avx512_bf16": "bf16 vector units (AVX-512)",
}  # flags of /proc/cpuinfo
SMALL_MEMORY_GB = 4  # a demo takes about 1.5 GB, its evaluation included
LITTLE_DISK_GB, HARDLY_ANY_DISK_GB = 5, 0.3  # a demo's folder takes 0.05 to 0.3 GB, one of an ImageNet run some 10 GB
SMALL_SHARED_MEMORY_GB = 1  # eight loader processes hold some 16 batches of 256 images of 256 px: 0.8 GB


def findings(out: str) -> Iterator[Finding]:
    """All findings about this machine. out: the folder in which runs will be kept."""
    yield from cpus()
    yield memory()
    yield from writable("out", Path(out).expanduser())
    yield from writable("the cache", cache_folder())
    yield cache_size(cache_folder())
    yield from shared_memory()


# -- CPUs --------------------------------------------------------------------------------------------------------------


def usable_cpus() -> int:
    """CPUs that this process may use, by its affinity (set by Slurm) and its control group (set by containers)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, int(cpu_limit() or allowed)))


def cpu_limit() -> float | None:
    """CPUs that the control group grants; None without a limit. Version 2 has cpu.max, version 1 two files."""
    files = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))
    for names in files:
        if all((CGROUP / name).exists() for name in names):
            quota, period = " ".join((CGROUP / name).read_text().strip() for name in names).split()[:2]
            return None if quota in ("max", "-1") else int(quota) / int(period)
    return None


def cpus() -> Iterator[Finding]:
    """The CPUs against the threads that torch will start, and their units for bf16."""
    count, asked = usable_cpus(), os.environ.get("OMP_NUM_THREADS", "")
    threads = int(asked) if asked.isdigit() else torch_threads()
    units = [name for flag, name in MATRIX_UNITS.items() if flag in cpu_flags()]
    available = f"this process may use {count} of {os.cpu_count()} CPUs"
    text = f"{processor()}: {available}, and torch starts {threads} threads."
    facts = {"cpus": count, "threads": threads, "processor": processor(), "bf16_units": units}
    if threads > count:
        why = (
            f"OMP_NUM_THREADS={asked} asks for them"
            if asked
            else "torch does not know the limit of the container or job"
        )
        yield note(f"{text} Threads will wait for each other: {why}.", f"export OMP_NUM_THREADS={count}", **facts)
    elif asked and threads < count:
        yield note(
            f"{text} OMP_NUM_THREADS={asked} leaves the others idle.",
            f"unset OMP_NUM_THREADS  # or train.threads={count}",
            **facts,
        )
    else:
        yield ok(text, **facts)
    if units:
        yield ok(
            f"The CPU has {' and '.join(units)}. train.precision=auto takes fp32 on CPUs; bf16 would use these units."
        )


def processor() -> str:
    """The CPU's model name; a shorter one where torch, which pixlat.common.hardware needs, is missing."""
    try:
        from pixlat.common.hardware import processor_name
    except ImportError:
        return platform.machine()
    return processor_name()


def torch_threads() -> int:
    """The threads that torch starts for one operation; the number of CPUs where torch is missing."""
    try:
        import torch
    except ImportError:
        return os.cpu_count() or 1
    return torch.get_num_threads()


def cpu_flags() -> set[str]:
    """What Linux says that the CPU can do; empty elsewhere."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


# -- memory and space --------------------------------------------------------------------------------------------------


def memory() -> Finding:
    """The memory that is free, or what the control group still grants if that is less."""
    free = [amount for amount in (system_memory_gb(), group_memory_gb()) if amount is not None]
    if not free:
        return note("How much memory is free cannot be told on this system.")
    text = f"{min(free):.1f} GB of memory are free for this process."
    if min(free) < SMALL_MEMORY_GB:
        return note(
            f"{text} A demo takes about 1.5 GB, larger networks more.",
            "end other programs, or ask the scheduler for more memory",
            free_gb=min(free),
        )
    return ok(text, free_gb=min(free))


def system_memory_gb() -> float | None:
    """What Linux can still give to programs; None on other systems."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", MEMINFO.read_text()) if MEMINFO.exists() else None
    return int(found[1]) * 1024 / GIGA if found else None


def group_memory_gb() -> float | None:
    """What the control group's limit still grants; None without a limit."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        if (CGROUP / limit).exists() and (CGROUP / used).exists():
            text = (CGROUP / limit).read_text().strip()
            return (
                (int(text) - int((CGROUP / used).read_text())) / GIGA if text.isdigit() and int(text) < 2**60 else None
            )
    return None


def writable(what: str, folder: Path) -> Iterator[Finding]:
    """Whether a folder, or the one in which it will be made, takes files and locks, and how much space is left."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    advice = "give another folder: out=..." if what == "out" else "export PIXLAT_CACHE_DIR=..."
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            locks = can_lock(file.fileno())
    except OSError as error:
        if what == "out":
            yield problem(
                f"Nothing can be written to {place} for {what}: {error.strerror}.", advice, folder=str(folder)
            )
        else:
            yield note(
                f"Nothing can be written to {place} for {what}: {error.strerror}. Its contents are computed each time.",
                advice,
            )
        return
    if not locks and what == "out":
        yield problem(
            f"The file system of {place} has no locks, which keep two processes out of one run folder.",
            advice,
            folder=str(folder),
        )
    yield space(what, folder, shutil.disk_usage(place).free / GIGA, advice)


def cache_size(folder: Path) -> Finding:
    """Where the user's cache is, and how large. Nothing in it is needed, so a large one is no fault."""
    size = folder_bytes(folder) / GIGA
    kept = "listings of data sets and features of real images"
    return ok(f"The cache is {folder} and holds {size:.2f} GB ({kept}). You may remove it.", cache_gb=size)


def space(what: str, folder: Path, free_gb: float, advice: str) -> Finding:
    """The free space of a folder's disk."""
    text = f"{free_gb:.1f} GB are free for {what} ({folder})."
    if free_gb < HARDLY_ANY_DISK_GB:
        return problem(f"{text} Not even a demo is sure to fit.", advice, free_gb=free_gb, folder=str(folder))
    if free_gb < LITTLE_DISK_GB:
        return note(
            f"{text} A demo takes up to 0.3 GB, a run at 256 px about 10 GB.",
            advice,
            free_gb=free_gb,
            folder=str(folder),
        )
    return ok(text, free_gb=free_gb, folder=str(folder))


def can_lock(descriptor: int) -> bool:
    """Whether the file system knows locks; another process that holds one proves that it does."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno == errno.EWOULDBLOCK
    return True


def shared_memory() -> Iterator[Finding]:
    """/dev/shm, in which loader processes (data.workers) hand over their batches. Containers often have 64 MB of it."""
    if not SHARED_MEMORY.is_dir():
        return
    size = shutil.disk_usage(SHARED_MEMORY).total / GIGA
    if size < SMALL_SHARED_MEMORY_GB:
        use = "Loader processes hand their batches over in it and die with a bus error when it is full."
        yield note(
            f"{SHARED_MEMORY} has {size:.2f} GB. {use}",
            "docker run --shm-size=8g ...  # or data.workers=0",
            shared_gb=size,
        )
    else:
        yield ok(f"{SHARED_MEMORY} has {size:.1f} GB for the batches of loader processes.", shared_gb=size)
