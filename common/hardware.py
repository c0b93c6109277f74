"""What the numbers were measured on."""

from __future__ import annotations

import platform
import resource
import sys
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the CPU's with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def processor_name() -> str:
    """The CPU's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def reset_peak(device: torch.device) -> None:
    """Starts a new peak where the device can; a process's own peak cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Peak memory: of the allocator on a GPU since `reset_peak`, of the whole process since its start on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_kind(device: torch.device) -> str:
    """Which of the two `peak_bytes` is."""
    return "max_memory_allocated" if device.type == "cuda" else "ru_maxrss"


def synchronize(device: torch.device) -> None:
    """Waits for the device, so that a clock measures work and not its submission."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
