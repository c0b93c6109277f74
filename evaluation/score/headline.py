"""The headline of a row: the mean of the judges' metrics, over the judges that may rank it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from pixlat.evaluation.metrics.jackknife import jackknife
from pixlat.evaluation.records.record import Metric

#: metrics of the headline; distances in a judge's own units are not among them unless there is a single judge
MEANS = (
    "fd_ratio_train", "fd_ratio_heldout", "kid_ratio_train", "kid_ratio_heldout", "memorisation", "copies",
    "is", "precision", "recall", "density", "coverage", "class_accuracy",
)  # fmt: skip
OWN_UNITS = ("fd", "fd_heldout", "kid", "kid_heldout")
#: metrics of single judges whose jackknife values the record keeps, from which a headline of other judges follows
KEPT_LEFT_OUT = ("fd", "fd_ratio_train", "fd_ratio_heldout", "kid_ratio_train", "kid_ratio_heldout")

Scores = Mapping[str, Metric]


def headline(
    judges: Sequence[Mapping[str, Any]], parts: Sequence[Sequence[Scores]], contact: Sequence[Mapping[str, Any]]
) -> tuple[list[str], list[dict[str, Metric]]]:
    """(ids of the judges of the headline, the headline of each seed).

    judges: the protocol's entries; parts: for each seed the metrics of every judge; contact: the judges that the row
    has met. The headline's judges are those that rank and that the row has not met. If it has met all that rank, the
    headline has all of them, and the leaderboard gives the row no rank.
    """
    met = {entry["judge"] for entry in contact}
    ranking = [position for position, judge in enumerate(judges) if judge["ranks"]]
    chosen = [position for position in ranking if judges[position]["id"] not in met] or ranking
    return [judges[position]["id"] for position in chosen], [
        over_judges([part[position] for position in chosen]) for part in parts
    ]


def over_judges(judged: Sequence[Scores]) -> dict[str, Metric]:
    """The mean of every metric over judges.

    fd_ratio and kid_ratio are the larger of the mean ratios to the training images and to the held-out images. A single
    judge's distances in its own units are kept.
    """
    names = (*MEANS, *OWN_UNITS) if len(judged) == 1 else MEANS
    metrics = {name: mean([each[name] for each in judged]) for name in names if all(name in each for each in judged)}
    for name in ("kid_ratio", "fd_ratio"):  # the last one becomes the first
        if f"{name}_train" in metrics:
            parts = metrics[f"{name}_train"], metrics[f"{name}_heldout"]
            metrics = {name: max(parts, key=lambda part: part["value"]), **metrics}
    return metrics


def mean(entries: Sequence[Metric]) -> Metric:
    """The mean of a metric over judges of the same images.

    Its error follows from the jackknife if all entries have it, as the judges see the same images. Otherwise, and for
    the part that the held-out images cause, it is the mean of the errors, which is right for judges that err together
    and too large for others.
    """
    if len(entries) == 1:
        return dict(entries[0])
    first = entries[0]
    result: Metric = {"value": fmean(entry["value"] for entry in entries), "value_bc": None, "se": None}
    result |= {"n": first["n"], "unit": first["unit"]}
    if all("left_out" in entry for entry in entries):
        left_out = [fmean(values) for values in zip(*(entry["left_out"] for entry in entries), strict=True)]
        result |= {"left_out": left_out, "se": jackknife(result["value"], left_out).se}
    elif all(entry["se"] is not None for entry in entries):
        result["se"] = fmean(entry["se"] for entry in entries)
    if all("se_real" in entry for entry in entries):
        result["se_real"] = fmean(entry["se_real"] for entry in entries)
        result["se"] = (result["se"] ** 2 + result["se_real"] ** 2) ** 0.5
    return result


def judge_record(judges: Sequence[Mapping[str, Any]], scores: Sequence[Scores]) -> list[dict[str, Any]]:
    """The record's entries of all judges with their metrics."""
    return [
        {"id": judge["id"], "sha256": judge["sha256"], "ranks": judge["ranks"], "metrics": short(of_judge)}
        for judge, of_judge in zip(judges, scores, strict=True)
    ]


def real_record(
    judges: Sequence[Mapping[str, Any]], scores: Sequence[Scores], of_row: Mapping[str, Metric]
) -> dict[str, Any]:
    """The record's entry of the held-out real images."""
    return {"metrics": dict(of_row), "judges": judge_record(judges, scores)}


def short(scores: Scores) -> dict[str, Metric]:
    """The metrics with only those jackknife values that the record keeps."""
    return {
        name: entry if name in KEPT_LEFT_OUT else {key: value for key, value in entry.items() if key != "left_out"}
        for name, entry in scores.items()
    }
