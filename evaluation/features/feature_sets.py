"""Features and moments of real images: of the training split, and of the held-out split for the floor.

Every class gets the same weight, whatever its number of images, because generated labels are balanced. With the
unweighted moments of an unbalanced data set, even a perfect generator would have a distance above zero (emoji32: 23,
as much as the bias of 2000 samples).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from pixlat.common.files import write_atomically
from pixlat.common.seeds import derive
from pixlat.common.weights.checkpoint import save_tensors
from pixlat.evaluation.features.collect import ImageBatch, collect
from pixlat.evaluation.features.extractor import Extractor
from pixlat.evaluation.features.moments import Moments
from pixlat.evaluation.features.ranks import rank_and_size, sum_over_ranks
from pixlat.evaluation.features.shipped_features import shipped_features
from pixlat.evaluation.protocols.identity import EVALUATOR_VERSION, JACKKNIFE_GROUPS, MAX_NEIGHBOURS, digest

KINDS = {  # type and number of dimensions of each tensor of a feature set
    "count": (torch.int64, 1), "weight": (torch.float64, 2), "first": (torch.float64, 2), "second": (torch.float64, 3),
    "features": (torch.float32, 2), "labels": (torch.int64, 1), "logits": (torch.float32, 2),
}  # fmt: skip


@dataclass(frozen=True)
class FeatureSet:
    """Features of labelled real images."""

    moments: Moments  # of all images, with the weights that `balanced` of `feature_set` chooses
    features: Tensor  # (m, D) float32, of at most `limit` images
    labels: Tensor  # (m,) int64
    logits: Tensor  # (m, C) float32 of the extractor's classifier, or (m, 0) if they are not known

    @property
    def weights(self) -> Tensor:
        """(m,) float64 with mean 1; every class has the same total weight."""
        return class_weights(self.labels)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, as the cache file stores them."""
        return {**self.moments.tensors(), "features": self.features, "labels": self.labels, "logits": self.logits}

    def limited(self, limit: int) -> FeatureSet:
        """The same set with the features of at most `limit` images, the same ones on every call."""
        kept = sample_of(len(self.labels), limit)
        return replace(self, features=self.features[kept], labels=self.labels[kept], logits=self.logits[kept])


def class_weights(labels: Tensor) -> Tensor:
    """(N,) float64 with mean 1: N / (number of classes * number of images of the image's class)."""
    _, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
    return (len(labels) / (len(counts) * counts.double()))[inverse]


def balanced_weights(labels: Tensor | None, n: int) -> Tensor:
    """(n,) float64: `class_weights`, or 1 for each image if the labels are not known."""
    return torch.ones(n, dtype=torch.float64) if labels is None else class_weights(labels)


def jackknife_groups(labels: Tensor | None, n: int) -> Tensor:
    """(n,) int64: the jackknife group of each image, such that the groups share the images of every class.

    The labels of generated images are chosen, not drawn. Groups that differ in their classes would add an error that
    another set of images with the same labels does not have. Without labels: position mod JACKKNIFE_GROUPS.
    """
    place = torch.arange(n)
    if labels is not None:
        place[labels.argsort(stable=True)] = torch.arange(n)
    return place % JACKKNIFE_GROUPS


