"""One judge's metrics of a set of images, each beside what held-out real images reach.

A Fréchet or kernel distance is divided by the distance of equally many held-out images with equal class weights
(equal_sets.py). The ratio says how many times as far from the training images the generated images are as real images
that nobody has seen. The distances to the held-out images are divided by those of equally many training images. The
larger ratio counts, because copies of training images are near to these and no nearer to others than real images are.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import torch
from numpy.typing import NDArray
from torch import Tensor

from pixlat.evaluation.features.extractor import one_thread
from pixlat.evaluation.features.feature_sets import FeatureSet, balanced_weights, jackknife_groups
from pixlat.evaluation.features.moments import Moments
from pixlat.evaluation.judges.panel import Judge
from pixlat.evaluation.metrics.class_accuracy import LinearDiscriminant, fit_discriminant
from pixlat.evaluation.metrics.entries import balanced_metric, frechet_metric, plain_metric
from pixlat.evaluation.metrics.frechet import SMALL, Factored, factorise, frechet_distance, frechet_distance_few
from pixlat.evaluation.metrics.inception_score import inception_score
from pixlat.evaluation.metrics.jackknife import Estimate, jackknife
from pixlat.evaluation.metrics.kid import KernelReference
from pixlat.evaluation.metrics.neighbours import Distances, copies, memorisation, nearest_distances
from pixlat.evaluation.metrics.prdc import prdc
from pixlat.evaluation.protocols.identity import JACKKNIFE_GROUPS, KID_COMPLETE_LIMIT, MAX_NEIGHBOURS
from pixlat.evaluation.records.record import Metric
from pixlat.evaluation.score.equal_sets import heldout_draws, training_draws


@dataclass(frozen=True)
class ImageFeatures:
    """A judge's features of generated images, or of real images in their place."""

    features: Tensor  # (n, D) float32
    logits: Tensor  # (n, C) float32; (n, 0) if they are not known
    labels: Tensor | None  # (n,) int64, the classes that the images should show; None: not known

    @property
    def weights(self) -> Tensor:
        """(n,) float64 with mean 1: classes weigh alike. Without labels, images do."""
        return balanced_weights(self.labels, len(self.features))

    @property
    def groups(self) -> Tensor:
        """(n,) int64: the jackknife groups."""
        return jackknife_groups(self.labels, len(self.features))

    def part(self, positions: Tensor | slice) -> ImageFeatures:
        labels = None if self.labels is None else self.labels[positions]
        return ImageFeatures(self.features[positions], self.logits[positions], labels)

    def blocks(self, size: int) -> list[ImageFeatures]:
        """Consecutive parts of `size` images; all images if there are fewer. The rest after the last part is unused."""
        size = min(size, len(self.features))
        return [self.part(slice(start, start + size)) for start in range(0, len(self.features) - size + 1, size)]


class Target:
    """A set of real images with which other sets are compared."""

    def __init__(self, real: FeatureSet) -> None:
        self.factored: Factored = factorise(real.moments.total())
        kept = real.limited(MAX_NEIGHBOURS)
        self.kernel = KernelReference(kept.features.double(), kept.weights)

    def frechet(self, images: ImageFeatures) -> Estimate:
        """The Fréchet distance of the images, with the jackknife over their groups."""
        groups, small = images.groups, images.features.shape[1] <= SMALL
        with one_thread() if small else nullcontext():  # threads gain nothing with small matrices, and wait for others
            left_out = [self._frechet(images.part(groups != g)) for g in range(JACKKNIFE_GROUPS)]
            return jackknife(self._frechet(images), left_out)

    def _frechet(self, images: ImageFeatures) -> float:
        """The distance with the class weights of these images, so that every class weighs alike in each part."""
        x = images.features
        if len(x) <= x.shape[1]:
            return frechet_distance_few(x, self.factored, images.weights)
        moments = Moments.zeros(x.shape[1], groups=1)
        moments.add(x, torch.zeros(len(x), dtype=torch.int64), images.weights)
        return frechet_distance(moments.total(), self.factored)

    def kernel_distance(self, images: ImageFeatures, plugin: bool) -> Estimate:
        """KID: the V-statistic (plugin), or the U-statistic, with the jackknife over the images' groups."""
        few = max(len(images.features), len(self.kernel.features)) <= KID_COMPLETE_LIMIT
        x = images.features.double() if few else images.features
        kernel = self.kernel if few else KernelReference(self.kernel.features.float(), self.kernel.weights)
        return jackknife(*kernel.statistic(x, images.weights, images.groups, plugin))


