"""Finds the training image nearest to each sample, exactly, and draws the pairs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pixlat.common.images.image_set import ImageSet
from pixlat.common.pictures.grids import ALARM, BACKGROUND, FAINT, FRAME, INK, MARGIN, TEXT_SIZE, TILE_PIXELS, magnified

PAIR_GAP = 4
BLOCK_VALUES = 2**24  # pixel values of training images in memory at once, in float32
EXACT_TERMS = 1024  # the sum of 1024 products of numbers from -128 to 127 is at most 2**24


@dataclass(frozen=True)
class Neighbours:
    """The nearest training image of each of N samples."""

    indices: NDArray[np.int64]  # (N,) positions in the training set
    mirrored: NDArray[np.bool_]  # (N,) whether the mirror image is nearer
    # (N,) root mean square difference of the pixels, in [0, 1]: 0 is a copy, 1 is black against white
    distances: NDArray[np.float64]


def nearest(
    samples: NDArray[np.uint8],
    train: ImageSet,
    mirrored: bool = False,
    positions: NDArray[np.int64] | None = None,
    device: torch.device | str = "cpu",
) -> Neighbours:
    """The exact nearest training image of each sample (N, 3, H, W) uint8 by pixel distance.

    Ties go to the lowest position, and there to the image that is not mirrored.
    mirrored: also compare with mirror images, if training used them.
    positions: search only these training images: a subset if the set is too large to read, or the share of one
    process (`merged` joins the shares). Each image is read once. The samples stay on the device in float32.
    """
    positions = np.arange(len(train)) if positions is None else np.sort(positions)
    queries, values = _centred(torch.from_numpy(samples).to(device)), samples[0].size
    best = torch.full((len(samples),), torch.iinfo(torch.int64).max, device=device)
    places = torch.zeros_like(best)  # 2 * position of the nearest image, plus 1 if it is mirrored
    block = max(1, BLOCK_VALUES // values)
    for start in range(0, len(positions), block):
        chosen = positions[start : start + block]
        images = torch.from_numpy(train.fetch(chosen)).to(device)
        orientations = (images, images.flip(-1)) if mirrored else (images,)
        # columns: for each position the image, then its mirror image
        distances = torch.stack([_distances_from(_centred(batch), queries) for batch in orientations], dim=2).flatten(1)
        column = distances.argmin(1)  # argmin returns the first of equal values
        lowest = distances.gather(1, column[:, None])[:, 0]
        place = 2 * torch.from_numpy(chosen).to(device)[column // len(orientations)] + column % len(orientations)
        best, places = torch.where(lowest < best, lowest, best), torch.where(lowest < best, place, places)
    squared = (best + _squared_norms(queries)).cpu().numpy() if len(positions) else np.full(len(samples), np.inf)
    return Neighbours(places.cpu().numpy() // 2, places.cpu().numpy() % 2 == 1, np.sqrt(squared / values) / 255)


def merged(parts: Sequence[Neighbours]) -> Neighbours:
    """Joins the results of searches over shares of the training set; the result does not depend on the division."""
    # (P, N) each
    columns = [np.stack([getattr(part, name) for part in parts]) for name in ("mirrored", "indices", "distances")]
    first = np.lexsort(columns, axis=0)[0]  # by distance, then position, then not mirrored
    mirrored, indices, distances = (column[first, np.arange(len(first))] for column in columns)
    return Neighbours(indices, mirrored, distances)


def _centred(images: torch.Tensor) -> torch.Tensor:
    """Maps (N, 3, H, W) uint8 to whole numbers from -128 to 127 in float32, (N, K, 1024), padded with zeros.

    Neither the shift by 128 nor the padding changes a distance.
    """
    values = images.flatten(1).float().sub_(128)
    return torch.nn.functional.pad(values, (0, -values.shape[1] % EXACT_TERMS)).unflatten(1, (-1, EXACT_TERMS))


def _distances_from(images: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Squared distances (N, M) int64 between queries (N, K, 1024) and images (M, K, 1024), up to a constant.

    The constant is the query's squared norm, so the result is |x|^2 - 2 qx. Nothing is rounded: every product is a
    whole number, 1024 of them add up to at most 2^24, and float32 represents all whole numbers up to there.
    TF32 and bf16 represent the factors exactly, too.
    """
    with torch.autocast(images.device.type, enabled=False):
        products = torch.bmm(queries.transpose(0, 1), images.permute(1, 2, 0))  # (K, N, M)
    return _squared_norms(images) - 2 * products.sum(0, dtype=torch.int64)


