"""DiT-DH: a DiT of the latents' tokens with a shallow, wide head (arXiv 2510.11690, section 5), and the plain LightningDiT.

Shape legend: B batch, C latent channels, h latent side, N = h * h tokens, D width, H heads, K head dimension.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.blocks import RMSNorm, SwiGLU, attend, rope_table, rotate, sincos_table, swiglu_hidden
from common.cost import count_macs
from methods.rae.config import NetworkShape

TIME_FREQUENCIES = 256
MLP_RATIO = 4.0


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


def per_token(condition: Tensor) -> Tensor:
    """A condition (B, D) as (B, 1, D), to be broadcast over the tokens; (B, N, D) as it is."""
    return condition.unsqueeze(1) if condition.ndim == 2 else condition


class FourierEmbedding(nn.Module):
    """A time in [0, 1] to a vector: [sin(2 pi t w), cos(2 pi t w)] with fixed random frequencies w ~ N(0, 1), then Linear - SiLU - Linear."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(TIME_FREQUENCIES))
        self.mlp = nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) to (B, D). The angles stay in float32 under autocast."""
        angles = t[:, None] * self.frequencies * 2 * math.pi
        return self.mlp(torch.cat((angles.sin(), angles.cos()), dim=-1))


class Attention(nn.Module):
    """Multi-head attention with rotated queries and keys and without a norm on them. The rows of `qkv` are q | k | v, each head-major."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, N, K)
        out = attend(rotate(q, rope), rotate(k, rope), v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x += gate Attention(modulated norm(x)), then the same with SwiGLU; shifts, scales and gates come from the condition (adaLN-zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, swiglu_hidden(width, MLP_RATIO))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, rope: Tensor) -> Tensor:
        """x (B, N, D); condition (B, D), the same for all tokens, or (B, N, D), one for each."""
        shift1, scale1, gate1, shift2, scale2, gate2 = per_token(self.modulation(F.silu(condition))).chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1), rope))
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class FinalLayer(nn.Module):
    """Modulated norm and a linear map to the latents' channels."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.linear = nn.Linear(width, out)
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, N, D) to (B, N, C)."""
        shift, scale = per_token(self.modulation(F.silu(condition))).chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))


class LatentDiT(nn.Module):
    """The velocity of noisy latents, given their time and class.

    With a head (`shape.head_depth` > 0) this is DiT-DH: the backbone sees the noisy latents and conditions, token by token, a head of its own
    width, which sees them again. Without one it is LightningDiT.
    """

    pos_embed: Tensor
    rope: Tensor
    head_rope: Tensor

    def __init__(self, shape: NetworkShape, channels: int, grid: int, num_classes: int, xavier: bool = False) -> None:
        """grid: tokens a side. xavier: initialise a DiT-DH's matrices as LightningDiT's, and not as the released code does."""
        super().__init__()
        width, has_head = shape.width, shape.head_depth > 0
        out_width = shape.head_width if has_head else width
        self.depth, self.grid, self.has_head = shape.depth, grid, has_head
        self.embed = nn.Linear(channels, width)
        self.time_embed = FourierEmbedding(width)
        self.class_embed = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, shape.heads) for _ in range(shape.depth))
        self.register_buffer("pos_embed", sincos_table(grid, width)[None])
        self.register_buffer("rope", rope_table(grid, width // shape.heads), persistent=False)
        if has_head:
            self.blocks.extend(Block(out_width, shape.head_heads) for _ in range(shape.head_depth))
            self.project = nn.Linear(width, out_width) if width != out_width else nn.Identity()
            self.head_embed = nn.Linear(channels, out_width)
            self.register_buffer("head_rope", rope_table(grid, out_width // shape.head_heads), persistent=False)
        self.final = FinalLayer(out_width, channels)
        self.initialize(xavier or not has_head)

    @torch.no_grad()
    def initialize(self, xavier: bool) -> None:
        """Zero for what modulates or leaves the network, normal for time and class, Xavier for the embeddings of the latents.

        The released DiT-DH leaves all other matrices as PyTorch makes them; LightningDiT (`xavier`) has Xavier's, and biases of zero.
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
        """z (B, C, h, h); t (B,), 1 = noise; labels (B,) int64, the last row of the table being "no class". Returns (B, C, h, h)."""
        tokens = z.flatten(2).transpose(1, 2)
        time = self.time_embed(t)
        condition = time + self.class_embed(labels)
        if self.has_head:
            condition = F.silu(condition)  # the blocks apply another one
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
    """(executed, as published) MACs of one forward of one image.

    The paper counts the head's modulation once an image; it is computed for every token, and that is what is executed.
    """
    with torch.device("meta"):
        network = LatentDiT(shape, channels, grid, num_classes)
        inputs = torch.zeros(1, channels, grid, grid), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        executed = count_macs(lambda: network(*inputs))
    layers = [*network.blocks[shape.depth :], network.final] if network.has_head else []
    modulation = sum(layer.modulation.weight.numel() for layer in layers)
    return executed, executed - (grid * grid - 1) * modulation
