"""How this machine decodes and scales images, as digests of what it makes of one fixed picture.

Versions of Pillow and of its JPEG decoder may differ by grey levels, and scores of decoded images with them.
A protocol names the digest and not the version: equal pixels, equal hash.
`data/decoding.jpg` is drawn by a formula (61 x 150, subsampled colours), tall because Pillow 13 changed tall images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixlat.common.images.crop import decode_square

GOLDEN = Path(__file__).resolve().parent.parent / "data" / "decoding.jpg"
GOLDEN_SIZE = 16  # pixels: halved once by box filter, then scaled by bicubic
UNKNOWN = "unknown"  # of cropped images that were stored before this was recorded
DIGITS = 12


@cache
def decoding_digest() -> str:
    """12 hexadecimal digits over the pixels of a JPEG that was decoded, halved,
    scaled and cropped as those of a data set (common/images/crop.py).
    """
    return digest_of(decode_square(GOLDEN.read_bytes(), GOLDEN_SIZE, GOLDEN))


def resizing_digest(resize: Callable[[NDArray[np.uint8]], Any]) -> str:
    """The same for a function that scales (H, W, 3) uint8 images, of a picture that no decoder has touched."""
    row, column = np.mgrid[0:40, 0:40]
    picture = np.stack([(row * column) % 256, (row * 37 + column) % 256, (row + column * 91) % 256], axis=2).astype(
        np.uint8
    )
    return digest_of(np.asarray(resize(picture)))


def digest_of(pixels: NDArray[Any]) -> str:
    """12 hexadecimal digits over shape, type and values."""
    little_endian = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("<"))
    return hashlib.sha256(f"{pixels.shape} {pixels.dtype.name} ".encode() + little_endian.tobytes()).hexdigest()[
        :DIGITS
    ]
