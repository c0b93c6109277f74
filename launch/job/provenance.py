"""The origin of a run: command, code, packages, machine."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pixlat.common.files import append_row, write_whole
from pixlat.common.hardware import processor_name
from pixlat.common.origin import ROOT, git_diff, git_state, package_versions


def provenance() -> dict[str, Any]:
    """The facts of this start. Of the environment it keeps only variables that steer computation."""
    steering = ("CUDA_", "OMP_", "MKL_", "NCCL_", "PYTORCH_", "TORCH", "SLURM_", "ACCELERATE_")
    return {
        "started_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "directory": str(Path.cwd()),
        "code_directory": str(ROOT),
        "code": git_state(),
        "packages": package_versions(),
        "machine": {
            "host": platform.node(),
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "processor": processor_name(),
        },
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(steering)},
    }


def record_start(folder: Path, **more: str) -> None:
    """Appends the facts of this start, and `more`, to starts.jsonl; writes uncommitted changes to code.diff."""
    append_row(folder / "starts.jsonl", provenance() | more)
    if diff := git_diff():
        write_whole(folder / "code.diff", diff)
