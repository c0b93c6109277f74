"""The mathematics of adversarial training: hinge losses, the adaptive weight, and differentiable augmentation."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pixlat.common.maths.float32 import at_least_float32

SHIFT = 0.125  # largest translation, in image sides

GRADIENT_FLOOR = 1e-6  # added to the adversarial gradient's norm
MAX_WEIGHT = 1e4


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """(mean relu(1 - real) + mean relu(1 + fake)) / 2 for logits of any shape, in float32 at least:
    autocast's bf16 would round the mean.
    """
    return 0.5 * (F.relu(1 - at_least_float32(real)).mean() + F.relu(1 + at_least_float32(fake)).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """-mean(fake), in float32 at least."""
    return -at_least_float32(fake).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """||d reconstruction / dW|| / (||d adversarial / dW|| + 1e-6), at most 1e4 and without a gradient,
    for the weight W of the last layer.

    It makes both losses pull equally hard on the last layer (VQGAN, equation 7).
    Both graphs are kept for the backward pass.
    """
    (wanted,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (found,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (wanted.norm() / (found.norm() + GRADIENT_FLOOR)).clamp(0, MAX_WEIGHT).detach()


def quantise(images: Tensor) -> Tensor:
    """Images in [-1, 1] clamped and rounded to the 256 levels of real images,
    so that rounding does not give fakes away. No gradient passes.
    """
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


class Augmentation(NamedTuple):
    """One draw of DiffAug's translation and colour for each image."""

    shift: Tensor  # (B, 2) int64, pixels down and to the right
    brightness: Tensor  # (B,) in [0, 1), as are the next two
    saturation: Tensor
    contrast: Tensor


def draw_augmentation(count: int, size: int, device: torch.device | str) -> Augmentation:
    """Draws from torch's global generator, for `count` images of `size` pixels:
    translations up to an eighth of the side.
    """
    reach = round(size * SHIFT)  # half to even, as the released code rounds: 2 pixels and not 3 for a side of 20
    shift = torch.randint(-reach, reach + 1, (count, 2), device=device)
    return Augmentation(shift, *torch.rand(3, count, device=device).unbind())


def augment(images: Tensor, draws: Augmentation) -> Tensor:
    """DiffAug (arXiv 2006.10738) in float32 for (B, C, H, W) in [-1, 1]: translation with zeros behind it,
    brightness, saturation, contrast.
    """
    u_brightness, u_saturation, u_contrast = (u.view(-1, 1, 1, 1) for u in draws[1:])
    x = translate(images.float(), draws.shift)
    x = x + (u_brightness - 0.5)
    grey = x.mean(dim=1, keepdim=True)
    x = (x - grey) * (2 * u_saturation) + grey
    level = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - level) * (u_contrast + 0.5) + level


def translate(images: Tensor, shift: Tensor) -> Tensor:
    """Moves each image by its own (down, right) pixels; what comes in from outside is zero."""
    batch, _, height, width = images.shape
    rows = torch.arange(height, device=images.device) - shift[:, :1]  # (B, H): where each output row comes from
    columns = torch.arange(width, device=images.device) - shift[:, 1:]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    index = torch.arange(batch, device=images.device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[
        index, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]
    ]
    return (moved * inside[..., None]).permute(0, 3, 1, 2)
