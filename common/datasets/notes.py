"""Warnings about the data that a user should read before the training. Imports no torch."""

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
    """The number of epochs that `images` shown images are, as text for people; "" if the set's size is not known."""
    if not num_train:
        return ""
    epochs = images / num_train
    return f"{epochs:,.0f} epochs" if epochs >= 10 else f"{epochs:.2g} epochs"


def data_notes(data: Data, images: int, path: str | None, on_disk: bool) -> list[str]:
    """Warnings about a training that shows `images` images. The list is empty if nothing is unusual.

    path: `data.path`; on_disk: whether the data set needs that key (`common.datasets.load.ON_DISK`).
    """
    return list(_notes(data, images, path, on_disk))


def _notes(data: Data, images: int, path: str | None, on_disk: bool) -> Iterator[str]:
    if on_disk and path is None:
        yield (
            "data.path is null, so all facts about the data come from the configuration. "
            "Give data.path=FOLDER to train on them."
        )
    if data.num_classes == 1:
        yield (
            f"{data.name} has only one class, so class guidance and class accuracy mean nothing. "
            "If your images have classes, give each class a sub-folder."
        )
    if data.num_train and images > MANY_EPOCHS * data.num_train:
        yield (
            f"train.images={images:,} shows {data.name}'s {data.num_train:,} training images "
            f"for {epochs_text(images, data.num_train)}: with so many repeats a model memorises its training images. "
            "Lower train.images, or give more images."
        )
