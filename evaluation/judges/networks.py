"""The bodies of the judges: a plain CNN, a residual CNN and a small vision transformer.

They differ in architecture, so that an image that fools one need not fool the others. They normalise with GroupNorm or
LayerNorm and keep no running statistics, so an image's features do not depend on its batch or on training's averages.

Shape letters: B images, C channels, D features, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_SIZE = 32  # pixels, square
SCALING = "(255-x)/128"  # white is 0, as are the zeros with which convolutions pad an image
NUM_CLASSES, NUM_STYLES, NUM_SUBGROUPS = 10, 3, 97  # of emoji32
THUMBNAIL = 8  # pixels of the thumbnail's side
SCALES = (1, 2, 4)  # pixels per step of the differences
QUADRANTS = 2  # parts of a side in which differences are averaged
KERNELS = ((((-1.0, 1.0), (0.0, 0.0))), (((-1.0, 0.0), (1.0, 0.0))), (((1.0, -1.0), (-1.0, 1.0))))  # across, down, both
NUM_DESCRIPTION = 3 * THUMBNAIL**2 + len(SCALES) * len(KERNELS) * QUADRANTS**2
FAINT = 2 / 128  # a difference of two grey levels, in the units of the scaled pixels


class Outputs(NamedTuple):
    """What a judge's heads say about a batch."""

    classes: Tensor  # (B, 10) logits
    styles: Tensor  # (B, 3) logits
    subgroups: Tensor  # (B, 97) logits
    description: Tensor  # (B, NUM_DESCRIPTION) standardised, see `describe`


class JudgeNetwork(nn.Module):
    """A body with linear heads on its pooled features."""

    shift: Tensor
    scale: Tensor

    def __init__(self, body: nn.Module, dims: int) -> None:
        super().__init__()
        self.body, self.dims = body, dims
        self.classes = nn.Linear(dims, NUM_CLASSES)
        self.styles = nn.Linear(dims, NUM_STYLES)
        self.subgroups = nn.Linear(dims, NUM_SUBGROUPS)
        self.description = nn.Linear(dims, NUM_DESCRIPTION)
        self.register_buffer("shift", torch.zeros(dims))
        self.register_buffer("scale", torch.ones(()))

    def pooled(self, pixels: Tensor) -> Tensor:
        """(B, D) the body's output for pixels (B, 3, 32, 32) in [0, 255]."""
        return self.body(scaled(pixels)).float()

    def heads(self, pooled: Tensor) -> Outputs:
        """The outputs of all heads for pooled features (B, D)."""
        return Outputs(self.classes(pooled), self.styles(pooled), self.subgroups(pooled), self.description(pooled))

    def forward(self, pixels: Tensor) -> Outputs:
        """The heads' outputs for pixels (B, 3, 32, 32) in [0, 255]."""
        return self.heads(self.pooled(pixels))

    def normalised(self, pooled: Tensor) -> Tensor:
        """The features (B, D) that distances are computed in: mean 0 and mean variance 1 over the training images.

        All dimensions share one scale, so a ratio of Fréchet distances is the same with and without it.
        """
        return (pooled - self.shift) * self.scale


def scaled(pixels: Tensor) -> Tensor:
    """Pixels in [0, 255] to [0, 2); white becomes 0."""
    return (255 - pixels) / 128


def describe(pixels: Tensor) -> Tensor:
    """(B, NUM_DESCRIPTION) what images (B, 3, 32, 32) in [0, 255] look like, before standardisation.

    First a thumbnail of 8 x 8 pixels: what is where, in which colour. Then, for differences between neighbours at three
    scales and in three directions, the mean of log(d^2 + faint^2) in each quadrant: how sharp, smooth or noisy.
    """
    x = scaled(pixels)
    grey = x.mean(1, keepdim=True)
    kernels = torch.tensor(KERNELS, dtype=x.dtype, device=x.device)[:, None]
    parts = [F.adaptive_avg_pool2d(x, THUMBNAIL).flatten(1)]
    for step in SCALES:
        differences = F.conv2d(F.avg_pool2d(grey, step), kernels)
        parts.append(F.adaptive_avg_pool2d((differences.square() + FAINT**2).log(), QUADRANTS).flatten(1))
    return torch.cat(parts, dim=1)


# -- bodies ------------------------------------------------------------------------------------------------------------


def norm(channels: int) -> nn.GroupNorm:
    """Normalises groups of 16 channels."""
    return nn.GroupNorm(channels // 16, channels)


class MeanOverPositions(nn.Module):
    """(B, C, H, W) to (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def plain_cnn() -> JudgeNetwork:
    """Four convolutions one after the other, the first three with large kernels."""

    def layer(before: int, after: int, kernel: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)
        return [convolution, norm(after), nn.GELU()]

    layers = [*layer(3, 48, 5, 2), *layer(48, 96, 5, 2), *layer(96, 128, 5, 1), *layer(128, 192, 3, 2)]
    return JudgeNetwork(nn.Sequential(*layers, MeanOverPositions()), 192)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a 1x1 convolution; halves the size."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, 2, padding=1, bias=False)
        self.first_norm = norm(after)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.second_norm = norm(after)
        self.beside = nn.Conv2d(before, after, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.beside(x) + self.second_norm(self.second(y)))


def residual_cnn() -> JudgeNetwork:
    """A stem and three residual blocks with small kernels."""
    stem = [nn.Conv2d(3, 32, 3, padding=1, bias=False), norm(32), nn.ReLU()]
    blocks = [ResidualBlock(32, 64), ResidualBlock(64, 128), ResidualBlock(128, 192)]
    return JudgeNetwork(nn.Sequential(*stem, *blocks, MeanOverPositions()), 192)


class TransformerBlock(nn.Module):
    """Attention, then a network of two layers, each after a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, tokens: Tensor) -> Tensor:
        joint = self.query_key_value(self.attention_norm(tokens)).unflatten(2, (3, self.num_heads, -1))
        query, key, value = joint.permute(2, 0, 3, 1, 4)  # (B, heads, N, width / heads)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.out(mixed)
        return tokens + self.mlp(self.mlp_norm(tokens))


class VisionTransformer(nn.Module):
    """Patches of 4 x 4 pixels as tokens, with learned positions; the mean of the normalised tokens."""

    PATCH = 4

    def __init__(self, width: int, depth: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, self.PATCH, self.PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn((IMAGE_SIZE // self.PATCH) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions  # (B, N, width)
        return self.norm(self.blocks(tokens)).mean(1)


def vision_transformer() -> JudgeNetwork:
    """Four blocks of width 128."""
    return JudgeNetwork(VisionTransformer(width=128, depth=4, heads=4, hidden=256), 128)


NETWORKS: dict[str, Callable[[], JudgeNetwork]] = {
    "emoji32-plain-v1": plain_cnn,
    "emoji32-residual-v1": residual_cnn,
    "emoji32-vit-v1": vision_transformer,
}


def build(name: str) -> JudgeNetwork:
    """The untrained network of a judge, on the meta device: without weights and without drawing random numbers."""
    with torch.device("meta"):
        return NETWORKS[name]()
