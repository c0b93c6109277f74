"""From records to entries, the lines of a ranked table. Imports no torch.

Several evaluations of one checkpoint with the same sampling settings are one row: the one with the most sampling seeds.
Rows that differ only in their training seed are one entry, whose score is their mean.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pixlat.evaluation.metrics.spread import mean_of_trainings
from pixlat.evaluation.records.record import Metric, Record

SEED = re.compile(r"-seed\d+(-[0-9a-f]{6})?$")  # the end of a run folder's name: training seed, digest of the settings


@dataclass(frozen=True)
class Entry:
    """One line of a table: the trainings of one configuration with different seeds, sampled with the same settings."""

    rows: tuple[Record, ...]  # one for each training seed, in the order of the seeds
    hidden: int = 0  # further evaluations of the same checkpoints with the same settings, which no table shows
    tried: int = 1  # settings from which the shown one was chosen

    @cached_property
    def row(self) -> Record:
        """The record of a single training, or the first record with the means over all trainings in its metrics."""
        return self.rows[0] if len(self.rows) == 1 else mean_record(self.rows)

    @cached_property
    def by_seed(self) -> dict[int, Record]:
        """The records, keyed by training seed; empty if the seed is not known."""
        return {row["seeds"]["train"]: row for row in self.rows if "seeds" in row}

    @property
    def method(self) -> str:
        """Method, variant and size."""
        system = self.row["system"]
        return " ".join(part for part in (system["method"], system["variant"], system["size"]) if part)

    @property
    def untrained(self) -> bool:
        """Whether the networks have seen no image."""
        return self.row.get("train", {}).get("images_seen") == 0

    def metric(self, name: str) -> Metric:
        """The entry's value of a metric; empty if it has none."""
        return dict(self.row["metrics"].get(name, {}))


def entries_of(rows: Sequence[Record]) -> list[Entry]:
    """The entries of rows of one protocol."""
    tried = settings_tried(rows)
    return [
        Entry(
            tuple(row for row, _ in pairs), sum(hidden for _, hidden in pairs), max(tried[id(row)] for row, _ in pairs)
        )
        for pairs in _trainings(distinct(rows))
    ]


def configurations(rows: Sequence[Record]) -> list[list[Record]]:
    """The records by configuration, without the training seed, in the order of their first records."""
    by_key: dict[str, list[Record]] = defaultdict(list)
    for row in rows:
        by_key[configuration(row)].append(row)
    return list(by_key.values())


# -- one row for each checkpoint and sampling setting ------------------------------------------------------------------


def distinct(rows: Iterable[Record]) -> list[tuple[Record, int]]:
    """One row for each checkpoint and sampling setting, and how many further evaluations of it there are.

    It is the one with the most sampling seeds, then the newest. A row without a checkpoint's digest is never merged.
    """
    by_key: dict[str, list[Record]] = defaultdict(list)
    for row in rows:
        digest = checkpoint_digest(row)
        by_key[f"{digest} {sampling_settings(row)}" if digest else row["row_id"]].append(row)
    return [(max(same, key=_extent), len(same) - 1) for same in by_key.values()]


def _extent(row: Record) -> tuple[int, str, str]:
    return len(row.get("seeds", {}).get("sample", ())), row["created_utc"], row["row_id"]


def checkpoint_digest(row: Record) -> str | None:
    """The digest of the evaluated checkpoint; None if it is not recorded."""
    digest: str | None = row.get("checkpoint", {}).get("sha256")
    return digest


def sampling_settings(row: Record) -> str:
    """Everything that says how a checkpoint was sampled, but for the seeds."""
    average = row.get("checkpoint", {}).get("ema_kind")
    return _text([row.get("sampling"), row["system"]["sampler"], average])


def settings_tried(rows: Sequence[Record]) -> dict[int, int]:
    """How many settings each row's was chosen from, keyed by id(row).

    It is what the record says, or the number of settings with which its checkpoint was evaluated under this protocol
    if that is larger.
    """
    seen: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        seen[checkpoint_digest(row) or row["row_id"]].add(sampling_settings(row))
    return {
        id(row): max(row.get("selection", {}).get("n_configs", 1), len(seen[checkpoint_digest(row) or row["row_id"]]))
        for row in rows
    }


# -- settings in words -------------------------------------------------------------------------------------------------

UNTOLD = ("seed", "name", "out")  # keys of a run's configuration that are no settings of the model


