"""The mathematics of adversarial training: hinge losses, the adaptive weight, and differentiable augmentation."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pixlat.common.maths.float32 import at_least_float32

SHIFT = 0.125  # largest translation, as a share of the image side

GRADIENT_FLOOR = 1e-6  # added to the norm of the adversarial gradient
MAX_WEIGHT = 1e4


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """(mean relu(1 - real) + mean relu(1 + fake)) / 2 for logits of any shape.

    It computes in float32 or wider, because bf16 under autocast would round the mean.
    """
    return 0.5 * (F.relu(1 - at_least_float32(real)).mean() + F.relu(1 + at_least_float32(fake)).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """-mean(fake), in float32 or wider."""
    return -at_least_float32(fake).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """The weight of the adversarial loss: ||d reconstruction / dW|| / (||d adversarial / dW|| + 1e-6), at most 1e4.

    W is the weight of the last layer. With this factor both losses have gradients of the same norm there (VQGAN,
    equation 7). The result has no gradient. The function keeps both graphs for the backward pass.
    """
    (reconstruction_grad,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (adversarial_grad,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (reconstruction_grad.norm() / (adversarial_grad.norm() + GRADIENT_FLOOR)).clamp(0, MAX_WEIGHT).detach()


def quantise(images: Tensor) -> Tensor:
    """Clamps images to [-1, 1] and rounds them to the 256 levels of real images, without gradient.

    Otherwise a discriminator could recognise fakes because they are not rounded.
    """
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


class Augmentation(NamedTuple):
    """Random numbers for DiffAug's translation and colour changes, one set per image."""

    shift: Tensor  # (B, 2) int64, pixels down and to the right
    brightness: Tensor  # (B,) in [0, 1)
    saturation: Tensor  # (B,) in [0, 1)
    contrast: Tensor  # (B,) in [0, 1)


def draw_augmentation(count: int, size: int, device: torch.device | str) -> Augmentation:
    """Draws from torch's global generator for `count` images of `size` pixels; shifts are at most 1/8 of the side."""
    reach = round(size * SHIFT)  # rounds half to even like the released code: a side of 20 gives 2 pixels, not 3
    shift = torch.randint(-reach, reach + 1, (count, 2), device=device)
    return Augmentation(shift, *torch.rand(3, count, device=device).unbind())


def augment(images: Tensor, draws: Augmentation) -> Tensor:
    """Applies DiffAug (arXiv 2006.10738) in float32 to images (B, C, H, W) in [-1, 1].

    The order is translation (filled with zeros), brightness, saturation, contrast.
    """
    u_brightness, u_saturation, u_contrast = (u.view(-1, 1, 1, 1) for u in draws[1:])
    x = translate(images.float(), draws.shift)
    x = x + (u_brightness - 0.5)
    grey = x.mean(dim=1, keepdim=True)
    x = (x - grey) * (2 * u_saturation) + grey
    level = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - level) * (u_contrast + 0.5) + level


def translate(images: Tensor, shift: Tensor) -> Tensor:
    """Moves each image by its (down, right) shift in pixels and fills the uncovered area with zeros."""
    batch, _, height, width = images.shape
    rows = torch.arange(height, device=images.device) - shift[:, :1]  # (B, H): the source row of each output row
    columns = torch.arange(width, device=images.device) - shift[:, 1:]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    index = torch.arange(batch, device=images.device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[
        index, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]
    ]
    return (moved * inside[..., None]).permute(0, 3, 1, 2)
