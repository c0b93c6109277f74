"""The run folder: made once, locked while a process works in it, never overwritten.

config.yaml      the resolved configuration
starts.jsonl     one line a start: command, packages, machine, git state
code.diff        uncommitted changes, if there were any
metrics.jsonl    one line a logging interval
training.png     the curves of metrics.jsonl
previews/        sample grids during training
samples.png      one row a class; the same noise and labels for every method
neighbours.png   samples beside their nearest training images
checkpoints/     see common/checkpoint.py
result.json      the record that the leaderboard reads; there once the run is finished
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from common.config import RunConfig, differences, run_folder, to_dict, to_yaml
from common.errors import UserError
from common.files import write_whole
from common.meters import append_row
from launch.provenance import git_diff, provenance

RESULT = "result.json"


def open_folder(run: RunConfig) -> Path:
    """The run's folder, made if it is new. A folder of another configuration, or one that cannot be written, is a UserError."""
    folder = run_folder(run)
    config_file = folder / "config.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if config_file.exists():
            check_same(folder, run)
        elif others := [path.name for path in folder.iterdir() if not path.name.startswith(".")]:
            raise UserError(f"{folder} exists, is not a run folder and holds {', '.join(sorted(others)[:3])}. Choose another name= or out=.")
        else:
            write_whole(config_file, to_yaml(run))
    except OSError as error:
        raise UserError(f"cannot write into the run folder {folder}: {error.strerror}. Choose a writable out=, which is {run.out!r} now.") from error
    return folder


def record_start(folder: Path) -> None:
    """Keeps where this start came from, beside the earlier ones."""
    append_row(folder / "starts.jsonl", provenance())
    if diff := git_diff():
        write_whole(folder / "code.diff", diff)


def check_same(folder: Path, run: RunConfig) -> None:
    """Refuses to continue a folder whose saved configuration differs in anything that matters."""
    saved: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    if changed := differences(saved, to_dict(run)):
        raise UserError(f"{folder} belongs to a run with other settings ({'; '.join(changed[:5])}). Choose another name=, or restore these settings.")


@contextlib.contextmanager
def locked(folder: Path, enabled: bool = True) -> Iterator[None]:
    """Keeps a second run out of the folder; the lock ends with the process, however it ends. Only the main process of a run locks (`enabled`)."""
    if not enabled:
        yield
        return
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is working in {folder}. Wait for it, stop it, or choose another name=.") from error
        yield
