"""Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

All four use nearest-neighbour balls. Distances are computed block by block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pixlat.evaluation.protocols.identity import DENSITY_K, PRECISION_K

BLOCK = 1024  # rows of a distance matrix in memory at once


@dataclass(frozen=True)
class Prdc:
    """Per-image values; a metric is their (weighted) mean."""

    precision: Tensor  # (n,) for each generated image: 1 inside the ball of some reference image, else 0
    recall: Tensor  # (m,) for each reference image: 1 inside the ball of some generated image, else 0
    density: Tensor  # (n,) for each generated image: the number of reference balls that contain it, divided by k
    coverage: Tensor  # (m,) for each reference image: 1 if its ball contains a generated image, else 0


def prdc(generated: Tensor, reference: Tensor) -> Prdc:
    """All four metrics of features (n, D) and (m, D).

    The radius of an image's ball is the distance to the k-th nearest other image of the same set. As in the papers,
    precision and recall use k = 3 and distance <= radius, density and coverage use k = 5 and distance < radius. Recall
    is precision with the sets swapped.
    """
    # we compute squared distances from dot products, where a common offset would only cost precision
    center = reference.double().mean(0)
    x, y = generated.double() - center, reference.double() - center
    x_radii = squared_radii(x, (PRECISION_K,))[:, 0]
    y_radii = squared_radii(y, (PRECISION_K, DENSITY_K))
    precision, density = [], []
    recall = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    coverage = recall.clone()
    for x_block, radii in zip(x.split(BLOCK), x_radii.split(BLOCK), strict=True):
        distances = squared_distances(x_block, y)  # (block, m)
        precision.append((distances <= y_radii[:, 0]).any(1))
        inside = distances < y_radii[:, 1]
        density.append(inside.sum(1).double() / DENSITY_K)
        coverage |= inside.any(0)
        recall |= (distances <= radii[:, None]).any(0)
    return Prdc(torch.cat(precision).double(), recall.double(), torch.cat(density), coverage.double())


def squared_radii(x: Tensor, ks: tuple[int, ...]) -> Tensor:
    """(n, len(ks)): squared distances of each row to its k-th nearest other row."""
    parts = []
    for start in range(0, len(x), BLOCK):
        distances = squared_distances(x[start : start + BLOCK], x)
        rows = torch.arange(len(distances))
        # excludes the image itself by its position, because its computed distance to itself is not exactly 0
        distances[rows, start + rows] = torch.inf
        nearest = distances.topk(max(ks), largest=False).values
        parts.append(nearest[:, [k - 1 for k in ks]])
    return torch.cat(parts)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x - y|^2, (n, m)."""
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_min(0)
