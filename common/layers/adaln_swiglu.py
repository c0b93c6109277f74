"""The transformer block that JiT and RAE's DiT-DH share: RMSNorm, rotated attention and SwiGLU under adaLN-zero.

Arguments switch the differences between the two networks: JiT normalises queries and keys and can use dropout;
DiT-DH can have a different condition for every token. With the same settings both compute the same bits,
forward and backward, and draw the same initial weights.

Shape legend: B batch, N tokens, D width, H heads, K head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pixlat.common.layers.transformer import RMSNorm, SwiGLU, attend, modulate, rotate, swiglu_hidden


class RotaryAttention(nn.Module):
    """Multi-head attention with rotary positions (RoPE) on queries and keys.

    The rows of `qkv` are q | k | v, each head-major.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        qk_norm: bool = False,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        exact: bool = False,
    ) -> None:
        """dropout: rate after the projection; attn_dropout: rate on the attention weights; exact: see `attend`."""
        super().__init__()
        self.heads, self.exact, self.attn_dropout = heads, exact, attn_dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rope: Tensor | None) -> Tensor:
        """Maps (B, N, D) to the same shape. rope: a `rope_table` of the N tokens, or None for no rotation."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, N, K)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        out = attend(q, k, v, self.attn_dropout if self.training else 0.0, self.exact)
        return self.dropout(self.proj(out.transpose(1, 2).flatten(2)))


class AdaLNBlock(nn.Module):
    """x += gate1 Attention(modulate(norm1(x))), then x += gate2 SwiGLU(modulate(norm2(x))) (adaLN-zero).

    A linear map of the condition gives the shifts, scales and gates.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        *,
        qk_norm: bool = False,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        exact: bool = False,
        activate: bool = False,
    ) -> None:
        """mlp_ratio: see `swiglu_hidden`; activate: see `condition_activation`.

        dropout, attn_dropout, exact: see `RotaryAttention`; dropout acts on SwiGLU's hidden vector as well.
        """
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = RotaryAttention(width, heads, qk_norm, dropout, attn_dropout, exact)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, swiglu_hidden(width, mlp_ratio), dropout)
        self.activation = condition_activation(activate)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, rope: Tensor | None) -> Tensor:
        """x (B, N, D); condition (B, D), the same for all tokens, or (B, N, D); rope: see `RotaryAttention`."""
        modulation = per_token(self.modulation(self.activation(condition)))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1), rope))
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class AdaLNFinal(nn.Module):
    """A modulated norm, then a linear map from each token to its outputs."""

    def __init__(self, width: int, outputs: int, activate: bool = False) -> None:
        """outputs: values per token in the network's prediction; activate: see `condition_activation`."""
        super().__init__()
        self.norm = RMSNorm(width)
        self.linear = nn.Linear(width, outputs)
        self.activation = condition_activation(activate)
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Maps (B, N, D) to (B, N, outputs), for a condition as in `AdaLNBlock`."""
        shift, scale = per_token(self.modulation(self.activation(condition))).chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))


def condition_activation(activate: bool) -> nn.Module:
    """SiLU if each layer applies it to the condition; the identity if the network applies it once for all layers.

    Both compute the same function but sum gradients in a different order. So a network must always use the same one
    to stay bit for bit the same.
    """
    return nn.SiLU() if activate else nn.Identity()


def per_token(modulation: Tensor) -> Tensor:
    """Reshapes a modulation (B, D) to (B, 1, D), so that it broadcasts over tokens; (B, N, D) passes unchanged."""
    return modulation.unsqueeze(1) if modulation.ndim == 2 else modulation
