"""Data sets of images in a folder or in archives, which are decoded on demand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pixlat.common.errors import UserError
from pixlat.common.images.archive import Archive
from pixlat.common.images.crop import decode_resized, decode_square, read_image_file
from pixlat.common.images.decoding import decoding_digest
from pixlat.common.images.image_set import ImageSet


class FolderImages(ImageSet):
    """Image files, decoded and cropped on demand."""

    def __init__(
        self,
        root: Path,
        files: Sequence[str],
        labels: NDArray[np.int64],
        image_size: int,
        identity: str,
        convert: bool = True,
        sizes: NDArray[np.int64] | None = None,
    ) -> None:
        """
        files: names relative to root, with "/".
        convert: as in crop.py.
        sizes: bytes of the files when the folder was listed; None: do not compare them.
        """
        super().__init__(labels, image_size, identity)
        self.root, self.files, self.convert, self.sizes = root, files, convert, sizes

    def _read_one(self, index: int) -> NDArray[np.uint8]:
        content, path = self._content(index)
        return decode_square(content, self.image_size, path, self.convert)

    def _read_resized(self, index: int) -> NDArray[np.uint8]:
        content, path = self._content(index)
        return decode_resized(content, self.resize, path, self.convert)

    def _content(self, index: int) -> tuple[bytes, Path]:
        path = self.root / self.files[index]
        content = read_image_file(path)
        if self.sizes is not None and len(content) != self.sizes[index]:
            raise UserError(
                f"{path} has {len(content):,} bytes, but had {self.sizes[index]:,} when pixlat listed its folder: "
                f"the data have changed. Run `touch {path.parent}`, so that pixlat lists it again, and start again."
            )
        return content, path

    @property
    def decoding(self) -> str | None:
        return decoding_digest()


class ArchiveImages(ImageSet):
    """Some of the images of an archive, decoded and cropped on demand."""

    def __init__(self, archive: Archive, positions: NDArray[np.int64], image_size: int, convert: bool = True) -> None:
        super().__init__(archive.labels[positions], image_size, archive.identity(positions) + strictness(convert))
        self.archive, self.positions, self.convert = archive, positions, convert

    def _read_one(self, index: int) -> NDArray[np.uint8]:
        position = int(self.positions[index])
        return decode_square(self.archive.read(position), self.image_size, self.archive.name(position), self.convert)

    def _read_resized(self, index: int) -> NDArray[np.uint8]:
        position = int(self.positions[index])
        return decode_resized(self.archive.read(position), self.resize, self.archive.name(position), self.convert)

    @property
    def decoding(self) -> str | None:
        return decoding_digest()


def strictness(convert: bool) -> str:
    """The text to add to a set's identity for data.modes=strict, because it may replace images by others."""
    return "" if convert else "\nstrict"
