"""Where every random number comes from.

Training is reseeded before every micro-batch from (seed, step, number of the micro-batch),
so a resumed run needs no saved generator state, evaluation cannot disturb training,
and two processes with one micro-batch each draw what one process with two would.
Sampling has one generator per image, so an image depends on its own seed and on nothing else: not on the batch size,
not on the number of processes.
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
    """A 63-bit seed from the parts, the same on every machine (SHA-256, not Python's salted hash)."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_step(seed: int, step: int, draw: int) -> None:
    """Reseeds torch's global generators (CPU and accelerators) for one micro-batch of one phase of a training step,
    the `draw`-th of the step.
    """
    torch.manual_seed(derive("train", seed, step, draw))


class Noise:
    """Standard normal draws for a batch of images, one CPU generator an image.

    A sampler may draw as often as it likes (initial noise, then noise at each step of an SDE):
    draw k of image i depends on the seeds and on k only.
    On the meta device (cost counting) nothing is drawn.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.seeds = list(seeds)
        self.numbers = self.draws = 0  # numbers for each image so far, in so many draws
        self.seconds = 0.0  # that the sampler waited for draws, without their way to the device
        # is told the shape of the first draw when that is done
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
            told, self.on_first_draw = self.on_first_draw, None
            told(shape)
        return drawn.to(self.device, non_blocking=drawn.is_pinned())

    def draw_ahead(self, shape: tuple[int, ...], pool: Executor) -> None:
        """Begins the first draw in the threads of a pool, into pinned memory for a GPU:
        the numbers that `normal(*shape)` would draw.
        """
        buffer = torch.empty(len(self), *shape, pin_memory=self.device.type == "cuda")

        def draw(row: int) -> None:
            torch.randn(shape, generator=self.generators[row], out=buffer[row])

        self._ahead = (shape, buffer, [pool.submit(draw, row) for row in range(len(self))])

    def _drawn_ahead(self, shape: tuple[int, ...]) -> Tensor | None:
        """What `draw_ahead` drew, waited for.

        Numbers of another shape than the sampler wants are drawn again from the seeds.
        """
        if self._ahead is None:
            return None
        (expected, buffer, draws), self._ahead = self._ahead, None
        for each in draws:
            each.result()
        if shape == expected:
            return buffer
        self._seed_generators()
        return None


@contextmanager
def noise_ahead(batches: Iterable[Sequence[int]], device: torch.device | str) -> Iterator[Iterator[Noise]]:
    """One Noise for each batch of seeds.

    While a sampler works on one, the first draw of the next is made in other threads, which end with the block.

    A CPU draws some 700 images of 3 x 256 x 256 a second and core, and a one-step sampler on a GPU would wait for it.
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
    """This process's share of the machine's cores, at most 8; torchrun's OMP_NUM_THREADS=1 says nothing of them."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def image_seeds(seed: int, indices: Sequence[int]) -> list[int]:
    """One seed an image from the sampling seed and the image's index in the whole set."""
    return [derive("image", seed, index) for index in indices]
