"""What the numbers were measured on."""

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
    """The accelerator's name, or the CPU's with the number of threads in use."""
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
    """Starts a new peak; a process's own only Linux can reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access(CLEAR_REFS, os.W_OK):
        CLEAR_REFS.write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Peak memory since `reset_peak`: of the allocator on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def tensor_bytes(device: torch.device) -> int:
    """Memory that tensors hold now: of the allocator on a GPU, of a Linux process what is not a file's.

    Elsewhere a UserError.
    """
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else status_bytes("RssAnon")


def tensor_peak_bytes(device: torch.device) -> int:
    """The same at its peak since `reset_peak`, taking for granted that no pages of files came or went since."""
    return (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else status_bytes("VmHWM") - status_bytes("RssFile")
    )


def status_bytes(field: str) -> int:
    """A line of /proc/self/status."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise UserError("the memory of tensors is measured on a GPU or on Linux, and this is neither.")
    return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith(f"{field}:")).split()[1])


def peak_kind(device: torch.device) -> str:
    """Which of the two `peak_bytes` is."""
    return "max_memory_allocated" if device.type == "cuda" else "ru_maxrss"


def synchronize(device: torch.device) -> None:
    """Waits for the device, so that a clock measures work and not its submission."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
