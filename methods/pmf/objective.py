"""The random draws of a pMF training step and the formulas of its loss.

They follow sections 3 and 4 of arXiv 2601.22158 and its released code. No function here calls a network.
Times, scales and flags are (B,), images (B, C, S, S); t = 1 is noise and 0 <= r <= t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pixlat.common.maths.crops import CropBoxes, draw_crops
from pixlat.common.maths.flow import floor_at, logit_normal, match_dims
from pixlat.methods.pmf.config import PMFConfig

DATA_STD = {"edm": 0.5, "scm": 1.0}
# The perceptual networks run with at most this many different batch sizes, because each new size
# may cost a compilation and a search for the fastest kernels.
COMPARED_SIZES = 8


@dataclass(frozen=True)
class Draws:
    """All random numbers of a step. The first `flow_matching` samples have r = t and the guidance interval (0, 1)."""

    t: Tensor
    r: Tensor
    omega: Tensor  # guidance scale
    t_min: Tensor  # the guidance interval is [t_min, t_max]
    t_max: Tensor
    noise: Tensor  # (B, C, S, S), already multiplied by the noise scale
    dropped: Tensor  # bool: the sample is trained without its class
    flow_matching: int
    crops: CropBoxes | None = None  # for the perceptual terms
    compared: Tensor | None = None  # (K,) positions of the samples that the perceptual networks see; None: all


def draw(config: PMFConfig, images: Tensor) -> Draws:
    """Draws from torch's global generators.

    The position in the batch decides which samples are trained by flow matching and which lose their label.
    Times come from the CPU's generator, all other numbers from the generator of the images' device. So the CPU knows
    how many samples the perceptual networks must see, without waiting for a GPU.
    """
    count, device = len(images), images.device
    t_host, r_host, flow_matching = draw_times(config, count, "meta" if images.is_meta else "cpu")
    compared = None if config.perceptual == "none" else compared_samples(config, t_host)
    t, r = t_host.to(device, non_blocking=True), r_host.to(device, non_blocking=True)
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
        # The released rule: a random number of samples lose their label, but always the first ones.
        # So these are flow-matching samples as a rule.
        dropped=position < (torch.rand(count, device=device) < config.label_drop).sum(),
        flow_matching=flow_matching,
        crops=None if config.perceptual == "none" else draw_crops(count, images.shape[-1], device),
        compared=None if compared is None else compared.to(device, non_blocking=True),
    )


def compared_samples(config: PMFConfig, t: Tensor) -> Tensor | None:
    """Positions of the samples that the perceptual networks see, in ascending order; None if they see all of them.

    t: (B,), on the CPU. These are all samples with t below `perceptual_max_t`, filled up with the samples of the next
    larger t to a multiple of an eighth of the micro-batch. The same number for all steps would have to be the full
    micro-batch, because any number of samples may lie below the threshold.
    """
    number = number_compared(config, t)
    return None if number == len(t) else t.argsort(stable=True)[:number].sort().values


def number_compared(config: PMFConfig, t: Tensor) -> int:
    """How many samples the perceptual networks see at times t (B,).

    On the meta device, where the MACs of training are counted, it returns the mean number. For fake tensors, with
    which peak memory is measured, it returns the full batch.
    """
    count = len(t)
    step = max(1, count // COMPARED_SIZES)
    if isinstance(t, FakeTensor):
        return count
    if t.is_meta:
        return min(count, max(step, round(count * share_below(config, config.perceptual_max_t) + (step - 1) / 2)))
    below = int((t < config.perceptual_max_t).sum())
    return min(count, max(step, -(-below // step) * step))


def share_below(config: PMFConfig, threshold: float) -> float:
    """The probability that `draw_times` draws t below the threshold.

    If F is this probability for one draw, it is F for flow-matching samples and F^2 for the larger of two draws.
    """
    if not 0 < threshold < 1:
        return float(threshold >= 1)
    logit = math.log(threshold / (1 - threshold))
    normal = 0.5 * (1 + math.erf((logit - config.time_mean) / config.time_std / math.sqrt(2)))
    pairs = 1 - config.flow_share if config.time_sampler == "plane" else 0.0

    def of_law(one_draw: float) -> float:
        return (1 - pairs) * one_draw + pairs * one_draw**2

    return (1 - config.uniform_share) * of_law(normal) + config.uniform_share * of_law(threshold)


def draw_times(config: PMFConfig, count: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor, int]:
    """Returns (t, r, number of flow-matching samples).

    The published time sampler covers the half-plane r <= t; the other samplers are ablations of the paper's Table 3b.
    """
    pair = logit_normal(config.time_mean, config.time_std, 2, count, device=device)
    if config.uniform_share:
        uniform = torch.rand(count, device=device) < config.uniform_share
        pair = torch.where(uniform, torch.rand(2, count, device=device), pair)
    t, r = pair
    if config.time_sampler in ("zero", "edges"):
        r = torch.zeros_like(t)
    flow_matching = int(config.flow_matching_samples(count))
    first = torch.arange(count, device=device) < flow_matching
    r = torch.where(first, t, r)  # before the sort: their t is one draw, not the larger of two
    t, r = torch.maximum(t, r), torch.minimum(t, r)
    if config.zero_share:
        r = torch.where(first | (torch.rand(count, device=device) >= config.zero_share), r, 0.0)
    return t, r, flow_matching


def power_law(u: Tensor, highest: float, beta: float) -> Tensor:
    """Turns u, uniform in [0, 1), into scales in [1, highest] with density proportional to scale^-beta."""
    if beta == 1:
        return highest**u
    power = 1 - beta
    return (1 + u * (highest**power - 1)) ** (1 / power)


def effective_scale(draws: Draws) -> Tensor:
    """The guidance scale if t is inside the guidance interval, ends included; else 1."""
    inside = (draws.t_min <= draws.t) & (draws.t <= draws.t_max)
    return torch.where(inside, draws.omega, 1.0)


def velocity_of_data(x: Tensor, z: Tensor, t: Tensor, clip: float) -> Tensor:
    """(z - x) / max(t, clip). If x is the true image and t >= clip, this is noise - x."""
    return (z - x) / match_dims(floor_at(t, clip), z)


def to_velocity(config: PMFConfig, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """Converts a network's output to the velocity."""
    return output if config.prediction == "u" else velocity_of_data(to_data(config, output, z, t), z, t, config.clip)


def to_data(config: PMFConfig, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """Converts a network's output to the data: c_skip z + c_out output.

    "edm" and "scm" use EDM's and TrigFlow's coefficients at sigma = t / (1 - t), rewritten without a division by 0
    at t = 1.
    """
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
    """The squared error of each sample, summed over all pixels: (B,)."""
    return (a - b).square().flatten(1).sum(1)


def adaptive(error: Tensor, config: PMFConfig) -> Tensor:
    """error / stopgrad((error + eps)^power).

    With power = 1 the term of each sample is about 1, and its gradient does not depend on the scale of the error.
    """
    return error / (error.detach() + config.norm_eps) ** config.norm_power
