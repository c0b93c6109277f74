"""The description of a data set: classes, sizes and digest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pixlat.common.images.image_set import LatentFacts


@dataclass(frozen=True)
class DataSummary:
    """The facts about a data set that a method, a plan or a record needs, without the images."""

    name: str
    num_classes: int
    image_size: int  # pixels, square
    num_train: int
    num_heldout: int
    class_names: tuple[str, ...]
    digest: str  # SHA-256 over the identity of both parts
    latents: LatentFacts | None = None  # facts of the stored latents, if training batches hold them (`data.latents`)
