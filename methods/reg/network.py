"""The diffusion transformer of DiT, SiT, REPA and REG (arXiv 2212.09748 and, for REG, 2507.01467, section 3.2 of both).

Modules have the names of the released code, so that its state dicts fit. Shape legend: B batch, N tokens, D width,
H heads, K head dimension, C latent channels, S latent side, p patch, T class-token dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pixlat.common.layers.dit import DitBlock
from pixlat.common.layers.transformer import (
    NORM_EPS,
    SinusoidalEmbedding,
    initialize_linears,
    modulate,
    plain_norm,
    sincos_table,
    unpatchify,
)


@dataclass(frozen=True)
class Shape:
    """The numbers that determine the shapes of the network's tensors."""

    depth: int
    width: int
    heads: int
    patch: int  # side of a token in latent positions
    side: int  # side of the image in latent positions
    channels: int
    outputs: int  # output channels: twice `channels` if the network predicts a variance as well
    num_classes: int
    class_token: int = 0  # REG: dimension of the class token; 0: no class token
    qk_norm: bool = False
    exact_attention: bool = False


class Prediction(NamedTuple):
    """The outputs of one forward pass."""

    image: Tensor  # (B, outputs, S, S)
    class_token: Tensor | None  # (B, T), REG
    hidden: Tensor | None  # (B, N, D), the tokens after block `hidden_after`; REG's class token is the first


class PatchEmbed(nn.Module):
    """Maps patches to tokens, row by row."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, z: Tensor) -> Tensor:
        return self.proj(z).flatten(2).transpose(1, 2)


class ClassEmbed(nn.Module):
    """One vector for each class, and a last one for "no class"."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class FinalLayer(nn.Module):
    """A modulated norm of all tokens, then a linear map of image tokens and, in REG, another one of the class token."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm_final = plain_norm(shape.width)
        self.linear = nn.Linear(shape.width, shape.patch**2 * shape.outputs)
        self.linear_cls = nn.Linear(shape.width, shape.class_token) if shape.class_token else None
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(shape.width, 2 * shape.width))

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, N, D) to tokens (B, S^2 / p^2, p^2 outputs) and the class token (B, T)."""
        shift, scale = self.adaLN_modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        x = modulate(self.norm_final(x), shift, scale)
        if self.linear_cls is None:
            return self.linear(x), None
        return self.linear(x[:, 1:]), self.linear_cls(x[:, 0])


class LatentTransformer(nn.Module):
    """Maps noisy latents, time and class to a prediction of the latents' shape; in REG also a noisy class token."""

    pos_embed: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.x_embedder = PatchEmbed(shape.channels, shape.patch, shape.width)
        self.t_embedder = SinusoidalEmbedding(shape.width)
        self.y_embedder = ClassEmbed(shape.num_classes, shape.width)
        self.blocks = nn.ModuleList(
            DitBlock(shape.width, shape.heads, shape.qk_norm, shape.exact_attention) for _ in range(shape.depth)
        )
        self.final_layer = FinalLayer(shape)
        if shape.class_token:
            self.cls_projectors2 = nn.Linear(shape.class_token, shape.width)
            self.wg_norm = nn.LayerNorm(shape.width, eps=NORM_EPS)
        positions = sincos_table(shape.side // shape.patch, shape.width)
        prefix = positions.new_zeros(1 if shape.class_token else 0, shape.width)  # the class token has no position
        self.register_buffer("pos_embed", torch.cat((prefix, positions))[None])
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Xavier for every matrix, normal for embeddings, zero for modulations and the output layer.

        So the untrained output is 0.
        """
        initialize_linears(
            self,
            zero=lambda name: "adaLN_modulation" in name or name.startswith("final_layer.linear"),
            normal=lambda name: name.startswith("t_embedder"),
        )
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)

    def forward(
        self, z: Tensor, time: Tensor, labels: Tensor, class_token: Tensor | None = None, hidden_after: int = 0
    ) -> Prediction:
        """z (B, C, S, S); time (B,) in the network's own convention; labels (B,) int64, num_classes means "no class".

        class_token (B, T): REG's noisy token. hidden_after: the number of the block, from 1, whose output tokens are
        returned as well; 0: none.
        """
        x = self.x_embedder(z)
        if class_token is not None:
            x = torch.cat((self.wg_norm(self.cls_projectors2(class_token)).unsqueeze(1), x), dim=1)
        x = x + self.pos_embed
        condition = self.t_embedder(time) + self.y_embedder(labels)
        hidden = None
        for number, block in enumerate(self.blocks, 1):
            x = block(x, condition)
            hidden = x if number == hidden_after else hidden
        tokens, token = self.final_layer(x, condition)
        return Prediction(unpatchify(tokens, self.shape.patch, self.shape.outputs), token, hidden)
