"""From a data set to training batches. The images of a step are a pure function of the seed and the step.

`TrainingPlan` chooses them and `training_batches` reads them. They do not depend on the step at which a run resumes,
on the number of processes, or on the number of loader processes.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import signal
import weakref
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pixlat.common.errors import UserError
from pixlat.common.images.image_set import ImageSet
from pixlat.common.seeds import derive

log = logging.getLogger("pixlat")
GRACE_SECONDS = 30  # how long loader processes continue after a SIGTERM; Slurm's default KillWait

# the content of one micro-batch: indices (m,), flips (m,), and offsets (m, 2) of random crops or None
Request = tuple[NDArray[np.int64], NDArray[np.bool_], "NDArray[np.float64] | None"]


class TrainingPlan:
    """Chooses the images of every training step. Its only state is a cache."""

    def __init__(
        self, labels: NDArray[np.int64], batch: int, seed: int, balanced: bool, flip: bool = False, crop: bool = False
    ) -> None:
        """
        labels (N,): the classes of the training images.
        batch: images per step, over all processes.
        balanced: draw a class uniformly, then one of its images, with replacement;
            otherwise every epoch is a new permutation of all images.
        flip: mirror each drawn image with probability one half.
        crop: cut each drawn image at a random place.
        """
        if len(labels) == 0:
            raise UserError("there are no training images. Lower data.holdout or add images.")
        self.batch = batch
        self.seed = seed
        self.balanced = balanced
        self.flip = flip
        self.crop = crop
        self._num_images = len(labels)
        self._by_class = np.argsort(labels, kind="stable")
        _, self._class_start, self._class_count = np.unique(
            labels[self._by_class], return_index=True, return_counts=True
        )
        self._cached_epoch = -1
        self._permutation = self._by_class

    def indices(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The global batch of a step: positions in the training set, (batch,) int64, and flips, (batch,) bool.

        An image is mirrored where its flip is true.
        """
        rng = np.random.Generator(np.random.PCG64(derive("batch", self.seed, step)))
        flips = rng.random(self.batch) < (0.5 if self.flip else 0.0)
        return (self._balanced_draw(rng) if self.balanced else self._epoch_walk(step)), flips

    def offsets(self, step: int) -> NDArray[np.float64] | None:
        """The places of a step's random crops, (batch, 2) in [0, 1), down and right; None for centre crops.

        A separate generator draws them, so a run with random crops sees the same images in the same order
        as a run without.
        """
        if not self.crop:
            return None
        return np.random.Generator(np.random.PCG64(derive("crop", self.seed, step))).random((self.batch, 2))

    def distinct(self, steps: int, micro_batch: int, world: int = 1) -> int:
        """How many distinct images each process sees in the first `steps` steps, summed over the processes.

        A mirror image counts as another image. With random crops every image counts, because no crop comes twice.
        """
        if self.crop:
            return steps * self.batch
        seen = np.zeros((world, 2, self._num_images), dtype=bool)
        process = np.arange(self.batch) // micro_batch % world
        for step in range(steps):
            indices, flips = self.indices(step)
            seen[process, flips.astype(np.int64), indices] = True
        return int(seen.sum())

    def _balanced_draw(self, rng: np.random.Generator) -> NDArray[np.int64]:
        classes = rng.integers(len(self._class_count), size=self.batch)
        return self._by_class[self._class_start[classes] + rng.integers(self._class_count[classes])]

    def _epoch_walk(self, step: int) -> NDArray[np.int64]:
        """The next `batch` images after the first step * batch of an endless sequence of permutations.

        A batch may span the end of an epoch.
        """
        parts, position, missing = [], step * self.batch, self.batch
        while missing:
            epoch, offset = divmod(position, self._num_images)
            part = self._epoch(epoch)[offset : offset + missing]
            parts.append(part)
            position, missing = position + len(part), missing - len(part)
        return np.concatenate(parts)

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._cached_epoch:
            rng = np.random.Generator(np.random.PCG64(derive("epoch", self.seed, epoch)))
            self._permutation = rng.permutation(self._num_images)
            self._cached_epoch = epoch
        return self._permutation


