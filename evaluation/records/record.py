"""The record of one run, `result.v1`: one JSON object per row of the leaderboard, described by result.v1.schema.json.

Every string in a record is data: nothing here or in the leaderboard interprets it. Imports no torch.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from jsonschema_rs import Draft202012Validator

from pixlat.common.errors import UserError
from pixlat.common.files import read_json, write_atomically
from pixlat.evaluation.protocols.identity import digest, protocol_hash

RESULT = "result.json"  # the record's file name in a run's folder
MAX_RECORD_BYTES = 2**24  # a record with many seeds has about ten thousand bytes
SCHEMA = "result.v1"
SCHEMA_FILE = Path(__file__).with_name(f"{SCHEMA}.schema.json")

Record: TypeAlias = dict[str, Any]
Metric: TypeAlias = dict[str, Any]  # value, value_bc, se, n, unit, ...: the record's metrics.<name>


class RecordError(UserError):
    """A record is damaged, invalid or was changed after it was written."""


def build_record(fields: Mapping[str, Any]) -> Record:
    """A complete, valid record with these fields.

    Missing schema, kind, created_utc and protocol_hash get their default; row_id is always computed.
    """
    protocol = fields.get("protocol")
    record: Record = {
        "schema": SCHEMA,
        "kind": "measured",
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "protocol_hash": protocol_hash(protocol) if protocol else None,
        **fields,
    }
    record["row_id"] = row_id(record)
    validate(record)
    return record


def row_id(record: Mapping[str, Any]) -> str:
    """sha256 of the canonical record without its row_id."""
    try:
        return digest({key: value for key, value in record.items() if key != "row_id"})
    except ValueError as error:
        raise RecordError(
            f"record: NaN and infinity are not allowed ({error}). Use null for a number that was not measured."
        ) from error


def validate(record: Any) -> None:
    """Raises RecordError for an invalid record.

    Faults are wrong, missing or unknown fields, a hash that does not fit the protocol, and a row_id that does not fit
    the other fields.
    """
    faults = [
        f"{'.'.join(map(str, error.instance_path)) or 'record'}: {error.message[:300]}"
        for error in _validator().iter_errors(record)
    ]
    if faults:
        raise RecordError("; ".join(sorted(faults)))
    if record["protocol"] is not None and record["protocol_hash"] != protocol_hash(record["protocol"]):
        raise RecordError(
            f"protocol_hash: {record['protocol_hash']} is not the hash "
            f"of the protocol, {protocol_hash(record['protocol'])}"
        )
    if record["row_id"] != row_id(record):
        raise RecordError("row_id: does not fit the other fields, so the record was changed after it was written")


def faults_of_fields(fields: Mapping[str, Any]) -> list[str]:
    """What is wrong with some of a record's fields, each by itself; the others may be missing."""
    return [
        f"{'.'.join(map(str, error.instance_path)) or 'fields'}: {error.message[:300]}"
        for error in _validator_of_fields().iter_errors(dict(fields))
    ]


def _schema() -> dict[str, Any]:
    return dict(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))


@cache
def _validator() -> Draft202012Validator:
    return Draft202012Validator(_schema())


@cache
def _validator_of_fields() -> Draft202012Validator:
    return Draft202012Validator({key: part for key, part in _schema().items() if key not in ("required", "allOf")})


def write_record(record: Record, path: Path) -> None:
    """Validates the record, then writes it atomically, so that no reader sees an incomplete file."""
    validate(record)
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda place: place.write_text(text, encoding="utf-8"), sync=True)


def read_record(path: Path) -> Record:
    """Reads a valid record. Raises RecordError with the file and the fault otherwise."""
    try:
        record = read_json(path, MAX_RECORD_BYTES)
        validate(record)
    except RecursionError as error:
        raise RecordError(f"{path}: nested too deeply for a record") from error
    except ValueError as error:  # not an ordinary file, not UTF-8, not JSON, not a record
        raise RecordError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    return dict(record)


# -- CSV ---------------------------------------------------------------------------------------------------------------
# Every leaf of a record has a column, whose name joins the nested keys with dots (a dot within a key becomes "\.").
# A cell holds JSON. A string stands there without quotes if it cannot be mistaken for JSON and is harmless in a
# spreadsheet. An empty cell is an absent field. A list is JSON in one cell.


def to_csv(records: Iterable[Record]) -> str:
    """The records as CSV; `from_csv` restores them exactly."""
    rows = [flatten_record(record) for record in records]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_cell(column) for column in columns])
    writer.writerows([_cell(row[column]) if column in row else "" for column in columns] for row in rows)
    return text.getvalue()


def from_csv(text: str) -> list[Record]:
    """The records from which `to_csv` made this text."""
    header, *rows = csv.reader(io.StringIO(text, newline=""))
    columns = [_parse(name) for name in header]
    return [
        unflatten({column: _parse(cell) for column, cell in zip(columns, row, strict=True) if cell}) for row in rows
    ]


def flatten_record(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; empty objects and lists are leaves."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = prefix + key.replace("\\", "\\\\").replace(".", "\\.")
        flat |= flatten_record(item, f"{name}.") if isinstance(item, Mapping) and item else {name: item}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten_record`."""
    nested: dict[str, Any] = {}
    for name, item in flat.items():
        *parents, last = _split_name(name)
        target = nested
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = item
    return nested


def _split_name(name: str) -> Sequence[str]:
    """a.b\\.c -> [a, b.c]."""
    parts, characters = [""], iter(name)
    for character in characters:
        if character == ".":
            parts.append("")
        else:
            parts[-1] += next(characters) if character == "\\" else character
    return parts


_PLAIN, _ASCII = (json.JSONEncoder(ensure_ascii=ascii, allow_nan=False).encode for ascii in (False, True))


def _cell(value: Any) -> str:
    """The text of a cell.

    A string stays without quotes unless it reads as JSON, looks like a spreadsheet formula or has unprintable
    characters.
    """
    if not isinstance(value, str):
        return _ASCII(value)
    plain = value != "" and value.isprintable() and value == value.strip() and value[0] not in "=+-@"
    return (value if _parse(value) is value else _PLAIN(value)) if plain else _ASCII(value)


def _parse(cell: str) -> Any:
    if cell[:1].isalpha() and cell[0] not in "tfnNI":  # the first letters of true, false, null, NaN and Infinity
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell
