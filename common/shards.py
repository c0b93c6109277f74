"""Images that were decoded and cropped once, as raw uint8 in files of which one request reads an image.

images.json               the card, written last: a folder without one is not finished. It has the SHA-256 of every file
plan.json                 what the folder is for, written first
train-labels.npy          int64 (N,)
train-00000.npy           uint8 (n, 3, S, S), and so on; `heldout-` likewise
train-resized-00000.bin   with data.crop=random: the whole images, (H, W, 3) one behind the other, whose shorter side has data.resize pixels
train-resized-sizes.npy   int32 (N, 2): their heights and widths

Pixels, labels, order and identity are those of the data set behind them, so nothing that depends on its digest changes.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common import mapped
from common.crop import MAX_PIXELS
from common.decoding import UNKNOWN
from common.errors import UserError
from common.files import hold_to, write_whole
from common.progress import progress_bar

if TYPE_CHECKING:
    from common.datasets import DataSource, ImageSet

CARD = "images.json"
FORMAT = 1
PARTS = ("train", "heldout")
BATCH = 64  # images decoded before they are written
AGAIN = f"Remove it and {CARD}, and run the same `python launch/prepare.py images` again: it makes what is missing."
log = logging.getLogger("pixlat")

CARD_RULES: dict[str, mapped.Rule] = {
    "format": mapped.whole(FORMAT, FORMAT), "name": mapped.text, "class_names": mapped.texts, "image_size": mapped.whole(1, 2**16),
    "shard_images": mapped.whole(1), "resize": lambda size: size is None or mapped.whole(1, 2**16)(size),
    "parts": lambda parts: isinstance(parts, dict) and tuple(parts) == PARTS,
}  # fmt: skip
PART_RULES: dict[str, mapped.Rule] = {
    "images": mapped.whole(0), "identity": mapped.text, "skipped": mapped.text_map, "sha256": lambda found: found is None or mapped.text_map(found),
    "decoding": lambda found: found is None or mapped.text(found),
}  # fmt: skip


@dataclass(frozen=True)
class PartCard:
    """One part of the data set."""

    images: int
    identity: str  # of the set behind it (common/datasets.py)
    skipped: dict[str, str]  # position -> what is wrong, of images in whose place another stands
    sha256: dict[str, str] | None = None  # file name -> digest; None: prepared by a version that kept none
    decoding: str | None = UNKNOWN  # how they were decoded (`ImageSet.decoding`)


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
    resize: int | None = None  # pixels of the shorter side of the whole training images; None: there are only squares

    def part(self, name: str) -> Part:
        """The images of "train" or "heldout"."""
        return Part(self, name)


class Part:
    """Reads what was written; everything that the card says is held against the files before memory is taken."""

    def __init__(self, card: Card, name: str) -> None:
        self.folder, self.name, self.shard_images, self.resize = card.folder, name, card.shard_images, card.resize
        self.images, self.identity, self.digests = card.parts[name].images, card.parts[name].identity, card.parts[name].sha256
        self.decoding = card.parts[name].decoding
        row = (3, card.image_size, card.image_size)
        ranges = self._ranges("npy", name)
        files = [self.folder / f"{name}-{number:05d}.npy" for number, _ in ranges]
        headers = [mapped.check_header(file, (len(rows), *row), [np.uint8], AGAIN) for file, (_, rows) in zip(files, ranges, strict=True)]
        self.shards = mapped.Shards(files, row, np.uint8, [header.offset for header in headers])
        self.classes = len(card.class_names)
        self.whole = WholeImages(self) if card.resize and name == "train" else None
        expected = {file.name for file in files} | {f"{name}-labels.npy"} | (self.whole.names() if self.whole else set())
        if self.digests is not None and self.digests.keys() != expected:
            odd = sorted(self.digests.keys() ^ expected)[0]
            raise UserError(f"{self.folder / CARD} is damaged: it has a digest too many or too few of {odd}. {AGAIN}")

    def _ranges(self, suffix: str, stem: str) -> list[tuple[int, range]]:
        """The number and the positions of each shard, of which there must be as many as the card says."""
        expected = mapped.shard_count(self.images, self.shard_images)
        found = sum(path.name.removeprefix(f"{stem}-").removesuffix(f".{suffix}").isdecimal() for path in self.folder.glob(f"{stem}-*.{suffix}"))
        if found != expected:
            raise UserError(
                f"{self.folder / CARD} tells of {self.images:,} {self.name} images in {expected:,} files {stem}-*.{suffix} of {self.shard_images:,}, "
                f"and {found:,} are there. {AGAIN}"
            )
        return list(mapped.shard_ranges(self.images, self.shard_images))

    def verify(self) -> None:
        """UserError for a file that does not have its digest, which is read once for each size and time of change."""
        if self.digests is not None:
            mapped.verify(self.folder, self.digests, AGAIN)
        elif self.name == "train":  # told once for both parts
            log.warning(
                "%s holds no digests, so damage of its images would go unnoticed. "
                "The `python launch/prepare.py images` that made it adds them to the files that are there.",
                self.folder / CARD,
            )

    def labels(self) -> NDArray[np.int64]:
        """(N,), each a class of the card."""
        file = self.folder / f"{self.name}-labels.npy"
        mapped.check_header(file, (self.images,), [np.int64], AGAIN)
        labels: NDArray[np.int64] = np.load(file)
        if len(labels) and not (labels.min() >= 0 and labels.max() < self.classes):
            raise UserError(f"{file} holds labels from {labels.min()} to {labels.max()}, and {CARD} names {self.classes} classes. {AGAIN}")
        return labels

    def read(self, index: int) -> NDArray[np.uint8]:
        """(3, S, S)."""
        return self.shards.read(index // self.shard_images, index % self.shard_images)


class WholeImages:
    """The resized images of which random crops are cut."""

    def __init__(self, part: Part) -> None:
        ranges, self.shard_images = part._ranges("bin", f"{part.name}-resized"), part.shard_images
        self.sizes_file = sizes = part.folder / f"{part.name}-resized-sizes.npy"
        mapped.check_header(sizes, (part.images, 2), [np.int32], AGAIN)
        self.sizes: NDArray[np.int32] = np.load(sizes)
        pixels = self.sizes.astype(np.int64).prod(axis=1)
        if part.images and not (self.sizes.min(axis=1) == part.resize).all():
            raise UserError(f"{sizes} holds images whose shorter side is not the {part.resize} pixels of {CARD}. {AGAIN}")
        if pixels.max(initial=0) > MAX_PIXELS:
            raise UserError(f"{sizes} holds an image of {pixels.max():,} pixels, and there can be {MAX_PIXELS:,}. {AGAIN}")
        files = [part.folder / f"{part.name}-resized-{number:05d}.bin" for number, _ in ranges]
        for file, (_, rows) in zip(files, ranges, strict=True):
            expected = 3 * int(pixels[rows.start : rows.stop].sum())
            if file.stat().st_size != expected:
                raise UserError(f"{file} has {file.stat().st_size:,} bytes, and its images have {expected:,}. {AGAIN}")
        self.offsets = np.concatenate([3 * (np.cumsum(pixels[rows.start : rows.stop]) - pixels[rows.start : rows.stop]) for _, rows in ranges] or [pixels])
        self.opened = mapped.OpenFiles(files)

    def names(self) -> set[str]:
        """Of all files."""
        return {self.sizes_file.name, *(file.name for file in self.opened.files)}

    def read(self, index: int) -> NDArray[np.uint8]:
        """(H, W, 3)."""
        height, width = self.sizes[index].tolist()
        content = self.opened.read(index // self.shard_images, 3 * height * width, int(self.offsets[index]))
        return np.frombuffer(content, dtype=np.uint8).reshape(height, width, 3)


def read_card(folder: Path) -> Card:
    """The card of a finished folder; a UserError where there is none or where it is damaged."""
    content = mapped.read_card(folder / CARD, FORMAT, "images", CARD_RULES, later={"resize": None})
    where = f"{folder / CARD}, parts"
    parts = {name: PartCard(**mapped.check_fields(_with_later_fields(part), PART_RULES, where, AGAIN)) for name, part in content["parts"].items()}
    return Card(**{**content, "class_names": tuple(content["class_names"]), "parts": parts, "folder": folder})


def _with_later_fields(part: object) -> object:
    return {"sha256": None, "decoding": UNKNOWN} | part if isinstance(part, dict) else part


class Task(NamedTuple):
    """One shard to write."""

    file: Path
    part: str
    positions: range
    resized: bool = False  # of whole images instead of squares


class Written(NamedTuple):
    """What came of a task."""

    sha256: str
    skipped: dict[str, str]  # position -> what is wrong
    sizes: list[tuple[int, int]]  # heights and widths of whole images


def write_shards(folder: Path, source: DataSource, workers: int, shard_images: int, resize: int | None = None) -> Card:
    """Decodes and crops every image on `workers` processes (0: in this one). Whole shards are kept, so the command can be repeated.

    resize: pixels of the shorter side of the whole training images that are kept as well, for random crops.
    """
    sets = {"train": source.train, "heldout": source.heldout}
    facts = {"digest": source.info.digest, "image_size": source.info.image_size, "shard_images": shard_images} | ({"resize": resize} if resize else {})
    smallest = sum(map(len, sets.values())) * 3 * source.info.image_size**2 + (len(source.train) * 3 * resize**2 if resize else 0)
    _check_room(folder, smallest)
    hold_to(folder / "plan.json", facts, "cropped images of other data or in another layout")
    tasks = [task for part in sets for task in _tasks(folder, part, len(sets[part]), shard_images, resize is not None and part == "train")]
    written: dict[Task, Written] = {}
    with progress_bar("images", sum(len(task.positions) for task in tasks)) as bar:
        for task, done in zip(tasks, _written(tasks, sets, workers), strict=True):
            written[task] = done
            bar.update(len(task.positions))
    parts = {part: _finish_part(folder, part, images, {task: done for task, done in written.items() if task.part == part}) for part, images in sets.items()}
    card = Card(FORMAT, source.info.name, source.info.class_names, source.info.image_size, shard_images, parts, folder, resize)
    for part in parts.values():
        mapped.keep_verified(folder, part.sha256 or {})
    write_whole(folder / CARD, json.dumps({key: value for key, value in asdict(card).items() if key != "folder"}, indent=1) + "\n")
    return card


def _tasks(folder: Path, part: str, images: int, shard_images: int, resized: bool) -> list[Task]:
    squares = [Task(folder / f"{part}-{number:05d}.npy", part, rows) for number, rows in mapped.shard_ranges(images, shard_images)]
    whole = [Task(folder / f"{part}-resized-{number:05d}.bin", part, rows, True) for number, rows in mapped.shard_ranges(images, shard_images)]
    return squares + (whole if resized else [])


def _finish_part(folder: Path, part: str, images: ImageSet, written: dict[Task, Written]) -> PartCard:
    """Writes labels and sizes, and says what the part holds."""
    np.save(folder / f"{part}-labels.npy", images.labels)
    small = [f"{part}-labels.npy"]
    if any(task.resized for task in written):
        sizes = [size for task, done in written.items() if task.resized for size in done.sizes]
        np.save(folder / f"{part}-resized-sizes.npy", np.array(sizes, dtype=np.int32).reshape(-1, 2))
        small.append(f"{part}-resized-sizes.npy")
    digests = {name: mapped.sha256_of(folder / name) for name in small} | {task.file.name: done.sha256 for task, done in written.items()}
    skipped = {position: reason for done in written.values() for position, reason in done.skipped.items()}
    return PartCard(len(images), images.identity, skipped, digests, images.decoding)


def _check_room(folder: Path, needed: int) -> None:
    """UserError where the disk has less room than the images take, before anything is written; a folder in progress is not asked."""
    folder.mkdir(parents=True, exist_ok=True)
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < needed and not (folder / "plan.json").exists():
        raise UserError(f"{folder} has {free / 1e9:.1f} GB free, and the images take {needed / 1e9:.1f} GB. Choose another place with to=FOLDER.")


def _written(tasks: list[Task], sets: dict[str, ImageSet], workers: int) -> Iterator[Written]:
    """Writes the shards, and says in their order what came of them."""
    if not workers:
        _remember(sets)
        yield from map(_write, tasks)
        return
    with ProcessPoolExecutor(workers, initializer=_remember, initargs=(sets,)) as pool:
        yield from pool.map(_write, tasks)


_sets: dict[str, ImageSet] = {}  # of this process: the sets are handed over once, not with every task


def _remember(sets: dict[str, ImageSet]) -> None:
    _sets.update(sets)


def _write(task: Task) -> Written:
    """Writes one shard unless it is there, with a note of what was skipped and of the sizes beside it."""
    images = _sets[task.part]
    note = task.file.with_suffix(".sizes.json" if task.resized else ".skipped.json")
    if not task.file.exists():
        sizes = _write_whole_images(task, images, note) if task.resized else _write_squares(task, images)
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


def _write_whole_images(task: Task, images: ImageSet, note: Path) -> list[tuple[int, int]]:
    """The note with the sizes comes first: a file without it could not be read."""
    sizes, temporary = [], task.file.with_name(f".{task.file.name}")
    with temporary.open("wb") as file:
        for position in task.positions:
            pixels = images.fetch_resized(position)
            sizes.append((pixels.shape[0], pixels.shape[1]))
            file.write(np.ascontiguousarray(pixels).tobytes())
    write_whole(note, json.dumps(sizes) + "\n")
    temporary.replace(task.file)
    return sizes
