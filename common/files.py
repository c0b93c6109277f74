"""Files that are never seen half-written, and files of one JSON object a line. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError


def write_whole(path: Path, text: str) -> Path:
    """Writes a UTF-8 text file, line ends as given, beside its place and renames it there. Returns the path."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    return temporary.replace(path)


def hold_to(file: Path, facts: Mapping[str, object], otherwise: str) -> None:
    """Keeps what a folder is for, at the first start; a later start for something else is a UserError that calls the contents `otherwise`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(facts, indent=1) + "\n"
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise UserError(f"{file.parent} holds {otherwise} ({file.name}). Choose another folder.")
    write_whole(file, text)


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    """Appends one line of JSON."""
    with file.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a last line cut short by a kill is left out."""
    if not file.exists():
        return []
    lines = file.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
