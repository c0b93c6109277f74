"""Digests of how this machine decodes and scales images, computed from a fixed picture.

Versions of Pillow and of its JPEG decoder may give pixels that differ by some grey levels, so scores may differ, too.
A protocol contains the digest instead of the version, so that machines with equal pixels have equal hashes.
A formula drew `data/decoding.jpg` (61 x 150, subsampled colours). It is tall because Pillow 13 changed tall images.
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
GOLDEN_SIZE = 16  # pixels; to reach it, the picture is halved with the box filter and scaled with the bicubic filter
UNKNOWN = "unknown"  # stands for the digest in shards of earlier versions, which did not record it
DIGITS = 12


@cache
def decoding_digest() -> str:
    """12 hexadecimal digits over the pixels of a fixed JPEG after the pre-processing of data sets (crop.py)."""
    return digest_of(decode_square(GOLDEN.read_bytes(), GOLDEN_SIZE, GOLDEN))


def resizing_digest(resize: Callable[[NDArray[np.uint8]], Any]) -> str:
    """12 hexadecimal digits over a fixed array after `resize`, which scales (H, W, 3) uint8 images. Decodes no file."""
    row, column = np.mgrid[0:40, 0:40]
    picture = np.stack([(row * column) % 256, (row * 37 + column) % 256, (row + column * 91) % 256], axis=2).astype(
        np.uint8
    )
    return digest_of(np.asarray(resize(picture)))


def digest_of(pixels: NDArray[Any]) -> str:
    """12 hexadecimal digits over shape, dtype and values."""
    little_endian = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("<"))
    return hashlib.sha256(f"{pixels.shape} {pixels.dtype.name} ".encode() + little_endian.tobytes()).hexdigest()[
        :DIGITS
    ]
