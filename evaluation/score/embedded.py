"""The embedded protocol: streams images through the extractor and computes every metric with its error bar."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixlat.common.config.resolve import sampling_seeds
from pixlat.common.errors import UserError
from pixlat.common.precision import executed_precision
from pixlat.common.progress import progress_bar
from pixlat.evaluation.features.collect import Collected, ImageBatch, batches, collect
from pixlat.evaluation.features.extractor import EmbeddedExtractor, Extractor
from pixlat.evaluation.features.feature_sets import FeatureSet, feature_set
from pixlat.evaluation.features.moments import Moments
from pixlat.evaluation.features.ranks import rank_and_size
from pixlat.evaluation.metrics.class_accuracy import fit_discriminant
from pixlat.evaluation.metrics.frechet import Factored, factorise, frechet_distance, frechet_distance_few
from pixlat.evaluation.metrics.inception_score import inception_score
from pixlat.evaluation.metrics.jackknife import Estimate, jackknife
from pixlat.evaluation.metrics.kid import KernelDistance, kernel_distance
from pixlat.evaluation.metrics.prdc import prdc
from pixlat.evaluation.metrics.spread import over_seeds
from pixlat.evaluation.protocols.identity import JACKKNIFE_GROUPS, MAX_NEIGHBOURS, UINT8_RULES, embedded_protocol
from pixlat.evaluation.records.record import Metric
from pixlat.evaluation.score.generate import Drawing, balanced_labels, generate

if TYPE_CHECKING:
    from pixlat.common.config.schema import RunConfig
    from pixlat.common.datasets.load import DataSource
    from pixlat.common.images.image_set import ImageSet
    from pixlat.methods.base import Method

MIN_IMAGES = JACKKNIFE_GROUPS


@dataclass(frozen=True)
class Reference:
    """Features of the real images: of the training split, and of the held-out split if there is one."""

    train: FeatureSet
    heldout: FeatureSet | None


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation that go into the record."""

    protocol: dict[str, Any]
    metrics: dict[str, Metric]
    sampling_seconds: float  # time in which this process made its share of the images of all seeds
    images_made: int = 0  # number of images that this process made in this time
    drawing_seconds: float = 0.0  # the part of this time in which samplers waited for random numbers


def evaluate(
    images: Iterable[ImageBatch], labels: NDArray[np.int64] | int, extractor: Extractor, reference: Reference
) -> dict[str, Metric]:
    """All metrics of n generated images, n at least 20. Every process gets the same result.

    labels: (n,) the classes that the images should show; or only the number n, if these are not known.

    The metrics are fd_embedded, fd_floor (the distance of held-out real images from the same reference), kid, is,
    precision, recall, density and coverage; with labels also class_accuracy, and class_accuracy_real, the classifier's
    accuracy on held-out real images.
    """
    n = labels if isinstance(labels, int) else len(labels)
    check_enough("generated", n)
    check_enough("training", len(reference.train.labels))
    generated = collect(images, n, extractor)
    train = factorise(reference.train.moments.total())
    metrics = {"fd_embedded": frechet_metric(frechet_estimate(generated, train), n, train.regularised)}
    if reference.heldout is not None:
        metrics["fd_floor"] = floor_metric(reference.heldout.moments, train)
    metrics |= sample_metrics(generated, reference.train)
    return (
        metrics
        if isinstance(labels, int)
        else metrics | classifier_metrics(generated.features, torch.from_numpy(labels), reference)
    )


def check_enough(kind: str, num_images: int) -> None:
    """Raises UserError if there are too few images for the error bars."""
    if num_images < MIN_IMAGES:
        raise UserError(f"An evaluation needs at least {MIN_IMAGES} {kind} images, but there are {num_images}.")


def frechet_estimate(generated: Collected, reference: Factored) -> Estimate:
    """The distance of all images. The jackknife over K groups (index mod K) gives its bias and its error."""
    features, moments = generated.features, generated.moments
    if len(features) > features.shape[1]:
        return jackknife(
            frechet_distance(moments.total(), reference), [frechet_distance(g, reference) for g in moments.left_out()]
        )
    group = torch.arange(len(features)) % JACKKNIFE_GROUPS
    left_out = [frechet_distance_few(features[group != g], reference) for g in range(JACKKNIFE_GROUPS)]
    return jackknife(frechet_distance_few(features, reference), left_out)


def floor_metric(heldout: Moments, reference: Factored) -> Metric:
    """The distance of held-out real images from the reference.

    Their number differs from the number of generated images, so compare bias-corrected values.
    """
    estimate = jackknife(
        frechet_distance(heldout.total(), reference), [frechet_distance(g, reference) for g in heldout.left_out()]
    )
    return {
        **frechet_metric(estimate, int(heldout.count.sum()), reference.regularised),
        "n_eff": heldout.effective_number,
    }


def frechet_metric(estimate: Estimate, n: int, regularised: bool) -> Metric:
    """The record's entry for a Fréchet distance. regularised: the reference's covariance was not positive definite."""
    left_out = list(estimate.left_out)
    return {
        "value": estimate.value, "value_bc": estimate.value_bc, "se": estimate.se, "left_out": left_out,
        "n": n, "unit": "feature^2", "regularised": regularised,
    }  # fmt: skip


def kid_metric(kid: KernelDistance, n: int) -> Metric:
    """The record's entry for KID, which is unbiased and needs no bias-corrected value."""
    entry = {"value": kid.value, "value_bc": None, "se": kid.se, "n": n, "unit": "1"}
    return entry | ({"left_out": list(kid.left_out)} if kid.left_out else {})


