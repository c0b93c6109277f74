"""The embedded protocol: judges compare generated images with the run's own data set."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from pixlat.common.config.resolve import sampling_seeds
from pixlat.common.errors import UserError
from pixlat.common.images.splits import fixed_draw
from pixlat.common.precision import executed_precision
from pixlat.common.progress import progress_bar
from pixlat.evaluation.features.collect import ImageBatch, batches, collect_features
from pixlat.evaluation.features.feature_sets import FeatureSet, feature_set
from pixlat.evaluation.features.ranks import rank_and_size
from pixlat.evaluation.judges.panel import Judge, panel
from pixlat.evaluation.metrics.spread import over_seeds
from pixlat.evaluation.protocols.identity import JACKKNIFE_GROUPS, UINT8_RULES, judged_protocol
from pixlat.evaluation.records.contact import contact_of
from pixlat.evaluation.records.record import Metric
from pixlat.evaluation.score.equal_sets import heldout_labels
from pixlat.evaluation.score.generate import Drawing, balanced_labels, generate
from pixlat.evaluation.score.headline import headline, judge_record, real_record
from pixlat.evaluation.score.judged import ImageFeatures, Reals, judge_metrics, real_metrics

if TYPE_CHECKING:
    from pixlat.common.config.schema import RunConfig
    from pixlat.common.datasets.load import DataSource
    from pixlat.common.images.image_set import ImageSet
    from pixlat.methods.base import Method

MIN_IMAGES = JACKKNIFE_GROUPS
KEPT_IMAGES = 50_000  # largest number of real images of each part whose features are kept

Scores: TypeAlias = dict[str, Metric]
#: the networks and earlier runs that a model has met: `pretrained_components` and `parents` of its record
Met: TypeAlias = tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation that go into the record."""

    protocol: dict[str, Any]
    metrics: Scores
    sampling_seconds: float  # time in which this process made its share of the images of all seeds
    images_made: int = 0  # number of images that this process made in this time
    drawing_seconds: float = 0.0  # the part of this time in which samplers waited for random numbers
    #: of the embedded protocol: the record's fields `judged_by`, `judges` and `real`
    judged: dict[str, Any] = field(default_factory=dict)


def check_enough(kind: str, num_images: int) -> None:
    """Raises UserError if there are too few images for the error bars."""
    if num_images < MIN_IMAGES:
        raise UserError(f"An evaluation needs at least {MIN_IMAGES} {kind} images, but there are {num_images}.")


def judge(
    images: Iterable[ImageBatch], labels: NDArray[np.int64] | int, reals: Sequence[Reals], data: str
) -> list[Scores]:
    """Every judge's metrics of n generated images, n at least 20. Every process gets the same result.

    labels: (n,) the classes that the images should show; or only the number n, if these are not known. data: the data
    set's name.
    """
    n = labels if isinstance(labels, int) else len(labels)
    check_enough("generated", n)
    check_enough("training", len(reals[0].train.labels))
    wanted = None if isinstance(labels, int) else torch.from_numpy(labels)
    outputs = collect_features(images, n, [each.judge.extractor for each in reals])
    return [
        judge_metrics(ImageFeatures(features, logits, wanted), each, data)
        for (features, logits), each in zip(outputs, reals, strict=True)
    ]


def evaluation_labels(source: DataSource, n: int, seed: int) -> tuple[NDArray[np.int64], str]:
    """(labels (n,), their law) of the images that a run generates for its score.

    heldout: the labels of held-out images; balanced, drawn with the seed: if there are too few held-out images.
    """
    heldout = kept_heldout(source)
    if len(heldout):
        return heldout_labels(heldout, n), "heldout"
    return balanced_labels(n, source.info.num_classes, seed), "balanced"


def kept_heldout(source: DataSource) -> NDArray[np.int64]:
    """The labels of the held-out images that take part: none if there are fewer than MIN_IMAGES."""
    labels = source.heldout.labels
    return labels[fixed_draw(len(labels), KEPT_IMAGES)] if len(labels) >= MIN_IMAGES else labels[:0]


