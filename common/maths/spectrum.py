"""Measures of how many directions a set of latents uses, and of collapse.

They are the effective rank, the spread between images and the degrees of freedom above the noise.
Latents are tokens (B, N, C): B images, N positions, C channels. The measured matrix (B N, C) has a row for each token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def between_images(tokens: Tensor) -> Tensor:
    """Subtracts from each token the mean over images at its position."""
    return tokens - tokens.mean(dim=0)


def covariance(tokens: Tensor) -> Tensor:
    """The covariance (C, C) float64 of `between_images`, an unbiased estimate from B >= 2 images."""
    rows = between_images(tokens.double()).flatten(0, 1)
    return rows.T @ rows / (len(rows) - tokens.shape[1])


def effective_rank(tokens: Tensor) -> Tensor:
    """exp(-sum p_i ln p_i), where p_i are the singular values divided by their sum (Roy and Vetterli 2007).

    It lies between 1 and C. The matrix is not centred, so latents that are all equal have rank 1. After centring
    their rank would be undefined, and a constant with a little noise would seem to have full rank.
    """
    rows = tokens.double().flatten(0, 1)
    values = torch.linalg.eigvalsh(rows.T @ rows).clamp(min=0).sqrt()
    return torch.special.entr(values / values.sum()).sum().exp()


def latent_health(tokens: Tensor) -> dict[str, Tensor]:
    """Scalars that show whether the latents of at least two images have collapsed.

    erank                     effective rank; erank_share is erank / C
    latent_rms                root mean square of all values
    std_between               root mean square of the deviations between images
    channel_std_min, _max     the same for the channel that deviates least and most
    edof                      sum l / (1 + l) over the eigenvalues l of the covariance:
                              the number of directions that stand out from noise of unit variance
    """
    rank, spread = effective_rank(tokens), covariance(tokens)
    channels = spread.diagonal().clamp(min=0)
    eigenvalues = torch.linalg.eigvalsh(spread).clamp(min=0)
    measures = {
        "erank": rank,
        "erank_share": rank / tokens.shape[-1],
        "latent_rms": tokens.double().square().mean().sqrt(),
        "std_between": channels.mean().sqrt(),
        "channel_std_min": channels.min().sqrt(),
        "channel_std_max": channels.max().sqrt(),
        "edof": (eigenvalues / (1 + eigenvalues)).sum(),
    }
    return {name: value.float() for name, value in measures.items()}
