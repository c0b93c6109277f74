"""The pictures of a run: sample grids, nearest training images, training curves.

matplotlib is imported when a curve is drawn, so that grids do not wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pixlat.common.errors import UserError

BACKGROUND, FRAME, INK, FAINT, ALARM = (242, 242, 239), (222, 222, 218), (40, 40, 40), (110, 110, 110), (204, 41, 41)
TILE_PIXELS = 96  # small images are enlarged to about this
MARGIN = 16
TEXT_SIZE = 15


def image_grid(
    images: NDArray[np.uint8],
    columns: int,
    row_labels: Sequence[str] | None = None,
    scale: int | None = None,
    gap: int | None = None,
) -> Image.Image:
    """Images (N, 3, H, W) uint8 in rows of `columns`, with a name at the left of each row.

    scale: whole-number enlargement without smoothing; none: to about 96 pixels. gap: pixels between images;
    none: a twelfth of an image.
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
    """Writes the file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    image.save(temporary, format="PNG")
    temporary.replace(path)


def magnified(image: NDArray[np.uint8], scale: int) -> Image.Image:
    """(3, H, W) uint8 as a picture, each pixel a square of `scale` pixels."""
    return Image.fromarray(image.transpose(1, 2, 0).repeat(scale, 0).repeat(scale, 1))
