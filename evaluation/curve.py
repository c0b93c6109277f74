"""`curve.jsonl`: the scores of a run while it trained, beside its record. One JSON object a line, in the order of training; imports no torch.

    {"images": 64000, "macs_train": 8700000000000, "protocol_hash": "7d8e681bae88", "metrics": {"fd_embedded": {"value": 812.4, "se": 10.9, "n": 1000, ...}}}

images         training images seen, above 0
macs_train     MACs of training up to here, as `train.macs_total` of the record counts them: this run, without earlier stages
protocol_hash  of the evaluation; points of another protocol than the record's are not compared with it
metrics        as in the record: value, n, unit, and se, value_bc, ... where known
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeAlias

from common.errors import UserError
from common.files import read_rows

CURVE = "curve.jsonl"
KEYS = {"images", "macs_train", "protocol_hash", "metrics"}

CurvePoint: TypeAlias = dict[str, Any]


def read_curve(path: Path) -> list[CurvePoint]:
    """The whole lines of a file, none where there is no file. A line of another form is a UserError that names it."""
    try:
        points = read_rows(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as a curve: {error}") from error
    wrong = next((number for number, point in enumerate(points, start=1) if not _is_point(point)), None)
    if wrong is not None:
        raise UserError(f"{path}, line {wrong}: is not a point of a curve; evaluation/curve.py says what a line holds.")
    return points


def _is_point(point: Any) -> bool:
    if not isinstance(point, dict) or set(point) != KEYS or not isinstance(point["metrics"], dict):
        return False
    counts = (point["images"], point["macs_train"])
    whole = all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts)
    return whole and isinstance(point["protocol_hash"], str) and all(_is_metric(entry) for entry in point["metrics"].values())


def _is_metric(entry: Any) -> bool:
    numbers = (entry.get("value"), entry.get("se") or 0.0) if isinstance(entry, dict) else (None,)
    return all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
