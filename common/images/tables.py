"""Reads images from Parquet tables and Arrow files in Hugging Face's layout, row by row."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pixlat.common.errors import UserError
from pixlat.common.images.archive import Archive, and_others, check_largest, part_of_file
from pixlat.common.images.crop import check_file_bytes

if TYPE_CHECKING:
    import pyarrow

LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")

GROUPS_KEPT = 2  # decoded Parquet row groups that a process caches; reading in order then decodes each group once


class TableArchive(Archive):
    """Tables with a column of images (a struct with `bytes`, or binary) and a column of class numbers.

    A file consists of pieces; pixlat reads one piece at a time.
    """

    def __init__(self, root: Path, files: Sequence[Path]) -> None:
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise UserError(f"{files[0]} needs the package pyarrow: pip install 'pixlat[tables]'.") from None
        schema = self.schema(files[0])
        self.image, self.label = _columns(schema, files[0])
        for file in files[1:]:
            if (columns := _columns(self.schema(file), file)) != (self.image, self.label):
                raise UserError(
                    f"{file} has its images and labels in the columns {columns}, "
                    f"but {files[0]} in {(self.image, self.label)}. Use one layout."
                )
        pieces = [_opened(file, partial(self.pieces, file)) for file in files]  # per file, the labels of each piece
        self.owners = [(number, piece) for number, of_file in enumerate(pieces) for piece in range(len(of_file))]
        self.starts = np.cumsum([0, *(len(labels) for of_file in pieces for labels in of_file)])
        rows = [sum(len(labels) for labels in of_file) for of_file in pieces]
        self.first_rows = np.cumsum([0, *rows])
        self.file_sizes = [file.stat().st_size for file in files]
        labels = np.concatenate([labels for of_file in pieces for labels in of_file] or [np.empty(0, np.int64)])
        class_names = _feature_names(schema, self.label, files[0])
        if class_names is None:
            check_largest(
                int(labels.max(initial=-1)), len(labels), f"{files[0]}{and_others(files)}, column {self.label}"
            )
            class_names = tuple(str(number) for number in range(1 + int(labels.max(initial=-1))))
        super().__init__(files, labels, class_names, np.repeat([part_of_file(root, file) for file in files], rows))

    def name(self, index: int) -> str:
        number = self._file_of(index)
        return f"{self.files[number].name}, row {index - self.first_rows[number]}"

    def size(self, index: int) -> int:
        return self.file_sizes[self._file_of(index)]

    def _file_of(self, index: int) -> int:
        return int(np.searchsorted(self.first_rows, index, side="right")) - 1

    def read(self, index: int) -> bytes:
        order = int(np.searchsorted(self.starts, index, side="right")) - 1
        number, piece = self.owners[order]
        entry = _opened(
            self.files[number],
            lambda: self.column(self.files[number], piece)[index - int(self.starts[order])].as_py(),
            self.name(index),
        )
        content: bytes | None = entry["bytes"] if isinstance(entry, dict) else entry
        if content is None:
            raise UserError(
                f"{self.name(index)} holds a path instead of an image. Save the data set with its images inside."
            )
        check_file_bytes(len(content), self.name(index))
        return content

    @abstractmethod
    def schema(self, file: Path) -> pyarrow.Schema:
        """The columns of a file."""

    @abstractmethod
    def pieces(self, file: Path) -> list[NDArray[np.int64]]:
        """The labels of each piece of a file."""

    @abstractmethod
    def column(self, file: Path, piece: int) -> pyarrow.ChunkedArray:
        """The images of one piece."""


class ParquetArchive(TableArchive):
    """Parquet tables. A piece is a row group, and reading one image decodes its whole group.

    That is fast in order but slow in random order: use `pixlat prepare images` before a training.
    """

    suffix = ".parquet"

    def schema(self, file: Path) -> pyarrow.Schema:
        return _parquet(file).schema_arrow

    def pieces(self, file: Path) -> list[NDArray[np.int64]]:
        opened = _parquet(file)
        groups = range(opened.num_row_groups)
        return [
            _as_labels(opened.read_row_group(group, [self.label], use_threads=False).column(0), file, self.label)
            for group in groups
        ]

    def column(self, file: Path, piece: int) -> pyarrow.ChunkedArray:
        return _row_group(file, piece, self.image)


class ArrowArchive(TableArchive):
    """Arrow files of `save_to_disk` and of the cache of `datasets`. They are memory-mapped, so random order is fast."""

    suffix = ".arrow"

    def schema(self, file: Path) -> pyarrow.Schema:
        return _arrow_table(file).schema

    def pieces(self, file: Path) -> list[NDArray[np.int64]]:
        return [_as_labels(_arrow_table(file).column(self.label), file, self.label)]

    def column(self, file: Path, piece: int) -> pyarrow.ChunkedArray:
        return _arrow_table(file).column(self.image)


def _as_labels(column: pyarrow.ChunkedArray, file: Path, name: str) -> NDArray[np.int64]:
    """Class numbers (n,) of a column. Raises UserError if a value is not a whole number."""
    from pyarrow import types

    kind, wanted = column.type, "Class numbers are whole numbers from 0 on, without gaps in the column. Convert it."
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        raise UserError(f"{file}: the column {name} holds {kind} instead of class numbers. {wanted}")
    if column.null_count:
        raise UserError(f"{file}: {column.null_count:,} rows of the column {name} are empty. {wanted}")
    values = column.to_numpy()
    labels: NDArray[np.int64] = (
        values.astype(np.int64) if kind.bit_width < 64 or not len(values) or abs(values).max() < 2**62 else values[:0]
    )
    if len(labels) != len(values) or (types.is_floating(kind) and (labels != values).any()):
        wrong = next(
            (value for value in values.tolist() if value != value or abs(value) >= 2**62 or value != int(value)),
            values[0],
        )
        raise UserError(f"{file}: the column {name} holds {wrong}. {wanted}")
    return labels


def _opened(file: Path, open_it: Callable[[], Any], what: object = None) -> Any:
    """Calls `open_it` and returns its result. Converts pyarrow's errors to UserErrors that name `what`, or the file."""
    from pyarrow import ArrowException

    try:
        return open_it()
    except UserError:
        raise
    except (OSError, ValueError, ArrowException) as error:
        raise UserError(
            f"{what or file} cannot be read ({next(iter(str(error).splitlines()), type(error).__name__)}). "
            f"Download {file} again."
        ) from error


