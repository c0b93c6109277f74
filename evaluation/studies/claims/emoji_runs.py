"""Training on the embedded emoji, at any size, and the distance that samples reach there, for claims about images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pixlat.common.config.resolve import resolve
from pixlat.common.config.schema import DataConfig, RunConfig, TrainConfig
from pixlat.common.datasets.batches import TrainingPlan
from pixlat.common.datasets.load import DataSource, load_data
from pixlat.common.images.image_set import ArrayImages, ImageSet
from pixlat.evaluation.features.collect import batches, collect
from pixlat.evaluation.features.feature_sets import feature_set
from pixlat.evaluation.metrics.frechet import Factored, factorise, frechet_distance_few
from pixlat.evaluation.score.embedded import EmbeddedExtractor
from pixlat.evaluation.score.generate import balanced_labels, generate
from pixlat.evaluation.studies.claims.framework import Estimate
from pixlat.evaluation.studies.claims.training import fit
from pixlat.methods import get_class, get_spec
from pixlat.methods.base import Batch, DataInfo, Method

EVERY = 3  # of the training images, each third is in the reference: 1,533, more than the features' 320 dimensions
SAMPLES = 200
SIZE = 32
# a distance that shows some learning: untrained networks sample noise, which is 2,240 away at 32 pixels
LEARNED = 2000.0

# A JiT for minutes: 16 tokens, two blocks of width 64; a short sampler without guidance.
TINY_JIT = {
    "preset": "demo", "model.depth": "2", "model.width": "64", "model.heads": "4", "model.bottleneck": "0",
    "train.batch": "32", "train.lr": "2e-3",
    "train.warmup_images": "0", "sample.guidance": "1.0", "sample.steps": "5", "eval.num_images": str(SAMPLES),
}  # fmt: skip


def trained(name: str, settings: Mapping[str, str], seed: int, source: DataSource) -> tuple[Method, RunConfig]:
    """A method after its training, with the last weights, not an average; and its settings."""
    method, run = untrained(name, settings, seed, source)
    fit_on(method, source, run.train, seed)
    return method, run


def untrained(name: str, settings: Mapping[str, str], seed: int, source: DataSource) -> tuple[Method, RunConfig]:
    """The same before its training."""
    run = resolve(get_spec(name), {**settings, "seed": str(seed)})
    torch.manual_seed(seed)
    method = get_class(name)(run.model, DataInfo.of(source.info))
    method.load_external()
    return method, run


def fit_on(
    method: Method,
    source: DataSource,
    settings: TrainConfig,
    seed: int,
    watch: Callable[[int], object] = lambda step: None,
) -> list[float]:
    """Trains as `fit` does, on the images that a run of this seed would see,
    after what the method does before its training.
    """
    plan = TrainingPlan(source.train.labels, settings.batch, seed, source.balanced)

    def batch(step: int) -> Batch:
        indices, _ = plan.indices(step)
        return {
            "image": pixels(source.train, indices),
            "label": torch.from_numpy(source.train.labels[indices]),
            "index": torch.from_numpy(indices),
        }

    method.before_training(map(batch, count()))
    return fit(method, lambda step: method(method.phases[0], batch(step), step)["loss"], settings, seed, watch)


def pixels(images: ImageSet, indices: NDArray[np.int64]) -> torch.Tensor:
    """(B, 3, S, S) in [-1, 1]."""
    return torch.from_numpy(images.fetch(indices)).float() / 127.5 - 1


@cache
def emoji(size: int = SIZE) -> DataSource:
    """The embedded data set; other sizes than 32 are resized from it (bicubic,
    with a low pass where they are smaller).
    """
    source = load_data(DataConfig())
    if size == SIZE:
        return source
    info = replace(source.info, name=f"emoji{size}", image_size=size)
    return replace(source, info=info, train=resized(source.train, size), heldout=resized(source.heldout, size))


def few(source: DataSource, number: int) -> DataSource:
    """The data set with this many training images, spread evenly over the order in which they are stored."""
    images = source.train
    chosen = np.linspace(0, len(images) - 1, number).astype(np.int64)
    part = ArrayImages(images.fetch(chosen), images.labels[chosen], f"{images.identity}/{number} of them")
    return replace(source, info=replace(source.info, num_train=number), train=part)


def resized(images: ImageSet, size: int) -> ArrayImages:
    """The same images at another size."""
    whole = torch.from_numpy(images.fetch(np.arange(len(images)))).float()
    scaled = (
        F.interpolate(whole, size=(size, size), mode="bicubic", antialias=True).round().clamp(0, 255).to(torch.uint8)
    )
    return ArrayImages(scaled.numpy(), images.labels, f"{images.identity}/bicubic {size}")


@cache
def emoji_reference(size: int, folder: Path) -> tuple[EmbeddedExtractor, Factored]:
    """The embedded extractor and the moments of a third of the training emoji, classes weighted alike;
    their features are kept in `folder`.
    """
    extractor, images = EmbeddedExtractor("cpu"), emoji(size).train
    chosen = np.arange(0, len(images), EVERY)
    stream = batches(lambda places: images.fetch(chosen[places.start : places.stop]), len(chosen))
    return extractor, factorise(
        feature_set(stream, images.labels[chosen], extractor, f"{images.digest}/{EVERY}", folder).moments.total()
    )


def emoji_distance(method: Method, run: RunConfig, folder: Path) -> float:
    """Embedded Fréchet distance of `run.eval.num_images` samples with `run.sample` to the reference,
    without the other metrics of an evaluation.
    """
    extractor, reference = emoji_reference(method.data.image_size, folder)
    labels = balanced_labels(run.eval.num_images, method.data.num_classes, run.seed)
    images = generate(method, run.sample, labels, run.seed, run.eval.batch, "cpu")
    return frechet_distance_few(collect(images, len(labels), extractor).features, reference)


def jit_distance(changes: Mapping[str, str], images: int, seed: int, folder: Path, size: int = SIZE) -> float:
    """What the tiny JiT with these changes reaches after so many images;
    patches and noise grow with the images, as in the paper.
    """
    scaled = {"model.patch": str(size // 4), "model.noise_scale": str(size / SIZE), "train.images": str(images)}
    return emoji_distance(*trained("jit", {**TINY_JIT, **scaled, **changes}, seed, emoji(size)), folder)


def ratio(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """Of two settings' distances, seed by seed."""
    return Estimate.over([one / other for one, other in zip(above, below, strict=True)])
