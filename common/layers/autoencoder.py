"""A small convolutional autoencoder with a Gaussian posterior: the network behind our own tokenizer.

Shape legend: B batch, S image side, W channels of a level, C latent channels, f = stem * 2^(levels - 1)
pixels a latent side, h = S / f.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixlat.common.maths.float32 import at_least_float32

GROUP = 8  # channels that share a norm
LOG_VARIANCE = (-30.0, 20.0)  # as in the latent diffusion models that this one stands in for


class ResidualBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))); the last convolution starts at zero,
    so a new block is the identity.
    """

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
    """Images to the mean and standard deviation of their latents."""

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
        """(B, 3, S, S) in [-1, 1] to two (B, C, h, h), float32 at least, also under autocast:
        the KL and the moments need the digits.
        """
        x = images
        for level in self.levels:
            x = level(x)
        mean, log_variance = at_least_float32(self.out(F.silu(self.norm(x)))).chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCE))


class Decoder(nn.Module):
    """Latents to images."""

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
        """(B, C, h, h) to (B, 3, S, S), nominally in [-1, 1] and not clamped; float32 at least,
        as bf16 has fewer steps than there are grey levels.
        """
        x = self.inner(latents)
        for level in self.levels:
            x = level(x)
        images: Tensor = self.shuffle(self.last(F.silu(self.norm(x))))
        return at_least_float32(images)
