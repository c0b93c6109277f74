"""Mean and variance of the latents, for each channel and position.

`exact` is the mean and the variance of all latents seen, over all processes. `momentum` is what the authors' script computes: running averages
that remember some twenty batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import UserError
from common.external import read_tensors

VARIANCE_EPS = 1e-5
MOMENTUM = 0.1


def normalise(latents: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """(z - mean) / sqrt(variance + 1e-5)."""
    return (latents - mean) / (variance + VARIANCE_EPS).sqrt()


def denormalise(latents: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """The inverse of `normalise`."""
    return latents * (variance + VARIANCE_EPS).sqrt() + mean


class ExactStatistics:
    """Count, mean and summed squared deviations in float64, updated batch by batch without cancellation (Chan, Golub and LeVeque)."""

    def __init__(self, shape: torch.Size) -> None:
        self.count = 0
        self.mean = torch.zeros(shape, dtype=torch.float64)
        self.squares = torch.zeros(shape, dtype=torch.float64)

    def add(self, latents: Tensor) -> None:
        """(B, C, h, h) on any device."""
        z = latents.double().cpu()
        mean, count = z.mean(dim=0), self.count + len(z)
        delta = mean - self.mean
        self.squares += (z - mean).square().sum(dim=0) + delta.square() * (self.count * len(z) / count)
        self.mean += delta * (len(z) / count)
        self.count = count

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and variance (C, h, h) float64 over all processes."""
        return merge_exact(*_gathered(torch.full_like(self.mean, self.count), self.mean, self.squares))


def merge_exact(counts: Tensor, means: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of everything, from each part's count, mean and summed squared deviations, all (parts, C, h, h)."""
    total = counts.sum(dim=0)
    mean = (counts * means).sum(dim=0) / total
    return mean, (squares + counts * (means - mean).square()).sum(dim=0) / total


class MomentumStatistics:
    """Running averages as batch norm keeps them, from 0 and 1: average += 0.1 (of the batch - average), with the batch's biased variance."""

    def __init__(self, shape: torch.Size) -> None:
        self.mean = torch.zeros(shape, dtype=torch.float64)
        self.variance = torch.ones(shape, dtype=torch.float64)

    def add(self, latents: Tensor) -> None:
        """(B, C, h, h) on any device."""
        z = latents.double().cpu()
        self.mean.lerp_(z.mean(dim=0), MOMENTUM)
        self.variance.lerp_(z.var(dim=0, correction=0), MOMENTUM)

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and variance (C, h, h) float64 over all processes."""
        return merge_momentum(*_gathered(self.mean, self.variance))


def merge_momentum(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the parts' means; the mean of their variances plus the variance of their means. All (parts, C, h, h)."""
    return means.mean(dim=0), variances.mean(dim=0) + means.var(dim=0, correction=0)


KINDS: dict[str, type[ExactStatistics] | type[MomentumStatistics]] = {"exact": ExactStatistics, "momentum": MomentumStatistics}


def measure(kind: str, latents: Iterator[Tensor], images: int) -> tuple[Tensor, Tensor]:
    """Mean and variance (C, h, h) float64 of the first `images` latents, over all processes; whole batches, so a few more may be taken."""
    first = next(latents)
    statistics, seen = KINDS[kind](first.shape[1:]), 0
    for batch in itertools.chain([first], latents):
        statistics.add(batch)
        seen += len(batch) * _processes()
        if seen >= images:
            break
    return statistics.result()


def read_statistics(path: Path, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A released stat.pt, {"mean": tensor or None, "var": tensor or None}: no mean is a mean of 0, no variance one of 1."""
    tensors = read_tensors(path)
    if unknown := tensors.keys() - {"mean", "var"}:
        raise UserError(f"model.statistics={str(path)!r} holds {sorted(unknown)[:5]} and not just 'mean' and 'var', so it is not a released stat.pt.")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"model.statistics={str(path)!r}: {name} is {tuple(tensor.shape)}, but the latents are {shape}. It belongs to another encoder or size."
            )
    return tensors.get("mean", torch.zeros(shape)), tensors.get("var", torch.ones(shape))


def _processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _gathered(*values: Tensor) -> Tensor:
    """(values, processes, C, h, h) on the CPU; through the accelerator where the group's backend needs it."""
    mine = torch.stack(values)
    if _processes() == 1:
        return mine.unsqueeze(1)
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    parts = [torch.empty_like(mine, device=device) for _ in range(_processes())]
    dist.all_gather(parts, mine.to(device))
    return torch.stack([part.cpu() for part in parts], dim=1)
