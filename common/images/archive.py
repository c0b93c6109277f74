"""The base class of image archives (tars, tables): labels, the split into training and held-out images, messages."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from pixlat.common.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
HELD_OUT_NAMES = ("val", "validation", "test")  # names of folders and files with held-out images, best first

# class numbers below this are always accepted; larger ones only if the data set has more images than that number
SMALL_SET = 100_000


class Archive(ABC):
    """Encoded images with labels. It keeps no file open, so that loader processes can be forked."""

    suffix: str

    def __init__(
        self, files: Sequence[Path], labels: NDArray[np.int64], class_names: tuple[str, ...], parts: NDArray[np.str_]
    ) -> None:
        """labels (N,); parts (N,): "train", one of HELD_OUT_NAMES, or "" if the names do not tell the part."""
        self.files, self.labels, self.class_names, self.parts = files, labels, class_names, parts

    @abstractmethod
    def name(self, index: int) -> str:
        """The place of an image (file and member or row), for messages and for the split."""

    @abstractmethod
    def size(self, index: int) -> int:
        """The size in bytes of the image, or of the file that contains it."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The bytes of the encoded image."""

    def split(self) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """Positions of the training images and of the held-out images; None if the names tell no held-out part."""
        if not (self.parts == "train").any():
            return np.arange(len(self.parts)), None
        heldout = next((name for name in HELD_OUT_NAMES if (self.parts == name).any()), None)
        return np.flatnonzero(self.parts == "train"), None if heldout is None else np.flatnonzero(self.parts == heldout)

    def identity(self, positions: NDArray[np.int64]) -> str:
        """SHA-256 over names and sizes. It does not read contents: that would take hours for 1.28 million images."""
        hasher = hashlib.sha256()
        for index in positions.tolist():
            hasher.update(f"{self.name(index)}\0{self.size(index)}\n".encode())
        return hasher.hexdigest()


def check_largest(label: int, images: int, where: object) -> None:
    """Raises UserError for an impossible class number: SMALL_SET or more, and not below the number of images.

    Without this check pixlat would create that many classes.
    """
    if label >= max(images, SMALL_SET):
        raise UserError(
            f"{where}: class number {label if label < 10**15 else 'of ' + str(len(str(label))) + ' digits'} "
            f"in a data set of {images:,} images. Classes are numbered from 0 on. Repair the labels; "
            f"pixlat accepts any number below {SMALL_SET:,}."
        )


def part_of(path: PurePosixPath | Path) -> str:
    """The part that the names in a path tell: "train", one of HELD_OUT_NAMES, or "".

    A name may contain other words, too (imagenet-train-0001.tar).
    """
    words = set(re.split(r"[^a-z]+", str(path).lower()))
    return next((name for name in ("train", *HELD_OUT_NAMES) if name in words), "")


def part_of_file(root: Path, file: Path) -> str:
    """`part_of` for a file below the root. Ignores the names of the root and its parents."""
    return part_of(file.relative_to(root) if file != root else Path(file.name))


def and_others(files: Sequence[Path]) -> str:
    return f" and {len(files) - 1} more" if len(files) > 1 else ""
