"""The mathematics of linear-path diffusion. Everywhere t = 1 is noise and t = 0 is data.

    z = (1 - t) x + t n,    v = dz/dt = n - x

A network may predict the data ("x"), the noise ("eps") or the velocity ("v"), and the loss may measure its error
in any of these three spaces. Times are a tensor (B,) or a Python float. `clip` is the smallest value of every
denominator (t or 1 - t).
"""

from __future__ import annotations

import torch
from torch import Tensor

SPACES = ("x", "eps", "v")

Time = Tensor | float


def match_dims(t: Time, like: Tensor) -> Time:
    """Adds trailing axes of length one to times (B,), so that they multiply `like` (B, ...); floats pass unchanged."""
    return t.view(-1, *[1] * (like.ndim - 1)) if isinstance(t, Tensor) else t


def floor_at(t: Time, clip: float) -> Time:
    """max(t, clip)."""
    return t.clamp(min=clip) if isinstance(t, Tensor) else max(t, clip)


def interpolate(x: Tensor, n: Tensor, t: Time) -> Tensor:
    """z = (1 - t) x + t n."""
    t = match_dims(t, x)
    return (1 - t) * x + t * n


def logit_normal(mean: float, std: float, *shape: int, device: torch.device | str | None = None) -> Tensor:
    """Draws sigmoid(N(mean, std^2)) from torch's global generator.

    For a paper whose time runs the other way (1 = data), negate the mean.
    """
    return torch.sigmoid(torch.randn(*shape, device=device) * std + mean)


def target(space: str, x: Tensor, n: Tensor) -> Tensor:
    """What a network that predicts `space` should return: x, n or n - x."""
    return {"x": lambda: x, "eps": lambda: n, "v": lambda: n - x}[space]()


def to_data(output: Tensor, space: str, z: Tensor, t: Time, clip: float) -> Tensor:
    """Converts a prediction in `space` to the data x."""
    t = match_dims(t, z)
    if space == "x":
        return output
    return (z - t * output) / floor_at(1 - t, clip) if space == "eps" else z - t * output


def to_noise(output: Tensor, space: str, z: Tensor, t: Time, clip: float) -> Tensor:
    """Converts a prediction in `space` to the noise n."""
    t = match_dims(t, z)
    if space == "eps":
        return output
    return (z - (1 - t) * output) / floor_at(t, clip) if space == "x" else z + (1 - t) * output


def to_velocity(output: Tensor, space: str, z: Tensor, t: Time, clip: float) -> Tensor:
    """Converts a prediction in `space` to the velocity v."""
    t = match_dims(t, z)
    if space == "v":
        return output
    return (z - output) / floor_at(t, clip) if space == "x" else (output - z) / floor_at(1 - t, clip)


def error_gain(prediction: str, measured: str, t: Time, clip: float) -> Time:
    """The factor by which an error of the prediction grows when it is measured in another space.

    At a given z each space is an affine function of the others. So if prediction and target are converted with the
    same z and clip, the error becomes gain * (output - target). The nine combinations of prediction and loss space
    are nine gains, and a perfect prediction has loss 0 in all of them.
    """
    if prediction == measured:
        return 1.0
    numerator = {"x": t, "eps": 1 - t, "v": 1.0}[measured]
    denominator = {"x": floor_at(t, clip), "eps": floor_at(1 - t, clip), "v": 1.0}[prediction]
    return numerator / denominator
