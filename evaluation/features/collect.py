"""From a stream of images to their features and moments, over any number of processes. Images are never stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixlat.common.errors import UserError
from pixlat.evaluation.features.extractor import Extractor
from pixlat.evaluation.features.moments import Moments
from pixlat.evaluation.features.ranks import gather_rows, rank_and_size
from pixlat.evaluation.protocols.identity import JACKKNIFE_GROUPS

ImageBatch: TypeAlias = tuple[Tensor, Tensor]  # images (B, 3, H, W) uint8, their global indices (B,) int64


@dataclass(frozen=True)
class Collected:
    """On the CPU of every process, in the order of the indices."""

    moments: Moments  # of all images
    features: Tensor  # (m, D) float32, of the images that were kept
    logits: Tensor  # (m, C) float32
    spatial: Moments | None = None  # of the spatial features of all images, where they were asked for


def collect(
    images: Iterable[ImageBatch],
    num_images: int,
    extractor: Extractor,
    weights: Tensor | None = None,
    keep: Tensor | None = None,
    groups: int = JACKKNIFE_GROUPS,
    spatial_dims: int = 0,
) -> Collected:
    """Extracts features of images 0 .. num_images - 1, each of which exactly one process must deliver.

    weights: (num_images,) for the moments, default 1; keep: (num_images,) bool,
        whose features and logits are returned, default all;
    spatial_dims: of the extractor's spatial features, whose moments are wanted too; 0 leaves them.
    """
    moments = Moments.zeros(extractor.dims, groups)
    spatial = Moments.zeros(spatial_dims, groups) if spatial_dims else None
    seen = [torch.empty(0, dtype=torch.int64)]  # a process may get no image at all
    kept, features, logits = [seen[0]], [torch.empty(0, extractor.dims)], [torch.empty(0, extractor.num_classes)]
    for batch, indices in images:
        found = extractor(batch).cpu()
        w = None if weights is None else weights[indices]
        moments.add(found.pooled, indices, w)
        if spatial is not None and found.spatial is not None:
            spatial.add(found.spatial, indices, w)
        chosen = slice(None) if keep is None else keep[indices]
        seen.append(indices)
        kept.append(indices[chosen])
        features.append(found.pooled[chosen])
        logits.append(found.logits[chosen])
    for sums in filter(None, (moments, spatial)):
        sums.all_reduce()
    check_complete(gather_rows(torch.cat(seen)), num_images)
    order = gather_rows(torch.cat(kept)).argsort()
    return Collected(moments, gather_rows(torch.cat(features))[order], gather_rows(torch.cat(logits))[order], spatial)


def check_complete(indices: Tensor, num_images: int) -> None:
    """Every index once: a missing or doubled image would move a score unnoticed."""
    counts = torch.bincount(indices, minlength=num_images)
    if len(counts) > num_images or bool((counts != 1).any()):
        missing, doubled = int((counts == 0).sum()), int((counts > 1).sum())
        raise UserError(
            f"{num_images} images were announced, indices 0 to {num_images - 1}: {missing} are missing, "
            f"{doubled} came more than once."
        )


def batches(
    fetch: Callable[[range], Tensor | NDArray[np.uint8]], num_images: int, size: int = 128
) -> Iterator[ImageBatch]:
    """This process's share of stored images, `size` at a time; fetch: positions -> images (B, 3, H, W) uint8.

    For an array it is `array.__getitem__`.
    """
    rank, ranks = rank_and_size()
    for start in range(rank * size, num_images, ranks * size):
        positions = range(start, min(start + size, num_images))
        yield torch.as_tensor(fetch(positions)), torch.tensor(positions)
