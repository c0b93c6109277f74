"""Images that were decoded and cropped once, as raw uint8 in files of which one request reads an image.

images.json               the card, written last: a folder without one is not finished. It has the SHA-256 of every file
plan.json                 what the folder is for, written first
train-labels.npy          int64 (N,)
train-00000.npy           uint8 (n, 3, S, S), and so on; `heldout-` likewise
train-resized-00000.bin   with data.crop=random: the whole images, (H, W, 3) one behind the other,
                          whose shorter side has data.resize pixels
train-resized-sizes.npy   int32 (N, 2): their heights and widths

Pixels, labels, order and identity are those of the data set behind them, so nothing that depends on its digest changes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pixlat.common.datasets import npy_shards as mapped
from pixlat.common.errors import UserError
from pixlat.common.images.crop import MAX_PIXELS
from pixlat.common.images.decoding import UNKNOWN

CARD = "images.json"
FORMAT = 1
PARTS = ("train", "heldout")

AGAIN = f"Remove it and {CARD}, and run the same `pixlat prepare images` again: it makes what is missing."
log = logging.getLogger("pixlat")

CARD_RULES: dict[str, mapped.Rule] = {
    "format": mapped.whole_number(FORMAT, FORMAT), "name": mapped.text,
    "class_names": mapped.texts, "image_size": mapped.whole_number(1, 2**16),
    "shard_images": mapped.whole_number(1), "resize": lambda size: size is None or mapped.whole_number(1, 2**16)(size),
    "parts": lambda parts: isinstance(parts, dict) and tuple(parts) == PARTS,
}  # fmt: skip
PART_RULES: dict[str, mapped.Rule] = {
    "images": mapped.whole_number(0), "identity": mapped.text,
    "skipped": mapped.text_map, "sha256": lambda found: found is None or mapped.text_map(found),
    "decoding": lambda found: found is None or mapped.text(found),
}  # fmt: skip


@dataclass(frozen=True)
class PartCard:
    """One part of the data set."""

    images: int
    identity: str  # of the set behind it (common/datasets/load.py)
    skipped: dict[str, str]  # position -> what is wrong, of images in whose place another stands
    sha256: dict[str, str] | None = None  # file name -> digest; None: prepared by a version that kept none
    decoding: str | None = UNKNOWN  # how they were decoded (`ImageSet.decoding`)


@dataclass(frozen=True)
class ShardCard:
    """images.json."""

    format: int
    name: str
    class_names: tuple[str, ...]
    image_size: int
    shard_images: int
    parts: dict[str, PartCard]
    folder: Path
    resize: int | None = None  # pixels of the shorter side of the whole training images; None: there are only squares

    def part(self, name: str) -> StoredPart:
        """The images of "train" or "heldout"."""
        return StoredPart(self, name)


class StoredPart:
    """Reads what was written; everything that the card says is held against the files before memory is taken."""

    def __init__(self, card: ShardCard, name: str) -> None:
        self.folder, self.name, self.shard_images, self.resize = card.folder, name, card.shard_images, card.resize
        self.images, self.identity, self.digests = (
            card.parts[name].images,
            card.parts[name].identity,
            card.parts[name].sha256,
        )
        self.decoding = card.parts[name].decoding
        row = (3, card.image_size, card.image_size)
        ranges = self._ranges("npy", name)
        files = [self.folder / f"{name}-{number:05d}.npy" for number, _ in ranges]
        headers = [
            mapped.check_header(file, (len(rows), *row), [np.uint8], AGAIN)
            for file, (_, rows) in zip(files, ranges, strict=True)
        ]
        self.shards = mapped.Shards(files, row, np.uint8, [header.offset for header in headers])
        self.classes = len(card.class_names)
        self.whole = WholeImages(self) if card.resize and name == "train" else None
        expected = (
            {file.name for file in files} | {f"{name}-labels.npy"} | (self.whole.names() if self.whole else set())
        )
        if self.digests is not None and self.digests.keys() != expected:
            odd = sorted(self.digests.keys() ^ expected)[0]
            raise UserError(f"{self.folder / CARD} is damaged: it has a digest too many or too few of {odd}. {AGAIN}")

    def _ranges(self, suffix: str, stem: str) -> list[tuple[int, range]]:
        """The number and the positions of each shard, of which there must be as many as the card says."""
        expected = mapped.shard_count(self.images, self.shard_images)
        found = sum(
            path.name.removeprefix(f"{stem}-").removesuffix(f".{suffix}").isdecimal()
            for path in self.folder.glob(f"{stem}-*.{suffix}")
        )
        if found != expected:
            raise UserError(
                f"{self.folder / CARD} tells of {self.images:,} {self.name} images in {expected:,} files "
                f"{stem}-*.{suffix} of {self.shard_images:,}, and {found:,} are there. {AGAIN}"
            )
        return list(mapped.shard_ranges(self.images, self.shard_images))

    def verify(self) -> None:
        """UserError for a file that does not have its digest, which is read once for each size and time of change."""
        if self.digests is not None:
            mapped.verify(self.folder, self.digests, AGAIN)
        elif self.name == "train":  # told once for both parts
            log.warning(
                "%s holds no digests, so damage of its images would go unnoticed. "
                "The `pixlat prepare images` that made it adds them to the files that are there.",
                self.folder / CARD,
            )

    def labels(self) -> NDArray[np.int64]:
        """(N,), each a class of the card."""
        file = self.folder / f"{self.name}-labels.npy"
        mapped.check_header(file, (self.images,), [np.int64], AGAIN)
        labels: NDArray[np.int64] = np.load(file)
        if len(labels) and not (labels.min() >= 0 and labels.max() < self.classes):
            raise UserError(
                f"{file} holds labels from {labels.min()} to {labels.max()}, "
                f"and {CARD} names {self.classes} classes. {AGAIN}"
            )
        return labels

    def read(self, index: int) -> NDArray[np.uint8]:
        """(3, S, S)."""
        return self.shards.read(index // self.shard_images, index % self.shard_images)


class WholeImages:
    """The resized images of which random crops are cut."""

    def __init__(self, part: StoredPart) -> None:
        ranges, self.shard_images = part._ranges("bin", f"{part.name}-resized"), part.shard_images
        self.sizes_file = sizes = part.folder / f"{part.name}-resized-sizes.npy"
        mapped.check_header(sizes, (part.images, 2), [np.int32], AGAIN)
        self.sizes: NDArray[np.int32] = np.load(sizes)
        pixels = self.sizes.astype(np.int64).prod(axis=1)
        if part.images and not (self.sizes.min(axis=1) == part.resize).all():
            raise UserError(
                f"{sizes} holds images whose shorter side is not the {part.resize} pixels of {CARD}. {AGAIN}"
            )
        if pixels.max(initial=0) > MAX_PIXELS:
            raise UserError(
                f"{sizes} holds an image of {pixels.max():,} pixels, and there can be {MAX_PIXELS:,}. {AGAIN}"
            )
        files = [part.folder / f"{part.name}-resized-{number:05d}.bin" for number, _ in ranges]
        for file, (_, rows) in zip(files, ranges, strict=True):
            expected = 3 * int(pixels[rows.start : rows.stop].sum())
            if file.stat().st_size != expected:
                raise UserError(f"{file} has {file.stat().st_size:,} bytes, and its images have {expected:,}. {AGAIN}")
        self.offsets = np.concatenate(
            [3 * (np.cumsum(pixels[rows.start : rows.stop]) - pixels[rows.start : rows.stop]) for _, rows in ranges]
            or [pixels]
        )
        self.opened = mapped.OpenFiles(files)

    def names(self) -> set[str]:
        """Of all files."""
        return {self.sizes_file.name, *(file.name for file in self.opened.files)}

    def read(self, index: int) -> NDArray[np.uint8]:
        """(H, W, 3)."""
        height, width = self.sizes[index].tolist()
        content = self.opened.read(index // self.shard_images, 3 * height * width, int(self.offsets[index]))
        return np.frombuffer(content, dtype=np.uint8).reshape(height, width, 3)


def read_shard_card(folder: Path) -> ShardCard:
    """The card of a finished folder; a UserError where there is none or where it is damaged."""
    content = mapped.read_card(folder / CARD, FORMAT, "images", CARD_RULES, later={"resize": None})
    where = f"{folder / CARD}, parts"
    parts = {
        name: PartCard(**mapped.check_fields(_with_later_fields(part), PART_RULES, where, AGAIN))
        for name, part in content["parts"].items()
    }
    return ShardCard(**{**content, "class_names": tuple(content["class_names"]), "parts": parts, "folder": folder})


def _with_later_fields(part: object) -> object:
    return {"sha256": None, "decoding": UNKNOWN} | part if isinstance(part, dict) else part
