"""Names the hardware that computes, and measures memory on it."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path

import torch

from pixlat.common.errors import UserError

CLEAR_REFS = Path("/proc/self/clear_refs")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's name with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def processor_name() -> str:
    """The CPU's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def reset_peak(device: torch.device) -> None:
    """Resets the peak of memory. The peak of a process on a CPU can be reset on Linux only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access(CLEAR_REFS, os.W_OK):
        CLEAR_REFS.write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Peak memory in bytes since `reset_peak`: of torch's allocator on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def tensor_bytes(device: torch.device) -> int:
    """Bytes that tensors use now: in torch's allocator on a GPU, otherwise the anonymous memory of a Linux process.

    Raises UserError on a CPU of another system.
    """
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else status_bytes("RssAnon")


def tensor_peak_bytes(device: torch.device) -> int:
    """The peak of `tensor_bytes` since `reset_peak`. On a CPU it assumes that mapped file pages stayed the same."""
    return (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else status_bytes("VmHWM") - status_bytes("RssFile")
    )


def status_bytes(field: str) -> int:
    """The value of a field of /proc/self/status, in bytes."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise UserError("the memory of tensors can be measured only on a GPU or on Linux, and this is neither.")
    return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith(f"{field}:")).split()[1])


def peak_kind(device: torch.device) -> str:
    """The source of `peak_bytes`, as records name it."""
    return "max_memory_allocated" if device.type == "cuda" else "ru_maxrss"


def synchronize(device: torch.device) -> None:
    """Waits until the GPU has finished, so that a clock measures the computation and not only its launch."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
