"""Arrays in shards of .npy files: written whole or not at all, read through memory maps, described by a card that is written last. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from common.errors import UserError


class Shards:
    """The arrays of several files, mapped where they are used: loader processes each need maps of their own, so none is handed over."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    @cached_property
    def arrays(self) -> list[NDArray[Any]]:
        """One for each file."""
        return [np.load(file, mmap_mode="r") for file in self.files]

    def __getstate__(self) -> dict[str, object]:
        return {"files": self.files}


def shard_ranges(count: int, shard_size: int) -> Iterator[tuple[int, range]]:
    """(number, positions) of each shard of `count` things."""
    for number, start in enumerate(range(0, count, shard_size)):
        yield number, range(start, min(start + shard_size, count))


@contextmanager
def new_shard(file: Path, shape: tuple[int, ...], dtype: DTypeLike) -> Iterator[NDArray[Any]]:
    """An array to be filled; the file has its name once the block has ended well."""
    temporary = file.with_name(f".{file.name}")
    array = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
    yield array
    array.flush()
    temporary.replace(file)


def read_card(file: Path, version: int, what: str) -> dict[str, Any]:
    """The card of a folder that `launch/prepare.py` made of images or latents (`what`); a UserError if it is missing or of another format."""
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}). Make the folder with `python launch/prepare.py {what}`, or let it finish.") from error
    if content.get("format") != version:
        raise UserError(f"{file} has format {content.get('format')}, and this version reads {version}. Prepare the {what} again.")
    return content
