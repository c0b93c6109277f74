"""Everything that determines a folder's files. The folder keeps it, and refuses another request. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pixlat.common.config.schema import RunConfig, flatten
from pixlat.launch.sampling.classes import IN_TURN, SCORED_LAWS, Classes, class_name
from pixlat.launch.sampling.source import Source, stage_digests

if TYPE_CHECKING:
    from pixlat.evaluation.score.models import Model


@dataclass(frozen=True)
class Order:
    """What the command asks for, checked against what is known of the model before its weights are read."""

    n: int  # images
    seed: int
    batch: int  # images that a process samples at once
    formats: tuple[str, ...]  # png, npz, grid
    classes: Classes
    average: str | None
    remark: str = ""  # what the user should know at the end

    def labels(self, num_classes: int) -> NDArray[np.int64]:
        """(n,) the class of each image."""
        return self.classes.labels(self.n, num_classes, self.seed)


def asked_facts(order: Order, source: Source) -> dict[str, Any]:
    """The part of a request that is known before the weights are read, as it comes back from a JSON file."""
    run: RunConfig = source.run
    facts = {
        "n": order.n,
        "seed": order.seed,
        "batch": order.batch,
        "as": sorted(order.formats),
        "class": wish(order.classes, source.class_names),
        "average": order.average,
        "precision": run.eval.precision,
        "uint8": run.eval.uint8,
        "method": run.method,
        "configuration": source.config_identity,
        "sample": asdict(run.sample),
        "model": asdict(run.model),
        "revision": source.hub.revision if source.hub else None,
    }
    return dict(json.loads(json.dumps(facts)))


def wish(classes: Classes, names: Sequence[str]) -> str | list[str]:
    """The classes as a request keeps them: the law, the names of those that take turns, or the digest of a list."""
    if classes.law == IN_TURN:
        return [class_name(number, names) for number in classes.numbers]
    return classes.law if classes.law in SCORED_LAWS else f"list {labels_digest(np.array(classes.numbers))[:12]}"


def all_facts(order: Order, source: Source, model: Model, labels: NDArray[np.int64]) -> dict[str, Any]:
    """The whole request: adds the digests of weights and labels, and the precision that this machine executes."""
    return {
        **asked_facts(order, source),
        "checkpoint": model.checkpoint["sha256"],
        "weights": model.checkpoint["ema_kind"],
        "stages": stage_digests(source, model),
        "executed": model.dtype,
        "labels": labels_digest(labels),
    }


def labels_digest(labels: NDArray[np.int64]) -> str:
    """Hex SHA-256 of the labels as little-endian 64-bit integers."""
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`"sample.guidance: 3.0 -> 2.0"` for every value in `now` that differs from the earlier request."""
    old, new = dict(flatten(before)), dict(flatten(now))
    return [f"{key}: {old.get(key)} -> {value}" for key, value in new.items() if old.get(key) != value]
