"""Random crops for pMF's perceptual terms, and the matrices that resize them.

The boxes are drawn separately from the cropping, so that both images of a comparison get the same crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pixlat.common.maths.float32 import without_autocast

MIN_AREA = 0.08  # smallest area of a crop, as a share of the image
MAX_ASPECT = 4 / 3  # largest width / height; the smallest is its inverse


@dataclass(frozen=True)
class CropBoxes:
    """One box per sample; each field is (B,), in whole pixels stored as floats."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor

    def at(self, positions: Tensor) -> CropBoxes:
        """The boxes of the samples at these positions (K,)."""
        return CropBoxes(self.top[positions], self.left[positions], self.height[positions], self.width[positions])


def draw_crops(n: int, size: int, device: torch.device | str) -> CropBoxes:
    """Draws n boxes in square images of `size` pixels from torch's global generator.

    The area is uniform in [0.08, 1] of the image, and the aspect log-uniform between 3/4 and 4/3. Sides are rounded
    half to even and clipped to the image (torchvision draws again instead). The position is uniform over all whole
    pixels.
    """
    area, log_aspect, top, left = torch.rand(4, n, device=device)
    area = (MIN_AREA + (1 - MIN_AREA) * area) * size**2
    aspect = torch.exp(math.log(MAX_ASPECT) * (2 * log_aspect - 1))
    width = (area * aspect).sqrt().round().clamp(1, size)
    height = (area / aspect).sqrt().round().clamp(1, size)
    return CropBoxes(_uniform_integer(top, size - height), _uniform_integer(left, size - width), height, width)


def _uniform_integer(u: Tensor, highest: Tensor) -> Tensor:
    """Maps u, uniform in [0, 1), to an integer 0 ... highest; the minimum guards against a product rounded up."""
    return torch.minimum((u * (highest + 1)).floor(), highest)


def paired_crop(images: Sequence[Tensor], box: CropBoxes, size: int) -> list[Tensor]:
    """Crops each batch (B, C, S, S) to the boxes of its samples and resizes it to (B, C, size, size).

    All batches pass the same linear map. The kernel is Keys' cubic (a = -0.5), widened by the ratio of the sizes if
    the box is larger than `size`. It runs over the whole image: it also uses pixels outside the box within its reach,
    and at the image's edge the weights are scaled to sum 1. So this differs from cropping and then resizing.
    """
    side = images[0].shape[-1]
    with without_autocast(images[0]):
        rows = resampling_matrices(box.top, box.height, side, size)[:, None]
        columns = resampling_matrices(box.left, box.width, side, size)[:, None].mT
        return [rows @ image.float() @ columns for image in images]


def resampling_matrices(offset: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """The weights (B, size, side) of `side` input pixels in `size` output pixels.

    The output pixels cover [offset, offset + length); offset and length are (B,).
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
