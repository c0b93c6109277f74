"""Opens a data set: `load_data(config)` returns a training part and a held-out part of labelled square uint8 images.

emoji32    the embedded data set (common/images/emoji32.py, common/data/README.md), in memory
folder     any folder of images with one sub-folder per class, decoded on demand
tar, parquet, arrow    images in WebDataset tars or Hugging Face's tables, decoded on demand (common/images/)
shards     any of these, cropped once by `pixlat prepare images` (shards.py)
synthetic  coloured shapes of any size, drawn on demand

Nothing here is random: order, split and pixels depend only on the configuration and the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pixlat.common.datasets import shards
from pixlat.common.datasets.shard_images import ShardImages
from pixlat.common.datasets.summary import DataSummary
from pixlat.common.errors import UserError, close_match
from pixlat.common.images import synthetic
from pixlat.common.images.archive import HELD_OUT_NAMES
from pixlat.common.images.emoji32 import HELD_OUT_SHARE, IMAGE_SIZE, SHA256, load_emoji32
from pixlat.common.images.files import ArchiveImages, FolderImages, strictness
from pixlat.common.images.image_set import ArrayImages, ImageSet, SyntheticImages
from pixlat.common.images.listing import Listing, list_folder, sub_folders
from pixlat.common.images.open_archive import ARCHIVES, open_archive
from pixlat.common.images.splits import held_out

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
class DataSource:
    """A data set in two parts. balanced: whether training should draw classes uniformly."""

    info: DataSummary
    train: ImageSet
    heldout: ImageSet
    balanced: bool


def load_data(config: DataSettings, verify: bool = True) -> DataSource:
    """Opens the data set that the configuration names. Lists files and their sizes, but decodes no image.

    verify: whether to compare image shards and stored latents with their SHA-256. Trainings do; plans and costs do not.
    """
    if not 0 <= config.holdout < 1:
        raise UserError(
            f"data.holdout={config.holdout} is not a fraction. Set it to at least 0 and below 1, "
            "for instance data.holdout=0.1."
        )
    if config.image_size is not None and config.image_size < 1:
        raise UserError(
            f"data.image_size={config.image_size} is not a size in pixels. "
            "Set it to a positive number, for instance 256."
        )
    loaders = {
        "emoji32": _load_emoji32,
        "folder": _load_folder,
        "shards": _load_shards,
        "synthetic": _load_synthetic,
        **dict.fromkeys(ARCHIVES, _load_archive),
    }
    if config.name not in loaders:
        raise UserError(
            f"data={config.name!r} is not a data set.{close_match(config.name, loaders)} Data "
            f"sets: {', '.join(loaders)}."
        )
    if config.path and config.name not in ON_DISK:
        raise UserError(
            f"data.path={config.path!r} has no use with data={config.name}. Add data=folder, or leave the path out."
        )
    source = loaders[config.name](config)
    for part in (source.train, source.heldout):
        part.skips = config.broken == "skip"
        if verify and isinstance(part, ShardImages):
            part.part.verify()
    if config.crop == "random":
        _allow_random_crops(source.train, config.resize)
    num_classes = source.info.num_classes
    if config.num_classes not in (None, num_classes):
        raise UserError(
            f"data.num_classes={config.num_classes}, but {config.path or config.name} has {num_classes} classes. "
            f"Set {num_classes} or leave it out."
        )
    return with_latents(source, Path(config.latents).expanduser(), config.flip, verify) if config.latents else source


def _allow_random_crops(images: ImageSet, resize: int | None) -> None:
    """Sets `images.resize`, the size of images before random crops are cut, from the configuration or the shards."""
    if isinstance(images, ShardImages):
        resize = images.check_resized(resize)
    images.resize = resize or images.image_size
    if images.resize < images.image_size:
        raise UserError(
            f"data.resize={images.resize} is smaller than the crops, which have {images.image_size} pixels. "
            f"Set data.resize={images.image_size} or more."
        )


def with_latents(source: DataSource, folder: Path, mirrored: bool, verify: bool = True) -> DataSource:
    """The same data, with stored latents for the training images. UserError if the latents are of other images."""
    from pixlat.common.datasets.stored_latents import open_latents

    source.train.latents = latents = open_latents(folder, source.train, mirrored, verify)
    return replace(source, info=replace(source.info, latents=latents.facts))


def summarise(config: DataSettings) -> DataSummary:
    """Describes the data for plans and benchmarks.

    If data.path is not set or not on this computer, the summary comes from the configuration and has no images.
    """
    here = config.path is not None and Path(config.path).expanduser().exists()
    if config.name in ON_DISK and not here and config.num_classes and config.image_size:
        return DataSummary(config.name, config.num_classes, config.image_size, 0, 0, (), digest="")
    return load_data(config, verify=False).info


def _source(name: str, class_names: Sequence[str], train: ImageSet, heldout: ImageSet, balanced: bool) -> DataSource:
    digest = hashlib.sha256(f"{train.digest}\n{heldout.digest}\n".encode()).hexdigest()
    info = DataSummary(name, len(class_names), train.image_size, len(train), len(heldout), tuple(class_names), digest)
    return DataSource(info, train, heldout, balanced)


def _load_emoji32(config: DataSettings) -> DataSource:
    """By default training draws classes uniformly: the largest has almost six times the images of the smallest."""
    if config.image_size not in (None, IMAGE_SIZE):
        raise UserError(
            f"data.image_size={config.image_size}, but emoji32 has {IMAGE_SIZE}x{IMAGE_SIZE} pixels. "
            "Leave the size out, or use data=folder or data=synthetic."
        )
    data = load_emoji32()
    mask = held_out(data.concepts, data.labels, HELD_OUT_SHARE)

    def part(chosen: NDArray[np.bool_]) -> ArrayImages:
        identity = "\n".join([*SHA256.values(), hashlib.sha256(chosen.tobytes()).hexdigest()])
        return ArrayImages(data.images[chosen], data.labels[chosen], identity)

    return _source("emoji32", data.class_names, part(~mask), part(mask), balanced=config.balanced is not False)


def _load_synthetic(config: DataSettings) -> DataSource:
    size = config.image_size or IMAGE_SIZE
    train, heldout = (
        SyntheticImages(0, SYNTHETIC_TRAIN, size),
        SyntheticImages(SYNTHETIC_TRAIN, SYNTHETIC_HELD_OUT, size),
    )
    return _source("synthetic", synthetic.CLASS_NAMES, train, heldout, balanced=bool(config.balanced))


def _load_archive(config: DataSettings) -> DataSource:
    """Splits by the names of files and folders (train, val, ...); without such names by hashes of the images' names."""
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
            raise UserError(
                f"{first} and the images after it have labels from {labels.min()} to {labels.max()}, "
                f"but there are {len(archive.class_names)} classes."
            )
    parts = [ArchiveImages(archive, positions, size, config.modes == "convert") for positions in (train, heldout)]
    return _source(root.resolve().name, archive.class_names, parts[0], parts[1], balanced=bool(config.balanced))


