"""The user's cache folder: listings of data sets and notes of verified digests. Imports no torch.

pixlat can make everything in it again, so deleting it costs only time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

KEEP_FROM = 10_000  # smallest number of images whose listing is cached; smaller data sets are listed at every start
# A listing is cached only if its folders are unchanged for this long. A folder may otherwise change once more
# within the same tick of the file system's clock, and its time of change would not show it.
SETTLED_NS = 2 * 10**9


def cache_folder() -> Path:
    """$PIXLAT_CACHE_DIR if it is set, otherwise pixlat/ in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    if own := os.environ.get("PIXLAT_CACHE_DIR"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pixlat"


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
