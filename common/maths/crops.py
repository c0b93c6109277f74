"""The random crops under which pMF compares images, and the matrices that resize them.

A crop is drawn first and cut second, so that all images of a comparison are cut alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pixlat.common.maths.float32 import without_autocast

MIN_AREA = 0.08  # of the image
MAX_ASPECT = 4 / 3  # width / height, and its inverse


@dataclass(frozen=True)
class CropBoxes:
    """One box a sample, each (B,) in whole pixels; held as floats."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor

    def at(self, positions: Tensor) -> CropBoxes:
        """The boxes of some samples, by position (K,)."""
        return CropBoxes(self.top[positions], self.left[positions], self.height[positions], self.width[positions])


def draw_crops(n: int, size: int, device: torch.device | str) -> CropBoxes:
    """Random boxes in square images of `size` pixels, from torch's global generator.

    Area uniform in [0.08, 1] of the image, log aspect uniform between 3/4 and 4/3, sides rounded half to even
    and clipped to the image (torchvision's would try again), place uniform over all whole pixels.
    """
    area, log_aspect, top, left = torch.rand(4, n, device=device)
    area = (MIN_AREA + (1 - MIN_AREA) * area) * size**2
    aspect = torch.exp(math.log(MAX_ASPECT) * (2 * log_aspect - 1))
    width = (area * aspect).sqrt().round().clamp(1, size)
    height = (area / aspect).sqrt().round().clamp(1, size)
    return CropBoxes(_uniform_integer(top, size - height), _uniform_integer(left, size - width), height, width)


def _uniform_integer(u: Tensor, highest: Tensor) -> Tensor:
    """0 ... highest from u uniform in [0, 1), whose product may round up to the next integer."""
    return torch.minimum((u * (highest + 1)).floor(), highest)


def paired_crop(images: Sequence[Tensor], box: CropBoxes, size: int) -> list[Tensor]:
    """Each batch (B, C, S, S) cropped to its samples' boxes and resized to (B, C, size, size),
    by one linear map for all batches.

    Keys' cubic (a = -0.5), widened by the ratio of the sizes where the box is larger than `size`, over the whole image:
    pixels beside the box count where the kernel reaches them, and at the image's edge the weights are scaled to sum 1.
    This is not the same as cropping and then resizing.
    """
    side = images[0].shape[-1]
    with without_autocast(images[0]):
        rows = resampling_matrices(box.top, box.height, side, size)[:, None]
        columns = resampling_matrices(box.left, box.width, side, size)[:, None].mT
        return [rows @ image.float() @ columns for image in images]


def resampling_matrices(offset: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """(B, size, side): the weights of `side` input pixels in `size` output pixels that cover [offset,
    offset + length), both (B,).
    """
    ratio = (length / size)[:, None, None]
    outputs = torch.arange(size, device=offset.device)[:, None]
    centres = (outputs + 0.5) * ratio + offset[:, None, None] - 0.5
    distances = (centres - torch.arange(side, device=offset.device)).abs() / ratio.clamp(min=1)
    weights = keys_cubic(distances)
    return weights / weights.sum(dim=-1, keepdim=True)


def keys_cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5 at distances x >= 0."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
