"""Classifier-free guidance that skips the unconditional branch if its result is not needed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def classifier_free(
    predict: Callable[[Tensor, Tensor], Tensor], z: Tensor, labels: Tensor, null_label: int, scale: float
) -> Tensor:
    """u + scale (c - u), where c = predict(z, labels) and u = predict(z, null). With scale 1 only c is computed.

    Both branches run as one forward of a doubled batch, conditional half first. Quantities that are affine functions
    of the prediction at a given z (data, noise, velocity, drift) may be guided before or after the conversion.
    """
    if scale == 1.0:
        return predict(z, labels)
    nulls = torch.full_like(labels, null_label)
    conditional, unconditional = predict(torch.cat((z, z)), torch.cat((labels, nulls))).chunk(2)
    return unconditional + scale * (conditional - unconditional)
