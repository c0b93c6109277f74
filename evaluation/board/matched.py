"""Compares runs at equal cost: equal training MACs, equal images seen or equal sampling MACs. Imports no torch.

A run that was evaluated during its training has a curve (`evaluation/records/curve.py`). Its last point is the record.
Between two points we interpolate the score linearly in the logarithm of the cost. We never extrapolate. The standard
errors are interpolated in the same way, which gives an upper bound of the error for any correlation between the two
points (they share noise and labels).

For the sampling cost, a curve consists of several records of one checkpoint with the same guidance and different
numbers of steps.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pixlat.evaluation.board.columns import GIGA
from pixlat.evaluation.board.groups import Group
from pixlat.evaluation.board.notes import PETA, SAME, training_macs
from pixlat.evaluation.board.ranks import range_text, ranges_of
from pixlat.evaluation.board.styles import ABSENT, MetricStyle, TextTable, metric_style
from pixlat.evaluation.metrics.student import NORMAL_QUANTILE
from pixlat.evaluation.records.curve import CurvePoint
from pixlat.evaluation.records.record import Record

Axis = Literal["train_macs", "images", "sampling_macs"]
AXES: dict[Axis, tuple[str, str, float]] = {  # title, unit, size of the unit
    "train_macs": ("equal training MACs", "PMACs", PETA),
    "images": ("equal images seen", "images", 1.0),
    "sampling_macs": ("equal sampling MACs", "GMACs an image", GIGA),
}


@dataclass(frozen=True)
class Point:
    """A score at a cost."""

    cost: float
    value: float
    error: float | None = None


@dataclass(frozen=True)
class Curve:
    """The points of one run, sorted by cost."""

    name: str
    points: Sequence[Point]
    reason: str = ""  # why the run is not ranked; empty if it is


def matched_tables(group: Group, measured: Mapping[str, Sequence[CurvePoint]]) -> list[TextTable]:
    """One table for each kind of cost for which at least two runs can be compared."""
    tables = []
    for axis in AXES:
        curves = curves_of(group, axis, measured)
        budget = common_budget(curves)
        if budget is not None and any(len(curve.points) > 1 for curve in curves):
            tables.append(matched_table(group, axis, curves, budget))
    return tables


def matched_table(group: Group, axis: Axis, curves: Sequence[Curve], budget: float | None) -> TextTable:
    """Ranks runs by their score at a cost, as ranges by their two errors. Runs without a score there or without a rank
    follow with the reason.

    budget: the cost; None: the table lists the final points only.
    """
    title, unit, size = AXES[axis]
    scores = [(curve, at(curve, budget)) for curve in curves]
    scores.sort(key=lambda pair: (pair[1] is None, pair[0].reason != "", (pair[1] or pair[0].points[-1]).value))
    style = metric_style(group.primary)
    ranked = [score for curve, score in scores if score and not curve.reason]
    ranges = [range_text(each) for each in point_ranges(ranked)]
    cells = []
    for i, (curve, score) in enumerate(scores):
        end = curve.points[-1]
        result = [
            ranges[i] if i < len(ranges) else ABSENT,
            curve.name,
            _plus_minus(score, style),
            _how(curve, score, budget, size) + (f"; not ranked: {curve.reason}" if curve.reason else ""),
        ]
        cells.append([*result, _plus_minus(end, style), f"{end.cost / size:.4g}"])
    if budget is None:
        note = "No two runs have been evaluated at a common cost, so only their final points are listed, without ranks."
    else:
        note = f"At {budget / size:.4g} {unit}. Interpolated in the logarithm of the cost, never beyond a run's points."
    label = metric_style(group.primary).label
    return TextTable(f"At {title}", note, ["rank", "run", f"{label} ↓", "how", "at its end ↓", f"{unit} in all"], cells)


def point_ranges(points: Sequence[Point]) -> list[tuple[int, int]]:
    """The ranges of ranks of scores from their two errors at 95 %."""
    margins = [NORMAL_QUANTILE * (point.error or 0.0) for point in points]

    def sign(i: int, j: int) -> float:
        gap = points[i].value - points[j].value
        return gap if abs(gap) > math.hypot(margins[i], margins[j]) else 0.0

    return ranges_of([point.value for point in points], margins, sign)


def _plus_minus(point: Point | None, style: MetricStyle) -> str:
    return ABSENT if point is None else style.text(point.value, point.error)


def _how(curve: Curve, score: Point | None, budget: float | None, size: float) -> str:
    if budget is None:
        return "final point only"
    if score is None:
        return "not trained or sampled that far" if curve.points[-1].cost < budget else "not evaluated that early"
    if any(_same(point.cost, budget) for point in curve.points):
        return "measured"
    before = max(point.cost for point in curve.points if point.cost < budget)
    after = min(point.cost for point in curve.points if point.cost > budget)
    return f"between {before / size:.4g} and {after / size:.4g}"


# -- arithmetic --------------------------------------------------------------------------------------------------------


def _same(cost: float, budget: float) -> bool:
    return cost * (1 - SAME) <= budget <= cost * (1 + SAME)


def at(curve: Curve, budget: float | None) -> Point | None:
    """The score at a cost: a measured point with this cost, else an interpolated one, else None."""
    if budget is None:
        return None
    measured = min(curve.points, key=lambda point: abs(math.log(point.cost / budget)))
    if _same(measured.cost, budget):
        return measured
    for left, right in zip(curve.points, curve.points[1:], strict=False):
        if left.cost < budget < right.cost:
            weight = math.log(budget / left.cost) / math.log(right.cost / left.cost)
            errors = (left.error, right.error)
            error = None if None in errors else (1 - weight) * (left.error or 0.0) + weight * (right.error or 0.0)
            return Point(budget, (1 - weight) * left.value + weight * right.value, error)
    return None


def common_budget(curves: Sequence[Curve]) -> float | None:
    """The cost at which most runs can be compared, the largest one if several tie. None if there are no two runs."""
    starts = sorted(curve.points[0].cost * (1 - SAME) for curve in curves)
    ends = sorted(curve.points[-1].cost * (1 + SAME) for curve in curves)
    counts = {
        budget: bisect_right(starts, budget) - bisect_left(ends, budget)
        for budget in {curve.points[-1].cost for curve in curves}
    }
    budget = max(counts, key=lambda candidate: (counts[candidate], candidate), default=None)
    return budget if budget is not None and counts[budget] > 1 else None


# -- curves ------------------------------------------------------------------------------------------------------------


def curves_of(group: Group, axis: Axis, measured: Mapping[str, Sequence[CurvePoint]]) -> list[Curve]:
    """The curves of a group's runs over a kind of cost. A run whose cost is zero or unknown has none."""
    if axis == "sampling_macs":
        return sampling_curves(group)
    curves = (
        replace(training_curve(row, group.primary, axis, measured.get(row["row_id"], ())), reason=reason)
        for row, reason in scored_runs(group)
    )
    return [curve for curve in curves if curve.points]


