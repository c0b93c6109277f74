"""Extracts features and moments of a stream of images on any number of processes, without storing the images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixlat.common.errors import UserError
from pixlat.evaluation.features.extractor import Extractor, Features
from pixlat.evaluation.features.moments import Moments
from pixlat.evaluation.features.ranks import gather_rows, rank_and_size
from pixlat.evaluation.protocols.identity import JACKKNIFE_GROUPS

ImageBatch: TypeAlias = tuple[Tensor, Tensor]  # images (B, 3, H, W) uint8, their global indices (B,) int64


@dataclass(frozen=True)
class Collected:
    """The results of `collect`, on the CPU of every process, in the order of the indices."""

    moments: Moments  # of all images
    features: Tensor  # (m, D) float32, of the images that `keep` selects
    logits: Tensor  # (m, C) float32, of the same images
    spatial: Moments | None = None  # of the spatial features of all images; None if `spatial_dims` was 0


def collect(
    images: Iterable[ImageBatch],
    num_images: int,
    extractor: Extractor,
    weights: Tensor | None = None,
    keep: Tensor | None = None,
    groups: int = JACKKNIFE_GROUPS,
    spatial_dims: int = 0,
) -> Collected:
    """Extracts features of images 0 .. num_images - 1. Exactly one process must deliver each of them.

    weights: (num_images,) weights for the moments, default 1; keep: (num_images,) bool, selects the images whose
    features and logits are returned, default all; spatial_dims: dimensions of the extractor's spatial features, whose
    moments are collected as well; 0: they are not.
    """
    moments = Moments.zeros(extractor.dims, groups)
    spatial = Moments.zeros(spatial_dims, groups) if spatial_dims else None
    collector = Collector(extractor, keep)
    for batch, indices in images:
        output = collector.add(batch, indices)
        w = None if weights is None else weights[indices]
        moments.add(output.pooled, indices, w)
        if spatial is not None and output.spatial is not None:
            spatial.add(output.spatial, indices, w)
    for sums in filter(None, (moments, spatial)):
        sums.all_reduce()
    return Collected(moments, *collector.gathered(num_images), spatial)


def collect_features(
    images: Iterable[ImageBatch], num_images: int, extractors: Sequence[Extractor]
) -> list[tuple[Tensor, Tensor]]:
    """(features (n, D), logits (n, C)) by each extractor, of all images, on the CPU of every process.

    Reads the images once. Exactly one process must deliver each of the images 0 .. num_images - 1.
    """
    collectors = [Collector(extractor) for extractor in extractors]
    for batch, indices in images:
        for collector in collectors:
            collector.add(batch, indices)
    return [collector.gathered(num_images) for collector in collectors]


class Collector:
    """Keeps an extractor's features and logits of this process's images."""

    def __init__(self, extractor: Extractor, keep: Tensor | None = None) -> None:
        """keep: (num_images,) bool, selects the images whose outputs are kept; default all."""
        self.extractor, self.keep = extractor, keep
        self.seen = [torch.empty(0, dtype=torch.int64)]  # a process may get no image at all
        self.kept = list(self.seen)
        self.features, self.logits = [torch.empty(0, extractor.dims)], [torch.empty(0, extractor.num_classes)]

    def add(self, batch: Tensor, indices: Tensor) -> Features:
        """Extracts from a batch of images with these indices. Returns the features of all of them, on the CPU."""
        output = self.extractor(batch).cpu()
        chosen = slice(None) if self.keep is None else self.keep[indices]
        self.seen.append(indices)
        self.kept.append(indices[chosen])
        self.features.append(output.pooled[chosen])
        self.logits.append(output.logits[chosen])
        return output

    def gathered(self, num_images: int) -> tuple[Tensor, Tensor]:
        """(features, logits) of the kept images of all processes, in the order of their indices."""
        check_complete(gather_rows(torch.cat(self.seen)), num_images)
        order = gather_rows(torch.cat(self.kept)).argsort()
        return gather_rows(torch.cat(self.features))[order], gather_rows(torch.cat(self.logits))[order]


def check_complete(indices: Tensor, num_images: int) -> None:
    """Raises UserError unless every index occurs once: a missing or repeated image would silently change a score."""
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
    """This process's share of stored images, in batches of `size`.

    fetch: maps positions to images (B, 3, H, W) uint8; for an array it is `array.__getitem__`.
    """
    rank, ranks = rank_and_size()
    for start in range(rank * size, num_images, ranks * size):
        positions = range(start, min(start + size, num_images))
        yield torch.as_tensor(fetch(positions)), torch.tensor(positions)
