"""The JiT network, section 3 and appendix A of arXiv 2511.13720.

Shape legend: B batch, N tokens, D width, H heads, K head dimension, C image channels, S image side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixlat.common.layers.adaln_swiglu import AdaLNBlock, AdaLNFinal
from pixlat.common.layers.transformer import (
    PatchEmbed,
    SinusoidalEmbedding,
    initialize_linears,
    rope_table,
    sincos_table,
    unpatchify,
)
from pixlat.methods.jit.config import JiTConfig


class JiT(nn.Module):
    """Maps noisy image, time and class to a prediction of the image's shape."""

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
        self.blocks = nn.ModuleList(build_block(config, dropout=index in middle) for index in range(config.depth))
        self.final = AdaLNFinal(width, config.patch**2 * channels)
        self.register_buffer("pos_embed", sincos_table(grid, width)[None])
        self.register_buffer(
            "rope",
            rope_table(grid, width // config.heads, config.context_tokens) if config.rope else None,
            persistent=False,
        )
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Xavier for matrices, normal for embeddings, 0 for modulations and the final map: the first output is 0."""
        initialize_linears(
            self,
            zero=lambda name: name.endswith("modulation") or name == "final.linear",
            normal=lambda name: name.startswith("time_embed"),
        )
        nn.init.normal_(self.class_embed.weight, std=0.02)
        if self.context is not None:
            nn.init.normal_(self.context, std=0.02)

    def forward(self, z: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """Returns the prediction (B, C, S, S).

        z: (B, C, S, S); time: (B,) in the paper's convention, 1 = data; labels: (B,) int64, num_classes for "no class".
        """
        class_embed = self.class_embed(labels)
        condition = F.silu(self.time_embed(time) + class_embed)
        x = self.patch_embed(z)
        # Under autocast the residual stream stays bf16 until the float32 context tokens are concatenated.
        x = x + self.pos_embed.to(x.dtype)
        rope_image = None if self.rope is None else self.rope[self.context_tokens :]
        for block in self.blocks[: self.context_start]:
            x = block(x, condition, rope_image)
        if self.context is not None:
            x = torch.cat((class_embed[:, None] + self.context, x), dim=1)
        for block in self.blocks[self.context_start :]:
            x = block(x, condition, self.rope)
        return unpatchify(self.final(x[:, self.context_tokens :], condition), self.patch, self.channels)


def build_block(config: JiTConfig, dropout: bool) -> AdaLNBlock:
    """Builds one block, whose condition is SiLU(time + class). dropout: whether it uses the configured dropout."""
    return AdaLNBlock(
        config.width,
        config.heads,
        config.mlp_ratio,
        qk_norm=config.qk_norm,
        dropout=config.dropout if dropout else 0.0,
        attn_dropout=config.attn_dropout if dropout else 0.0,
        exact=config.attention == "reference",
    )
