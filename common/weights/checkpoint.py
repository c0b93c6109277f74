"""Atomic checkpoints: a checkpoint folder is complete or does not exist.

checkpoints/step-00001000/
    model.safetensors              the method's state
    ema-<name>.safetensors         one file per average
    optimizer-<phase>-<n>.safetensors
    trainer.json                   step, images seen, meters, the run's identity
    manifest.json                  size and sha256 of every other file, written last

`save` writes all files into a temporary folder beside it, syncs them to disk, and renames the folder.
`latest` skips unfinished and damaged checkpoints with a warning.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixlat.common.errors import UserError
from pixlat.common.files import read_json, sha256_of

log = logging.getLogger("pixlat")
MANIFEST, FACTS = "manifest.json", "trainer.json"
EXPECTED = ("model.safetensors", FACTS)  # files that every checkpoint has
MAX_FACTS_BYTES = 2**24  # size limit of manifest.json and trainer.json


@dataclass
class Checkpoint:
    """The tensors of each file by the file's stem, and the facts of trainer.json."""

    tensors: dict[str, dict[str, Tensor]]
    facts: dict[str, Any]


def path_of(folder: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return folder / f"step-{step:08d}"


def save(folder: Path, step: int, checkpoint: Checkpoint, keep: int) -> None:
    """Writes `path_of(folder, step)` atomically, then removes all but the `keep` newest complete checkpoints.

    Raises UserError if it cannot write (full disk, no permission). The message names the last good checkpoint,
    which stays until the new one is complete.
    """
    final = path_of(folder, step)
    temporary = folder / f".writing-{final.name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        temporary.mkdir()
        for stem, tensors in checkpoint.tensors.items():
            save_tensors(
                {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary / f"{stem}.safetensors"
            )
        (temporary / FACTS).write_text(json.dumps(checkpoint.facts, indent=1))
        manifest = {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in sorted(temporary.iterdir())
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for file in (*temporary.iterdir(), temporary):
            _sync(file)
        if final.exists():  # it must be damaged: the run would have resumed from an intact one
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(folder)
    except Exception as error:  # safetensors raises its own error type for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        if not _is_write_error(error):
            raise
        last = next(intact(folder), None)
        raise UserError(
            f"cannot write the checkpoint {final}: {error}. "
            f"{f'The last good checkpoint is {last}.' if last else 'There is no earlier checkpoint.'} "
            "Free disk space or correct the permissions, and run the same command again; it resumes."
        ) from error
    for old in list(intact(folder, verify=False))[keep:]:
        shutil.rmtree(old)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Like safetensors' `save_file`, but gives the file the usual mode of new files.

    The library ignores the umask and makes files that only their owner can read.
    """
    path.touch()  # creates a file with the usual mode, 0666 without the bits of the umask
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    path.chmod(mode)


def intact(folder: Path, verify: bool = True, stems: Collection[str] | None = None) -> Iterator[Path]:
    """Yields the checkpoint folders that have a manifest, newest first.

    With `verify`, yields only those in which `find_damage` finds no damage.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        if not (path / MANIFEST).exists():
            log.warning("ignoring the unfinished checkpoint %s", path)
        elif verify and (damage := find_damage(path, stems)):
            log.warning("ignoring the damaged checkpoint %s: %s", path, damage)
        else:
            yield path


def latest(folder: Path, stems: Collection[str] | None = None) -> Path | None:
    """The newest intact checkpoint, or None. stems: as for `find_damage`."""
    return next(intact(folder, stems=stems), None)


def find_damage(path: Path, stems: Collection[str] | None = None) -> str | None:
    """The damage of a checkpoint folder, as text; None if all files of the manifest have its sizes and digests.

    stems: the files of tensors that are read to compare their digests; None: all files. For the others,
        only the size is compared.
    """
    try:
        manifest = read_json(path / MANIFEST, MAX_FACTS_BYTES)
    except UserError as error:
        return str(error)
    if fault := _manifest_fault(manifest, path):
        return f"{MANIFEST} {fault}"
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        needed = stems is None or name == FACTS or file.stem in stems
        if needed and sha256_of(file) != expected["sha256"]:
            return f"{name} does not have the sha256 of the manifest"
    return None


def _manifest_fault(manifest: Any, path: Path) -> str | None:
    """The fault of a manifest, as the rest of a sentence; None if it is a valid manifest of this folder."""
    if not isinstance(manifest, dict):
        return "is not an object of file names"
    if invalid := [name for name in manifest if name in ("", MANIFEST) or "/" in name or "\0" in name]:
        return f"names {invalid[0]!r}, which is no file of a checkpoint"
    if invalid := [name for name, entry in manifest.items() if not _is_entry(entry)]:
        return f"does not give a size and a sha256 for {invalid[0]!r}"
    if missing := sorted({*EXPECTED, *(file.name for file in _tensor_files(path))} - set(manifest)):
        return f"does not name {missing[0]}"
    return None


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"} or type(entry["bytes"]) is not int:
        return False
    return isinstance(entry["sha256"], str) and re.fullmatch("[0-9a-f]{64}", entry["sha256"]) is not None


def load(path: Path) -> Checkpoint:
    """Reads all files of a checkpoint."""
    return Checkpoint({file.stem: load_file(file) for file in _tensor_files(path)}, load_facts(path))


def load_facts(path: Path) -> dict[str, Any]:
    """Reads trainer.json of a checkpoint: step, images seen, identity, ..."""
    facts: dict[str, Any] = read_json(path / FACTS, MAX_FACTS_BYTES)
    return facts


def averages(path: Path) -> list[str]:
    """The names of a checkpoint's averages."""
    return [file.stem.removeprefix("ema-") for file in _tensor_files(path) if file.stem.startswith("ema-")]


def load_weights(path: Path, average: str | None) -> dict[str, Tensor]:
    """The method's state dict from a checkpoint. The weights of `average`, if given, replace the raw ones.

    Reads only model.safetensors and the file of the average.
    """
    tensors = load_file(path / f"ema-{average}.safetensors") if average else {}
    with safe_open(path / "model.safetensors", framework="pt") as file:
        state = {name: tensors[name] if name in tensors else file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return state | tensors


def _tensor_files(path: Path) -> list[Path]:
    """The files of tensors in a checkpoint. Skips hidden files, which some file systems create in any folder."""
    return [file for file in sorted(path.glob("*.safetensors")) if not file.name.startswith(".")]


def digest(path: Path) -> str:
    """The sha256 of a checkpoint's manifest. It identifies the checkpoint: the manifest holds each file's sha256."""
    return sha256_of(path / MANIFEST)


def _remove_leftovers(folder: Path) -> None:
    for leftover in folder.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _is_write_error(error: Exception) -> bool:
    if isinstance(error, OSError):
        return True
    text = str(error)
    return type(error).__name__ == "SafetensorError" and any(
        sign in text for sign in ("os error", os.strerror(errno.ENOSPC))
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
