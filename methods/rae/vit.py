"""The ViT decoder of stage 1 maps the tokens of a frozen encoder to pixels (arXiv 2510.11690, section 3).

Its architecture is the decoder of a masked autoencoder (MAE).

Shape legend: B batch, C latent channels, h latent side, N = h * h tokens, D width, H heads,
p patch side, S = h p image side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixlat.common.layers.transformer import attend, sincos_table, unpatchify
from pixlat.methods.rae.config import DecoderShape

LAYER_NORM_EPS = 1e-12
CHANNELS = 3


class DecoderBlock(nn.Module):
    """x += Attention(norm(x)), then x += MLP(norm(x)) with the exact GELU."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm1 = nn.LayerNorm(shape.width, eps=LAYER_NORM_EPS)
        self.query = nn.Linear(shape.width, shape.width)
        self.key = nn.Linear(shape.width, shape.width)
        self.value = nn.Linear(shape.width, shape.width)
        self.proj = nn.Linear(shape.width, shape.width)
        self.norm2 = nn.LayerNorm(shape.width, eps=LAYER_NORM_EPS)
        self.fc1 = nn.Linear(shape.width, shape.hidden)
        self.fc2 = nn.Linear(shape.hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, N + 1, D) to the same shape."""
        normed = self.norm1(x)
        q, k, v = (
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        x = x + self.proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViTDecoder(nn.Module):
    """Maps latents (B, C, h, h) to images (B, 3, S, S), nominally in [-1, 1] and not clamped."""

    positions: Tensor
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        shape: DecoderShape,
        channels: int,
        grid: int,
        patch: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        """pixel_mean, pixel_std: the encoder's normalisation of RGB in [0, 1]; `forward` undoes it on the output."""
        super().__init__()
        self.shape, self.grid, self.patch = shape, grid, patch
        self.embed = nn.Linear(channels, shape.width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.blocks = nn.ModuleList(DecoderBlock(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width, eps=LAYER_NORM_EPS)
        self.out: nn.Linear = nn.Linear(shape.width, patch**2 * CHANNELS)
        table = sincos_table(grid, shape.width)
        self.register_buffer("positions", torch.cat((table.new_zeros(1, shape.width), table))[None])
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    def forward(self, latents: Tensor) -> Tensor:
        """Returns the images in float32 or wider, also under autocast."""
        tokens = self.embed(latents.flatten(2).transpose(1, 2))
        x = torch.cat((self.class_token.expand(len(tokens), -1, -1), tokens), dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        pixels = unpatchify(self.out(self.norm(x))[:, 1:], self.patch, CHANNELS)
        return 2 * (pixels * self.pixel_std + self.pixel_mean) - 1
