"""How many settings were tried before a number was measured: the field `selection` of records. Imports no torch.

The best of many settings looks better than it is, so a reader must know how many there were. Three things count: the
settings that the authors of a preset tried (`selection` in presets.yaml), those of `pixlat sweep`, and those of other
evaluations of the same checkpoint under the same protocol, which anybody can compare and choose from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixlat.evaluation.protocols.identity import digest
from pixlat.evaluation.records.record import RESULT, Record, RecordError, read_record

EVALUATIONS = "evaluations"  # the folder in a run's folder with the records of `pixlat evaluate` and `pixlat sweep`
Selection = dict[str, Any]


def selection_of_preset(tried: Mapping[str, Any]) -> Selection:
    """The selection of a run that only its preset has chosen. tried: the result of `config.resolve.settings_tried`."""
    return {**tried, "swept": []}


def with_sweep(tried: Mapping[str, Any], sweep: Mapping[str, Any]) -> Selection:
    """The selection of a setting that `pixlat sweep` chose for a run whose preset was itself chosen among others.

    The preset's own sampling settings are one of the sweep's, so they count once.
    """
    total = tried["n_configs"] + sweep["n_configs"] - 1
    return {**tried, **sweep, "n_configs": total, "n_samples": max(tried["n_samples"], sweep["n_samples"])}


def with_evaluations(tried: Mapping[str, Any], now: Mapping[str, Any], earlier: Sequence[Record]) -> Selection:
    """The selection of an evaluation, which counts the earlier ones of the same checkpoint under the same protocol.

    now: the fields `checkpoint`, `sampling`, `config` and `protocol_hash` of the new record. Evaluations with other
    seeds but the same settings are one try. The record of a sweep counts as many as the sweep tried.
    """
    same = [record for record in earlier if _is_of(record, now)]
    sweeps = [record for record in same if record["selection"]["swept"]]
    by_config = all("config" in record for record in [*same, now])
    swept = {_settings(record, by_config) for record in sweeps}
    single = {_settings(record, by_config) for record in [*same, now] if record not in sweeps} - swept
    by_sweeps = sum(_by_sweep(record["selection"], tried) for record in sweeps)
    total = tried["n_configs"] - 1 + by_sweeps + len(single)
    n_samples = now["protocol"]["samples"]["n"] if total > tried["n_configs"] else 0
    return {**tried, "n_configs": total, "n_samples": max(tried["n_samples"], n_samples), "swept": []}


def _by_sweep(selection: Mapping[str, Any], tried: Mapping[str, Any]) -> int:
    """How many settings a sweep tried. Early records, which have no `about`, did not count those of the preset."""
    return int(selection["n_configs"]) - (tried["n_configs"] - 1 if "about" in selection else 0)


def _is_of(record: Record, now: Mapping[str, Any]) -> bool:
    return (
        record["protocol_hash"] == now["protocol_hash"]
        and record.get("checkpoint", {}).get("sha256") == now["checkpoint"]["sha256"]
        and "selection" in record
        and "sampling" in record
    )


def _settings(record: Mapping[str, Any], by_config: bool) -> str:
    """Identifies the sampling settings of a record. Early records have no `config`; then the main settings must do."""
    if by_config:
        return str(record["config"]["digest"])
    return digest([record["sampling"], record["checkpoint"]["ema_kind"]])


def recorded(folder: Path, patterns: Sequence[str] = (RESULT, f"{EVALUATIONS}/*/{RESULT}")) -> list[Record]:
    """The records in a folder, by default those of a run's training and later evaluations, without damaged ones."""
    records = []
    for file in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        try:
            records.append(read_record(file))
        except RecordError:  # the leaderboard names it and leaves it out as well
            continue
    return records