def _parquet(file: Path) -> Any:
    from pyarrow.parquet import ParquetFile

    return _opened(file, lambda: ParquetFile(file))


@lru_cache(maxsize=GROUPS_KEPT)
def _row_group(file: Path, group: int, column: str) -> pyarrow.ChunkedArray:
    return _parquet(file).read_row_group(group, [column], use_threads=False).column(0)


@cache  # a memory map takes no memory
def _arrow_table(file: Path) -> pyarrow.Table:
    import pyarrow

    def read() -> pyarrow.Table:
        try:
            return pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()
        except pyarrow.ArrowInvalid:  # the other of Arrow's two file formats
            return pyarrow.ipc.open_file(pyarrow.memory_map(str(file))).read_all()

    return _opened(file, read)


def _columns(schema: pyarrow.Schema, file: Path) -> tuple[str, str]:
    """The names of the columns of images and of labels."""
    from pyarrow import types

    def holds_images(kind: pyarrow.DataType) -> bool:
        if types.is_struct(kind):
            return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    image = next((field.name for field in schema if holds_images(field.type)), None)
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if image is None or label is None:
        raise UserError(
            f"{file} has the columns {', '.join(schema.names)}. "
            f"It needs a column of images and a label column called one of {', '.join(LABEL_COLUMNS)}."
        )
    return image, label


def _feature_names(schema: pyarrow.Schema, label: str, file: Path) -> tuple[str, ...] | None:
    """The class names in the metadata that Hugging Face writes, or None."""
    try:
        names: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        for key in ("info", "features", label, "names"):
            names = names.get(key) or {}
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file}: its Hugging Face metadata are damaged ({error}). Download it again, or save it without them."
        ) from error
    if not names:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{file}: its metadata name the classes {str(names)[:40]}, which is no list of names. "
            "Download it again, or save it without them."
        )
    return tuple(names)
