"""Classifier-free guidance that runs no branch whose result is not used."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def classifier_free(
    predict: Callable[[Tensor, Tensor], Tensor], z: Tensor, labels: Tensor, null_label: int, scale: float
) -> Tensor:
    """u + scale (c - u), where c = predict(z, labels) and u = predict(z, null); with scale 1, c alone.

    Both branches share one forward of the doubled batch, conditional half first. Whatever is affine in the prediction
    at a given z (data, noise, velocity, drift) may be guided before or after its conversion alike.
    """
    if scale == 1.0:
        return predict(z, labels)
    nulls = torch.full_like(labels, null_label)
    conditional, unconditional = predict(torch.cat((z, z)), torch.cat((labels, nulls))).chunk(2)
    return unconditional + scale * (conditional - unconditional)
