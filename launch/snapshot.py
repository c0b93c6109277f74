"""A copy of the code for each submission, so that a job that starts tomorrow runs what was submitted today."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from common.origin import NOTE, ROOT, git_diff, git_state

PACKAGES = ("common", "evaluation", "launch", "methods")


def take_snapshot(into: Path) -> Path:
    """Copies the packages to `into`/code-<digest> and returns that folder; code that is there already is not copied again.

    Copied are tracked files with their uncommitted changes, and new files that git does not ignore; without git, everything but caches.
    """
    files = sorted(code_files(ROOT))
    state = {**git_state(), "diff": git_diff()}
    digest = hashlib.sha256(json.dumps(state).encode())
    for file in files:
        digest.update(f"{file}\0".encode() + (ROOT / file).read_bytes())
    folder = into / f"code-{digest.hexdigest()[:12]}"
    if not folder.exists():
        temporary = into / f".{folder.name}.{os.getpid()}"
        for file in files:
            (temporary / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, temporary / file)
        (temporary / NOTE).write_text(json.dumps(state, indent=1))
        try:
            temporary.rename(folder)
        except OSError:  # another submission was faster
            shutil.rmtree(temporary)
    return folder


def code_files(root: Path) -> Iterator[Path]:
    """The files of the packages, relative to the root."""
    command = ("git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PACKAGES)
    listed = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("git") else None
    if listed is not None and listed.returncode == 0 and listed.stdout:
        found = (Path(name) for name in set(listed.stdout.rstrip("\0").split("\0")))
    else:
        found = (path.relative_to(root) for package in PACKAGES for path in (root / package).rglob("*") if "__pycache__" not in path.parts)
    return (file for file in found if (root / file).is_file())
