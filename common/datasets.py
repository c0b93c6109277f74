"""What there is to train on: `load_data(config)` gives a training part and a held-out part of labelled square uint8 images.

emoji32    the embedded data set (emoji32.py, data/README.md), in memory
folder     any folder of images with one sub-folder a class, decoded on demand
tar, parquet, arrow    images inside WebDataset tars or the tables of Hugging Face, decoded on demand (archives.py)
shards     any of these, cropped once by `launch/prepare.py images` (shards.py)
synthetic  coloured shapes of any size, drawn on demand

Nothing here is random: order, split and pixels depend on the configuration and the files alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from common import shards, synthetic
from common.archives import ARCHIVES, HELD_OUT_NAMES, Archive, open_archive
from common.archives import IMAGE_SUFFIXES as IMAGE_SUFFIXES  # for those who read data sets
from common.crop import cut_square, decode_resized, decode_square, enlarged, read_image_file
from common.decoding import decoding_digest
from common.emoji32 import HELD_OUT_SHARE, IMAGE_SIZE, SHA256, load_emoji32
from common.errors import UserError, close_match
from common.listing import Listing, list_folder, sub_folders
from common.splits import held_out

if TYPE_CHECKING:
    from common.latents import LatentFacts, Latents

ON_DISK = ("folder", "shards", *ARCHIVES)  # data sets that need data.path
SYNTHETIC_TRAIN, SYNTHETIC_HELD_OUT = 4600, 500


class DataSettings(Protocol):
    """The part of the configuration that this module reads (`data.*`)."""

    name: str
    path: str | None
    image_size: int | None
    num_classes: int | None
    flip: bool
    crop: str
    resize: int | None
    balanced: bool | None
    holdout: float
    latents: str | None
    broken: str
    modes: str


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


class ImageSet:
    """Labelled square images. A subclass says how an image is read."""

    def __init__(self, labels: NDArray[np.int64], image_size: int, identity: str) -> None:
        """`identity`: a text that determines every image of the set."""
        self.labels = labels
        self.image_size = image_size
        self.latents: Latents | None = None  # stored moments of the images, which then come with every training batch
        self.identity = identity
        self.resize = image_size  # pixels of the shorter side of which random crops are cut
        self.skips = False  # whether the next readable image of its class stands in for one that cannot be read, which otherwise is a UserError
        self.broken: dict[int, str] = {}  # position -> what is wrong, of the images that were skipped so far

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def decoding(self) -> str | None:
        """A digest of how the images are decoded and scaled (common/decoding.py); none where their numbers are stored as they are."""
        return None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what determines the images, their labels, order and size."""
        text = f"{self.identity}\n{self.image_size}\n".encode()
        return hashlib.sha256(text + self.labels.astype("<i8").tobytes()).hexdigest()

    def fetch(
        self,
        indices: Sequence[int] | NDArray[np.int64],
        flips: Sequence[bool] | NDArray[np.bool_] | None = None,
        offsets: NDArray[np.float64] | None = None,
    ) -> NDArray[np.uint8]:
        """Images (B, 3, H, W) uint8 at these positions, mirrored left to right where `flips` (B,) is true.

        They are centre crops. With offsets (B, 2) in [0, 1), down and right, they are cut there, of images whose shorter side has `resize` pixels.
        """
        images = self._read(np.asarray(indices, dtype=np.int64), offsets)
        if flips is not None:
            mirrored = np.asarray(flips, dtype=bool)
            images[mirrored] = images[mirrored, :, :, ::-1]
        return images

    def _read(self, indices: NDArray[np.int64], offsets: NDArray[np.float64] | None) -> NDArray[np.uint8]:
        """Fresh copies of the images, (B, 3, H, W)."""
        images = np.empty((len(indices), 3, self.image_size, self.image_size), dtype=np.uint8)
        for row, index in enumerate(indices.tolist()):
            read = self._read_one if offsets is None else partial(self._read_cut, offset=tuple(offsets[row].tolist()))
            images[row] = self._read_or_next(index, read) if self.skips else read(index)
        return images

    def fetch_resized(self, index: int) -> NDArray[np.uint8]:
        """One whole image, (H, W, 3) uint8, whose shorter side has `resize` pixels."""
        return self._read_or_next(index, self._read_resized) if self.skips else self._read_resized(index)

    def _read_or_next(self, index: int, read: Callable[[int], NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """The image; where it cannot be read the next one of its class, in a circle. The same in every process, whatever it has met before."""
        for candidate in self._stand_ins(index):
            if candidate not in self.broken:
                try:
                    return read(candidate)
                except UserError as error:
                    self.broken[candidate] = str(error)
        raise UserError(f"no image of class {self.labels[index]} can be read. The first of them: {self.broken[index]}")

    def _stand_ins(self, index: int) -> Iterator[int]:
        yield index
        alike = np.flatnonzero(self.labels == self.labels[index])
        yield from np.roll(alike, -1 - int(np.searchsorted(alike, index)))[:-1].tolist()

    def _read_cut(self, index: int, offset: tuple[float, float]) -> NDArray[np.uint8]:
        return cut_square(self._read_resized(index), offset, self.image_size)

    def _read_one(self, index: int) -> NDArray[np.uint8]:
        """The centre crop, (3, image_size, image_size)."""
        raise NotImplementedError

    def _read_resized(self, index: int) -> NDArray[np.uint8]:
        """The whole image, (H, W, 3), whose shorter side has `resize` pixels; here of a set that has nothing but the square."""
        return enlarged(self._read_one(index), self.resize)


class ArrayImages(ImageSet):
    """Images in memory."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64], identity: str) -> None:
        super().__init__(labels, images.shape[-1], identity)
        self.images = images

    def _read(self, indices: NDArray[np.int64], offsets: NDArray[np.float64] | None) -> NDArray[np.uint8]:
        return self.images[indices] if offsets is None else super()._read(indices, offsets)

    def _read_one(self, index: int) -> NDArray[np.uint8]:
        image: NDArray[np.uint8] = self.images[index]
        return image


class FolderImages(ImageSet):
    """Image files, decoded and cropped on demand."""

    def __init__(
        self,
        root: Path,
        files: Sequence[str],
        labels: NDArray[np.int64],
        image_size: int,
        identity: str,
        convert: bool = True,
        sizes: NDArray[np.int64] | None = None,
    ) -> None:
        """files: relative to root, with "/"; convert: as in common/crop.py; sizes: bytes of the files when they were listed, None not to compare them."""
        super().__init__(labels, image_size, identity)
        self.root, self.files, self.convert, self.sizes = root, files, convert, sizes

    def _read_one(self, index: int) -> NDArray[np.uint8]:
        content, path = self._content(index)
        return decode_square(content, self.image_size, path, self.convert)

    def _read_resized(self, index: int) -> NDArray[np.uint8]:
        content, path = self._content(index)
        return decode_resized(content, self.resize, path, self.convert)

    def _content(self, index: int) -> tuple[bytes, Path]:
        path = self.root / self.files[index]
        content = read_image_file(path)
        if self.sizes is not None and len(content) != self.sizes[index]:
            raise UserError(
                f"{path} has {len(content):,} bytes, and had {self.sizes[index]:,} when its folder was listed: the data have changed. "
                f"Run `touch {path.parent}`, so that it is listed anew, and start again."
            )
        return content, path

    @property
    def decoding(self) -> str | None:
        return decoding_digest()


class ArchiveImages(ImageSet):
    """Some of the images of an archive, decoded and cropped on demand."""

    def __init__(self, archive: Archive, positions: NDArray[np.int64], image_size: int, convert: bool = True) -> None:
        super().__init__(archive.labels[positions], image_size, archive.identity(positions) + _strictness(convert))
        self.archive, self.positions, self.convert = archive, positions, convert

    def _read_one(self, index: int) -> NDArray[np.uint8]:
        position = int(self.positions[index])
        return decode_square(self.archive.read(position), self.image_size, self.archive.name(position), self.convert)

    def _read_resized(self, index: int) -> NDArray[np.uint8]:
        position = int(self.positions[index])
        return decode_resized(self.archive.read(position), self.resize, self.archive.name(position), self.convert)

    @property
    def decoding(self) -> str | None:
        return decoding_digest()


class ShardImages(ImageSet):
    """Images that were cropped before, read as they are."""

    def __init__(self, part: shards.Part, image_size: int) -> None:
        super().__init__(part.labels(), image_size, part.identity)
        self.part = part

    def _read_one(self, index: int) -> NDArray[np.uint8]:
        return self.part.read(index)

    def _read_resized(self, index: int) -> NDArray[np.uint8]:
        assert self.part.whole is not None  # `check_resized` has looked
        return self.part.whole.read(index)

    def check_resized(self, wanted: int | None) -> int:
        """The pixels of the shorter side of the whole images that the shards hold; a UserError where they hold none, or others than wanted."""
        found, folder = self.part.resize, self.part.folder
        if found is None or wanted not in (None, found):
            holds = "squares alone" if found is None else f"images whose shorter side has {found} pixels"
            asked = f" data.resize={wanted}" if wanted else ""
            raise UserError(
                f"data.crop=random{asked}: {folder} holds {holds}. Prepare shards with `python launch/prepare.py images data.crop=random{asked} ...`"
                + (f", or set data.resize={found}." if found else ".")
            )
        return found

    @property
    def decoding(self) -> str | None:
        return self.part.decoding


class SyntheticImages(ImageSet):
    """Shapes, drawn on demand; image i of the set is number start + i of the sequence."""

    def __init__(self, start: int, count: int, image_size: int) -> None:
        labels = np.arange(start, start + count, dtype=np.int64) % len(synthetic.CLASS_NAMES)
        super().__init__(labels, image_size, f"synthetic/{start}/{count}")
        self.start = start

    def _read_one(self, index: int) -> NDArray[np.uint8]:
        return synthetic.draw(self.start + index, self.image_size)


@dataclass(frozen=True)
class DataSource:
    """A data set, split. `balanced`: whether training should draw classes uniformly."""

    info: DataSummary
    train: ImageSet
    heldout: ImageSet
    balanced: bool


def load_data(config: DataSettings, verify: bool = True) -> DataSource:
    """The data set that the configuration names. Folders are listed and measured, not decoded.

    verify: whether image shards and stored latents are held against their digests, as before a training; plans and costs do without.
    """
    if not 0 <= config.holdout < 1:
        raise UserError(f"data.holdout={config.holdout} is not a fraction. Set it to at least 0 and below 1, for instance data.holdout=0.1.")
    if config.image_size is not None and config.image_size < 1:
        raise UserError(f"data.image_size={config.image_size} is not a size in pixels. Set it to a positive number, for instance 256.")
    loaders = {"emoji32": _load_emoji32, "folder": _load_folder, "shards": _load_shards, "synthetic": _load_synthetic, **dict.fromkeys(ARCHIVES, _load_archive)}
    if config.name not in loaders:
        raise UserError(f"data={config.name!r} is not a data set.{close_match(config.name, loaders)} Data sets: {', '.join(loaders)}.")
    if config.path and config.name not in ON_DISK:
        raise UserError(f"data.path={config.path!r} is not read by data={config.name}. Add data=folder, or leave the path out.")
    source = loaders[config.name](config)
    for part in (source.train, source.heldout):
        part.skips = config.broken == "skip"
        if verify and isinstance(part, ShardImages):
            part.part.verify()
    if config.crop == "random":
        _allow_random_crops(source.train, config.resize)
    found = source.info.num_classes
    if config.num_classes not in (None, found):
        raise UserError(f"data.num_classes={config.num_classes}, but {config.path or config.name} has {found} classes. Set {found} or leave it out.")
    return with_latents(source, Path(config.latents).expanduser(), config.flip, verify) if config.latents else source


def _allow_random_crops(images: ImageSet, resize: int | None) -> None:
    """Sets the size of which random crops are cut, as the configuration has it or as the shards hold it."""
    if isinstance(images, ShardImages):
        resize = images.check_resized(resize)
    images.resize = resize or images.image_size
    if images.resize < images.image_size:
        raise UserError(f"data.resize={images.resize} is smaller than the squares of {images.image_size} pixels that are cut of it. Raise it.")


def with_latents(source: DataSource, folder: Path, mirrored: bool, verify: bool = True) -> DataSource:
    """The same data, whose training images come with their stored latents; a folder of other images is a UserError."""
    from common.latents import open_latents

    source.train.latents = latents = open_latents(folder, source.train, mirrored, verify)
    return replace(source, info=replace(source.info, latents=latents.facts))


def summarise(config: DataSettings) -> DataSummary:
    """What the data are, for plans and benchmarks: a folder that is not named yet, or is not on this computer, is described by the
    configuration alone, with no training images."""
    here = config.path is not None and Path(config.path).expanduser().exists()
    if config.name in ON_DISK and not here and config.num_classes and config.image_size:
        return DataSummary(config.name, config.num_classes, config.image_size, 0, 0, (), digest="")
    return load_data(config, verify=False).info


def _source(name: str, class_names: Sequence[str], train: ImageSet, heldout: ImageSet, balanced: bool) -> DataSource:
    digest = hashlib.sha256(f"{train.digest}\n{heldout.digest}\n".encode()).hexdigest()
    info = DataSummary(name, len(class_names), train.image_size, len(train), len(heldout), tuple(class_names), digest)
    return DataSource(info, train, heldout, balanced)


def _load_emoji32(config: DataSettings) -> DataSource:
    """Classes are drawn uniformly by default, because they differ sixfold in size."""
    if config.image_size not in (None, IMAGE_SIZE):
        raise UserError(
            f"data.image_size={config.image_size}, but emoji32 has {IMAGE_SIZE}x{IMAGE_SIZE} pixels. Leave the size out, or use data=folder or data=synthetic."
        )
    data = load_emoji32()
    mask = held_out(data.concepts, data.labels, HELD_OUT_SHARE)

    def part(chosen: NDArray[np.bool_]) -> ArrayImages:
        identity = "\n".join([*SHA256.values(), hashlib.sha256(chosen.tobytes()).hexdigest()])
        return ArrayImages(data.images[chosen], data.labels[chosen], identity)

    return _source("emoji32", data.class_names, part(~mask), part(mask), balanced=config.balanced is not False)


def _load_synthetic(config: DataSettings) -> DataSource:
    size = config.image_size or IMAGE_SIZE
    train, heldout = SyntheticImages(0, SYNTHETIC_TRAIN, size), SyntheticImages(SYNTHETIC_TRAIN, SYNTHETIC_HELD_OUT, size)
    return _source("synthetic", synthetic.CLASS_NAMES, train, heldout, balanced=bool(config.balanced))


# -- archives and shards --------------------------------------------------------------------------------------------------------


def _load_archive(config: DataSettings) -> DataSource:
    """Split by what the names of files and folders say, else by the hash of the images' names."""
    root, size = _place_and_size(config)
    archive = open_archive(config.name, root)
    train, heldout = archive.split()
    if heldout is None:
        mask = held_out([archive.name(index) for index in train.tolist()], archive.labels[train], config.holdout)
        train, heldout = train[~mask], train[mask]
    for positions in (train, heldout):
        labels = archive.labels[positions]
        if len(labels) and (labels.min() < 0 or labels.max() >= len(archive.class_names)):
            first = archive.name(int(positions[0]))
            raise UserError(f"{first} and what follows it: labels from {labels.min()} to {labels.max()}, and there are {len(archive.class_names)} classes.")
    parts = [ArchiveImages(archive, positions, size, config.modes == "convert") for positions in (train, heldout)]
    return _source(root.resolve().name, archive.class_names, parts[0], parts[1], balanced=bool(config.balanced))


def _load_shards(config: DataSettings) -> DataSource:
    """What `launch/prepare.py images` made, with the classes, the split and the digests of the data that it was made of."""
    if not config.path:
        raise UserError("data=shards needs data.path=FOLDER: what `python launch/prepare.py images` made.")
    card = shards.read_card(Path(config.path).expanduser())
    if config.image_size not in (None, card.image_size):
        raise UserError(f"data.image_size={config.image_size}, but {config.path} holds images of {card.image_size} pixels. Prepare shards of that size.")
    train, heldout = (ShardImages(card.part(name), card.image_size) for name in shards.PARTS)
    return _source(card.name, card.class_names, train, heldout, balanced=bool(config.balanced))


# -- folders --------------------------------------------------------------------------------------------------------------------


def _load_folder(config: DataSettings) -> DataSource:
    """`train/` and `val/` (or `validation/`, `test/`) sub-folders where they exist, else a split by the hash of the file names."""
    root, size = _place_and_size(config)
    convert = config.modes == "convert"
    train_root, heldout_root = _parts_of(root)
    train = list_folder(train_root)
    if heldout_root is None:
        mask = _held_out_files(train, config.holdout)
        heldout = train.part(mask)
        train = train.part(~mask)
    else:
        heldout = list_folder(heldout_root)
        _check_same_classes(train, heldout)
    parts = [FolderImages(part.root, part.files, part.labels, size, part.digest() + _strictness(convert), convert, part.sizes) for part in (train, heldout)]
    return _source(root.resolve().name, train.class_names, parts[0], parts[1], balanced=bool(config.balanced))


def _held_out_files(listing: Listing, fraction: float) -> NDArray[np.bool_]:
    """Mask (N,), class by class: a name begins with its class, so no group spans two, and only one class's names are strings at a time."""
    counts = np.bincount(listing.labels)
    ends = np.cumsum(counts)
    spans = [slice(end - count, end) for end, count in zip(ends.tolist(), counts.tolist(), strict=True)]
    return np.concatenate([held_out(list(listing.files[span]), listing.labels[span], fraction) for span in spans])


def _place_and_size(config: DataSettings) -> tuple[Path, int]:
    """data.path and data.image_size, which data that are decoded on demand need."""
    if not config.path:
        what = "a folder with one sub-folder of images for each class" if config.name == "folder" else f"the folder of the .{config.name} files"
        raise UserError(f"data={config.name} needs data.path=FOLDER: {what}.")
    if config.image_size is None:
        raise UserError(f"data={config.name} needs data.image_size=PIXELS: images are scaled and centre-cropped to that square, for instance 256.")
    return Path(config.path).expanduser(), config.image_size


def _strictness(convert: bool) -> str:
    """What the identity of a set has besides names and sizes: where odd modes are refused, other images may stand in."""
    return "" if convert else "\nstrict"


def _parts_of(root: Path) -> tuple[Path, Path | None]:
    """The folder of training classes and that of held-out classes, if the data come split."""
    names = sub_folders(root)
    if "train" not in names or not sub_folders(root / "train"):
        return root, None
    heldout = [name for name in HELD_OUT_NAMES if name in names]
    return root / "train", root / heldout[0] if heldout else None


def _check_same_classes(train: Listing, heldout: Listing) -> None:
    missing = sorted(set(train.class_names) ^ set(heldout.class_names))
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(
            f"{train.root} has {len(train.class_names)} classes and {heldout.root} has {len(heldout.class_names)}; only one of them has: {shown}. "
            "Both need the same sub-folders."
        )
