"""What pMF draws for a training step, and the formulas of its loss: sections 3 and 4 of arXiv 2601.22158 and its released code.

Nothing here calls a network. Times, scales and flags are (B,), images (B, C, S, S); t = 1 is noise and 0 <= r <= t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.flow import floor_at, logit_normal, match_dims
from common.perceptual import CropBoxes, draw_crops
from methods.pmf.config import PMFConfig

DATA_STD = {"edm": 0.5, "scm": 1.0}


@dataclass(frozen=True)
class Draws:
    """All that is random in a step. The first `flow_matching` samples have r = t and the interval (0, 1)."""

    t: Tensor
    r: Tensor
    omega: Tensor  # guidance scale
    t_min: Tensor  # guidance interval
    t_max: Tensor
    noise: Tensor  # (B, C, S, S), the noise scale included
    dropped: Tensor  # bool: trained without the class
    flow_matching: int
    crops: CropBoxes | None = None  # for the perceptual terms


def draw(config: PMFConfig, images: Tensor) -> Draws:
    """From torch's global generator, on the images' device. Which samples match flows and which lose their label is a matter of position."""
    count, device = len(images), images.device
    t, r, flow_matching = draw_times(config, count, device)
    position = torch.arange(count, device=device)
    first = position < flow_matching
    low, high = 0.5 * torch.rand(2, count, device=device)
    return Draws(
        t=t,
        r=r,
        omega=power_law(torch.rand(count, device=device), config.guidance_max, config.guidance_beta),
        t_min=low.masked_fill(first, 0.0),
        t_max=(0.5 + high).masked_fill(first, 1.0),
        noise=config.noise_scale * torch.randn_like(images),
        # The released rule: a random number of samples, but always the first ones, so what loses its label matches flows.
        dropped=position < (torch.rand(count, device=device) < config.label_drop).sum(),
        flow_matching=flow_matching,
        crops=None if config.perceptual == "none" else draw_crops(count, images.shape[-1], device),
    )


def draw_times(config: PMFConfig, count: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor, int]:
    """(t, r, number of flow-matching samples). The published sampler covers the half-plane r <= t; the others are the paper's Table 3b."""
    pair = logit_normal(config.time_mean, config.time_std, 2, count, device=device)
    if config.uniform_share:
        uniform = torch.rand(count, device=device) < config.uniform_share
        pair = torch.where(uniform, torch.rand(2, count, device=device), pair)
    t, r = pair
    if config.time_sampler in ("zero", "edges"):
        r = torch.zeros_like(t)
    share = {"plane": config.flow_share, "diagonal": 1.0, "zero": 0.0, "edges": config.flow_share}[config.time_sampler]
    flow_matching = int(count * share)
    first = torch.arange(count, device=device) < flow_matching
    r = torch.where(first, t, r)  # before the sort: their t is one draw, not the larger of two
    t, r = torch.maximum(t, r), torch.minimum(t, r)
    if config.zero_share:
        r = torch.where(first | (torch.rand(count, device=device) >= config.zero_share), r, 0.0)
    return t, r, flow_matching


def power_law(u: Tensor, highest: float, beta: float) -> Tensor:
    """Scales in [1, highest] with density proportional to scale^-beta, from uniforms u."""
    if beta == 1:
        return highest**u
    power = 1 - beta
    return (1 + u * (highest**power - 1)) ** (1 / power)


def effective_scale(draws: Draws) -> Tensor:
    """The guidance scale where t is inside the interval, ends included, else 1."""
    inside = (draws.t_min <= draws.t) & (draws.t <= draws.t_max)
    return torch.where(inside, draws.omega, 1.0)


def velocity_of_data(x: Tensor, z: Tensor, t: Tensor, clip: float) -> Tensor:
    """(z - x) / max(t, clip). Of the true image this is noise - x, but for t below the clip."""
    return (z - x) / match_dims(floor_at(t, clip), z)


def to_velocity(config: PMFConfig, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """The velocity that a network's output stands for."""
    return output if config.prediction == "u" else velocity_of_data(to_data(config, output, z, t), z, t, config.clip)


def to_data(config: PMFConfig, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """c_skip z + c_out output. EDM's and TrigFlow's coefficients at sigma = t / (1 - t), multiplied out so that t = 1 is regular."""
    if config.preconditioner == "none":
        return output
    noise, data = match_dims(t, z), match_dims(1 - t, z)
    if config.preconditioner == "linear":
        return data * z + noise * output
    std = DATA_STD[config.preconditioner]
    variance = (data * std) ** 2 + noise**2
    sign = -1 if config.preconditioner == "scm" else 1
    return data * std**2 / variance * z + sign * noise * std / variance**0.5 * output


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """(B,) sums over all pixels."""
    return (a - b).square().flatten(1).sum(1)


def adaptive(error: Tensor, config: PMFConfig) -> Tensor:
    """error / stopgrad((error + eps)^power): each sample's term is about 1, and its gradient does not depend on the error's scale."""
    return error / (error.detach() + config.norm_eps) ** config.norm_power
