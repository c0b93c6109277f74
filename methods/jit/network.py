"""The JiT network, section 3 and appendix A of arXiv 2511.13720.

Shape legend: B batch, N tokens, D width, H heads, K head dimension, C image channels, S image side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.blocks import (
    PatchEmbed,
    RMSNorm,
    SinusoidalEmbedding,
    SwiGLU,
    attend,
    initialize_linears,
    rope_table,
    rotate,
    sincos_table,
    swiglu_hidden,
    unpatchify,
)
from methods.jit.config import JiTConfig


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised, rotated queries and keys. The rows of `qkv` are q | k | v, each head-major."""

    def __init__(self, config: JiTConfig, dropout: float, attn_dropout: float) -> None:
        super().__init__()
        head_dim = config.width // config.heads
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.q_norm = RMSNorm(head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(config.width, config.width)
        self.dropout = nn.Dropout(dropout)
        self.attn_dropout = attn_dropout
        self.exact = config.attention == "reference"

    def forward(self, x: Tensor, rope: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, N, K)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        out = attend(q, k, v, self.attn_dropout if self.training else 0.0, self.exact)
        return self.dropout(self.proj(out.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """x += gate Attention(modulated norm(x)), then the same with SwiGLU; shifts, scales and gates come from the condition (adaLN-zero)."""

    def __init__(self, config: JiTConfig, dropout: float, attn_dropout: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.width)
        self.attn = Attention(config, dropout, attn_dropout)
        self.norm2 = RMSNorm(config.width)
        self.mlp = SwiGLU(config.width, swiglu_hidden(config.width, config.mlp_ratio), dropout)
        self.modulation = nn.Linear(config.width, 6 * config.width)

    def forward(self, x: Tensor, condition: Tensor, rope: Tensor | None) -> Tensor:
        """x (B, N, D), condition SiLU(time + class) (B, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1), rope))
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class FinalLayer(nn.Module):
    """Modulated norm, then one linear map to a token's pixels."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.linear = nn.Linear(width, outputs)
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))


class JiT(nn.Module):
    """Noisy image, time and class to a prediction of the image's shape."""

    pos_embed: Tensor
    rope: Tensor | None

    def __init__(self, config: JiTConfig, image_size: int, channels: int, num_classes: int) -> None:
        super().__init__()
        width, grid = config.width, image_size // config.patch
        self.patch, self.channels = config.patch, channels
        self.context_tokens, self.context_start = config.context_tokens, config.context_start
        self.patch_embed = PatchEmbed(channels, config.patch, width, config.bottleneck, bias=False)
        self.time_embed = SinusoidalEmbedding(width)
        self.class_embed = nn.Embedding(num_classes + 1, width)
        self.context = nn.Parameter(torch.empty(1, config.context_tokens, width)) if config.context_tokens else None
        middle = range(config.depth // 4, 3 * (config.depth // 4))
        self.blocks = nn.ModuleList(
            Block(config, config.dropout if i in middle else 0.0, config.attn_dropout if i in middle else 0.0) for i in range(config.depth)
        )
        self.final = FinalLayer(width, config.patch**2 * channels)
        self.register_buffer("pos_embed", sincos_table(grid, width)[None])
        self.register_buffer("rope", rope_table(grid, width // config.heads, config.context_tokens) if config.rope else None, persistent=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Xavier for every matrix, normal for embeddings, zero for what modulates or leaves the network: the untrained output is 0."""
        initialize_linears(
            self,
            zero=lambda name: name.endswith("modulation") or name == "final.linear",
            normal=lambda name: name.startswith("time_embed"),
        )
        nn.init.normal_(self.class_embed.weight, std=0.02)
        if self.context is not None:
            nn.init.normal_(self.context, std=0.02)

    def forward(self, z: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """z (B, C, S, S); time (B,) in the paper's convention, 1 = data; labels (B,) int64, the last row of the table being "no class"."""
        class_embed = self.class_embed(labels)
        condition = F.silu(self.time_embed(time) + class_embed)
        x = self.patch_embed(z)
        x = x + self.pos_embed.to(x.dtype)  # under autocast the residual stream stays bf16 until the float32 context tokens join it
        rope_image = None if self.rope is None else self.rope[self.context_tokens :]
        for block in self.blocks[: self.context_start]:
            x = block(x, condition, rope_image)
        if self.context is not None:
            x = torch.cat((class_embed[:, None] + self.context, x), dim=1)
        for block in self.blocks[self.context_start :]:
            x = block(x, condition, self.rope)
        return unpatchify(self.final(x[:, self.context_tokens :], condition), self.patch, self.channels)
