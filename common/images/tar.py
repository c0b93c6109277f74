"""Reads images in tars by their position, without unpacking: WebDataset shards, tars of class folders, and ImageNet's
layout of one tar per synset.

Names of files and folders tell the training part (train) and the held-out part (val, validation, test).
"""

from __future__ import annotations

import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pixlat.common.cache import KEEP_FROM, SETTLED_NS, cache_file, keep_arrays, kept_arrays, one_at_a_time
from pixlat.common.errors import UserError
from pixlat.common.images.archive import (
    HELD_OUT_NAMES,
    IMAGE_SUFFIXES,
    Archive,
    and_others,
    check_largest,
    part_of,
    part_of_file,
)
from pixlat.common.images.crop import check_file_bytes
from pixlat.common.images.names import Names

LABEL_BYTES = 255  # size limit of a .cls member, which holds a class number or a class name

TARS_FORMAT = 1  # version of the cache files


class Member(NamedTuple):
    """One image of a tar."""

    offset: int  # bytes
    size: int
    name: str
    label: str | int  # a number if the `.cls` member holds a number
    part: str


class TarArchive(Archive):
    """Images in tars. Members with the same stem are one sample (`0001.jpg`, `0001.cls`).

    Without a `.cls` member, the class is the name of the member's folder, or of the synset's tar.
    """

    suffix = ".tar"

    def __init__(self, root: Path, files: Sequence[Path]) -> None:
        index = list_tars(root, files)
        if not len(index.where):
            raise UserError(f"{files[0]}{and_others(files)} holds no image ({', '.join(IMAGE_SUFFIXES)}).")
        self.where, self.members = index.where, index.names
        if index.numbered.any() != index.numbered.all():
            raise UserError(
                f"{files[0]}{and_others(files)}: some images have a class number (.cls) "
                "and some only a folder. Repair the tars."
            )
        classes: list[str] = list(index.classes)
        if index.numbered.all():
            largest = max(map(int, classes))
            check_largest(largest, len(index.where), f"{files[0]}{and_others(files)}, .cls")
            class_names, numbers = list(map(str, range(1 + largest))), np.array(list(map(int, classes)), dtype=np.int64)
        else:
            class_names = sorted(classes)
            places = {name: place for place, name in enumerate(class_names)}
            numbers = np.array([places[name] for name in classes], dtype=np.int64)
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
            raise UserError(
                f"{self.files[number]} cannot be read: {error.strerror}. Was it moved during the run?"
            ) from error


PARTS_IN_TARS = ("", "train", *HELD_OUT_NAMES)


@dataclass(frozen=True)
class TarIndex:
    """The images in a list of tars: their places, names, classes and parts."""

    where: NDArray[np.int64]  # (N, 3): number of the tar, offset and size of the image in bytes
    names: Names  # (N,) names of the members
    classes: Names  # distinct labels in the order of their first image
    numbered: NDArray[np.bool_]  # for each of `classes`, whether it is a number from a .cls member
    class_of: NDArray[np.int32]  # (N,) index into `classes`
    part_of: NDArray[np.int8]  # (N,) index into PARTS_IN_TARS


