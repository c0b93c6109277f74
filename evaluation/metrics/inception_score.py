"""Inception score with any extractor's classifier: exp of the mutual information between image and predicted class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixlat.evaluation.protocols.identity import IS_SHUFFLE_SEED, IS_SPLITS


@dataclass(frozen=True)
class InceptionScore:
    value: float  # mean over splits
    se: float  # standard deviation over splits / sqrt(splits)


def inception_score(logits: Tensor, generator: str = "PCG64", weights: Tensor | None = None) -> InceptionScore:
    """IS = exp E_x KL(p(y|x) || p(y)) in each of ten parts of a shuffled set; logits (n, C) with n >= IS_SPLITS.

    weights: (n,) of the images in both means, default 1.

    The shuffle has a fixed seed. Without it, each part of class-sorted images would contain only few classes, which
    limits the score. generator: the NumPy generator of the shuffle; RandomState gives the parts of torch-fidelity.
    """
    order = torch.from_numpy(shuffled(len(logits), generator))
    w = torch.ones(len(logits), dtype=torch.float64) if weights is None else weights.double()
    parts = (each[order].tensor_split(IS_SPLITS) for each in (logits.double().softmax(1), w))
    scores = torch.tensor([split_score(p, some) for p, some in zip(*parts, strict=True)], dtype=torch.float64)
    return InceptionScore(float(scores.mean()), float(scores.std()) / IS_SPLITS**0.5)


def shuffled(n: int, generator: str) -> NDArray[np.int64]:
    """A fixed permutation of n positions from NumPy's PCG64 or RandomState."""
    if generator == "RandomState":
        return np.random.RandomState(IS_SHUFFLE_SEED).permutation(n)
    return np.random.Generator(np.random.PCG64(IS_SHUFFLE_SEED)).permutation(n)


def split_score(p: Tensor, weights: Tensor | None = None) -> float:
    """exp of the mean KL divergence of the rows of p (n, C) from their mean; 0 log 0 = 0."""
    w = p.new_ones(len(p)) if weights is None else weights
    share = w / w.sum()
    divergence = torch.xlogy(p, p) - torch.xlogy(p, share @ p)
    return float((share @ divergence.sum(1)).exp())
