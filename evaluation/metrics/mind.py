"""MIND, the Monge Inception Distance (Berthet et al. 2026): the mean cost of optimal transport over many directions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pixlat.evaluation.metrics.jackknife import Estimate, jackknife
from pixlat.evaluation.protocols.identity import JACKKNIFE_GROUPS, MAX_NEIGHBOURS, MIND_PROJECTIONS, MIND_SEED

BLOCK = 100  # directions to project onto at once


def monge_distance(generated: Tensor, reference: Tensor, groups: int = JACKKNIFE_GROUPS) -> Estimate:
    """3 D times the mean squared 2-Wasserstein distance between projections of features (n, D) and (m, D).

    The mean is over random directions. In one dimension the optimal plan pairs the sorted values, so both sets must
    have the same size: we take the first min(n, m, MAX_NEIGHBOURS) images of each. The jackknife leaves out each group
    (position mod K) of both sets.
    """
    n, dims = min(len(generated), len(reference), MAX_NEIGHBOURS), generated.shape[1]
    x, y = generated[:n].double(), reference[:n].double()
    group = torch.arange(n, device=x.device) % groups
    directions = unit_directions(dims).to(x)
    sums = x.new_zeros(groups + 1)  # entry g: without group g; the last entry: of all images
    for block in directions.split(BLOCK):
        (x_sorted, x_order), (y_sorted, y_order) = ((block @ features.T).sort(dim=1) for features in (x, y))
        x_group, y_group = group[x_order], group[y_order]
        for g in range(groups):
            sums[g] += _cost(x_sorted[x_group != g].view(len(block), -1), y_sorted[y_group != g].view(len(block), -1))
        sums[groups] += _cost(x_sorted, y_sorted)
    *left_out, value = (3 * dims / MIND_PROJECTIONS * sums).tolist()
    return jackknife(value, left_out)


def unit_directions(dims: int) -> Tensor:
    """(MIND_PROJECTIONS, D) float64, uniform on the sphere, from a fixed seed."""
    rng = np.random.Generator(np.random.PCG64(MIND_SEED))
    directions = torch.from_numpy(rng.standard_normal((MIND_PROJECTIONS, dims)))
    return directions / directions.norm(dim=1, keepdim=True)


def _cost(x: Tensor, y: Tensor) -> Tensor:
    """The squared distances of sorted projections (P, n): their mean over images, summed over directions."""
    return (x - y).square().mean(1).sum()