def settings_of(row: Record) -> dict[str, str]:
    """The settings of sampling in words, and those settings of the run that differ from its preset."""
    sampling, told = row.get("sampling", {}), {}
    if sampling:
        scale = sampling["guidance_scale"]
        guided = sampling["guidance"] != "none"
        told["guidance"] = sampling["guidance"] + (f" {scale:g}" if guided and scale is not None else "")
        if guided and sampling["interval"]:
            told["interval"] = " to ".join(f"{end:g}" for end in sampling["interval"])
        told |= {"steps": str(sampling["steps"]), "precision": sampling["dtype"]}
    if "checkpoint" in row:
        told["average"] = row["checkpoint"]["ema_kind"]
    if "speed" in row:
        told["batch"] = str(row["speed"]["batch"])
    if "seeds" in row:
        told["sampling seeds"] = ", ".join(map(str, row["seeds"]["sample"]))
    config = row.get("config", {})
    if config:
        told["preset"] = config["preset"]
    chosen = config.get("settings", {})
    return told | {
        key: value if isinstance(value, str) else _text(value) for key, value in chosen.items() if key not in UNTOLD
    }


def differing(rows: Sequence[Record]) -> list[str]:
    """The settings that are not equal for all rows."""
    told = [settings_of(row) for row in rows]
    names = dict.fromkeys(name for each in told for name in each)
    return [name for name in names if len({each.get(name) for each in told}) > 1]


def told_apart(entries: Sequence[Entry], labels: Sequence[str]) -> list[str]:
    """The labels of entries, each of a repeated label with the settings in which its entries differ.

    Where no recorded setting differs, the name of the run is added.
    """
    alike: dict[str, list[Entry]] = defaultdict(list)
    for entry, label in zip(entries, labels, strict=True):
        alike[label].append(entry)
    told = [_with_settings(entry, label, alike[label]) for entry, label in zip(entries, labels, strict=True)]
    counts = Counter(told)
    pairs = zip(entries, told, strict=True)
    return [text if counts[text] == 1 else f"{text} ({entry.rows[0]['name']})" for entry, text in pairs]


def _with_settings(entry: Entry, label: str, same: Sequence[Entry]) -> str:
    told = settings_of(entry.row)
    return ", ".join([label, *(f"{name}={told[name]}" for name in differing([e.row for e in same]) if name in told)])


# -- one entry for each configuration ----------------------------------------------------------------------------------


def configuration(row: Record) -> str:
    """Identifies the settings of training and sampling without the training seed.

    Records without `config` are told apart by what they say about the method, its size, its training and its sampling.
    Rows that nobody trained here stand for themselves.
    """
    if "seeds" not in row or "train" not in row:
        return str(row["row_id"])
    shown = [row["system"]["method"], row.get("checkpoint", {}).get("step"), sampling_settings(row)]
    if "config" in row:
        return _text([row["config"]["digest"], *shown])
    train = row["train"]
    return _text([row["system"], train["images_seen"], train["batch"], row.get("params", {}).get("gen_total"), *shown])


def _trainings(rows: Sequence[tuple[Record, int]]) -> list[list[tuple[Record, int]]]:
    """The rows of each entry. Of several trainings with one configuration and seed, only the newest share an entry.

    The second newest of each seed form the next entry, and so on: two trainings with one seed are never averaged.
    """
    by_key: dict[str, list[tuple[Record, int]]] = defaultdict(list)
    for pair in sorted(rows, key=lambda pair: (pair[0]["created_utc"], pair[0]["row_id"]), reverse=True):
        by_key[configuration(pair[0])].append(pair)
    layers: dict[tuple[str, int], list[tuple[Record, int]]] = defaultdict(list)
    for key, pairs in by_key.items():
        repeats: dict[int | None, int] = defaultdict(int)
        for pair in pairs:
            seed = pair[0].get("seeds", {}).get("train")
            layers[key, repeats[seed]].append(pair)
            repeats[seed] += 1
    return [sorted(layer, key=lambda pair: pair[0].get("seeds", {}).get("train", 0)) for layer in layers.values()]


def mean_record(rows: Sequence[Record]) -> Record:
    """The first record with a name that all share and the means of the metrics that all have."""
    means: Record = {
        "name": shared_name([row["name"] for row in rows]),
        "metrics": _means([row["metrics"] for row in rows]),
    }
    if all("judges" in row for row in rows):
        judged = [{judge["id"]: judge for judge in row["judges"]} for row in rows]
        common = [judge for judge in rows[0]["judges"] if all(judge["id"] in each for each in judged)]
        means["judges"] = [
            {**judge, "metrics": _means([each[judge["id"]]["metrics"] for each in judged])} for judge in common
        ]
    return {**rows[0], **means}


def _means(metrics: Sequence[dict[str, Metric]]) -> dict[str, Metric]:
    shared = [name for name in metrics[0] if all(name in each for each in metrics)]
    return {name: mean_of_trainings([each[name] for each in metrics]) for name in shared}


def shared_name(names: Sequence[str]) -> str:
    """The run folders' names without their seed; the first name if they differ in more."""
    without = {SEED.sub("", name) for name in names}
    return without.pop() if len(without) == 1 else names[0]


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
