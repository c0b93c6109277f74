"""The source of every random number.

Training reseeds before every micro-batch from (seed, step, number of the micro-batch). So a resumed run needs no saved
generator state, evaluation cannot disturb training, and two processes with one micro-batch each draw the same numbers
as one process with two.
Sampling has one generator per image. So an image depends only on its seed, not on the batch size or on the number of
processes.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor


def derive(*parts: int | str) -> int:
    """A 63-bit seed from the parts. It is the same on every machine (SHA-256, not Python's salted hash)."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_step(seed: int, step: int, draw: int) -> None:
    """Reseeds torch's global generators (CPU and accelerators) for one micro-batch of one phase of a training step.

    draw: the number of this micro-batch and phase within the step.
    """
    torch.manual_seed(derive("train", seed, step, draw))


class Noise:
    """Standard normal draws for a batch of images, with one CPU generator per image.

    A sampler may draw many times (initial noise, then noise at each step of an SDE).
    Draw k of image i depends only on the image's seed and on k.
    On the meta device, which cost counting uses, it draws nothing.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.seeds = list(seeds)
        self.numbers = self.draws = 0  # random numbers per image and number of draws so far
        self.seconds = 0.0  # time that the sampler waited for draws, without their transfer to the device
        # called after the first draw with its shape
        self.on_first_draw: Callable[[tuple[int, ...]], None] | None = None
        self._ahead: tuple[tuple[int, ...], Tensor, list[Future[None]]] | None = None
        self._seed_generators()

    def _seed_generators(self) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]

    def __len__(self) -> int:
        return len(self.generators)

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) float32 standard normal noise on the device."""
        self.numbers, self.draws = self.numbers + math.prod(shape), self.draws + 1
        if self.device.type == "meta":
            return torch.empty(len(self), *shape, device="meta")
        start = time.perf_counter()
        drawn = self._drawn_ahead(shape)
        if drawn is None:
            drawn = torch.stack([torch.randn(shape, generator=generator) for generator in self.generators])
        self.seconds += time.perf_counter() - start
        if self.on_first_draw is not None:
            callback, self.on_first_draw = self.on_first_draw, None
            callback(shape)
        return drawn.to(self.device, non_blocking=drawn.is_pinned())

    def draw_ahead(self, shape: tuple[int, ...], pool: Executor) -> None:
        """Starts the first draw, that of `normal(*shape)`, in the threads of a pool. Uses pinned memory for a GPU."""
        buffer = torch.empty(len(self), *shape, pin_memory=self.device.type == "cuda")

        def draw(row: int) -> None:
            torch.randn(shape, generator=self.generators[row], out=buffer[row])

        self._ahead = (shape, buffer, [pool.submit(draw, row) for row in range(len(self))])

    def _drawn_ahead(self, shape: tuple[int, ...]) -> Tensor | None:
        """Waits for the numbers of `draw_ahead` and returns them. None if there are none for this shape.

        If the shape differs, it also seeds the generators again, so that the caller can draw from the start.
        """
        if self._ahead is None:
            return None
        (expected, buffer, draws), self._ahead = self._ahead, None
        for draw in draws:
            draw.result()
        if shape == expected:
            return buffer
        self._seed_generators()
        return None


@contextmanager
def noise_ahead(batches: Iterable[Sequence[int]], device: torch.device | str) -> Iterator[Iterator[Noise]]:
    """Within the block, iterates over one Noise for each batch of seeds.

    While the sampler works on one batch, other threads make the first draw of the next. They end with the block.
    A CPU core draws some 700 images of 3 x 256 x 256 per second, so a one-step sampler on a GPU would wait for it.
    """
    pool = ThreadPoolExecutor(drawing_threads(), thread_name_prefix="noise")
    try:
        yield _noises(batches, device, pool)
    finally:
        pool.shutdown(cancel_futures=True)


def _noises(batches: Iterable[Sequence[int]], device: torch.device | str, pool: Executor) -> Iterator[Noise]:
    current: Noise | None = None
    for seeds in batches:
        following = Noise(seeds, device)
        if current is not None:
            current.on_first_draw = partial(following.draw_ahead, pool=pool)
            yield current
        current = following
    if current is not None:
        yield current


def drawing_threads() -> int:
    """This process's share of the machine's cores, at most 8. Ignores OMP_NUM_THREADS, which torchrun sets to 1."""
    affinity = getattr(os, "sched_getaffinity", None)  # only Linux has this function
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def image_seeds(seed: int, indices: Sequence[int]) -> list[int]:
    """One seed per image, from the sampling seed and the image's index among all images."""
    return [derive("image", seed, index) for index in indices]
