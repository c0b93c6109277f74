"""Checkpoints that are whole or do not exist.

checkpoints/step-00001000/
    model.safetensors              the method's state
    ema-<name>.safetensors         one file an average
    optimizer-<phase>-<n>.safetensors
    trainer.json                   step, images seen, meters, optimizer scalars, the run's identity
    manifest.json                  size and sha256 of every other file, written last

Everything is written into a temporary folder beside it, synced to disk, and renamed. `latest` skips what is unfinished or damaged and says so.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from common.errors import UserError
from common.sharding import placed_like

log = logging.getLogger("pixlat")
MANIFEST = "manifest.json"


@dataclass
class Checkpoint:
    """Tensors by file stem, and what fits in JSON."""

    tensors: dict[str, dict[str, Tensor]]
    facts: dict[str, Any]


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return folder / f"step-{step:08d}"


def save(folder: Path, step: int, checkpoint: Checkpoint, keep: int) -> None:
    """Writes `path_of(folder, step)` atomically, then removes all but the `keep` newest whole checkpoints.

    A failure to write (full disk, no permission) is a UserError that names the last good checkpoint, which is never touched before the new one is whole.
    """
    final = path_of(folder, step)
    temporary = folder / f".writing-{final.name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        temporary.mkdir()
        for stem, tensors in checkpoint.tensors.items():
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary / f"{stem}.safetensors")
        (temporary / "trainer.json").write_text(json.dumps(checkpoint.facts, indent=1))
        manifest = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for file in (*temporary.iterdir(), temporary):
            _sync(file)
        if final.exists():  # only a damaged one can be here: a whole one would have been resumed
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(folder)
    except Exception as error:  # safetensors reports a full disk as its own error type
        shutil.rmtree(temporary, ignore_errors=True)
        if not _is_write_error(error):
            raise
        last = next(whole(folder), None)
        raise UserError(
            f"cannot write the checkpoint {final}: {error}. "
            f"{f'The last good checkpoint is {last}.' if last else 'There is no earlier checkpoint.'} "
            "Make room or mend the permissions and run the same command again; it resumes."
        ) from error
    for old in list(whole(folder, verify=False))[keep:]:
        shutil.rmtree(old)


def whole(folder: Path, verify: bool = True) -> Iterator[Path]:
    """Checkpoint folders, newest first, that carry a manifest; with `verify`, only those whose files match it."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        if not (path / MANIFEST).exists():
            log.warning("ignoring the unfinished checkpoint %s", path)
        elif verify and (damage := find_damage(path)):
            log.warning("ignoring the damaged checkpoint %s: %s", path, damage)
        else:
            yield path


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return next(whole(folder), None)


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if every file has the size and digest of the manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if sha256_of(file) != expected["sha256"]:
            return f"{name} does not have the sha256 of the manifest"
    return None


def load(path: Path) -> Checkpoint:
    """Reads a whole checkpoint."""
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return Checkpoint(tensors, json.loads((path / "trainer.json").read_text()))


def digest(path: Path) -> str:
    """sha256 of a checkpoint: of its manifest, which holds the sha256 of every file."""
    return sha256_of(path / MANIFEST)


def sha256_of(file: Path) -> str:
    """Hex sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def optimizer_state(optimizer: Optimizer, names: Mapping[Any, str]) -> dict[str, Tensor]:
    """An optimizer's state as flat tensors, "<parameter name>/<state key>". Hyper-parameters come from the configuration and are not saved."""
    state = {f"{names[p]}/{key}": value for p, entry in optimizer.state.items() for key, value in entry.items()}
    if odd := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise TypeError(f"optimizer state that is not a tensor cannot be saved: {odd[:5]}")
    return state


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Tensor], names: Mapping[Any, str]) -> None:
    """The inverse of `optimizer_state`; the tensors go where the parameters are, in the dtypes they were saved in."""
    parameters = {names[p]: p for group in optimizer.param_groups for p in group["params"]}
    for key, value in state.items():
        name, _, entry = key.rpartition("/")
        if name not in parameters:
            raise UserError(f"the checkpoint has optimizer state for {name!r}, which this configuration does not train.")
        p = parameters[name]
        # A scalar step counter stays on the CPU unless the optimizer is fused, as torch itself does.
        on_cpu = value.ndim == 0 and not optimizer.defaults.get("fused")
        optimizer.state[p][entry] = value if on_cpu else placed_like(value, p)


def _remove_leftovers(folder: Path) -> None:
    for leftover in folder.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _is_write_error(error: Exception) -> bool:
    if isinstance(error, OSError):
        return True
    text = str(error)
    return type(error).__name__ == "SafetensorError" and any(sign in text for sign in ("os error", os.strerror(errno.ENOSPC)))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
