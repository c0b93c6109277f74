"""A small convolutional autoencoder with a Gaussian posterior: the network of our own tokenizer.

Shape legend: B batch, S image side, W channels of a level, C latent channels,
f = stem * 2^(levels - 1) image pixels per latent position along a side, h = S / f latent side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixlat.common.maths.float32 import at_least_float32

GROUP = 8  # channels per group of GroupNorm
LOG_VARIANCE = (-30.0, 20.0)  # clamp of the log variance, as in latent diffusion models


class ResidualBlock(nn.Module):
    """x + conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))). The weights of conv2 start at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(width // GROUP, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(width // GROUP, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(hidden)))


class Encoder(nn.Module):
    """Maps images to the mean and standard deviation of their latents."""

    def __init__(self, widths: Sequence[int], stem: int, depth: int, latent_channels: int, channels: int = 3) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for level, width in enumerate(widths):
            inputs = channels * stem**2 if level == 0 else 4 * widths[level - 1]
            unshuffle = nn.PixelUnshuffle(stem if level == 0 else 2)
            blocks = (ResidualBlock(width) for _ in range(depth))
            self.levels.append(
                nn.Sequential(
                    unshuffle, nn.Conv2d(inputs, width, 3 if level == 0 else 1, padding=int(level == 0)), *blocks
                )
            )
        self.norm = nn.GroupNorm(widths[-1] // GROUP, widths[-1])
        self.out = nn.Conv2d(widths[-1], 2 * latent_channels, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, 3, S, S) in [-1, 1] to mean and standard deviation, each (B, C, h, h).

        They are float32 or wider even under autocast, because the KL term and the moments need the precision.
        """
        x = images
        for level in self.levels:
            x = level(x)
        mean, log_variance = at_least_float32(self.out(F.silu(self.norm(x)))).chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCE))


class Decoder(nn.Module):
    """Maps latents to images."""

    def __init__(self, widths: Sequence[int], stem: int, depth: int, latent_channels: int, channels: int = 3) -> None:
        super().__init__()
        self.inner = nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
        self.levels = nn.ModuleList()
        for level in reversed(range(len(widths))):
            blocks = (ResidualBlock(widths[level]) for _ in range(depth))
            rise = (nn.Conv2d(widths[level], 4 * widths[level - 1], 1), nn.PixelShuffle(2)) if level else ()
            self.levels.append(nn.Sequential(*blocks, *rise))
        self.norm = nn.GroupNorm(widths[0] // GROUP, widths[0])
        self.last = nn.Conv2d(widths[0], channels * stem**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(stem)

    def forward(self, latents: Tensor) -> Tensor:
        """Maps (B, C, h, h) to images (B, 3, S, S), nominally in [-1, 1] and not clamped.

        They are float32 or wider, because bf16 has fewer steps than 8-bit images have levels.
        """
        x = self.inner(latents)
        for level in self.levels:
            x = level(x)
        images: Tensor = self.shuffle(self.last(F.silu(self.norm(x))))
        return at_least_float32(images)
