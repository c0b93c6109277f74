"""Compares methods with the first one, with paired error bars, from the records of finished runs."""

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


Entry = dict[int, Record]  # the runs of one method, keyed by training seed


@dataclass(frozen=True)
class Gain:
    """The difference between an entry and the baseline in one metric, bias-corrected if the metric has a bias."""

    metric: str
    value: float
    se: float
    seeds: int

    @property
    def deviations(self) -> float:
        """The difference in standard errors."""
        return self.value / self.se if self.se else math.copysign(math.inf, self.value) if self.value else 0.0


def entries(records: Sequence[Record]) -> dict[str, Entry]:
    """The runs of each method, in the order in which methods first appear.

    Raises UserError for two runs with the same method and seed, and for fewer than two methods.
    """
    by_method: dict[str, Entry] = defaultdict(dict)
    for record in records:
        name, seed = _label(record), record["seeds"]["train"]
        if other := by_method[name].get(seed):
            raise UserError(
                f"{other['name']} and {record['name']} are both {name} with training seed {seed}. Give one of them."
            )
        by_method[name][seed] = record
    if len(by_method) < 2:
        raise UserError(
            f"two methods are needed to compare, but the records are all of {', '.join(by_method) or 'none'}."
        )
    return dict(by_method)


def _label(record: Record) -> str:
    return " ".join(
        part for part in (record["system"]["method"], record["system"]["variant"], record["system"]["size"]) if part
    )


def gains(entry: Entry, baseline: Entry) -> list[Gain]:
    """Entry minus baseline, over their common training seeds, in every metric whose jackknife values are recorded."""
    from pixlat.evaluation.metrics.spread import paired_differences

    seeds = sorted(entry.keys() & baseline.keys())
    if not seeds:
        raise UserError(
            f"{next(iter(entry.values()))['name']} was trained with seeds {sorted(entry)}, "
            f"the baseline with {sorted(baseline)}: they have no seed in common."
        )
    by_metric: dict[str, list[Difference]] = defaultdict(list)
    for seed in seeds:
        for difference in paired_differences(entry[seed], baseline[seed]):
            by_metric[difference.metric].append(difference)
    return [over_training_seeds(pairs) for pairs in by_metric.values() if len(pairs) == len(seeds)]


def over_training_seeds(differences: Sequence[Difference]) -> Gain:
    """The mean over training seeds. Its error is that of the mean, or for one seed the error of the difference."""
    values = [difference.value_bc for difference in differences]
    one_seed = len(differences) == 1
    error = differences[0].se if one_seed else stdev(values) / len(differences) ** 0.5
    return Gain(differences[0].metric, fmean(values), error, len(differences))


def table(by_method: Mapping[str, Entry]) -> str:
    """One table for each metric, with every method's score, its training cost and its difference from the first."""
    (baseline, *_), first = by_method, next(iter(by_method.values()))
    by_name = {
        name: {gain.metric: gain for gain in gains(entry, first)}
        for name, entry in by_method.items()
        if name != baseline
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
            for name, entry in by_method.items()
        ]
        parts.append(f"{style.label}{arrow}\n{pipe_table(rows, headers, 'simple')}")
    return "\n\n".join([*parts, *notes(by_method)])


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


def notes(by_method: Mapping[str, Entry]) -> list[str]:
    """Warnings about runs that cannot be compared directly."""
    runs = [run for entry in by_method.values() for run in entry.values()]
    warnings, batches = budget_notes(runs), sorted({run["train"]["batch"] for run in runs})
    if len(batches) > 1:
        warnings.append(f"The runs differ in their batch: {', '.join(map(str, batches))} images a step.")
    if any(len(entry) == 1 for entry in by_method.values()):
        warnings.append(
            "One training seed: the error covers sampling only, and another training may differ by more. "
            "Train with seed=0,1,2 to measure that."
        )
    return warnings
