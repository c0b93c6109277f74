"""How many directions a set of latents fills: effective rank, spread between images,
degrees of freedom above the noise.

Latents are tokens (B, N, C): B images, N positions, C channels.
The matrix that is measured has a row for each token, so it is (B N, C).
"""

from __future__ import annotations

import torch
from torch import Tensor


def between_images(tokens: Tensor) -> Tensor:
    """Tokens less their position's mean over the images."""
    return tokens - tokens.mean(dim=0)


def covariance(tokens: Tensor) -> Tensor:
    """(C, C) float64: the second moments of `between_images`, without bias for B images (at least 2)."""
    rows = between_images(tokens.double()).flatten(0, 1)
    return rows.T @ rows / (len(rows) - tokens.shape[1])


def effective_rank(tokens: Tensor) -> Tensor:
    """exp(-sum p_i ln p_i), p_i the singular values of the matrix divided by their sum (Roy
    and Vetterli 2007); between 1 and C.

    The matrix is not centred: latents that are all the same have rank 1. Centred they have none,
    and a constant with a little noise around it looks full.
    """
    rows = tokens.double().flatten(0, 1)
    values = torch.linalg.eigvalsh(rows.T @ rows).clamp(min=0).sqrt()
    return torch.special.entr(values / values.sum()).sum().exp()


def latent_health(tokens: Tensor) -> dict[str, Tensor]:
    """Scalars that tell latents of at least two images from collapsed ones.

    erank                     effective rank; erank_share is its share of C
    latent_rms                root mean square of all numbers
    std_between               the same of what differs between images
    channel_std_min, _max     and this for the channel that differs least and most
    edof                      sum l / (1 + l) over the eigenvalues l of the covariance:
                              directions that stand out from noise of unit variance
    """
    rank, spread = effective_rank(tokens), covariance(tokens)
    channels = spread.diagonal().clamp(min=0)
    eigenvalues = torch.linalg.eigvalsh(spread).clamp(min=0)
    found = {
        "erank": rank,
        "erank_share": rank / tokens.shape[-1],
        "latent_rms": tokens.double().square().mean().sqrt(),
        "std_between": channels.mean().sqrt(),
        "channel_std_min": channels.min().sqrt(),
        "channel_std_max": channels.max().sqrt(),
        "edof": (eigenvalues / (1 + eigenvalues)).sum(),
    }
    return {name: value.float() for name, value in found.items()}