def sample_metrics(generated: Collected, train: FeatureSet) -> dict[str, Metric]:
    """kid, is, precision, recall, density, coverage.

    Labels are shuffled, so the first images represent all images.
    """
    n = len(generated.features)
    kid = kernel_distance(generated.features, train.features, train.weights)
    score = inception_score(generated.logits)
    near = prdc(generated.features[:MAX_NEIGHBOURS], train.features)
    return {
        "kid": kid_metric(kid, n),
        "is": {"value": score.value, "value_bc": None, "se": score.se, "n": n, "unit": "1"},
        "precision": mean_metric(near.precision),
        "recall": mean_metric(near.recall, train.weights),
        "density": mean_metric(near.density),
        "coverage": mean_metric(near.coverage, train.weights),
    }


def mean_metric(values: Tensor, weights: Tensor | None = None) -> Metric:
    """The record's entry for the mean of per-image values (n,).

    The standard error assumes independent images. With weights, which only reference images have, there is none.
    """
    n = len(values)
    mean = values.mean() if weights is None else (weights * values).sum() / weights.sum()
    se = None if weights is not None else float(values.std()) / n**0.5
    return {"value": float(mean), "value_bc": None, "se": se, "n": n, "unit": "1"}


def classifier_metrics(features: Tensor, labels: Tensor, reference: Reference) -> dict[str, Metric]:
    """class_accuracy, and class_accuracy_real if there are held-out images. No metric for data of a single class."""
    train, heldout = reference.train, reference.heldout
    if len(train.labels.unique()) < 2:
        return {}
    classifier = fit_discriminant(train.features, train.labels, train.weights)
    metrics = {"class_accuracy": mean_metric(classifier.correct(features, labels))}
    if heldout is not None:
        metrics["class_accuracy_real"] = mean_metric(
            classifier.correct(heldout.features, heldout.labels), heldout.weights
        )
    return metrics


# -- a run -------------------------------------------------------------------------------------------------------------


def evaluate_method(
    method: Method,
    run: RunConfig,
    source: DataSource,
    device: torch.device | str,
    cache: Path,
    seeds: Sequence[int] | None = None,
) -> Evaluation:
    """Samples `run.eval.num_images` images from a method and compares them with its data set.

    Every process must call it. cache: folder for the features of the real images, which all runs share. seeds: sampling
    seeds, by default those of the run; with several, each seed gives a set of images, and metrics are means over them.
    """
    check_enough("generated", run.eval.num_images)
    extractor = EmbeddedExtractor(device)
    reference = load_reference(source, extractor, cache)
    clock, parts = Clock(), []
    for seed in seeds or sampling_seeds(run):
        labels = balanced_labels(run.eval.num_images, source.info.num_classes, seed)
        images = generate(
            method,
            run.sample,
            labels,
            seed,
            run.eval.batch,
            device,
            run.eval.precision,
            run.eval.uint8,
            drawing=clock.drawing,
        )
        parts.append(evaluate(progress(clock.timed(images), len(labels), "evaluating"), labels, extractor, reference))
    made = {
        "uint8_rule": UINT8_RULES[run.eval.uint8],
        "precision": executed_precision(run.eval.precision, torch.device(device)),
    }
    protocol = data_protocol(extractor, source, reference, run.eval.num_images, **made)
    return Evaluation(protocol, over_seeds(parts), clock.seconds, clock.images, clock.drawing.seconds)


def data_protocol(
    extractor: Extractor, source: DataSource, reference: Reference, num_images: int, uint8_rule: str, precision: str
) -> dict[str, Any]:
    """The embedded protocol for a data set. uint8_rule and precision describe how the images were generated."""
    heldout_digest = source.heldout.digest if reference.heldout else None
    info, train = source.info, source.train
    sizes = (len(train), info.image_size, num_images)
    return embedded_protocol(
        extractor, info.name, train.digest, heldout_digest, *sizes, uint8_rule, precision, train.decoding
    )


def load_reference(source: DataSource, extractor: Extractor, cache: Path) -> Reference:
    """The features of both splits, from the cache if it has them."""

    def features_of(images: ImageSet, name: str) -> FeatureSet:
        stream = progress(batches(images.fetch, len(images)), len(images), f"features of {name} images")
        identity = images.digest if images.decoding is None else f"{images.digest}/{images.decoding}"
        return feature_set(stream, images.labels, extractor, identity, cache)

    enough = len(source.heldout) >= MIN_IMAGES
    return Reference(features_of(source.train, "training"), features_of(source.heldout, "held-out") if enough else None)


class Clock:
    """Measures the time in which this process makes images, without their evaluation, and counts the images."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.images = 0
        self.drawing = Drawing()  # pass it to `generate`, which adds the time that samplers wait for random numbers

    def timed(self, stream: Iterator[ImageBatch]) -> Iterator[ImageBatch]:
        """The same batches, on the CPU. The copy to the CPU makes the measured time include all work of a GPU."""
        while True:
            start = time.perf_counter()
            batch = next(stream, None)
            if batch is None:
                return
            images, indices = batch[0].cpu(), batch[1]
            self.seconds += time.perf_counter() - start
            self.images += len(indices)
            yield images, indices


def progress(stream: Iterable[ImageBatch], total: int, title: str) -> Iterator[ImageBatch]:
    """The same batches. The first process shows a progress bar on stderr."""
    rank, ranks = rank_and_size()
    with progress_bar(title, total, enabled=rank == 0) as bar:
        for images, indices in stream:
            yield images, indices
            bar.update(min(len(indices) * ranks, total - bar.n))
