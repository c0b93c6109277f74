"""Memorisation: how near generated images are to training images, compared with real images that nobody has seen.

The distance of an image is the Euclidean distance of its features to those of its nearest training image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pixlat.evaluation.features.feature_sets import balanced_weights, jackknife_groups
from pixlat.evaluation.metrics.jackknife import Estimate, jackknife
from pixlat.evaluation.metrics.prdc import BLOCK, squared_distances
from pixlat.evaluation.protocols.identity import COPY_QUANTILE, JACKKNIFE_GROUPS


@dataclass(frozen=True)
class Distances:
    """Distances (n,) float64 to the nearest training image. Every class weighs alike."""

    values: Tensor
    labels: Tensor | None  # (n,) int64; None: not known, and every image weighs alike

    @cached_property
    def weights(self) -> Tensor:
        return balanced_weights(self.labels, len(self.values))

    def without(self, group: int) -> Distances:
        """Without the images of one jackknife group."""
        kept = jackknife_groups(self.labels, len(self.values)) != group
        return Distances(self.values[kept], None if self.labels is None else self.labels[kept])

    def mean(self) -> float:
        return float((self.weights * self.values).sum() / self.weights.sum())

    def quantile(self, share: float) -> float:
        """The smallest distance that at least this share of the images, by weight, does not exceed."""
        order = self.values.argsort()
        below = self.weights[order].cumsum(0) / self.weights.sum()
        return float(self.values[order][(below >= share).nonzero()[0, 0]])

    def share_below(self, limit: float) -> float:
        """The share of the images, by weight, whose distance does not exceed the limit."""
        return float(self.weights[self.values <= limit].sum() / self.weights.sum())


@dataclass(frozen=True)
class Comparison:
    """A statistic of generated images relative to held-out images, with both parts of its error."""

    estimate: Estimate  # jackknife over the generated images
    se_real: float  # jackknife over the held-out images, which all rows of a table share


def nearest_distances(features: Tensor, training: Tensor) -> Tensor:
    """(n,) float64: the distance of each of the features (n, D) to the nearest training features (m, D)."""
    # squared distances come from dot products, where a common offset would only cost precision
    centre = training.double().mean(0)
    real = training.double() - centre
    blocks = (features.double() - centre).split(BLOCK)
    return torch.cat([squared_distances(block, real).min(1).values for block in blocks]).sqrt()


def memorisation(generated: Distances, heldout: Distances) -> Comparison:
    """The mean distance of generated images divided by that of held-out images.

    1: as far from the training images as unseen real images are; 0: exact copies of training images.
    """
    return _compared(generated, heldout, lambda images, real: images.mean() / real.mean())


def copies(generated: Distances, heldout: Distances) -> Comparison:
    """The share of generated images that are at least as near to a training image as the nearest held-out images.

    "Nearest" are the COPY_QUANTILE nearest. Of unseen real images the share is COPY_QUANTILE, of copies it is 1.
    """
    return _compared(generated, heldout, lambda images, real: images.share_below(real.quantile(COPY_QUANTILE)))


def _compared(
    generated: Distances, heldout: Distances, statistic: Callable[[Distances, Distances], float]
) -> Comparison:
    value = statistic(generated, heldout)
    groups = range(JACKKNIFE_GROUPS)
    over_generated = jackknife(value, [statistic(generated.without(g), heldout) for g in groups])
    over_heldout = jackknife(value, [statistic(generated, heldout.without(g)) for g in groups])
    return Comparison(over_generated, over_heldout.se)
