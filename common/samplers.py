"""Solvers of dz/dt = v(z, t) over a grid of times given as Python floats: no host sync, and no notion of direction, method or guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]


def euler(velocity: Velocity, z: Tensor, times: Sequence[float]) -> Tensor:
    """First order: len(times) - 1 evaluations."""
    for t, t_next in pairwise(times):
        z = z + (t_next - t) * velocity(z, t)
    return z


def heun(velocity: Velocity, z: Tensor, times: Sequence[float], last_euler: bool = True) -> Tensor:
    """Second order (trapezoid with an Euler predictor): two evaluations a step.

    last_euler: the last step is a plain Euler step, so that the velocity is never asked for at times[-1], where it may be singular.
    """
    second_order = times[:-1] if last_euler else times
    for t, t_next in pairwise(second_order):
        v = velocity(z, t)
        z_euler = z + (t_next - t) * v
        z = z + (t_next - t) / 2 * (v + velocity(z_euler, t_next))
    return euler(velocity, z, times[-2:]) if last_euler else z
