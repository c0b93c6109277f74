"""Files that are never seen half-written, text files read within limits, and files of one JSON object a line.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from pixlat.common.errors import UserError

MAX_TEXT_BYTES = 2**28  # of a text file that is read whole
MAX_ROWS_BYTES = 2**32  # of a log: ten million lines


def write_whole(path: Path, text: str) -> Path:
    """Writes a UTF-8 text file, line ends as given, beside its place and renames it there. Returns the path."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    return temporary.replace(path)


def write_or_compare(file: Path, facts: Mapping[str, object], otherwise: str) -> None:
    """Keeps what a folder is for, at the first start; a later start for something else is a UserError
    that calls the contents `otherwise`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(facts, indent=1) + "\n"
    if file.exists() and read_text(file) != text:
        raise UserError(f"{file.parent} holds {otherwise} ({file.name}). Choose another folder.")
    write_whole(file, text)


# -- reading -----------------------------------------------------------------------------------------------------------


def open_regular(path: Path) -> BinaryIO:
    """Opens an ordinary file to read its bytes; OSError if it cannot be opened.

    A pipe, a device or a socket is a UserError, because reading from it could wait or go on for ever.
    """
    # O_NONBLOCK: opening a pipe must not wait for its writer
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is not an ordinary file but a folder, a pipe or a device. Replace or remove it.")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of an ordinary file of at most `limit` bytes.

    A file that is larger, of another kind or cannot be read is a UserError that names it.
    """
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > limit:
                raise UserError(
                    f"{path} has {size:,} bytes, and a file of its kind has at most {limit:,}. Replace or remove it."
                )
            return stream.read(limit)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """The text of an ordinary UTF-8 file of at most `limit` bytes; anything else is a UserError that names the file."""
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: {error}.") from error


def sha256_of(file: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(path: Path, limit: int = MAX_TEXT_BYTES) -> Any:
    """The value in a JSON file, without NaN and infinity; anything else is a UserError that names the file."""
    try:
        return parse_json(read_text(path, limit))
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path} is damaged: {error}.") from error


def parse_json(text: str) -> Any:
    """One JSON value, without NaN and infinity; other text is a UserError."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise UserError("it is nested too deeply") from error
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from error


def _refuse_constant(name: str) -> NoReturn:
    raise UserError(f"{name} is not JSON")


# -- one JSON object a line --------------------------------------------------------------------------------------------


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    """Appends one line of JSON."""
    with file.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file, none where there is no file; a last line cut short by a kill is left out.

    A damaged line is a UserError that names it.
    """
    rows, damaged = split_rows(file)
    if damaged:
        raise UserError(
            f"{file}, line {damaged[0]} is damaged: it is not a JSON object. Restore the file, or remove the line."
        )
    return rows


def split_rows(file: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The whole lines of a file that are JSON objects, and the numbers, from 1, of those that are not."""
    rows: list[dict[str, Any]] = []
    damaged: list[int] = []
    if not file.exists():
        return rows, damaged
    *lines, _ = read_bytes(file, MAX_ROWS_BYTES).split(b"\n")
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is None:
            damaged.append(number)
        else:
            rows.append(row)
    return rows, damaged


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)  # with NaN: a log may tell that a loss became one
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
