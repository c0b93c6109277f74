"""Rows in shards of .npy files. Imports no torch.

A shard gets its name only once it is complete. A card (a JSON file) describes the shards; it is written last, and
compared with the files when they are opened. A row is read with one `pread`: on a network file system that is one
request, while a memory map would send one for each page.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pixlat.common.cache import cache_file, one_at_a_time
from pixlat.common.errors import UserError
from pixlat.common.files import sha256_of, write_whole
from pixlat.common.progress import progress_bar

OPEN_FILES = 256  # how many files a process keeps open
CARD_BYTES = 256 * 2**20  # limit of a card; cards can be large, because they list the skipped images
# a file beside the shards; it lists those whose digests were correct, with their size and time of change
VERIFIED = ".verified.json"
SHOWN_BYTES = 2**30  # a progress bar appears if more bytes than this must be verified


# -- .npy files --------------------------------------------------------------------------------------------------------


class Header(NamedTuple):
    """The header of an .npy file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int  # bytes before the numbers


def read_header(file: Path) -> Header:
    """Reads the header of an .npy file, without its numbers.

    UserError unless the file holds plain numbers and has the size that the header implies.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, columns_first, dtype = reader(stream)
            header = Header(shape, dtype, stream.tell())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except Exception as error:
        # NumPy's parser may raise any exception for damaged bytes, and the message must name the file
        raise UserError(
            f"{file} is not an .npy file ({error or type(error).__name__}). It is damaged: make it again."
        ) from error
    expected = header.offset + prod(shape) * dtype.itemsize
    if columns_first or dtype.hasobject or min(shape, default=0) < 0 or size != expected:
        raise UserError(
            f"{file} is damaged: its header announces {shape} numbers of type {dtype}, which are {expected:,} bytes, "
            f"but the file has {size:,}. Make it again."
        )
    return header


def check_header(file: Path, shape: tuple[int, ...], dtypes: Sequence[DTypeLike], advice: str) -> Header:
    """Reads the header. UserError, which ends with `advice`, unless it has this shape and one of these types."""
    if not file.is_file():
        raise UserError(f"{file} is missing. {advice}")
    header = read_header(file)
    if header.shape != shape or header.dtype not in [np.dtype(dtype) for dtype in dtypes]:
        wanted = " or ".join(str(np.dtype(dtype)) for dtype in dtypes)
        raise UserError(
            f"{file} holds {header.shape} numbers of type {header.dtype}, "
            f"but the card says {shape} of type {wanted}. {advice}"
        )
    return header


class Shards:
    """Rows of equal shape in several .npy files, each read with one request.

    It can be pickled for other processes; each process opens the files anew.
    """

    def __init__(
        self, files: Sequence[Path], row_shape: tuple[int, ...], dtype: DTypeLike, offsets: Sequence[int]
    ) -> None:
        """offsets: bytes before the first row of each file."""
        self.files, self.row_shape, self.dtype, self.offsets = files, row_shape, np.dtype(dtype), offsets
        self.row_bytes = prod(row_shape) * self.dtype.itemsize
        self.opened = OpenFiles(files)

    def read(self, number: int, row: int) -> NDArray[Any]:
        """A row of a file, read-only."""
        content = self.opened.read(number, self.row_bytes, self.offsets[number] + row * self.row_bytes)
        return np.frombuffer(content, dtype=self.dtype).reshape(self.row_shape)


class OpenFiles:
    """Files that are read at any position. Keeps the OPEN_FILES most recently opened files open.

    A forked process may use the same descriptors, because `pread` does not move a file's position.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.descriptors: dict[int, int] = {}

    def read(self, number: int, size: int, offset: int) -> bytes:
        """Reads `size` bytes of a file from `offset` on. UserError if the file ends before."""
        try:
            content = os.pread(self._descriptor(number), size, offset)
        except OSError as error:
            raise UserError(
                f"{self.files[number]} cannot be read: {error.strerror}. Was it moved during the run?"
            ) from error
        if len(content) < size:
            raise UserError(
                f"{self.files[number]} is cut short: it ends after {offset + len(content):,} bytes, within an image. "
                "Prepare it again."
            )
        return content

    def _descriptor(self, number: int) -> int:
        if number not in self.descriptors:
            if len(self.descriptors) >= OPEN_FILES:
                os.close(self.descriptors.pop(next(iter(self.descriptors))))
            self.descriptors[number] = os.open(self.files[number], os.O_RDONLY | os.O_CLOEXEC)
        return self.descriptors[number]

    def __getstate__(self) -> dict[str, object]:
        return {"files": self.files, "descriptors": {}}

    def __del__(self) -> None:
        for descriptor in self.descriptors.values():
            with suppress(OSError):
                os.close(descriptor)