def _squared_norms(values: torch.Tensor) -> torch.Tensor:
    """Squared norms (N,) int64 of vectors (N, K, 1024)."""
    return values.square().sum(2).sum(1, dtype=torch.int64)


def contrast(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Root mean square difference (N,) between the pixels of each image (N, 3, H, W) uint8 and its mean colour.

    It lies in [0, 1], like `Neighbours.distances`.
    """
    values = images.astype(np.float32)
    return np.sqrt(np.square(values - values.mean((2, 3), keepdims=True)).mean((1, 2, 3), dtype=np.float64)) / 255


def variety(images: NDArray[np.uint8]) -> float:
    """Root mean square difference between images (N, 3, H, W) uint8 and their mean image.

    It lies in [0, 1]; 0 means that all images are equal.
    """
    values = images.astype(np.float32)
    return float(np.sqrt(np.square(values - values.mean(0)).mean(dtype=np.float64))) / 255


def neighbour_picture(
    samples: NDArray[np.uint8],
    neighbours: NDArray[np.uint8],
    distances: NDArray[np.float64],
    reference: NDArray[np.float64] | None = None,
    pairs_a_row: int = 5,
) -> Image.Image:
    """Draws pairs of sample (left) and nearest training image (right), both (N, 3, H, W) uint8.

    Their distance (N,) stands below. reference: distances of real held-out images to their nearest training images.
    A pair gets a red frame if it is nearer than 95 % of those. Samples that are still nearer to their own mean colour
    get none: an almost grey image is near to every image and a copy of none.
    """
    bound = float(np.quantile(reference, 0.05)) if reference is not None and len(reference) else None
    near = distances < bound if bound is not None else np.zeros(len(distances), dtype=bool)
    plain = near & (contrast(samples) <= distances)
    copies = near & ~plain
    lines = _neighbour_caption(distances, reference, bound, int(copies.sum()), int(plain.sum()))
    scale = max(1, round(TILE_PIXELS / samples.shape[-1]))
    tile, font, line_height = samples.shape[-1] * scale, ImageFont.load_default(TEXT_SIZE), TEXT_SIZE + 8
    pairs_a_row = min(pairs_a_row, len(samples))
    pair_width, pair_height = 2 * tile + PAIR_GAP, tile + 2 * line_height
    top = 2 * MARGIN + len(lines) * line_height
    width = max(
        pairs_a_row * (pair_width + 2 * MARGIN), round(max(font.getlength(line) for line in lines)) + 2 * MARGIN
    )
    canvas = Image.new("RGB", (width, top + -(-len(samples) // pairs_a_row) * pair_height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + number * line_height), line, INK, font)
    for number, (sample, neighbour, distance) in enumerate(zip(samples, neighbours, distances, strict=True)):
        row, column = divmod(number, pairs_a_row)
        x, y = MARGIN + column * (pair_width + 2 * MARGIN), top + row * pair_height
        draw.rectangle(
            (x - PAIR_GAP, y - PAIR_GAP, x + pair_width + PAIR_GAP - 1, y + tile + PAIR_GAP - 1),
            ALARM if copies[number] else FRAME,
        )
        canvas.paste(magnified(sample, scale), (x, y))
        canvas.paste(magnified(neighbour, scale), (x + tile + PAIR_GAP, y))
        draw.text(
            (x + pair_width // 2, y + tile + PAIR_GAP + 5),
            f"{distance:.3f}",
            ALARM if copies[number] else FAINT,
            font,
            anchor="ma",
        )
    return canvas


def _neighbour_caption(
    distances: NDArray[np.float64], reference: NDArray[np.float64] | None, bound: float | None, copies: int, plain: int
) -> list[str]:
    """The lines of text above the pairs. copies: number of framed samples; plain: samples with almost no contrast."""
    lines = [
        "In each pair: a generated sample, and at its right the nearest training image.",
        (
            "Number: root mean square difference of the pixels. 0 is a copy. "
            f"Median of these samples {np.median(distances):.3f}."
        ),
    ]
    if reference is not None and bound is not None:
        lines += [
            f"Real images that were held out: median {np.median(reference):.3f}, and 5% of them below {bound:.3f}.",
            (
                f"{copies} of these {len(distances)} samples ({copies / len(distances):.0%}) "
                "are below that too, and framed in red."
            ),
        ]
    if plain:
        lines.append(
            f"{plain} samples are near only because they have almost no contrast (their mean colour is nearer still): "
            "these are no copies."
        )
    return lines
