"""Reads imported.json, which describes the released file in a run folder of `pixlat import`. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixlat.common.config.saved import IMPORTED_IDENTITY
from pixlat.common.errors import UserError
from pixlat.common.files import parse_json, read_text

IMPORTED = "imported.json"  # in a run folder of `pixlat import`: describes the released file
NUMBER_OR_NONE = (float, int, type(None))
# the keys of imported.json that we read, and their types
ORIGIN: dict[str, Any] = {"file": str, "sha256": str, "ema_decay": NUMBER_OR_NONE, "weights": str, "licence": str}
MAX_IMPORTED_BYTES = 2**20


def imported_facts(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The contents of imported.json, which describes a run folder's released file; None for a run trained here.

    facts: those of the folder's checkpoint, with the digest of imported.json; early imports have no digest.
    Raises UserError if the file was changed.
    """
    file, imported = folder / IMPORTED, facts.get("identity") == IMPORTED_IDENTITY
    if not imported and not file.exists():
        return None
    remedy = "Restore it from a copy, or import the released file again (`pixlat import`)."
    if not imported:
        raise UserError(f"{file} does not belong to {folder}, which was trained here and not imported. Remove it.")
    text = read_text(file, MAX_IMPORTED_BYTES)
    expected = facts.get("imported_sha256", digest_of(text))
    if digest_of(text) != expected:
        raise UserError(
            f"{file} was changed after the import: its sha256 is {digest_of(text)}, "
            f"but the checkpoint expects {expected}. {remedy}"
        )
    try:
        origin = parse_json(text)
    except UserError as error:
        raise UserError(f"{file} is damaged: {error}. {remedy}") from error
    if not isinstance(origin, dict) or any(
        key not in origin or not isinstance(origin[key], kind) for key, kind in ORIGIN.items()
    ):
        raise UserError(f"{file} is damaged: it does not give {', '.join(ORIGIN)} of the released file. {remedy}")
    return origin


def digest_of(text: str) -> str:
    """Hex sha256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()
