"""Deterministic generation: labels, seeds and chunks are fixed by the settings,
so the images do not depend on batch size or number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixlat.common.errors import UserError
from pixlat.common.precision import computing_in
from pixlat.common.seeds import derive, image_seeds, noise_ahead
from pixlat.evaluation.features.ranks import rank_and_size

if TYPE_CHECKING:
    from pixlat.evaluation.features.collect import ImageBatch
    from pixlat.methods.base import Method


def balanced_labels(num_images: int, num_classes: int, seed: int) -> NDArray[np.int64]:
    """(num_images,) labels, shuffled: num_images / num_classes of each class.

    A remainder goes to classes drawn by the seed, one image each.
    """
    rng = np.random.Generator(np.random.PCG64(derive("labels", seed)))
    rounds = [np.arange(num_classes)] * (num_images // num_classes)
    labels = np.concatenate([*rounds, rng.permutation(num_classes)[: num_images % num_classes]]).astype(np.int64)
    return rng.permutation(labels)


def draw_labels(law: str, n: int, num_classes: int, seed: int) -> NDArray[np.int64]:
    """(n,) labels: equally many of each class in random order (balanced), or each drawn alone (random)."""
    if law == "balanced":
        return balanced_labels(n, num_classes, seed)
    return np.random.Generator(np.random.PCG64(derive("random labels", seed))).integers(num_classes, size=n)


@dataclass
class Drawing:
    """Time spent on random numbers."""

    seconds: float = 0.0  # that samplers waited for them


def generate(
    method: Method,
    sample_config: Any,
    labels: NDArray[np.int64],
    seed: int,
    batch_size: int,
    device: torch.device | str,
    precision: str = "fp32",
    uint8: str = "round",
    distributed: bool = True,
    drawing: Drawing | None = None,
) -> Iterator[ImageBatch]:
    """Batches of (images (B, C, H, W) uint8, indices (B,) int64 into labels), in evaluation mode.

    precision and uint8: the keys `eval.precision` and `eval.uint8`, whatever the code around chose.
    drawing: is told the seconds that the sampler waited for random numbers.

    Image i has its own generator, seeded by (seed, i). Chunk c of `batch_size` images is the work of process c mod
    number of processes; with distributed=False this process does all of it.
    """
    rank, ranks = rank_and_size() if distributed else (0, 1)
    starts = range(rank * batch_size, len(labels), ranks * batch_size)
    chunks = [torch.arange(start, min(start + batch_size, len(labels))) for start in starts]
    return generate_batches(method, sample_config, labels, seed, chunks, device, precision, uint8, drawing)


def generate_batches(
    method: Method,
    sample_config: Any,
    labels: NDArray[np.int64],
    seed: int,
    chunks: Sequence[Tensor],
    device: torch.device | str,
    precision: str = "fp32",
    uint8: str = "round",
    drawing: Drawing | None = None,
) -> Iterator[ImageBatch]:
    """The same for chosen chunks, each the indices (B,) int64 of its images. This process makes all of them."""
    device = torch.device(device)
    was_training = method.training
    method.eval()
    try:
        with noise_ahead((image_seeds(seed, indices.tolist()) for indices in chunks), device) as noises:
            for indices, noise in zip(chunks, noises, strict=True):
                wanted = torch.from_numpy(labels[indices.numpy()]).to(device)
                # not inference_mode: a table that a method computes on first use must stay usable in training
                with torch.no_grad(), computing_in(precision, device):
                    images = method.sample(wanted, noise, sample_config)
                if drawing is not None:
                    drawing.seconds += noise.seconds
                yield quantise(images, uint8), indices
    finally:
        method.train(was_training)


def quantise(images: Tensor, rule: str = "round") -> Tensor:
    """Float images in [-1, 1] to uint8: -1 -> 0, 1 -> 255, and 0 -> 128 by round (half to even) or 127 by truncate.

    Values outside are clipped, NaN and infinity refused.
    """
    if not bool(torch.isfinite(images).all()):
        bad = int((~torch.isfinite(images)).flatten(1).any(1).sum())
        raise UserError(
            f"{bad} of {len(images)} generated images hold NaN or infinity. The weights have diverged, "
            "or the sampler's settings make them."
        )
    return to_uint8(images, rule)


def to_uint8(images: Tensor, rule: str = "round") -> Tensor:
    """The same without the check, for pictures of unfinished training: what is not finite has no defined level."""
    levels = ((images.float() + 1) * 127.5).clamp(0, 255)
    return (levels if rule == "truncate" else levels.round()).to(torch.uint8)