@dataclass(frozen=True)
class Floor:
    """What real images reach in the place of generated ones: the mean over draws of them, and its error."""

    value: float
    se: float

    @classmethod
    def of(cls, draws: Sequence[Estimate]) -> Floor:
        return cls(fmean(draw.value for draw in draws), sum(draw.se**2 for draw in draws) ** 0.5 / len(draws))


class Reals:
    """A judge's features of the training images and of the held-out images of a data set, for sets of n images."""

    def __init__(self, judge: Judge, train: FeatureSet, heldout: FeatureSet | None, n: int) -> None:
        """heldout: all their features; None if there are too few held-out images for a comparison."""
        self.judge, self.train, self.heldout = judge, train, heldout
        self.block = n if heldout is None else min(n, len(heldout.labels))
        self.near = train.limited(MAX_NEIGHBOURS)

    @cached_property
    def to_train(self) -> Target:
        return Target(self.train)

    @cached_property
    def to_heldout(self) -> Target:
        assert self.heldout is not None
        return Target(self.heldout)

    @cached_property
    def heldout_sets(self) -> list[ImageFeatures]:
        """Disjoint sets of held-out images, as many in each as are compared at once."""
        assert self.heldout is not None
        return [_images(self.heldout, draw) for draw in heldout_draws(self.heldout.labels.numpy(), self.block)]

    @cached_property
    def training_sets(self) -> list[ImageFeatures]:
        """Disjoint sets of training images with the class counts of the first held-out set."""
        wanted = self.heldout_sets[0].labels
        assert wanted is not None
        return [_images(self.train, draw) for draw in training_draws(self.train.labels.numpy(), wanted.numpy())]

    @cached_property
    def floors(self) -> dict[str, Floor]:
        """The floors of the four distances, by the names of `distances`."""
        return {
            "fd": Floor.of([self.to_train.frechet(images) for images in self.heldout_sets]),
            "fd_heldout": Floor.of([self.to_heldout.frechet(images) for images in self.training_sets]),
            "kid": Floor.of([self.to_train.kernel_distance(images, True) for images in self.heldout_sets]),
            "kid_heldout": Floor.of([self.to_heldout.kernel_distance(images, True) for images in self.training_sets]),
        }

    @cached_property
    def heldout_distances(self) -> Distances:
        assert self.heldout is not None
        return Distances(nearest_distances(self.heldout.features, self.near.features), self.heldout.labels)

    @cached_property
    def classifier(self) -> LinearDiscriminant | None:
        """Tells the data's classes from features; None if the data have only one class."""
        near = self.near
        return fit_discriminant(near.features, near.labels, near.weights) if len(near.labels.unique()) > 1 else None


def _images(real: FeatureSet, positions: NDArray) -> ImageFeatures:
    chosen = torch.from_numpy(positions)
    return ImageFeatures(real.features[chosen], real.logits[chosen], real.labels[chosen])


def judge_metrics(images: ImageFeatures, reals: Reals, data: str) -> dict[str, Metric]:
    """All metrics of one judge. data: the data set's name.

    fd and kid (distances from the training images), is, precision, recall, density and coverage; with labels also
    class_accuracy. If there are held-out images also fd_heldout, kid_heldout, fd_ratio with its two parts
    fd_ratio_train and fd_ratio_heldout, kid_ratio likewise, memorisation and copies.
    """
    metrics = distances(images, reals) | neighbour_metrics(images, reals)
    if reals.heldout is not None:
        metrics |= ratios(images, reals) | memory_metrics(images, reals)
    return metrics | accuracy(images, reals, data)


def real_metrics(reals: Reals, data: str) -> dict[str, Metric]:
    """The same metrics of held-out real images in the place of generated ones; empty without held-out images.

    The ratios are 1 by definition. The distances to the held-out images are those of training images.
    """
    if reals.heldout is None:
        return {}
    metrics = judge_metrics(reals.heldout_sets[0], reals, data)
    n = reals.block
    for name in ("fd", "kid"):
        floor, other = reals.floors[name], reals.floors[f"{name}_heldout"]
        unit = metrics[name]["unit"]
        if name == "fd":
            metrics[name] = {"value": floor.value, "value_bc": None, "se": floor.se, "n": n, "unit": unit}
        metrics[f"{name}_heldout"] = {"value": other.value, "value_bc": None, "se": other.se, "n": n, "unit": unit}
        parts = {f"{name}_ratio": (floor, other), f"{name}_ratio_train": (floor,), f"{name}_ratio_heldout": (other,)}
        for key, floors in parts.items():
            se = max(each.se / each.value for each in floors)
            metrics[key] = {"value": 1.0, "value_bc": None, "se": se, "n": n, "unit": "1"}
    return {name: {key: value for key, value in entry.items() if key != "left_out"} for name, entry in metrics.items()}