def shard_count(count: int, shard_size: int) -> int:
    """The number of shards for `count` items."""
    return -(-count // shard_size)


def shard_ranges(count: int, shard_size: int) -> Iterator[tuple[int, range]]:
    """Yields (number, positions) of each shard of `count` items."""
    for number, start in enumerate(range(0, count, shard_size)):
        yield number, range(start, min(start + shard_size, count))


@contextmanager
def new_shard(file: Path, shape: tuple[int, ...], dtype: DTypeLike) -> Iterator[NDArray[Any]]:
    """Yields an array to fill. The file gets its name only if the block ends without an exception."""
    temporary = file.with_name(f".{file.name}")
    array = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
    yield array
    array.flush()
    temporary.replace(file)


# -- cards -------------------------------------------------------------------------------------------------------------

Rule = Callable[[Any], bool]


def whole_number(low: int, high: int = 2**53) -> Rule:
    """The rule that a value is an integer from `low` to `high`."""
    return lambda value: type(value) is int and low <= value <= high


def text(value: Any) -> bool:
    """The rule that a value is a string."""
    return isinstance(value, str)


def texts(value: Any) -> bool:
    """The rule that a value is a list of strings."""
    return isinstance(value, list) and all(map(text, value))


def text_map(value: Any) -> bool:
    """The rule that a value is a dict of strings."""
    return isinstance(value, dict) and all(map(text, value.values()))


def read_card(
    file: Path, version: int, what: str, rules: Mapping[str, Rule], later: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Reads the card of a folder from `pixlat prepare images` or `pixlat prepare latents` (`what`).

    UserError if it is missing, damaged or of another format.
    later: fields that earlier versions did not write, with the values that stand for their absence.
    """
    again = f"Make the folder with `pixlat prepare {what}`, or let it finish."
    try:
        if file.stat().st_size > CARD_BYTES:
            raise UserError(f"{file} has {file.stat().st_size:,} bytes, but a card at most {CARD_BYTES:,}. {again}")
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise (
            error if isinstance(error, UserError) else UserError(f"{file} cannot be read ({error}). {again}")
        ) from error
    if not isinstance(content, dict) or content.get("format") != version:
        written = content.get("format") if isinstance(content, dict) else None
        raise UserError(f"{file} has format {written}, but this version reads {version}. Prepare the {what} again.")
    return check_fields({**(later or {}), **content}, rules, file, again)


def check_fields(content: Any, rules: Mapping[str, Rule], where: object, advice: str) -> dict[str, Any]:
    """Returns the content if it has exactly the fields of `rules` and each obeys its rule.

    Otherwise raises UserError that names the first faulty field.
    """
    fields = content if isinstance(content, dict) else {}
    missing, unknown = sorted(rules.keys() - fields.keys()), sorted(fields.keys() - rules.keys())
    wrong = [name for name, rule in rules.items() if name in fields and not rule(fields[name])]
    if missing or unknown or wrong:
        name = [*missing, *unknown, *wrong][0]
        fault = (
            "is missing"
            if missing
            else f"is unknown ({str(fields[name])[:40]})"
            if unknown
            else f"cannot be {str(fields[name])[:40]}"
        )
        raise UserError(f"{where} is damaged: {name!r} {fault}. {advice}")
    return fields


# -- digests -----------------------------------------------------------------------------------------------------------


def verify(folder: Path, digests: Mapping[str, str], advice: str) -> None:
    """Raises UserError, which ends with `advice`, unless every file has the SHA-256 that the card gives for it.

    Reads a file again only if its size or time of change differs: a note of the correct files is kept beside them,
    or in the user's cache folder if theirs is read-only. If several processes of a machine call this,
    one reads the files while the others wait.
    """
    kept = _kept(folder)
    with one_at_a_time(kept):
        known = _read_kept(kept)
        states = {name: _state(folder / name, digest, advice) for name, digest in digests.items()}
        unread = [name for name, state in states.items() if known.get(name) != state]
        if not unread:
            return
        total = sum((folder / name).stat().st_size for name in unread)
        with (
            progress_bar("verifying", len(unread), unit=" files", enabled=total > SHOWN_BYTES) as bar,
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        ):
            for name, digest in zip(unread, pool.map(lambda name: sha256_of(folder / name), unread), strict=True):
                if digest != digests[name]:
                    raise UserError(
                        f"{folder / name} is damaged: its SHA-256 is {digest[:12]}..., "
                        f"but the card says {digests[name][:12]}... {advice}"
                    )
                bar.update()
        _keep(kept, known | states)


def keep_verified(folder: Path, digests: Mapping[str, str]) -> None:
    """Records files whose digests were just computed, so that `verify` does not read them again."""
    kept = _kept(folder)
    with one_at_a_time(kept):
        _keep(kept, _read_kept(kept) | {name: _state(folder / name, digest, "") for name, digest in digests.items()})


def _kept(folder: Path) -> Path:
    return folder / VERIFIED if os.access(folder, os.W_OK) else cache_file("verified", folder).with_suffix(".json")


def _state(file: Path, digest: str, advice: str) -> list[object]:
    try:
        status = file.stat()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}. {advice}") from error
    return [status.st_size, status.st_mtime_ns, digest]


def _read_kept(kept: Path) -> dict[str, Any]:
    """The recorded states of verified files. Empty if the record is missing or damaged; it can be made again."""
    try:
        content = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _keep(kept: Path, states: Mapping[str, Any]) -> None:
    with suppress(OSError):  # on a full or read-only disk, every start verifies the files
        write_whole(kept, json.dumps(states) + "\n")
