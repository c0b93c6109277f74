"""What methods gain over the first one, with paired error bars, from the records of finished runs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from pixlat.common.errors import UserError
from pixlat.evaluation.board.columns import PETA, metric_style
from pixlat.evaluation.board.groups import budget_notes, training_macs
from pixlat.evaluation.board.text import pipe_table, printable
from pixlat.evaluation.protocols.identity import protocol_name
from pixlat.evaluation.records.record import Record

if TYPE_CHECKING:
    from pixlat.evaluation.metrics.spread import Difference


Entry = dict[int, Record]  # the runs of one method, by training seed


@dataclass(frozen=True)
class Gain:
    """An entry's difference from the baseline in one metric, bias-corrected where the metric has a bias."""

    metric: str
    value: float
    se: float
    seeds: int

    @property
    def deviations(self) -> float:
        """In standard errors."""
        return self.value / self.se if self.se else math.copysign(math.inf, self.value) if self.value else 0.0


def entries(records: Sequence[Record]) -> dict[str, Entry]:
    """The runs of each method, in the order in which methods first appear.

    Two runs of one method and seed are a UserError.
    """
    found: dict[str, Entry] = defaultdict(dict)
    for record in records:
        name, seed = _label(record), record["seeds"]["train"]
        if other := found[name].get(seed):
            raise UserError(
                f"{other['name']} and {record['name']} are both {name} with training seed {seed}. Give one of them."
            )
        found[name][seed] = record
    if len(found) < 2:
        raise UserError(f"two methods are needed to compare, and the records are all of {', '.join(found) or 'none'}.")
    return dict(found)


def _label(record: Record) -> str:
    return " ".join(
        part for part in (record["system"]["method"], record["system"]["variant"], record["system"]["size"]) if part
    )


def gains(entry: Entry, baseline: Entry) -> list[Gain]:
    """Entry minus baseline in every metric that keeps its jackknife values; over the training seeds that both have."""
    from pixlat.evaluation.metrics.spread import paired_differences

    seeds = sorted(entry.keys() & baseline.keys())
    if not seeds:
        raise UserError(
            f"{next(iter(entry.values()))['name']} was trained with seeds {sorted(entry)}, "
            f"the baseline with {sorted(baseline)}: none is common."
        )
    by_metric: dict[str, list[Difference]] = defaultdict(list)
    for seed in seeds:
        for found in paired_differences(entry[seed], baseline[seed]):
            by_metric[found.metric].append(found)
    return [over_training_seeds(found) for found in by_metric.values() if len(found) == len(seeds)]


def over_training_seeds(found: Sequence[Difference]) -> Gain:
    """One pair as it is; of several the mean, whose error comes from how much they differ."""
    values = [each.value_bc for each in found]
    return Gain(
        found[0].metric,
        fmean(values),
        found[0].se if len(found) == 1 else stdev(values) / len(found) ** 0.5,
        len(found),
    )


def table(found: Mapping[str, Entry]) -> str:
    """A table a metric: what each method reaches, for what, and how far from the first."""
    (baseline, *_), first = found, next(iter(found.values()))
    by_name = {
        name: {gain.metric: gain for gain in gains(entry, first)} for name, entry in found.items() if name != baseline
    }
    metrics = list(dict.fromkeys(metric for of_entry in by_name.values() for metric in of_entry))
    headers = ["", "seeds", "images", "training (PMACs)", "score", f"minus {baseline}", "standard errors"]
    parts = [
        (
            f"{protocol_name(next(iter(first.values()))['protocol'])}; "
            "a difference below 0 is a gain where lower is better (↓)"
        )
    ]
    for metric in metrics:
        style = metric_style(metric)
        arrow = {"lower": " ↓", "higher": " ↑"}.get(style.better or "", "")
        rows = [
            [*_cells(name, entry, metric), *_gain_cells(by_name.get(name, {}).get(metric))]
            for name, entry in found.items()
        ]
        parts.append(f"{style.label}{arrow}\n{pipe_table(rows, headers, 'simple')}")
    return "\n\n".join([*parts, *notes(found)])


def _cells(name: str, entry: Entry, metric: str) -> list[str]:
    runs = list(entry.values())
    macs = [known for run in runs if (known := training_macs(run)) is not None]
    spent = f"{fmean(macs) / PETA:.4g}" if len(macs) == len(runs) else ""
    images = sorted({run["train"]["images_seen"] for run in runs})
    style, score = metric_style(metric), fmean(run["metrics"][metric]["value"] for run in runs)
    return [printable(name), str(len(runs)), ", ".join(f"{n:,}" for n in images), spent, style.text(score)]


def _gain_cells(gain: Gain | None) -> list[str]:
    if gain is None:
        return ["", ""]
    style = metric_style(gain.metric)
    return [style.text(gain.value, gain.se, sign="+"), f"{gain.deviations:+.1f}"]


def notes(found: Mapping[str, Entry]) -> list[str]:
    """What keeps the differences from meaning what they seem to."""
    runs = [run for entry in found.values() for run in entry.values()]
    told, batches = budget_notes(runs), sorted({run["train"]["batch"] for run in runs})
    if len(batches) > 1:
        told.append(f"Not one batch: {', '.join(map(str, batches))} images a step.")
    if any(len(entry) == 1 for entry in found.values()):
        told.append(
            "One training seed: the error is that of sampling, and another training may differ by more. "
            "Train with seed=0,1,2 for that."
        )
    return told
