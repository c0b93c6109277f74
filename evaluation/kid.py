"""Kernel distance (KID): the squared maximum mean discrepancy with k(x, y) = (x.y / D + 1)^3, an unbiased estimate, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.frechet import jackknife
from evaluation.protocol import JACKKNIFE_GROUPS, KID_COMPLETE_LIMIT, KID_SEED, KID_SUBSET_SIZE, KID_SUBSETS

BLOCK = 2048  # rows of a kernel matrix in memory at once


@dataclass(frozen=True)
class KernelDistance:
    value: float
    se: float  # complete: jackknife over groups of generated images; subsets: standard deviation over subsets / sqrt(subsets)
    left_out: tuple[float, ...] = ()  # complete: the values with one group left out


def kernel_distance(generated: Tensor, reference: Tensor, weights: Tensor | None = None) -> KernelDistance:
    """KID of features (n, D) and (m, D); the reference's weights (m,) default to 1.

    Up to KID_COMPLETE_LIMIT images a side every pair is used; beyond it the mean over subsets drawn with a fixed seed.
    """
    x, y = generated.double(), reference.double()
    w = y.new_ones(len(y)) if weights is None else weights.double()
    if max(len(x), len(y)) <= KID_COMPLETE_LIMIT:
        value, left_out = complete(x, y, w, groups=min(JACKKNIFE_GROUPS, len(x) // 2))
        return KernelDistance(value, jackknife(value, left_out).se, tuple(left_out))
    rng = np.random.Generator(np.random.PCG64(KID_SEED))
    size = min(KID_SUBSET_SIZE, len(x), len(y))
    values = []
    for _ in range(KID_SUBSETS):
        some_x, some_y = (torch.from_numpy(rng.choice(len(side), size, replace=False)) for side in (x, y))
        values.append(complete(x[some_x], y[some_y], w[some_y], groups=1)[0])
    return KernelDistance(float(np.mean(values)), float(np.std(values, ddof=1)) / KID_SUBSETS**0.5)


def complete(x: Tensor, y: Tensor, w: Tensor, groups: int) -> tuple[float, list[float]]:
    """The U-statistic mean k(x, x') + mean k(y, y') - 2 mean k(x, y) over all pairs of different images, y weighted by w.

    Also its values with each group (position mod `groups`) of x left out, none for a single group.
    """
    member = F.one_hot(torch.arange(len(x)) % groups, groups).double()  # (n, K)
    count = member.sum(0)
    yy = (_pair_sums(y, y, w[:, None], w[:, None]) - w.square() @ _diagonal(y)) / (w.sum().square() - w.square().sum())
    xx = _pair_sums(x, x, member, member) - torch.diag(member.T @ _diagonal(x))  # (K, K)
    xy = _pair_sums(x, y, member, w[:, None] / w.sum())[:, 0]  # (K,)

    def statistic(n: Tensor, pairs: Tensor, cross: Tensor) -> float:
        return float(pairs / (n * (n - 1)) + yy - 2 * cross / n)

    value = statistic(count.sum(), xx.sum(), xy.sum())
    if groups == 1:
        return value, []
    pairs_without = xx.sum() - 2 * xx.sum(1) + xx.diagonal()
    return value, [statistic(count.sum() - count[g], pairs_without[g], xy.sum() - xy[g]) for g in range(groups)]


def _pair_sums(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A^T k(x, y) B for columns of weights A (n, K) and B (m, L), block by block."""
    total = x.new_zeros(a.shape[1], b.shape[1])
    for x_block, a_block in zip(x.split(BLOCK), a.split(BLOCK), strict=True):
        total += a_block.T @ ((x_block @ y.T / x.shape[1] + 1) ** 3 @ b)
    return total


def _diagonal(x: Tensor) -> Tensor:
    """k(x, x), (n,)."""
    return (x.square().sum(1) / x.shape[1] + 1) ** 3
