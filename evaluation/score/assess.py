"""One evaluation under any protocol, of a model or of finished images.

`pixlat evaluate` and `pixlat sweep` share this code.
"""

from __future__ import annotations

import dataclasses
import sys
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
from pixlat.evaluation.features.networks import CardExtractor, build_extractor
from pixlat.evaluation.features.ranks import rank_and_size
from pixlat.evaluation.features.reference_files import Reference, read_reference
from pixlat.evaluation.features.samples import FolderSamples, Samples, drawn_images, drawn_labels
from pixlat.evaluation.judges.panel import panel
from pixlat.evaluation.metrics.spread import over_seeds
from pixlat.evaluation.protocols.identity import MAX_NEIGHBOURS, UINT8_RULES, decoding_entry
from pixlat.evaluation.protocols.named import EMBEDDED, NamedProtocol, SampleRule, describe, get_protocol
from pixlat.evaluation.protocols.needed_files import checked
from pixlat.evaluation.score.embedded import (
    Clock,
    Evaluation,
    Making,
    Met,
    assembled,
    evaluate_method,
    judge,
    kept_heldout,
    load_reals,
    progress,
)
from pixlat.evaluation.score.equal_sets import heldout_labels
from pixlat.evaluation.score.generate import draw_labels, generate
from pixlat.evaluation.score.models import Model
from pixlat.evaluation.score.named import measure
from pixlat.evaluation.score.origin import origin_of
from pixlat.evaluation.score.reconstruction import evaluate_rebuilt, evaluate_reconstruction


@dataclass(frozen=True)
class Request:
    """The settings of an evaluation."""

    protocol: str
    num_images: int | None  # None: the protocol's number, or all finished images
    seeds: tuple[int, ...]
    batch: int
    labels: str | None  # balanced or random; None: as in the protocol, or unknown for finished images
    # For finished images only: round or truncate; None: unknown. A model has this setting in its run's configuration.
    uint8: str | None
    precision: str | None  # For finished images only: bf16, tf32 or fp32; None: unknown.
    weights: str | None
    reference: str | None
    cache: Path
    device: torch.device
    in_random_order: bool = False  # whether finished images are in random order, so that the first ones represent all
    judges: tuple[str, ...] = ()  # for finished images under the embedded protocol; a model's are its `eval.judges`


