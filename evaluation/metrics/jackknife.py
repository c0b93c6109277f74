"""The grouped jackknife: the bias and the error of a statistic, from its values with one group of images left out.

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Estimate:
    """A value with its bias-corrected value and its error, both by the grouped jackknife."""

    value: float
    value_bc: float  # bias-corrected
    se: float  # jackknife standard error
    left_out: tuple[float, ...] = ()  # the values with one group left out, for paired differences


def jackknife(value: float, left_out: Sequence[float]) -> Estimate:
    """The jackknife estimate from the statistic of all images and its values with one of K groups left out.

    bias-corrected = K theta - (K-1) mean theta_(-g);  SE^2 = (K-1)/K sum (theta_(-g) - mean)^2.

    If the distance is as small as its bias, the SE is about 30 % too small. Claims therefore need several sampling
    seeds.
    """
    k, mean = len(left_out), fmean(left_out)
    variance = math.fsum((each - mean) ** 2 for each in left_out) * (k - 1) / k
    return Estimate(value, k * value - (k - 1) * mean, math.sqrt(variance), tuple(left_out))
