"""The run folder. It is created once and never overwritten, and the process that works in it holds its lock.

config.yaml      the resolved configuration
data.json        the training data: names of the classes in the order of their numbers, counts, digest
stages.json      digests of the checkpoints of earlier stages, if the run uses any
jobs.jsonl       one line for each submission to a scheduler: job, log, copy of the code
failure.json     why the last job failed, and where its log is
starts.jsonl     one line for each start: command, packages, machine, git state
code.diff        uncommitted changes, if there were any
metrics.jsonl    one line for each logging interval
curve.jsonl      scores during training, with eval.every_images (evaluation/records/curve.py)
training.png     the curves of metrics.jsonl
previews/        sample grids during training
samples.png      one row for each class; all methods get the same noise and labels
reconstruction.png  held-out images and their reconstructions, for latent methods
neighbours.png   samples beside their nearest training images
checkpoints/     see common/weights/checkpoint.py
result.json      the record that the leaderboard reads; the run writes it after the scores and before its last pictures
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pixlat.common.config.identity import differences, run_folder, to_yaml
from pixlat.common.config.saved import read_config
from pixlat.common.config.schema import RunConfig, to_dict
from pixlat.common.errors import UserError
from pixlat.common.files import read_json, write_whole

if TYPE_CHECKING:
    from pixlat.common.datasets.summary import DataSummary

RESULT = "result.json"
DATA = "data.json"
WEIGHTS = "model.safetensors"  # what `export` writes beside config.yaml and data.json
JOBS = "jobs.jsonl"
FAILURE = "failure.json"
LOCK = ".lock"
# the files that a start writes before it trains
BEGINNING = {"config.yaml", DATA, "stages.json", "starts.jsonl", "code.diff", LOCK}
PATIENCE_S = 1.0  # `pixlat status` holds the lock for a moment to test it
RESTART_PATIENCE_S = 300.0
log = logging.getLogger("pixlat")


def open_folder(run: RunConfig) -> Path:
    """The run's folder, which this function creates if it is new.

    UserError if the folder belongs to another configuration or cannot be written.
    """
    folder = run_folder(run)
    config_file = folder / "config.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if config_file.exists():
            check_same(folder, run)
        elif others := [path.name for path in folder.iterdir() if not path.name.startswith(".")]:
            raise UserError(
                f"{folder} exists, is not a run folder and holds {', '.join(sorted(others)[:3])}. "
                "Choose another name= or out=."
            )
        else:
            write_whole(config_file, to_yaml(run))
    except OSError as error:
        raise UserError(
            f"cannot write into the run folder {folder}: {error.strerror}. Choose a writable out=, "
            f"which is {run.out!r} now."
        ) from error
    return folder


@contextlib.contextmanager
def removed_if_refused(folder: Path, enabled: bool) -> Iterator[None]:
    """Removes the folder again if the start that created it (`enabled`) fails before it has trained.

    The folder then holds only the files in BEGINNING. The caller must hold its lock.
    """
    try:
        yield
    except Exception:
        if enabled and {path.name for path in folder.iterdir()} <= BEGINNING:
            shutil.rmtree(folder)
        raise


def is_finished(folder: Path) -> bool:
    """Whether a start has nothing left to do here: the record is complete and no picture can be added.

    A missing picture can be drawn only if the folder still has the checkpoint that was scored.
    """
    if not (folder / RESULT).exists():
        return False
    from pixlat.evaluation.records.record import RecordError, read_record

    try:
        record = read_record(folder / RESULT)
    except RecordError as error:
        raise UserError(f"{error}. If you remove this file, the next start of the run evaluates again.") from error
    missing = [
        name
        for name in record.get("artifacts", {}).values()
        if str(name).endswith(".png") and not (folder / name).exists()
    ]
    manifests = folder.glob("checkpoints/step-*/manifest.json") if missing else ()
    scored = record.get("checkpoint", {}).get("sha256")
    return not any(hashlib.sha256(manifest.read_bytes()).hexdigest() == scored for manifest in manifests)


def check_same(folder: Path, run: RunConfig) -> None:
    """UserError if the saved configuration differs in a setting that is part of the run's identity."""
    if changed := differences(read_config(folder), to_dict(run)):
        raise UserError(
            f"{folder} belongs to a run with other settings ({'; '.join(changed[:5])}). Choose another name=, "
            "or restore these settings."
        )


def record_data(folder: Path, data: DataSummary) -> None:
    """Writes data.json with the training data's facts. With its class names users can sample by name without the data.

    UserError if a later start finds other images or classes; the data may move to another place.
    """
    file = folder / DATA
    facts = {
        "name": data.name, "digest": data.digest, "image_size": data.image_size, "num_train": data.num_train,
        "num_heldout": data.num_heldout, "num_classes": data.num_classes, "class_names": list(data.class_names),
    }  # fmt: skip
    if not file.exists():
        write_whole(file, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        return
    known = read_data(folder)
    if changed := [
        f"{key}: {known.get(key)} -> {facts[key]}"
        for key in ("num_train", "num_classes", "digest")
        if known.get(key) != facts[key]
    ]:
        raise UserError(
            f"the data have changed since {folder} was started ({'; '.join(changed)}). Restore them, "
            "or choose another name= for a run on the new data."
        )


def read_data(folder: Path) -> dict[str, Any]:
    """The facts in data.json; empty for the folder of an earlier version, which did not write it."""
    file = folder / DATA
    try:
        facts = read_json(file) if file.exists() else {}
    except UserError as error:
        raise UserError(f"{error} Remove {file}; the next start writes it again.") from error
    if not isinstance(facts, dict):
        raise UserError(f"{file} does not hold the facts of a data set. Remove it; the next start writes it again.")
    return facts


@contextlib.contextmanager
def locked(folder: Path, enabled: bool = True, choice: str = "another name=") -> Iterator[None]:
    """Keeps a second run out of the folder. The system frees the lock when the process ends, however it ends.

    enabled: true in the main process of a run; the others do not lock.
    choice: how the user can choose another folder, for the message of the UserError.

    A requeued job waits for the processes of its earlier start, which may still run on a node that Slurm has lost.
    """
    if not enabled:
        yield
        return
    patience = RESTART_PATIENCE_S if os.environ.get("SLURM_RESTART_COUNT") else PATIENCE_S
    deadline = time.monotonic() + patience
    with (folder / LOCK).open("w") as lock:
        while is_locked(lock):
            if time.monotonic() > deadline:
                raise UserError(f"another process is working in {folder}. Wait for it, stop it, or choose {choice}.")
            time.sleep(0.1)
        if not (folder / LOCK).exists():
            raise UserError(
                f"{folder} is gone: another start had created it, failed before it trained, and removed it. "
                "Run the same command again."
            )
        yield


def is_locked(lock: TextIO) -> bool:
    """Whether another process holds the lock. If none does, this process holds it afterwards."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:  # some network file systems have no locks
        log.warning("%s cannot be locked (%s): nothing keeps a second run out", lock.name, error.strerror)
    return False
