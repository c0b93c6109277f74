"""What pMF draws for a training step, and the formulas of its loss:
sections 3 and 4 of arXiv 2601.22158 and its released code.

Nothing here calls a network. Times, scales and flags are (B,), images (B, C, S, S); t = 1 is noise and 0 <= r <= t.
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
# the perceptual networks meet so many batch sizes at most:
# each may cost a compilation and a search for the fastest kernels
COMPARED_SIZES = 8


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
    compared: Tensor | None = None  # (K,) positions of the samples that the perceptual networks see; none: all


def draw(config: PMFConfig, images: Tensor) -> Draws:
    """From torch's global generators. Which samples match flows and which lose their label is a matter of position.

    Times come from the CPU's generator, everything else from the images' device.
    So the host knows how many samples the perceptual networks must see, without waiting for a GPU.
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
        # The released rule: a random number of samples, but always the first ones,
        # so what loses its label matches flows.
        dropped=position < (torch.rand(count, device=device) < config.label_drop).sum(),
        flow_matching=flow_matching,
        crops=None if config.perceptual == "none" else draw_crops(count, images.shape[-1], device),
        compared=None if compared is None else compared.to(device, non_blocking=True),
    )


def compared_samples(config: PMFConfig, t: Tensor) -> Tensor | None:
    """Positions of the samples that the perceptual networks see, in order; None where they see all of them.

    t: (B,), on the CPU. These are all samples below `perceptual_max_t` and the earliest ones above it, up to a multiple
    of an eighth of the micro-batch. A fixed number for all steps would have to be the whole micro-batch,
    because any number of samples may lie below the threshold.
    """
    number = number_compared(config, t)
    return None if number == len(t) else t.argsort(stable=True)[:number].sort().values


def number_compared(config: PMFConfig, t: Tensor) -> int:
    """How many samples the perceptual networks see at times t (B,). Without data it is what costs are counted with.

    That is the mean number on the meta device, where training's MACs are counted, and all samples among fake tensors,
    where its peak memory is.
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
    """The probability of a time below the threshold under `draw_times`: with F of one draw,
    F for flow matching and F^2 for the larger of two.
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
    """(t, r, number of flow-matching samples).

    The published sampler covers the half-plane r <= t; the others are the paper's Table 3b.
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
    """c_skip z + c_out output.

    EDM's and TrigFlow's coefficients at sigma = t / (1 - t), multiplied out so that t = 1 is regular.
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
    """(B,) sums over all pixels."""
    return (a - b).square().flatten(1).sum(1)


def adaptive(error: Tensor, config: PMFConfig) -> Tensor:
    """error / stopgrad((error + eps)^power): each sample's term is about 1,
    and its gradient does not depend on the error's scale.
    """
    return error / (error.detach() + config.norm_eps) ** config.norm_power
