"""The interpolants between data and noise, and the drift of the SDE sampler (arXiv 2401.08740, sections 2 and 3).

    z = a(t) x + s(t) n,    v = dz/dt = a' x + s' n
    linear   a = 1 - t            s = t
    cosine   a = cos(pi t / 2)    s = sin(pi t / 2)

Data are at t = 0, noise is at t = 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pixlat.common.maths.flow import match_dims

HALF_PI = math.pi / 2


class Mix(NamedTuple):
    """The four coefficients a, s, a', s' at times (B,)."""

    data: Tensor
    noise: Tensor
    data_rate: Tensor
    noise_rate: Tensor

    def position(self, x: Tensor, n: Tensor) -> Tensor:
        """z = a x + s n for (B, ...) of any shape."""
        return match_dims(self.data, x) * x + match_dims(self.noise, n) * n

    def velocity(self, x: Tensor, n: Tensor) -> Tensor:
        """v = a' x + s' n."""
        return match_dims(self.data_rate, x) * x + match_dims(self.noise_rate, n) * n


def mix(path: str, t: Tensor) -> Mix:
    """The coefficients of a path at times (B,)."""
    if path == "linear":
        return Mix(1 - t, t, -torch.ones_like(t), torch.ones_like(t))
    angle = HALF_PI * t
    return Mix(angle.cos(), angle.sin(), -HALF_PI * angle.sin(), HALF_PI * angle.cos())


def draw_times(path: str, distribution: str, count: int, device: torch.device) -> Tensor:
    """(count,) times: uniform in [0, 1), or such that the ratio s / a of noise to data is standard log-normal."""
    if distribution == "uniform":
        return torch.rand(count, device=device)
    logarithm = torch.randn(count, device=device)
    return logarithm.sigmoid() if path == "linear" else logarithm.exp().atan() / HALF_PI


def drift(path: str, v: Tensor, z: Tensor, t: float, diffusion: float) -> Tensor:
    """v - w(t) score / 2 with w = diffusion * t, where the velocity v at z gives the score.

    The product w * score is expanded so that nothing is divided by t.
    linear: score = -((1 - t) v + z) / t;    cosine: score = -(2 / pi) cot(pi t / 2) v - z. t in (0, 1].
    """
    if path == "linear":
        return v + diffusion / 2 * ((1 - t) * v + z)
    return v + diffusion / 2 * t * (v / (HALF_PI * math.tan(HALF_PI * t)) + z)
