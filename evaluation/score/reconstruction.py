"""Measures the reconstructions of a method's autoencoder: decode(encode(x)) for held-out images x.

rfd_embedded compares originals and reconstructions as two distributions (rFID with another extractor). psnr, ssim and
the perceptual distance compare each image with its original.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pixlat.common.errors import UserError
from pixlat.common.images.splits import fixed_draw
from pixlat.common.precision import computing_in, executed_precision
from pixlat.evaluation.features.collect import ImageBatch, batches, collect
from pixlat.evaluation.features.extractor import EmbeddedExtractor, Extractor, exact_float32
from pixlat.evaluation.features.feature_sets import feature_set
from pixlat.evaluation.features.moments import Moments
from pixlat.evaluation.features.ranks import gather_rows
from pixlat.evaluation.metrics.entries import frechet_metric, mean_metric
from pixlat.evaluation.metrics.frechet import factorise, frechet_distance
from pixlat.evaluation.metrics.image_quality import psnr, ssim
from pixlat.evaluation.metrics.jackknife import Estimate, jackknife
from pixlat.evaluation.protocols.identity import SSIM_WINDOW, UINT8_RULES, extractor_entry, reconstruction_protocol
from pixlat.evaluation.records.record import Metric
from pixlat.evaluation.score.embedded import MIN_IMAGES, Evaluation, check_enough, progress
from pixlat.evaluation.score.generate import quantise

if TYPE_CHECKING:
    from pixlat.common.config.schema import RunConfig
    from pixlat.common.datasets.load import DataSource
    from pixlat.common.images.image_set import ImageSet
    from pixlat.methods.base import Method

# reconstructions and originals, both uint8 (B, C, H, W), and their indices (B,)
Pair: TypeAlias = tuple[Tensor, Tensor, Tensor]
# rebuilt and original images, uint8 (B, C, H, W) -> (B,) float64
Measure: TypeAlias = Callable[[Tensor, Tensor], Tensor]

UNITS = {"psnr": "dB"}


def evaluate_reconstruction(
    method: Method,
    run: RunConfig,
    source: DataSource,
    device: torch.device | str,
    cache: Path,
    extractor: Extractor | None = None,
) -> Evaluation:
    """Measures reconstructions of at most `run.eval.num_images` held-out images. Every process must call it.

    If the data set has too few held-out images, it uses training images. The metrics are rfd_embedded (or rfid with
    another extractor), psnr (dB), ssim (images of at least 11 pixels) and lpips, or perceptual_embedded if the weights
    of lpips are not on this machine. cache: folder for the features of the real images, which all runs share.
    """
    originals = choose(source, run.eval.num_images)
    rebuilder = Rebuilder(method, torch.device(device), run.eval.precision, run.eval.uint8)
    pairs = rebuilder(batches(originals.fetch, len(originals), run.eval.batch))
    made = (UINT8_RULES[run.eval.uint8], executed_precision(run.eval.precision, torch.device(device)))
    protocol, metrics = compare(pairs, originals, extractor or EmbeddedExtractor(device), cache, *made)
    return Evaluation(protocol, metrics, rebuilder.seconds, rebuilder.images)


def evaluate_rebuilt(
    rebuilt: Iterable[ImageBatch],
    source: DataSource,
    batch: int,
    extractor: Extractor,
    cache: Path,
    uint8_rule: str = "unknown",
    precision: str = "unknown",
) -> Evaluation:
    """Like `evaluate_reconstruction`, for finished reconstructions of all held-out images.

    rebuilt: batches of `batch` images in the order of the data set.
    """
    originals = choose(source, len(source.heldout))
    pairs = alongside(rebuilt, batches(originals.fetch, len(originals), batch))
    return Evaluation(*compare(pairs, originals, extractor, cache, uint8_rule, precision), 0.0)


def compare(
    pairs: Iterable[Pair], originals: Originals, extractor: Extractor, cache: Path, uint8_rule: str, precision: str
) -> tuple[dict[str, Any], dict[str, Metric]]:
    """(protocol, metrics) of pairs of images. uint8_rule and precision describe how reconstructions were made."""
    n, size, where = len(originals), originals.image_size, extractor.device
    stream = progress(batches(originals.fetch, n), n, f"features of {originals.split} images")
    decoding = originals.images.decoding
    identity = originals.digest if decoding is None else f"{originals.digest}/{decoding}"
    real = feature_set(stream, originals.labels, extractor, identity, cache, balanced=False)
    name, network = load_perceptual(where)
    measures: dict[str, Measure] = {"psnr": psnr, "ssim": ssim, name: partial(perceptual_distance, network, where)}
    if size < SSIM_WINDOW:
        del measures["ssim"]
    scores = Scores(measures)
    rebuilt = collect(progress(scores(pairs), n, "reconstructing"), n, extractor)
    estimate, regularised = paired_frechet(rebuilt.moments, real.moments)
    distance = "rfd_embedded" if extractor.id == EmbeddedExtractor.id else "rfid"
    metrics = {distance: frechet_metric(estimate, n, regularised), **scores.metrics()}
    perceptual = {"id": name, "sha256": network.sha256}
    entry = extractor_entry(
        extractor, extractor.sha256, extractor.comparable_with_inception_fid, extractor.resize_digest
    )
    images = (originals.name, originals.split, originals.digest, n, size)
    return reconstruction_protocol(
        entry, *images, perceptual, uint8_rule, precision, originals.images.decoding
    ), metrics


@dataclass(frozen=True)
class Originals:
    """The real images to reconstruct: a fixed selection from one split of a data set."""

    name: str
    split: str
    images: ImageSet
    positions: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.positions)

    def fetch(self, indices: range) -> NDArray[np.uint8]:
        """Images (B, 3, H, W) uint8 at these consecutive places of the selection."""
        return self.images.fetch(self.positions[indices.start : indices.stop])

    @property
    def labels(self) -> NDArray[np.int64]:
        """(n,) the images' classes."""
        return self.images.labels[self.positions]

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return self.images.image_size

    @property
    def digest(self) -> str:
        """Identifies the images and their order."""
        all_selected = len(self) == len(self.images)
        return self.images.digest if all_selected else f"{self.images.digest}/{len(self)}"


