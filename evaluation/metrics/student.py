"""Student's t distribution, for intervals of means over few values. Imports neither torch nor SciPy, which are slow.

The distribution function for n degrees of freedom is a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4).
"""

from __future__ import annotations

import math
from functools import cache

CONFIDENCE = 0.95  # of every interval of this package
NORMAL_QUANTILE = 1.959964  # the limit for many degrees of freedom


def central_probability(t: float, df: int) -> float:
    """The probability that |T| is at most t >= 0 for `df` >= 1 degrees of freedom."""
    angle = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    if df % 2 == 0:
        term, total = 1.0, 1.0
        for k in range(1, df // 2):
            term *= (2 * k - 1) / (2 * k) * cosine**2
            total += term
        return sine * total
    term, total = cosine, cosine if df > 1 else 0.0
    for k in range(1, (df - 1) // 2):
        term *= 2 * k / (2 * k + 1) * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total)


@cache
def t_quantile(df: int) -> float:
    """Half the width of the 95 % interval in standard errors: 12.71 for one degree of freedom, 2.09 for 19.

    Raises ValueError for fewer than one degree of freedom.
    """
    if df < 1:
        raise ValueError(f"{df} degrees of freedom: an interval needs at least two values")
    low, high = 0.0, 13.0  # one degree of freedom has the largest quantile, 12.71
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if central_probability(middle, df) < CONFIDENCE else (low, middle)
    return (low + high) / 2
