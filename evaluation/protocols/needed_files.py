"""The files that a protocol needs and that cannot come with the package: where they are to be had,
where they are looked for, whether they are right.

Nothing here downloads. Imports no torch.
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
    """One file that the user brings."""

    role: str  # "weights" or "reference": the key of `pixlat evaluate` that names it
    names: tuple[str, ...]  # base names under which it is known, the usual one first
    source: str  # an address, or what to do
    size: int | None = None  # bytes, where known
    sha256: str | None = None  # where known


def search_folders() -> list[Path]:
    """Where files are looked for: $PIXLAT_EVAL_DIR, then torch's cache,
    where torch-fidelity and pytorch-fid put theirs.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    torch_home = Path(os.environ.get("TORCH_HOME") or cache / "torch").expanduser()
    chosen = os.environ.get(FOLDER_VARIABLE)
    return [*([Path(chosen).expanduser()] if chosen else []), torch_home / "hub" / "checkpoints"]


def find(file: NeededFile, given: str | None = None) -> Path:
    """The file's path: as given, or by its name in the search folders.

    A UserError says what is wanted, from where, and which key names it.
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
        "Nothing is downloaded here."
    )


def wanted(file: NeededFile) -> str:
    """The file in words."""
    size = f", {file.size:,} bytes" if file.size else ""
    return f"{file.names[0]} ({file.source}{size})"


def checked(file: NeededFile, given: str | None = None) -> Path:
    """The file's path, after its size and digest have been compared with what is known of it."""
    path = find(file, given)
    if fault := fault_of(file, path):
        raise UserError(f"{path} {fault}. Get it again from {file.source}.")
    return path


def fault_of(file: NeededFile, path: Path) -> str | None:
    """What is wrong with the file at a path, or None; where neither size nor digest is known nothing can be."""
    if file.size is not None and path.stat().st_size != file.size:
        return f"has {path.stat().st_size:,} bytes and not {file.size:,}"
    if file.sha256 is not None and (found := sha256_of(path)) != file.sha256:
        return f"has sha256 {found} and not {file.sha256}"
    return None


def fetch_plan(files: Sequence[NeededFile]) -> str:
    """What to get from where, and whether it is there already."""
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
    """A line for each file, and whether all are there and right."""
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
