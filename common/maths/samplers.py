"""Solvers of dz/dt = v(z, t) over a grid of times given as Python floats: no host sync,
and no notion of direction, method or guidance.

The stochastic ones draw from `Noise`, one generator an image, in the order of the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from pixlat.common.seeds import Noise

Velocity = Callable[[Tensor, float], Tensor]


def euler(velocity: Velocity, z: Tensor, times: Sequence[float]) -> Tensor:
    """First order: len(times) - 1 evaluations."""
    for t, t_next in pairwise(times):
        z = z + (t_next - t) * velocity(z, t)
    return z


def heun(velocity: Velocity, z: Tensor, times: Sequence[float], last_euler: bool = True) -> Tensor:
    """Second order (trapezoid with an Euler predictor): two evaluations a step.

    last_euler: the last step is a plain Euler step, so that the velocity is never asked for at times[-1],
    where it may be singular.
    """
    second_order = times[:-1] if last_euler else times
    for t, t_next in pairwise(second_order):
        v = velocity(z, t)
        z_euler = z + (t_next - t) * v
        z = z + (t_next - t) / 2 * (v + velocity(z_euler, t_next))
    return euler(velocity, z, times[-2:]) if last_euler else z


def solver_evaluations(solver: str, steps: int) -> int:
    """Evaluations of the velocity that `steps` steps take: two a step for "heun", whose last step is Euler's,
    and one for any other solver.
    """
    return 2 * steps - 1 if solver == "heun" else steps


def euler_maruyama(
    drift: Velocity, variance_rate: Callable[[float], float], z: Tensor, times: Sequence[float], noise: Noise
) -> Tensor:
    """dz = drift(z, t) dt + sqrt(variance_rate(t) |dt|) N(0, 1), for z (B, ...): len(times) - 1 evaluations.

    The last step adds no noise: nothing after it would take it away.
    """
    last = len(times) - 2
    for step, (t, t_next) in enumerate(pairwise(times)):
        move = (t_next - t) * drift(z, t)
        if step < last:
            move = move + math.sqrt(variance_rate(t) * abs(t_next - t)) * noise.normal(*z.shape[1:]).to(z.dtype)
        z = z + move
    return z


def ancestral(posterior: Callable[[Tensor, int], tuple[Tensor, Tensor]], z: Tensor, steps: int, noise: Noise) -> Tensor:
    """Draws z from N(mean, std^2) = posterior(z, i) for i = steps - 1, ..., 0, for z (B, ...);
    the last one is the mean itself.
    """
    for i in reversed(range(steps)):
        mean, std = posterior(z, i)
        z = mean + std * noise.normal(*z.shape[1:]).to(z.dtype) if i else mean
    return z
