"""Reads finished images of any origin: a folder of files, or an ADM-style .npz (arrays.py).

Both are streamed. Images are neither resized nor cropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pixlat.common.errors import UserError
from pixlat.common.images.archive import IMAGE_SUFFIXES
from pixlat.common.images.crop import read_rgb
from pixlat.common.images.splits import fixed_draw
from pixlat.common.seeds import derive
from pixlat.evaluation.features.arrays import MAX_CHUNK_BYTES, NpzImages
from pixlat.evaluation.features.collect import ImageBatch, batches

LOSSY = (".jpg", ".jpeg", ".webp")


class Samples(Protocol):
    """Square images of one size, in a fixed order."""

    @property
    def resolution(self) -> int: ...
    def __len__(self) -> int: ...
    def labels(self) -> NDArray[np.int64] | None: ...
    def batches(self, size: int = 128, positions: NDArray[np.int64] | None = None) -> Iterator[ImageBatch]: ...


class FolderSamples:
    """Every image file below a folder, by name.

    Another size than the first one's, or a file that cannot be decoded, is a UserError that names it.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(
                f"{folder} is not a folder. images= takes a folder of {', '.join(IMAGE_SUFFIXES)} files, "
                "npz= a .npz file."
            )
        self.files = sorted(
            path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and not _hidden(path, folder)
        )
        if not self.files:
            raise UserError(f"{folder} holds no image file ({', '.join(IMAGE_SUFFIXES)}).")
        self.resolution = read_pixels(self.files[0]).shape[1]

    def __len__(self) -> int:
        return len(self.files)

    def labels(self) -> None:
        """No file says what its image should show."""

    @property
    def lossy(self) -> bool:
        """Whether some file has a lossy format."""
        return any(path.suffix.lower() in LOSSY for path in self.files)

    def batches(self, size: int = 128, positions: NDArray[np.int64] | None = None) -> Iterator[ImageBatch]:
        """This process's share of the images in batches of at most `size`, with the index of each image.

        positions: if given, it opens only these files (ascending). An image's index is then its place in `positions`.
        """
        chosen = np.arange(len(self)) if positions is None else positions
        size = max(1, min(size, MAX_CHUNK_BYTES // (3 * self.resolution**2)))
        return batches(lambda places: self._fetch(chosen[places.start : places.stop]), len(chosen), size)

    def _fetch(self, indices: Iterable[int]) -> NDArray[np.uint8]:
        images = [read_pixels(self.files[index]) for index in indices]
        for index, image in zip(indices, images, strict=True):
            if image.shape[1:] != (self.resolution, self.resolution):
                height, width = image.shape[1:]
                raise UserError(
                    f"{self.files[index]} has {width} x {height} pixels, "
                    f"the first image {self.resolution} x {self.resolution}."
                )
        return np.stack(images)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def read_pixels(path: Path) -> NDArray[np.uint8]:
    """The image in a file as (3, H, W) uint8 RGB, within the size limits of common/images/crop.py.

    Raises UserError unless the image is square, because generated images are square.
    """
    pixels = read_rgb(path).transpose(2, 0, 1)
    if pixels.shape[1] != pixels.shape[2]:
        raise UserError(f"{path} has {pixels.shape[2]} x {pixels.shape[1]} pixels; generated images are square.")
    return np.ascontiguousarray(pixels)


def drawn_images(samples: Samples, n: int, size: int, shuffled: bool = False) -> Iterator[ImageBatch]:
    """Batches of n of the images, or of all if there are fewer.

    The n images are a fixed random draw, because files are sorted by class. Their indices follow the order of the
    files. With `shuffled` the indices are a fixed permutation, so that any first part represents all images.
    """
    positions = fixed_draw(len(samples), n)
    order = torch.from_numpy(_shuffle(len(positions)))
    for images, indices in samples.batches(size, positions):
        yield images, order[indices] if shuffled else indices


def drawn_labels(samples: Samples, n: int, shuffled: bool = False) -> NDArray[np.int64] | None:
    """The labels of the images of `drawn_images`, in the order of their indices; None if they are not known."""
    labels = samples.labels()
    if labels is None:
        return None
    chosen = labels[fixed_draw(len(samples), n)]
    if shuffled:
        chosen[_shuffle(len(chosen))] = chosen.copy()
    return chosen


def _shuffle(count: int) -> NDArray[np.int64]:
    """A fixed permutation: the index of each position."""
    return np.random.Generator(np.random.PCG64(derive("finished images"))).permutation(count)


def open_samples(folder: str | None, npz: str | None) -> Samples:
    """Opens the images of a folder or of an .npz. One of the two must be given."""
    if npz is not None:
        path = Path(npz).expanduser()
        if not path.is_file():
            raise UserError(f"npz={npz} does not exist or is not a file.")
        return NpzImages(path)
    assert folder is not None
    return FolderSamples(Path(folder).expanduser())
