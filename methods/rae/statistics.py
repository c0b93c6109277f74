"""Mean and variance of the latents, for each channel and position.

`exact` is the mean and the variance over the first images of the training; each image counts once, for any number of
processes. `momentum` does the same as the authors' script: running averages over roughly the last twenty batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pixlat.common.errors import UserError
from pixlat.common.weights.tensors import read_tensors
from pixlat.methods.base import Batch

VARIANCE_EPS = 1e-5
MOMENTUM = 0.1
CHUNK = 16  # images whose latents are converted to float64 at once: 25 MB for DINOv2-B


def normalise(latents: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """(z - mean) / sqrt(variance + 1e-5)."""
    return (latents - mean) / (variance + VARIANCE_EPS).sqrt()


def denormalise(latents: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """The inverse of `normalise`."""
    return latents * (variance + VARIANCE_EPS).sqrt() + mean


def moments_of(latents: Tensor) -> Tensor:
    """Mean and summed squared deviations of a batch (B, C, h, h): (2, C, h, h) float64; zeros for an empty batch."""
    chunks = (latents.cpu() if latents.device.type == "mps" else latents).split(CHUNK)  # MPS has no float64
    mean = torch.stack([chunk.double().sum(dim=0) for chunk in chunks]).sum(dim=0) / max(1, len(latents))
    return torch.stack(
        [mean, torch.stack([(chunk.double() - mean).square().sum(dim=0) for chunk in chunks]).sum(dim=0)]
    )


class ExactStatistics:
    """Count, mean and summed squared deviations in float64, updated with each batch.

    The update avoids cancellation (Chan, Golub and LeVeque).
    """

    def __init__(self, moments: Tensor) -> None:
        """moments: any tensor (2, C, h, h); it gives the shape and the device."""
        self.count = 0
        self.mean, self.squares = torch.zeros_like(moments)

    def add(self, size: int, moments: Tensor) -> None:
        """A batch of `size` images with its `moments_of`."""
        mean, squares = moments
        count = self.count + size
        delta = mean - self.mean
        self.squares += squares + delta.square() * (self.count * size / count)
        self.mean += delta * (size / count)
        self.count = count

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and variance (C, h, h) float64."""
        return self.mean, self.squares / self.count


class MomentumStatistics:
    """Running averages as in batch norm: average += 0.1 (value of the batch - average).

    The mean starts at 0 and the variance at 1; the batch's variance is the biased one.
    """

    def __init__(self, moments: Tensor) -> None:
        """moments: any tensor (2, C, h, h); it gives the shape and the device."""
        self.mean, self.variance = torch.zeros_like(moments[0]), torch.ones_like(moments[0])

    def add(self, size: int, moments: Tensor) -> None:
        """A batch of `size` images with its `moments_of`."""
        mean, squares = moments
        self.mean.lerp_(mean, MOMENTUM)
        self.variance.lerp_(squares / size, MOMENTUM)

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and variance (C, h, h) float64."""
        return self.mean, self.variance


KINDS: dict[str, type[ExactStatistics] | type[MomentumStatistics]] = {
    "exact": ExactStatistics,
    "momentum": MomentumStatistics,
}


def measure(
    kind: str, batches: Iterator[Batch], encode: Callable[[Batch], Tensor], images: int
) -> tuple[Tensor, Tensor]:
    """Mean and variance (C, h, h) float64 of the latents of the first `images` images, the same on every process.

    batches: the micro-batches of all processes in the order in which one process would see them
    (`Method.before_training`). With P processes, each process encodes one of P batches and receives the moments of
    the others. So every image is encoded and counted once.
    """
    processes, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    statistics, seen = None, 0
    while seen < images:
        group = list(islice(batches, processes))
        sizes = []
        for batch in group:
            sizes.append(max(0, min(len(batch["image"]), images - seen)))
            seen += len(batch["image"])
        moments = _gathered(moments_of(encode(group[rank])[: sizes[rank]]), processes)
        statistics = statistics or KINDS[kind](moments[0])
        for size, theirs in zip(sizes, moments, strict=True):
            if size:
                statistics.add(size, theirs)
    assert statistics is not None
    return statistics.result()


def read_statistics(path: Path, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Reads a released stat.pt, {"mean": tensor or None, "var": tensor or None}.

    A missing mean counts as 0 and a missing variance as 1.
    """
    tensors = read_tensors(path)
    if unknown := tensors.keys() - {"mean", "var"}:
        raise UserError(
            f"model.statistics={str(path)!r} holds {sorted(unknown)[:5]} and not just 'mean' and 'var', "
            "so it is not a released stat.pt."
        )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"model.statistics={str(path)!r}: {name} is {tuple(tensor.shape)}, but the latents are {shape}. "
                "It belongs to another encoder or size."
            )
    return tensors.get("mean", torch.zeros(shape)), tensors.get("var", torch.ones(shape))


def _gathered(moments: Tensor, processes: int) -> list[Tensor]:
    """The moments of all processes in the order of their ranks; NCCL needs them on the GPU."""
    if processes == 1:
        return [moments]
    mine = moments.to("cuda" if dist.get_backend() == "nccl" else "cpu")
    theirs = [torch.empty_like(mine) for _ in range(processes)]
    dist.all_gather(theirs, mine)
    return theirs