def choose(source: DataSource, wanted: int) -> Originals:
    """At most `wanted` held-out images, or training images if fewer than MIN_IMAGES are held out."""
    split, images = ("heldout", source.heldout) if len(source.heldout) >= MIN_IMAGES else ("train", source.train)
    originals = Originals(source.info.name, split, images, fixed_draw(len(images), wanted))
    check_enough("real", len(originals))
    return originals


def load_perceptual(device: torch.device | str) -> tuple[str, Any]:
    """(metric, network): LPIPS if VGG's weights are on this machine, else a distance with the embedded extractor."""
    from pixlat.common.frozen.perceptual import EmbeddedDistance, Lpips

    name, network = "lpips", cast("Any", Lpips(None))
    try:
        network.load()
    except UserError:
        name, network = "perceptual_embedded", EmbeddedDistance()
        network.load()
    return name, network.to(device).eval()


def perceptual_distance(network: nn.Module, device: torch.device, rebuilt: Tensor, originals: Tensor) -> Tensor:
    """(B,) distances of uint8 images, computed in float32 whatever precision the caller has set."""
    with exact_float32(), torch.inference_mode(), torch.autocast(device.type, enabled=False):
        distance: Tensor = network(as_float(rebuilt, device), as_float(originals, device))
    return distance.cpu().double()


class Rebuilder:
    """Maps a stream of images to pairs of a reconstruction and its original."""

    def __init__(self, method: Method, device: torch.device, precision: str = "fp32", uint8: str = "round") -> None:
        self.method = method
        self.device = device
        self.precision, self.uint8 = precision, uint8  # `eval.precision` and `eval.uint8`
        self.seconds = 0.0  # time of encoding and decoding in this process
        self.images = 0  # number of images that this process reconstructed in this time

    def __call__(self, originals: Iterable[ImageBatch]) -> Iterator[Pair]:
        """Puts the method into evaluation mode for this time and restores its mode afterwards."""
        was_training = self.method.training
        self.method.eval()
        try:
            for images, indices in originals:
                start = time.perf_counter()
                rebuilt = self.rebuild(images)
                self.seconds += time.perf_counter() - start
                self.images += len(indices)
                yield rebuilt, images, indices
        finally:
            self.method.train(was_training)

    def rebuild(self, images: Tensor) -> Tensor:
        """decode(encode(x)) of uint8 images, as uint8 on the CPU."""
        inputs = as_float(images, self.device)
        # not inference_mode: a method's tables must stay usable in training
        with torch.no_grad(), computing_in(self.precision, self.device):
            return quantise(self.method.decode(self.method.encode(inputs)), self.uint8).cpu()


def alongside(rebuilt: Iterable[ImageBatch], originals: Iterable[ImageBatch]) -> Iterator[Pair]:
    """Joins two streams with equal batches into one stream of pairs."""
    for (images, places), (real, indices) in zip(rebuilt, originals, strict=True):
        if images.shape != real.shape or not torch.equal(places, indices):
            raise UserError(
                f"reconstructions {tuple(images.shape)} and originals {tuple(real.shape)} do not belong together: "
                "give one reconstruction for each original, in the same order."
            )
        yield images, real, indices


class Scores:
    """Measures the pairs of a stream while it passes the reconstructions on."""

    def __init__(self, measures: Mapping[str, Measure]) -> None:
        self.measures = measures
        self.values = [torch.empty(0, len(measures), dtype=torch.float64)]  # a process may get no image

    def __call__(self, pairs: Iterable[Pair]) -> Iterator[ImageBatch]:
        """Measures each pair and yields only the reconstructions."""
        for rebuilt, originals, indices in pairs:
            self.values.append(torch.stack([measure(rebuilt, originals) for measure in self.measures.values()], dim=1))
            yield rebuilt, indices

    def metrics(self) -> dict[str, Metric]:
        """The means over the images of all processes."""
        columns = gather_rows(torch.cat(self.values)).T
        return {
            name: {**mean_metric(values), "unit": UNITS.get(name, "1")}
            for name, values in zip(self.measures, columns, strict=True)
        }


def as_float(images: Tensor, device: torch.device) -> Tensor:
    """uint8 images as float32 in [-1, 1]."""
    return images.to(device).float() / 127.5 - 1


def paired_frechet(rebuilt: Moments, real: Moments) -> tuple[Estimate, bool]:
    """(the distance between two paired sets, whether a covariance was regularised).

    The jackknife leaves each group out of both sets at once.
    """
    reference = factorise(real.total())
    pairs = zip(rebuilt.left_out(), real.left_out(), strict=True)
    left_out = [frechet_distance(reconstructed, factorise(original)) for reconstructed, original in pairs]
    return jackknife(frechet_distance(rebuilt.total(), reference), left_out), reference.regularised