def list_tars(root: Path, files: Sequence[Path]) -> TarIndex:
    """Lists the images of tars.

    This must read all headers of a tar. So the list of large tars is cached, and used again while their names, sizes
    and times of change are the same. If several processes of a machine call this at once, one reads the headers and
    the others read its cache file.
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
    """Names, sizes and times of change of the tars. If they are equal, the tars have not changed."""
    states = [file.stat() for file in files]
    places = Names.of(str(file.relative_to(root)) for file in files).arrays("tars")
    numbers = {"tar_sizes": [state.st_size for state in states], "changed_ns": [state.st_mtime_ns for state in states]}
    return places | {name: np.array(values, dtype=np.int64) for name, values in numbers.items()}


def _walk_tars(root: Path, files: Sequence[Path]) -> TarIndex:
    where, names, class_of, parts = [], [], [], []
    classes: dict[str | int, int] = {}
    for number, file in enumerate(files):
        members = list(_members(file, part_of_file(root, file)))  # one tar at a time, to save memory
        where += [np.array([(number, member.offset, member.size) for member in members], dtype=np.int64).reshape(-1, 3)]
        names.append(Names.of(member.name for member in members))
        class_of.append(
            np.array([classes.setdefault(member.label, len(classes)) for member in members], dtype=np.int32)
        )
        parts.append(np.array([PARTS_IN_TARS.index(member.part) for member in members], dtype=np.int8))
    numbered = np.array([isinstance(label, int) for label in classes], dtype=bool)
    labels = Names.of(map(str, classes))
    return TarIndex(
        np.concatenate(where), Names.joined(names), labels, numbered, np.concatenate(class_of), np.concatenate(parts)
    )


def _keep(kept: Path, state: dict[str, NDArray[Any]], index: TarIndex) -> None:
    arrays = {name: getattr(index, name) for name in ("where", "numbered", "class_of", "part_of")}
    keep_arrays(
        kept,
        {
            "format": np.array(TARS_FORMAT),
            **state,
            **arrays,
            **index.names.arrays("names"),
            **index.classes.arrays("classes"),
        },
    )


def _read_kept(kept: Path, state: dict[str, NDArray[Any]]) -> TarIndex | None:
    """The cached index, if the tars have not changed since."""
    arrays = kept_arrays(kept, TARS_FORMAT)
    try:
        if arrays is None or not all(np.array_equal(arrays[name], value) for name, value in state.items()):
            return None
        names, classes = Names.from_arrays(arrays, "names"), Names.from_arrays(arrays, "classes")
        index = TarIndex(arrays["where"], names, classes, arrays["numbered"], arrays["class_of"], arrays["part_of"])
    except (ValueError, KeyError):  # the cache file is damaged; `list_tars` reads the headers again
        return None
    lengths = {len(index.where), len(index.names), len(index.class_of), len(index.part_of)}
    return index if len(lengths) == 1 and len(index.classes) == len(index.numbered) else None


def _members(file: Path, part: str) -> Iterator[Member]:
    images: dict[PurePosixPath, tuple[str, int, int]] = {}  # sample -> name, offset, size
    labels: dict[PurePosixPath, str] = {}
    end = 0  # position in bytes after the last member
    try:
        with tarfile.open(file, mode="r:") as tar:
            for entry in tar:
                end = entry.offset_data + -(-entry.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                path = PurePosixPath(entry.name)
                if not entry.isfile() or path.name.startswith("."):
                    continue
                sample = path.parent / path.name.partition(".")[0]
                if entry.issparse() and path.suffix.lower() in (*IMAGE_SUFFIXES, ".cls"):
                    raise UserError(
                        f"{file}: {entry.name} is stored as a sparse file, whose bytes do not lie in one place. "
                        "Pack the tar without --sparse."
                    )
                if path.suffix.lower() in IMAGE_SUFFIXES:
                    images[sample] = entry.name, entry.offset_data, entry.size
                elif path.suffix == ".cls":
                    labels[sample] = _label_text(tar, entry, file)
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file} cannot be read as an uncompressed tar ({error}). Download it again, or unpack a compressed one."
        ) from error
    # an empty block ends every tar, but tarfile does not report that it is missing
    if file.stat().st_size < end + tarfile.BLOCKSIZE:
        raise UserError(
            f"{file} is cut short: its {file.stat().st_size:,} bytes end in or after {entry.name} "
            "without an end mark. Download it again."
        )
    for sample, (name, offset, size) in images.items():
        text = labels.get(sample, "")
        label: str | int = int(text) if text.isdecimal() else text or _class_of(file, sample)
        yield Member(offset, size, name, label, part or part_of(sample.parent if text else sample.parent.parent))


def _label_text(tar: tarfile.TarFile, entry: tarfile.TarInfo, file: Path) -> str:
    """The text of a .cls member. Raises UserError for a long one, before reading it."""
    if entry.size > LABEL_BYTES:
        raise UserError(
            f"{file}: {entry.name} has {entry.size:,} bytes, but a class number or name has "
            f"at most {LABEL_BYTES}. Repair the tar."
        )
    return tar.extractfile(entry).read().decode().strip()  # type: ignore[union-attr]  # it is a file


def _class_of(file: Path, sample: PurePosixPath) -> str:
    """The member's folder, or the synset of a tar in ImageNet's layout (n01440764.tar with n01440764_10026.JPEG)."""
    if sample.parent.name:
        return sample.parent.name
    if sample.name.startswith(f"{file.stem}_"):
        return file.stem
    raise UserError(f"{file}: the class of {sample.name} is unknown; it has no .cls member and lies in no folder.")
