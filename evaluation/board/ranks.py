"""Ranks as ranges: which entries of a table the 95 % intervals of their differences separate. Imports no torch.

The range of an entry is [1 + entries that are significantly better, N - entries that are significantly worse].
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean

from pixlat.evaluation.board.entries import Entry
from pixlat.evaluation.metrics.jackknife import jackknife
from pixlat.evaluation.metrics.spread import Difference, own_error, trained_difference, unpaired_difference
from pixlat.evaluation.metrics.student import t_quantile
from pixlat.evaluation.protocols.identity import JACKKNIFE_GROUPS
from pixlat.evaluation.records.record import Metric

Range = tuple[int, int]

RANK_NOTE = (
    "A rank is a range: from 1 + the number of ranked rows that are better, to N minus the number that are worse. "
    "Better or worse: the 95 % interval of the paired difference (Student's t) excludes zero."
)
ONE_TRAINING = (
    "Rows of one training seed: their differences cover sampling only, and another training may differ by more."
)
UNPAIRED = (
    "Some rows have no training seed in common or no jackknife values in their records. "
    "Their differences are judged by the two errors, without pairing."
)
NO_ERROR = "Some rows have no recorded error: their order is that of the values alone."


@dataclass(frozen=True)
class Ranking:
    """The ranges of entries, and notes on what they rest on."""

    ranges: list[Range]
    notes: list[str]


def ranking(entries: Sequence[Entry], metric: str) -> Ranking:
    """The range of every entry for a metric of which lower is better."""
    metrics = [row["metrics"][metric] for entry in entries for row in entry.rows if len(entry.rows) == 1]
    scores = [score(entry, metric) for entry in entries]
    reaches = [reach(entry, metric) for entry in entries]
    singles = [single_training(entry, metric) for entry in entries]
    unpaired = False

    def sign(i: int, j: int) -> float:
        nonlocal unpaired
        first, second = singles[i], singles[j]
        if first and second and first[0] == second[0]:
            return sign_of_pair(scores[i] - scores[j], first[1], second[1])
        found = difference(entries[i], entries[j], metric)
        unpaired |= found.seeds == 0
        return math.copysign(1.0, found.value_bc) if found.separated else 0.0

    ranges = ranges_of(scores, reaches, sign)
    notes = (
        (ONE_TRAINING, any(len(entry.rows) == 1 for entry in entries)),
        (UNPAIRED, unpaired),
        (NO_ERROR, not all(map(has_error, metrics))),
    )
    return Ranking(ranges, [RANK_NOTE, *(note for note, applies in notes if applies)] if len(entries) > 1 else [])


def ranges_of(scores: Sequence[float], reaches: Sequence[float], sign: Callable[[int, int], float]) -> list[Range]:
    """The range of every item; the lowest score is best.

    reaches: two items with finite reaches whose scores differ by more than the sum of their reaches are separated for
        certain. Most pairs of a large table are, so that `sign` need not be asked;
    sign(i, j): negative if i is significantly better than j, positive if it is worse, 0 if that is open.
    """
    n = len(scores)
    better, worse = [0] * n, [0] * n
    near = sorted((i for i in range(n) if math.isfinite(reaches[i])), key=lambda i: scores[i])
    values, longest = [scores[i] for i in near], max((reaches[i] for i in near), default=0.0)
    starts = [0] * (len(near) + 1)  # starts[k]: items that are better than all of near[k:] for certain
    pairs = [(i, j) for i in range(n) if math.isinf(reaches[i]) for j in range(n) if j < i or math.isfinite(reaches[j])]
    for place, i in enumerate(near):
        end = max(bisect_right(values, values[place] + reaches[i] + longest), place + 1)
        worse[i] += len(near) - end
        starts[end] += 1
        pairs += [(i, j) for j in near[place + 1 : end]]
    for i, count in zip(near, accumulate(starts), strict=False):
        better[i] += count
    for i, j in pairs:
        found = sign(i, j)
        if found:
            winner, loser = (i, j) if found < 0 else (j, i)
            worse[winner] += 1
            better[loser] += 1
    return [(1 + better[i], n - worse[i]) for i in range(n)]


def single_training(entry: Entry, metric: str) -> tuple[str, list[float]] | None:
    """What a single training shares with those that it is paired with, and its jackknife values minus their mean.

    They share the training seed, the sampling seeds and the number of jackknife groups. None for several trainings, and
    for records without seeds or jackknife values.
    """
    groups, seeds = entry.metric(metric).get("left_out") or (), entry.row.get("seeds")
    if len(entry.rows) > 1 or seeds is None or len(groups) < 2:
        return None
    mean = fmean(groups)
    return f"{seeds['train']} {seeds['sample']} {len(groups)}", [each - mean for each in groups]


def sign_of_pair(gap: float, first: Sequence[float], second: Sequence[float]) -> float:
    """The sign of a paired difference, 0 if its 95 % interval includes zero.

    It is what `difference` finds from the jackknife values, but fast enough for the pairs of thousands of entries.
    """
    k = len(first)
    margin = t_quantile(k - 1) * math.dist(first, second) * math.sqrt((k - 1) / k)
    return gap if abs(gap) > margin else 0.0


def difference(first: Entry, second: Entry, metric: str) -> Difference:
    """First minus second: paired if both have a common training seed, else from their two errors."""
    paired = trained_difference(metric, first.by_seed, second.by_seed)
    if paired is not None:
        return paired
    return unpaired_difference(metric, *([row["metrics"][metric] for row in entry.rows] for entry in (first, second)))


def score(entry: Entry, metric: str) -> float:
    """The value that differences compare: bias-corrected where it is recorded."""
    found = entry.metric(metric)
    return float(found["value"] if found.get("value_bc") is None else found["value_bc"])


def reach(entry: Entry, metric: str) -> float:
    """Half of the 95 % interval of a single training; infinite for several trainings, which are always compared.

    The error of a paired difference is never larger than the sum of both errors.
    """
    if len(entry.rows) > 1:
        return math.inf
    found = entry.metric(metric)
    groups = found.get("left_out") or ()
    if len(groups) < 2:
        return t_quantile(JACKKNIFE_GROUPS - 1) * own_error(found)
    quantile = t_quantile(min(len(groups), JACKKNIFE_GROUPS) - 1)
    return quantile * max(own_error(found), jackknife(found["value"], groups).se)


def has_error(metric: Metric) -> bool:
    """Whether a metric has a recorded error or jackknife values."""
    return metric.get("se") is not None or bool(metric.get("left_out"))


def range_text(found: Range) -> str:
    """The text of a range: "2" or "1-3"."""
    return str(found[0]) if found[0] == found[1] else f"{found[0]}-{found[1]}"
