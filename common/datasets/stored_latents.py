"""Latents of training images in files, which the training reads in the place of images (`data.latents`).

Imports no torch.

LatentShards     a folder of arrays with the posterior's moments of every image and of its mirror image
ReleasedLatents  the folder of one .npy file an image that the released training code of REPA and REG reads

Moments are kept and not latents: the posterior is sampled anew at every read, as when images are encoded in the loop.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pixlat.common.datasets import npy_shards as mapped
from pixlat.common.errors import UserError
from pixlat.common.images.image_set import ImageSet, LatentFacts

CARD = "latents.json"
FORMAT = 1

DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class LatentCard:
    """latents.json: what the shards hold and where they come from."""

    format: int
    tokenizer: str
    encoder_sha256: str
    data_digest: str  # of the training images
    images: int
    shape: tuple[int, int, int]  # (2 C, h, h)
    dtype: str
    shard_images: int
    shards: dict[str, str]  # file name -> sha256, in order


CARD_RULES: dict[str, mapped.Rule] = {
    "format": mapped.whole_number(FORMAT, FORMAT), "tokenizer": mapped.text,
    "encoder_sha256": mapped.text, "data_digest": mapped.text,
    "images": mapped.whole_number(1),
    "shape": lambda size: isinstance(size, list) and len(size) == 3 and all(map(mapped.whole_number(1, 2**20), size)),
    "dtype": lambda found: found in DTYPES, "shard_images": mapped.whole_number(1), "shards": mapped.text_map,
}  # fmt: skip


class LatentShards:
    """The folder that `write_latents` made. What its card says is held against the files before memory is taken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.card = card = read_latent_card(folder)
        self.facts = LatentFacts(card.shape, card.encoder_sha256)
        files = [folder / name for name in card.shards]
        ranges = mapped.shard_ranges(card.images, card.shard_images)
        shapes = [(len(rows), 2, *card.shape) for _, rows in ranges]
        headers = [
            mapped.check_header(file, shape, [card.dtype], self.advice(file))
            for file, shape in zip(files, shapes, strict=True)
        ]
        # a row is one orientation
        self.shards = mapped.Shards(files, card.shape, card.dtype, [header.offset for header in headers])

    def moments(self, indices: NDArray[np.int64], flips: NDArray[np.bool_]) -> NDArray[np.float32]:
        shard, image = np.divmod(indices, self.card.shard_images)
        rows = zip(shard.tolist(), (2 * image + flips).tolist(), strict=True)
        return np.stack([self.shards.read(number, row) for number, row in rows]).astype(np.float32)

    def check(self, images: ImageSet) -> None:
        """UserError unless the moments are those of these training images."""
        if self.card.data_digest != images.digest:
            raise UserError(
                f"{self.folder} holds the latents of {self.card.images} other images than the {len(images)} "
                f"of this training set (digest {self.card.data_digest[:12]} instead of {images.digest[:12]}). "
                "Prepare them again for these data settings."
            )

    def verify(self) -> None:
        """UserError if a shard does not have the digest of the card;
        it is read once for each size and time of change.
        """
        mapped.verify(self.folder, self.card.shards, self.advice("the damaged file"))

    def advice(self, file: object) -> str:
        """How damage is mended."""
        return f"Remove {self.folder / CARD} and {file}, and prepare the latents again."


def read_latent_card(folder: Path) -> LatentCard:
    """latents.json of a folder; a UserError if it is missing, damaged or of another format."""
    content = mapped.read_card(folder / CARD, FORMAT, "latents", CARD_RULES)
    count = mapped.shard_count(content["images"], content["shard_images"])
    if len(content["shards"]) != count or list(content["shards"]) != [shard_name(number) for number in range(count)]:
        told = (
            f"{content['images']:,} images, {content['shard_images']:,} a file, are in {count:,} files, "
            f"and it lists {len(content['shards']):,}"
        )
        raise UserError(f"{folder / CARD} is damaged: {told}. Remove it, and prepare the latents again.")
    return LatentCard(**{**content, "shape": tuple(content["shape"])})


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"moments-{number:05d}.npy"


class ReleasedLatents:
    """One float32 .npy (2 C, h, h) = [mean, std] an image, and dataset.json {"labels": [[file name,
    class], ...]}; no mirror images.

    The images are those of the training set in the sorted order of the file names,
    which is how the released code pairs them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            labels = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["labels"]
            entries = sorted((str(name), int(label)) for name, label in labels)
            self.labels = np.array([label for _, label in entries], dtype=np.int64)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(
                f'{folder / "dataset.json"} cannot be read as {{"labels": [[file name, class], ...]}} ({error!r}).'
            ) from error
        if not entries:
            raise UserError(f"{folder / 'dataset.json'} lists no latents.")
        self.files = [name for name, _ in entries]

    @cached_property
    def facts(self) -> LatentFacts:
        """The shape is that of the first file."""
        header = mapped.read_header(self.folder / self.files[0])
        if len(header.shape) != 3 or header.shape[0] % 2 or header.dtype.kind != "f":
            raise UserError(
                f"{self.folder / self.files[0]} holds {header.shape} numbers of type {header.dtype}, "
                "and moments are (2 C, h, h) of floats."
            )
        return LatentFacts(header.shape, None)

    def moments(self, indices: NDArray[np.int64], flips: NDArray[np.bool_]) -> NDArray[np.float32]:
        assert not np.any(flips)
        return np.stack([self._read(self.files[i]) for i in indices])

    def _read(self, name: str) -> NDArray[np.float32]:
        mapped.check_header(
            self.folder / name,
            self.facts.shape,
            ["float16", "float32", "float64"],
            "All latents of a folder have one shape.",
        )
        array: NDArray[np.float32] = np.load(self.folder / name).astype(np.float32)
        return array

    def check(self, images: ImageSet) -> None:
        """UserError unless number and classes are those of these training images;
        the files do not say more of their origin.
        """
        if not np.array_equal(self.labels, images.labels):
            raise UserError(
                f"{self.folder} lists {len(self.labels)} latents and the training set has {len(images)} images, "
                "or their classes differ. Use the folder of images from which these latents were made."
            )


def open_latents(
    folder: Path, images: ImageSet, mirrored: bool = False, verify: bool = True
) -> LatentShards | ReleasedLatents:
    """Stored moments for a training set: our shards, or the released layout. A folder of other images is a UserError.

    verify: whether damaged shards are looked for, as before a training; the released layout has no digests.
    mirrored: whether those of mirror images are needed, too, which the released layout does not have.
    """
    if not folder.is_dir():
        raise UserError(
            f"data.latents={str(folder)!r} is not a folder. Make one with `pixlat prepare latents to={folder}`."
        )
    latents = ReleasedLatents(folder) if (folder / "dataset.json").exists() else LatentShards(folder)
    if mirrored and isinstance(latents, ReleasedLatents):
        raise UserError(
            f"data.latents={folder} holds no mirror images. Set data.flip=false, "
            "or prepare latents with `pixlat prepare latents`."
        )
    latents.check(images)
    if verify and isinstance(latents, LatentShards):
        latents.verify()
    return latents
