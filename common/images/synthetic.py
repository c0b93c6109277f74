"""Procedural images for tests and dry runs: ten classes, any size. Each image is a pure function of its index."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pixlat.common.seeds import derive

CLASS_NAMES = ("disc", "ring", "square", "frame", "diamond", "triangle", "cross", "bars", "checker", "half")


def draw(index: int, size: int) -> NDArray[np.uint8]:
    """Image number `index`, (3, size, size) uint8: the shape of class index % 10 in random colours, place and scale."""
    rng = np.random.Generator(np.random.PCG64(derive("synthetic", index)))
    shape_color, back_color = rng.uniform(0, 255, (2, 3, 1, 1))
    center, radius = rng.uniform(-0.35, 0.35, 2), rng.uniform(0.35, 0.65)
    axis = (np.arange(size, dtype=np.float32) * 2 + 1) / size - 1  # pixel centres in [-1, 1]
    y, x = (axis[:, None] - center[0]) / radius, (axis[None, :] - center[1]) / radius
    signed = _inside(index % len(CLASS_NAMES), x, y)
    cover = np.clip(0.5 + signed * radius * size / 2, 0, 1)  # one pixel of soft edge
    return (back_color + (shape_color - back_color) * cover).round().astype(np.uint8)


def _inside(label: int, x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.floating]:
    """(H, W): approximate distance to the outline of the shape, positive inside, negative outside.

    The shape spans [-1, 1].
    """
    box = 1 - np.maximum(abs(x), abs(y))
    disc = 1 - np.hypot(x, y)
    shapes = (
        lambda: disc,
        lambda: 0.25 - abs(disc - 0.25),
        lambda: box,
        lambda: 0.2 - abs(box - 0.2),
        lambda: (1 - abs(x) - abs(y)) / 2**0.5,
        lambda: np.minimum(0.8 - y, (y + 1) / 2 - abs(x)),
        lambda: np.minimum(box, 0.3 - np.minimum(abs(x), abs(y))),
        lambda: np.minimum(box, np.cos(2.5 * np.pi * y) / 8),
        lambda: np.minimum(box, np.sin(2 * np.pi * x) * np.sin(2 * np.pi * y) / 6),
        lambda: np.minimum(disc, y),
    )
    return shapes[label]()
