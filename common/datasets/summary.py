"""What a data set is, without its images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pixlat.common.images.image_set import LatentFacts


@dataclass(frozen=True)
class DataSummary:
    """What the data are, without the images."""

    name: str
    num_classes: int
    image_size: int  # pixels, square
    num_train: int
    num_heldout: int
    class_names: tuple[str, ...]
    digest: str  # SHA-256 over the identity of both parts
    latents: LatentFacts | None = None  # stored ones, where training batches bring them (`data.latents`)
