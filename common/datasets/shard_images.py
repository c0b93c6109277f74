"""A data set of images that were cropped once and stored as raw pixels (shards.py)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pixlat.common.datasets import shards
from pixlat.common.errors import UserError
from pixlat.common.images.image_set import ImageSet


class ShardImages(ImageSet):
    """Reads images that `pixlat prepare images` has cropped."""

    def __init__(self, part: shards.StoredPart, image_size: int) -> None:
        super().__init__(part.labels(), image_size, part.identity)
        self.part = part

    def _read_one(self, index: int) -> NDArray[np.uint8]:
        return self.part.read(index)

    def _read_resized(self, index: int) -> NDArray[np.uint8]:
        assert self.part.resized is not None  # `check_resized` has checked this
        return self.part.resized.read(index)

    def check_resized(self, wanted: int | None) -> int:
        """The shorter side, in pixels, of the uncropped images in the shards.

        UserError if the shards hold no uncropped images, or of another size than `wanted`.
        """
        stored, folder = self.part.resize, self.part.folder
        if stored is None or wanted not in (None, stored):
            holds = "only cropped squares" if stored is None else f"images whose shorter side has {stored} pixels"
            setting = f" data.resize={wanted}" if wanted else ""
            raise UserError(
                (
                    f"data.crop=random{setting}: {folder} holds {holds}. Prepare shards with `pixlat prepare "
                    f"images data.crop=random{setting} ...`"
                )
                + (f", or set data.resize={stored}." if stored else ".")
            )
        return stored

    @property
    def decoding(self) -> str | None:
        return self.part.decoding
