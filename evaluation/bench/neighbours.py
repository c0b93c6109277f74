"""`pixlat bench neighbours 256`: times the search for nearest training images, today's and its first version.

Both search the same images.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pixlat.common.hardware import device_name
from pixlat.common.images.image_set import ImageSet
from pixlat.common.pictures.neighbours import BLOCK_VALUES, Neighbours, nearest

SEARCHED = 20_000  # largest number of training images that a run searches
SAMPLES, HELD_OUT = 20, 500
OLD_BLOCKS = 2  # blocks of the first version that we time; the total is extrapolated, because it can take hours


class MadeUpImages(ImageSet):
    """`count` images of noise from a small pool in memory, so that reading them takes no time."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__(np.zeros(count, dtype=np.int64), size, "made up")
        self.pool = noise(64, size, seed=0)

    def _read(self, indices: NDArray[np.int64], offsets: NDArray[np.float64] | None) -> NDArray[np.uint8]:
        images: NDArray[np.uint8] = self.pool[indices % len(self.pool)]
        return images


def compare(size: int, searched: int = SEARCHED, device: str = "cpu") -> dict[str, Any]:
    """Seconds of a run's search at `size` px with mirror images: the first version (extrapolated) and today's."""
    samples, held_out = noise(SAMPLES, size, seed=1), noise(HELD_OUT, size, seed=2)
    images = MadeUpImages(searched, size)
    part = min(searched, OLD_BLOCKS * max(1, BLOCK_VALUES // samples[0].size))
    old, (near, real) = timed(lambda: (first_version(samples, images, part), first_version(held_out, images, part)))
    queries = np.concatenate([samples, held_out])
    _, both = timed(lambda: nearest(queries, images, True, np.arange(part), device))  # this also warms up the device
    assert np.array_equal(both.distances, np.concatenate([near.distances, real.distances]))
    new, _ = timed(lambda: nearest(queries, images, True, None, device))
    return {
        "size": size,
        "training_images": searched,
        "queries": len(queries),
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "first_version": {f"{clock}_s": seconds * searched / part for clock, seconds in old.items()}
        | {"measured_images": part},
        "now": {f"{clock}_s": seconds for clock, seconds in new.items()} | {"measured_images": searched},
        "note": (
            "one process; several divide the search; images come from memory, so that reading them (twice then, "
            "once now) is not counted"
        ),
    }


def first_version(samples: NDArray[np.uint8], train: ImageSet, count: int) -> Neighbours:
    """The search of commit 88492b2: float64 on the CPU, norms of samples recomputed for every block, mirror images in
    separate blocks.
    """
    a = samples.reshape(len(samples), -1).astype(np.float64)
    best, indices, flipped = np.full(len(a), np.inf), np.zeros(len(a), dtype=np.int64), np.zeros(len(a), dtype=bool)
    block = max(1, BLOCK_VALUES // a.shape[1])
    for start in range(0, count, block):
        chosen = np.arange(start, min(start + block, count))
        images = train.fetch(chosen)
        for flip in (False, True):
            b = (images[..., ::-1] if flip else images).reshape(len(images), -1).astype(np.float64)
            squared = np.square(a).sum(1)[:, None] - 2 * (a @ b.T) + np.square(b).sum(1)[None]
            column = squared.argmin(1)
            nearest_squared = squared[np.arange(len(a)), column]
            nearer = nearest_squared < best
            best[nearer], indices[nearer], flipped[nearer] = nearest_squared[nearer], chosen[column[nearer]], flip
    return Neighbours(indices, flipped, np.sqrt(best / a.shape[1]) / 255)


def noise(count: int, size: int, seed: int) -> NDArray[np.uint8]:
    """(count, 3, size, size) uint8."""
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def timed(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Wall and processor seconds of one call, and its result."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - processor}, result