def over_blocks(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of estimates of equally large sets; their groups are left out together."""
    left_out = [fmean(values) for values in zip(*(each.left_out for each in estimates), strict=True)]
    return jackknife(fmean(each.value for each in estimates), left_out)


def distances(images: ImageFeatures, reals: Reals) -> dict[str, Metric]:
    """fd and kid: the distances from the training images. kid is the U-statistic, which may be negative."""
    blocks, target = images.blocks(reals.block), reals.to_train
    fd = over_blocks([target.frechet(block) for block in blocks])
    kid = over_blocks([target.kernel_distance(block, plugin=False) for block in blocks])
    return {
        "fd": frechet_metric(fd, reals.block, target.factored.regularised),
        "kid": plain_metric(kid, reals.block),
    }


def ratios(images: ImageFeatures, reals: Reals) -> dict[str, Metric]:
    """Each distance divided by its floor, the larger of the two ratios, and the distances to the held-out images."""
    blocks, metrics = images.blocks(reals.block), {}
    for name, measure in (
        ("fd", Target.frechet),
        ("kid", lambda target, block: Target.kernel_distance(target, block, plugin=True)),
    ):
        for suffix, target in (("", reals.to_train), ("_heldout", reals.to_heldout)):
            estimate = over_blocks([measure(target, block) for block in blocks])
            part = ratio(estimate, reals.floors[name + suffix], reals.block)
            metrics[f"{name}_ratio{suffix or '_train'}"] = part
            if name + suffix == "fd_heldout":
                metrics["fd_heldout"] = frechet_metric(estimate, reals.block, target.factored.regularised)
        metrics[f"{name}_ratio"] = larger(metrics[f"{name}_ratio_train"], metrics[f"{name}_ratio_heldout"])
    kid = over_blocks([reals.to_heldout.kernel_distance(block, plugin=False) for block in blocks])
    return metrics | {"kid_heldout": plain_metric(kid, reals.block)}


def ratio(estimate: Estimate, floor: Floor, n: int) -> Metric:
    """The entry of a distance divided by its floor, with both errors."""
    value = estimate.value / floor.value
    scaled = jackknife(value, [each / floor.value for each in estimate.left_out])
    return plain_metric(scaled, n, se_real=value * floor.se / floor.value)


def larger(first: Metric, second: Metric) -> Metric:
    """The entry with the larger value."""
    return first if first["value"] >= second["value"] else second


def memory_metrics(images: ImageFeatures, reals: Reals) -> dict[str, Metric]:
    """memorisation and copies, from the distances to the nearest training images."""
    found = Distances(nearest_distances(images.features, reals.near.features), images.labels)
    return {
        statistic.__name__: plain_metric(compared.estimate, len(images.features), compared.se_real)
        for statistic in (memorisation, copies)
        for compared in (statistic(found, reals.heldout_distances),)
    }


def neighbour_metrics(images: ImageFeatures, reals: Reals) -> dict[str, Metric]:
    """is, precision, recall, density and coverage. Labels are in random order, so the first images represent all."""
    few = images.part(slice(MAX_NEIGHBOURS))
    near = prdc(few.features, reals.near.features)
    real = reals.near.weights

    def mean_of_reals(values: Tensor) -> Metric:
        mean = float((real * values).sum() / real.sum())
        return {"value": mean, "value_bc": None, "se": None, "n": len(values), "unit": "1"}

    return {
        **(inception(images) if images.logits.shape[1] else {}),
        "precision": balanced_metric(near.precision, few.labels),
        "recall": mean_of_reals(near.recall),
        "density": balanced_metric(near.density, few.labels),
        "coverage": mean_of_reals(near.coverage),
    }


def inception(images: ImageFeatures) -> dict[str, Metric]:
    """is, from the logits."""
    score = inception_score(images.logits, weights=images.weights)
    return {"is": {"value": score.value, "value_bc": None, "se": score.se, "n": len(images.logits), "unit": "1"}}


def accuracy(images: ImageFeatures, reals: Reals, data: str) -> dict[str, Metric]:
    """class_accuracy: by the judge's own classes if they are the data's, else by a linear discriminant."""
    if images.labels is None:
        return {}
    if reals.judge.labels_of == data:
        correct = (images.logits.argmax(1) == images.labels).double()
    elif reals.classifier is not None:
        correct = reals.classifier.correct(images.features, images.labels)
    else:
        return {}
    return {"class_accuracy": balanced_metric(correct, images.labels)}
