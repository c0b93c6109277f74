"""Decodes an image file and crops a square uint8 image, exactly as ADM does. All ImageNet papers of this suite use
ADM's pre-processing.

Files may come from untrusted sources. So this module reads only regular files and opens only formats that Pillow
decodes without other programs (its EPS reader would start Ghostscript). It checks file size, pixels and scaled pixels
before it allocates memory.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixlat.common.errors import UserError

_BOX, _BICUBIC = Image.Resampling.BOX, Image.Resampling.BICUBIC

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # Pillow's names; none of their readers starts a program
PLAIN_MODES = ("RGB", "L")  # 8-bit colour and grey, the usual modes of photographs
MAX_FILE_BYTES = 2**30  # limit of one image file
MAX_PIXELS = 178_956_970  # limit of one image, before and after scaling: about 0.5 GB as RGB; Pillow has the same limit
LIMITS = "common/images/crop.py"  # the file that defines the limits, for messages


def read_square(path: Path, size: int, convert: bool = True) -> NDArray[np.uint8]:
    """Reads a file as (3, size, size) uint8 RGB, centre-cropped. Raises UserError, which names it, if that fails.

    convert: whether to convert CMYK, palette, 16-bit and transparent images to RGB; otherwise they raise UserError.
    """
    return decode_square(read_image_file(path), size, path, convert)


def decode_square(content: bytes, size: int, name: object, convert: bool = True) -> NDArray[np.uint8]:
    """Like `read_square` for the bytes of an image file. name: names the image in the message of a UserError."""
    return centre_square(decode_resized(content, size, name, convert), size)


def decode_resized(content: bytes, shorter: int, name: object, convert: bool = True) -> NDArray[np.uint8]:
    """The uncropped image, (H, W, 3) uint8, with its shorter side scaled to `shorter` pixels as in ADM."""
    with opened_image(content, name) as image:
        if not convert and image.mode not in PLAIN_MODES:
            raise UserError(
                f"{_about(content, name)} has mode {image.mode}, but data.modes=strict allows "
                f"only {' and '.join(PLAIN_MODES)}."
            )
        check_scaled(image.size, shorter, _about(content, name))
        return np.asarray(resize_shorter(to_rgb(image), shorter))


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """Reads a file in its original size, (H, W, 3) uint8 RGB. Raises UserError, which names it, if that fails."""
    content = read_image_file(path)
    with opened_image(content, path) as image:
        return np.asarray(to_rgb(image))


def read_image_file(path: Path) -> bytes:
    """The content of a regular file of at most MAX_FILE_BYTES.

    Raises UserError for a pipe or a device, also behind a link, without waiting for data from it.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UserError(
                    f"{path} is not a regular file but a pipe, a device or a folder. Replace or remove it, "
                    "or set data.broken=skip."
                )
            check_file_bytes(status.st_size, path)
            return file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Restore or remove the file.") from error


def check_file_bytes(size: int, name: object) -> None:
    """Raises UserError for an image file of more than MAX_FILE_BYTES."""
    if size > MAX_FILE_BYTES:
        raise UserError(
            f"{name} has {size:,} bytes, but an image file may have at most {MAX_FILE_BYTES:,}. "
            f"Replace or remove it, set data.broken=skip, or raise MAX_FILE_BYTES in {LIMITS}."
        )


@contextmanager
def opened_image(content: bytes, name: object) -> Iterator[Image.Image]:
    """Opens an image of one of FORMATS with at most MAX_PIXELS. content: the bytes of the file.

    Converts every exception of the block to a UserError that names the file.
    """
    about = _about(content, name)  # includes the number of bytes, because empty files are the most common fault
    try:
        with _open(content) as image:
            _check_pixels(image.width * image.height, about)
            yield image
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        shown = ", ".join(FORMATS)
        raise UserError(
            f"{about} is not an image that pixlat can read ({shown}). Replace or remove it, or set data.broken=skip."
        ) from None
    except Exception as error:
        # Pillow's decoders may raise any exception for damaged bytes, and the message must name the file
        reason = str(error).rstrip(".") or type(error).__name__
        raise UserError(
            f"{about} cannot be decoded: {reason}. Replace or remove it, or set data.broken=skip."
        ) from error


