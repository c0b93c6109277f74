"""What ends a run though neither the command nor the code is wrong: a full or failing disk, and too little memory.

Imports no torch.
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
LENGTH = 200  # of what the system said, at most
AFTER_DISK = "Make room or mend the permissions there, and run the same command again; it resumes."
AFTER_MEMORY = (
    "Run the same command again with train.recompute_blocks=true, or with a smaller eval.batch if it was evaluating; "
    "it resumes. Several processes with cluster.sharding=fsdp2 need less each. "
    "A smaller train.micro_batch makes it another run: random draws depend on it."
)


def explain(error: BaseException, folder: Path) -> str | None:
    """One sentence or two on what ended the run of a folder, what is kept and what to do;
    None where the machine is not to blame.
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
    """In words; safetensors tells what the system said in a text of its own error."""
    if isinstance(error, OSError):
        return DISK.get(error.errno or 0)
    if type(error).__name__ != "SafetensorError":
        return None
    signs = {number: (f"os error {number}", os.strerror(number)) for number in DISK}
    return next((DISK[number] for number, texts in signs.items() if any(text in str(error) for text in texts)), None)


def is_memory_fault(error: BaseException) -> bool:
    """Whether the error says that memory ran out. torch says it as RuntimeError, with a type of its own on GPUs."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or any(sign in str(error) for sign in MEMORY)
    )
