"""The network pmfDiT: section 4 of arXiv 2601.22158 and its released code.

Class, guidance scale, guidance interval and step length condition the network as prefix tokens. There is no adaLN,
and the time t itself is no input. Two heads (stacks of blocks) follow the shared blocks: one predicts the average
velocity u; the other, used in training only, predicts the instantaneous velocity v.

Each layer maps x. If the caller also passes a tangent dx, the layer returns its directional derivative as well,
which the MeanFlow identity needs. The loss stops the gradient at this derivative, so the layers compute tangents
without a graph and reuse the values of the forward pass. A tangent (b, N, D) belongs to the last b samples of
x (B, N, D): the flow-matching samples come first and need no tangent.

Shape legend: B batch, N tokens, D width, H heads, K head dimension, C image channels, S image side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixlat.common.layers.transformer import (
    PatchEmbed,
    RMSNorm,
    SinusoidalEmbedding,
    attend,
    rope_table,
    rotate,
    unpatchify,
)
from pixlat.common.maths.float32 import at_least_float32, without_autocast
from pixlat.methods.pmf.config import PMFConfig


class Condition(NamedTuple):
    """The inputs of the network besides the noisy image, each (B,)."""

    h: Tensor  # t - r, the length of the step
    omega: Tensor  # guidance scale, from 1
    t_min: Tensor  # the guidance interval is [t_min, t_max]
    t_max: Tensor
    labels: Tensor  # int64; the last index means "no class"
    # The time. The paper's network infers t from z and ignores this field;
    # a variant in evaluation/studies/claims/pmf_manifold.py reads it.
    t: Tensor | None = None


def last_samples(x: Tensor, dx: Tensor) -> Tensor:
    """The samples of x to which the tangent dx belongs, detached from the graph."""
    return x.detach()[len(x) - len(dx) :]


def norm_tangent(norm: RMSNorm, x: Tensor, dx: Tensor) -> Tensor:
    """RMSNorm's derivative: d(s x w) = s w (dx - s^2 x mean(x dx)) with s = 1 / sqrt(mean(x^2) + eps).

    Computes in float32 or wider.
    """
    assert norm.eps is not None
    wide, dwide = at_least_float32(x), at_least_float32(dx)
    scale = (wide.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    return (scale * norm.weight * (dwide - scale.square() * wide * (wide * dwide).mean(-1, keepdim=True))).to(dx.dtype)


class Attention(nn.Module):
    """Multi-head attention without biases; RMSNorm is applied to queries and keys, and RoPE only to image tokens.

    The four matrices stay separate parameters because Muon orthogonalises each one alone.
    """

    def __init__(self, config: PMFConfig) -> None:
        super().__init__()
        width, head_dim = config.width, config.width // config.heads
        self.heads = config.heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = RMSNorm(head_dim), RMSNorm(head_dim)
        self.explicit = config.jvp == "func"  # PyTorch's fused attention has no forward-mode derivative

    def split(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, H, N, K)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, rope: Tensor, dx: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        q_raw, k_raw, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        q, k = rotate(self.q_norm(q_raw), rope), rotate(self.k_norm(k_raw), rope)
        mixed = attend(q, k, v, exact=self.explicit)
        y = self.out(mixed.transpose(1, 2).flatten(2))
        if dx is None:
            return y, None
        with torch.no_grad():
            dq = rotate(norm_tangent(self.q_norm, last_samples(q_raw, dx), self.split(self.q(dx))), rope)
            dk = rotate(norm_tangent(self.k_norm, last_samples(k_raw, dx), self.split(self.k(dx))), rope)
            dmixed = attention_tangent(
                last_samples(q, dx),
                last_samples(k, dx),
                last_samples(v, dx),
                last_samples(mixed, dx),
                dq,
                dk,
                self.split(self.v(dx)),
            )
            return y, self.out(dmixed.transpose(1, 2).flatten(2))


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)), with the softmax in float32 or wider."""
    return at_least_float32(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)


