"""A place of the user's for what pixlat can make again: listings of data sets, digests that were checked. Losing it costs time alone. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path


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
    """Within the block no other process of this machine is in the block of the same file. Where no lock can be had, all go on at once.

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
