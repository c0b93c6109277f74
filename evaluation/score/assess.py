"""One evaluation under any protocol: of a model that samples, or of images that somebody made.

What `pixlat evaluate` and `pixlat sweep` share.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pixlat.common.config.schema import DataConfig, RunConfig
from pixlat.common.datasets.load import DataSource, load_data
from pixlat.common.errors import UserError
from pixlat.common.images.decoding import decoding_digest
from pixlat.common.images.splits import fixed_draw
from pixlat.common.precision import EXECUTED
from pixlat.evaluation.features.collect import ImageBatch
from pixlat.evaluation.features.extractor import EmbeddedExtractor
from pixlat.evaluation.features.networks import CardExtractor, build_extractor
from pixlat.evaluation.features.ranks import rank_and_size
from pixlat.evaluation.features.reference_files import Reference, read_reference
from pixlat.evaluation.features.samples import FolderSamples, Samples, drawn_images, drawn_labels
from pixlat.evaluation.metrics.spread import over_seeds
from pixlat.evaluation.protocols.identity import MAX_NEIGHBOURS, UINT8_RULES, decoding_entry
from pixlat.evaluation.protocols.named import EMBEDDED, NamedProtocol, SampleRule, describe, get_protocol
from pixlat.evaluation.protocols.needed_files import checked
from pixlat.evaluation.score.embedded import (
    Clock,
    Evaluation,
    data_protocol,
    evaluate,
    evaluate_method,
    load_reference,
    progress,
)
from pixlat.evaluation.score.generate import draw_labels, generate
from pixlat.evaluation.score.models import Model
from pixlat.evaluation.score.named import measure
from pixlat.evaluation.score.reconstruction import evaluate_rebuilt, evaluate_reconstruction


@dataclass(frozen=True)
class Request:
    """How to measure."""

    protocol: str
    num_images: int | None  # None: as the protocol says, or all finished images
    seeds: tuple[int, ...]
    batch: int
    labels: str | None  # balanced or random; None: as the protocol says, unknown for finished images
    # round or truncate, of finished images; None: unknown. Models have theirs in their run's settings
    uint8: str | None
    precision: str | None  # bf16, tf32 or fp32, of finished images; likewise
    weights: str | None
    reference: str | None
    cache: Path
    device: torch.device
    in_random_order: bool = False  # finished images whose labels were drawn, so that the first of them stand for all


@dataclass(frozen=True)
class Tools:
    """An extractor and real images for a named protocol."""

    protocol: NamedProtocol
    extractor: CardExtractor
    reference: Reference
    resolution: int

    def describe(self, samples: SampleRule) -> dict[str, Any]:
        """The protocol in full."""
        n_features = 0 if self.reference.features is None else len(self.reference.features)
        return describe(
            self.protocol,
            self.extractor.sha256,
            self.reference.entry,
            n_features,
            self.resolution,
            samples,
            self.extractor.resize_digest,
        )


def prepare(request: Request, resolution: int) -> Tools:
    """The files of a named protocol, checked before anything is sampled."""
    protocol = get_protocol(request.protocol)
    if protocol.resolution not in (None, resolution):
        raise UserError(
            f"protocol={protocol.name} is for {protocol.resolution} px and the images have {resolution} px."
        )
    assert protocol.reference is not None
    paths = [
        checked(file, given) for file, given in zip(protocol.files, (request.weights, request.reference), strict=True)
    ]
    extractor = build_extractor(protocol.extractor, paths[0], request.device)
    return Tools(
        protocol,
        extractor,
        read_reference(protocol.reference, paths[1], extractor, resolution, request.cache),
        resolution,
    )


# -- models ------------------------------------------------------------------------------------------------------------


def assess_model(model: Model, request: Request) -> Evaluation:
    """Samples and measures, or encodes and decodes where the method or the protocol is about reconstruction."""
    run = model.run
    n = request.num_images or (
        run.eval.num_images if request.protocol == EMBEDDED else get_protocol(request.protocol).num_images
    )
    run = dataclasses.replace(run, eval=dataclasses.replace(run.eval, num_images=n, batch=request.batch))
    if model.method.task == "reconstruction" or request.protocol == "rfid":
        if model.method.space == "pixel":
            raise UserError(
                f"{model.name} generates pixels: it has no autoencoder whose reconstructions could be measured."
            )
        extractor = None if request.protocol == EMBEDDED else rfid_extractor(request)
        return evaluate_reconstruction(model.method, run, load_data(run.data), request.device, request.cache, extractor)
    if request.protocol == EMBEDDED:
        return evaluate_method(model.method, run, load_data(run.data), request.device, request.cache, request.seeds)
    return sample_and_measure(model, run, n, request)


def rfid_extractor(request: Request) -> CardExtractor:
    """Inception, for reconstructions."""
    protocol = get_protocol(request.protocol)
    if protocol.reference is not None:
        raise UserError(
            f"protocol={request.protocol} measures generated images. "
            f"Reconstructions take protocol={EMBEDDED} or protocol=rfid."
        )
    return build_extractor(protocol.extractor, checked(protocol.extractor.file, request.weights), request.device)


def sample_and_measure(model: Model, run: RunConfig, n: int, request: Request) -> Evaluation:
    """A named protocol over every seed."""
    tools = prepare(request, model.info.image_size)
    law = request.labels or tools.protocol.label_law
    clock, parts = Clock(), []
    for seed in request.seeds:
        labels = draw_labels(law, n, model.info.num_classes, seed)
        images = generate(
            model.method,
            run.sample,
            labels,
            seed,
            request.batch,
            request.device,
            run.eval.precision,
            run.eval.uint8,
            drawing=clock.drawing,
        )
        stream = progress(clock.timed(images), n, "evaluating")
        parts.append(measure(stream, n, tools.extractor, tools.reference, tools.protocol))
    rule = SampleRule(n, law, UINT8_RULES[run.eval.uint8], precision=model.dtype)
    return Evaluation(tools.describe(rule), over_seeds(parts), clock.seconds, clock.images, clock.drawing.seconds)


# -- finished images ---------------------------------------------------------------------------------------------------


def assess_images(samples: Samples, request: Request, data: DataConfig) -> Evaluation:
    """Measures finished images; those of the embedded protocol and of rfid are held against the data set `data`."""
    n = min(len(samples), request.num_images or len(samples))
    made = (UINT8_RULES.get(request.uint8 or "", "unknown"), EXECUTED.get(request.precision or "", "unknown"))
    stored = container(samples)
    rule = SampleRule(
        n, request.labels or "unknown", made[0], stored, made[1], decoding_digest() if stored == "lossy" else None
    )
    # The embedded protocol seeks neighbours among the first MAX_NEIGHBOURS images.
    shuffled = request.protocol == EMBEDDED and n > MAX_NEIGHBOURS and not request.in_random_order
    stream = progress(drawn_images(samples, n, request.batch, shuffled), n, "evaluating")
    if request.protocol == "rfid":
        return evaluate_rebuilt(
            samples.batches(request.batch),
            load_data(data),
            request.batch,
            rfid_extractor(request),
            request.cache,
            *made,
        )
    if request.protocol == EMBEDDED:
        source = load_data(data)
        introduce(samples, n, source, data)
        return against_data(stream, known_labels(samples, n, shuffled, source), source, rule, request)
    tools = prepare(request, samples.resolution)
    return Evaluation(tools.describe(rule), measure(stream, n, tools.extractor, tools.reference, tools.protocol), 0.0)


def known_labels(samples: Samples, n: int, shuffled: bool, source: DataSource) -> NDArray[np.int64] | None:
    """(n,) the class that each image should show, None where that is not known or the classes
    are not those of the data.
    """
    labels = drawn_labels(samples, n, shuffled)
    if labels is None or (labels.min() >= 0 and labels.max() < source.info.num_classes):
        return labels
    if rank_and_size()[0] == 0:
        told = (
            f"the labels in the file go from {labels.min()} to {labels.max()}, "
            f"and {source.info.name} has {source.info.num_classes} classes"
        )
        print(f"note: {told}, so class accuracy is left out", file=sys.stderr)
    return None


def against_data(
    stream: Iterator[ImageBatch],
    labels: NDArray[np.int64] | None,
    source: DataSource,
    rule: SampleRule,
    request: Request,
) -> Evaluation:
    """The embedded protocol.

    Where labels are None, it is not known which image should show what, and there is no class accuracy.
    """
    extractor = EmbeddedExtractor(request.device)
    reference = load_reference(source, extractor, request.cache)
    metrics = evaluate(stream, rule.n if labels is None else labels, extractor, reference)
    protocol = data_protocol(extractor, source, reference, rule.n, rule.uint8_rule, rule.precision)
    stored = "memory" if rule.container == "lossless" else rule.container
    protocol["samples"] |= {"label_law": rule.label_law, "container": stored, **decoding_entry(rule.decoding)}
    return Evaluation(protocol, metrics, 0.0)


LIKENESS_IMAGES = 200  # that are looked at on either side before anything is computed
LIKENESS_DEVIATIONS = 2.5  # of the data's own images, by which the means of images of the same kind do not differ


def introduce(samples: Samples, n: int, source: DataSource, data: DataConfig) -> None:
    """Says on stderr what the images are compared with, and warns where they can hardly be meant for it;
    another size is a UserError.
    """
    info, yours = (
        source.info,
        (
            "your own real images are data=folder data.path=FOLDER data.image_size=PIXELS, "
            "and protocol= names other references"
        ),
    )
    if info.image_size != samples.resolution:
        raise UserError(
            f"the images have {samples.resolution} px and those of {info.name} {info.image_size} px. "
            f"Without protocol=, images are compared with the training images of data={data.name}: {yours}."
        )
    rank, _ = rank_and_size()
    if rank:
        return
    print(
        f"comparing {n:,} images with the {len(source.train):,} training images of {info.name} "
        f"(data={data.name}); {yours}",
        file=sys.stderr,
    )
    for what, theirs, reals in unlike(samples, source):
        print(
            f"warning: their {what} is {theirs:.0f}, that of {info.name} {reals:.0f}: are they images of {info.name}?",
            file=sys.stderr,
        )


def unlike(samples: Samples, source: DataSource) -> list[tuple[str, float, float]]:
    """(what, mean of the images, mean of the data) for the brightness and the contrast, in grey levels,
    that lie far apart. Of a few images of each.
    """
    given = np.concatenate([images.numpy() for images, _ in drawn_images(samples, LIKENESS_IMAGES, LIKENESS_IMAGES)])
    real = source.train.fetch(fixed_draw(len(source.train), LIKENESS_IMAGES))
    found = []
    for what, measured in (("mean brightness", np.mean), ("mean contrast", np.std)):
        ours, theirs = (measured(images.reshape(len(images), -1), axis=1) for images in (real, given))
        if abs(theirs.mean() - ours.mean()) > LIKENESS_DEVIATIONS * ours.std():
            found.append((what, float(theirs.mean()), float(ours.mean())))
    return found


def container(samples: Samples) -> str:
    """Whether the files may have lost something."""
    return "lossy" if isinstance(samples, FolderSamples) and samples.lossy else "lossless"
