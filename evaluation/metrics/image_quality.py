"""PSNR and SSIM of 8-bit images, computed in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pixlat.evaluation.protocols.identity import PSNR_CAP, SSIM_K1, SSIM_K2, SSIM_SIGMA, SSIM_WINDOW

DATA_RANGE = 255.0


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """(B,) dB: 10 log10(255^2 / MSE) over all pixels and channels of uint8 images (B, C, H, W), at most PSNR_CAP."""
    mse = (images.double() - originals.double()).square().flatten(1).mean(1)
    return (10 * (DATA_RANGE**2 / mse).log10()).clamp_max(PSNR_CAP)


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """(B,) structural similarity (Wang et al. 2004) of uint8 images (B, C, H, W), H and W at least 11.

    SSIM = (2 mx my + c1)(2 sxy + c2) / ((mx^2 + my^2 + c1)(sx^2 + sy^2 + c2)) with c = (K 255)^2. The moments are those
    of windows of 11 x 11 pixels inside the image, weighted by a Gaussian of sigma 1.5. The result is the mean over
    windows and channels.
    """
    x, y = images.double(), originals.double()
    c1, c2 = (SSIM_K1 * DATA_RANGE) ** 2, (SSIM_K2 * DATA_RANGE) ** 2
    mx, my = window_mean(x), window_mean(y)
    vx, vy, cov = window_mean(x * x) - mx * mx, window_mean(y * y) - my * my, window_mean(x * y) - mx * my
    similarity = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return similarity.flatten(1).mean(1)


def window_mean(x: Tensor) -> Tensor:
    """The Gaussian mean around every pixel whose window is inside: (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    position = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    weight = (-position.square() / (2 * SSIM_SIGMA**2)).exp()
    weight = weight / weight.sum()
    planes = x.flatten(0, 1)[:, None]
    planes = F.conv2d(F.conv2d(planes, weight[None, None, :, None]), weight[None, None, None, :])
    return planes.view(*x.shape[:2], *planes.shape[-2:])