def _about(content: bytes, name: object) -> str:
    return f"{name} ({len(content):,} bytes)"


def _open(content: bytes) -> Image.Image:
    """Opens the image without Pillow's limit of pixels, which no setting of ours could raise.

    The caller checks MAX_PIXELS immediately afterwards.
    """
    pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    finally:
        Image.MAX_IMAGE_PIXELS = pillow_limit


def _check_pixels(pixels: int, about: str) -> None:
    if pixels > MAX_PIXELS:
        raise UserError(
            f"{about} has {pixels:,} pixels, but pixlat decodes at most {MAX_PIXELS:,}. "
            f"Scale it down or remove it, set data.broken=skip, or raise MAX_PIXELS in {LIMITS}."
        )


def check_scaled(size: tuple[int, int], shorter: int, about: str) -> None:
    """Raises UserError if scaling the shorter side of an image to `shorter` pixels would give more than MAX_PIXELS.

    An image of 1 x 20,000,000 pixels is small, but it would become 256 x 5,120,000,000.
    size: (width, height).
    """
    width, height = size
    scale = shorter / max(1, min(size))
    # `_resize` scales the width first, so the intermediate image counts as well
    pixels = max(round(width * scale) * height, round(width * scale) * round(height * scale)) if scale > 1 else 0
    if pixels > MAX_PIXELS:
        raise UserError(
            f"{about} has {width:,} x {height:,} pixels. With a shorter side of {shorter} it would have {pixels:,}, "
            f"but the limit is {MAX_PIXELS:,}. Crop it or remove it, set data.broken=skip, "
            f"or raise MAX_PIXELS in {LIMITS}."
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts with Pillow's `convert("RGB")`, as ADM's code does. It drops transparency without blending.

    It also ignores EXIF rotation. For 16-bit grey this takes the high byte instead, because Pillow would clip to white.
    """
    if image.mode.startswith("I"):
        high = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(high).convert("RGB")
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """ADM's centre crop of an RGB image, (3, size, size) uint8: scales the shorter side, then cuts the middle."""
    return centre_square(np.asarray(resize_shorter(image, size)), size)


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """ADM's resize of an RGB image: halves it with a box filter while both sides have at least 2 `size` pixels,
    then scales the shorter side to `size` with a bicubic filter.
    """
    while min(image.size) >= 2 * size:
        image = _resize(image, image.width // 2, image.height // 2, _BOX)
    scale = size / min(image.size)
    return _resize(image, round(image.width * scale), round(image.height * scale), _BICUBIC)


def centre_square(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The middle of (H, W, 3) pixels as (3, size, size)."""
    height, width, _ = pixels.shape
    return _square(pixels, (height - size) // 2, (width - size) // 2, size)


def cut_square(pixels: NDArray[np.uint8], offset: tuple[float, float], size: int) -> NDArray[np.uint8]:
    """Cuts a square of (H, W, 3) pixels as (3, size, size).

    offset: (down, right) in [0, 1); a uniform offset chooses uniformly among all places inside the image.
    """
    top, left = (int(share * (length - size + 1)) for share, length in zip(offset, pixels.shape[:2], strict=True))
    return _square(pixels, top, left, size)


def enlarged(square: NDArray[np.uint8], shorter: int) -> NDArray[np.uint8]:
    """Scales a (3, S, S) square to (shorter, shorter, 3), for data sets that hold only squares."""
    return np.asarray(resize_shorter(Image.fromarray(square.transpose(1, 2, 0)), shorter))


def _square(pixels: NDArray[np.uint8], top: int, left: int, size: int) -> NDArray[np.uint8]:
    return np.ascontiguousarray(pixels[top : top + size, left : left + size].transpose(2, 0, 1))


def _resize(image: Image.Image, width: int, height: int, kernel: Image.Resampling) -> Image.Image:
    """Resizes the width, then the height, in two calls.

    Pillow up to version 12 always resizes in this order, with 8 bits between the passes. Pillow 13 may begin with the
    height, which changes tall images by some grey levels. With one call per axis, both versions give the pixels of
    Pillow 12, bit for bit.
    """
    return image.resize((width, image.height), kernel).resize((width, height), kernel)
