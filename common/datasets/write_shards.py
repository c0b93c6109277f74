"""Decodes and crops a data set once and writes it as raw shards: `pixlat prepare images`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pixlat.common.datasets import npy_shards as mapped
from pixlat.common.datasets.shards import CARD, FORMAT, PartCard, ShardCard
from pixlat.common.errors import UserError
from pixlat.common.files import write_or_compare, write_whole
from pixlat.common.progress import progress_bar

if TYPE_CHECKING:
    from pixlat.common.datasets.load import DataSource
    from pixlat.common.images.image_set import ImageSet

BATCH = 64  # images that are decoded at once, before they are written


class Task(NamedTuple):
    """One shard to write."""

    file: Path
    part: str
    positions: range
    resized: bool = False  # whether the shard holds resized, uncropped images instead of squares


class Written(NamedTuple):
    """The result of a task."""

    sha256: str
    skipped: dict[str, str]  # position -> error message, for unreadable images
    sizes: list[tuple[int, int]]  # heights and widths of uncropped images


def write_shards(
    folder: Path, source: DataSource, workers: int, shard_images: int, resize: int | None = None
) -> ShardCard:
    """Decodes and crops every image in `workers` processes (0: in this process).

    Keeps complete shards of an earlier start, so an interrupted command can be repeated.
    resize: also stores the uncropped training images for random crops, with a shorter side of this many pixels.
    """
    sets = {"train": source.train, "heldout": source.heldout}
    facts = {"digest": source.info.digest, "image_size": source.info.image_size, "shard_images": shard_images} | (
        {"resize": resize} if resize else {}
    )
    smallest = sum(map(len, sets.values())) * 3 * source.info.image_size**2 + (
        len(source.train) * 3 * resize**2 if resize else 0
    )
    _check_room(folder, smallest)
    write_or_compare(folder / "plan.json", facts, "cropped images of other data or in another layout")
    tasks = [
        task
        for part in sets
        for task in _tasks(folder, part, len(sets[part]), shard_images, resize is not None and part == "train")
    ]
    written: dict[Task, Written] = {}
    with progress_bar("images", sum(len(task.positions) for task in tasks)) as bar:
        for task, done in zip(tasks, _written(tasks, sets, workers), strict=True):
            written[task] = done
            bar.update(len(task.positions))
    parts = {
        part: _finish_part(folder, part, images, {task: done for task, done in written.items() if task.part == part})
        for part, images in sets.items()
    }
    card = ShardCard(
        FORMAT, source.info.name, source.info.class_names, source.info.image_size, shard_images, parts, folder, resize
    )
    for part in parts.values():
        mapped.keep_verified(folder, part.sha256 or {})
    write_whole(
        folder / CARD,
        json.dumps({key: value for key, value in asdict(card).items() if key != "folder"}, indent=1) + "\n",
    )
    return card


def _tasks(folder: Path, part: str, images: int, shard_images: int, resized: bool) -> list[Task]:
    squares = [
        Task(folder / f"{part}-{number:05d}.npy", part, rows)
        for number, rows in mapped.shard_ranges(images, shard_images)
    ]
    uncropped = [
        Task(folder / f"{part}-resized-{number:05d}.bin", part, rows, True)
        for number, rows in mapped.shard_ranges(images, shard_images)
    ]
    return squares + (uncropped if resized else [])


def _finish_part(folder: Path, part: str, images: ImageSet, written: dict[Task, Written]) -> PartCard:
    """Writes the labels and sizes of a part and returns its entry for the card."""
    np.save(folder / f"{part}-labels.npy", images.labels)
    small = [f"{part}-labels.npy"]
    if any(task.resized for task in written):
        sizes = [size for task, done in written.items() if task.resized for size in done.sizes]
        np.save(folder / f"{part}-resized-sizes.npy", np.array(sizes, dtype=np.int32).reshape(-1, 2))
        small.append(f"{part}-resized-sizes.npy")
    digests = {name: mapped.sha256_of(folder / name) for name in small} | {
        task.file.name: done.sha256 for task, done in written.items()
    }
    skipped = {position: reason for done in written.values() for position, reason in done.skipped.items()}
    return PartCard(len(images), images.identity, skipped, digests, images.decoding)


def _check_room(folder: Path, needed: int) -> None:
    """Raises UserError, before anything is written, if the disk is too small for the images.

    Skips the check if an earlier start has already written files to the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < needed and not (folder / "plan.json").exists():
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free, but the images take {needed / 1e9:.1f} GB. "
            "Choose another folder with to=FOLDER."
        )


def _written(tasks: list[Task], sets: dict[str, ImageSet], workers: int) -> Iterator[Written]:
    """Writes the shards and yields their results in order."""
    if not workers:
        _remember(sets)
        yield from map(_write, tasks)
        return
    with ProcessPoolExecutor(workers, initializer=_remember, initargs=(sets,)) as pool:
        yield from pool.map(_write, tasks)


_sets: dict[str, ImageSet] = {}  # each process receives the sets once, at its start, and not with every task


def _remember(sets: dict[str, ImageSet]) -> None:
    _sets.update(sets)


def _write(task: Task) -> Written:
    """Writes one shard unless it exists, and beside it a note of the skipped images or of the sizes."""
    images = _sets[task.part]
    note = task.file.with_suffix(".sizes.json" if task.resized else ".skipped.json")
    if not task.file.exists():
        sizes = _write_resized(task, images, note) if task.resized else _write_squares(task, images)
        broken = {str(position): images.broken[position] for position in task.positions if position in images.broken}
        if broken and not task.resized:
            write_whole(note, json.dumps(broken) + "\n")
        return Written(mapped.sha256_of(task.file), broken, sizes)
    kept: Any = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
    return Written(mapped.sha256_of(task.file), {} if task.resized else kept, kept if task.resized else [])


def _write_squares(task: Task, images: ImageSet) -> list[tuple[int, int]]:
    with mapped.new_shard(task.file, (len(task.positions), 3, images.image_size, images.image_size), np.uint8) as array:
        for start in range(0, len(task.positions), BATCH):
            part = task.positions[start : start + BATCH]
            array[start : start + len(part)] = images.fetch(part)
    return []


def _write_resized(task: Task, images: ImageSet, note: Path) -> list[tuple[int, int]]:
    """Writes a shard of uncropped images. The note with the sizes comes first: without it the shard is unreadable."""
    sizes, temporary = [], task.file.with_name(f".{task.file.name}")
    with temporary.open("wb") as file:
        for position in task.positions:
            pixels = images.fetch_resized(position)
            sizes.append((pixels.shape[0], pixels.shape[1]))
            file.write(np.ascontiguousarray(pixels).tobytes())
    write_whole(note, json.dumps(sizes) + "\n")
    temporary.replace(task.file)
    return sizes