def attention_tangent(q: Tensor, k: Tensor, v: Tensor, mixed: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
    """The derivative of attention, d(P v) = G v - rowsum(G) mixed + P dv.

    Here S = q k^T / sqrt(K), P = softmax(S), mixed = P v and G = P * dS.
    """
    weights = attention_weights(q, k)
    change = weights * (dq @ k.transpose(-2, -1) + q @ dk.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return change.to(v.dtype) @ v - change.sum(-1, keepdim=True) * mixed + weights.to(dv.dtype) @ dv


class SwiGLU(nn.Module):
    """w2(SiLU(w1 x) * (w3 x)) without biases; the matrices are separate because Muon orthogonalises each one alone."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor, dx: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        a, b = self.w1(x), self.w3(x)
        y = self.w2(F.silu(a) * b)
        if dx is None:
            return y, None
        with torch.no_grad():
            a, b, da, db = last_samples(a, dx), last_samples(b, dx), self.w1(dx), self.w3(dx)
            gate = torch.sigmoid(a)
            silu = a * gate
            return y, self.w2((gate + silu * (1 - gate)) * da * b + silu * db)


class Block(nn.Module):
    """x += gate1 Attention(norm1(x)), then x += gate2 SwiGLU(norm2(x)). The gates are learned vectors, initially 0."""

    def __init__(self, config: PMFConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(config.width), RMSNorm(config.width)
        self.attn = Attention(config)
        self.mlp = SwiGLU(config.width, config.mlp_hidden or 8 * config.width // 3)
        self.gate1, self.gate2 = (nn.Parameter(torch.zeros(config.width)) for _ in range(2))

    def forward(self, x: Tensor, rope: Tensor, dx: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        y, dy = self.attn(self.norm1(x), rope, self._normed(self.norm1, x, dx))
        x, dx = self._added(x, self.gate1, y, dx, dy)
        y, dy = self.mlp(self.norm2(x), self._normed(self.norm2, x, dx))
        return self._added(x, self.gate2, y, dx, dy)

    @staticmethod
    def _normed(norm: RMSNorm, x: Tensor, dx: Tensor | None) -> Tensor | None:
        with torch.no_grad():
            return None if dx is None else norm_tangent(norm, last_samples(x, dx), dx)

    @staticmethod
    def _added(
        x: Tensor, gate: Tensor, y: Tensor, dx: Tensor | None, dy: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            moved = None if dx is None or dy is None else dx + gate * dy
        return x + gate * y, moved


class Head(nn.Module):
    """The blocks that predict one of the two velocities, and the final linear map to pixels."""

    def __init__(self, config: PMFConfig, channels: int) -> None:
        super().__init__()
        self.patch, self.channels, self.prefix = config.patch, channels, config.prefix
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.head_depth))
        self.norm = RMSNorm(config.width)
        self.linear = nn.Linear(config.width, config.patch**2 * channels)

    def forward(self, x: Tensor, rope: Tensor, dx: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Maps tokens (B, N, D) to an image (B, C, S, S).

        The last map runs in float32 even under autocast, because the division by t would magnify rounding errors.
        """
        for block in self.blocks:
            x, dx = block(x, rope, dx)
        x = x[:, self.prefix :]
        with without_autocast(x):
            image = unpatchify(self.linear(at_least_float32(self.norm(x))), self.patch, self.channels)
            if dx is None:
                return image, None
            with torch.no_grad():
                dx = norm_tangent(self.norm, last_samples(x, dx), dx[:, self.prefix :])
                return image, unpatchify(F.linear(at_least_float32(dx), self.linear.weight), self.patch, self.channels)


class PmfDiT(nn.Module):
    """Maps a noisy image and its conditions to a prediction from which `to_velocity` gets the average velocity u.

    Sampling needs this network only.
    """

    rope: Tensor

    def __init__(self, config: PMFConfig, image_size: int, channels: int, num_classes: int) -> None:
        super().__init__()
        width, grid = config.width, image_size // config.patch
        self.patch_embed = PatchEmbed(channels, config.patch, width, config.bottleneck, bias=True)
        self.class_embed = nn.Embedding(num_classes + 1, width)
        self.omega_embed, self.t_min_embed, self.t_max_embed, self.h_embed = (
            SinusoidalEmbedding(width) for _ in range(4)
        )
        self.class_tokens = token_table(config.class_tokens, width)
        self.omega_tokens = token_table(config.guidance_tokens, width)
        self.t_min_tokens = token_table(config.interval_tokens, width)
        self.t_max_tokens = token_table(config.interval_tokens, width)
        self.h_tokens = token_table(config.time_tokens, width)
        self.pos_embed = token_table(config.prefix + grid**2, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth - config.head_depth))
        self.head = Head(config, channels)
        self.register_buffer("rope", rope_table(grid, width // config.heads, config.prefix), persistent=False)

    def forward(self, z: Tensor, condition: Condition) -> Tensor:
        """Maps z (B, C, S, S) to a prediction of the same shape."""
        return self.head(self.shared(self.embed(z, condition))[0], self.rope)[0]

    def scalar_embeds(self) -> tuple[SinusoidalEmbedding, ...]:
        """The embeddings of the step length, the guidance scale and both ends of the guidance interval."""
        return self.h_embed, self.omega_embed, self.t_min_embed, self.t_max_embed

    def shared(self, x: Tensor, dx: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Applies the blocks before the heads: (B, N, D) to (B, N, D)."""
        for block in self.blocks:
            x, dx = block(x, self.rope, dx)
        return x, dx

    def embed(self, z: Tensor, condition: Condition) -> Tensor:
        """Builds the sequence (B, N, D): prefix tokens, then patches, plus learned positions for all of them.

        By default the prefix has 8 class, 4 guidance-scale, 2 + 2 interval and 4 step-length tokens.
        """
        prefix = (
            (self.class_tokens, self.class_embed(condition.labels)),
            (self.omega_tokens, self.omega_embed(1 - 1 / condition.omega)),
            (self.t_min_tokens, self.t_min_embed(condition.t_min)),
            (self.t_max_tokens, self.t_max_embed(condition.t_max)),
            (self.h_tokens, self.h_embed(condition.h)),
        )
        return (
            torch.cat([*(table + vector[:, None] for table, vector in prefix), self.patch_embed(z)], dim=1)
            + self.pos_embed
        )

    @torch.no_grad()
    def embed_tangent(self, h: Tensor, dz: Tensor) -> Tensor:
        """The tangent of the sequence for the last len(dz) samples, when z moves along dz and h along 1.

        Only the step-length tokens and the patches move; the tangent of the other tokens is 0.
        """
        h = last_samples(h, dz)
        dh = torch.func.jvp(self.h_embed, (h,), (torch.ones_like(h),))[1]
        moved = dh[:, None].expand(-1, self.h_tokens.shape[1], -1)
        still = moved.new_zeros(len(dz), self.head.prefix - moved.shape[1], moved.shape[2])
        return torch.cat((still, moved, self.patch_embed(dz) - self.patch_embed(torch.zeros_like(dz[:1]))), dim=1)


def token_table(count: int, width: int) -> nn.Parameter:
    """Learned tokens (1, count, D); `initialize` fills them."""
    return nn.Parameter(torch.empty(1, count, width))


@torch.no_grad()
def initialize(network: PmfDiT, v_head: Head) -> None:
    """Applies the released initialisation. Final maps and gates are 0, so an untrained network predicts 0.

    The weights of the norms are 1.
    """
    width = network.pos_embed.shape[-1]
    for stack in (network.blocks, network.head.blocks, v_head.blocks):
        for linear in (module for module in stack.modules() if isinstance(module, nn.Linear)):
            nn.init.normal_(linear.weight, std=0.32 * linear.in_features**-0.5)
    for embed in network.scalar_embeds():
        for linear in (module for module in embed.modules() if isinstance(module, nn.Linear)):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
    tables = (network.class_tokens, network.omega_tokens, network.t_min_tokens, network.t_max_tokens, network.h_tokens)
    for table in (network.class_embed.weight, *tables):
        nn.init.normal_(table, std=width**-0.5)
    nn.init.normal_(network.pos_embed, std=0.02)
    for module in network.patch_embed.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    for head in (network.head, v_head):
        nn.init.zeros_(head.linear.weight)
        nn.init.zeros_(head.linear.bias)
