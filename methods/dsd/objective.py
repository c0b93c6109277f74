"""The terms of the loss as functions of latents, and where gradients stop (arXiv 2511.14716; see README.md).

As everywhere in `common/`, t = 1 is noise: z_t = (1 - t) z + t n, v = n - z. Shapes: z, n (B, N, C), t (B,).
z1 is the online encoder's latent, whose noisy version the network denoises. z2 is the target encoder's latent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pixlat.common.maths import flow
from pixlat.common.maths.adversarial import Augmentation
from pixlat.methods.dsd.config import DsdConfig

SPACES = {"z": "x", "v": "v"}  # from values of config.predict to the names in common/maths/flow.py


class Draws(NamedTuple):
    """The random draws of a training step."""

    hidden: Tensor | None  # (B, N) bool, patches that the online encoder does not see
    labels: Tensor  # (B,) after some are replaced by "no class"
    t: Tensor  # (B,)
    noise: Tensor  # (B, N, C)
    tau: Tensor  # (B,), the share of noise in the decoder's input
    decode_noise: Tensor  # (B, N, C)
    augmentation: Augmentation | None  # of the discriminator's input


def draw_hidden(ratio: tuple[float, float], batch: int, tokens: int, device: torch.device) -> Tensor:
    """(B, N) bool: the patches to hide. Each image draws its hidden share uniformly from `ratio`; a negative share
    hides none.
    """
    low, high = ratio
    share = low + (high - low) * torch.rand(batch, 1, device=device)
    rank = torch.rand(batch, tokens, device=device).argsort(dim=1).argsort(dim=1)
    return rank < (share * tokens).round()


def noised(config: DsdConfig, z1: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t. Through it gradients of the diffusion loss reach the encoder, unless `input_grad` is off."""
    return flow.interpolate(z1 if config.input_grad else z1.detach(), noise, t)


def diffusion_loss(config: DsdConfig, output: Tensor, z2: Tensor, noise: Tensor) -> Tensor:
    """mean || output - z2 ||^2 for `predict=z`, mean || output - (n - z2) ||^2 for `predict=v`, equal at all times.

    The loss compares the output without a conversion. If it converted a predicted z into a v through a live z_t, the
    value would be the same but not the gradient: a share 1 - t of the target would again be z1, which the encoder
    would then shrink (tests/test_dsd.py).
    """
    z2 = z2.detach() if config.target == "stopgrad" else z2
    return (output - flow.target(SPACES[config.predict], z2, noise)).square().mean()


def velocity_loss(velocity: Tensor, z2: Tensor, noise: Tensor) -> Tensor:
    """mean || velocity - (n - z2) ||^2; the target never has a gradient."""
    return (velocity - flow.target("v", z2, noise).detach()).square().mean()


def decoder_input(config: DsdConfig, z1: Tensor, tau: Tensor, noise: Tensor) -> Tensor:
    """The decoder's noisy input: (1 - tau) z1 + tau noise_scale n."""
    return flow.interpolate(z1, config.noise_scale * noise, tau)


def disagreement(predicted: Tensor, target: Tensor) -> Tensor:
    """-mean cos over tokens (..., D), in float32; the target has no gradient."""
    return -F.cosine_similarity(predicted.float(), target.detach().float(), dim=-1, eps=1e-6).mean()
