"""Images that were decoded and cropped once, as raw uint8 in memory-mapped files, so that reading one costs a copy.

images.json         the card, written last: a folder without one is not finished
plan.json           what the folder is for, written first
train-labels.npy    int64 (N,)
train-00000.npy     uint8 (n, 3, S, S), and so on; `heldout-` likewise

Pixels, labels, order and identity are those of the data set behind them, so nothing that depends on its digest changes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common import mapped
from common.errors import UserError
from common.files import hold_to, write_whole
from common.progress import progress_bar

if TYPE_CHECKING:
    from common.datasets import DataSource, ImageSet

CARD = "images.json"
FORMAT = 1
PARTS = ("train", "heldout")
BATCH = 64  # images decoded before they are written


@dataclass(frozen=True)
class PartCard:
    """One part of the data set."""

    images: int
    identity: str  # of the set behind it (common/datasets.py)
    skipped: dict[str, str]  # position -> what is wrong, of images in whose place another stands


@dataclass(frozen=True)
class Card:
    """images.json."""

    format: int
    name: str
    class_names: tuple[str, ...]
    image_size: int
    shard_images: int
    parts: dict[str, PartCard]
    folder: Path

    def part(self, name: str) -> Part:
        """The images of "train" or "heldout"."""
        return Part(self.folder, name, self.parts[name], self.image_size, self.shard_images)


class Part:
    """Reads what was written, through memory maps."""

    def __init__(self, folder: Path, name: str, card: PartCard, image_size: int, shard_images: int) -> None:
        self.folder, self.name, self.identity, self.shard_images = folder, name, card.identity, shard_images
        counts = [len(positions) for _, positions in mapped.shard_ranges(card.images, shard_images)]
        self.shards = mapped.Shards([folder / f"{name}-{number:05d}.npy" for number in range(len(counts))])
        for file, count in zip(self.shards.files, counts, strict=True):
            if not file.is_file() or file.stat().st_size < count * 3 * image_size**2:
                raise UserError(f"{file} is missing or shorter than its {count} images. Remove it and {CARD}, and prepare the images again.")

    def labels(self) -> NDArray[np.int64]:
        """(N,)."""
        labels: NDArray[np.int64] = np.load(self.folder / f"{self.name}-labels.npy")
        return labels

    def read(self, index: int) -> NDArray[np.uint8]:
        """(3, S, S)."""
        image: NDArray[np.uint8] = self.shards.arrays[index // self.shard_images][index % self.shard_images]
        return image


def read_card(folder: Path) -> Card:
    """The card of a finished folder; a UserError where there is none."""
    content = mapped.read_card(folder / CARD, FORMAT, "images")
    parts = {name: PartCard(**part) for name, part in content["parts"].items()}
    return Card(**{**content, "class_names": tuple(content["class_names"]), "parts": parts, "folder": folder})


class Task(NamedTuple):
    """One shard to write."""

    file: Path
    part: str
    positions: range


def write_shards(folder: Path, source: DataSource, workers: int, shard_images: int) -> Card:
    """Decodes and crops every image on `workers` processes (0: in this one). Whole shards are kept, so the command can be repeated."""
    sets = {"train": source.train, "heldout": source.heldout}
    facts = {"digest": source.info.digest, "image_size": source.info.image_size, "shard_images": shard_images}
    _check_room(folder, sum(map(len, sets.values())) * 3 * source.info.image_size**2)
    hold_to(folder / "plan.json", facts, "cropped images of other data or in another layout")
    tasks = []
    for part, images in sets.items():
        np.save(folder / f"{part}-labels.npy", images.labels)
        tasks += [Task(folder / f"{part}-{number:05d}.npy", part, positions) for number, positions in mapped.shard_ranges(len(images), shard_images)]
    skipped: dict[str, dict[str, str]] = {part: {} for part in sets}
    with progress_bar("images", sum(len(task.positions) for task in tasks)) as bar:
        for task, broken in zip(tasks, _written(tasks, sets, workers), strict=True):
            skipped[task.part] |= broken
            bar.update(len(task.positions))
    parts = {part: PartCard(len(images), images.identity, skipped[part]) for part, images in sets.items()}
    card = Card(FORMAT, source.info.name, source.info.class_names, source.info.image_size, shard_images, parts, folder)
    write_whole(folder / CARD, json.dumps({key: value for key, value in asdict(card).items() if key != "folder"}, indent=1) + "\n")
    return card


def _check_room(folder: Path, needed: int) -> None:
    """UserError where the disk has less room than the images take, before anything is written; a folder in progress is not asked."""
    folder.mkdir(parents=True, exist_ok=True)
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < needed and not (folder / "plan.json").exists():
        raise UserError(f"{folder} has {free / 1e9:.1f} GB free, and the images take {needed / 1e9:.1f} GB. Choose another place with to=FOLDER.")


def _written(tasks: list[Task], sets: dict[str, ImageSet], workers: int) -> Iterator[dict[str, str]]:
    """Writes the shards; for each, in order, the images that were skipped."""
    if not workers:
        _remember(sets)
        yield from map(_write, tasks)
        return
    with ProcessPoolExecutor(workers, initializer=_remember, initargs=(sets,)) as pool:
        yield from pool.map(_write, tasks)


_sets: dict[str, ImageSet] = {}  # of this process: the sets are handed over once, not with every task


def _remember(sets: dict[str, ImageSet]) -> None:
    _sets.update(sets)


def _write(task: Task) -> dict[str, str]:
    """Writes one shard unless it is there, with a note of what was skipped beside it."""
    note = task.file.with_suffix(".skipped.json")
    if task.file.exists():
        return dict(json.loads(note.read_text(encoding="utf-8"))) if note.exists() else {}
    images = _sets[task.part]
    with mapped.new_shard(task.file, (len(task.positions), 3, images.image_size, images.image_size), np.uint8) as array:
        for start in range(0, len(task.positions), BATCH):
            part = task.positions[start : start + BATCH]
            array[start : start + len(part)] = images.fetch(part)
        broken = {str(position): images.broken[position] for position in task.positions if position in images.broken}
        if broken:
            write_whole(note, json.dumps(broken) + "\n")
    return broken
