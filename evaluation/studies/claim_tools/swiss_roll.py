"""The toy data of JiT (section 3.3) and pMF (figure 2).

They are points of a 2D Swiss roll, which a random orthonormal matrix maps into D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

POINTS = 3000  # points in each of the two sets of a comparison
DIRECTIONS = 200  # directions of the sliced distance
SCALE = 6.4  # dividing by it gives the roll about unit variance along each axis


def roll(count: int) -> Tensor:
    """(count, 2) points, drawn from torch's global generator: the angle 1.5 pi (1 + 2 U) is also the radius."""
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(count))
    return torch.stack((angle * angle.cos(), angle * angle.sin()), dim=1) / SCALE


def plane(dims: int, seed: int) -> Tensor:
    """A (dims, 2) matrix with orthonormal columns, random for the seed. For dims = 2 it is the identity."""
    if dims == 2:
        return torch.eye(2)
    return torch.linalg.qr(torch.randn(dims, 2, generator=torch.Generator().manual_seed(seed)))[0]


def lifted(points: Tensor, projection: Tensor) -> Tensor:
    """Maps points (B, 2) to images (B, D, 1, 1), the shape that methods expect."""
    return (points @ projection.T)[:, :, None, None]


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def sliced_distance(a: Tensor, b: Tensor) -> float:
    """Sliced Wasserstein-1 distance between two sets of n points, (n, 2) each.

    It sorts the projections onto each fixed direction and averages their distances over points and directions.
    """
    angles = torch.arange(DIRECTIONS) * (math.pi / DIRECTIONS)
    directions = torch.stack((angles.cos(), angles.sin()))
    return ((a @ directions).sort(dim=0).values - (b @ directions).sort(dim=0).values).abs().mean().item()


def off_plane(x: Tensor, projection: Tensor) -> float:
    """Root mean square, per dimension, of the component of x (n, D) orthogonal to the data's plane; 0 for D = 2."""
    dims = x.shape[1]
    if dims == 2:
        return 0.0
    residual = x - x @ projection @ projection.T
    return (residual.square().sum(dim=1).mean() / (dims - 2)).sqrt().item()
