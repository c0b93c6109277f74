"""Deterministic generation: the settings determine labels and seeds.

The images do not depend on the batch size or the number of processes.
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
    """(num_images,) shuffled labels with num_images / num_classes images of each class.

    If this leaves a remainder, the seed draws that many different classes, which get one image more.
    """
    rng = np.random.Generator(np.random.PCG64(derive("labels", seed)))
    rounds = [np.arange(num_classes)] * (num_images // num_classes)
    labels = np.concatenate([*rounds, rng.permutation(num_classes)[: num_images % num_classes]]).astype(np.int64)
    return rng.permutation(labels)


def draw_labels(law: str, n: int, num_classes: int, seed: int) -> NDArray[np.int64]:
    """(n,) labels. law: "balanced" (equally many of each class, in random order) or "random" (independent draws)."""
    if law == "balanced":
        return balanced_labels(n, num_classes, seed)
    return np.random.Generator(np.random.PCG64(derive("random labels", seed))).integers(num_classes, size=n)


@dataclass
class Drawing:
    """Time spent on random numbers."""

    seconds: float = 0.0  # in which samplers waited for them


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

    precision and uint8: as the keys `eval.precision` and `eval.uint8`; the caller's own settings do not matter.
    drawing: gets the seconds added in which the sampler waited for random numbers.

    Image i has a generator that (seed, i) seeds. Process (c mod number of processes) makes chunk c of `batch_size`
    images. With distributed=False this process makes all chunks.
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
    """Like `generate`, for the given chunks: the indices (B,) int64 of their images. This process makes all of them."""
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

    Clips values outside [-1, 1]. Raises UserError for NaN and infinity.
    """
    if not bool(torch.isfinite(images).all()):
        bad = int((~torch.isfinite(images)).flatten(1).any(1).sum())
        raise UserError(
            f"{bad} of {len(images)} generated images hold NaN or infinity. Either the weights have diverged, "
            "or the sampler's settings cause it: try other sample.* settings."
        )
    return to_uint8(images, rule)


def to_uint8(images: Tensor, rule: str = "round") -> Tensor:
    """Like `quantise` without the check, for previews during training. NaN and infinity give undefined values."""
    levels = ((images.float() + 1) * 127.5).clamp(0, 255)
    return (levels if rule == "truncate" else levels.round()).to(torch.uint8)
