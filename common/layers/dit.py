"""The transformer block of DiT and SiT (Peebles and Xie 2023) and the projector of REPA."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pixlat.common.layers.transformer import attend, modulate, plain_norm

QK_NORM_EPS = 1e-5


class Attention(nn.Module):
    """Multi-head attention. The rows of `qkv` are q | k | v, each head-major."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False, exact: bool = False) -> None:
        super().__init__()
        self.heads, self.exact = heads, exact
        head_dim = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(head_dim, eps=QK_NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, eps=QK_NORM_EPS) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, N, D) to the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, N, K)
        out = attend(self.q_norm(q), self.k_norm(k), v, exact=self.exact)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, tanh-approximated GELU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DitBlock(nn.Module):
    """x += gate1 Attention(modulate(norm1(x))), then x += gate2 MLP(modulate(norm2(x))) (adaLN-zero).

    SiLU and a linear map turn the condition into the two shifts, scales and gates.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False, exact: bool = False) -> None:
        super().__init__()
        self.norm1, self.attn = plain_norm(width), Attention(width, heads, qk_norm, exact)
        self.norm2, self.mlp = plain_norm(width), Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x: (B, N, D); condition: the sum of the time and class embeddings (B, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1)))
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


def projector(width: int, hidden: int, outputs: int) -> nn.Sequential:
    """REPA's map from a transformer's tokens to the teacher's tokens: three linear layers with SiLU between them."""
    layers = nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, outputs)
    )
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return layers
