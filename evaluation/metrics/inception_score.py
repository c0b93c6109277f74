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


def inception_score(logits: Tensor, generator: str = "PCG64") -> InceptionScore:
    """IS = exp E_x KL(p(y|x) || p(y)) in each of ten parts of a shuffled set; logits (n, C) with n >= IS_SPLITS.

    The shuffle has a fixed seed. Without it, each part of class-sorted images would contain only few classes, which
    limits the score. generator: the NumPy generator of the shuffle; RandomState gives the parts of torch-fidelity.
    """
    order = shuffled(len(logits), generator)
    p = logits.double().softmax(1)[torch.from_numpy(order)]
    scores = torch.tensor([split_score(part) for part in torch.tensor_split(p, IS_SPLITS)], dtype=torch.float64)
    return InceptionScore(float(scores.mean()), float(scores.std()) / IS_SPLITS**0.5)


def shuffled(n: int, generator: str) -> NDArray[np.int64]:
    """A fixed permutation of n positions from NumPy's PCG64 or RandomState."""
    if generator == "RandomState":
        return np.random.RandomState(IS_SHUFFLE_SEED).permutation(n)
    return np.random.Generator(np.random.PCG64(IS_SHUFFLE_SEED)).permutation(n)


def split_score(p: Tensor) -> float:
    """exp of the mean KL divergence of the rows of p (n, C) from their mean; 0 log 0 = 0."""
    divergence = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))
    return float(divergence.sum(1).mean().exp())
