"""The files that a protocol needs and that the package cannot contain.

For each file this module knows where to get it, finds it on this machine and checks its size and digest. It downloads
nothing and imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pixlat.common.errors import UserError
from pixlat.common.files import sha256_of

FOLDER_VARIABLE = "PIXLAT_EVAL_DIR"


@dataclass(frozen=True)
class NeededFile:
    """One file that the user must provide."""

    role: str  # "weights" or "reference": the key of `pixlat evaluate` that gives its path
    names: tuple[str, ...]  # file names that are in use for it, the usual one first
    source: str  # an address, or an instruction
    size: int | None = None  # bytes; None: not known
    sha256: str | None = None  # None: not known


def search_folders() -> list[Path]:
    """The folders to search: $PIXLAT_EVAL_DIR, then torch's cache, where torch-fidelity and pytorch-fid put files."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    torch_home = Path(os.environ.get("TORCH_HOME") or cache / "torch").expanduser()
    chosen = os.environ.get(FOLDER_VARIABLE)
    return [*([Path(chosen).expanduser()] if chosen else []), torch_home / "hub" / "checkpoints"]


def find(file: NeededFile, given: str | None = None) -> Path:
    """The file's path: the given one, or the first file with one of its names in the search folders.

    If there is no file, a UserError says which file is needed, where to get it and which key gives its path.
    """
    if given is not None:
        path = Path(given).expanduser()
        if not path.is_file():
            raise UserError(f"{file.role}={given} does not exist or is not a file. It should be {wanted(file)}.")
        return path
    for folder in search_folders():
        for name in file.names:
            if (folder / name).is_file():
                return folder / name
    places = " or ".join(map(str, search_folders()))
    raise UserError(
        f"this protocol needs {wanted(file)}. Put it into {places}, or give its path as {file.role}=. "
        "pixlat does not download it."
    )


def wanted(file: NeededFile) -> str:
    """The file's name, source and size for a message."""
    size = f", {file.size:,} bytes" if file.size else ""
    return f"{file.names[0]} ({file.source}{size})"


def checked(file: NeededFile, given: str | None = None) -> Path:
    """The file's path. Raises UserError if its size or digest differs from the known one."""
    path = find(file, given)
    if fault := fault_of(file, path):
        raise UserError(f"{path} {fault}. Get it again from {file.source}.")
    return path


def fault_of(file: NeededFile, path: Path) -> str | None:
    """Describes how the file at a path differs from the known size or digest; None if it does not differ.

    If neither size nor digest is known, the result is None for every file.
    """
    if file.size is not None and path.stat().st_size != file.size:
        return f"has {path.stat().st_size:,} bytes and not {file.size:,}"
    if file.sha256 is not None and (actual := sha256_of(path)) != file.sha256:
        return f"has sha256 {actual} and not {file.sha256}"
    return None


def fetch_plan(files: Sequence[NeededFile]) -> str:
    """Text that lists the files, where to get each one, and whether this machine has it."""
    return (
        "\n\n".join("\n".join(_plan(file)) for file in files)
        or "nothing: everything this protocol needs is in the package"
    )


def _plan(file: NeededFile) -> list[str]:
    try:
        state = f"found: {find(file)}"
    except UserError:
        state = f"missing; put it into {search_folders()[0]}, or give its path as {file.role}="
    lines = [f"{file.role}   {' or '.join(file.names)}", f"  from    {file.source}"]
    size = f"{file.size:,} bytes" if file.size else "not known"
    return [
        *lines,
        f"  size    {size}",
        f"  sha256  {file.sha256 or 'not known; it becomes part of the protocol hash'}",
        f"  {state}",
    ]


def verify(files: Sequence[NeededFile], given: dict[str, str | None]) -> tuple[list[str], bool]:
    """(one line for each file, whether all files are there and correct)."""
    lines, good = [], True
    for file in files:
        try:
            path = checked(file, given.get(file.role))
        except UserError as error:
            lines.append(f"{file.role}   WRONG  {error}")
            good = False
        else:
            known = "as expected" if file.sha256 else "nothing to compare with"
            lines.append(f"{file.role}   ok     {path}: sha256 {sha256_of(path)}, {known}")
    return lines, good
