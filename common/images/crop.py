"""From an image file to a square uint8 image, exactly as in the ADM pre-processing that every ImageNet
paper of this suite uses.

Files may come from anywhere. So only regular files are read, only formats that Pillow decodes by itself are opened
(its EPS reader would start Ghostscript), and size, pixels and scaled pixels are bounded before memory is taken.
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
PLAIN_MODES = ("RGB", "L")  # 8-bit colour and grey: what a data set of photographs is expected to hold
MAX_FILE_BYTES = 2**30  # of one image file
MAX_PIXELS = 178_956_970  # of one image, before and after it is scaled: about 0.5 GB as RGB, Pillow's own limit
LIMITS = "common/images/crop.py"  # where the limits are written, for messages


def read_square(path: Path, size: int, convert: bool = True) -> NDArray[np.uint8]:
    """The file as (3, size, size) uint8 RGB, centre-cropped.

    A file that cannot be decoded is a UserError that names it.

    convert: CMYK, palette, 16-bit and transparent images become RGB; without it they are a UserError too.
    """
    return decode_square(read_image_file(path), size, path, convert)


def decode_square(content: bytes, size: int, name: object, convert: bool = True) -> NDArray[np.uint8]:
    """The same for the bytes of an image file; `name` is for the message of the UserError."""
    return centre_square(decode_resized(content, size, name, convert), size)


def decode_resized(content: bytes, shorter: int, name: object, convert: bool = True) -> NDArray[np.uint8]:
    """The whole image, its shorter side scaled to so many pixels as ADM does it: (H, W, 3) uint8."""
    with opened_image(content, name) as image:
        if not convert and image.mode not in PLAIN_MODES:
            raise UserError(
                f"{_about(content, name)} is of mode {image.mode}, and data.modes=strict allows "
                f"{' and '.join(PLAIN_MODES)} only."
            )
        check_scaled(image.size, shorter, _about(content, name))
        return np.asarray(resize_shorter(to_rgb(image), shorter))


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """The file as it is, (H, W, 3) uint8 RGB. A file that cannot be read or decoded is a UserError that names it."""
    content = read_image_file(path)
    with opened_image(content, path) as image:
        return np.asarray(to_rgb(image))


def read_image_file(path: Path) -> bytes:
    """The content of a regular file of at most MAX_FILE_BYTES.

    A pipe or a device, also behind a link, is a UserError and is never waited for.
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
    """UserError for an image file of more than MAX_FILE_BYTES."""
    if size > MAX_FILE_BYTES:
        raise UserError(
            f"{name} has {size:,} bytes, and an image file may have {MAX_FILE_BYTES:,}. "
            f"Replace or remove it, set data.broken=skip, or raise MAX_FILE_BYTES in {LIMITS}."
        )


@contextmanager
def opened_image(content: bytes, name: object) -> Iterator[Image.Image]:
    """The image in the bytes of a file of one of FORMATS with at most MAX_PIXELS.

    Whatever fails within the block is a UserError that names the file.
    """
    about = _about(content, name)  # with the bytes: none at all is the commonest fault
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
        # Pillow's decoders meet damaged bytes with whatever they lead to, and a name must come with it
        reason = str(error).rstrip(".") or type(error).__name__
        raise UserError(
            f"{about} cannot be decoded: {reason}. Replace or remove it, or set data.broken=skip."
        ) from error


def _about(content: bytes, name: object) -> str:
    return f"{name} ({len(content):,} bytes)"


def _open(content: bytes) -> Image.Image:
    """Pillow's own limit on pixels is lifted meanwhile: its error cannot be raised by a setting of ours,
    and MAX_PIXELS holds right behind it.
    """
    theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    finally:
        Image.MAX_IMAGE_PIXELS = theirs


def _check_pixels(pixels: int, about: str) -> None:
    if pixels > MAX_PIXELS:
        raise UserError(
            f"{about} has {pixels:,} pixels, and at most {MAX_PIXELS:,} are decoded. "
            f"Scale it down or remove it, set data.broken=skip, or raise MAX_PIXELS in {LIMITS}."
        )


def check_scaled(size: tuple[int, int], shorter: int, about: str) -> None:
    """UserError where scaling the shorter side of an image of `size` (width, height)
    to `shorter` pixels would make more than MAX_PIXELS.

    An image of 1 x 20,000,000 pixels is small, and 256 x 5,120,000,000 pixels are not.
    """
    width, height = size
    scale = shorter / max(1, min(size))
    # the width is scaled first
    pixels = max(round(width * scale) * height, round(width * scale) * round(height * scale)) if scale > 1 else 0
    if pixels > MAX_PIXELS:
        raise UserError(
            f"{about} has {width:,} x {height:,} pixels, which would become {pixels:,} with a shorter side "
            f"of {shorter}; at most {MAX_PIXELS:,} are made. Crop it or remove it, set data.broken=skip, "
            f"or raise MAX_PIXELS in {LIMITS}."
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Pillow's `convert("RGB")`, as the ADM code has it: transparency is dropped (not blended),
    EXIF rotation is ignored.

    Only 16-bit grey is treated apart, by its high byte, because Pillow would clip it to white.
    """
    if image.mode.startswith("I"):
        high = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(high).convert("RGB")
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """ADM's centre crop of an RGB image, (3, size, size) uint8: the shorter side becomes `size`,
    then the middle is cut.
    """
    return centre_square(np.asarray(resize_shorter(image, size)), size)


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """ADM's resize of an RGB image: halve by box filter while both sides allow it,
    then scale the shorter side to `size` by bicubic.
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
    """A square of (H, W, 3) pixels as (3, size, size): offset (down, right) in [0, 1)
    chooses uniformly among all places where it lies inside.
    """
    top, left = (int(share * (length - size + 1)) for share, length in zip(offset, pixels.shape[:2], strict=True))
    return _square(pixels, top, left, size)


def enlarged(square: NDArray[np.uint8], shorter: int) -> NDArray[np.uint8]:
    """A (3, S, S) square scaled to (shorter, shorter, 3), for data that have no larger original."""
    return np.asarray(resize_shorter(Image.fromarray(square.transpose(1, 2, 0)), shorter))


def _square(pixels: NDArray[np.uint8], top: int, left: int, size: int) -> NDArray[np.uint8]:
    return np.ascontiguousarray(pixels[top : top + size, left : left + size].transpose(2, 0, 1))


def _resize(image: Image.Image, width: int, height: int, kernel: Image.Resampling) -> Image.Image:
    """Resizes the width, then the height.

    Pillow up to 12 always did it in this order, with 8 bits between the passes;
    Pillow 13 may begin with the height, which changes tall images by some grey levels.
    One axis at a time gives the pixels of Pillow 12 with both, bit for bit.
    """
    return image.resize((width, image.height), kernel).resize((width, height), kernel)
