"""Image files inside larger files: WebDataset tars, Parquet tables and Arrow files as Hugging Face writes them. Read on demand, by position.

Names of files and folders tell what is for training (train) and what is held out (val, validation, test). Nothing is unpacked.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.cache import KEEP_FROM, SETTLED_NS, cache_file, keep_arrays, kept_arrays, one_at_a_time
from common.crop import check_file_bytes
from common.errors import UserError
from common.names import Names

if TYPE_CHECKING:
    import pyarrow

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
HELD_OUT_NAMES = ("val", "validation", "test")  # of folders and files, best first
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")
SMALL_SET = 100_000  # class numbers up to this are taken from any data set, and larger ones only from one with as many images
LABEL_BYTES = 255  # of a .cls member: a class number or a name
GROUPS_KEPT = 2  # row groups of Parquet files that a process keeps decoded: reading in order decodes each once


class Archive(ABC):
    """Encoded images with labels. It holds no open file, so that loader processes can be forked."""

    suffix: str

    def __init__(self, files: Sequence[Path], labels: NDArray[np.int64], class_names: tuple[str, ...], parts: NDArray[np.str_]) -> None:
        """labels (N,); parts (N,): "train", one of HELD_OUT_NAMES, or "" where no name tells."""
        self.files, self.labels, self.class_names, self.parts = files, labels, class_names, parts

    @abstractmethod
    def name(self, index: int) -> str:
        """Where the image lies, for messages and for the split."""

    @abstractmethod
    def size(self, index: int) -> int:
        """Bytes of the image, or of the file that it lies in."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The image file at a position."""

    def split(self) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """Positions of the training images and of the held-out ones; None where no name tells."""
        if not (self.parts == "train").any():
            return np.arange(len(self.parts)), None
        found = next((name for name in HELD_OUT_NAMES if (self.parts == name).any()), None)
        return np.flatnonzero(self.parts == "train"), None if found is None else np.flatnonzero(self.parts == found)

    def identity(self, positions: NDArray[np.int64]) -> str:
        """SHA-256 over names and sizes: hashing the contents of 1.28 million images would take hours."""
        hasher = hashlib.sha256()
        for index in positions.tolist():
            hasher.update(f"{self.name(index)}\0{self.size(index)}\n".encode())
        return hasher.hexdigest()


def open_archive(kind: str, root: Path) -> Archive:
    """All files of a kind (a key of ARCHIVES) at or below a path, in the order of their names."""
    archive = ARCHIVES[kind]
    files = [root] if root.is_file() else sorted(root.rglob(f"*{archive.suffix}")) if root.is_dir() else []
    files = [file for file in files if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)]
    if not files:
        raise UserError(f"data.path={str(root)!r} holds no {archive.suffix} file. Give the folder of the files, or one file.")
    return archive(root, files)


def check_largest(label: int, images: int, where: object) -> None:
    """UserError for a class number that cannot be one: it is beyond SMALL_SET and beyond the number of images. As many classes would be made."""
    if label >= max(images, SMALL_SET):
        raise UserError(
            f"{where}: class number {label if label < 10**15 else 'of ' + str(len(str(label))) + ' digits'} in a data set of {images:,} images. "
            f"Classes are numbered from 0 on. Repair the labels; numbers below {SMALL_SET:,} are always taken."
        )


def part_of(path: PurePosixPath | Path) -> str:
    """What the names in a path say: "train", one of HELD_OUT_NAMES, or "". A name may have other words beside it (imagenet-train-0001.tar)."""
    words = set(re.split(r"[^a-z]+", str(path).lower()))
    return next((name for name in ("train", *HELD_OUT_NAMES) if name in words), "")


def part_of_file(root: Path, file: Path) -> str:
    """The same for a file below the root, whose own name says nothing."""
    return part_of(file.relative_to(root) if file != root else Path(file.name))


# -- WebDataset tars ------------------------------------------------------------------------------------------------------------


TARS_FORMAT = 1  # of what is kept of tars


class Member(NamedTuple):
    """One image of a tar."""

    offset: int  # bytes
    size: int
    name: str
    label: str | int  # a number where `.cls` gives one
    part: str


