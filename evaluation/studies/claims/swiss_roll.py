"""The toy of JiT (section 3.3) and pMF (figure 2): a Swiss roll in the plane,
seen through a random orthonormal map into D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

POINTS = 3000  # of every comparison
DIRECTIONS = 200  # of the sliced distance
SCALE = 6.4  # brings the roll to about unit variance an axis


def roll(count: int) -> Tensor:
    """(count, 2) points from torch's global generator: angle 1.5 pi (1 + 2 U) with itself as the radius."""
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(count))
    return torch.stack((angle * angle.cos(), angle * angle.sin()), dim=1) / SCALE


def plane(dims: int, seed: int) -> Tensor:
    """(dims, 2) with orthonormal columns, random for the seed; the identity in two dimensions."""
    if dims == 2:
        return torch.eye(2)
    return torch.linalg.qr(torch.randn(dims, 2, generator=torch.Generator().manual_seed(seed)))[0]


def lifted(points: Tensor, projection: Tensor) -> Tensor:
    """Points (B, 2) as images (B, D, 1, 1), which is how methods take them."""
    return (points @ projection.T)[:, :, None, None]


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def sliced_distance(a: Tensor, b: Tensor) -> float:
    """Sliced Wasserstein-1 distance of two sets of as many points (n, 2):
    the mean over fixed directions of the mean distance of sorted projections.
    """
    angles = torch.arange(DIRECTIONS) * (math.pi / DIRECTIONS)
    directions = torch.stack((angles.cos(), angles.sin()))
    return ((a @ directions).sort(dim=0).values - (b @ directions).sort(dim=0).values).abs().mean().item()


def off_plane(x: Tensor, projection: Tensor) -> float:
    """Root mean square of what of x (n, D) lies outside the data's plane, for each dimension there;
    0 in two dimensions.
    """
    dims = x.shape[1]
    if dims == 2:
        return 0.0
    residual = x - x @ projection @ projection.T
    return (residual.square().sum(dim=1).mean() / (dims - 2)).sqrt().item()
