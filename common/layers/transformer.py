"""Building blocks of transformers that several methods use with identical numerics.

Shape legend: B batch, N tokens, D width, H heads, K head dimension, C image channels, S image side,
p patch side, g = S / p grid side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixlat.common.errors import UserError
from pixlat.common.maths.float32 import at_least_float32, without_autocast

NORM_EPS = 1e-6
# Largest difference between our position tables and released ones. We compute ours in float64, others use float64
# or float32; all are stored in float32.
TABLE_TOLERANCE = 1e-5


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis.

    It computes in float32 or wider and casts back to the input's type after the multiplication by the weight.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(at_least_float32(x)).to(x.dtype)


class SinusoidalEmbedding(nn.Module):
    """Maps a scalar to a vector: [cos(t f_k), sin(t f_k)] with f_k = period^(-k / half), then Linear - SiLU - Linear.

    It does not scale t: a time in [0, 1] is not multiplied by 1000.
    """

    frequencies: Tensor

    def __init__(self, width: int, features: int = 256, period: float = 10000.0) -> None:
        super().__init__()
        exponents = torch.arange(features // 2, dtype=torch.float32) / (features // 2)
        self.register_buffer("frequencies", period**-exponents, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Maps (B,) to (B, D). The angles stay in float32 under autocast."""
        angles = t[:, None] * self.frequencies
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1))


class SwiGLU(nn.Module):
    """w3(dropout(SiLU(a) * b)) where [a, b] = w12(x)."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden, bias=bias)
        self.w3 = nn.Linear(hidden, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(self.dropout(F.silu(a) * b))


def swiglu_hidden(width: int, ratio: float) -> int:
    """The hidden width at which SwiGLU's three matrices cost as much as a two-matrix MLP of this ratio.

    It is not rounded to a multiple of any number.
    """
    return int(int(width * ratio) * 2 / 3)


class PatchEmbed(nn.Module):
    """Embeds non-overlapping patches by a convolution C -> bottleneck and a linear map bottleneck -> width.

    There is no activation between them. bottleneck = 0 means the usual embedding by one convolution with a bias.
    """

    def __init__(self, channels: int, patch: int, width: int, bottleneck: int, bias: bool) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, bottleneck or width, patch, stride=patch, bias=bias or not bottleneck)
        self.up = nn.Linear(bottleneck, width) if bottleneck else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Maps (B, C, S, S) to (B, g * g, D), rows first."""
        return self.up(self.down(images).flatten(2).transpose(1, 2))


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cuts (B, C, S, S) into tokens (B, g * g, p * p * C).

    The values of a token are ordered (row, column, channel); the channel varies fastest.
    """
    batch, channels, height, width = images.shape
    grid = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def unpatchify(tokens: Tensor, patch: int, channels: int) -> Tensor:
    """The inverse of `patchify` for a square image."""
    batch, count, _ = tokens.shape
    side = round(count**0.5)
    grid = tokens.reshape(batch, side, side, patch, patch, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, side * patch, side * patch)


def sincos_table(grid: int, width: int) -> Tensor:
    """Table of fixed positions (grid * grid, width), computed in float64 and returned as float32.

    The token of row i and column j has [sin(j w), cos(j w), sin(i w), cos(i w)] with w_k = 10000^(-k / (width / 4)).
    So the column fills the first half, unlike in `rope_table`.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = _grid_indices(grid)
    parts = [wave(index[:, None] * frequencies) for index in (column, row) for wave in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1).float()


def rope_table(grid: int, head_dim: int, prefix: int = 0) -> Tensor:
    """Table of [cos, sin] for axial RoPE, (prefix + grid * grid, head_dim / 2, 2) float32.

    The prefix tokens are not rotated. The angle depends on the row in the first half of the channels, and on the
    column in the second half. In a half of d channels, the adjacent pair (2k, 2k + 1) turns by
    index * 10000^(-2k / d).
    """
    half = head_dim // 2
    frequencies = 10000.0 ** -(torch.arange(0, half, 2, dtype=torch.float64) / half)
    row, column = _grid_indices(grid)
    angles = torch.cat((row[:, None] * frequencies, column[:, None] * frequencies), dim=1)
    angles = torch.cat((angles.new_zeros(prefix, half), angles))
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates the adjacent channel pairs of x (..., N, K) by a `rope_table`; bf16 becomes float32.

    (a, b) -> (a cos - b sin, b cos + a sin). Eager mode uses one complex product, which is twice as fast on a CPU as
    real arithmetic. Compiled code uses real arithmetic, because the compiler fuses it and has no complex numbers.
    """
    pairs = at_least_float32(x).unflatten(-1, (-1, 2))
    if not torch.compiler.is_compiling():
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table)).flatten(-2)
    (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


@torch.no_grad()
def initialize_linears(network: nn.Module, zero: Callable[[str], bool], normal: Callable[[str], bool]) -> None:
    """Initialises linear maps and convolutions by DiT's rule, by their names; biases are 0.

    Weights are 0 where `zero(name)`, from N(0, 0.02^2) where `normal(name)`, and Xavier-uniform elsewhere.
    """
    for name, module in network.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        if zero(name):
            nn.init.zeros_(module.weight)
        elif normal(name):
            nn.init.normal_(module.weight, std=0.02)
        else:
            nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, exact: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(K)) v for (B, H, N, K) tensors, with dropout on the weights.

    exact: compute logits and softmax in float32 or wider even under autocast, as in the authors' code;
    if False, use PyTorch's fused attention in v's type.
    """
    if not exact:
        return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, dropout_p=dropout)
    with without_autocast(q):
        weights = (at_least_float32(q) @ at_least_float32(k).transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return F.dropout(weights, dropout).to(v.dtype) @ v


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


def plain_norm(width: int) -> nn.LayerNorm:
    """Layer norm without weight and bias: the caller scales and shifts its output."""
    return nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)


def _grid_indices(grid: int) -> tuple[Tensor, Tensor]:
    """Row and column (grid * grid,) float64 of the tokens in row-major order."""
    index = torch.arange(grid, dtype=torch.float64)
    return index.repeat_interleave(grid), index.repeat(grid)


def drop_labels(labels: Tensor, probability: float, null_label: int) -> Tensor:
    """Replaces each label of (B,) int64 by `null_label` with this probability.

    So a network also learns to generate without the class. Draws one uniform number per label from torch's global
    generator.
    """
    dropped = torch.rand(len(labels), device=labels.device) < probability
    return labels.masked_fill(dropped, null_label)


def check_table(name: str, stored: Tensor, expected: Tensor) -> None:
    """Compares a table of positions or rotations in a released file with ours.

    Raises UserError if shapes differ or values differ by more than rounding: then the weights expect another order
    of the tokens.
    """
    difference = (stored.to(expected) - expected).abs().max().item() if stored.shape == expected.shape else float("inf")
    if not difference <= TABLE_TOLERANCE:
        raise UserError(
            f"{name} {tuple(stored.shape)} differs from the expected table {tuple(expected.shape)} "
            f"by {difference:.2g}: the weights belong to another layout of tokens."
        )