class TarArchive(Archive):
    """Members of one name are one sample (`0001.jpg`, `0001.cls`); without a `.cls` the class is the member's folder, or the tar of its synset."""

    suffix = ".tar"

    def __init__(self, root: Path, files: Sequence[Path]) -> None:
        index = list_tars(root, files)
        if not len(index.where):
            raise UserError(f"{files[0]}{_others(files)} holds no image ({', '.join(IMAGE_SUFFIXES)}).")
        self.where, self.members = index.where, index.names
        if index.numbered.any() != index.numbered.all():
            raise UserError(f"{files[0]}{_others(files)}: some images have a class number (.cls) and some only a folder. Repair the tars.")
        found: list[str] = list(index.classes)
        if index.numbered.all():
            largest = max(map(int, found))
            check_largest(largest, len(index.where), f"{files[0]}{_others(files)}, .cls")
            class_names, numbers = list(map(str, range(1 + largest))), np.array(list(map(int, found)), dtype=np.int64)
        else:
            class_names = sorted(found)
            places = {name: place for place, name in enumerate(class_names)}
            numbers = np.array([places[name] for name in found], dtype=np.int64)
        super().__init__(files, numbers[index.class_of], tuple(class_names), np.array(PARTS_IN_TARS)[index.part_of])

    def name(self, index: int) -> str:
        return f"{self.files[self.where[index, 0]].name}/{self.members[index]}"

    def size(self, index: int) -> int:
        return int(self.where[index, 2])

    def read(self, index: int) -> bytes:
        number, offset, size = self.where[index].tolist()
        check_file_bytes(size, self.name(index))
        try:
            with self.files[number].open("rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise UserError(f"{self.files[number]} cannot be read: {error.strerror}. Was it moved during the run?") from error


PARTS_IN_TARS = ("", "train", *HELD_OUT_NAMES)


@dataclass(frozen=True)
class TarIndex:
    """What lies where in some tars."""

    where: NDArray[np.int64]  # (N, 3): number of the tar, offset and size of the image in bytes
    names: Names  # of the members
    classes: Names  # distinct labels in the order of their first image
    numbered: NDArray[np.bool_]  # of each of them: whether it is the number in a .cls
    class_of: NDArray[np.int32]  # (N,) into `classes`
    part_of: NDArray[np.int8]  # (N,) into PARTS_IN_TARS


def list_tars(root: Path, files: Sequence[Path]) -> TarIndex:
    """The images of tars. All headers of a tar are read to find them, so what large tars hold is kept while their names, sizes and times of change stay.

    Of several processes of a machine that ask at once, one reads the headers and the others what it kept.
    """
    kept = cache_file("tars", root).with_suffix(".npz")
    with one_at_a_time(kept):
        state = _state_of(root, files)
        if (known := _read_kept(kept, state)) is not None:
            return known
        start = time.time_ns()
        index = _walk_tars(root, files)
        if len(index.where) >= KEEP_FROM and state["changed_ns"].max() < start - SETTLED_NS:
            _keep(kept, state, index)
    return index


def _state_of(root: Path, files: Sequence[Path]) -> dict[str, NDArray[Any]]:
    """What tells whether tars have changed."""
    status = [file.stat() for file in files]
    places = Names.of(str(file.relative_to(root)) for file in files).arrays("tars")
    numbers = {"tar_sizes": [each.st_size for each in status], "changed_ns": [each.st_mtime_ns for each in status]}
    return places | {name: np.array(values, dtype=np.int64) for name, values in numbers.items()}


def _walk_tars(root: Path, files: Sequence[Path]) -> TarIndex:
    where, names, class_of, parts = [], [], [], []
    classes: dict[str | int, int] = {}
    for number, file in enumerate(files):
        members = list(_members(file, part_of_file(root, file)))  # of one tar at a time
        where += [np.array([(number, member.offset, member.size) for member in members], dtype=np.int64).reshape(-1, 3)]
        names.append(Names.of(member.name for member in members))
        class_of.append(np.array([classes.setdefault(member.label, len(classes)) for member in members], dtype=np.int32))
        parts.append(np.array([PARTS_IN_TARS.index(member.part) for member in members], dtype=np.int8))
    numbered = np.array([isinstance(label, int) for label in classes], dtype=bool)
    found = Names.of(map(str, classes))
    return TarIndex(np.concatenate(where), Names.joined(names), found, numbered, np.concatenate(class_of), np.concatenate(parts))


def _keep(kept: Path, state: dict[str, NDArray[Any]], index: TarIndex) -> None:
    arrays = {name: getattr(index, name) for name in ("where", "numbered", "class_of", "part_of")}
    keep_arrays(kept, {"format": np.array(TARS_FORMAT), **state, **arrays, **index.names.arrays("names"), **index.classes.arrays("classes")})


def _read_kept(kept: Path, state: dict[str, NDArray[Any]]) -> TarIndex | None:
    """What was kept of tars that are still as they were."""
    arrays = kept_arrays(kept, TARS_FORMAT)
    try:
        if arrays is None or not all(np.array_equal(arrays[name], value) for name, value in state.items()):
            return None
        names, classes = Names.from_arrays(arrays, "names"), Names.from_arrays(arrays, "classes")
        index = TarIndex(arrays["where"], names, classes, arrays["numbered"], arrays["class_of"], arrays["part_of"])
    except (ValueError, KeyError):  # damaged: the headers are read again
        return None
    lengths = {len(index.where), len(index.names), len(index.class_of), len(index.part_of)}
    return index if len(lengths) == 1 and len(index.classes) == len(index.numbered) else None


def _members(file: Path, part: str) -> Iterator[Member]:
    images: dict[PurePosixPath, tuple[str, int, int]] = {}  # sample -> name, offset, size
    labels: dict[PurePosixPath, str] = {}
    end = 0  # of the last member
    try:
        with tarfile.open(file, mode="r:") as tar:
            for entry in tar:
                end = entry.offset_data + -(-entry.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                path = PurePosixPath(entry.name)
                if not entry.isfile() or path.name.startswith("."):
                    continue
                sample = path.parent / path.name.partition(".")[0]
                if entry.issparse() and path.suffix.lower() in (*IMAGE_SUFFIXES, ".cls"):
                    raise UserError(f"{file}: {entry.name} is stored as a sparse file, whose bytes do not lie in one place. Pack the tar without --sparse.")
                if path.suffix.lower() in IMAGE_SUFFIXES:
                    images[sample] = entry.name, entry.offset_data, entry.size
                elif path.suffix == ".cls":
                    labels[sample] = _label_text(tar, entry, file)
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as an uncompressed tar ({error}). Download it again, or unpack a compressed one.") from error
    if file.stat().st_size < end + tarfile.BLOCKSIZE:  # an empty block ends every tar, and tarfile does not miss it
        raise UserError(f"{file} is cut short: its {file.stat().st_size:,} bytes end in or behind {entry.name} without an end mark. Download it again.")
    for sample, (name, offset, size) in images.items():
        text = labels.get(sample, "")
        label: str | int = int(text) if text.isdecimal() else text or _class_of(file, sample)
        yield Member(offset, size, name, label, part or part_of(sample.parent if text else sample.parent.parent))


def _label_text(tar: tarfile.TarFile, entry: tarfile.TarInfo, file: Path) -> str:
    """What a .cls member holds; a long one is a UserError before it is read."""
    if entry.size > LABEL_BYTES:
        raise UserError(f"{file}: {entry.name} has {entry.size:,} bytes, and a class number or name at most {LABEL_BYTES}. Repair the tar.")
    return tar.extractfile(entry).read().decode().strip()  # type: ignore[union-attr]  # it is a file


def _class_of(file: Path, sample: PurePosixPath) -> str:
    """The folder, or the synset of a tar like ImageNet's own (n01440764.tar with n01440764_10026.JPEG)."""
    if sample.parent.name:
        return sample.parent.name
    if sample.name.startswith(f"{file.stem}_"):
        return file.stem
    raise UserError(f"{file}: the class of {sample.name} is unknown; it has neither a .cls member beside it nor a folder.")


# -- Parquet and Arrow ----------------------------------------------------------------------------------------------------------


class TableArchive(Archive):
    """Tables with a column of images (a struct with `bytes`, or binary) and one of class numbers, in pieces that are read as wholes."""

    def __init__(self, root: Path, files: Sequence[Path]) -> None:
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise UserError(f"{files[0]} needs the package pyarrow: pip install 'pixlat[tables]'.") from None
        schema = self.schema(files[0])
        self.image, self.label = _columns(schema, files[0])
        for file in files[1:]:
            if (odd := _columns(self.schema(file), file)) != (self.image, self.label):
                raise UserError(f"{file} has its images and labels in the columns {odd}, and {files[0]} in {(self.image, self.label)}. Use one layout.")
        pieces = [_opened(file, partial(self.pieces, file)) for file in files]  # of each file, the labels of its pieces
        self.owners = [(number, piece) for number, found in enumerate(pieces) for piece in range(len(found))]
        self.starts = np.cumsum([0, *(len(labels) for found in pieces for labels in found)])
        rows = [sum(len(labels) for labels in found) for found in pieces]
        self.first_rows = np.cumsum([0, *rows])
        self.file_sizes = [file.stat().st_size for file in files]
        labels = np.concatenate([labels for found in pieces for labels in found] or [np.empty(0, np.int64)])
        class_names = _feature_names(schema, self.label, files[0])
        if class_names is None:
            check_largest(int(labels.max(initial=-1)), len(labels), f"{files[0]}{_others(files)}, column {self.label}")
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
        entry = _opened(self.files[number], lambda: self.column(self.files[number], piece)[index - int(self.starts[order])].as_py(), self.name(index))
        content: bytes | None = entry["bytes"] if isinstance(entry, dict) else entry
        if content is None:
            raise UserError(f"{self.name(index)} holds a path instead of an image. Save the data set with its images inside.")
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
    """A piece is a row group, which is decoded whole: fast in order, slow at random. Prepare shards of it for training."""

    suffix = ".parquet"

    def schema(self, file: Path) -> pyarrow.Schema:
        return _parquet(file).schema_arrow

    def pieces(self, file: Path) -> list[NDArray[np.int64]]:
        opened = _parquet(file)
        groups = range(opened.num_row_groups)
        return [_as_labels(opened.read_row_group(group, [self.label], use_threads=False).column(0), file, self.label) for group in groups]

    def column(self, file: Path, piece: int) -> pyarrow.ChunkedArray:
        return _row_group(file, piece, self.image)


class ArrowArchive(TableArchive):
    """What `save_to_disk` and the cache of `datasets` hold: memory-mapped, each image is read where it lies."""

    suffix = ".arrow"

    def schema(self, file: Path) -> pyarrow.Schema:
        return _arrow_table(file).schema

    def pieces(self, file: Path) -> list[NDArray[np.int64]]:
        return [_as_labels(_arrow_table(file).column(self.label), file, self.label)]

    def column(self, file: Path, piece: int) -> pyarrow.ChunkedArray:
        return _arrow_table(file).column(self.image)


def _as_labels(column: pyarrow.ChunkedArray, file: Path, name: str) -> NDArray[np.int64]:
    """Class numbers (n,) of a column; whatever is not a whole number is a UserError."""
    from pyarrow import types

    kind, wanted = column.type, "Class numbers are whole numbers from 0 on, without gaps in the column. Convert it."
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        raise UserError(f"{file}: the column {name} holds {kind} and not class numbers. {wanted}")
    if column.null_count:
        raise UserError(f"{file}: {column.null_count:,} rows of the column {name} are empty. {wanted}")
    values = column.to_numpy()
    labels: NDArray[np.int64] = values.astype(np.int64) if kind.bit_width < 64 or not len(values) or abs(values).max() < 2**62 else values[:0]
    if len(labels) != len(values) or (types.is_floating(kind) and (labels != values).any()):
        odd = next((value for value in values.tolist() if value != value or abs(value) >= 2**62 or value != int(value)), values[0])
        raise UserError(f"{file}: the column {name} holds {odd}. {wanted}")
    return labels


def _opened(file: Path, open_it: Callable[[], Any], what: object = None) -> Any:
    """What `open_it` returns; pyarrow's errors are UserErrors that name the file, or `what` lies in it."""
    from pyarrow import ArrowException

    try:
        return open_it()
    except UserError:
        raise
    except (OSError, ValueError, ArrowException) as error:
        raise UserError(f"{what or file} cannot be read ({next(iter(str(error).splitlines()), type(error).__name__)}). Download {file} again.") from error


def _parquet(file: Path) -> Any:
    from pyarrow.parquet import ParquetFile

    return _opened(file, lambda: ParquetFile(file))


@lru_cache(maxsize=GROUPS_KEPT)
def _row_group(file: Path, group: int, column: str) -> pyarrow.ChunkedArray:
    return _parquet(file).read_row_group(group, [column], use_threads=False).column(0)


@cache  # maps of files take no memory
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
        raise UserError(f"{file} has the columns {', '.join(schema.names)}; wanted are one of images and one called {', '.join(LABEL_COLUMNS)}.")
    return image, label


def _feature_names(schema: pyarrow.Schema, label: str, file: Path) -> tuple[str, ...] | None:
    """The class names that Hugging Face keeps beside the columns, if there are any."""
    try:
        found: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        for key in ("info", "features", label, "names"):
            found = found.get(key) or {}
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: its metadata of Hugging Face are damaged ({error}). Download it again, or save it without them.") from error
    if not found:
        return None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise UserError(f"{file}: its metadata name the classes {str(found)[:40]}, which is no list of names. Download it again, or save it without them.")
    return tuple(found)


def _others(files: Sequence[Path]) -> str:
    return f" and {len(files) - 1} more" if len(files) > 1 else ""


ARCHIVES: dict[str, type[TarArchive | TableArchive]] = {"tar": TarArchive, "parquet": ParquetArchive, "arrow": ArrowArchive}