def scored_runs(group: Group) -> Iterator[tuple[Record, str]]:
    """Every run with a score, and why it is not ranked."""
    for entry, reason in [*((entry, "") for entry in group.ranked), *group.unranked]:
        yield from ((row, reason) for row in entry.rows if group.primary in row["metrics"])


def training_curve(row: Record, metric: str, axis: Axis, measured: Sequence[CurvePoint]) -> Curve:
    """The curve of the evaluations during training, with the record as its last point."""
    trained, total = row.get("train"), training_macs(row)
    cost = (trained or {}).get("images_seen") if axis == "images" else total
    if trained is None or cost is None:
        return Curve(row["name"], [])
    earlier = 0 if total is None else total - trained["macs_total"]
    points = [(line["images"] if axis == "images" else earlier + line["macs_train"], line) for line in measured]
    comparable = [
        (x, line["metrics"][metric])
        for x, line in points
        if line["protocol_hash"] == row["protocol_hash"] and metric in line["metrics"]
    ]
    return _curve(row["name"], [*((x, entry) for x, entry in comparable if x < cost), (cost, row["metrics"][metric])])


def sampling_curves(group: Group) -> list[Curve]:
    """One curve for all records that differ only in their number of sampling steps."""
    families: dict[tuple[Any, ...], list[tuple[Record, str]]] = defaultdict(list)
    for row, reason in scored_runs(group):
        if not {"sampling", "checkpoint", "compute", "seeds"} <= row.keys():
            continue
        sampling = row["sampling"]
        settings = (
            sampling["guidance"],
            sampling["guidance_scale"],
            str(sampling["interval"]),
            row["system"]["sampler"],
            row["checkpoint"]["ema_kind"],
            str(row["seeds"]["sample"]),
        )
        families[row["checkpoint"]["sha256"] or row["row_id"], *settings].append((row, reason))
    curves = (
        replace(_sampled([row for row, _ in runs], group.primary), reason=runs[0][1]) for runs in families.values()
    )
    return [curve for curve in curves if curve.points]


def _sampled(rows: Sequence[Record], metric: str) -> Curve:
    return _curve(rows[0]["name"], [(row["compute"]["macs_per_image"], row["metrics"][metric]) for row in rows])


def _curve(name: str, points: Sequence[tuple[float, Mapping[str, Any]]]) -> Curve:
    by_cost = {float(cost): Point(float(cost), entry["value"], entry.get("se")) for cost, entry in points if cost}
    return Curve(name, [by_cost[cost] for cost in sorted(by_cost)])
