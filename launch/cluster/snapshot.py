"""A copy of the code for each submission, so that a job that starts tomorrow runs the code of today."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from pixlat.common.origin import NOTE, ROOT, git_diff, git_state

FOLDERS = ("common", "evaluation", "launch", "methods")  # the package's folders; pixlat/ has its other files


def take_snapshot(into: Path) -> Path:
    """Copies the package to `into`/code-<digest>/pixlat, unless that exists, and returns code-<digest> for PYTHONPATH.

    The copy has the tracked files with their uncommitted changes, and new files that git does not ignore. Without git
    it has every file but caches.
    """
    files = {place_in_package(file): ROOT / file for file in sorted(code_files(ROOT))}
    state = {**git_state(), "diff": git_diff()}
    digest = hashlib.sha256(json.dumps(state).encode())
    for place, file in files.items():
        digest.update(f"{place}\0".encode() + file.read_bytes())
    folder = into / f"code-{digest.hexdigest()[:12]}"
    if not folder.exists():
        temporary = into / f".{folder.name}.{os.getpid()}"
        for place, file in files.items():
            (temporary / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, temporary / place)
        (temporary / "pixlat" / NOTE).write_text(json.dumps(state, indent=1))
        try:
            temporary.rename(folder)
        except OSError:  # another submission was faster
            shutil.rmtree(temporary)
    return folder


def place_in_package(file: Path) -> Path:
    """The path in a wheel or a snapshot of a file of the checkout or of an installed package."""
    return file if file.parts[0] == "pixlat" else Path("pixlat") / file


def code_files(root: Path) -> Iterator[Path]:
    """The package's files, relative to the root: a checkout, or the folder pixlat/ of an installed package."""
    wanted = (
        (*FOLDERS, "pixlat") if (root / "pixlat").is_dir() else (*FOLDERS, *(path.name for path in root.glob("*.py")))
    )
    command = ("git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *wanted)
    listed = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("git") else None
    if listed is not None and listed.returncode == 0 and listed.stdout:
        files = (Path(name) for name in set(listed.stdout.rstrip("\0").split("\0")))
    else:
        below = (
            path for name in wanted for path in ((root / name).rglob("*") if (root / name).is_dir() else [root / name])
        )
        files = (path.relative_to(root) for path in below if "__pycache__" not in path.parts)
    return (file for file in files if (root / file).is_file())
