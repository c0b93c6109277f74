"""Reads shards of images that were decoded and cropped once. They hold raw uint8 pixels; one request reads one image.

images.json               the card with the SHA-256 of every file, written last; a folder without it is unfinished
plan.json                 the data and the layout for which the folder was started, written first
train-labels.npy          int64 (N,)
train-00000.npy           uint8 (n, 3, S, S), and so on; `heldout-` likewise
train-resized-00000.bin   with data.crop=random: the uncropped images, (H, W, 3) one after another,
                          whose shorter side has data.resize pixels
train-resized-sizes.npy   int32 (N, 2): their heights and widths

Pixels, labels, order and identity are the same as in the original data set, and therefore also its digest.
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

AGAIN = f"Remove it and {CARD}, and run the same `pixlat prepare images` again: it makes the missing files."
log = logging.getLogger("pixlat")

CARD_RULES: dict[str, mapped.Rule] = {
    "format": mapped.whole_number(FORMAT, FORMAT), "name": mapped.text,
    "class_names": mapped.texts, "image_size": mapped.whole_number(1, 2**16),
    "shard_images": mapped.whole_number(1), "resize": lambda size: size is None or mapped.whole_number(1, 2**16)(size),
    "parts": lambda parts: isinstance(parts, dict) and tuple(parts) == PARTS,
}  # fmt: skip
PART_RULES: dict[str, mapped.Rule] = {
    "images": mapped.whole_number(0), "identity": mapped.text,
    "skipped": mapped.text_map, "sha256": lambda value: value is None or mapped.text_map(value),
    "decoding": lambda value: value is None or mapped.text(value),
}  # fmt: skip


@dataclass(frozen=True)
class PartCard:
    """The entry of one part (train or heldout) in images.json."""

    images: int
    identity: str  # of the original image set (`ImageSet.identity`)
    skipped: dict[str, str]  # position -> error message, for unreadable images that another image replaces
    sha256: dict[str, str] | None = None  # file name -> digest; None: prepared by a version that wrote no digests
    decoding: str | None = UNKNOWN  # digest of how the images were decoded (`ImageSet.decoding`)


@dataclass(frozen=True)
class ShardCard:
    """The content of images.json."""

    format: int
    name: str
    class_names: tuple[str, ...]
    image_size: int
    shard_images: int
    parts: dict[str, PartCard]
    folder: Path
    resize: int | None = None  # shorter side of the uncropped training images in pixels; None: only squares are stored

    def part(self, name: str) -> StoredPart:
        """The images of "train" or "heldout"."""
        return StoredPart(self, name)


class StoredPart:
    """Reads one part of the shards. Compares its files with the card before it allocates memory."""

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
        self.resized = ResizedImages(self) if card.resize and name == "train" else None
        expected = (
            {file.name for file in files} | {f"{name}-labels.npy"} | (self.resized.names() if self.resized else set())
        )
        if self.digests is not None and self.digests.keys() != expected:
            file = sorted(self.digests.keys() ^ expected)[0]
            fault = "lacks the digest of" if file in expected else "has a digest of the unknown file"
            raise UserError(f"{self.folder / CARD} is damaged: it {fault} {file}. {AGAIN}")

    def _ranges(self, suffix: str, stem: str) -> list[tuple[int, range]]:
        """The number and the positions of each shard. UserError unless there are as many files as the card implies."""
        expected = mapped.shard_count(self.images, self.shard_images)
        existing = sum(
            path.name.removeprefix(f"{stem}-").removesuffix(f".{suffix}").isdecimal()
            for path in self.folder.glob(f"{stem}-*.{suffix}")
        )
        if existing != expected:
            raise UserError(
                f"{self.folder / CARD} lists {self.images:,} {self.name} images in {expected:,} files "
                f"{stem}-*.{suffix} of {self.shard_images:,}, but the folder has {existing:,} such files. {AGAIN}"
            )
        return list(mapped.shard_ranges(self.images, self.shard_images))

    def verify(self) -> None:
        """Raises UserError if a file does not have its digest. Reads each file again only if it has changed."""
        if self.digests is not None:
            mapped.verify(self.folder, self.digests, AGAIN)
        elif self.name == "train":  # warn once for both parts
            log.warning(
                "%s holds no digests, so pixlat would not notice damaged images. "
                "Run the same `pixlat prepare images` again: it keeps the files and adds their digests.",
                self.folder / CARD,
            )

    def labels(self) -> NDArray[np.int64]:
        """Labels (N,). UserError unless each is the number of a class in the card."""
        file = self.folder / f"{self.name}-labels.npy"
        mapped.check_header(file, (self.images,), [np.int64], AGAIN)
        labels: NDArray[np.int64] = np.load(file)
        if len(labels) and not (labels.min() >= 0 and labels.max() < self.classes):
            raise UserError(
                f"{file} holds labels from {labels.min()} to {labels.max()}, "
                f"but {CARD} names {self.classes} classes. {AGAIN}"
            )
        return labels

    def read(self, index: int) -> NDArray[np.uint8]:
        """Reads the cropped image at a position, (3, S, S)."""
        return self.shards.read(index // self.shard_images, index % self.shard_images)


class ResizedImages:
    """Reads the resized, uncropped images, from which random crops are cut."""

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
                f"{sizes} holds an image of {pixels.max():,} pixels, but the limit is {MAX_PIXELS:,}. {AGAIN}"
            )
        files = [part.folder / f"{part.name}-resized-{number:05d}.bin" for number, _ in ranges]
        for file, (_, rows) in zip(files, ranges, strict=True):
            expected = 3 * int(pixels[rows.start : rows.stop].sum())
            if file.stat().st_size != expected:
                raise UserError(f"{file} has {file.stat().st_size:,} bytes, but its images have {expected:,}. {AGAIN}")
        self.offsets = np.concatenate(
            [3 * (np.cumsum(pixels[rows.start : rows.stop]) - pixels[rows.start : rows.stop]) for _, rows in ranges]
            or [pixels]
        )
        self.opened = mapped.OpenFiles(files)

    def names(self) -> set[str]:
        """The names of all files."""
        return {self.sizes_file.name, *(file.name for file in self.opened.files)}

    def read(self, index: int) -> NDArray[np.uint8]:
        """Reads the uncropped image at a position, (H, W, 3)."""
        height, width = self.sizes[index].tolist()
        content = self.opened.read(index // self.shard_images, 3 * height * width, int(self.offsets[index]))
        return np.frombuffer(content, dtype=np.uint8).reshape(height, width, 3)


def read_shard_card(folder: Path) -> ShardCard:
    """Reads the card of a finished folder. UserError if it is missing or damaged."""
    content = mapped.read_card(folder / CARD, FORMAT, "images", CARD_RULES, later={"resize": None})
    where = f"{folder / CARD}, parts"
    parts = {
        name: PartCard(**mapped.check_fields(_with_later_fields(part), PART_RULES, where, AGAIN))
        for name, part in content["parts"].items()
    }
    return ShardCard(**{**content, "class_names": tuple(content["class_names"]), "parts": parts, "folder": folder})


def _with_later_fields(part: object) -> object:
    return {"sha256": None, "decoding": UNKNOWN} | part if isinstance(part, dict) else part
