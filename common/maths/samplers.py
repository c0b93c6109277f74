"""Solvers of dz/dt = v(z, t) over a grid of times.

Times are Python floats, so no solver waits for the GPU. Solvers know nothing of the direction of time, the method or
its guidance. The stochastic solvers draw from `Noise` (one generator per image) in the order of the steps.
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

    last_euler: make the last step an Euler step, so that the velocity is never evaluated at times[-1],
    where it may be singular.
    """
    second_order = times[:-1] if last_euler else times
    for t, t_next in pairwise(second_order):
        v = velocity(z, t)
        z_euler = z + (t_next - t) * v
        z = z + (t_next - t) / 2 * (v + velocity(z_euler, t_next))
    return euler(velocity, z, times[-2:]) if last_euler else z


def solver_evaluations(solver: str, steps: int) -> int:
    """Evaluations of the velocity in `steps` steps: one per step, but two per step for "heun" except in its last.

    The last step of "heun" is an Euler step.
    """
    return 2 * steps - 1 if solver == "heun" else steps


def euler_maruyama(
    drift: Velocity, variance_rate: Callable[[float], float], z: Tensor, times: Sequence[float], noise: Noise
) -> Tensor:
    """dz = drift(z, t) dt + sqrt(variance_rate(t) |dt|) N(0, 1), for z (B, ...): len(times) - 1 evaluations.

    The last step adds no noise, because no later step would remove it.
    """
    last = len(times) - 2
    for step, (t, t_next) in enumerate(pairwise(times)):
        move = (t_next - t) * drift(z, t)
        if step < last:
            move = move + math.sqrt(variance_rate(t) * abs(t_next - t)) * noise.normal(*z.shape[1:]).to(z.dtype)
        z = z + move
    return z


def ancestral(posterior: Callable[[Tensor, int], tuple[Tensor, Tensor]], z: Tensor, steps: int, noise: Noise) -> Tensor:
    """Draws z (B, ...) from N(mean, std^2) with (mean, std) = posterior(z, i) for i = steps - 1, ..., 0.

    The last step returns the mean without noise.
    """
    for i in reversed(range(steps)):
        mean, std = posterior(z, i)
        z = mean + std * noise.normal(*z.shape[1:]).to(z.dtype) if i else mean
    return z
