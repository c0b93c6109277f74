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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pixlat.evaluation.board.columns import ABSENT, GIGA, PETA, MetricStyle, metric_style
from pixlat.evaluation.board.groups import SAME, Group, training_macs
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


@dataclass(frozen=True)
class MatchedTable:
    """The texts of a table that compares runs at one cost."""

    title: str
    note: str
    headers: list[str]
    cells: list[list[str]]


def matched_tables(group: Group, measured: Mapping[str, Sequence[CurvePoint]]) -> list[MatchedTable]:
    """One table for each kind of cost for which at least two runs can be compared."""
    tables = []
    for axis in AXES:
        curves = curves_of(group, axis, measured)
        budget = common_budget(curves)
        if budget is not None and any(len(curve.points) > 1 for curve in curves):
            tables.append(matched_table(group, axis, curves, budget))
    return tables


def matched_table(group: Group, axis: Axis, curves: Sequence[Curve], budget: float | None) -> MatchedTable:
    """Ranks runs by their score at a cost. Runs without a score at this cost follow with the reason.

    budget: the cost; None: the table lists the final points only.
    """
    title, unit, size = AXES[axis]
    scores = [(curve, at(curve, budget)) for curve in curves]
    scores.sort(key=lambda pair: (pair[1] is None, pair[1].value if pair[1] else pair[0].points[-1].value))
    style = metric_style(group.primary)
    cells = []
    for rank, (curve, score) in enumerate(scores, start=1):
        end = curve.points[-1]
        result = [
            str(rank) if score else ABSENT,
            curve.name,
            _plus_minus(score, style),
            _how(curve, score, budget, size),
        ]
        cells.append([*result, _plus_minus(end, style), f"{end.cost / size:.4g}"])
    if budget is None:
        note = "No two runs have been evaluated at a common cost, so only their final points are listed, without ranks."
    else:
        note = f"At {budget / size:.4g} {unit}. Interpolated in the logarithm of the cost, never beyond a run's points."
    label = metric_style(group.primary).label
    return MatchedTable(
        f"At {title}", note, ["rank", "run", f"{label} ↓", "how", "at its end ↓", f"{unit} in all"], cells
    )


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
    curves = (training_curve(row, group.primary, axis, measured.get(row["row_id"], ())) for row in group.ranked)
    return [curve for curve in curves if curve.points]


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
    families: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for row in group.ranked:
        if not {"sampling", "checkpoint", "compute", "seeds"} <= row.keys():
            continue
        sampling = row["sampling"]
        settings = (
            sampling["guidance"],
            sampling["guidance_scale"],
            str(sampling["interval"]),
            row["system"]["sampler"],
            str(row["seeds"]["sample"]),
        )
        families[row["checkpoint"]["sha256"] or row["row_id"], *settings].append(row)
    curves = (
        _curve(rows[0]["name"], [(row["compute"]["macs_per_image"], row["metrics"][group.primary]) for row in rows])
        for rows in families.values()
    )
    return [curve for curve in curves if curve.points]


def _curve(name: str, points: Sequence[tuple[float, Mapping[str, Any]]]) -> Curve:
    by_cost = {float(cost): Point(float(cost), entry["value"], entry.get("se")) for cost, entry in points if cost}
    return Curve(name, [by_cost[cost] for cost in sorted(by_cost)])
