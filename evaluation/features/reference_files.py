"""Reads files with statistics of real images: ADM's, JiT's and pMF's .npz, and the .safetensors files that
`pixlat reference build` writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from pixlat.common.errors import UserError
from pixlat.common.files import parse_json, sha256_of, write_atomically
from pixlat.common.images.decoding import decoding_digest
from pixlat.common.weights.checkpoint import save_tensors
from pixlat.evaluation.features.arrays import NpzImages, read_floats
from pixlat.evaluation.features.collect import ImageBatch, collect
from pixlat.evaluation.features.feature_sets import checksum, feature_set, sample_of
from pixlat.evaluation.features.moments import Gaussian
from pixlat.evaluation.features.networks import CardExtractor
from pixlat.evaluation.protocols.named import ReferenceRule

FORMAT = "pixlat-reference-1"
KEYS = {"adm": ("mu", "sigma"), "mu_sigma": ("mu", "sigma"), "ref_mu_sigma": ("ref_mu", "ref_sigma")}
SPATIAL_KEYS = ("mu_s", "sigma_s")
ASYMMETRY = 1e-3  # tolerance relative to the largest entry; covariances in float32 files are symmetric to 1e-6


@dataclass(frozen=True)
class Reference:
    """Statistics of the real images of a protocol."""

    pooled: Gaussian
    spatial: Gaussian | None
    features: Tensor | None  # (m, D) float32, of at most MAX_NEIGHBOURS images
    entry: Mapping[str, Any]  # the part of the protocol that identifies these images


def read_reference(
    rule: ReferenceRule, path: Path, extractor: CardExtractor, resolution: int, cache: Path
) -> Reference:
    """Reads a file in the format that the protocol's rule names.

    cache: folder for features of the images in ADM's files.
    """
    if rule.kind == "built":
        return read_built(path, extractor, resolution)
    n = rule.n_images
    assert n is not None
    pooled = read_gaussian(path, KEYS[rule.kind], extractor.dims, n)
    spatial, features = None, None
    if rule.kind == "adm":
        spatial = read_gaussian(path, SPATIAL_KEYS, extractor.spatial_dims, n)
        features = features_of(NpzImages(path), extractor, cache)
    entry = {"id": rule.id, "stats_sha256": sha256_of(path), "split": rule.split, "n_images": n, "crop": rule.crop}
    return Reference(pooled, spatial, features, entry)


def read_gaussian(path: Path, keys: tuple[str, str], dims: int, n: int) -> Gaussian:
    """Mean and covariance of n images from an .npz. Raises UserError for a matrix that is no covariance."""
    mean, cov = read_floats(path, keys[0], (dims,)), read_floats(path, keys[1], (dims, dims))
    if (np.diag(cov) < 0).any() or np.abs(cov - cov.T).max() > ASYMMETRY * np.abs(cov).max():
        raise UserError(
            f"{path}: {keys[1]} is no covariance, because it is not symmetric or has a negative number on its diagonal."
        )
    return Gaussian(n, torch.from_numpy(mean), torch.from_numpy((cov + cov.T) / 2))


def features_of(images: NpzImages, extractor: CardExtractor, cache: Path) -> Tensor:
    """(m, D) features of the real images in an .npz, from the cache if it has them."""
    labels = np.zeros(len(images), dtype=np.int64)
    return feature_set(
        images.batches(), labels, extractor, f"{sha256_of(images.path)}/arr_0", cache, groups=1, balanced=False
    ).features


# -- files of `pixlat reference build` ---------------------------------------------------------------------------------


def build(images: Iterable[ImageBatch], n: int, extractor: CardExtractor, entry: Mapping[str, Any]) -> Reference:
    """Computes the statistics of n images. entry: id, digest, split and crop of the images."""
    collected = collect(images, n, extractor, keep=sample_of(n), groups=1, spatial_dims=extractor.spatial_dims)
    spatial = collected.spatial.total() if collected.spatial else None
    return Reference(
        collected.moments.total(), spatial, collected.features, {**entry, "n_images": n, "decoding": decoding_digest()}
    )


def write_built(reference: Reference, path: Path, extractor: CardExtractor, resolution: int) -> None:
    """Writes a .safetensors file for `read_built`, atomically."""
    tensors = {"mean": reference.pooled.mean, "cov": reference.pooled.cov, "features": reference.features}
    if reference.spatial is not None:
        tensors |= {"spatial_mean": reference.spatial.mean, "spatial_cov": reference.spatial.cov}
    stored = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    facts = json.dumps({"extractor": identity(extractor), "resolution": resolution, "entry": dict(reference.entry)})
    digests = {"sha256": checksum(stored), "facts_sha256": hashlib.sha256(facts.encode()).hexdigest()}
    metadata = {"format": FORMAT, "facts": facts, **digests}
    write_atomically(path, lambda place: save_tensors(stored, place, metadata=metadata))


def read_built(path: Path, extractor: CardExtractor, resolution: int) -> Reference:
    """Reads a file of `write_built`. Raises UserError for another extractor, another image size or a damaged file."""
    facts = facts_of(path)
    if facts["extractor"] != identity(extractor):
        raise UserError(
            f"{path} was built with the extractor {facts['extractor']}, "
            f"but this protocol uses {identity(extractor)}. Build it again."
        )
    if facts["resolution"] != resolution:
        raise UserError(
            f"{path} was built from images of {facts['resolution']} px, but the generated images have {resolution} px."
        )
    metadata, tensors = _opened(path, tensors=True)
    if not _is_reference(tensors, extractor) or checksum(tensors) != metadata.get("sha256"):
        raise UserError(
            f"{path} is damaged: its contents do not have the digest that was written with them. Build it again."
        )
    n = facts["entry"]["n_images"]
    spatial = Gaussian(n, tensors["spatial_mean"], tensors["spatial_cov"]) if "spatial_mean" in tensors else None
    return Reference(Gaussian(n, tensors["mean"], tensors["cov"]), spatial, tensors["features"], facts["entry"])


def _is_reference(tensors: Mapping[str, Tensor], extractor: CardExtractor) -> bool:
    """Whether the tensors have the names, types and shapes of a reference. The checksum covers only their bytes."""
    dims = extractor.dims
    wanted: dict[str, tuple[Any, tuple[int, ...]]] = {
        "mean": (torch.float64, (dims,)),
        "cov": (torch.float64, (dims, dims)),
    }
    if "spatial_mean" in tensors:
        size = extractor.spatial_dims
        wanted |= {"spatial_mean": (torch.float64, (size,)), "spatial_cov": (torch.float64, (size, size))}
    features = tensors.get("features")
    if features is None or features.dtype != torch.float32 or features.shape[1:] != (dims,):
        return False
    return {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items() if name != "features"
    } == wanted


def facts_of(path: Path) -> dict[str, Any]:
    """The metadata of a built reference: extractor, resolution, and its entry in protocols."""
    metadata, _ = _opened(path)
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not a reference that `pixlat reference build` made.")
    text = metadata.get("facts", "")
    # references of early versions have no such digest
    if metadata.get("facts_sha256", actual := hashlib.sha256(text.encode()).hexdigest()) != actual:
        raise UserError(f"{path} is damaged: its metadata was changed after it was built. Build it again.")
    try:
        facts = parse_json(text)
        complete = (
            isinstance(facts["extractor"], list)
            and isinstance(facts["resolution"], int)
            and isinstance(facts["entry"]["n_images"], int)
        )
    except (UserError, TypeError, KeyError, IndexError):
        complete = False
    if not complete:
        raise UserError(f"{path} is damaged: its metadata does not name its extractor and its images. Build it again.")
    return dict(facts)


def _opened(path: Path, tensors: bool = False) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(the metadata of a .safetensors file, its tensors or, without `tensors`, an empty dictionary)."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118 (not a dict)
    except Exception as error:  # for a damaged file the library raises exceptions of many types
        raise UserError(
            f"{path} cannot be read as a reference: {error}. Build it with `pixlat reference build`."
        ) from error


def identity(extractor: CardExtractor) -> list[str]:
    """The facts about an extractor that must be the same for statistics to be comparable."""
    return [extractor.id, extractor.sha256, extractor.layer, extractor.resize, extractor.scaling]
