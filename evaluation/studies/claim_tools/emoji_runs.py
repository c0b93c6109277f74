"""For claims about images: trains a method on the embedded emoji at any size and measures its samples' distance."""

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
from pixlat.evaluation.features.extractor import EmbeddedExtractor
from pixlat.evaluation.features.feature_sets import feature_set
from pixlat.evaluation.metrics.frechet import Factored, factorise, frechet_distance_few
from pixlat.evaluation.score.generate import balanced_labels, generate
from pixlat.evaluation.studies.claim_tools.framework import Estimate
from pixlat.evaluation.studies.claim_tools.training import fit
from pixlat.methods import get_class, get_spec
from pixlat.methods.base import Batch, DataInfo, Method

# Every third training image is in the reference. These are 1,533 images, more than the 320 dimensions of the features.
EVERY = 3
SAMPLES = 200
SIZE = 32
# A distance below this shows some learning: untrained networks sample noise, whose distance is 2,240 at 32 pixels.
LEARNED = 2000.0

# A JiT that trains in minutes: 16 tokens, two blocks of width 64, and a short sampler without guidance.
TINY_JIT = {
    "preset": "demo", "model.depth": "2", "model.width": "64", "model.heads": "4", "model.bottleneck": "0",
    "train.batch": "32", "train.lr": "2e-3",
    "train.warmup_images": "0", "sample.guidance": "1.0", "sample.steps": "5", "eval.num_images": str(SAMPLES),
}  # fmt: skip


def trained(name: str, settings: Mapping[str, str], seed: int, source: DataSource) -> tuple[Method, RunConfig]:
    """A trained method and its settings. The method has the weights of the last step, not their average."""
    method, run = untrained(name, settings, seed, source)
    fit_on(method, source, run.train, seed)
    return method, run


def untrained(name: str, settings: Mapping[str, str], seed: int, source: DataSource) -> tuple[Method, RunConfig]:
    """The method with its initial weights, and its settings."""
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
    """Calls the method's `before_training`, then `fit` on the same batches as a run with this seed."""
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
    """The images of these indices as (B, 3, S, S) in [-1, 1]."""
    return torch.from_numpy(images.fetch(indices)).float() / 127.5 - 1


@cache
def emoji(size: int = SIZE) -> DataSource:
    """The embedded data set. For a size other than 32 it is resized (bicubic, with antialiasing when it shrinks)."""
    source = load_data(DataConfig())
    if size == SIZE:
        return source
    info = replace(source.info, name=f"emoji{size}", image_size=size)
    return replace(source, info=info, train=resized(source.train, size), heldout=resized(source.heldout, size))


def few(source: DataSource, number: int) -> DataSource:
    """The data set with `number` training images, evenly spaced in storage order."""
    images = source.train
    chosen = np.linspace(0, len(images) - 1, number).astype(np.int64)
    part = ArrayImages(images.fetch(chosen), images.labels[chosen], f"{images.identity}/{number} of them")
    return replace(source, info=replace(source.info, num_train=number), train=part)


def resized(images: ImageSet, size: int) -> ArrayImages:
    """The same images at another size."""
    original = torch.from_numpy(images.fetch(np.arange(len(images)))).float()
    scaled = F.interpolate(original, size=(size, size), mode="bicubic", antialias=True).round().clamp(0, 255)
    return ArrayImages(scaled.to(torch.uint8).numpy(), images.labels, f"{images.identity}/bicubic {size}")


@cache
def emoji_reference(size: int, folder: Path) -> tuple[EmbeddedExtractor, Factored]:
    """The embedded extractor and the moments of a third of the training emoji, with equal weight for every class.

    Caches the features in `folder`.
    """
    extractor, images = EmbeddedExtractor("cpu"), emoji(size).train
    chosen = np.arange(0, len(images), EVERY)
    stream = batches(lambda places: images.fetch(chosen[places.start : places.stop]), len(chosen))
    return extractor, factorise(
        feature_set(stream, images.labels[chosen], extractor, f"{images.digest}/{EVERY}", folder).moments.total()
    )


def emoji_distance(method: Method, run: RunConfig, folder: Path) -> float:
    """Embedded Fréchet distance between `run.eval.num_images` samples, made with `run.sample`, and the reference."""
    extractor, reference = emoji_reference(method.data.image_size, folder)
    labels = balanced_labels(run.eval.num_images, method.data.num_classes, run.seed)
    images = generate(method, run.sample, labels, run.seed, run.eval.batch, "cpu")
    return frechet_distance_few(collect(images, len(labels), extractor).features, reference)


def jit_distance(changes: Mapping[str, str], images: int, seed: int, folder: Path, size: int = SIZE) -> float:
    """The distance that the tiny JiT with these changes reaches after training on `images` images.

    Patch size and noise scale grow with the image size, as in the paper.
    """
    scaled = {"model.patch": str(size // 4), "model.noise_scale": str(size / SIZE), "train.images": str(images)}
    return emoji_distance(*trained("jit", {**TINY_JIT, **scaled, **changes}, seed, emoji(size)), folder)


def ratio(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """The ratio of the distances of two settings, seed by seed."""
    return Estimate.over([numerator / denominator for numerator, denominator in zip(above, below, strict=True)])
