"""What adversarial losses share: differentiable augmentation, hinge losses, the adaptive weight and discriminators.

Shape legend: B batch, C channels, H x W pixels, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from common.blocks import at_least_float32

SHIFT = 0.125  # largest translation, in image sides
SLOPE = 0.2  # of the leaky ReLUs
NORM_EPS = 1e-6
GRADIENT_FLOOR = 1e-6  # added to the adversarial gradient's norm
MAX_WEIGHT = 1e4
POWER_ITERATIONS = 30  # before the first step


# -- losses ---------------------------------------------------------------------------------------------------------------------


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """(mean relu(1 - real) + mean relu(1 + fake)) / 2 for logits of any shape, in float32 at least: autocast's bf16 would round the mean."""
    return 0.5 * (F.relu(1 - at_least_float32(real)).mean() + F.relu(1 + at_least_float32(fake)).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """-mean(fake), in float32 at least."""
    return -at_least_float32(fake).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """||d reconstruction / dW|| / (||d adversarial / dW|| + 1e-6), at most 1e4 and without a gradient, for the weight W of the last layer.

    It makes both losses pull equally hard on the last layer (VQGAN, equation 7). Both graphs are kept for the backward pass.
    """
    (wanted,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (found,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (wanted.norm() / (found.norm() + GRADIENT_FLOOR)).clamp(0, MAX_WEIGHT).detach()


def quantise(images: Tensor) -> Tensor:
    """Images in [-1, 1] clamped and rounded to the 256 levels of real images, so that rounding does not give fakes away. No gradient passes."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


# -- augmentation ---------------------------------------------------------------------------------------------------------------


class Augmentation(NamedTuple):
    """One draw of DiffAug's translation and colour for each image."""

    shift: Tensor  # (B, 2) int64, pixels down and to the right
    brightness: Tensor  # (B,) in [0, 1), as are the next two
    saturation: Tensor
    contrast: Tensor


def draw_augmentation(count: int, size: int, device: torch.device | str) -> Augmentation:
    """Draws from torch's global generator, for `count` images of `size` pixels: translations up to an eighth of the side."""
    reach = round(size * SHIFT)  # half to even, as the released code rounds: 2 pixels and not 3 for a side of 20
    shift = torch.randint(-reach, reach + 1, (count, 2), device=device)
    return Augmentation(shift, *torch.rand(3, count, device=device).unbind())


def augment(images: Tensor, draws: Augmentation) -> Tensor:
    """DiffAug (arXiv 2006.10738) in float32 for (B, C, H, W) in [-1, 1]: translation with zeros behind it, brightness, saturation, contrast."""
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
    moved = images.permute(0, 2, 3, 1)[index, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]
    return (moved * inside[..., None]).permute(0, 3, 1, 2)


# -- discriminators -------------------------------------------------------------------------------------------------------------


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within the block the module is in evaluation mode; a spectral norm then keeps its estimate instead of improving it."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def normed(layer: nn.Module) -> nn.Module:
    """The layer under a spectral norm whose estimate is good from the start: a generator may be judged before the discriminator's first step."""
    normed: nn.Module = spectral_norm(layer)
    for hook in normed._forward_pre_hooks.values():
        for _ in range(POWER_ITERATIONS):
            hook.compute_weight(normed, do_power_iteration=True)  # type: ignore[attr-defined]
    return normed


class TokenNorm(nn.Module):
    """Normalises each channel of each sample over its tokens, then scales and shifts: batch norm with virtual batches of one sample."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N), in float32 at least, to the same shape and type."""
        return F.instance_norm(x.float(), weight=self.weight, bias=self.bias, eps=NORM_EPS).to(x.dtype)


def _convolution(channels: int, out: int, kernel: int) -> nn.Module:
    return normed(nn.Conv1d(channels, out, kernel, padding=kernel // 2, padding_mode="circular"))


def _activated(channels: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(_convolution(channels, channels, kernel), TokenNorm(channels), nn.LeakyReLU(SLOPE))


class FeatureHead(nn.Module):
    """A logit for each token of a feature map, as in StyleGAN-T: 1 x 1 convolution, residual convolution of width 9, 1 x 1 to one channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = _activated(channels, 1)
        self.neighbours = _activated(channels, 9)
        self.out = _convolution(channels, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, N) to (B, N)."""
        x = self.mix(features)
        x = (self.neighbours(x) + x) / 2**0.5
        return self.out(x).squeeze(1)


class FeatureDiscriminator(nn.Module):
    """Heads on several maps of one frozen feature extractor, each head judging its own map."""

    def __init__(self, features: nn.Module, channels: Sequence[int]) -> None:
        """features: images to feature maps (B, C_k, N_k); channels: C_k of each."""
        super().__init__()
        self.features = features
        self.heads = nn.ModuleList(FeatureHead(c) for c in channels)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to the logits of all tokens of all maps, (B, sum N_k)."""
        maps = self.features(images)
        return torch.cat([head(features) for head, features in zip(self.heads, maps, strict=True)], dim=1)


class PatchDiscriminator(nn.Module):
    """A small convolutional discriminator of images, latents or feature maps: a logit for each patch of 2^(len(widths) - 1) pixels a side."""

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        inputs = (channels, *widths[:-1])
        self.layers = nn.ModuleList(
            normed(nn.Conv2d(c, width, 3, padding=1) if level == 0 else nn.Conv2d(c, width, 4, stride=2, padding=1))
            for level, (c, width) in enumerate(zip(inputs, widths, strict=True))
        )
        self.out = normed(nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to logits (B, h * w)."""
        x = images
        for layer in self.layers:
            x = F.leaky_relu(layer(x), SLOPE)
        return self.out(x).flatten(1)