def evaluate_method(
    method: Method,
    run: RunConfig,
    source: DataSource,
    device: torch.device | str,
    cache: Path,
    seeds: Sequence[int] | None = None,
    met: Met | None = None,
) -> Evaluation:
    """Samples `run.eval.num_images` images from a method and compares them with its data set.

    Every process must call it. cache: folder for the features of the real images, which all runs share. seeds: sampling
    seeds, by default those of the run; with several, each seed gives a set of images, and metrics are means over them.
    met: what the model has met; None: its method's own networks.
    """
    n = run.eval.num_images
    check_enough("generated", n)
    reals = load_reals(source, panel(source.info, run.eval.judges, device), cache, n)
    clock, parts, law = Clock(), [], ""
    for seed in seeds or sampling_seeds(run):
        labels, law = evaluation_labels(source, n, seed)
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
        stream = progress(clock.timed(images), n, "evaluating")
        parts.append(judge(stream, labels, reals, source.info.name))
    made = Making(law, UINT8_RULES[run.eval.uint8], executed_precision(run.eval.precision, torch.device(device)))
    networks = met or ([asdict(component) for component in method.components()], [])
    evaluation = assembled(parts, source, reals, n, made, networks)
    return replace(
        evaluation, sampling_seconds=clock.seconds, images_made=clock.images, drawing_seconds=clock.drawing.seconds
    )


@dataclass(frozen=True)
class Making:
    """How the images were made, in the words of the protocol."""

    label_law: str
    uint8_rule: str
    precision: str


def assembled(
    parts: Sequence[Sequence[Scores]],
    source: DataSource,
    reals: Sequence[Reals],
    n: int,
    made: Making,
    met: Met | None,
) -> Evaluation:
    """The evaluation from each seed's list of judges' metrics.

    met: None if nothing is known about the images' origin; then the headline is that of all judges that rank.
    """
    protocol = data_protocol(reals, source, n, made)
    judges = protocol["judges"]
    contact = (contact_of(*met, judges) if met else None) or []
    judged_by, headlines = headline(judges, parts, contact)
    real_parts = [real_metrics(each, source.info.name) for each in reals]
    real_headline = headline(judges, [real_parts], contact)[1] if all(real_parts) else []
    fields = {
        "judged_by": judged_by,
        "judges": judge_record(judges, [over_seeds(of_judge) for of_judge in zip(*parts, strict=True)]),
        **({"real": real_record(judges, real_parts, over_seeds(real_headline))} if real_headline else {}),
    }
    return Evaluation(protocol, over_seeds(headlines), 0.0, judged=fields)


def data_protocol(reals: Sequence[Reals], source: DataSource, num_images: int, made: Making) -> dict[str, Any]:
    """The embedded protocol for a data set and its judges."""
    heldout_digest = source.heldout.digest if reals[0].heldout else None
    info, train = source.info, source.train
    sizes = (len(train), info.image_size, num_images)
    return judged_protocol(
        [each.judge for each in reals],
        info.name,
        train.digest,
        heldout_digest,
        *sizes,
        made.label_law,
        made.uint8_rule,
        made.precision,
        train.decoding,
    )


def load_reals(source: DataSource, judges: Sequence[Judge], cache: Path, n: int) -> list[Reals]:
    """Every judge's features of both parts of a data set, from the cache if it has them, for sets of n images."""
    heldout = fixed_draw(len(source.heldout), KEPT_IMAGES) if len(kept_heldout(source)) else None

    def features_of(judge: Judge, images: ImageSet, chosen: NDArray[np.int64], name: str, logits: bool) -> FeatureSet:
        stream = batches(lambda positions: images.fetch(chosen[positions.start : positions.stop]), len(chosen))
        title = f"features of {name} images by {judge.id}"
        identity = images.digest if images.decoding is None else f"{images.digest}/{images.decoding}"
        identity += "" if len(chosen) == len(images) else f"/{len(chosen)} drawn"
        shown = progress(stream, len(chosen), title)
        return feature_set(
            shown, images.labels[chosen], judge.extractor, identity, cache, limit=KEPT_IMAGES, logits=logits
        )

    everything = np.arange(len(source.train))
    return [
        Reals(
            judge,
            features_of(judge, source.train, everything, "training", False),
            None if heldout is None else features_of(judge, source.heldout, heldout, "held-out", True),
            n,
        )
        for judge in judges
    ]


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
