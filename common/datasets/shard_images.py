"""Images that were cropped once and stored raw (shards.py), as a data set."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pixlat.common.datasets import shards
from pixlat.common.errors import UserError
from pixlat.common.images.image_set import ImageSet


class ShardImages(ImageSet):
    """Images that were cropped before, read as they are."""

    def __init__(self, part: shards.StoredPart, image_size: int) -> None:
        super().__init__(part.labels(), image_size, part.identity)
        self.part = part

    def _read_one(self, index: int) -> NDArray[np.uint8]:
        return self.part.read(index)

    def _read_resized(self, index: int) -> NDArray[np.uint8]:
        assert self.part.whole is not None  # `check_resized` has looked
        return self.part.whole.read(index)

    def check_resized(self, wanted: int | None) -> int:
        """The pixels of the shorter side of the whole images that the shards hold; a UserError where they hold none,
        or others than wanted.
        """
        found, folder = self.part.resize, self.part.folder
        if found is None or wanted not in (None, found):
            holds = "squares alone" if found is None else f"images whose shorter side has {found} pixels"
            asked = f" data.resize={wanted}" if wanted else ""
            raise UserError(
                (
                    f"data.crop=random{asked}: {folder} holds {holds}. Prepare shards with `pixlat prepare "
                    f"images data.crop=random{asked} ...`"
                )
                + (f", or set data.resize={found}." if found else ".")
            )
        return found

    @property
    def decoding(self) -> str | None:
        return self.part.decoding
