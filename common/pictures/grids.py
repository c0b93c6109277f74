"""Grids of images as one picture, the colours of all pictures, and writing PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pixlat.common.errors import UserError
from pixlat.common.files import write_atomically

BACKGROUND, FRAME, INK, FAINT, ALARM = (242, 242, 239), (222, 222, 218), (40, 40, 40), (110, 110, 110), (204, 41, 41)
TILE_PIXELS = 96  # small images are enlarged to about this side
MARGIN = 16
TEXT_SIZE = 15


def image_grid(
    images: NDArray[np.uint8],
    columns: int,
    row_labels: Sequence[str] | None = None,
    scale: int | None = None,
    gap: int | None = None,
) -> Image.Image:
    """Arranges images (N, 3, H, W) uint8 in rows of `columns` images, with optional labels at the left of the rows.

    scale: whole-number enlargement without smoothing; None: to about 96 pixels.
    gap: pixels between images; None: a twelfth of an enlarged image.
    """
    if len(images) == 0 or columns < 1:
        raise UserError(f"a grid needs images and columns, not {len(images)} images in {columns} columns.")
    scale = scale or max(1, round(TILE_PIXELS / images.shape[-1]))
    tile = images.shape[-1] * scale
    gap = tile // 12 if gap is None else gap
    rows = -(-len(images) // columns)
    font = ImageFont.load_default(TEXT_SIZE)
    left = MARGIN + (max(round(font.getlength(label)) for label in row_labels) + MARGIN if row_labels else 0)
    canvas = Image.new(
        "RGB", (left + columns * (tile + gap) - gap + MARGIN, 2 * MARGIN + rows * (tile + gap) - gap), BACKGROUND
    )
    draw = ImageDraw.Draw(canvas)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        canvas.paste(magnified(image, scale), (left + column * (tile + gap), MARGIN + row * (tile + gap)))
    for row, label in enumerate(row_labels or ()):
        draw.text((left - MARGIN, MARGIN + row * (tile + gap) + tile // 2), label, INK, font, anchor="rm")
    return canvas


def save_png(image: Image.Image, path: Path) -> None:
    """Writes the file atomically, so that an interruption leaves no partial file."""
    write_atomically(path, lambda place: image.save(place, format="PNG"))


def magnified(image: NDArray[np.uint8], scale: int) -> Image.Image:
    """Turns (3, H, W) uint8 into a picture in which each pixel becomes a square of `scale` x `scale` pixels."""
    return Image.fromarray(image.transpose(1, 2, 0).repeat(scale, 0).repeat(scale, 1))


def spread(length: int, count: int) -> NDArray[np.int64]:
    """At most `count` evenly spaced positions in a sequence, which may be sorted by class or style."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(np.int64))