def _load_shards(config: DataSettings) -> DataSource:
    """Shards from `pixlat prepare images`. They have the classes, the split and the digests of the original data."""
    if not config.path:
        raise UserError("data=shards needs data.path=FOLDER: the folder that `pixlat prepare images` made.")
    card = shards.read_shard_card(Path(config.path).expanduser())
    if config.image_size not in (None, card.image_size):
        raise UserError(
            f"data.image_size={config.image_size}, but {config.path} holds images of {card.image_size} pixels. "
            "Prepare shards of that size."
        )
    train, heldout = (ShardImages(card.part(name), card.image_size) for name in shards.PARTS)
    return _source(card.name, card.class_names, train, heldout, balanced=bool(config.balanced))


def _load_folder(config: DataSettings) -> DataSource:
    """Uses the sub-folders `train/` and `val/` (or `validation/`, `test/`) if they exist.

    Otherwise splits the images by hashes of their file names.
    """
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
    parts = [
        FolderImages(part.root, part.files, part.labels, size, part.digest() + strictness(convert), convert, part.sizes)
        for part in (train, heldout)
    ]
    return _source(root.resolve().name, train.class_names, parts[0], parts[1], balanced=bool(config.balanced))


def _held_out_files(listing: Listing, fraction: float) -> NDArray[np.bool_]:
    """Mask (N,) of the held-out files, computed class by class.

    This gives the same mask as all classes at once, because a name begins with its class, so no group spans two.
    It saves memory: only the names of one class are Python strings at a time.
    """
    counts = np.bincount(listing.labels)
    ends = np.cumsum(counts)
    spans = [slice(end - count, end) for end, count in zip(ends.tolist(), counts.tolist(), strict=True)]
    return np.concatenate([held_out(list(listing.files[span]), listing.labels[span], fraction) for span in spans])


def _place_and_size(config: DataSettings) -> tuple[Path, int]:
    """data.path and data.image_size. Data that are decoded on demand need both."""
    if not config.path:
        what = (
            "a folder with one sub-folder of images for each class"
            if config.name == "folder"
            else f"the folder of the .{config.name} files"
        )
        raise UserError(f"data={config.name} needs data.path=FOLDER: {what}.")
    if config.image_size is None:
        raise UserError(
            f"data={config.name} needs data.image_size=PIXELS: images are scaled and centre-cropped "
            "to that square, for instance 256."
        )
    return Path(config.path).expanduser(), config.image_size


def _parts_of(root: Path) -> tuple[Path, Path | None]:
    """The folder of the training classes, and the folder of the held-out classes or None."""
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
            f"{train.root} has {len(train.class_names)} classes and {heldout.root} has {len(heldout.class_names)}; "
            f"only one of them has: {shown}. Both need the same sub-folders."
        )
