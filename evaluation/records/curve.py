"""`curve.jsonl`: the scores of a run while it trained, beside its record.

One JSON object a line, in the order of training; imports no torch.

    {"images": 64000, "macs_train": 8700000000000, "protocol_hash": "865ea3e3a082",
     "metrics": {"fd_embedded": {"value": 812.4, ...}}, "digest": "..."}

images         training images seen, above 0
macs_train     MACs of training up to here, as `train.macs_total` of the record counts them:
               this run, without earlier stages
protocol_hash  of the evaluation; points of another protocol than the record's are not compared with it
metrics        as in the record: value, n, unit, and se, value_bc, ... where known
digest         sha256 of the canonical JSON of the rest; lines that were written before there was one have none
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
LARGEST = 1e30  # of every number, as in records

CurvePoint: TypeAlias = dict[str, Any]


def curve_lines(points: list[CurvePoint]) -> str:
    """The text of a file."""
    return "".join(json.dumps(point | {"digest": digest(point)}) + "\n" for point in points)


def read_curve(path: Path) -> list[CurvePoint]:
    """The points of a file, none where there is no file.

    A line of another form, or one that was changed, is a UserError that names it.
    """
    if not path.exists():
        return []
    text = read_text(path, MAX_TEXT_BYTES)
    *lines, rest = text.split("\n")
    # written whole; the last line of an older file may have been cut short by a kill and is left out
    if rest and '"digest"' in text:
        raise UserError(f"{path} does not end with a whole line: it is damaged. Restore the file, or remove it.")
    return [_point(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _point(line: str, where: str) -> CurvePoint:
    try:
        point = parse_json(line)
        expected = point.pop("digest", None) if isinstance(point, dict) else None
        found = digest(point)
    except (ValueError, RecursionError) as error:  # a UserError is a ValueError
        raise UserError(f"{where}: cannot be read as a point of a curve: {error}") from error
    if not _is_point(point):
        raise UserError(f"{where}: is not a point of a curve; evaluation/records/curve.py says what a line holds.")
    if expected not in (None, found):
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
