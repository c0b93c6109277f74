"""The interface of frozen encoders. Methods generate their tokens (RAE) or align with them (REPA, REG, DSD)."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from pixlat.common.errors import UserError
from pixlat.common.frozen.base import IMAGENET_MEAN, IMAGENET_STD, Frozen, channel_constants

Triple = tuple[float, float, float]
NORM_EPS = 1e-6


class Representation(NamedTuple):
    """The output of an encoder for a batch of images, in float32."""

    tokens: Tensor  # (B, C, h, w), rows first
    pooled: Tensor  # (B, C'): the class token, or a mean over positions if the encoder has none


class RepresentationEncoder(Frozen):
    """Maps images (B, 3, S, S) in [-1, 1] to tokens, without gradients; the blocks run under the caller's autocast."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, name: str, channels: int, pixel_mean: Triple = IMAGENET_MEAN, pixel_std: Triple = IMAGENET_STD
    ) -> None:
        super().__init__()
        self.name = name
        self.channels = channels  # channels of one token
        self.pooled_channels = channels
        self.pixel_mean, self.pixel_std = pixel_mean, pixel_std  # of the network's input, for RGB in [0, 1]
        self.register_buffer("mean", channel_constants(pixel_mean), persistent=False)
        self.register_buffer("std", channel_constants(pixel_std), persistent=False)

    def grid(self, image_size: int) -> int:
        """Tokens per side for square images of `image_size` pixels; UserError if the encoder cannot divide the size."""
        raise NotImplementedError

    def represent(self, images: Tensor) -> Representation:
        """Tokens and pooled features of images (B, 3, S, S) in [-1, 1], by one forward pass."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """The tokens (B, C, h, w) of images (B, 3, S, S) in [-1, 1]."""
        return self.represent(images).tokens

    def pooled(self, images: Tensor) -> Tensor:
        """The pooled features (B, C') of images (B, 3, S, S) in [-1, 1]."""
        return self.represent(images).pooled


def as_map(tokens: Tensor) -> Tensor:
    """Reshapes tokens (B, N, C) of a square grid, rows first, to (B, C, h, w)."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side)).float()


def resize_bicubic(images: Tensor, size: int) -> Tensor:
    """Resizes to size x size, bicubically in float32, without antialiasing and clipping, as the papers do."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images.float(), size=(size, size), mode="bicubic", align_corners=False)


def grid_of_16(name: str, image_size: int) -> int:
    if image_size % 16:
        raise UserError(
            f"the encoder {name} has one token for 16 x 16 pixels, but data.image_size={image_size} "
            "is not a multiple of 16. Choose a size that is."
        )
    return image_size // 16