def feature_set(
    images: Iterable[ImageBatch],
    labels: NDArray[np.int64],
    extractor: Extractor,
    data_digest: str,
    cache: Path,
    groups: int = JACKKNIFE_GROUPS,
    balanced: bool = True,
    limit: int = MAX_NEIGHBOURS,
    logits: bool = False,
) -> FeatureSet:
    """The features of a data set: read from the cache folder or from the package, or extracted and stored there.

    images: batches of all N images, in the order of labels (N,); not read if the cache or the package has the features.
    data_digest: determines images, labels and order. balanced: whether the moments weight classes equally; if not, they
    weight images equally. limit: largest number of images whose features are kept; logits: whether to keep their
    logits, which the package does not have. With several processes, each passes its share of the images and gets all
    features.
    """
    path = cache / f"{_cache_key(extractor, data_digest, groups, balanced, limit, logits)}.safetensors"
    cached = _read(path, len(labels), limit)
    if _on_all_ranks(cached is not None) and cached is not None:
        return cached
    all_labels = torch.from_numpy(labels)
    keep = sample_of(len(labels), limit)
    weights = class_weights(all_labels) if balanced else None
    known = shipped_features(extractor, data_digest, len(labels))
    if known is not None:
        moments = Moments.zeros(known.shape[1], groups)
        moments.add(known, torch.arange(len(known)), weights)
        return FeatureSet(moments, known[keep], all_labels[keep], known.new_zeros(int(keep.sum()), 0))
    collected = collect(images, len(labels), extractor, weights, keep, groups)
    kept_logits = collected.logits if logits else collected.logits[:, :0]
    result = FeatureSet(collected.moments, collected.features, all_labels[keep], kept_logits.contiguous())
    if rank_and_size()[0] == 0:
        _write(result, path)
    return result


def sample_of(n: int, limit: int = MAX_NEIGHBOURS) -> Tensor:
    """(n,) bool: selects at most `limit` images, the same ones on every call."""
    keep = torch.zeros(n, dtype=torch.bool)
    rng = np.random.Generator(np.random.PCG64(derive("reference sample")))
    keep[torch.from_numpy(rng.permutation(n)[:limit])] = True
    return keep


def _on_all_ranks(condition: bool) -> bool:
    """Whether the condition holds in all processes."""
    failures = torch.tensor(int(not condition))
    sum_over_ranks(failures)
    return not int(failures)


def _cache_key(extractor: Extractor, data_digest: str, groups: int, balanced: bool, limit: int, logits: bool) -> str:
    parts = [
        extractor.id,
        extractor.sha256,
        extractor.layer,
        extractor.resize,
        extractor.scaling,
        data_digest,
        groups,
        balanced,
        limit,
        logits,
        EVALUATOR_VERSION,
    ]
    parts += [extractor.resize_digest] if extractor.resize_digest else []
    return digest(parts)[:32]


def checksum(tensors: dict[str, Tensor]) -> str:
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        hasher.update(tensors[name].contiguous().numpy().data)
    return hasher.hexdigest()


def _write(features: FeatureSet, path: Path) -> None:
    """Writes the cache file atomically, with a checksum."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = features.tensors()
    write_atomically(path, lambda place: save_tensors(tensors, place, metadata={"sha256": checksum(tensors)}))


def _read(path: Path, num_images: int, limit: int) -> FeatureSet | None:
    """The feature set that `_write` stored, or None if there is no file or a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            expected = (file.metadata() or {}).get("sha256")
        if not _is_feature_set(tensors, num_images, limit) or checksum(tensors) != expected:
            return None
    except Exception:  # No file, or a damaged one, for which the library raises many types. We extract features again.
        return None
    return FeatureSet(Moments.from_tensors(tensors), tensors["features"], tensors["labels"], tensors["logits"])


def _is_feature_set(tensors: Mapping[str, Tensor], num_images: int, limit: int) -> bool:
    """Whether the tensors have the names, types and shapes of a feature set. The checksum covers only their bytes."""
    kinds = {name: (tensor.dtype, tensor.ndim) for name, tensor in tensors.items()}
    if kinds != KINDS:
        return False
    (groups, dims), kept = tensors["first"].shape, len(tensors["labels"])
    shapes = {
        "count": (groups,),
        "weight": (groups, 2),
        "first": (groups, dims),
        "second": (groups, dims, dims),
        "features": (kept, dims),
        "labels": (kept,),
        "logits": (kept, tensors["logits"].shape[1]),
    }
    same = all(tuple(tensors[name].shape) == shape for name, shape in shapes.items())
    return same and kept == min(num_images, limit) and int(tensors["count"].sum()) == num_images
