"""DiT-DH, a DiT on latent tokens with a shallow, wide head (arXiv 2510.11690, section 5), and plain LightningDiT.

Shape legend: B batch, C latent channels, h latent side, N = h * h tokens, D width, H heads, K head dimension.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixlat.common.accounting.macs import count_macs
from pixlat.common.layers.adaln_swiglu import AdaLNBlock, AdaLNFinal
from pixlat.common.layers.transformer import rope_table, sincos_table
from pixlat.methods.rae.config import NetworkShape

TIME_FREQUENCIES = 256


class FourierEmbedding(nn.Module):
    """Maps a time in [0, 1] to a vector: [sin(2 pi t w), cos(2 pi t w)], then Linear - SiLU - Linear.

    The frequencies w ~ N(0, 1) are random but fixed.
    """

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(TIME_FREQUENCIES))
        self.mlp = nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Maps (B,) to (B, D). The angles stay in float32 under autocast."""
        angles = t[:, None] * self.frequencies * 2 * math.pi
        return self.mlp(torch.cat((angles.sin(), angles.cos()), dim=-1))


class LatentDiT(nn.Module):
    """Predicts the velocity of noisy latents from their time and class.

    With a head (`shape.head_depth` > 0) this is DiT-DH: the output of the backbone conditions, token by token,
    a head of a different width, which gets the noisy latents again. Without a head it is LightningDiT.
    """

    pos_embed: Tensor
    rope: Tensor
    head_rope: Tensor

    def __init__(self, shape: NetworkShape, channels: int, grid: int, num_classes: int, xavier: bool = False) -> None:
        """grid: tokens per side. xavier: initialise DiT-DH like LightningDiT and not like the released code."""
        super().__init__()
        width, has_head = shape.width, shape.head_depth > 0
        out_width = shape.head_width if has_head else width
        self.depth, self.grid, self.has_head = shape.depth, grid, has_head
        self.embed = nn.Linear(channels, width)
        self.time_embed = FourierEmbedding(width)
        self.class_embed = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(AdaLNBlock(width, shape.heads, activate=True) for _ in range(shape.depth))
        self.register_buffer("pos_embed", sincos_table(grid, width)[None])
        self.register_buffer("rope", rope_table(grid, width // shape.heads), persistent=False)
        if has_head:
            self.blocks.extend(AdaLNBlock(out_width, shape.head_heads, activate=True) for _ in range(shape.head_depth))
            self.project = nn.Linear(width, out_width) if width != out_width else nn.Identity()
            self.head_embed = nn.Linear(channels, out_width)
            self.register_buffer("head_rope", rope_table(grid, out_width // shape.head_heads), persistent=False)
        self.final = AdaLNFinal(out_width, channels, activate=True)
        self.initialize(xavier or not has_head)

    @torch.no_grad()
    def initialize(self, xavier: bool) -> None:
        """Initialises modulations and the final map with 0, time and class with a normal, embeddings with Xavier.

        All other matrices keep PyTorch's default initialisation in the released DiT-DH. In LightningDiT (`xavier`)
        they get Xavier's, and biases are 0.
        """
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if name.endswith("modulation") or name == "final.linear":
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
            elif name.startswith("time_embed"):
                nn.init.normal_(module.weight, std=0.02)
                if xavier:
                    nn.init.zeros_(module.bias)
            elif xavier or name in ("embed", "head_embed"):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_embed.weight, std=0.02)

    def forward(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Returns the velocity (B, C, h, h).

        z: (B, C, h, h); t: (B,), 1 = noise; labels: (B,) int64, num_classes for "no class".
        """
        tokens = z.flatten(2).transpose(1, 2)
        time = self.time_embed(t)
        condition = time + self.class_embed(labels)
        if self.has_head:
            condition = F.silu(condition)  # the blocks apply SiLU a second time
        x = self.embed(tokens) + self.pos_embed
        for block in self.blocks[: self.depth]:
            x = block(x, condition, self.rope)
        if self.has_head:
            condition = self.project(F.silu(time.unsqueeze(1) + x))
            x = self.head_embed(tokens)
            for block in self.blocks[self.depth :]:
                x = block(x, condition, self.head_rope)
        return self.final(x, condition).transpose(1, 2).unflatten(2, (self.grid, self.grid))


def macs_per_forward(shape: NetworkShape, channels: int, grid: int, num_classes: int) -> tuple[int, int]:
    """MACs of one forward pass of one image, as (executed, as published).

    The network executes the head's modulation for every token; the paper counts it once per image.
    """
    with torch.device("meta"):
        network = LatentDiT(shape, channels, grid, num_classes)
        inputs = torch.zeros(1, channels, grid, grid), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        executed = count_macs(lambda: network(*inputs))
    layers = [*network.blocks[shape.depth :], network.final] if network.has_head else []
    modulation = sum(layer.modulation.weight.numel() for layer in layers)
    return executed, executed - (grid * grid - 1) * modulation