@dataclass(frozen=True)
class Tools:
    """The extractor and the real images' statistics for a named protocol."""

    protocol: NamedProtocol
    extractor: CardExtractor
    reference: Reference
    resolution: int

    def describe(self, samples: SampleRule) -> dict[str, Any]:
        """The complete protocol for these samples."""
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
    """Loads the files of a named protocol. It checks them before anything is sampled."""
    protocol = get_protocol(request.protocol)
    if protocol.resolution not in (None, resolution):
        raise UserError(
            f"protocol={protocol.name} is for {protocol.resolution} px, but the images have {resolution} px."
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
    """Samples from the model and measures its images.

    If the method or the protocol is about reconstruction, it measures reconstructions instead.
    """
    run = model.run
    n = request.num_images or (
        run.eval.num_images if request.protocol == EMBEDDED else get_protocol(request.protocol).num_images
    )
    run = dataclasses.replace(run, eval=dataclasses.replace(run.eval, num_images=n, batch=request.batch))
    if model.method.task == "reconstruction" or request.protocol == "rfid":
        if model.method.space == "pixel":
            raise UserError(
                f"{model.name} generates pixels and has no autoencoder, so there are no reconstructions to measure."
            )
        extractor = None if request.protocol == EMBEDDED else rfid_extractor(request)
        return evaluate_reconstruction(model.method, run, load_data(run.data), request.device, request.cache, extractor)
    if request.protocol == EMBEDDED:
        source, met = load_data(run.data), origin_of(model).met
        return evaluate_method(model.method, run, source, request.device, request.cache, request.seeds, met)
    return sample_and_measure(model, run, n, request)


def rfid_extractor(request: Request) -> CardExtractor:
    """The Inception extractor of protocol=rfid. Raises UserError for a protocol of generated images."""
    protocol = get_protocol(request.protocol)
    if protocol.reference is not None:
        raise UserError(
            f"protocol={request.protocol} measures generated images. "
            f"For reconstructions use protocol={EMBEDDED} or protocol=rfid."
        )
    return build_extractor(protocol.extractor, checked(protocol.extractor.file, request.weights), request.device)


def sample_and_measure(model: Model, run: RunConfig, n: int, request: Request) -> Evaluation:
    """Samples n images for every seed and measures them under a named protocol."""
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


def assess_images(samples: Samples, request: Request, data: DataConfig, met: Met | None = None) -> Evaluation:
    """Measures finished images. The embedded protocol and rfid compare them with the data set `data`.

    met: what the model that made the images has met; None: not known.
    """
    n = min(len(samples), request.num_images or len(samples))
    uint8_rule = UINT8_RULES.get(request.uint8 or "", "unknown")
    precision = EXECUTED.get(request.precision or "", "unknown")
    stored = container(samples)
    decoding = decoding_digest() if stored == "lossy" else None
    rule = SampleRule(n, request.labels or "unknown", uint8_rule, stored, precision, decoding)
    if request.protocol == "rfid":
        return evaluate_rebuilt(
            samples.batches(request.batch),
            load_data(data),
            request.batch,
            rfid_extractor(request),
            request.cache,
            uint8_rule,
            precision,
        )
    if request.protocol == EMBEDDED:
        source = load_data(data)
        introduce(samples, n, source, data)
        return against_data(samples, source, rule, request, met)
    stream = progress(drawn_images(samples, n, request.batch), n, "evaluating")
    tools = prepare(request, samples.resolution)
    return Evaluation(tools.describe(rule), measure(stream, n, tools.extractor, tools.reference, tools.protocol), 0.0)


def known_labels(samples: Samples, n: int, shuffled: bool, source: DataSource) -> NDArray[np.int64] | None:
    """(n,) the class that each image should show.

    None if the labels are not known, or if they are not classes of the data set; then it prints a note.
    """
    labels = drawn_labels(samples, n, shuffled)
    if labels is None or (labels.min() >= 0 and labels.max() < source.info.num_classes):
        return labels
    if rank_and_size()[0] == 0:
        reason = (
            f"the labels in the file go from {labels.min()} to {labels.max()}, "
            f"and {source.info.name} has {source.info.num_classes} classes"
        )
        print(f"note: {reason}, so class accuracy is left out", file=sys.stderr)
    return None


def against_data(
    samples: Samples, source: DataSource, rule: SampleRule, request: Request, met: Met | None
) -> Evaluation:
    """Measures images under the embedded protocol.

    Images with the labels of an evaluation of a model (`pixlat sample like=evaluation`) are compared as that model's.
    """
    reals = load_reals(source, panel(source.info, request.judges, request.device), request.cache, rule.n)
    labels = known_labels(samples, rule.n, False, source)
    heldout = kept_heldout(source)
    alike = labels is not None and len(heldout) > 0 and np.array_equal(labels, heldout_labels(heldout, rule.n))
    # Images are compared in parts, and neighbours are searched among the first ones, so each part must represent all.
    shuffled = not (alike or request.in_random_order) and rule.n > min(MAX_NEIGHBOURS, reals[0].block)
    if shuffled:
        labels = known_labels(samples, rule.n, True, source)
    stream = progress(drawn_images(samples, rule.n, request.batch, shuffled), rule.n, "evaluating")
    scores = judge(stream, rule.n if labels is None else labels, reals, source.info.name)
    made = Making("heldout" if alike else rule.label_law, rule.uint8_rule, rule.precision)
    evaluation = assembled([scores], source, reals, rule.n, made, met)
    stored = "memory" if rule.container == "lossless" else rule.container
    evaluation.protocol["samples"] |= {"container": stored, **decoding_entry(rule.decoding)}
    return evaluation


LIKENESS_IMAGES = 200  # images of each side that `unlike` compares
# `unlike` reports means that differ by more than this many standard deviations of the data set's images.
LIKENESS_DEVIATIONS = 2.5


def introduce(samples: Samples, n: int, source: DataSource, data: DataConfig) -> None:
    """Prints on stderr which data set the images are compared with, and warns if they look different from it.

    Raises UserError if the sizes differ.
    """
    info = source.info
    yours = (
        "your own real images are data=folder data.path=FOLDER data.image_size=PIXELS, "
        "and protocol= names other references"
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
    """(quantity, mean of the images, mean of the data set) for mean brightness and contrast, if they differ much.

    The means are in grey levels and come from LIKENESS_IMAGES images of each side.
    """
    given = np.concatenate([images.numpy() for images, _ in drawn_images(samples, LIKENESS_IMAGES, LIKENESS_IMAGES)])
    real = source.train.fetch(fixed_draw(len(source.train), LIKENESS_IMAGES))
    different = []
    for what, measured in (("mean brightness", np.mean), ("mean contrast", np.std)):
        ours, theirs = (measured(images.reshape(len(images), -1), axis=1) for images in (real, given))
        if abs(theirs.mean() - ours.mean()) > LIKENESS_DEVIATIONS * ours.std():
            different.append((what, float(theirs.mean()), float(ours.mean())))
    return different


def container(samples: Samples) -> str:
    """The record's word for the files: "lossy" if some file has a lossy format, else "lossless"."""
    return "lossy" if isinstance(samples, FolderSamples) and samples.lossy else "lossless"
