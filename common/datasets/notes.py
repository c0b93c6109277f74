"""What a user should know of the data before anything is trained on them. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

MANY_EPOCHS = 5_000  # the longest published run of this suite's methods has 1,400


class Data(Protocol):
    """`DataSummary` or `DataInfo`."""

    @property
    def name(self) -> str: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def num_train(self) -> int: ...


def epochs_text(images: int, num_train: int) -> str:
    """How often so many shown images go through the training set, for people; "" where its size is not known."""
    if not num_train:
        return ""
    epochs = images / num_train
    return f"{epochs:,.0f} epochs" if epochs >= 10 else f"{epochs:.2g} epochs"


def data_notes(data: Data, images: int, path: str | None, on_disk: bool) -> list[str]:
    """Sentences about a training on `images` shown images; none where there is nothing odd.

    path: `data.path`; on_disk: whether the data set is one that needs it (`common.datasets.ON_DISK`).
    """
    return list(_notes(data, images, path, on_disk))


def _notes(data: Data, images: int, path: str | None, on_disk: bool) -> Iterator[str]:
    if on_disk and path is None:
        yield (
            "data.path is null, so the data are described by the configuration alone. "
            "Give data.path=FOLDER to train on them."
        )
    if data.num_classes == 1:
        yield (
            f"{data.name} has one class: labels tell nothing, so guidance by class and class accuracy mean nothing. "
            "With classes, each needs a sub-folder of its own."
        )
    if data.num_train and images > MANY_EPOCHS * data.num_train:
        yield (
            f"train.images={images:,} shows {data.name}'s {data.num_train:,} training images "
            f"{epochs_text(images, data.num_train)} long: a model of that many repeats learns its images by heart. "
            "Lower train.images, or give more images."
        )
