"""Explains errors of the machine, which neither the command nor the code has caused: disks and too little memory.

This module does not import torch.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

DISK = {
    errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is read-only", errno.EIO: "the disk fails",
    errno.ESTALE: "the network disk was lost", errno.EFBIG: "a file is larger than is allowed",
    errno.EACCES: "a file may not be written or read", errno.EPERM: "a file may not be written or read",
}  # fmt: skip
MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory", "ALLOC_FAILED", "DefaultCPUAllocator")
LENGTH = 200  # characters of the system's message that are shown
AFTER_DISK = "Make room or mend the permissions there, and run the same command again; it resumes."
AFTER_MEMORY = (
    "Run the same command again with train.recompute_blocks=true, or with a smaller eval.batch if it was evaluating; "
    "it resumes. Several processes with cluster.sharding=fsdp2 need less each. "
    "A smaller train.micro_batch would make it another run, because random draws depend on it."
)


def explain(error: BaseException, folder: Path) -> str | None:
    """Two or three sentences: what ended the run in this folder, which checkpoint it has, what the user can do.

    None if the error is not a fault of the machine.
    """
    disk, memory = _disk_fault(error), is_memory_fault(error)
    if not (disk or memory):
        return None
    lines = str(error).strip().splitlines() or [type(error).__name__]
    saved = sorted(folder.glob("checkpoints/step-*/manifest.json"))
    kept = f"The newest checkpoint is {saved[-1].parent}." if saved else "No checkpoint had been written yet."
    return (
        f"{folder}: {disk or 'there is not enough memory'} ({lines[0][:LENGTH]}). "
        f"{kept} {AFTER_DISK if disk else AFTER_MEMORY}"
    )


def _disk_fault(error: BaseException) -> str | None:
    """The fault in words, or None. safetensors puts the system's message into the text of its own error."""
    if isinstance(error, OSError):
        return DISK.get(error.errno or 0)
    if type(error).__name__ != "SafetensorError":
        return None
    signs = {number: (f"os error {number}", os.strerror(number)) for number in DISK}
    return next((DISK[number] for number, texts in signs.items() if any(text in str(error) for text in texts)), None)


def is_memory_fault(error: BaseException) -> bool:
    """Whether memory ran out. torch raises a RuntimeError on CPUs and its subclass OutOfMemoryError on GPUs."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or any(sign in str(error) for sign in MEMORY)
    )
