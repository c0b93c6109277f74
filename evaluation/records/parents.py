"""The earlier runs whose weights a run uses, as the entries of its record (`parents` in the schema).

Every entry holds the networks of others that the earlier run used, and the entries of its own earlier runs, so that a
record says everything that its weights have met (`contact.py`). Imports torch only where a checkpoint is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixlat.common.config.schema import RunConfig
from pixlat.common.errors import UserError
from pixlat.evaluation.records.imported import imported_facts
from pixlat.evaluation.records.record import RESULT, read_record
from pixlat.methods import Stage, get_spec

COST = ("images_seen", "macs_total", "device_seconds")  # cost of an earlier run, in the record
LINEAGE = ("pretrained_components", "parents")  # what a run tells of itself to the runs that use its weights

Entry = dict[str, Any]


def earlier_runs(run: RunConfig, model: Any, verified: bool = False) -> list[Entry]:
    """The entries for the earlier runs that this one uses.

    model: `run.model` with the folders of earlier stages in the place of the word `train`.
    verified: whether the earlier weights were read and so verified already; otherwise this reads their files.
    Files that other people released are not runs and have no entry.
    """
    entries = []
    for stage in get_spec(run.method).stages:
        place = getattr(model, stage.key)
        if place in stage.shipped:
            entries.append(shipped_run(stage, place))
        elif place is not None and (Path(place) / "config.yaml").exists():
            entries.append(run_entry(stage, Path(place), verified))
    return entries


def shipped_run(stage: Stage, place: str) -> Entry:
    """The entry of a stage whose weights are part of the package, read from their card."""
    file = Path(stage.shipped[place])
    card = json.loads(file.read_text(encoding="utf-8"))
    return {
        "key": stage.key,
        "name": f"{file.stem} (in the package)",
        "method": stage.method,
        "checkpoint_sha256": card["sha256"],
        **{name: card[name] for name in ("row_id", *COST, "pretrained_components")},
        **({"parents": card["parents"]} if card.get("parents") else {}),
    }


def run_entry(stage: Stage, folder: Path, verified: bool) -> Entry:
    """The entry of a run folder. UserError if it has no intact checkpoint."""
    from pixlat.common.weights import checkpoint
    from pixlat.common.weights.runs import no_checkpoint

    saved = checkpoint.latest(folder / "checkpoints", stems=() if verified else None)
    if saved is None:
        raise UserError(f"model.{stage.key}={folder}: {no_checkpoint(folder)} Or give another run.")
    record: Mapping[str, Any] = read_record(folder / RESULT) if (folder / RESULT).exists() else {}
    trained = record.get("train", {})
    return {
        "key": stage.key,
        "name": folder.name,
        "method": stage.method,
        "row_id": record.get("row_id"),
        "checkpoint_sha256": checkpoint.digest(saved),
        **{name: trained.get(name) for name in COST},
        **(lineage_of_record(record) if record else lineage_of_import(folder, checkpoint.load_facts(saved))),
        **({"config": record["config"]["digest"]} if "config" in record else {}),
    }


def lineage_of_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The networks and earlier runs that a record names. A list of parents is left out where it is empty."""
    known = {name: record[name] for name in LINEAGE if name in record}
    return {name: entries for name, entries in known.items() if entries or name != "parents"}


def lineage_of_import(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a run folder without a record.

    An import of `pixlat export` brings what its run told. Of a file of the authors only the file is known, as of any
    released file; it has no networks of others. Of a run that was trained here and not finished nothing is known.
    facts: those of the folder's checkpoint.
    """
    origin = imported_facts(folder, facts)
    if origin is None:
        return {}
    return lineage_of_record(origin.get("lineage") or {"pretrained_components": []})


def stage_digests(parents: Sequence[Entry]) -> dict[str, str]:
    """What `config_entry` needs of the earlier runs: the digest of each one's configuration, or else of its weights."""
    return {entry["key"]: entry.get("config") or str(entry["checkpoint_sha256"]) for entry in parents}


def current_parents(recorded: Sequence[Entry], now: Sequence[Entry]) -> list[Entry]:
    """The parents for the record of an evaluation.

    recorded: those in the record of the training; now: those whose weights sample, read from their folders.
    An entry of `now` replaces the recorded one with the same checkpoint, since it may know more of its own parents.
    """
    known = {entry["checkpoint_sha256"]: entry for entry in now}
    return [known.get(entry["checkpoint_sha256"], entry) for entry in recorded] or list(now)
