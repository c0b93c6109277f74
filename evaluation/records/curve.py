"""`curve.jsonl`: the scores of a run during its training. The file lies beside the run's record.

Every line is one JSON object, and lines are in the order of training. Imports no torch.

    {"images": 64000, "macs_train": 8700000000000, "protocol_hash": "865ea3e3a082",
     "metrics": {"fd_embedded": {"value": 812.4, ...}}, "digest": "..."}

images         training images seen, above 0
macs_train     MACs of this run's training up to this point, counted as in `train.macs_total` of the record:
               earlier stages do not count
protocol_hash  of the evaluation; a point is compared with the record only if both have the same hash
metrics        as in the record: value, n, unit, and, if known, se, value_bc, ...
digest         sha256 of the canonical JSON of the other fields; lines of early versions have no digest
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

from pixlat.common.errors import UserError
from pixlat.common.files import MAX_TEXT_BYTES, parse_json, read_text
from pixlat.evaluation.protocols.identity import digest

CURVE = "curve.jsonl"
KEYS = {"images", "macs_train", "protocol_hash", "metrics"}
LARGEST = 1e30  # the largest absolute value of any number, as in records

CurvePoint: TypeAlias = dict[str, Any]


def curve_lines(points: list[CurvePoint]) -> str:
    """The text of a curve.jsonl file with these points."""
    return "".join(json.dumps(point | {"digest": digest(point)}) + "\n" for point in points)


def read_curve(path: Path) -> list[CurvePoint]:
    """The points of a file, or an empty list if there is no file.

    Raises UserError with the line's number for a line that is no point or that was changed after it was written.
    """
    if not path.exists():
        return []
    text = read_text(path, MAX_TEXT_BYTES)
    *lines, rest = text.split("\n")
    # Files are written atomically today. In an older file a kill may have cut the last line, which we then ignore.
    if rest and '"digest"' in text:
        raise UserError(f"{path} is damaged: its last line is incomplete. Restore the file, or remove it.")
    return [_point(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _point(line: str, where: str) -> CurvePoint:
    try:
        point = parse_json(line)
        expected = point.pop("digest", None) if isinstance(point, dict) else None
        actual = digest(point)
    except (ValueError, RecursionError) as error:  # a UserError is a ValueError
        raise UserError(f"{where}: cannot be read as a point of a curve: {error}") from error
    if not _is_point(point):
        raise UserError(f"{where}: is not a point of a curve; evaluation/records/curve.py describes the lines.")
    if expected not in (None, actual):
        raise UserError(
            f"{where}: was changed after it was written: its digest does not fit. Restore the file, or remove it."
        )
    return dict(point)


def _is_point(point: Any) -> bool:
    if not isinstance(point, dict) or set(point) != KEYS or not isinstance(point["metrics"], dict):
        return False
    counts = all(type(point[key]) is int and 0 <= point[key] <= LARGEST for key in ("images", "macs_train"))
    return (
        counts
        and isinstance(point["protocol_hash"], str)
        and all(_is_metric(entry) for entry in point["metrics"].values())
    )


def _is_metric(entry: Any) -> bool:
    return isinstance(entry, dict) and _is_number(entry.get("value")) and _is_number(entry.get("se") or 0.0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST
