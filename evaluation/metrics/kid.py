"""Kernel distance (KID): an unbiased estimate, summed in float64, of the squared maximum mean discrepancy.

The kernel is k(x, y) = (x.y / D + 1)^3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pixlat.evaluation.features.extractor import exact_float32
from pixlat.evaluation.metrics.jackknife import jackknife
from pixlat.evaluation.protocols.identity import (
    JACKKNIFE_GROUPS,
    KID_COMPLETE_LIMIT,
    KID_SEED,
    KID_SUBSET_SIZE,
    KID_SUBSETS,
)

BLOCK = 2048  # rows and columns of a kernel matrix in memory at once


@dataclass(frozen=True)
class KernelDistance:
    value: float
    # The error over draws of generated images, by the jackknife over groups. If subsets are used, it includes the error
    # that their choice causes.
    se: float
    left_out: tuple[float, ...] = ()  # the values with one group left out; empty if subsets are used


def kernel_distance(generated: Tensor, reference: Tensor, weights: Tensor | None = None) -> KernelDistance:
    """KID of features (n, D) and (m, D) on one device; the reference's weights (m,) default to 1.

    Up to KID_COMPLETE_LIMIT images on each side, the value uses every pair. For more images it is the mean over subsets
    drawn with a fixed seed, as in published protocols. The spread of these subsets only shows how well they represent
    all pairs, and not how much other generated images would change the value. The error therefore combines the
    jackknife of the statistic of all pairs with the error of the choice of subsets.
    """
    w = (
        torch.ones(len(reference), dtype=torch.float64, device=reference.device)
        if weights is None
        else weights.double()
    )
    groups = min(JACKKNIFE_GROUPS, len(generated) // 2)
    if max(len(generated), len(reference)) <= KID_COMPLETE_LIMIT:
        value, left_out = complete(generated.double(), reference.double(), w, groups)
        return KernelDistance(value, jackknife(value, left_out).se, tuple(left_out))
    value, choice = of_subsets(generated, reference, w)
    with exact_float32():
        every_pair, left_out = complete(generated.float(), reference.float(), w, groups)
    return KernelDistance(value, math.hypot(jackknife(every_pair, left_out).se, choice))


def of_subsets(generated: Tensor, reference: Tensor, w: Tensor) -> tuple[float, float]:
    """(the mean over KID_SUBSETS subsets of both sides, the standard error that the choice of subsets causes)."""
    x, y = generated.double(), reference.double()
    rng = np.random.Generator(np.random.PCG64(KID_SEED))
    size = min(KID_SUBSET_SIZE, len(x), len(y))
    values = []
    for _ in range(KID_SUBSETS):
        some_x, some_y = (
            torch.from_numpy(rng.choice(len(side), size, replace=False)).to(side.device) for side in (x, y)
        )
        values.append(complete(x[some_x], y[some_y], w[some_y], groups=1)[0])
    return float(np.mean(values)), float(np.std(values, ddof=1)) / KID_SUBSETS**0.5


def complete(x: Tensor, y: Tensor, w: Tensor, groups: int) -> tuple[float, list[float]]:
    """The U-statistic mean k(x, x') + mean k(y, y') - 2 mean k(x, y) over all pairs of different images.

    w weights y. The second result has its values with each group (position mod `groups`) of x left out; it is empty for
    a single group. Products have the precision of the features, sums have float64.
    """
    group = torch.arange(len(x), device=x.device) % groups
    return KernelReference(y, w).statistic(x, torch.ones_like(x[:, 0], dtype=torch.float64), group, plugin=False)


@dataclass(frozen=True)
class KernelReference:
    """Features (m, D) and weights (m,) float64 of real images, with which many sets are compared.

    The sum over all their pairs is computed once.
    """

    features: Tensor
    weights: Tensor

    @cached_property
    def _pairs(self) -> Tensor:
        w = self.weights[:, None]
        return _pair_sums(self.features, self.features, w, w)

    def _own(self, plugin: bool) -> Tensor:
        """The weighted mean of k(y, y') over all pairs; without plugin over pairs of different images."""
        w = self.weights
        if plugin:
            return self._pairs / w.sum().square()
        return (self._pairs - w.square() @ _diagonal(self.features)) / (w.sum().square() - w.square().sum())

    def statistic(self, x: Tensor, v: Tensor, group: Tensor, plugin: bool) -> tuple[float, list[float]]:
        """The squared maximum mean discrepancy of features x (n, D) with weights v (n,) float64.

        plugin=False: the U-statistic, which is unbiased and may be negative. plugin=True: the V-statistic, which also
        counts the pairs of an image with itself: it is the squared distance of two mean embeddings, hence positive,
        and its bias depends on the numbers of images. group: (n,) int64 from 0. The second result has the values with
        each group of x left out; it is empty for a single group.
        """
        member = F.one_hot(group).double() * v[:, None]  # (n, K)
        groups = member.shape[1]
        own = member.square().T @ _diagonal(x)
        xx = _pair_sums(x, x, member, member) - (0 if plugin else torch.diag(own))  # (K, K)
        xy = _pair_sums(x, self.features, member, self.weights[:, None] / self.weights.sum())[:, 0]  # (K,)
        yy, total, squares = self._own(plugin), member.sum(0), member.square().sum(0)

        def value_of(sum_v: Tensor, sum_v2: Tensor, pairs: Tensor, cross: Tensor) -> float:
            return float(pairs / (sum_v.square() - (0 if plugin else sum_v2)) + yy - 2 * cross / sum_v)

        value = value_of(total.sum(), squares.sum(), xx.sum(), xy.sum())
        if groups == 1:
            return value, []
        without = xx.sum() - 2 * xx.sum(1) + xx.diagonal()
        left_out = [
            value_of(total.sum() - total[g], squares.sum() - squares[g], without[g], xy.sum() - xy[g])
            for g in range(groups)
        ]
        return value, left_out


def _pair_sums(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A^T k(x, y) B in float64 for columns of weights A (n, K) and B (m, L), computed block by block.

    If x is y (then A must be B), it computes only half of the blocks, because the matrix is symmetric.
    """
    total = a.new_zeros(a.shape[1], b.shape[1])
    for row in range(0, len(x), BLOCK):
        for column in range(row if x is y else 0, len(y), BLOCK):
            rows, columns = slice(row, row + BLOCK), slice(column, column + BLOCK)
            kernel = (x[rows] @ y[columns].T / x.shape[1] + 1) ** 3
            part = a[rows].T @ (kernel.double() @ b[columns])
            total += part if x is not y or row == column else part + part.T
    return total


def _diagonal(x: Tensor) -> Tensor:
    """k(x, x), (n,) float64."""
    return ((x.square().sum(1) / x.shape[1] + 1) ** 3).double()
