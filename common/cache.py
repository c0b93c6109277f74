"""A place of the user's for what pixlat can make again: listings of data sets, digests that were checked.

Losing it costs time alone. Imports no torch.
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

KEEP_FROM = 10_000  # images: smaller data sets are listed in a moment, and each time
# a folder that changed less than this before it was listed may change again within the same tick of its clock
SETTLED_NS = 2 * 10**9


def cache_folder() -> Path:
    """$PIXLAT_CACHE_DIR, else pixlat/ in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    if own := os.environ.get("PIXLAT_CACHE_DIR"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pixlat"


def cache_file(kind: str, of: Path) -> Path:
    """The file of the cache folder that belongs to a path: its name is a digest of the absolute path."""
    return cache_folder() / f"{kind}-{hashlib.sha256(os.fsencode(of.resolve())).hexdigest()[:24]}"


@contextlib.contextmanager
def one_at_a_time(file: Path) -> Iterator[None]:
    """Within the block no other process of this machine is in the block of the same file.

    Where no lock can be had, all go on at once.

    The lock lies beside the file, and is removed where the block has left no file there.
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
    """Writes arrays beside their place and renames them there; where nothing can be written, nothing is kept."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        with temporary.open("wb") as stream:
            np.savez(stream, **arrays)
        temporary.replace(file)


def kept_arrays(file: Path, version: int) -> dict[str, Any] | None:
    """The arrays that were kept with this number as "format"; None where there are none, or where they are damaged."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays) if int(arrays["format"]) == version else None
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        return None
