"""Discriminators for adversarial losses, with spectral norm. The losses are in common/maths/adversarial.py.

Shape legend: B batch, C channels, H x W pixels, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

SLOPE = 0.2  # negative slope of the leaky ReLUs
NORM_EPS = 1e-6

POWER_ITERATIONS = 30  # iterations of the spectral norm's estimate before the first training step


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Sets the module to evaluation mode inside the `with` block, so that spectral norms keep their estimates."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def normed(layer: nn.Module) -> nn.Module:
    """Adds a spectral norm to the layer and runs its power iteration until the estimate is good.

    A generator may use the discriminator before the discriminator's first training step.
    """
    normed: nn.Module = spectral_norm(layer)
    for hook in normed._forward_pre_hooks.values():
        for _ in range(POWER_ITERATIONS):
            hook.compute_weight(normed, do_power_iteration=True)  # type: ignore[attr-defined]
    return normed


class TokenNorm(nn.Module):
    """Normalises each channel of each sample over its tokens, then scales and shifts it.

    This is batch norm with virtual batches of one sample.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, N) to the same shape and type; computes in float32."""
        return F.instance_norm(x.float(), weight=self.weight, bias=self.bias, eps=NORM_EPS).to(x.dtype)


def _convolution(channels: int, out: int, kernel: int) -> nn.Module:
    return normed(nn.Conv1d(channels, out, kernel, padding=kernel // 2, padding_mode="circular"))


def _activated(channels: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(_convolution(channels, channels, kernel), TokenNorm(channels), nn.LeakyReLU(SLOPE))


class FeatureHead(nn.Module):
    """Maps each token of a feature map to a logit, as in StyleGAN-T.

    Layers: 1 x 1 convolution, residual convolution of width 9, 1 x 1 convolution to one channel.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = _activated(channels, 1)
        self.neighbours = _activated(channels, 9)
        self.out = _convolution(channels, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Maps (B, C, N) to logits (B, N)."""
        x = self.mix(features)
        x = (self.neighbours(x) + x) / 2**0.5
        return self.out(x).squeeze(1)


class FeatureDiscriminator(nn.Module):
    """One head for each feature map of a frozen feature extractor."""

    def __init__(self, features: nn.Module, channels: Sequence[int]) -> None:
        """features: network from images to feature maps (B, C_k, N_k); channels: C_k of each map."""
        super().__init__()
        self.features = features
        self.heads = nn.ModuleList(FeatureHead(c) for c in channels)

    def forward(self, images: Tensor) -> Tensor:
        """Maps (B, 3, H, W) in [-1, 1] to the logits of all tokens of all maps, (B, sum N_k)."""
        maps = self.features(images)
        return torch.cat([head(features) for head, features in zip(self.heads, maps, strict=True)], dim=1)


class PatchDiscriminator(nn.Module):
    """A small convolutional discriminator of images, latents or feature maps.

    It returns one logit for each patch of 2^(len(widths) - 1) pixels a side.
    """

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        inputs = (channels, *widths[:-1])
        self.layers = nn.ModuleList(
            normed(nn.Conv2d(c, width, 3, padding=1) if level == 0 else nn.Conv2d(c, width, 4, stride=2, padding=1))
            for level, (c, width) in enumerate(zip(inputs, widths, strict=True))
        )
        self.out = normed(nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        """Maps (B, C, H, W) to logits (B, h * w)."""
        x = images
        for layer in self.layers:
            x = F.leaky_relu(layer(x), SLOPE)
        return self.out(x).flatten(1)
