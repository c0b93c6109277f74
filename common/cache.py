"""The user's cache folder: listings of data sets, notes of verified digests, features of real images. Imports no torch.

pixlat can make everything in it again, so deleting it costs only time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

PRIVATE = ".references"  # in a folder of runs: features of real images, if the user's cache folder cannot be written
KEEP_FROM = 10_000  # smallest number of images whose listing is cached; smaller data sets are listed at every start
# A listing is cached only if its folders are unchanged for this long. A folder may otherwise change once more
# within the same tick of the file system's clock, and its time of change would not show it.
SETTLED_NS = 2 * 10**9


def cache_folder() -> Path:
    """$PIXLAT_CACHE_DIR if it is set, otherwise pixlat/ in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    if own := os.environ.get("PIXLAT_CACHE_DIR"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pixlat"


def features_folder(out: Path) -> Path:
    """The folder for features of real images, which all evaluations of a user share, whatever their output folder.

    It is features/ in the user's cache folder. If nothing can be written there, it is `out`/.references, and the first
    call says so on stderr.
    """
    shared = cache_folder() / "features"
    fault = _write_fault(shared)
    if fault is None:
        return shared
    _say_once(
        f"note: features of real images are kept in {out / PRIVATE}, because nothing can be written to {shared} "
        f"({fault}). `export PIXLAT_CACHE_DIR=...` chooses another folder for all runs."
    )
    return out / PRIVATE


def folder_bytes(folder: Path) -> int:
    """The size of all files below a folder; 0 if there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _write_fault(folder: Path) -> str | None:
    """Why no file can be written into a folder, which this function makes; None if one can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or type(error).__name__


@cache
def _say_once(note: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # the first of several processes
        print(note, file=sys.stderr)


def cache_file(kind: str, of: Path) -> Path:
    """The cache file for a path. Its name contains a digest of the absolute path."""
    return cache_folder() / f"{kind}-{hashlib.sha256(os.fsencode(of.resolve())).hexdigest()[:24]}"


@contextlib.contextmanager
def one_at_a_time(file: Path) -> Iterator[None]:
    """Lets only one process of this machine at a time execute the block for the same file.

    The lock is a file beside `file`; it is removed if `file` does not exist after the block.
    If the file system allows no lock, the processes do not wait for each other.
    """
    beside = file.with_name(f".{file.name}.lock")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a read-only folder, or a file system without locks
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(beside.open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        if not file.exists():
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)


def keep_arrays(file: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays to a temporary file and renames it to `file`. Keeps nothing if the folder is not writable."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        with temporary.open("wb") as stream:
            np.savez(stream, **arrays)
        temporary.replace(file)


def kept_arrays(file: Path, version: int) -> dict[str, Any] | None:
    """The arrays that `keep_arrays` wrote. None if the file is missing, damaged, or its "format" is not `version`."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays) if int(arrays["format"]) == version else None
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        return None
