"""Writes text files atomically, and reads text, JSON and JSON-lines files within size limits. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from pixlat.common.errors import UserError

MAX_TEXT_BYTES = 2**28  # size limit of a text file
MAX_ROWS_BYTES = 2**32  # size limit of a log with one JSON object per line: about ten million lines


def write_whole(path: Path, text: str) -> Path:
    """Writes a UTF-8 text file atomically: under a temporary name, then renames it. Returns the path.

    Writes line ends as they are in `text`.
    """
    write_atomically(path, lambda place: place.write_text(text, encoding="utf-8", newline=""))
    return path


def write_atomically(path: Path, write: Callable[[Path], object], sync: bool = False) -> None:
    """Lets `write` make the file under a temporary name beside `path` and renames it. Leaves nothing if `write` fails.

    sync: puts the content on the disk before, so that the file also survives a loss of power.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        if sync:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_or_compare(file: Path, facts: Mapping[str, object], otherwise: str) -> None:
    """At the first start, writes the facts that determine a folder's contents. Later starts must have the same facts.

    Otherwise raises UserError; `otherwise` describes the contents of the folder in its message.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(facts, indent=1) + "\n"
    if file.exists() and read_text(file) != text:
        raise UserError(f"{file.parent} holds {otherwise} ({file.name}). Choose another folder.")
    write_whole(file, text)


# -- reading -----------------------------------------------------------------------------------------------------------


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading bytes. Raises OSError if it cannot be opened.

    Raises UserError for a pipe, a device or a socket, because reading from it might never end.
    """
    # O_NONBLOCK: opening a pipe must not wait for its writer
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is not an ordinary file but a folder, a pipe or a device. Replace or remove it.")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises UserError, which names the file, if it is larger, not a regular file, or not readable.
    """
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > limit:
                raise UserError(
                    f"{path} has {size:,} bytes, but a file of its kind has at most {limit:,}. Replace or remove it."
                )
            return stream.read(limit)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """The text of a regular UTF-8 file of at most `limit` bytes. Otherwise raises UserError that names the file."""
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: {error}.") from error


def sha256_of(file: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(path: Path, limit: int = MAX_TEXT_BYTES) -> Any:
    """The value in a JSON file. Raises UserError, which names the file, if it is no JSON or has NaN or infinity."""
    try:
        return parse_json(read_text(path, limit))
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path} is damaged: {error}.") from error


def parse_json(text: str) -> Any:
    """Parses one JSON value. Raises UserError for any other text, and for NaN and infinity."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise UserError("it is nested too deeply") from error
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from error


def _refuse_constant(name: str) -> NoReturn:
    raise UserError(f"{name} is not JSON")


# -- one JSON object per line ------------------------------------------------------------------------------------------


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    """Appends one line of JSON."""
    with file.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one per line. Empty if there is no file.

    Leaves out a last line without a line end, which a killed process may leave. Raises UserError for a damaged line.
    """
    rows, damaged = split_rows(file)
    if damaged:
        raise UserError(
            f"{file}, line {damaged[0]} is damaged: it is not a JSON object. Restore the file, or remove the line."
        )
    return rows


def split_rows(file: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The lines of a file that are JSON objects, and the numbers (from 1) of the lines that are not.

    Leaves out a last line without a line end.
    """
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
        row = json.loads(line)  # allows NaN, because a loss in a log may be NaN
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
