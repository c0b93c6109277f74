"""From an image file to a square uint8 image, exactly as in the ADM pre-processing that every ImageNet paper of this suite uses."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.errors import UserError

_BOX, _BICUBIC = Image.Resampling.BOX, Image.Resampling.BICUBIC


PLAIN_MODES = ("RGB", "L")  # 8-bit colour and grey: what a data set of photographs is expected to hold


def read_square(path: Path, size: int, convert: bool = True) -> NDArray[np.uint8]:
    """The file as (3, size, size) uint8 RGB, centre-cropped. A file that cannot be decoded is a UserError that names it.

    convert: CMYK, palette, 16-bit and transparent images become RGB; without it they are a UserError too.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Restore or remove the file.") from error
    return decode_square(content, size, path, convert)


def decode_square(content: bytes, size: int, name: object, convert: bool = True) -> NDArray[np.uint8]:
    """The same for the bytes of an image file; `name` is for the message of the UserError."""
    about = f"{name} ({len(content):,} bytes)"  # zero bytes is the commonest fault
    try:
        with Image.open(io.BytesIO(content)) as image:
            if not convert and image.mode not in PLAIN_MODES:
                raise UserError(f"{about} is of mode {image.mode}, and data.modes=strict allows {' and '.join(PLAIN_MODES)} only.")
            return center_crop(to_rgb(image), size)
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        raise UserError(f"{about} is not an image that Pillow can read. Replace or remove it, or set data.broken=skip.") from None
    except Exception as error:  # Pillow's decoders meet damaged bytes with whatever they lead to, and a name must come with it
        raise UserError(f"{about} cannot be decoded: {error or type(error).__name__}. Replace or remove it, or set data.broken=skip.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Pillow's `convert("RGB")`, as the ADM code has it: transparency is dropped (not blended), EXIF rotation is ignored.

    Only 16-bit grey is treated apart, by its high byte, because Pillow would clip it to white.
    """
    if image.mode.startswith("I"):
        high = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(high).convert("RGB")
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """ADM's centre crop of an RGB image, (3, size, size) uint8: halve by box filter, scale the shorter side to `size` by bicubic, crop."""
    while min(image.size) >= 2 * size:
        image = _resize(image, image.width // 2, image.height // 2, _BOX)
    scale = size / min(image.size)
    image = _resize(image, round(image.width * scale), round(image.height * scale), _BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    square = np.asarray(image)[top : top + size, left : left + size]
    return np.ascontiguousarray(square.transpose(2, 0, 1))


def _resize(image: Image.Image, width: int, height: int, kernel: Image.Resampling) -> Image.Image:
    """Resizes the width, then the height.

    Pillow up to 12 always did it in this order, with 8 bits between the passes; Pillow 13 may begin with the height, which changes tall images by
    some grey levels. One axis at a time gives the pixels of Pillow 12 with both, bit for bit.
    """
    return image.resize((width, image.height), kernel).resize((width, height), kernel)
