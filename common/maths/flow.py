"""The mathematics of linear-path diffusion, in one convention: t = 1 is noise, t = 0 is data.

    z = (1 - t) x + t n,    v = dz/dt = n - x

A network may predict the data ("x"), the noise ("eps") or the velocity ("v"),
and its error may be measured in any of the three.
Times are a tensor (B,) or one Python float. `clip` is the floor of every denominator, t or 1 - t.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPACES = ("x", "eps", "v")

Time = Tensor | float


def match_dims(t: Time, like: Tensor) -> Time:
    """A time (B,) with trailing axes of length one, so that it multiplies `like` (B, ...); a float as it is."""
    return t.view(-1, *[1] * (like.ndim - 1)) if isinstance(t, Tensor) else t


def floor_at(t: Time, clip: float) -> Time:
    """max(t, clip)."""
    return t.clamp(min=clip) if isinstance(t, Tensor) else max(t, clip)


def interpolate(x: Tensor, n: Tensor, t: Time) -> Tensor:
    """z = (1 - t) x + t n."""
    t = match_dims(t, x)
    return (1 - t) * x + t * n


def logit_normal(mean: float, std: float, *shape: int, device: torch.device | str | None = None) -> Tensor:
    """sigmoid(N(mean, std^2)), one draw from torch's global generator.

    A method that counts time the other way negates the mean.
    """
    return torch.sigmoid(torch.randn(*shape, device=device) * std + mean)


def target(space: str, x: Tensor, n: Tensor) -> Tensor:
    """What a network that predicts `space` should return: x, n or n - x."""
    return {"x": lambda: x, "eps": lambda: n, "v": lambda: n - x}[space]()


def to_data(output: Tensor, space: str, z: Tensor, t: Time, clip: float) -> Tensor:
    """The data x that a prediction in `space` stands for."""
    t = match_dims(t, z)
    if space == "x":
        return output
    return (z - t * output) / floor_at(1 - t, clip) if space == "eps" else z - t * output


def to_noise(output: Tensor, space: str, z: Tensor, t: Time, clip: float) -> Tensor:
    """The noise n that a prediction in `space` stands for."""
    t = match_dims(t, z)
    if space == "eps":
        return output
    return (z - (1 - t) * output) / floor_at(t, clip) if space == "x" else z + (1 - t) * output


def to_velocity(output: Tensor, space: str, z: Tensor, t: Time, clip: float) -> Tensor:
    """The velocity v that a prediction in `space` stands for."""
    t = match_dims(t, z)
    if space == "v":
        return output
    return (z - output) / floor_at(t, clip) if space == "x" else (output - z) / floor_at(1 - t, clip)


def error_gain(prediction: str, measured: str, t: Time, clip: float) -> Time:
    """How much an error of the prediction counts in the space where it is measured.

    At a given z the three spaces are affine in one another, so converting prediction and target alike (same z,
    same clip) leaves gain * (output - target): the nine prediction x loss combinations are nine gains,
    and a perfect prediction has no loss in any.
    """
    if prediction == measured:
        return 1.0
    numerator = {"x": t, "eps": 1 - t, "v": 1.0}[measured]
    denominator = {"x": floor_at(t, clip), "eps": floor_at(1 - t, clip), "v": 1.0}[prediction]
    return numerator / denominator
