"""What all archives of images share: labels, the parts for training and held-out images,
and how files are named in messages.
"""

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
HELD_OUT_NAMES = ("val", "validation", "test")  # of folders and files, best first

# class numbers up to this are taken from any data set, and larger ones only from one with as many images
SMALL_SET = 100_000


class Archive(ABC):
    """Encoded images with labels. It holds no open file, so that loader processes can be forked."""

    suffix: str

    def __init__(
        self, files: Sequence[Path], labels: NDArray[np.int64], class_names: tuple[str, ...], parts: NDArray[np.str_]
    ) -> None:
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


def check_largest(label: int, images: int, where: object) -> None:
    """UserError for a class number that cannot be one: it is beyond SMALL_SET and beyond the number of images.

    As many classes would be made.
    """
    if label >= max(images, SMALL_SET):
        raise UserError(
            f"{where}: class number {label if label < 10**15 else 'of ' + str(len(str(label))) + ' digits'} "
            f"in a data set of {images:,} images. Classes are numbered from 0 on. Repair the labels; "
            f"numbers below {SMALL_SET:,} are always taken."
        )


def part_of(path: PurePosixPath | Path) -> str:
    """What the names in a path say: "train", one of HELD_OUT_NAMES, or "".

    A name may have other words beside it (imagenet-train-0001.tar).
    """
    words = set(re.split(r"[^a-z]+", str(path).lower()))
    return next((name for name in ("train", *HELD_OUT_NAMES) if name in words), "")


def part_of_file(root: Path, file: Path) -> str:
    """The same for a file below the root, whose own name says nothing."""
    return part_of(file.relative_to(root) if file != root else Path(file.name))


def and_others(files: Sequence[Path]) -> str:
    return f" and {len(files) - 1} more" if len(files) > 1 else ""
