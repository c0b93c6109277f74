"""Features of real images that the package holds, so that a first evaluation need not extract them.

A file belongs to one extractor and holds features of emoji32: of both parts by EfficientNet-Lite0, of the training part
by the judges. Each number has 16 bits between the smallest and the largest value of its dimension. Stored like this,
EfficientNet-Lite0's features change a Fréchet distance by about 1e-6 of its value, as much as another machine does:
6e-8 for the held-out images from the stored training images, 1.3e-6 if both are stored. To extract them takes one core
35 s, and 13 s for the three judges; to read them 0.1 s.

`python -m pixlat.evaluation.features.shipped_features` writes EfficientNet-Lite0's file anew, for another split of the
data for example; `pixlat prepare judges` writes those of the judges.
A file whose extractor or images differ from the caller's is not used; the features are then extracted as for any data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pixlat.common.images.image_set import ImageSet
from pixlat.common.weights.checkpoint import save_tensors
from pixlat.evaluation.features.collect import batches, collect
from pixlat.evaluation.features.extractor import EmbeddedExtractor, Extractor
from pixlat.evaluation.protocols.identity import digest

FOLDER = Path(__file__).with_name("data")
LEVELS = 2**16 - 1  # steps between the smallest and the largest stored number
LOWEST = -(2**15)  # the smallest 16-bit integer


def shipped_features(extractor: Extractor, data_digest: str, num_images: int) -> Tensor | None:
    """(num_images, D) float32 features in the order of the images; None if the package does not hold them.

    data_digest: determines the images and their order, as for `feature_sets.feature_set`.
    """
    stored = _read(FOLDER / f"{extractor.id}.safetensors", identity_of(extractor))
    if stored is None or f"{data_digest}.levels" not in stored:
        return None
    levels, low, step = (stored[f"{data_digest}.{name}"] for name in ("levels", "low", "step"))
    return None if len(levels) != num_images else (low + step * (levels.double() - LOWEST)).float()


def identity_of(extractor: Extractor) -> str:
    """A digest of everything that determines an extractor's features."""
    parts = [extractor.id, extractor.sha256, extractor.layer, extractor.resize, extractor.scaling]
    return digest([*parts, extractor.resize_digest])


@cache
def _read(file: Path, identity: str) -> dict[str, Tensor] | None:
    """The tensors of a file; None if there is none, if it is damaged, or if it belongs to another extractor."""
    try:
        with safe_open(file, framework="pt") as opened:
            facts: dict[str, str] = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError):
        return None
    fits = facts.get("extractor") == identity and facts.get("sha256") == checksum(tensors)
    return tensors if fits else None


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 of the tensors' bytes, in the order of their names."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        hasher.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return hasher.hexdigest()


def stored_as(features: Tensor) -> dict[str, Tensor]:
    """How a file stores features (N, D): `levels` (N, D) int16, and `low` and `step` (D,) float64."""
    low, high = features.double().amin(0), features.double().amax(0)
    step = ((high - low) / LEVELS).clamp(min=torch.finfo(torch.float64).tiny)
    levels = ((features.double() - low) / step).round() + LOWEST
    return {"levels": levels.to(torch.int16), "low": low, "step": step}


def write_shipped(extractor: Extractor, parts: Mapping[str, ImageSet], folder: Path = FOLDER) -> Path:
    """Extracts the features of a data set's parts and writes the extractor's file. Returns its path."""
    tensors: dict[str, Tensor] = {}
    for images in parts.values():
        found = collect(batches(images.fetch, len(images)), len(images), extractor).features
        tensors |= {f"{images.digest}.{name}": tensor for name, tensor in stored_as(found).items()}
    facts = {"extractor": identity_of(extractor), "sha256": checksum(tensors), "parts": ", ".join(parts)}
    folder.mkdir(exist_ok=True)
    file = folder / f"{extractor.id}.safetensors"
    save_tensors(tensors, file, facts)
    return file


def main() -> None:
    """Writes the file of EfficientNet-Lite0 and emoji32."""
    from pixlat.common.config.schema import DataConfig
    from pixlat.common.datasets.load import load_data

    source: Any = load_data(DataConfig())
    file = write_shipped(EmbeddedExtractor(), {"training": source.train, "held-out": source.heldout})
    print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
