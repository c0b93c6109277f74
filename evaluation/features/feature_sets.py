"""Features and moments of real images: of the training split, and of the held-out split for the floor.

Every class gets the same weight, whatever its number of images, because generated labels are balanced. With the
unweighted moments of an unbalanced data set, even a perfect generator would have a distance above zero (emoji32: 23,
as much as the bias of 2000 samples).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
    "features": (torch.float32, 2), "labels": (torch.int64, 1),
}  # fmt: skip


@dataclass(frozen=True)
class FeatureSet:
    """Features of labelled real images."""

    moments: Moments  # of all images, with the weights that `balanced` of `feature_set` chooses
    features: Tensor  # (m, D) float32, of at most MAX_NEIGHBOURS images
    labels: Tensor  # (m,) int64

    @property
    def weights(self) -> Tensor:
        """(m,) float64 with mean 1; every class has the same total weight."""
        return class_weights(self.labels)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, as the cache file stores them."""
        return {**self.moments.tensors(), "features": self.features, "labels": self.labels}


def class_weights(labels: Tensor) -> Tensor:
    """(N,) float64 with mean 1: N / (number of classes * number of images of the image's class)."""
    _, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
    return (len(labels) / (len(counts) * counts.double()))[inverse]


def feature_set(
    images: Iterable[ImageBatch],
    labels: NDArray[np.int64],
    extractor: Extractor,
    data_digest: str,
    cache: Path,
    groups: int = JACKKNIFE_GROUPS,
    balanced: bool = True,
) -> FeatureSet:
    """The features of a data set: read from the cache folder or from the package, or extracted and stored there.

    images: batches of all N images, in the order of labels (N,); not read if the cache or the package has the features.
    data_digest: determines images, labels and order. balanced: whether the moments weight classes equally; if not, they
    weight images equally. With several processes, each passes its share of the images and gets all features.
    """
    path = cache / f"{_cache_key(extractor, data_digest, groups, balanced)}.safetensors"
    cached = _read(path, len(labels))
    if _on_all_ranks(cached is not None) and cached is not None:
        return cached
    all_labels = torch.from_numpy(labels)
    keep = sample_of(len(labels))
    weights = class_weights(all_labels) if balanced else None
    known = shipped_features(extractor, data_digest, len(labels))
    if known is not None:
        moments = Moments.zeros(known.shape[1], groups)
        moments.add(known, torch.arange(len(known)), weights)
        return FeatureSet(moments, known[keep], all_labels[keep])
    collected = collect(images, len(labels), extractor, weights, keep, groups)
    result = FeatureSet(collected.moments, collected.features, all_labels[keep])
    if rank_and_size()[0] == 0:
        _write(result, path)
    return result


def sample_of(n: int) -> Tensor:
    """(n,) bool: selects at most MAX_NEIGHBOURS images, the same ones on every call."""
    keep = torch.zeros(n, dtype=torch.bool)
    rng = np.random.Generator(np.random.PCG64(derive("reference sample")))
    keep[torch.from_numpy(rng.permutation(n)[:MAX_NEIGHBOURS])] = True
    return keep


def _on_all_ranks(condition: bool) -> bool:
    """Whether the condition holds in all processes."""
    failures = torch.tensor(int(not condition))
    sum_over_ranks(failures)
    return not int(failures)


def _cache_key(extractor: Extractor, data_digest: str, groups: int, balanced: bool) -> str:
    parts = [
        extractor.id,
        extractor.sha256,
        extractor.layer,
        extractor.resize,
        extractor.scaling,
        data_digest,
        groups,
        balanced,
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


def _read(path: Path, num_images: int) -> FeatureSet | None:
    """The feature set that `_write` stored, or None if there is no file or a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            expected = (file.metadata() or {}).get("sha256")
        if not _is_feature_set(tensors, num_images) or checksum(tensors) != expected:
            return None
    except Exception:  # No file, or a damaged one, for which the library raises many types. We extract features again.
        return None
    return FeatureSet(Moments.from_tensors(tensors), tensors["features"], tensors["labels"])


def _is_feature_set(tensors: Mapping[str, Tensor], num_images: int) -> bool:
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
    }
    same = all(tuple(tensors[name].shape) == shape for name, shape in shapes.items())
    return same and kept == min(num_images, MAX_NEIGHBOURS) and int(tensors["count"].sum()) == num_images