def training_batches(
    images: ImageSet,
    plan: TrainingPlan,
    start_step: int,
    micro_batch: int,
    accumulation: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    needs_images: bool = True,
) -> Iterator[list[dict[str, Tensor]]]:
    """Yields without end: for every step from `start_step` on, a list of this process's `accumulation` micro-batches.

    A micro-batch is {"image": uint8 (m, 3, H, W), "label": int64 (m,), "index": int64 (m,)}. It also has
    "mirrored": bool (m,) if the plan mirrors images, and "moments": float32 (m, 2 C, h, h) if the set has stored
    latents (common/datasets/stored_latents.py). Without `needs_images` it has no "image", and no image is read.
    The global batch is cut into world * accumulation micro-batches. Number j * world + rank is the j-th of process
    `rank`, so two processes with one micro-batch each see the same images as one process with two.
    If `workers` > 0, that many loader processes read ahead. For an unreadable image the training process raises
    UserError; if the set skips such images, it warns instead and adds the image to the set's `broken`.
    """
    if micro_batch * accumulation * world != plan.batch:
        raise UserError(
            f"{world} processes x {accumulation} micro-batches x {micro_batch} "
            f"images = {world * accumulation * micro_batch}, but the global batch is {plan.batch}. "
            "Set train.batch and train.micro_batch so that they agree."
        )
    requests = _requests(plan, start_step, micro_batch, accumulation, rank, world)
    loader = DataLoader(
        _Reader(images, plan.flip, needs_images),
        batch_size=None,  # a request is a whole micro-batch
        sampler=requests,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_outlive_signals,
        generator=torch.Generator(),  # otherwise the loader would draw from the global generator
    )
    steps = _steps(iter(loader), accumulation, images)
    atexit.register(_close, weakref.ref(steps))
    return steps


def _steps(
    micro_batches: Iterator[dict[str, Any]], accumulation: int, images: ImageSet
) -> Generator[list[dict[str, Tensor]], None, None]:
    warned: set[int] = set()
    while True:
        yield [_checked(next(micro_batches), images, warned) for _ in range(accumulation)]


def _requests(
    plan: TrainingPlan, start_step: int, micro_batch: int, accumulation: int, rank: int, world: int
) -> Iterator[Request]:
    for step in itertools.count(start_step):
        indices, flips = plan.indices(step)
        offsets = plan.offsets(step)
        for j in range(accumulation):
            first = (j * world + rank) * micro_batch
            own = slice(first, first + micro_batch)
            yield indices[own], flips[own], None if offsets is None else offsets[own]


class _Reader(Dataset[dict[str, Any]]):
    """Turns requests into micro-batches, in this process or in a loader process.

    It returns the text of a UserError instead of raising it: torch would add the traceback of the loader process.
    """

    def __init__(self, images: ImageSet, mirrors: bool, needs_images: bool) -> None:
        self.images = images
        self.mirrors = mirrors
        self.needs_images = needs_images

    def __getitem__(self, request: Request) -> dict[str, Any]:
        indices, flips, offsets = request
        known = len(self.images.broken)
        arrays: dict[str, NDArray[Any]] = {"label": self.images.labels[indices], "index": indices.copy()}
        if self.mirrors:
            arrays["mirrored"] = flips.copy()
        try:
            if self.needs_images:
                arrays["image"] = self.images.fetch(indices, flips, offsets)
            if self.images.latents is not None:
                arrays["moments"] = self.images.latents.moments(indices, flips)
        except UserError as error:
            return {"error": str(error)}
        new = dict(itertools.islice(self.images.broken.items(), known, None))
        return {name: torch.from_numpy(array) for name, array in arrays.items()} | ({"skipped": new} if new else {})


def _checked(micro_batch: dict[str, Any], images: ImageSet, warned: set[int]) -> dict[str, Tensor]:
    """The micro-batch without its "error" and "skipped" entries.

    Raises the error as UserError. Warns once of each skipped image and adds it to `images.broken`.
    """
    if "error" in micro_batch:
        raise UserError(micro_batch["error"])
    for position, reason in micro_batch.pop("skipped", {}).items():
        if position not in warned:
            warned.add(position)
            images.broken[position] = reason
            log.warning(
                "%s Another image of its class stands in for it; %d of %d were skipped so far.",
                reason,
                len(warned),
                len(images),
            )
    return micro_batch


def _close(steps: weakref.ref[Generator[Any, None, None]]) -> None:
    """Ends the loader processes of an iterator that is still alive when Python exits.

    Otherwise they would continue until the end of their grace period.
    """
    generator = steps()
    if generator is not None:
        generator.close()


def _outlive_signals(worker: int) -> None:
    """Lets a loader process survive stop signals for a while.

    A scheduler signals every process of a job, but training still needs the loader to finish its step and save.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))
