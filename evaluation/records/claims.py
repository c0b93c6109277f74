"""The record of a checked claim, `claim.v1`: each claim has a folder with claim.json and claim.png.

Every string in it is data, and nothing interprets it. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from jsonschema_rs import Draft202012Validator

from pixlat.common.errors import UserError
from pixlat.common.files import read_json, write_whole

MAX_CLAIM_BYTES = 2**24
CLAIM_FILE, PICTURE_FILE = "claim.json", "claim.png"
SCHEMA_FILE = Path(__file__).with_name("claim.v1.schema.json")

ClaimRecord: TypeAlias = dict[str, Any]


@cache
def _validator() -> Draft202012Validator:
    return Draft202012Validator(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))


def validate(record: Any) -> None:
    """Raises UserError with all faults of an invalid record."""
    if faults := [
        f"{'.'.join(map(str, error.instance_path)) or 'record'}: {error.message[:300]}"
        for error in _validator().iter_errors(record)
    ]:
        raise UserError("; ".join(sorted(faults)))


def write_claim(record: Mapping[str, Any], folder: Path) -> Path:
    """Writes claim.json atomically: after an interruption there is either the complete file or no new file."""
    return write_whole(folder / CLAIM_FILE, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_claim(path: Path) -> ClaimRecord:
    """Reads a valid record. Raises UserError with the file and the fault otherwise."""
    try:
        record = read_json(path, MAX_CLAIM_BYTES)
        validate(record)
    except (ValueError, RecursionError) as error:  # a UserError is a ValueError
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    return dict(record)


def read_claims(runs: Path, left_out: list[str]) -> list[tuple[ClaimRecord, Path]]:
    """The newest record of each claim below a folder, with the record's folder, sorted by name.

    It appends a message to `left_out` for every record that it cannot read.
    """
    newest: dict[str, tuple[ClaimRecord, Path]] = {}
    for path in sorted(runs.rglob(CLAIM_FILE)):
        try:
            record = read_claim(path)
        except UserError as error:
            left_out.append(str(error))
            continue
        if record["name"] not in newest or newest[record["name"]][0]["created_utc"] <= record["created_utc"]:
            newest[record["name"]] = record, path.parent
    return [newest[name] for name in sorted(newest)]
