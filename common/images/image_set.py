"""Labelled square uint8 images: the base class, images in memory, and synthetic images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pixlat.common.errors import UserError
from pixlat.common.images import synthetic
from pixlat.common.images.crop import cut_square, enlarged


@dataclass(frozen=True)
class LatentFacts:
    """The facts about stored moments that a method gets when it is built."""

    shape: tuple[int, ...]  # (2 C, h, h)
    encoder_sha256: str | None  # None: the files do not contain it


class Latents(Protocol):
    """Stored moments of a training set."""

    @property
    def facts(self) -> LatentFacts: ...

    def moments(self, indices: NDArray[np.int64], flips: NDArray[np.bool_]) -> NDArray[np.float32]:
        """(B, 2 C, h, h): means, then standard deviations, not normalised. If `flips` is true, of the mirror image."""


class ImageSet:
    """Labelled square images. Subclasses implement how to read an image."""

    def __init__(self, labels: NDArray[np.int64], image_size: int, identity: str) -> None:
        """`identity`: a text that determines every image of the set."""
        self.labels = labels
        self.image_size = image_size
        self.latents: Latents | None = None  # stored moments; if set, every training batch contains them
        self.identity = identity
        self.resize = image_size  # pixels of an image's shorter side before random crops are cut
        # whether to replace an unreadable image by the next readable image of its class; otherwise it raises UserError
        self.skips = False
        self.broken: dict[int, str] = {}  # position -> error message, for the images that were skipped so far

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def decoding(self) -> str | None:
        """A digest of how the images are decoded and scaled (decoding.py); None if the set stores pixels."""
        return None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that determines the images, their labels, order and size."""
        text = f"{self.identity}\n{self.image_size}\n".encode()
        return hashlib.sha256(text + self.labels.astype("<i8").tobytes()).hexdigest()

    def fetch(
        self,
        indices: Sequence[int] | NDArray[np.int64],
        flips: Sequence[bool] | NDArray[np.bool_] | None = None,
        offsets: NDArray[np.float64] | None = None,
    ) -> NDArray[np.uint8]:
        """Images (B, 3, H, W) uint8 at these positions, mirrored left to right where `flips` (B,) is true.

        Without offsets they are centre crops. With offsets (B, 2) in [0, 1), down and right, each image is scaled
        so that its shorter side has `resize` pixels, and the crop is cut at the offset.
        """
        images = self._read(np.asarray(indices, dtype=np.int64), offsets)
        if flips is not None:
            mirrored = np.asarray(flips, dtype=bool)
            images[mirrored] = images[mirrored, :, :, ::-1]
        return images

    def _read(self, indices: NDArray[np.int64], offsets: NDArray[np.float64] | None) -> NDArray[np.uint8]:
        """Fresh copies of the images, (B, 3, H, W)."""
        images = np.empty((len(indices), 3, self.image_size, self.image_size), dtype=np.uint8)
        for row, index in enumerate(indices.tolist()):
            read = self._read_one if offsets is None else partial(self._read_cut, offset=tuple(offsets[row].tolist()))
            images[row] = self._read_or_next(index, read) if self.skips else read(index)
        return images

    def fetch_resized(self, index: int) -> NDArray[np.uint8]:
        """One uncropped image, (H, W, 3) uint8, whose shorter side has `resize` pixels."""
        return self._read_or_next(index, self._read_resized) if self.skips else self._read_resized(index)

    def _read_or_next(self, index: int, read: Callable[[int], NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Reads the image, or the next readable image of its class; after the last one comes the first.

        The result is the same in every process: it does not depend on the images that a process has read before.
        """
        for candidate in self._stand_ins(index):
            if candidate not in self.broken:
                try:
                    return read(candidate)
                except UserError as error:
                    self.broken[candidate] = str(error)
        raise UserError(f"no image of class {self.labels[index]} can be read. The first error: {self.broken[index]}")

    def _stand_ins(self, index: int) -> Iterator[int]:
        yield index
        alike = np.flatnonzero(self.labels == self.labels[index])
        yield from np.roll(alike, -1 - int(np.searchsorted(alike, index)))[:-1].tolist()

    def _read_cut(self, index: int, offset: tuple[float, float]) -> NDArray[np.uint8]:
        return cut_square(self._read_resized(index), offset, self.image_size)

    def _read_one(self, index: int) -> NDArray[np.uint8]:
        """The centre crop, (3, image_size, image_size)."""
        raise NotImplementedError

    def _read_resized(self, index: int) -> NDArray[np.uint8]:
        """The uncropped image, (H, W, 3), whose shorter side has `resize` pixels.

        This version is for sets that hold only squares: it scales the square.
        """
        return enlarged(self._read_one(index), self.resize)


class ArrayImages(ImageSet):
    """Images in memory."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64], identity: str) -> None:
        super().__init__(labels, images.shape[-1], identity)
        self.images = images

    def _read(self, indices: NDArray[np.int64], offsets: NDArray[np.float64] | None) -> NDArray[np.uint8]:
        return self.images[indices] if offsets is None else super()._read(indices, offsets)

    def _read_one(self, index: int) -> NDArray[np.uint8]:
        image: NDArray[np.uint8] = self.images[index]
        return image


class SyntheticImages(ImageSet):
    """Coloured shapes, drawn on demand. Image i of the set is image start + i of the sequence in synthetic.py."""

    def __init__(self, start: int, count: int, image_size: int) -> None:
        labels = np.arange(start, start + count, dtype=np.int64) % len(synthetic.CLASS_NAMES)
        super().__init__(labels, image_size, f"synthetic/{start}/{count}")
        self.start = start

    def _read_one(self, index: int) -> NDArray[np.uint8]:
        return synthetic.draw(self.start + index, self.image_size)
